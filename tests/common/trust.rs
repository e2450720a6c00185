//! Certificates as tests want them: of a fleet that the program made, and of none.

use std::fs;
use std::sync::Arc;

use migrator::options::Timeouts;
use migrator::traits::Dialer;
use migrator::transport::TcpDialer;
use migrator::transport::tls::{Credentials, Tls};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};

use super::net::Host;

/// A host of the fleet of `ca` that exists in the test only: what it needs to talk to the others.
pub fn member(ca: &Host, name: &str, address: &str) -> Credentials {
    let bundle = ca.microvm(&format!("trust issue {name} --address {address}")).ok();
    let sections = pem::parse_many(&bundle).unwrap();
    let text = |tag: &str, from: usize, to: usize| -> String {
        let all: Vec<_> = sections.iter().filter(|section| section.tag() == tag).collect();
        all[from.min(all.len())..to.min(all.len())].iter().map(|section| pem::encode(section)).collect()
    };
    let host = text("CERTIFICATE", 0, 1);
    let issuer = Issuer::from_ca_cert_pem(&host, KeyPair::from_pem(&text("PRIVATE KEY", 0, 1)).unwrap()).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    let leaf = params.signed_by(&key, &issuer).unwrap().pem();
    let (roots, revoked) = (text("CERTIFICATE", 1, 9), text("X509 CRL", 0, 9));
    Credentials { chain: leaf + &host, key: key.serialize_pem(), roots, revoked }
}

/// Dials `host`'s agent as who these credentials say.
pub fn dialer(credentials: &Credentials, host: &Host) -> Arc<dyn Dialer> {
    let timeouts = Timeouts { connect: super::PATIENCE, ..Timeouts::default() };
    let dialer = TcpDialer::new(format!("{}:7437", host.ip), timeouts);
    Arc::new(dialer.with_tls(Tls::new(credentials).unwrap()))
}

/// The PEM sections of one kind in a file of the host's trust.
pub fn sections(host: &Host, file: &str, tag: &str) -> Vec<pem::Pem> {
    let text = fs::read_to_string(host.config().join("trust").join(file)).unwrap();
    pem::parse_many(text).unwrap().into_iter().filter(|section| section.tag() == tag).collect()
}
