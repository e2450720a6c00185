//! What the guest says: one JSON object a line. `docs/pulse.md` lists the fields.

use crate::load::Load;
use crate::workload::{Counters, WrongPage};
use core::fmt;

/// The regular report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The guest's time since it started, milliseconds.
    pub t_ms: u64,
    /// Totals since the start.
    pub counters: Counters,
    /// The longest hole in the guest's time since the report before, microseconds.
    pub max_gap_us: u64,
}

impl Report {
    fn fields(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { t_ms, counters: Counters { sweeps, pages_written, pages_verified, errors }, max_gap_us } = self;
        write!(
            f,
            "\"t_ms\":{t_ms},\"sweeps\":{sweeps},\"pages_written\":{pages_written},\"pages_verified\":{pages_verified},\
             \"errors\":{errors},\"max_gap_us\":{max_gap_us}"
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        self.fields(f)?;
        f.write_str("}")
    }
}

/// The last report with the time that has passed since the start, as HTTP gives it.
pub struct Status {
    /// The last report.
    pub report: Report,
    /// The guest's time now, milliseconds.
    pub uptime_ms: u64,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        self.report.fields(f)?;
        write!(f, ",\"uptime_ms\":{}}}", self.uptime_ms)
    }
}

/// What one datagram to the counters port is answered with: `docs/pulse.md` has the layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// The guest's time, nanoseconds.
    pub now_ns: u64,
    /// Totals since the start, up to now.
    pub counters: Counters,
    /// The longest hole in the guest's time since the sample before, nanoseconds.
    pub max_gap_ns: u64,
    /// Whether every page has the content that it is to begin with.
    pub is_filled: bool,
}

/// Bytes of a request that come back in front of the sample.
pub const SAMPLE_TAG_BYTES: usize = 16;
/// Bytes of an answer.
pub const SAMPLE_BYTES: usize = SAMPLE_TAG_BYTES + 7 * 8;

impl Sample {
    /// The answer to `request`, which is cut or padded with zeros to its tag.
    pub fn answer(&self, request: &[u8]) -> [u8; SAMPLE_BYTES] {
        let Self {
            now_ns,
            counters: Counters { sweeps, pages_written, pages_verified, errors },
            max_gap_ns,
            is_filled,
        } = *self;
        let mut bytes = [0; SAMPLE_BYTES];
        let tag = request.len().min(SAMPLE_TAG_BYTES);
        bytes[..tag].copy_from_slice(&request[..tag]);
        let words = [now_ns, sweeps, pages_written, pages_verified, errors, max_gap_ns, u64::from(is_filled)];
        for (chunk, word) in bytes[SAMPLE_TAG_BYTES..].chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Settings in force, the fields of an object without its braces.
pub struct LoadFields(pub Load);

impl fmt::Display for LoadFields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Load { ws_bytes, fill_bytes, zero_bytes, rate, pattern, verify } = self.0;
        write!(f, "\"ws\":{ws_bytes},\"rate\":{rate},\"pattern\":\"{pattern}\",\"verify\":{verify}")?;
        write!(f, ",\"fill\":{fill_bytes},\"zero\":{zero_bytes}")
    }
}

/// A wrong page, said at once.
pub struct WrongPageEvent {
    /// The guest's time, milliseconds.
    pub t_ms: u64,
    /// Where the page lies in the guest's physical memory.
    pub address: u64,
    /// What is wrong with it.
    pub wrong: WrongPage,
}

impl fmt::Display for WrongPageEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WrongPage { expected, found } = self.wrong;
        write!(
            f,
            "{{\"event\":\"wrong-page\",\"t_ms\":{},\"page\":{},\"address\":{},\"fault\":\"{}\",\
             \"expected_generation\":{},\"found_generation\":{},\"found_page\":{},\"first_bad_byte\":{},\"bad_words\":{}}}",
            self.t_ms,
            expected.number,
            self.address,
            found.fault.name(),
            expected.generation,
            found.stamp.generation,
            found.stamp.number,
            found.first_bad_byte,
            found.bad_words
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Rate;
    use crate::page::{Fault, Found, Stamp};

    const REPORT: Report = Report {
        t_ms: 100,
        counters: Counters { sweeps: 1, pages_written: 2, pages_verified: 3, errors: 4 },
        max_gap_us: 5,
    };

    #[test]
    fn the_report_is_the_agreed_object() {
        let fields = r#""t_ms":100,"sweeps":1,"pages_written":2,"pages_verified":3,"errors":4,"max_gap_us":5"#;
        assert_eq!(REPORT.to_string(), format!("{{{fields}}}"));
        assert_eq!(Status { report: REPORT, uptime_ms: 142 }.to_string(), format!("{{{fields},\"uptime_ms\":142}}"));
    }

    #[test]
    fn a_wrong_page_says_where_and_what() {
        let wrong = WrongPage {
            expected: Stamp { number: 7, generation: 9 },
            found: Found {
                fault: Fault::Stale,
                stamp: Stamp { number: 7, generation: 8 },
                first_bad_byte: 8,
                bad_words: 511,
            },
        };
        assert_eq!(
            WrongPageEvent { t_ms: 1, address: 4096, wrong }.to_string(),
            r#"{"event":"wrong-page","t_ms":1,"page":7,"address":4096,"fault":"stale","expected_generation":9,"#
                .to_owned()
                + r#""found_generation":8,"found_page":7,"first_bad_byte":8,"bad_words":511}"#
        );
    }

    #[test]
    fn a_load_shows_max_as_a_word() {
        let load = Load { rate: Rate::Max, ..Load::default() };
        assert_eq!(
            LoadFields(load).to_string(),
            r#""ws":67108864,"rate":"max","pattern":"seq","verify":67108864,"fill":0,"zero":0"#
        );
    }

    #[test]
    fn a_sample_is_laid_out_as_documented() {
        let counters = Counters { sweeps: 2, pages_written: 3, pages_verified: 4, errors: 5 };
        let sample = Sample { now_ns: 0x1_0000_0001, counters, max_gap_ns: 6, is_filled: true };
        let bytes = sample.answer(b"twenty bytes of text");
        assert_eq!(&bytes[..16], b"twenty bytes of ");
        let words: Vec<u64> = bytes[16..].as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        assert_eq!(words, [0x1_0000_0001, 2, 3, 4, 5, 6, 1]);
        assert_eq!(sample.answer(b"ab")[..16], *b"ab\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }
}
