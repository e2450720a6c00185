//! The handoff journal in a file: records one after the other, each with a checksum, durable when it matters.
//!
//! The file is locked as long as the process that writes it lives, and the kernel drops the lock with the process. So
//! whoever gets the lock knows that the last word has been written, and can add a tombstone without a race: that is
//! how an agent answers for a receiving process that died ([`crate::handoff::answer`]).
//!
//! A record that was being written when the power went is cut off at the end of the file, or zeros there: it was never
//! acted upon, and it is dropped. Anything else that cannot be read is damage, and an error: guessing around a lost
//! `Committed` could run a VM twice.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_64;

use crate::handoff::{HandoffRecord, Step};
use crate::id::MigrationId;
use crate::traits::{Durability, Journal};
use crate::wire::{Fields, WireError, cut};

/// The version of the records.
pub const VERSION: u16 = 1;
/// The longest name of a VM or of a peer, in bytes; longer ones are cut.
pub const MAX_NAME_BYTES: usize = 512;
/// The most bytes of a journal that are read. A record has at most some 1100.
pub const MAX_JOURNAL_BYTES: u64 = 16 << 20;

const MAGIC: [u8; 4] = *b"mvHJ";
/// Magic, version, length, and the length again with all bits turned: a length that was damaged must not look like a cut.
const HEAD_BYTES: usize = 10;
const SUM_BYTES: usize = 8;
const NAME: &str = "journal record";

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process has it: the VM process of this attempt is alive.
    #[error("journal {0} is in use by another process")]
    InUse(PathBuf),
    /// The file system said no.
    #[error("journal {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is damaged, or not a journal.
    #[error("journal {path} is damaged at byte {at}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        at: usize,
        /// How.
        #[source]
        source: WireError,
    },
}

/// A journal in a file, held by this process alone.
#[derive(Debug)]
pub struct FileJournal {
    file: File,
    path: PathBuf,
    /// Length of the whole records.
    length: u64,
}

impl FileJournal {
    /// Opens the journal, or makes it, and locks it. A record that was cut off is removed.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let fail = |source| JournalError::Io { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600);
        let file = loop {
            let file = options.open(path).map_err(fail)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => return Err(JournalError::InUse(path.to_owned())),
                result => result.map_err(|error| fail(error.into()))?,
            }
            // Whoever had the lock before may have removed the file: what is written to such a file is written to nobody.
            if file.metadata().map_err(fail)?.nlink() > 0 {
                break file;
            }
        };
        let mut journal = Self { file, path: path.to_owned(), length: 0 };
        let (_, whole) = read_file(&journal.file, path)?;
        journal.length = whole as u64;
        journal.cut().map_err(fail)?;
        // A file that is not in its directory after a power cut is no journal.
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(fail)?;
        Ok(journal)
    }

    /// Reads a journal that another process may be writing: all whole records. Empty if there is no such file.
    pub fn read(path: &Path) -> Result<Vec<HandoffRecord>, JournalError> {
        match File::open(path) {
            Ok(file) => read_file(&file, path).map(|(records, _)| records),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
            Err(source) => Err(JournalError::Io { path: path.to_owned(), source }),
        }
    }

    /// Removes the journal. Nobody else can have it open for writing: whoever waits for the lock makes a new one.
    pub fn remove(self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }

    /// Removes what is behind the last whole record.
    fn cut(&mut self) -> io::Result<()> {
        if self.file.metadata()?.len() > self.length {
            self.file.set_len(self.length)?;
            self.file.sync_all()?;
        }
        Ok(())
    }
}

impl Journal for FileJournal {
    fn append(&mut self, record: &HandoffRecord, durability: Durability) -> io::Result<()> {
        // What a failure has left there.
        self.cut()?;
        let bytes = encode(record);
        let written = self.file.write_all(&bytes).and_then(|()| match durability {
            Durability::Durable => self.file.sync_data(),
            Durability::Lazy => Ok(()),
        });
        if let Err(error) = written {
            // It must not be found later: what it says has not happened. If this fails too, the disk is beyond help.
            let _ = self.cut();
            return Err(error);
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Writes as much as a record, in zeros, which are none, and takes it away again: three times, of which the shortest counts. The first
    /// record of a file tells nothing, because it pays for making the file, and any may wait for what others write to the disk.
    fn measure(&mut self) -> io::Result<Option<Duration>> {
        let mut write = || {
            let began = Instant::now();
            self.file.write_all(&[0; 128]).and_then(|()| self.file.sync_data()).map(|()| began.elapsed())
        };
        let times = [write(), write(), write()];
        self.cut()?;
        times.into_iter().try_fold(None, |least: Option<Duration>, time| {
            let time = time?;
            Ok(Some(least.map_or(time, |least| least.min(time))))
        })
    }

    fn load(&mut self) -> io::Result<Vec<HandoffRecord>> {
        read_file(&self.file, &self.path).map(|(records, _)| records).map_err(io::Error::other)
    }
}

/// All whole records of a file, and their length.
fn read_file(mut file: &File, path: &Path) -> Result<(Vec<HandoffRecord>, usize), JournalError> {
    let fail = |source| JournalError::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).map_err(fail)?;
    file.take(MAX_JOURNAL_BYTES + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > MAX_JOURNAL_BYTES {
        return Err(fail(io::Error::other(format!("longer than {MAX_JOURNAL_BYTES} bytes"))));
    }
    decode_all(&bytes).map_err(|(at, source)| JournalError::Damaged { path: path.to_owned(), at, source })
}

/// The bytes of a record.
pub fn encode(record: &HandoffRecord) -> Vec<u8> {
    let HandoffRecord { id, step, unix_ms, vm, peer } = record;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(id.0);
    bytes.push(*step as u8);
    bytes.extend(unix_ms.to_le_bytes());
    for name in [vm, peer] {
        let name = cut(name, MAX_NAME_BYTES).as_bytes();
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend(name);
    }
    let length = (bytes.len() - HEAD_BYTES) as u16;
    bytes[6..8].copy_from_slice(&length.to_le_bytes());
    bytes[8..10].copy_from_slice(&(!length).to_le_bytes());
    let sum = xxh3_64(&bytes);
    bytes.extend(sum.to_le_bytes());
    bytes
}

/// All whole records and their length together, or where the damage is.
pub fn decode_all(bytes: &[u8]) -> Result<(Vec<HandoffRecord>, usize), (usize, WireError)> {
    let mut records = Vec::new();
    let mut at = 0;
    // A file may have been made longer before its bytes arrived: zeros at the end count as not written.
    let written_end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    while at < bytes.len() {
        let rest = &bytes[at..];
        let written = written_end.saturating_sub(at);
        let known = written.min(MAGIC.len());
        if rest[..known] != MAGIC[..known] {
            return Err((at, WireError::Magic));
        }
        let Some(head) = rest.first_chunk::<HEAD_BYTES>().filter(|_| written >= HEAD_BYTES) else { break };
        let length = u16::from_le_bytes([head[6], head[7]]);
        if length != !u16::from_le_bytes([head[8], head[9]]) {
            return Err((at, WireError::Value { kind: NAME, field: "length", value: length.into() }));
        }
        let end = HEAD_BYTES + length as usize;
        let Some(checksum) = rest.get(end..end + SUM_BYTES) else { break };
        let sum = xxh3_64(&rest[..end]).to_le_bytes();
        if sum != checksum {
            // Of one that was torn in its checksum, what is there fits. (A checksum may end in zeros of its own.)
            let there = written.saturating_sub(end);
            if there < SUM_BYTES && checksum[..there] == sum[..there] {
                break;
            }
            return Err((at, WireError::Checksum(NAME)));
        }
        let version = u16::from_le_bytes([rest[4], rest[5]]);
        if version != VERSION {
            return Err((at, WireError::Value { kind: NAME, field: "version", value: version.into() }));
        }
        records.push(decode(&rest[HEAD_BYTES..end]).map_err(|error| (at, error))?);
        at += end + SUM_BYTES;
    }
    Ok((records, at))
}

fn decode(body: &[u8]) -> Result<HandoffRecord, WireError> {
    let mut fields = Fields::new(NAME, body);
    let id = MigrationId(fields.array()?);
    let step = fields.u8()?;
    let step = Step::ALL.into_iter().find(|known| *known as u8 == step).ok_or(fields.value("step", step.into()))?;
    let unix_ms = fields.u64()?;
    let mut name = || {
        let length = fields.u16()? as usize;
        if length > MAX_NAME_BYTES {
            return Err(fields.value("name length", length as u64));
        }
        Fields::new(NAME, fields.bytes(length)?).text()
    };
    let (vm, peer) = (name()?, name()?);
    fields.end()?;
    Ok(HandoffRecord { id, step, unix_ms, vm, peer })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(step: Step) -> HandoffRecord {
        HandoffRecord {
            id: MigrationId([0xcd; 16]),
            step,
            unix_ms: 1_700_000_000_000,
            vm: "web".into(),
            peer: "host2:7437".into(),
        }
    }

    #[test]
    fn measuring_leaves_nothing_behind_and_what_is_left_is_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let mut journal = FileJournal::open(&path).unwrap();
        journal.append(&record(Step::Sending), Durability::Durable).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(journal.measure().unwrap().is_some());
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        // As if it could not be taken away: nobody sees a record in it, and the next one is where it belongs.
        journal.file.write_all(&[0; 384]).unwrap();
        assert_eq!(FileJournal::read(&path).unwrap(), [record(Step::Sending)]);
        journal.append(&record(Step::Kept), Durability::Durable).unwrap();
        assert_eq!(FileJournal::read(&path).unwrap(), [Step::Sending, Step::Kept].map(record));
    }

    #[test]
    fn golden() {
        crate::golden::check("journal-record", &encode(&record(Step::Committed)));
    }

    #[test]
    fn keeps_records_across_processes_and_locks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        assert!(FileJournal::read(&path).unwrap().is_empty());
        let mut journal = FileJournal::open(&path).unwrap();
        journal.append(&record(Step::Receiving), Durability::Durable).unwrap();
        journal.append(&record(Step::Prepared), Durability::Lazy).unwrap();
        assert!(matches!(FileJournal::open(&path), Err(JournalError::InUse(_))));
        assert_eq!(FileJournal::read(&path).unwrap().len(), 2);
        drop(journal);
        let mut journal = FileJournal::open(&path).unwrap();
        journal.append(&record(Step::GaveUp), Durability::Durable).unwrap();
        assert_eq!(journal.load().unwrap(), [Step::Receiving, Step::Prepared, Step::GaveUp].map(record));
    }

    #[test]
    fn whoever_removes_a_journal_takes_no_record_of_another_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        std::thread::scope(|scope| {
            for byte in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    let ours = HandoffRecord { id: MigrationId([byte; 16]), ..record(Step::Sending) };
                    let mut made = 0;
                    while made < 200 {
                        let Ok(mut journal) = FileJournal::open(path) else { continue };
                        made += 1;
                        assert_eq!(journal.load().unwrap(), []);
                        journal.append(&ours, Durability::Lazy).unwrap();
                        assert_eq!(FileJournal::read(path).unwrap(), std::slice::from_ref(&ours));
                        journal.remove().unwrap();
                    }
                });
            }
        });
        assert!(!path.exists());
    }

    #[test]
    fn a_torn_tail_is_dropped_wherever_it_is_torn() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let (first, second) = (encode(&record(Step::Receiving)), encode(&record(Step::Committed)));
        for cut in 0..second.len() {
            for fill in [0, second.len() - cut, 4096] {
                let bytes = [&first[..], &second[..cut], &vec![0; fill]].concat();
                // A checksum that ends in zeros would be whole; this one does not.
                std::fs::write(&path, bytes).unwrap();
                let mut journal = FileJournal::open(&path).unwrap_or_else(|error| panic!("{cut}+{fill}: {error}"));
                assert_eq!(journal.load().unwrap(), [record(Step::Receiving)], "{cut}+{fill}");
                journal.append(&record(Step::GaveUp), Durability::Durable).unwrap();
                assert_eq!(FileJournal::read(&path).unwrap(), [Step::Receiving, Step::GaveUp].map(record));
            }
        }
    }

    #[test]
    fn damage_is_an_error_and_never_a_shorter_journal() {
        let steps = [Step::Receiving, Step::Prepared, Step::Committed];
        let bytes: Vec<u8> = steps.iter().flat_map(|step| encode(&record(*step))).collect();
        let one = bytes.len() / 3;
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let (at, _) = decode_all(&flipped).unwrap_err();
            assert_eq!(at, bit / 8 / one * one);
        }
    }

    #[test]
    fn damage_is_no_torn_tail_where_the_checksum_ends_in_zero() {
        let good = (0..).map(|unix_ms| encode(&HandoffRecord { unix_ms, ..record(Step::Committed) }));
        let good = good.into_iter().find(|bytes| bytes.ends_with(&[0])).unwrap();
        for bit in 0..(good.len() - 1) * 8 {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_all(&flipped).is_err(), "bit {bit}");
        }
        for cut in 0..good.len() - 1 {
            let torn = [&good[..cut], &vec![0; good.len() - cut]].concat();
            assert_eq!(decode_all(&torn), Ok((vec![], 0)), "cut at {cut}");
        }
    }

    #[test]
    fn hostile_fields() {
        let with = |at: usize, value: &[u8]| {
            let mut bytes = encode(&record(Step::Prepared));
            bytes[at..at + value.len()].copy_from_slice(value);
            let end = bytes.len() - SUM_BYTES;
            let sum = xxh3_64(&bytes[..end]);
            bytes[end..].copy_from_slice(&sum.to_le_bytes());
            decode_all(&bytes)
        };
        assert!(matches!(with(0, b"x"), Err((0, WireError::Magic))));
        assert!(matches!(with(4, &[2]), Err((0, WireError::Value { field: "version", .. }))));
        for step in [0, 5, 15, 21, 255] {
            assert!(matches!(with(26, &[step]), Err((0, WireError::Value { field: "step", .. }))));
        }
        assert!(matches!(with(35, &600u16.to_le_bytes()), Err((0, WireError::Value { field: "name length", .. }))));
        assert!(with(35, &[2]).is_err() && with(35, &[100]).is_err() && with(37, &[0xff]).is_err());
    }

    proptest! {
        #[test]
        fn round_trip(step in prop::sample::select(Step::ALL.to_vec()), id in any::<[u8; 16]>(), unix_ms in any::<u64>(),
                      vm in ".{0,100}", peer in ".{0,100}") {
            let record = HandoffRecord { id: MigrationId(id), step, unix_ms, vm, peer };
            let bytes = encode(&record);
            prop_assert_eq!(decode_all(&bytes), Ok((vec![record], bytes.len())));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_all(&bytes);
        }
    }
}
