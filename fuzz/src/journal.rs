//! Journals as files hold them: whole records are read as they were written, a torn end is dropped, damage is never a shorter
//! journal, and what is appended afterwards is found.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use arbitrary::{Arbitrary, Unstructured};
use migrator::MigrationId;
use migrator::handoff::{Answer, HandoffRecord, Step, answer, unsettled};
use migrator::journal::{FileJournal, decode_all, encode};
use migrator::traits::{Durability, Journal};
use xxhash_rust::xxh3::xxh3_64;

pub fn run(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else { return };
    match mode % 4 {
        0 => bytes(data),
        1 => bytes(&sealed(data)),
        2 => _ = damaged(&mut Unstructured::new(data)),
        _ => file(data),
    }
}

fn record(step: Step) -> HandoffRecord {
    HandoffRecord { id: MigrationId([7; 16]), step, unix_ms: 1, vm: "web".into(), peer: "host2:7437".into() }
}

/// Anything at all.
fn bytes(data: &[u8]) {
    let Ok((records, length)) = decode_all(data) else { return };
    assert_eq!(records.iter().flat_map(encode).collect::<Vec<_>>(), data[..length]);
    let mut longer = data[..length].to_vec();
    longer.extend(encode(&record(Step::Committed)));
    let (more, all) = decode_all(&longer).unwrap();
    assert_eq!((more.len(), all), (records.len() + 1, longer.len()));
    for asked in &records {
        for alive in [false, true] {
            let said = answer(&records, asked.id, alive);
            let has = |step| records.iter().any(|record| record.id == asked.id && record.step == step);
            assert_eq!(said == Answer::GaveUp, has(Step::GaveUp));
            assert!(said != Answer::NoTrace || !alive && !has(Step::Committed) && !has(Step::Running));
        }
    }
    if let Some(doubt) = unsettled(&records) {
        assert_eq!(doubt.step, Step::Decided);
    }
}

/// Bodies with the heads and checksums that they need.
fn sealed(mut data: &[u8]) -> Vec<u8> {
    let mut journal = Vec::new();
    while let Some((length, rest)) = data.split_first() {
        let (body, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        let mut record = b"mvHJ\x01\0".to_vec();
        record.extend((body.len() as u16).to_le_bytes());
        record.extend((!(body.len() as u16)).to_le_bytes());
        record.extend(body);
        record.extend(xxh3_64(&record).to_le_bytes());
        journal.extend(record);
        data = rest;
    }
    journal
}

/// A good journal, and then a cut (with zeros behind it, or not) or a changed byte.
fn damaged(u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut records = Vec::new();
    for _ in 0..u.int_in_range(1..=4)? {
        let step = Step::ALL[u.int_in_range(0..=Step::ALL.len() - 1)?];
        let name = |u: &mut Unstructured<'_>| -> arbitrary::Result<String> {
            let length = u.int_in_range(0..=12)?;
            Ok(String::from_utf8_lossy(u.bytes(length)?).into_owned())
        };
        let id = MigrationId(<[u8; 16]>::arbitrary(u)?);
        records.push(HandoffRecord { id, step, unix_ms: u.arbitrary()?, vm: name(u)?, peer: name(u)? });
    }
    let whole: Vec<u8> = records.iter().flat_map(encode).collect();
    assert_eq!(decode_all(&whole).unwrap(), (records.clone(), whole.len()));
    let at = u.int_in_range(0..=whole.len() - 1)?;
    let change: u8 = u.arbitrary()?;
    if change == 0 {
        let mut torn = whole[..at].to_vec();
        torn.extend(vec![0; u.int_in_range(0..=64)?]);
        // A checksum may end in zeros, which then are there all the same.
        let (read, length) = decode_all(&torn).unwrap();
        assert!(records.starts_with(&read) && torn[..length] == whole[..length]);
    } else {
        let mut changed = whole.clone();
        changed[at] ^= change;
        match decode_all(&changed) {
            Err(_) => {}
            // An end that became zeros is what a torn record looks like, and nothing tells the two apart.
            Ok((read, length)) => {
                let torn = changed[at..].iter().all(|byte| *byte == 0) && length <= at;
                assert!(torn && records.starts_with(&read), "byte {at} of {} ^ {change:#x}, {length}", whole.len());
            }
        }
    }
    Ok(())
}

/// Through a file: opened, or refused as damaged; then appended to.
fn file(data: &[u8]) {
    thread_local! {
        static FILE: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
    }
    FILE.with_borrow_mut(|path| {
        let path = path.get_or_insert_with(|| {
            let memory = Path::new("/dev/shm");
            let dir = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
            dir.join(format!("microvm-fuzz-journal-{}-{:?}", std::process::id(), std::thread::current().id()))
        });
        std::fs::write(&*path, data).unwrap();
        let expected = decode_all(data);
        match FileJournal::open(path) {
            Ok(mut journal) => {
                let (mut records, _) = expected.unwrap();
                assert_eq!(journal.load().unwrap(), records);
                journal.append(&record(Step::GaveUp), Durability::Lazy).unwrap();
                records.push(record(Step::GaveUp));
                assert_eq!(FileJournal::read(path).unwrap(), records);
            }
            Err(error) => {
                assert!(expected.is_err(), "{error}");
                assert_eq!(std::fs::read(&*path).unwrap(), data, "a damaged journal stays as it is");
            }
        }
        std::fs::remove_file(&*path).unwrap();
    });
}
