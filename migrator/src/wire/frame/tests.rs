use proptest::prelude::*;

use super::*;
use crate::id::MigrationId;
use crate::layout::{RamLayout, RamRegion};
use crate::limit::{Limit, LimitedBy};
use crate::report::{AnnounceReport, CompressionReport, Outcome, Owner, Report, RoundReport};
use crate::traits::{Mismatch, Refusal, Section, VmDescription};
use crate::wire::message::*;
use std::time::Duration;

fn unframe(bytes: &[u8]) -> Result<Message, WireError> {
    let (head, payload) = bytes.split_first_chunk().ok_or(WireError::Short("frame"))?;
    decode(&Header::decode(head)?, payload)
}

fn reframe(kind: u16, payload: &[u8]) -> Result<Message, WireError> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes[0..2].copy_from_slice(&kind.to_le_bytes());
    bytes[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    let sum = checksum(&bytes[..8], payload);
    bytes[8..16].copy_from_slice(&sum.to_le_bytes());
    bytes.extend(payload);
    unframe(&bytes)
}

fn samples() -> Vec<(&'static str, Message)> {
    let us = Duration::from_micros;
    let ram =
        RamLayout::new(vec![RamRegion { gpa: 0, bytes: 1 << 20 }, RamRegion { gpa: 4 << 30, bytes: 8192 }]).unwrap();
    let vm = VmDescription { name: "web".into(), ram, paused: false, facts: serde_json::json!({"cpus": 2}) };
    let mismatch = Mismatch { what: "CPU".into(), source: "a".into(), destination: "b".into(), hint: String::new() };
    let announce =
        AnnounceReport { arp: 2, rarp: 1, na: 1, bursts: 6, guest: false, addresses: vec!["10.0.0.2".into()] };
    vec![
        (
            "offer",
            Message::Offer(Offer { id: MigrationId([0xab; 16]), vm, streams: 1, verify: true, compressed: true }),
        ),
        ("accepted", Message::Accepted),
        ("refused", Message::Refused(Refusal { reason: "no".into(), mismatches: vec![mismatch] })),
        ("ask", Message::Ask(MigrationId([0xab; 16]))),
        ("answer", Message::Answer(AskAnswer::Pending)),
        (
            "pull",
            Message::Pull(Pull { vm: "web".into(), to: "host2".into(), settings: serde_json::json!({"streams": 2}) }),
        ),
        ("progress", Message::Progress(serde_json::json!({"phase": "pre-copy"}))),
        ("report", Message::Report(Box::new(report()))),
        ("cancel", Message::Cancel),
        ("ping", Message::Ping(0x0102_0304_0506_0708)),
        ("pong", Message::Pong(1)),
        ("ready", Message::Ready(Ready { load: us(2000), journal: us(300) })),
        ("round", Message::Round { n: 2, pages: 1000, last: true }),
        ("round-done", Message::RoundDone { n: 2, data_pages: 900, zero_pages: 100 }),
        (
            "state",
            Message::State(State {
                round: 3,
                ram_hash: Some(0x1122_3344_5566_7788),
                sections: vec![
                    Section { kind: 1, instance: 0, version: 1, bytes: vec![1, 2, 3] },
                    Section { kind: 2, instance: 1, version: 7, bytes: vec![] },
                ],
            }),
        ),
        ("prepared", Message::Prepared(Prepared { load: us(1), verify: us(2), journal: us(3) })),
        ("commit", Message::Commit),
        (
            "running",
            Message::Running(Running { journal_us: 1, start_us: 2, running_us: Some(3), failure: None, announce }),
        ),
        ("gave-up", Message::GaveUp("out of memory".into())),
        ("abort", Message::Abort("cancelled".into())),
        ("released", Message::Released),
    ]
}

fn report() -> Report {
    Report {
        vm: "web".into(),
        from: "host1".into(),
        to: "host2:7437".into(),
        mode: "pre-copy".into(),
        outcome: Outcome::Completed,
        owner: Owner::Destination,
        error: None,
        rounds: vec![RoundReport { n: 1, pages: 2, ms: 0.5, ..RoundReport::default() }],
        total_ms: 1.5,
        blackout_ms: Some(0.25),
        blackout: [("pause".into(), 0.25)].into(),
        bytes_sent: 8512,
        compression: Some(CompressionReport {
            mode: "auto".into(),
            level: Some(1),
            raw_bytes: 16384,
            sent_bytes: 8192,
        }),
        limit: Some(Limit { by: LimitedBy::Setup, sentence: "what it takes".into() }),
        ram_bytes: 1 << 20,
        predicted_blackout_ms: Some(0.5),
        throttle_permille: 700,
        throttled_ms: 20.5,
        announce: None,
    }
}

#[test]
fn golden_and_round_trip_of_every_type() {
    let samples = samples();
    assert_eq!(samples.len(), Kind::ALL.len());
    for ((name, message), kind) in samples.iter().zip(Kind::ALL) {
        assert_eq!(message.kind(), *kind);
        assert_eq!(Kind::try_from(*kind as u16), Ok(*kind));
        let bytes = encode(message);
        crate::golden::check(&format!("control-{name}"), &bytes);
        assert_eq!(unframe(&bytes).as_ref(), Ok(message), "{name}");
        for cut in 0..bytes.len() {
            assert!(unframe(&bytes[..cut]).is_err(), "{name} cut at {cut}");
        }
        assert!(unframe(&[&bytes[..], &[0]].concat()).is_err(), "{name} with a byte too many");
        let payload = &bytes[HEADER_BYTES..];
        if kind.cap() as usize > payload.len() && !matches!(kind, Kind::GaveUp | Kind::Abort) {
            assert!(
                reframe(*kind as u16, &[payload, &[0xff]].concat()).is_err(),
                "{name} with a payload byte too many"
            );
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(unframe(&flipped).is_err(), "{name} with bit {bit} flipped");
        }
    }
}

#[test]
fn hostile_headers() {
    let header = |kind: u16, flags: u16, length: u32| {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&kind.to_le_bytes());
        bytes[2..4].copy_from_slice(&flags.to_le_bytes());
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        Header::decode(&bytes)
    };
    for kind in [0, 10, 15, 28, u16::MAX] {
        assert_eq!(header(kind, 0, 0), Err(WireError::Type(kind)));
    }
    for kind in Kind::ALL {
        assert_eq!(header(*kind as u16, 1, 0), Err(WireError::Flags(1)));
        assert_eq!(header(*kind as u16, 0, kind.cap()).unwrap().length(), kind.cap() as usize);
        for length in [kind.cap() + 1, u32::MAX] {
            assert!(matches!(header(*kind as u16, 0, length), Err(WireError::TooLong { .. })));
        }
    }
}

#[test]
fn hostile_fields() {
    let value = |result: Result<Message, WireError>, name: &str| {
        assert!(matches!(&result, Err(WireError::Value { field, .. }) if *field == name), "{name}: {result:?}");
    };
    for answer in [0, 4, 255] {
        value(reframe(Kind::Answer as u16, &[answer]), "answer");
    }
    let (zero, big) = ([0; 8], u64::MAX.to_le_bytes());
    value(reframe(Kind::Round as u16, &[&[0; 4][..], &zero, &[0]].concat()), "round");
    value(reframe(Kind::Round as u16, &[&[1, 0, 0, 0][..], &big, &[0]].concat()), "pages");
    value(reframe(Kind::Round as u16, &[&[1, 0, 0, 0][..], &zero, &[2]].concat()), "last");
    value(reframe(Kind::RoundDone as u16, &[&[0; 4][..], &zero, &zero].concat()), "round");
    value(reframe(Kind::RoundDone as u16, &[&[1, 0, 0, 0][..], &big, &zero].concat()), "pages");
    value(reframe(Kind::RoundDone as u16, &[&[1, 0, 0, 0][..], &zero, &big].concat()), "pages");
    for at in 0..2 {
        let mut fields = [zero, zero];
        fields[at] = big;
        value(reframe(Kind::Ready as u16, &fields.concat()), "time");
    }
    for at in 0..3 {
        let mut fields = [zero, zero, zero];
        fields[at] = big;
        value(reframe(Kind::Prepared as u16, &fields.concat()), "time");
    }
    let state = |round: u32, flag: u8, hash: u64, count: u16, rest: &[u8]| {
        reframe(
            Kind::State as u16,
            &[&round.to_le_bytes()[..], &[flag], &hash.to_le_bytes(), &count.to_le_bytes(), rest].concat(),
        )
    };
    value(state(0, 0, 0, 0, &[]), "round");
    value(state(1, 2, 0, 0, &[]), "has_hash");
    value(state(1, 0, 1, 0, &[]), "ram_hash");
    value(state(1, 0, 0, 1025, &[]), "sections");
    assert_eq!(state(1, 0, 0, 1, &[]), Err(WireError::Short("STATE")));
    // A section that claims 4 GiB.
    assert_eq!(state(1, 0, 0, 1, &[1, 0, 0, 0, 1, 0, 255, 255, 255, 255]), Err(WireError::Short("STATE")));
    for kind in [Kind::GaveUp, Kind::Abort] {
        assert!(matches!(reframe(kind as u16, &[0xff]), Err(WireError::Body { .. })));
    }
    for bad in ["", "{}", "null", "[", r#"{"reason":1,"mismatches":[]}"#, r#"{"reason":"","mismatches":[],"more":1}"#] {
        for kind in [Kind::Offer, Kind::Refused, Kind::Running, Kind::Pull, Kind::Report] {
            assert!(matches!(reframe(kind as u16, bad.as_bytes()), Err(WireError::Body { .. })), "{bad}");
        }
    }
    let offer = encode(&samples()[0].1);
    let text = String::from_utf8(offer[HEADER_BYTES..].to_vec()).unwrap();
    for streams in ["0", "17", "65535"] {
        value(reframe(1, text.replace("\"streams\":1", &format!("\"streams\":{streams}")).as_bytes()), "streams");
    }
    for (from, to) in [
        ("\"bytes\":8192", "\"bytes\":8191"),
        ("abab", "xxxx"),
        ("\"gpa\":0", "\"gpa\":-1"),
        ("\"verify\":true", "\"verify\":7"),
    ] {
        assert!(text.contains(from));
        assert!(matches!(reframe(1, text.replacen(from, to, 1).as_bytes()), Err(WireError::Body { .. })), "{to}");
    }
    let pull = r#"{"vm":"web","to":"host2","settings":{}"#;
    assert!(reframe(Kind::Pull as u16, format!("{pull}}}").as_bytes()).is_ok());
    for more in [r#","more":1}"#, r#","vm":"db"}"#, ",}"] {
        assert!(matches!(reframe(Kind::Pull as u16, format!("{pull}{more}").as_bytes()), Err(WireError::Body { .. })));
    }
    assert!(matches!(
        reframe(Kind::Pull as u16, &pull.replace("web", "\\ud800").into_bytes()),
        Err(WireError::Body { .. })
    ));
    for (from, to) in [("completed", "done"), ("\"n\":1", "\"n\":-1"), ("8512", "1e99"), ("null", "[]")] {
        let text = serde_json::to_string(&report()).unwrap().replacen(from, to, 1);
        assert!(matches!(reframe(Kind::Report as u16, text.as_bytes()), Err(WireError::Body { .. })), "{to}");
    }
    assert_eq!(reframe(Kind::Cancel as u16, &[0]), Err(WireError::TooLong { kind: "CANCEL", length: 1, cap: 0 }));
    let deep = "[".repeat(10_000);
    for kind in [Kind::Offer, Kind::Pull, Kind::Progress] {
        let deep = &deep.as_bytes()[..deep.len().min(kind.cap() as usize)];
        assert!(reframe(kind as u16, deep).is_err(), "nesting is bounded by the parser");
    }
}

proptest! {
    #[test]
    fn state_round_trip(round in 1u32.., ram_hash in any::<Option<u64>>(),
                        sections in prop::collection::vec((any::<[u16; 3]>(), prop::collection::vec(any::<u8>(), 0..300)), 0..20)) {
        let sections = sections.into_iter()
            .map(|([kind, instance, version], bytes)| Section { kind, instance, version, bytes }).collect();
        let message = Message::State(State { round, ram_hash, sections });
        prop_assert_eq!(unframe(&encode(&message)), Ok(message));
    }

    #[test]
    fn long_reasons_are_cut_not_refused(reason in ".{0,3000}") {
        let Ok(Message::Abort(read)) = unframe(&encode(&Message::Abort(reason.clone()))) else { panic!() };
        prop_assert!(reason.starts_with(&read) && (read.len() == reason.len() || read.len() > MAX_REASON_BYTES - 4));
    }

    #[test]
    fn no_payload_panics(kind in prop::sample::select(Kind::ALL), payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = reframe(kind as u16, &payload);
    }

    #[test]
    fn no_header_panics(bytes in any::<[u8; HEADER_BYTES]>()) {
        let _ = Header::decode(&bytes);
    }
}
