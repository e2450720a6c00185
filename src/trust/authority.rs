//! What signs: the fleet's authority hosts, and a host what it uses for one migration.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use migrator::transport::tls::Credentials;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CidrSubnet, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, NameConstraints, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls_pki_types::ServerName;
use time::{Duration, OffsetDateTime};

/// Clocks differ: what is signed now is valid from a little earlier on.
const BACKDATED: Duration = Duration::hours(24);
/// Of an authority.
const AUTHORITY_DAYS: i64 = 3650;
/// Of what one migration uses. Days: a source in doubt asks with it until it is answered.
const LEAF: Duration = Duration::days(7);
/// Every host is its own loopback.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// The longest name of a host or a fleet.
const MAX_NAME_BYTES: usize = 63;

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Certified {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

impl Certified {
    fn issuer(&self) -> Result<Issuer<'_, KeyPair>> {
        let key = KeyPair::from_pem(&self.key).context("a key cannot be read")?;
        Issuer::from_ca_cert_pem(&self.certificate, key).context("a certificate cannot sign")
    }

    /// Whether the key is that of the certificate.
    pub fn check_key(&self) -> Result<()> {
        let key = KeyPair::from_pem(&self.key).context("a key cannot be read")?;
        let public = super::certificate::public_key(&self.certificate)?;
        ensure!(key.public_key_raw() == public, "the key does not fit the certificate");
        Ok(())
    }
}

/// Checks the name of a host: it is a DNS name, for it is what others dial and what stands in policies.
pub fn check_host(name: &str) -> Result<()> {
    let dns = matches!(ServerName::try_from(name), Ok(ServerName::DnsName(_)));
    ensure!(
        dns && name.len() <= MAX_NAME_BYTES && !LOOPBACK.contains(&name) && name == name.to_lowercase(),
        "{name:?} is not a host's name: use small letters, digits, '-' and '.', as in a DNS name; addresses go with --address"
    );
    Ok(())
}

fn params(common_name: &str, valid: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    (params.not_before, params.not_after) = (OffsetDateTime::now_utc() - BACKDATED, OffsetDateTime::now_utc() + valid);
    params
}

fn alternative(name: &str) -> Result<SanType> {
    Ok(match name.parse::<IpAddr>() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName(name.try_into().with_context(|| format!("{name:?} is not a name"))?),
    })
}

/// A new authority for `fleet`. `generation` tells it from those before it.
pub fn create(fleet: &str, generation: usize) -> Result<Certified> {
    ensure!(
        !fleet.is_empty() && fleet.len() <= MAX_NAME_BYTES && !fleet.contains(|c: char| c.is_control()),
        "{fleet:?} is not a fleet's name: use 1 to {MAX_NAME_BYTES} letters, digits, blanks and the like"
    );
    let mut params = params(&subject(fleet, generation), Duration::days(AUTHORITY_DAYS));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    Ok(Certified { certificate: params.self_signed(&key)?.pem(), key: key.serialize_pem() })
}

const SUBJECT: &str = "microvm fleet ";

/// How an authority calls itself. Each has a name of its own, so that what it signed can be told apart.
fn subject(fleet: &str, generation: usize) -> String {
    format!("{SUBJECT}{fleet} CA {generation}")
}

/// Fleet and generation, from the name of an authority.
pub fn fleet(subject: &str) -> Option<(&str, usize)> {
    let (fleet, generation) = subject.strip_prefix(SUBJECT)?.rsplit_once(" CA ")?;
    Some((fleet, generation.parse().ok()?))
}

/// Certifies `host`, which is also called `more`. It may sign what it uses itself, under these names only.
pub fn certify(authority: &Certified, host: &str, more: &[String], days: u32) -> Result<Certified> {
    check_host(host)?;
    ensure!(days > 0, "a certificate is valid for at least a day: --days");
    let mut names = vec![host.to_string()];
    for name in more.iter().map(String::as_str).chain(LOOPBACK) {
        if !names.iter().any(|known| known == name) {
            names.push(name.into());
        }
    }
    let mut params = params(host, Duration::days(days.into()));
    params.subject_alt_names = names.iter().map(|name| alternative(name)).collect::<Result<_>>()?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let permitted = names.iter().map(|name| match name.parse::<IpAddr>() {
        Ok(address) => {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, bits))
        }
        Err(_) => GeneralSubtree::DnsName(name.clone()),
    });
    params.name_constraints =
        Some(NameConstraints { permitted_subtrees: permitted.collect(), excluded_subtrees: Vec::new() });
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &authority.issuer()?)?;
    Ok(Certified { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// What one migration, or one run of the agent, uses: a fresh key, certified by the host for some days under the host's names.
/// Returns the leaf and the host's certificate, and the leaf's key.
pub fn mint(host: &Certified, names: &[String]) -> Result<Certified> {
    let name = names.first().context("this host's certificate names no host")?;
    let mut params = params(name, LEAF);
    params.subject_alt_names = names.iter().map(|name| alternative(name)).collect::<Result<_>>()?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    let leaf = params.signed_by(&key, &host.issuer()?)?;
    Ok(Certified { certificate: leaf.pem() + &host.certificate, key: key.serialize_pem() })
}

/// What is revoked, signed; PEM. `serials` are hexadecimal.
pub fn revocations(authority: &Certified, number: u64, serials: &[String]) -> Result<String> {
    let now = OffsetDateTime::now_utc();
    let revoked = serials.iter().map(|serial| {
        let bytes: Option<Vec<u8>> =
            (0..serial.len() / 2).map(|at| u8::from_str_radix(serial.get(2 * at..2 * at + 2)?, 16).ok()).collect();
        Ok(RevokedCertParams {
            serial_number: SerialNumber::from_slice(&bytes.context("a serial number is damaged")?),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        })
    });
    let list = CertificateRevocationListParams {
        this_update: now - BACKDATED,
        next_update: now + Duration::days(AUTHORITY_DAYS),
        crl_number: SerialNumber::from(number),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect::<Result<_>>()?,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    Ok(list.signed_by(&authority.issuer()?)?.pem()?)
}

/// Everything that a connection needs.
pub fn credentials(leaf: Certified, roots: &str, revoked: &str) -> Credentials {
    Credentials { chain: leaf.certificate, key: leaf.key, roots: roots.into(), revoked: revoked.into() }
}
