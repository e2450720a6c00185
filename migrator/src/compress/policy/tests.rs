//! The policy against simulated links, CPUs and contents.

use super::*;

const MB: f64 = 1e6;

/// What pages are like, and what the CPUs do with them: ratio, and bytes a second of packing and unpacking, by level.
#[derive(Clone, Copy)]
struct Content([(f64, f64, f64); LEVELS.len()]);

const TEXT: Content = Content([(0.45, 800.0, 1500.0), (0.33, 500.0, 1000.0), (0.29, 250.0, 1000.0)]);
const BINARY: Content = Content([(0.70, 700.0, 1800.0), (0.55, 400.0, 1200.0), (0.51, 180.0, 1100.0)]);
const RANDOM: Content = Content([(1.0, 2000.0, 9e9), (1.0, 1500.0, 9e9), (1.0, 900.0, 9e9)]);

/// One stream, one worker, and a socket buffer before a link.
struct Run {
    link: fn(f64) -> f64,
    content: fn(f64) -> Content,
    workers: f64,
    /// How much slower the destination opens frames than this host.
    slow_destination: f64,
    cap: Option<u64>,
    /// How much faster samples are compressed than chunks, by level.
    flattery: [f64; LEVELS.len()],
    policy: Option<Policy>,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            link: |_| 125.0 * MB,
            content: |_| TEXT,
            workers: 1.0,
            slow_destination: 1.0,
            cap: None,
            flattery: [1.0; LEVELS.len()],
            policy: None,
        }
    }
}

/// What a socket takes at once.
const SOCKET: f64 = 1.0 * MB;
/// How fast bytes get into it.
const MEMCPY: f64 = 3000.0 * MB;

impl Run {
    /// Bytes of guest memory a second, if everything were done so.
    fn fixed(&self, choice: Choice) -> f64 {
        let link = (self.link)(0.0).min(self.cap.unwrap_or(u64::MAX) as f64).min(MEMCPY);
        match choice {
            Choice::Raw => link,
            Choice::Zstd(level) => {
                let (ratio, pack, unpack) = (self.content)(0.0).0[LEVELS.iter().position(|l| *l == level).unwrap()];
                (link / ratio).min(pack * MB * self.workers).min(unpack * MB * self.slow_destination)
            }
        }
    }

    fn best(&self) -> f64 {
        LEVELS.map(Choice::Zstd).map(|choice| self.fixed(choice)).into_iter().fold(self.fixed(Choice::Raw), f64::max)
    }

    /// Sends so many bytes of guest memory. How long it took, and the policy at the end.
    fn play(&self, bytes: f64) -> (f64, Policy, Vec<(f64, Choice)>) {
        let mut policy = self.policy.clone().unwrap_or_else(|| Policy::new(self.workers as usize, 1, self.cap));
        let (mut now, mut done, mut buffered, mut packed_until) = (0.0f64, 0.0, 0.0f64, 0.0f64);
        let mut choices = vec![];
        let at = Duration::from_secs_f64;
        while done < bytes {
            let mut choice = policy.choose(at(now));
            let content = (self.content)(now);
            let mut tried = if policy.sample(at(now)) { policy.next_level(None) } else { None };
            while let Some(level) = tried {
                let index = LEVELS.iter().position(|l| *l == level).unwrap();
                let (ratio, mut pack, unpack) = content.0[index];
                pack *= self.flattery[index];
                now += 131_072.0 / (pack * MB);
                policy.tried(Trial { level, ratio, pack: pack * MB, unpack: unpack * MB });
                tried = policy.next_level(tried);
                choice = policy.choose(at(now));
            }
            if choices.last().is_none_or(|(_, last)| *last != choice) {
                choices.push((now, choice));
            }
            let pages = (policy.most_pages() * PAGE_BYTES) as f64;
            // How fast the far end takes bytes, and what this chunk is on the wire.
            let (mut drain, mut wire) = ((self.link)(now), pages);
            if let Choice::Zstd(level) = choice {
                let (ratio, pack, unpack) = content.0[LEVELS.iter().position(|l| *l == level).unwrap()];
                wire = pages * ratio;
                drain = drain.min(unpack * MB * self.slow_destination * ratio);
                // Workers are ahead by one chunk at most.
                packed_until =
                    packed_until.max(now - pages / (pack * MB * self.workers)) + pages / (pack * MB * self.workers);
                let wait = (packed_until - now).max(0.0);
                buffered = (buffered - drain * wait).max(0.0);
                now += wait;
                let took = Duration::from_secs_f64(pages / (pack * MB));
                policy.worked(Work { level, bytes: pages as u64, packed: wire as u64, took });
            }
            let began = now;
            if let Some(cap) = self.cap {
                drain = drain.min(cap as f64);
            }
            let room = if self.cap.is_some() { 0.0 } else { (SOCKET - buffered).max(0.0) };
            let took = (wire / MEMCPY).max((wire - room) / drain);
            buffered = (buffered + wire - drain * took).clamp(0.0, SOCKET);
            now += took;
            policy.wrote(Written { choice, bytes: wire as u64, began: at(began), ended: at(now) });
            done += pages;
        }
        (now, policy, choices)
    }

    #[track_caller]
    fn is_close_to_the_best(&self, bytes: f64, within: f64) -> Choice {
        let (took, mut policy, choices) = self.play(bytes);
        let best = bytes / self.best();
        assert!(took < best * (1.0 + within), "{took:.3} s of {best:.3}: {choices:?}");
        policy.choose(Duration::from_secs(3600 * 24));
        policy.choice
    }
}

const GB: f64 = 1000.0 * MB;

#[test]
fn finds_the_best_for_each_link_and_content() {
    for (name, link, within) in [
        ("100 Mb/s", (|_| 12.5 * MB) as fn(f64) -> f64, 0.03),
        ("1 Gb/s", |_| 125.0 * MB, 0.06),
        ("10 Gb/s", |_| 1250.0 * MB, 0.05),
        ("loopback", |_| 2500.0 * MB, 0.05),
    ] {
        for (kind, content) in
            [("text", (|_| TEXT) as fn(f64) -> Content), ("binary", |_| BINARY), ("random", |_| RANDOM)]
        {
            for workers in [1.0, 3.0, 7.0] {
                println!("{name}, {kind}, {workers} workers");
                let run = Run { link, content, workers, ..Run::default() };
                let choice = run.is_close_to_the_best(0.5 * GB, within + 0.02);
                assert!(kind != "random" || choice == Choice::Raw, "{choice:?}");
            }
        }
    }
}

#[test]
fn does_what_one_expects() {
    let choice =
        |link, content, workers| Run { link, content, workers, ..Run::default() }.is_close_to_the_best(GB, 0.05);
    assert_eq!(choice(|_| 12.5 * MB, |_| TEXT, 1.0), Choice::Zstd(3));
    assert_eq!(choice(|_| 125.0 * MB, |_| TEXT, 1.0), Choice::Zstd(1));
    assert_eq!(choice(|_| 1250.0 * MB, |_| TEXT, 1.0), Choice::Raw);
    assert_eq!(choice(|_| 12.5 * MB, |_| RANDOM, 7.0), Choice::Raw);
}

#[test]
fn samples_that_flatter_are_seen_through() {
    // On a slow link the highest level would be the best, if it were as fast as on samples; it is a tenth of that.
    let mut slow = TEXT;
    slow.0[2].1 = 25.0;
    static SLOW: std::sync::OnceLock<Content> = std::sync::OnceLock::new();
    SLOW.get_or_init(|| slow);
    let content = |_| *SLOW.get().unwrap();
    let run = Run { link: |_| 12.5 * MB, content, flattery: [1.3, 1.3, 10.0], ..Run::default() };
    assert_eq!(run.is_close_to_the_best(0.5 * GB, 0.05), Choice::Zstd(1));
    // All are slowed down alike, by a busy machine.
    let run = Run { link: |_| 125.0 * MB, flattery: [4.0; LEVELS.len()], ..Run::default() };
    run.is_close_to_the_best(0.5 * GB, 0.07);
}

#[test]
fn a_cap_on_bandwidth_is_the_link() {
    let run = Run { link: |_| 2500.0 * MB, cap: Some(10_000_000), ..Run::default() };
    assert_eq!(run.is_close_to_the_best(0.5 * GB, 0.05), Choice::Zstd(3));
    // It is known before anything is sent.
    let (_, _, choices) = run.play(50.0 * MB);
    assert!(choices.iter().all(|(_, choice)| *choice != Choice::Raw), "{choices:?}");
}

#[test]
fn notices_that_the_link_or_the_content_changed() {
    let at_least = |run: Run, bytes: f64, limit: f64| {
        let (took, _, choices) = run.play(bytes);
        assert!(took < limit, "{took:.2} s: {choices:?}");
        choices
    };
    // A fast link becomes a slow one after half a second: one and a quarter GB at 2.5 GB/s, then 2 GB at the compressed 125 MB/s.
    let run = Run { link: |now| if now < 0.5 { 2500.0 * MB } else { 125.0 * MB }, ..Run::default() };
    let raw = 1.25 * GB;
    at_least(run, raw + 1.0 * GB, 0.5 + 1.0 * GB / (125.0 * MB / 0.33) * 1.05);
    // And the other way round.
    let run = Run { link: |now| if now < 2.0 { 12.5 * MB } else { 2500.0 * MB }, ..Run::default() };
    let slow = 2.0 * 12.5 * MB / 0.29;
    let choices = at_least(run, slow + 5.0 * GB, 2.0 + 5.0 * GB / (2500.0 * MB) + 3.0);
    assert_eq!(choices.last().unwrap().1, Choice::Raw);
    // Random memory, then text: a quarter of a second later at most.
    let run = Run { content: |now| if now < 1.0 { RANDOM } else { TEXT }, ..Run::default() };
    let choices = at_least(run, 125.0 * MB + 2.0 * GB, 1.0 + 2.0 * GB / (125.0 * MB / 0.33) * 1.05 + 0.3);
    assert!(choices.iter().any(|(at, choice)| *choice != Choice::Raw && *at < 1.3), "{choices:?}");
}

/// Connections begin slowly, destinations with memory that nobody has touched, and on few CPUs chunks are compressed at a fraction of
/// what samples are.
#[test]
fn a_slow_beginning_does_not_make_a_fast_link_a_slow_one() {
    let content = |_| Content([(0.10, 700.0, 1500.0), (0.08, 500.0, 1000.0), (0.07, 250.0, 1000.0)]);
    let link = |now| if now < 0.005 { 300.0 * MB } else { 1700.0 * MB };
    let run = Run { link, content, flattery: [4.0; LEVELS.len()], ..Run::default() };
    let (took, _, choices) = run.play(0.5 * GB);
    assert!(took < 0.5 * GB / (1700.0 * MB) * 1.1, "{took:.3} s: {choices:?}");
    // Longer than the first look at it: a tenth of a second later it is looked at again.
    let run = Run { link: |now| if now < 0.1 { 300.0 * MB } else { 1700.0 * MB }, ..run };
    let (took, _, choices) = run.play(1.5 * GB);
    assert!(took < 1.5 * GB / (1700.0 * MB) * 1.4, "{took:.3} s: {choices:?}");
}

#[test]
fn a_destination_that_opens_frames_slowly_is_found_out() {
    // It would take 600 MB/s raw, and opens frames at 100: that takes as long to find out as not to lose by trying on a slow link.
    let run = Run { link: |_| 600.0 * MB, workers: 7.0, slow_destination: 0.1, ..Run::default() };
    let (took, _, choices) = run.play(6.0 * GB);
    let raw = 6.0 * GB / (600.0 * MB);
    assert!(took < raw * 1.75, "{took:.2} s of {raw:.2}: {choices:?}");
}

fn settled(link: f64, content: Content) -> Policy {
    let mut policy = Policy::new(1, 1, None);
    (policy.link, policy.windows) = (Some(link), FIRST_WINDOWS + 1);
    for ((ratio, pack, unpack), level) in content.0.into_iter().zip(LEVELS) {
        policy.tried(Trial { level, ratio, pack: pack * MB, unpack: unpack * MB });
    }
    policy
}

#[test]
fn the_last_round_is_about_latency() {
    let last = |link: f64, content, bytes: u64| {
        let mut policy = settled(link, content);
        policy.round(Some(bytes));
        policy.choose(Duration::ZERO)
    };
    // A few pages arrive sooner as they are: 40 KB take 0.3 ms.
    assert_eq!(last(125.0 * MB, TEXT, 40_000), Choice::Raw);
    // Ten MB take 80 ms raw, and 26 ms and what making the first and opening the last chunk takes compressed.
    assert!(matches!(last(125.0 * MB, TEXT, 10_000_000), Choice::Zstd(_)));
    // One chunk cannot be sent while it is made.
    assert_eq!(last(125.0 * MB, TEXT, 1_000_000), Choice::Zstd(1));
    assert_eq!(last(250.0 * MB, TEXT, 1_000_000), Choice::Raw);
    assert_eq!(last(1250.0 * MB, TEXT, 10_000_000), Choice::Raw);
    assert_eq!(last(125.0 * MB, RANDOM, 10_000_000), Choice::Raw);
    // A round that is all of memory is no short one: it goes on as before.
    assert_eq!(last(1250.0 * MB, TEXT, 1 << 30), Choice::Raw);
    let mut policy = settled(12.5 * MB, TEXT);
    policy.round(Some(1 << 30));
    assert_eq!(policy.choose(Duration::ZERO), Choice::Zstd(3));
    // The round after a short one is not held to what was chosen for it.
    policy.round(Some(1000));
    assert_eq!(policy.choose(Duration::ZERO), Choice::Raw);
    policy.round(None);
    assert_eq!(policy.choose(Duration::ZERO), Choice::Zstd(3));
}

#[test]
fn samples_are_few_and_only_of_what_could_win() {
    // Nothing is tried before the link is known.
    let mut policy = Policy::new(1, 1, None);
    assert!(!policy.sample(Duration::ZERO));
    assert_eq!(policy.most_pages(), 128);
    let raw = Written { choice: Choice::Raw, bytes: 8 << 20, began: Duration::ZERO, ended: Duration::from_millis(70) };
    for _ in 0..4 {
        policy.wrote(raw);
    }
    assert_eq!(policy.most_pages(), 512);
    assert!(policy.sample(Duration::ZERO));
    // Nothing is faster than this link.
    policy.link = Some(1e10);
    assert!(!policy.sample(Duration::from_secs(1)));
    // Ten in a second.
    let mut policy = Policy::new(1, 1, Some(12_500_000));
    let ms = Duration::from_millis;
    assert_eq!([0, 99, 100, 120, 200, 1200].map(|at| policy.sample(ms(at))), [true, false, true, false, true, true]);
    // Not in a short last round.
    policy.round(Some(1 << 20));
    assert!(!policy.sample(ms(5000)));
    policy.round(Some(1 << 30));
    assert!(policy.sample(ms(5000)));
    // A higher level only where the one below leaves the link the slowest.
    let levels = |policy: &Policy| {
        let mut levels = vec![policy.next_level(None)];
        while let Some(level) = levels[levels.len() - 1] {
            levels.push(policy.next_level(Some(level)));
        }
        levels.into_iter().flatten().collect::<Vec<_>>()
    };
    assert_eq!(levels(&settled(12.5 * MB, TEXT)), LEVELS);
    assert_eq!(levels(&settled(200.0 * MB, TEXT)), [-3, 1]);
    assert_eq!(levels(&settled(1000.0 * MB, TEXT)), [-3]);
    // What does not get shorter is not tried with a higher level.
    assert_eq!(levels(&settled(12.5 * MB, RANDOM)), [-3]);
    // Nor one of which whole chunks tell.
    let mut policy = settled(12.5 * MB, TEXT);
    policy.worked(Work { level: 3, bytes: 2_000_000, packed: 600_000, took: ms(8) });
    assert_eq!((policy.choice, levels(&policy)), (Choice::Zstd(3), vec![-3, 1]));
    policy.round(None);
    assert_eq!(levels(&policy), LEVELS);
}

#[test]
fn no_measurement_breaks_it() {
    let times = [Duration::ZERO, Duration::from_nanos(1), Duration::from_secs(1), Duration::MAX];
    for cap in [None, Some(0), Some(u64::MAX)] {
        let mut policy = Policy::new(0, 0, cap);
        for began in times {
            for ended in times {
                for bytes in [0, 1, 1 << 22, u64::MAX / 64] {
                    for choice in [Choice::Raw, Choice::Zstd(1), Choice::Zstd(99)] {
                        policy.wrote(Written { choice, bytes, began, ended });
                        policy.tried(Trial { level: 1, ratio: 0.5, pack: 1e9, unpack: 1e9 });
                        policy.round(Some(bytes));
                        policy.round(None);
                        policy.choose(ended);
                        policy.sample(began);
                        assert!(policy.link.is_none_or(|link| link.is_finite() && link > 0.0), "{policy:?}");
                        policy.window = None;
                    }
                }
            }
        }
    }
}
