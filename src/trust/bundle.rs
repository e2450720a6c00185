//! What one host carries to another: PEM, one after the other (RFC 7468). A host's certificate and key, if it is for one host; then
//! the fleet's authorities and what they have revoked.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use pem::Pem;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};

use super::authority::{self, Certified};
use super::certificate::{Facts, Revocations, certificate_is_signed_by, is_signed_by};

const CERTIFICATE: &str = "CERTIFICATE";
const KEY: &str = "PRIVATE KEY";
const REVOKED: &str = "X509 CRL";
/// The longest text that is looked at.
pub const MAX_BYTES: u64 = 4 << 20;

/// A bundle that was checked.
#[derive(Clone)]
pub struct Bundle {
    /// The host's certificate and key, if it is for one.
    pub host: Option<Certified>,
    /// The authorities, PEM.
    pub roots: Vec<String>,
    /// What they have revoked: at most one list each, PEM.
    pub revoked: Vec<String>,
}

/// One section of PEM text.
pub fn encode(pem: &Pem) -> String {
    pem::encode_config(pem, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
}

fn parse(text: &str, tag: &str) -> Result<Vec<Pem>> {
    let all = pem::parse_many(text).context("this is not PEM text")?;
    Ok(all.into_iter().filter(|pem| pem.tag() == tag).collect())
}

/// The certificates in a text.
pub fn certificates(text: &str) -> Result<Vec<CertificateDer<'static>>> {
    Ok(parse(text, CERTIFICATE)?.into_iter().map(|pem| pem.into_contents().into()).collect())
}

/// The revocation lists in a text.
pub fn revocation_lists(text: &str) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    Ok(parse(text, REVOKED)?.into_iter().map(|pem| pem.into_contents().into()).collect())
}

/// Certificates with their keys, in a text in which each key follows its certificate.
pub fn certified(text: &str) -> Result<Vec<Certified>> {
    let (certificates, keys) = (parse(text, CERTIFICATE)?, parse(text, KEY)?);
    ensure!(certificates.len() == keys.len(), "a certificate or a key is missing");
    let pairs = certificates.iter().zip(&keys);
    Ok(pairs.map(|(certificate, key)| Certified { certificate: encode(certificate), key: encode(key) }).collect())
}

impl Bundle {
    /// As it is carried.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        if let Some(host) = &self.host {
            text += &format!("{}{}", host.certificate, host.key);
        }
        text + &self.roots.concat() + &self.revoked.concat()
    }

    /// Reads and checks it: that everything is there, is what it should be, belongs together and is valid now.
    pub fn from_text(text: &str) -> Result<Self> {
        let all = pem::parse_many(text).context("this is no bundle: it has no PEM text")?;
        let mut bundle = Bundle { host: None, roots: Vec::new(), revoked: Vec::new() };
        let mut certificate = None;
        for pem in &all {
            match pem.tag() {
                CERTIFICATE => {
                    let facts = Facts::of(&pem.contents().into())?;
                    if authority::fleet(&facts.subject).is_some() && facts.issuer == facts.subject {
                        bundle.roots.push(encode(pem));
                    } else if certificate.replace(encode(pem)).is_some() {
                        bail!("a bundle has one host's certificate, this one has several");
                    }
                }
                KEY => match (certificate.take(), &bundle.host) {
                    (Some(certificate), None) => bundle.host = Some(Certified { certificate, key: encode(pem) }),
                    _ => bail!("the bundle has a key without a certificate"),
                },
                REVOKED => bundle.revoked.push(encode(pem)),
                other => bail!("the bundle has a {other} in it, which does not belong there"),
            }
        }
        ensure!(certificate.is_none(), "the bundle has a host's certificate without its key");
        bundle.check()?;
        Ok(bundle)
    }

    /// The fleet's name.
    pub fn fleet(&self) -> Result<String> {
        let subjects = self.roots.iter().map(|root| Ok(facts(root)?.subject)).collect::<Result<Vec<_>>>()?;
        let mut fleets = subjects.iter().filter_map(|subject| authority::fleet(subject)).map(|(fleet, _)| fleet);
        let first =
            fleets.next().context("the bundle has no authority in it: microvm trust issue and export make bundles")?;
        ensure!(fleets.all(|fleet| fleet == first), "the bundle has authorities of different fleets");
        Ok(first.into())
    }

    fn check(&self) -> Result<()> {
        self.fleet()?;
        let roots = certificates(&self.roots.concat())?;
        for list in revocation_lists(&self.revoked.concat())? {
            let known = roots.iter().any(|root| is_signed_by(&list, root));
            ensure!(known, "the bundle has a revocation list that its authority did not sign");
            Revocations::of(&list)?;
        }
        if let Some(host) = &self.host {
            let facts = facts(&host.certificate)?;
            // TLS would say all this too, but only when somebody connects.
            authority::check_host(facts.names.first().map_or("", String::as_str))?;
            host.check_key()?;
            let leaf = authority::mint(host, &facts.names)?;
            let credentials = authority::credentials(leaf, &self.roots.concat(), &self.revoked.concat());
            migrator::transport::tls::Tls::new(&credentials).context("the bundle cannot be used")?;
            let now = unix_now();
            ensure!(facts.not_before <= now, "the certificate is not valid yet: is this host's clock right?");
            ensure!(now < facts.not_after, "the certificate has expired: have a new one made (microvm trust issue)");
            let certificate = certificates(&host.certificate)?;
            let signed = certificate.iter().all(|der| roots.iter().any(|root| certificate_is_signed_by(der, root)));
            ensure!(signed, "the bundle's authority did not sign the host's certificate");
            self.check_revocation(&facts)?;
        }
        Ok(())
    }

    fn check_revocation(&self, host: &Facts) -> Result<()> {
        for list in revocation_lists(&self.revoked.concat())? {
            let list = Revocations::of(&list)?;
            ensure!(
                list.issuer != host.issuer || !list.serials.contains(&host.serial),
                "the certificate of {} was revoked: have a new one made (microvm trust issue)",
                host.subject
            );
        }
        Ok(())
    }
}

/// What is in the first certificate of a text.
pub fn facts(text: &str) -> Result<Facts> {
    Facts::of(certificates(text)?.first().context("there is no certificate")?)
}

/// Seconds since 1970.
pub fn unix_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed())
}
