//! Who this host is, and whom it trusts: a fleet's own small CA.
//!
//! [`store`] is what lies in files, [`authority`] what signs. What leaves this room is a [`Link`]: what one connection, or one
//! migration, is secured with. It never holds the host's own key: see `docs/decisions/0011-a-key-for-each-migration.md`.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use migrator::options::Timeouts;
use migrator::transport::TcpDialer;
use migrator::transport::tls::{Credentials, Tls};
use serde::{Deserialize, Serialize};

pub mod authority;
pub mod bundle;
pub mod certificate;
pub mod store;

use crate::agent::with_port;
use store::Store;

/// What connections are secured with.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// TLS, with a key made for this.
    Tls(Box<Credentials>),
    /// Nothing.
    Plaintext,
}

impl Link {
    /// For connections to `peer`: TLS if this host has a certificate. Without one, clear text, but only to this machine itself.
    pub fn to(peer: &str, insecure_plaintext: bool) -> Result<Self> {
        match Store::from_env()?.open()? {
            _ if insecure_plaintext => Ok(Link::Plaintext),
            Some(host) => Ok(Link::Tls(Box::new(host.mint()?))),
            None if is_loopback(peer) => Ok(Link::Plaintext),
            None => bail!(
                "refusing to talk to {peer} in clear text: this host has no certificate. Make a fleet (microvm trust init) or join one \
                 (microvm trust issue on its CA's host, microvm trust import here); on a network that is yours alone, \
                 --insecure-plaintext does without"
            ),
        }
    }

    /// For asking what became of a VM that this host sent away: TLS if it has a certificate. Without one it can have been sent in
    /// clear text only.
    pub fn for_questions() -> Result<Self> {
        Ok(match Store::from_env()?.open()? {
            Some(host) => Link::Tls(Box::new(host.mint()?)),
            None => Link::Plaintext,
        })
    }

    /// How to reach the agent of `peer`, HOST or HOST:PORT.
    pub fn dialer(&self, peer: &str, timeouts: Timeouts) -> Result<TcpDialer> {
        let dialer = TcpDialer::new(with_port(peer), timeouts);
        Ok(match self.tls()? {
            Some(tls) => dialer.with_tls(tls),
            None => dialer,
        })
    }

    /// Ready to be used; `None` in clear text.
    pub fn tls(&self) -> Result<Option<Tls>> {
        match self {
            Link::Tls(credentials) => tls(credentials).map(Some),
            Link::Plaintext => Ok(None),
        }
    }
}

/// TLS with these credentials.
pub fn tls(credentials: &Credentials) -> Result<Tls> {
    Tls::new(credentials).context("this host's certificate cannot be used")
}

/// Whether `peer`, HOST or HOST:PORT, is this machine, as far as can be told without asking anybody.
fn is_loopback(peer: &str) -> bool {
    let peer = with_port(peer);
    let host = peer.rsplit_once(':').map_or(peer.as_str(), |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        for yes in ["127.0.0.1", "127.0.0.9:99", "localhost", "localhost:1", "::1", "[::1]:7437"] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in ["10.0.0.1", "host2", "localhost.example.com", "127.0.0.1.example.com", "[fd00::1]:1"] {
            assert!(!is_loopback(no), "{no}");
        }
    }
}
