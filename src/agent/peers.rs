//! With what the agent meets its peers: TLS and the host's certificate as it is now, or nothing.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use migrator::transport::tls::Tls;

use crate::trust::Link;
use crate::trust::store::{HostTrust, Stamp, Store};

/// The agent's own key is renewed this often: far within its certificate's days.
const RENEW_EVERY: Duration = Duration::from_secs(24 * 3600);

/// How peers are met.
pub struct Peers {
    /// None: in clear text, whatever files there are.
    trust: Option<(Store, Mutex<Current>)>,
}

struct Current {
    stamp: Stamp,
    made: Instant,
    tls: Tls,
    host: HostTrust,
}

impl Current {
    fn load(store: &Store) -> Result<Self> {
        // Before the files are read: if they change meanwhile, they are read again.
        let stamp = store.stamp();
        let host = store.open_set_up()?;
        let tls = crate::trust::tls(&host.mint()?)?;
        Ok(Current { stamp, made: Instant::now(), tls, host })
    }
}

impl Peers {
    /// For an agent that listens on `address`: with TLS if the host has a certificate. Without one, clear text on loopback only.
    pub fn new(address: SocketAddr, insecure_plaintext: bool) -> Result<Self> {
        let store = Store::from_env()?;
        if insecure_plaintext {
            tracing::warn!("connections are neither encrypted nor authenticated (--insecure-plaintext)");
            return Ok(Peers { trust: None });
        }
        if store.open()?.is_none() {
            if !address.ip().is_loopback() {
                bail!(
                    "refusing to listen on {address} in clear text: this host has no certificate, so whoever reaches the port could read \
                     and replace guests' memory. Make a fleet (microvm trust init) or join one (microvm trust issue on its CA's host, \
                     microvm trust import here); on a network that is yours alone, --insecure-plaintext does without"
                );
            }
            return Ok(Peers { trust: None });
        }
        let current = Current::load(&store)?;
        tracing::info!(host = current.host.facts.subject, fleet = current.host.bundle.fleet()?, "trusting");
        Ok(Peers { trust: Some((store, Mutex::new(current))) })
    }

    /// For the next connection: what the files say now.
    pub fn tls(&self) -> Option<Tls> {
        self.current(|current| current.tls.clone())
    }

    /// For one migration: a key of its own.
    pub fn link(&self) -> Result<Link> {
        match self.current(|current| current.host.clone()) {
            Some(host) => Ok(Link::Tls(Box::new(host.mint()?))),
            None => Ok(Link::Plaintext),
        }
    }

    fn current<T>(&self, get: impl FnOnce(&Current) -> T) -> Option<T> {
        let (store, current) = self.trust.as_ref()?;
        let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.stamp != store.stamp() || current.made.elapsed() > RENEW_EVERY {
            match Current::load(store) {
                Ok(new) => {
                    tracing::info!(host = new.host.facts.subject, "the host's certificate was read again");
                    *current = new;
                }
                Err(error) => tracing::warn!("going on with the certificate as it was: {error:#}"),
            }
        }
        Some(get(&current))
    }
}
