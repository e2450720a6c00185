//! Over real sockets: who is let in, who is not, and what each side is told.

use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CidrSubnet, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, NameConstraints, RevokedCertParams, SanType,
    SerialNumber, date_time_ymd,
};

use super::super::{TcpDialer, accept, accept_tls};
use super::*;
use crate::id::MigrationId;
use crate::traits::{Connection, Dialer, Split};
use crate::wire::preamble::Role;

const PREAMBLE: Preamble = Preamble { role: Role::Pages, stream: 2, id: MigrationId([7; 16]) };

fn timeouts() -> Timeouts {
    Timeouts { connect: Duration::from_secs(20), ..Timeouts::default() }
}

/// A certificate as a test wants it; its issuer's key need not be one that may sign.
struct Cert {
    params: CertificateParams,
    key: KeyPair,
    pem: String,
}

fn sans(names: &[&str]) -> Vec<SanType> {
    let one = |name: &&str| match name.parse::<IpAddr>() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName((*name).try_into().unwrap()),
    };
    names.iter().map(one).collect()
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn root(name: &str) -> Cert {
    let (mut params, key) = (params(name), KeyPair::generate().unwrap());
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pem = params.self_signed(&key).unwrap().pem();
    Cert { params, key, pem }
}

impl Cert {
    fn sign(&self, params: CertificateParams) -> Cert {
        let key = KeyPair::generate().unwrap();
        let pem = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key)).unwrap().pem();
        Cert { params, key, pem }
    }

    /// As the program's authority certifies a host.
    fn host_params(names: &[&str]) -> CertificateParams {
        let mut params = params(names[0]);
        params.subject_alt_names = sans(names);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.serial_number = Some(SerialNumber::from(4711));
        let permitted = names.iter().map(|name| match name.parse::<IpAddr>() {
            Ok(address) => GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, 32)),
            Err(_) => GeneralSubtree::DnsName((*name).into()),
        });
        params.name_constraints =
            Some(NameConstraints { permitted_subtrees: permitted.collect(), excluded_subtrees: Vec::new() });
        params
    }

    fn host(&self, names: &[&str]) -> Cert {
        self.sign(Self::host_params(names))
    }

    fn leaf_params(names: &[&str]) -> CertificateParams {
        let mut params = params(names[0]);
        params.subject_alt_names = sans(names);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params
    }

    fn revocation(&self, serial: u64) -> String {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(4096, 1, 1),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&Issuer::from_params(&self.params, &self.key)).unwrap().pem().unwrap()
    }
}

fn credentials(roots: &[&Cert], chain: &[&Cert], revoked: &str) -> Credentials {
    let pems = |certs: &[&Cert]| certs.iter().map(|cert| cert.pem.as_str()).collect::<String>();
    Credentials { chain: pems(chain), key: chain[0].key.serialize_pem(), roots: pems(roots), revoked: revoked.into() }
}

/// What a host that is set up in the ordinary way uses.
fn ordinary(root: &Cert, names: &[&str]) -> Credentials {
    let host = root.host(names);
    let leaf = host.sign(Cert::leaf_params(names));
    credentials(&[root], &[&leaf, &host], "")
}

/// One connection to `127.0.0.1` between these two. What each side has at the end.
fn meet(
    dialling: &Credentials,
    accepting: &Credentials,
) -> (Result<Box<dyn Connection>, ConnectError>, Result<TlsConnection, ConnectError>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let tls = Tls::new(accepting).unwrap();
    let acceptor = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let accepted = accept_tls(stream, timeouts())?;
        let preamble = accepted.preamble;
        tls.accept(accepted.welcome()?, &preamble, timeouts())?.welcome()
    });
    let dialled = TcpDialer::new(address, timeouts()).with_tls(Tls::new(dialling).unwrap()).dial(&PREAMBLE);
    (dialled, acceptor.join().unwrap())
}

/// The acceptor does not let `peer` in; both sides say `words`.
#[track_caller]
fn acceptor_refuses(peer: &Credentials, acceptor: &Credentials, dialler_says: &str, acceptor_says: &str) {
    let (dialled, accepted) = meet(peer, acceptor);
    let (there, here) = (accepted.unwrap_err().to_string(), dialled.err().expect("not let in").to_string());
    assert!(here.contains("does not trust this host") && here.contains(dialler_says), "{here}");
    assert!(there.contains("is not trusted") && there.contains(acceptor_says), "{there}");
}

#[track_caller]
fn dialler_refuses(dialler: &Credentials, peer: &Credentials, words: &str) {
    let (dialled, accepted) = meet(dialler, peer);
    let error = dialled.err().expect("not trusted");
    assert!(error.to_string().contains("is not trusted") && error.to_string().contains(words), "{error}");
    assert!(!error.hint().is_empty());
    assert!(accepted.is_err());
}

const A: &[&str] = &["host1", "127.0.0.1"];
const B: &[&str] = &["host2", "127.0.0.1"];

#[test]
fn two_hosts_of_a_fleet_trust_each_other_and_know_who_is_there() {
    let root = root("fleet");
    let (dialled, accepted) = meet(&ordinary(&root, A), &ordinary(&root, B));
    let accepted = accepted.unwrap();
    assert_eq!(accepted.identity().host, "host1");
    assert!(accepted.identity().is_called("host1") && accepted.identity().is_called("127.0.0.1"));
    assert!(!accepted.identity().is_called("host2") && !accepted.identity().is_called("127.0.0.2"));
    assert!(!accepted.identity().is_called("") && !accepted.identity().is_called("host1:1"));
    let mut here = dialled.unwrap().split().unwrap();
    let mut there = Box::new(accepted).split().unwrap();
    // Both ways at once, more than the sockets hold, and in order.
    let bytes: Vec<u8> = (0..8 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    thread::scope(|scope| {
        for split in [&mut here, &mut there] {
            let bytes = &bytes;
            let Split { reader, writer, .. } = split;
            scope.spawn(move || writer.write_all(bytes).unwrap());
            scope.spawn(move || {
                let mut seen = vec![0; bytes.len()];
                reader.read_exact(&mut seen).unwrap();
                assert!(seen == *bytes, "other bytes came");
            });
        }
    });
    // An end that was said is an end; an end that was not is a cut.
    here.writer.finish().unwrap();
    assert_eq!(there.reader.read(&mut [0; 9]).unwrap(), 0);
    there.closer.close();
    assert_eq!(here.reader.read(&mut [0; 9]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
}

#[test]
fn what_is_sent_without_waiting_stays_in_order() {
    let root = root("fleet");
    let (dialled, accepted) = meet(&ordinary(&root, A), &ordinary(&root, B));
    let (mut here, mut there) = (dialled.unwrap().split().unwrap(), Box::new(accepted.unwrap()).split().unwrap());
    let bytes: Vec<u8> = (0..32 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    // Nobody reads: at some point nothing more is taken, and part of a record waits.
    let mut sent = 0;
    while let taken @ 1.. = here.writer.write_now(&bytes[sent..][..100_000]).unwrap() {
        sent += taken;
    }
    assert!(here.writer.waits() && sent > 100_000, "{sent}");
    thread::scope(|scope| {
        scope.spawn(|| here.writer.write_all(&bytes[sent..]).unwrap());
        let mut seen = vec![0; bytes.len()];
        there.reader.read_exact(&mut seen).unwrap();
        assert!(seen == bytes, "other bytes came");
    });
    assert!(!here.writer.waits());
}

#[test]
fn a_writing_half_alone_sends_all_and_stops_where_it_broke() {
    let root = root("fleet");
    let (dialled, accepted) = meet(&ordinary(&root, A), &ordinary(&root, B));
    let (Split { mut writer, reader, .. }, there) =
        (dialled.unwrap().split().unwrap(), Box::new(accepted.unwrap()).split().unwrap());
    let mut far = there.reader;
    drop(reader);
    let bytes: Vec<u8> = (0..32 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut sent = 0;
    while let taken @ 1.. = writer.write_now(&bytes[sent..][..100_000]).unwrap() {
        sent += taken;
    }
    assert!(writer.waits(), "part of a record waits, and goes first");
    thread::scope(|scope| {
        scope.spawn(|| writer.write_all(&bytes[sent..]).unwrap());
        let mut seen = vec![0; bytes.len()];
        far.read_exact(&mut seen).unwrap();
        assert!(seen == bytes, "other bytes came");
    });
    // Nobody reads any more: it ends somewhere in a record, after which nothing could be understood.
    writer.set_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(super::super::is_timeout(&writer.write_all(&bytes).unwrap_err()));
    assert_eq!(writer.write(b"more").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    writer.finish().unwrap();
    let mut seen = Vec::new();
    let cut = far.read_to_end(&mut seen).unwrap_err().kind();
    assert_eq!(cut, io::ErrorKind::ConnectionAborted, "no end was said");
    assert!(bytes.starts_with(&seen), "other bytes came");
}

#[test]
fn waiting_has_an_end_however_little_comes() {
    let root = root("fleet");
    let (dialled, accepted) = meet(&ordinary(&root, A), &ordinary(&root, B));
    let Split { mut reader, .. } = dialled.unwrap().split().unwrap();
    let far = Box::new(accepted.unwrap());
    let socket = far.stream.try_clone().unwrap();
    reader.set_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(super::super::is_timeout(&reader.read(&mut [0; 1]).unwrap_err()));
    // A record's header, and then a byte now and then: never silent, never done.
    thread::spawn(move || {
        let record = [[23, 3, 3, 0x40, 0].as_slice(), &[0; 200]].concat();
        for byte in record {
            if { &socket }.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    });
    assert!(super::super::is_timeout(&reader.read(&mut [0; 1]).unwrap_err()));
}

#[test]
fn another_fleet() {
    let (ours, theirs) = (root("fleet"), root("fleet"));
    // The acceptor finds out only if the dialler does not, and the other way round.
    let mut blind = ordinary(&theirs, A);
    blind.roots = ours.pem.clone();
    acceptor_refuses(&blind, &ordinary(&ours, B), "not from this fleet", "not from this fleet");
    dialler_refuses(&ordinary(&ours, A), &ordinary(&theirs, B), "not from this fleet");
}

#[test]
fn out_of_time() {
    let root = root("fleet");
    for (which, from, to) in [("has expired", 1975, 1980), ("is not valid yet", 4000, 4010)] {
        for of_host in [true, false] {
            let bad = |names: &[&str]| {
                let (mut host, mut leaf) = (Cert::host_params(names), Cert::leaf_params(names));
                let late = if of_host { &mut host } else { &mut leaf };
                (late.not_before, late.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
                let host = root.sign(host);
                credentials(&[&root], &[&host.sign(leaf), &host], "")
            };
            acceptor_refuses(&bad(A), &ordinary(&root, B), "expired or is not valid yet", which);
            dialler_refuses(&ordinary(&root, A), &bad(B), which);
        }
    }
}

#[test]
fn revoked() {
    let root = root("fleet");
    let innocent = |names: &[&str]| {
        let mut host = Cert::host_params(names);
        host.serial_number = Some(SerialNumber::from(1));
        let host = root.sign(host);
        credentials(&[&root], &[&host.sign(Cert::leaf_params(names)), &host], &root.revocation(4711))
    };
    acceptor_refuses(&ordinary(&root, A), &innocent(B), "was revoked", "was revoked");
    dialler_refuses(&innocent(A), &ordinary(&root, B), "was revoked");
    let (dialled, accepted) = meet(&innocent(A), &innocent(B));
    assert!(dialled.is_ok() && accepted.is_ok(), "others are not touched by it");
}

#[test]
fn another_name_than_the_one_dialled() {
    let root = root("fleet");
    let words = "is for host2, 127.0.0.2, not for 127.0.0.1";
    dialler_refuses(&ordinary(&root, A), &ordinary(&root, &["host2", "127.0.0.2"]), words);
}

#[test]
fn for_another_use() {
    let root = root("fleet");
    let only = |names: &[&str], usage| {
        let mut leaf = Cert::leaf_params(names);
        leaf.extended_key_usages = vec![usage];
        let host = root.host(names);
        credentials(&[&root], &[&host.sign(leaf), &host], "")
    };
    let server = only(A, ExtendedKeyUsagePurpose::ServerAuth);
    acceptor_refuses(&server, &ordinary(&root, B), "is for another use", "is for another use");
    dialler_refuses(&ordinary(&root, A), &only(B, ExtendedKeyUsagePurpose::ClientAuth), "is for another use");
}

/// A host that was broken into, or whose owner is hostile, signs only for itself.
#[test]
fn a_host_signs_for_no_other_host_and_makes_no_authority() {
    let root = root("fleet");
    let host2 = root.host(B);
    // A leaf with host 1's name, with an address that is not host 2's, or with a name besides its own.
    for names in [&["host1"][..], &["10.0.0.1"], &["host2", "host1"], &["host2", "127.0.0.1", "10.0.0.1"]] {
        let forged = credentials(&[&root], &[&host2.sign(Cert::leaf_params(names)), &host2], "");
        acceptor_refuses(&forged, &ordinary(&root, A), "was not issued to a host", "is not accepted");
        dialler_refuses(&ordinary(&root, A), &forged, "is not accepted");
    }
    // Another authority below it.
    let below = host2.sign(Cert::host_params(B));
    let chained = credentials(&[&root], &[&below.sign(Cert::leaf_params(B)), &below, &host2], "");
    acceptor_refuses(&chained, &ordinary(&root, A), "its certificate is not", "its certificate is not");
    dialler_refuses(&ordinary(&root, A), &chained, "its certificate is not");
    // Its own certificate as if it were a leaf.
    let bare = credentials(&[&root], &[&host2], "");
    acceptor_refuses(&bare, &ordinary(&root, A), "its certificate was not issued to a host", "its certificate");
}

/// Certificates are no secret: that of another host in front of one's own says nothing.
#[test]
fn showing_another_hosts_certificate_makes_nobody_that_host() {
    let root = root("fleet");
    let (host1, host2) = (root.host(A), root.host(B));
    let leaf = host2.sign(Cert::leaf_params(B));
    let posing = credentials(&[&root], &[&leaf, &host1, &host2], "");
    let (dialled, accepted) = meet(&posing, &ordinary(&root, A));
    let (here, there) = (dialled.err().unwrap().to_string(), accepted.unwrap_err().to_string());
    assert!(here.contains("was not issued to a host of the fleet"), "{here}");
    assert!(there.contains("was not issued to a host of the fleet"), "{there}");
    dialler_refuses(&ordinary(&root, A), &posing, "was not issued to a host of the fleet");
    // Nor is a subdomain of one's own name more than oneself.
    let sub = host2.sign(Cert::leaf_params(&["host1.host2", "127.0.0.1"]));
    let (_, accepted) = meet(&credentials(&[&root], &[&sub, &host2], ""), &ordinary(&root, A));
    assert_eq!(accepted.unwrap().identity().host, "host2");
}

/// A dialler that sends `sent` in clear text and, if it goes on, shakes hands with `client`.
fn stranger(accepting: &Credentials, sent: &Preamble, inside: &[u8], client: ClientConfig) -> (String, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let tls = Tls::new(accepting).unwrap();
    let acceptor = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let accepted = accept_tls(stream, timeouts())?;
        let preamble = accepted.preamble;
        tls.accept(accepted.welcome()?, &preamble, timeouts())?.welcome()
    });
    let stream = TcpStream::connect(address).unwrap();
    { &stream }.write_all(&sent.encode(true)).unwrap();
    let _ = receive(&mut { &stream }).unwrap();
    let mut socket = Limited::new(&stream, Duration::from_secs(20));
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut tls = rustls::Connection::Client(ClientConnection::new(Arc::new(client), name).unwrap());
    let told = handshake(&mut tls, &mut socket).and_then(|()| {
        tls.writer().write_all(inside)?;
        flush(&mut tls, &mut socket)?;
        receive(&mut Inside { tls: &mut tls, socket: &mut socket })
    });
    let told = match told {
        Ok(answer) => format!("{:?}", Welcome::decode(&answer)),
        Err(error) => flaw::explain(error, "it", Duration::ZERO, true).to_string(),
    };
    (told, acceptor.join().unwrap().map_or_else(|error| error.to_string(), |_| "let in".into()))
}

fn client(root: &Cert) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(root.pem.as_bytes()).unwrap()).unwrap();
    let versions = [&rustls::version::TLS13];
    let builder = ClientConfig::builder_with_provider(Arc::new(provider())).with_protocol_versions(&versions).unwrap();
    builder.with_root_certificates(roots)
}

#[test]
fn no_certificate_at_all() {
    let root = root("fleet");
    let nobody = client(&root).with_no_client_auth();
    let (told, seen) = stranger(&ordinary(&root, B), &PREAMBLE, &PREAMBLE.encode(true), nobody);
    assert!(told.contains("does not trust this host: its certificate is missing"), "{told}");
    assert!(seen.contains("is not trusted: its certificate is missing"), "{seen}");
}

/// Whoever sits between the hosts sees the preamble and may change it: then nothing follows.
#[test]
fn a_preamble_that_was_changed_on_its_way() {
    let root = root("fleet");
    let credentials = ordinary(&root, A);
    let Credentials { chain, key, .. } = &credentials;
    let certified = || {
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).map(Result::unwrap).collect();
        client(&root).with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap()
    };
    for changed in [
        Preamble { role: Role::Request, stream: 0, ..PREAMBLE },
        Preamble { stream: 3, ..PREAMBLE },
        Preamble { id: MigrationId([8; 16]), ..PREAMBLE },
    ] {
        let (told, seen) = stranger(&ordinary(&root, B), &changed, &PREAMBLE.encode(true), certified());
        assert!(told.contains("the preamble was changed on its way"), "{told}");
        assert!(seen.contains("the preamble was changed on its way"), "{seen}");
    }
    let (told, _) = stranger(&ordinary(&root, B), &PREAMBLE, &PREAMBLE.encode(true), certified());
    assert_eq!(told, "Ok(Accepted)");
}

/// What somebody says who has no TLS, or has it where there is none.
#[test]
fn clear_text_where_tls_is_wanted_and_the_reverse() {
    let told = |sent: &[u8], tls: bool| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let accepted = if tls { accept_tls(stream, timeouts()) } else { accept(stream, timeouts()) };
            accepted.unwrap_err().to_string()
        });
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(sent).unwrap();
        let seen = acceptor.join().unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        (String::from_utf8_lossy(&answer).into_owned(), seen)
    };
    let (answer, seen) = told(&PREAMBLE.encode(false), true);
    assert!(
        answer.contains("takes encrypted connections only") && seen.contains("does not encrypt"),
        "{answer} {seen}"
    );
    let (answer, seen) = told(&PREAMBLE.encode(true), false);
    assert!(answer.contains("in clear text only") && seen.contains("wants to encrypt"), "{answer} {seen}");
    // A ClientHello without a preamble, garbage, and version 1 as it was.
    for tls in [true, false] {
        let (answer, seen) = told(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3], tls);
        assert!(answer.is_empty() && seen.contains("a TLS handshake, without a preamble"), "{answer} {seen}");
        let (answer, seen) = told(b"GET / HTTP/1.1\r\n\r\n", tls);
        assert!(answer.is_empty() && seen.contains("GET / HTTP/1.1"), "{answer} {seen}");
        let old = include_str!("../../../tests/golden/v1/preamble.hex").split_whitespace();
        let old: Vec<u8> = old.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        let (answer, seen) = told(&old, tls);
        assert!(answer.contains("speaks version 1 of the migration protocol, this host version 2"), "{answer}");
        assert!(seen.contains("version 1") && seen.contains("version 2"), "{seen}");
    }
}

#[test]
fn half_a_handshake_has_an_end() {
    let root = root("fleet");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let tls = Tls::new(&ordinary(&root, B)).unwrap();
    let short = Timeouts { connect: Duration::from_millis(400), ..timeouts() };
    let acceptor = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let accepted = accept_tls(stream, timeouts()).unwrap();
        let preamble = accepted.preamble;
        tls.accept(accepted.welcome().unwrap(), &preamble, short).map(|_| ()).unwrap_err()
    });
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&PREAMBLE.encode(true)).unwrap();
    // A record that says it is long, a byte at a time.
    for byte in [22, 3, 1, 0x3f].into_iter().chain([0; 1000]) {
        if stream.write_all(&[byte]).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let error = acceptor.join().unwrap();
    assert!(matches!(error, ConnectError::Silent { .. }), "{error}");
}

#[test]
fn keys_are_not_shown() {
    let credentials = ordinary(&root("fleet"), A);
    assert!(!format!("{credentials:?}").contains("KEY"));
}
