//! Where trust lies: `trust/` in the configuration folder. Files are replaced whole, by renaming, so that whoever reads one reads all
//! of it; keys can be read by their owner only.
//!
//! | file | what | on |
//! | --- | --- | --- |
//! | `roots.pem` | the fleet's authorities | every host |
//! | `host.pem` | this host's certificate and key | every host |
//! | `revoked.pem` | what the authorities have revoked | every host, if anything is |
//! | `authority.pem` | the authorities' certificates and keys | the CA's host |
//! | `issued.json` | what they have certified | the CA's host |

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use migrator::transport::tls::Credentials;
use serde::{Deserialize, Serialize};

use super::authority::{self, Certified};
use super::bundle::{self, Bundle};
use super::certificate::{Facts, Revocations};

/// This host's trust folder, which need not be there.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// What a host has, read together.
#[derive(Clone)]
pub struct HostTrust {
    /// The host's certificate.
    pub facts: Facts,
    /// Authorities and revocations, and the host's own.
    pub bundle: Bundle,
    host: Certified,
}

/// One certificate that the CA's host gave out.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issued {
    /// To which host.
    pub host: String,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// By which authority.
    pub issuer: String,
    /// Seconds since 1970.
    pub not_after: i64,
    /// It must not be trusted any more.
    pub revoked: bool,
}

/// Identifies the state of the files: what changes them changes this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp([Option<(u64, i64, i64)>; 3]);

const ROOTS: &str = "roots.pem";
const HOST: &str = "host.pem";
const REVOKED: &str = "revoked.pem";
const AUTHORITY: &str = "authority.pem";
const ISSUED: &str = "issued.json";

/// `$MICROVM_CONFIG_DIR`; else `/etc/microvm` for root, `$XDG_CONFIG_HOME/microvm` or `~/.config/microvm` for others.
pub fn config_dir() -> Result<PathBuf> {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    Ok(match (var("MICROVM_CONFIG_DIR"), var("XDG_CONFIG_HOME"), var("HOME")) {
        (Some(dir), ..) => dir,
        _ if rustix::process::geteuid().is_root() => "/etc/microvm".into(),
        (_, Some(dir), _) => dir.join("microvm"),
        (_, _, Some(home)) => home.join(".config/microvm"),
        _ => bail!("neither MICROVM_CONFIG_DIR nor HOME is set: set one of them"),
    })
}

impl Store {
    /// This host's.
    pub fn from_env() -> Result<Self> {
        Ok(Store { dir: config_dir()?.join("trust") })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn read(&self, name: &str) -> Result<Option<String>> {
        let path = self.dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        let written = (|| {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
            let new = self.dir.join(format!(".{name}.new"));
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.dir)?.sync_all()
        })();
        written.with_context(|| format!("cannot write {}", path.display()))
    }

    /// Which state the files are in.
    pub fn stamp(&self) -> Stamp {
        Stamp([ROOTS, HOST, REVOKED].map(|name| {
            fs::metadata(self.dir.join(name)).ok().map(|data| (data.ino(), data.mtime(), data.mtime_nsec()))
        }))
    }

    /// What this host has; `None` if nothing was set up.
    pub fn open(&self) -> Result<Option<HostTrust>> {
        let Some(text) = self.read(HOST)? else { return Ok(None) };
        let damaged = || format!("{} is damaged: microvm trust import mends it", self.dir.display());
        let host = bundle::certified(&text).with_context(damaged)?.pop().with_context(damaged)?;
        let roots = self.read(ROOTS)?.with_context(damaged)?;
        let split = |text: &str| -> Result<Vec<String>> {
            Ok(pem::parse_many(text).with_context(damaged)?.iter().map(bundle::encode).collect())
        };
        let revoked = self.read(REVOKED)?.unwrap_or_default();
        let facts = bundle::facts(&host.certificate).with_context(damaged)?;
        let bundle = Bundle { host: Some(host.clone()), roots: split(&roots)?, revoked: split(&revoked)? };
        Ok(Some(HostTrust { facts, bundle, host }))
    }

    /// What this host has, which must be something.
    pub fn open_set_up(&self) -> Result<HostTrust> {
        self.open()?
            .context("this host belongs to no fleet: microvm trust init makes one, microvm trust import joins one")
    }

    /// Makes a fleet whose CA's host this is.
    pub fn init(&self, fleet: &str, host: &str, more: &[String], days: u32) -> Result<HostTrust> {
        if let Some(there) = self.open()? {
            bail!(
                "this host belongs to the fleet {} already, as {}: microvm trust show; to begin anew, remove {}",
                there.bundle.fleet()?,
                there.facts.subject,
                self.dir.display()
            );
        }
        let authority = authority::create(fleet, 1)?;
        let certified = authority::certify(&authority, host, more, days)?;
        self.write(AUTHORITY, &(authority.certificate.clone() + &authority.key))?;
        self.record(&certified)?;
        self.write(ROOTS, &authority.certificate)?;
        // Last: with it, this host is set up.
        self.write(HOST, &(certified.certificate + &certified.key))?;
        self.open_set_up()
    }

    /// The authorities, the one that signs first. Only the CA's host has them.
    fn authorities(&self) -> Result<Vec<Certified>> {
        let text = self.read(AUTHORITY)?.with_context(|| match self.open() {
            Ok(Some(_)) => "this is not the CA's host: only the host on which the fleet was made can do that",
            _ => "there is no fleet here: microvm trust init makes one",
        })?;
        let all = bundle::certified(&text).context("the authority's file is damaged")?;
        ensure!(!all.is_empty(), "the authority's file is empty");
        Ok(all)
    }

    /// What the authorities of this host have certified. Only the CA's host knows.
    pub fn issued(&self) -> Result<Vec<Issued>> {
        match self.read(ISSUED)? {
            None => Ok(Vec::new()),
            Some(text) => serde_json::from_str(&text).context("the list of issued certificates is damaged"),
        }
    }

    fn record(&self, certified: &Certified) -> Result<()> {
        let Facts { subject, issuer, serial, not_after, .. } = bundle::facts(&certified.certificate)?;
        let mut issued = self.issued()?;
        // What has expired cannot be used, revoked or not.
        issued.retain(|one| one.not_after > bundle::unix_now());
        issued.push(Issued { host: subject, serial, issuer, not_after, revoked: false });
        self.write(ISSUED, &serde_json::to_string_pretty(&issued)?)
    }

    /// Certifies a host: what it must import.
    pub fn issue(&self, host: &str, more: &[String], days: u32) -> Result<Bundle> {
        let authorities = self.authorities()?;
        let here = self.open_set_up()?;
        ensure!(here.facts.subject != host, "{host} is this host: microvm trust rotate renews its certificate");
        let certified = authority::certify(&authorities[0], host, more, days)?;
        self.record(&certified)?;
        Ok(Bundle { host: Some(certified), ..here.bundle })
    }

    /// What every host of the fleet may know: authorities and revocations.
    pub fn export(&self) -> Result<Bundle> {
        Ok(Bundle { host: None, ..self.open_set_up()?.bundle })
    }

    /// Installs a bundle: replaces the authorities, merges revocations, and takes the host's certificate if there is one.
    pub fn import(&self, new: Bundle) -> Result<HostTrust> {
        let old = self.open()?;
        let fleet = new.fleet()?;
        ensure!(
            new.host.is_some() || old.is_some(),
            "this bundle has no certificate for this host: microvm trust issue HOST, on the CA's host, makes one that has"
        );
        if let Some(old) = &old {
            ensure!(
                old.bundle.fleet()? == fleet,
                "this host belongs to the fleet {}, the bundle to {fleet}: to change over, remove {} first",
                old.bundle.fleet()?,
                self.dir.display()
            );
        }
        ensure!(self.read(AUTHORITY)?.is_none(), "this is the CA's host, where bundles are made: microvm trust show");
        let host = new.host.clone().or_else(|| old.as_ref().map(|old| old.host.clone()));
        let mut merged = Bundle { host, roots: new.roots, revoked: Vec::new() };
        let known = old.map(|old| old.bundle.revoked).unwrap_or_default();
        merged.revoked = newest(&merged.roots, known.into_iter().chain(new.revoked))?;
        // Checked again as a whole: the host's certificate may not be from these authorities, or be revoked.
        let merged = Bundle::from_text(&merged.to_text())?;
        let host = merged.host.context("the bundle has no certificate for this host")?;
        if !merged.revoked.is_empty() {
            self.write(REVOKED, &merged.revoked.concat())?;
        }
        self.write(ROOTS, &merged.roots.concat())?;
        self.write(HOST, &(host.certificate + &host.key))?;
        self.open_set_up()
    }

    /// Renews this host's certificate, under the same names and `more`. On the CA's host only.
    pub fn rotate(&self, more: &[String], days: u32) -> Result<HostTrust> {
        let here = self.open_set_up()?;
        let host = here.facts.subject.clone();
        let authorities = self.authorities().with_context(|| {
            format!("a host's certificate is renewed by the CA's host: there microvm trust issue {host}, here microvm trust import")
        })?;
        let names: Vec<String> = here.facts.names.iter().chain(more).filter(|name| **name != host).cloned().collect();
        let certified = authority::certify(&authorities[0], &host, &names, days)?;
        self.record(&certified)?;
        self.write(HOST, &(certified.certificate + &certified.key))?;
        self.open_set_up()
    }

    /// Makes a new authority, which signs from now on. The old one stays trusted until [`Self::finish_rotation`].
    pub fn rotate_authority(&self) -> Result<()> {
        let authorities = self.authorities()?;
        ensure!(
            authorities.len() == 1,
            "the authority is being replaced already: when every host has a certificate of the new one, microvm trust rotate --finish"
        );
        let subject = bundle::facts(&authorities[0].certificate)?.subject;
        let (fleet, generation) = authority::fleet(&subject).context("the authority's name is damaged")?;
        let new = authority::create(fleet, generation + 1)?;
        let both = [new, authorities[0].clone()];
        self.write(AUTHORITY, &pairs(&both))?;
        self.write(ROOTS, &both.map(|one| one.certificate).concat())
    }

    /// Drops the old authority. This host must have a certificate of the new one.
    pub fn finish_rotation(&self) -> Result<()> {
        let mut authorities = self.authorities()?;
        ensure!(authorities.len() > 1, "no authority is being replaced: microvm trust rotate --ca begins");
        authorities.truncate(1);
        let new = bundle::facts(&authorities[0].certificate)?.subject;
        let here = self.open_set_up()?;
        ensure!(
            here.facts.issuer == new,
            "this host's certificate is of the old authority: microvm trust rotate first"
        );
        let roots = vec![authorities[0].certificate.clone()];
        self.write(REVOKED, &newest(&roots, here.bundle.revoked.into_iter())?.concat())?;
        self.write(ROOTS, &roots.concat())?;
        self.write(AUTHORITY, &pairs(&authorities))
    }

    /// Revokes every certificate that `host` was given so far. Returns how many.
    pub fn revoke(&self, host: &str) -> Result<usize> {
        let authorities = self.authorities()?;
        let here = self.open_set_up()?;
        ensure!(here.facts.subject != host, "{host} is this host, the CA's: it cannot be revoked, only replaced");
        let mut issued = self.issued()?;
        ensure!(
            issued.iter().any(|one| one.host == host),
            "no host {host} has a certificate of this fleet: microvm trust show lists them"
        );
        let mut count = 0;
        for one in issued.iter_mut().filter(|one| one.host == host && !one.revoked) {
            (one.revoked, count) = (true, count + 1);
        }
        let number = revocations(&here.bundle.revoked)?.iter().map(|list| list.number).max().unwrap_or(0) + 1;
        let mut lists = Vec::new();
        for authority in &authorities {
            let subject = bundle::facts(&authority.certificate)?.subject;
            let of_it = issued.iter().filter(|one| one.revoked && one.issuer == subject);
            let serials: Vec<String> = of_it.map(|one| one.serial.clone()).collect();
            if !serials.is_empty() {
                lists.push(authority::revocations(authority, number, &serials)?);
            }
        }
        self.write(ISSUED, &serde_json::to_string_pretty(&issued)?)?;
        self.write(REVOKED, &lists.concat())?;
        Ok(count)
    }
}

/// Certificates with their keys, as they lie in a file.
fn pairs(certified: &[Certified]) -> String {
    certified.iter().map(|one| one.certificate.clone() + &one.key).collect()
}

/// What the lists in these texts say.
pub fn revocations(texts: &[String]) -> Result<Vec<Revocations>> {
    bundle::revocation_lists(&texts.concat())?.iter().map(Revocations::of).collect()
}

/// The newest list of each of these authorities: it names all that the ones before it named and that has not expired.
fn newest(roots: &[String], lists: impl Iterator<Item = String>) -> Result<Vec<String>> {
    let roots = bundle::certificates(&roots.concat())?;
    let mut best: Vec<(Revocations, String)> = Vec::new();
    for text in lists {
        for der in bundle::revocation_lists(&text)? {
            if !roots.iter().any(|root| super::certificate::is_signed_by(&der, root)) {
                continue;
            }
            let list = Revocations::of(&der)?;
            match best.iter_mut().find(|(known, _)| known.issuer == list.issuer) {
                Some(known) if known.0.number >= list.number => {}
                Some(known) => *known = (list, text.clone()),
                None => best.push((list, text.clone())),
            }
        }
    }
    Ok(best.into_iter().map(|(_, text)| text).collect())
}

impl HostTrust {
    /// Credentials for one migration, or for a while of the agent: a key of their own, good for some days.
    pub fn mint(&self) -> Result<Credentials> {
        let now = bundle::unix_now();
        let host = &self.facts.subject;
        ensure!(
            now < self.facts.not_after,
            "the certificate of this host, {host}, has expired: on the CA's host, microvm trust issue {host}; here, microvm trust import"
        );
        ensure!(
            now >= self.facts.not_before,
            "the certificate of this host, {host}, is not valid yet: is this host's clock right?"
        );
        let leaf = authority::mint(&self.host, &self.facts.names)?;
        Ok(authority::credentials(leaf, &self.bundle.roots.concat(), &self.bundle.revoked.concat()))
    }
}
