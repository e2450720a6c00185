//! What can be wrong with a certificate, in words, whichever side finds out.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};

use super::super::{ConnectError, is_timeout};

/// What is wrong with a certificate. Reads on after "its certificate".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Its time is over.
    Expired,
    /// Its time has not come.
    NotYetValid,
    /// One of these two: an alert does not say which.
    OutOfTime,
    /// The authority has revoked it.
    Revoked,
    /// Another authority signed it.
    OtherFleet,
    /// It is for other names than the one dialled.
    WrongName {
        /// What was dialled.
        dialled: String,
        /// The names that it is for.
        names: String,
    },
    /// It must not be used for this.
    OtherUse,
    /// There is none.
    Missing,
    /// It is not a leaf that a host of the fleet has signed.
    Chain,
    /// Something else.
    Other(String),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expired => f.write_str("has expired, by the clock of the host that checked it"),
            Self::NotYetValid => f.write_str("is not valid yet, by the clock of the host that checked it"),
            Self::OutOfTime => f.write_str("has expired or is not valid yet, by the clock of the host that checked it"),
            Self::Revoked => f.write_str("was revoked"),
            Self::OtherFleet => f.write_str("is not from this fleet's authority"),
            Self::WrongName { dialled, names } => write!(f, "is for {names}, not for {dialled}"),
            Self::OtherUse => f.write_str("is for another use"),
            Self::Missing => f.write_str("is missing"),
            Self::Chain => f.write_str("was not issued to a host of the fleet"),
            Self::Other(why) => write!(f, "is not accepted: {why}"),
        }
    }
}

impl Flaw {
    /// What the user might do about the certificate of `whose`.
    pub fn hint(&self, whose: &str) -> String {
        match self {
            Self::Expired | Self::OutOfTime => {
                format!("check the clocks of both hosts and `microvm trust show` on {whose}; `microvm trust rotate` renews")
            }
            Self::NotYetValid => "set the clocks of both hosts (NTP), and try again".into(),
            Self::Revoked => {
                format!("if {whose} belongs to the fleet (again), give it a new certificate: microvm trust issue, on the CA's host")
            }
            Self::OtherFleet => {
                "both hosts must be set up from one CA: compare `microvm trust show` on both, then microvm trust issue and import".into()
            }
            Self::WrongName { dialled, .. } => format!(
                "dial the host by one of these names, or issue it a certificate for this one too: microvm trust issue HOST --address {dialled}"
            ),
            Self::OtherUse | Self::Chain | Self::Other(_) => {
                format!("give {whose} a certificate of the fleet: microvm trust issue, on the CA's host")
            }
            Self::Missing => format!("set up {whose}: microvm trust import"),
        }
    }

    fn from_certificate(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::OtherFleet,
            CertificateError::NotValidForNameContext { expected, presented } => Self::WrongName {
                dialled: expected.to_str().into_owned(),
                names: match presented.as_slice() {
                    [] => "no host".into(),
                    names => names.iter().map(|name| plain(name)).collect::<Vec<_>>().join(", "),
                },
            },
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => Self::OtherUse,
            other => Self::Other(other.to_string()),
        }
    }

    fn from_alert(alert: AlertDescription) -> Option<Self> {
        Some(match alert {
            AlertDescription::CertificateExpired => Self::OutOfTime,
            AlertDescription::CertificateRevoked => Self::Revoked,
            // A name of a CA may stand for two keys: then it is the signature that does not fit.
            AlertDescription::UnknownCA | AlertDescription::DecryptError => Self::OtherFleet,
            AlertDescription::UnsupportedCertificate => Self::OtherUse,
            AlertDescription::CertificateRequired => Self::Missing,
            AlertDescription::CertificateUnknown | AlertDescription::BadCertificate => Self::Chain,
            _ => return None,
        })
    }
}

/// `DnsName("host2")` and `IpAddress(10.0.0.2)` as rustls names them, as people do.
fn plain(presented: &str) -> String {
    let inner = presented.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(presented);
    inner.trim_matches('"').into()
}

/// An error of a handshake as whoever sees it should hear it.
pub(super) fn explain(error: io::Error, peer: &str, limit: Duration, dialled: bool) -> ConnectError {
    let peer = peer.to_owned();
    if is_timeout(&error) {
        return ConnectError::Silent { peer, waited: limit };
    }
    let tls = error.get_ref().and_then(|inner| (inner as &(dyn Error + 'static)).downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(error)) => {
            ConnectError::Untrusted { peer, flaw: Flaw::from_certificate(error) }
        }
        Some(rustls::Error::NoCertificatesPresented) => ConnectError::Untrusted { peer, flaw: Flaw::Missing },
        Some(rustls::Error::AlertReceived(alert)) => match Flaw::from_alert(*alert) {
            Some(flaw) => ConnectError::NotTrusted { peer, flaw },
            None => ConnectError::Protocol { peer, reason: format!("it ended the TLS handshake: {alert:?}") },
        },
        Some(other) => ConnectError::Protocol { peer, reason: format!("no TLS handshake: {other}") },
        None if error.kind() == io::ErrorKind::InvalidData => {
            ConnectError::Protocol { peer, reason: error.to_string() }
        }
        None if error.kind() == io::ErrorKind::UnexpectedEof && dialled => {
            let source = io::Error::new(error.kind(), "it was closed in the TLS handshake");
            ConnectError::Broken { peer, source }
        }
        None => ConnectError::Broken { peer, source: error },
    }
}
