//! What is in a certificate or a revocation list, for people and for checks.

use std::net::IpAddr;

use anyhow::{Context, Result};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use serde::Serialize;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::revocation_list::CertificateRevocationList;

/// A certificate of a host or of an authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// Whom it is for.
    pub subject: String,
    /// Who signed it.
    pub issuer: String,
    /// DNS names and addresses, in order.
    pub names: Vec<String>,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Seconds since 1970.
    pub not_before: i64,
    /// Seconds since 1970.
    pub not_after: i64,
    /// SHA-256 of the certificate, hexadecimal, as other tools print it.
    pub fingerprint: String,
}

impl Facts {
    /// Of a certificate.
    pub fn of(der: &CertificateDer<'_>) -> Result<Self> {
        let (_, cert) = X509Certificate::from_der(der).context("a certificate cannot be read")?;
        let mut names = Vec::new();
        for extension in cert.extensions() {
            if let ParsedExtension::SubjectAlternativeName(alternatives) = extension.parsed_extension() {
                names.extend(alternatives.general_names.iter().filter_map(name));
            }
        }
        Ok(Facts {
            subject: common_name(cert.subject()),
            issuer: common_name(cert.issuer()),
            names,
            serial: hex(cert.raw_serial(), ""),
            not_before: cert.validity().not_before.timestamp(),
            not_after: cert.validity().not_after.timestamp(),
            fingerprint: hex(ring::digest::digest(&ring::digest::SHA256, der).as_ref(), ":"),
        })
    }
}

/// A revocation list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocations {
    /// Whose.
    pub issuer: String,
    /// Later lists have higher ones.
    pub number: u64,
    /// Serial numbers, hexadecimal.
    pub serials: Vec<String>,
}

impl Revocations {
    /// Of a list.
    pub fn of(der: &CertificateRevocationListDer<'_>) -> Result<Self> {
        let (_, list) = CertificateRevocationList::from_der(der).context("a revocation list cannot be read")?;
        let number = list.crl_number().and_then(|number| u64::try_from(number).ok());
        Ok(Revocations {
            issuer: common_name(list.issuer()),
            number: number.context("a revocation list has no number")?,
            serials: list.iter_revoked_certificates().map(|revoked| hex(revoked.raw_serial(), "")).collect(),
        })
    }
}

/// Whether `list` is signed by the authority with this certificate.
pub fn is_signed_by(list: &CertificateRevocationListDer<'_>, authority: &CertificateDer<'_>) -> bool {
    let (Ok((_, list)), Ok((_, authority))) =
        (CertificateRevocationList::from_der(list), X509Certificate::from_der(authority))
    else {
        return false;
    };
    list.issuer() == authority.subject() && list.verify_signature(authority.public_key()).is_ok()
}

/// The public key in the first certificate of a text, as its algorithm writes it.
pub fn public_key(text: &str) -> Result<Vec<u8>> {
    let all = super::bundle::certificates(text)?;
    let first = all.first().context("there is no certificate")?;
    let (_, certificate) = X509Certificate::from_der(first).context("a certificate cannot be read")?;
    Ok(certificate.public_key().subject_public_key.data.to_vec())
}

/// Whether `certificate` is signed by the authority with that certificate.
pub fn certificate_is_signed_by(certificate: &CertificateDer<'_>, authority: &CertificateDer<'_>) -> bool {
    let (Ok((_, certificate)), Ok((_, authority))) =
        (X509Certificate::from_der(certificate), X509Certificate::from_der(authority))
    else {
        return false;
    };
    certificate.issuer() == authority.subject() && certificate.verify_signature(Some(authority.public_key())).is_ok()
}

fn common_name(name: &x509_parser::x509::X509Name<'_>) -> String {
    name.iter_common_name().next().and_then(|cn| cn.as_str().ok()).unwrap_or_default().into()
}

fn name(general: &GeneralName<'_>) -> Option<String> {
    match general {
        GeneralName::DNSName(name) => Some((*name).into()),
        GeneralName::IPAddress(bytes) => match (<[u8; 4]>::try_from(*bytes), <[u8; 16]>::try_from(*bytes)) {
            (Ok(v4), _) => Some(IpAddr::from(v4).to_string()),
            (_, Ok(v6)) => Some(IpAddr::from(v6).to_string()),
            _ => None,
        },
        _ => None,
    }
}

fn hex(bytes: &[u8], between: &str) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(between)
}
