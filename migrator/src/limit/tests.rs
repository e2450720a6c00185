use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// One stream that sent for a second, and spent all of it so.
fn spent(what: fn(&mut Spent) -> &mut Duration) -> Spent {
    let mut spent = Spent { all: SECOND, ..Spent::default() };
    *what(&mut spent) = SECOND;
    spent
}

fn judged(options: &Options, spent: Spent, change: impl FnOnce(&mut Facts<'_>)) -> Limit {
    let mut facts = Facts {
        options,
        total: SECOND * 11 / 10,
        spent,
        bytes_sent: 118_000_000,
        pages: 28_000,
        pages_again: 0,
        page_rate: 118_000_000,
        dirty_rate: 10_000_000,
        compressed: false,
    };
    change(&mut facts);
    judge(&facts).unwrap()
}

#[test]
fn names_where_the_time_went() {
    let options = Options { compression: Compression::None, streams: 1, ..Options::default() };
    let by = |spent| judged(&options, spent, |_| {});
    for (spent, wanted, words) in [
        (spent(|s| &mut s.link), LimitedBy::Link, "took 118 MB/s, and the senders waited for it for 100 % of the time"),
        (Spent { cpu: SECOND * 9 / 10, ..spent(|s| &mut s.link) }, LimitedBy::Cpu, "busy for 90 % of the time"),
        (spent(|s| &mut s.pace), LimitedBy::Bandwidth, "--bandwidth: the senders waited for it for 100 %"),
        (spent(|s| &mut s.pages), LimitedBy::Memory, "zero pages"),
        (spent(|s| &mut s.pack), LimitedBy::Compression, "compressing"),
    ] {
        let limit = by(spent);
        assert_eq!(limit.by, wanted, "{limit:?}");
        assert!(limit.sentence.contains(words), "{limit:?}");
        assert!(!limit.sentence.contains('\n') && limit.sentence.contains("; to try: "), "{limit:?}");
    }
    // The greatest share counts, of whatever is left after the others.
    let third = SECOND / 3;
    let mixed = Spent { all: SECOND, link: third, pages: third / 2, pack: third + third / 2, ..Spent::default() };
    assert_eq!(by(mixed).by, LimitedBy::Compression);
}

#[test]
fn what_to_try_is_what_was_not_tried() {
    let tries = |compression, streams, compressed| {
        let options = Options { compression, streams, ..Options::default() };
        let streams = Spent { all: SECOND * streams.into(), link: SECOND * streams.into(), ..Spent::default() };
        judged(&options, streams, |facts| facts.compressed = compressed).sentence
    };
    let all = tries(Compression::None, 1, false);
    assert!(all.ends_with("to try: --compress auto, --streams 4"), "{all}");
    let streams = tries(Compression::Auto, 1, false);
    assert!(streams.ends_with("its pages hardly get shorter; to try: --streams 4"), "{streams}");
    let nothing = tries(Compression::Auto, 4, true);
    assert!(!nothing.contains("to try") && !nothing.contains("hardly") && nothing.contains("118 MB/s"), "{nothing}");
    // With a fixed level it is auto that may be better.
    let options = Options { compression: Compression::Zstd(6), ..Options::default() };
    assert!(judged(&options, spent(|s| &mut s.pack), |_| {}).sentence.ends_with("to try: --compress auto"));
}

#[test]
fn a_guest_that_writes_too_much_comes_first() {
    let options = Options { bandwidth: Some(1), ..Options::default() };
    let again = |pages_again| {
        judged(&options, spent(|s| &mut s.pace), |facts| {
            (facts.pages_again, facts.dirty_rate) = (pages_again, 100_000_000);
        })
    };
    let limit = again(15_000);
    assert_eq!(limit.by, LimitedBy::DirtyRate);
    for word in ["dirtied 100 MB/s while pages went at 118 MB/s, and 53 %", "--max-downtime", "a higher --bandwidth"] {
        assert!(limit.sentence.contains(word), "{limit:?}");
    }
    assert_eq!(again(14_000).by, LimitedBy::Bandwidth);
}

#[test]
fn little_to_send_and_nothing_to_send() {
    let options = Options::default();
    let limit = judged(&options, spent(|s| &mut s.link), |facts| facts.total = SECOND * 4);
    assert_eq!(limit.by, LimitedBy::Setup);
    assert!(!limit.sentence.contains("to try"), "{limit:?}");
    // The streams send at the same time.
    let options = Options { streams: 4, ..Options::default() };
    let limit = judged(&options, spent(|s| &mut s.link), |facts| facts.total = SECOND);
    assert_eq!(limit.by, LimitedBy::Setup);
    let facts = Facts {
        options: &options,
        total: SECOND,
        spent: Spent::default(),
        bytes_sent: 0,
        pages: 0,
        pages_again: 0,
        page_rate: 0,
        dirty_rate: 0,
        compressed: false,
    };
    assert_eq!(judge(&facts), None);
}
