//! The policy against simulated guests and links.

use super::*;

const MB: f64 = 1e6;

/// A guest with so much memory that dirties pages of a working set, and a link.
struct Run {
    ram: f64,
    working_set: f64,
    /// Bytes per second, by time.
    dirty_rate: fn(f64) -> f64,
    link: fn(f64) -> f64,
    rtt: f64,
    max_downtime: Duration,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            ram: 512.0 * MB,
            working_set: 512.0 * MB,
            dirty_rate: |_| 0.0,
            link: |_| 1000.0 * MB,
            rtt: 0.0002,
            max_downtime: Duration::from_millis(50),
        }
    }
}

/// How it went.
struct End {
    verdict: Verdict,
    /// When, in seconds.
    at: f64,
    rounds: u32,
    /// How long a blackout would really have been, in seconds.
    blackout: f64,
    /// All throttles, one after the other.
    throttles: Vec<u16>,
}

impl Run {
    fn play(&self, throttle: bool) -> End {
        let mut policy = Precopy::new(Convergence::default(), self.max_downtime, throttle);
        policy.costs.rtt = Duration::from_secs_f64(self.rtt);
        let (mut now, mut left) = (0.0f64, self.ram);
        let mut throttles = Vec::new();
        policy.begin(Duration::ZERO);
        for round in 1..2000 {
            let took = left / (self.link)(now) + self.rtt;
            // What of the working set is hit at least once while the round runs.
            let runs = 1.0 - f64::from(policy.throttle()) / 1000.0;
            let written = (self.dirty_rate)(now) * took * runs;
            let dirty = if self.working_set == 0.0 {
                0.0
            } else {
                self.working_set * (1.0 - (-written / self.working_set).exp())
            };
            policy.round_done(left as u64, Duration::from_secs_f64(took));
            now += took;
            left = dirty;
            match policy.decide(Duration::from_secs_f64(now), (dirty / 4096.0) as u64) {
                Verdict::Another => {}
                Verdict::Throttle(permille) => throttles.push(permille),
                verdict => {
                    let blackout = dirty / (self.link)(now) + policy.costs.total().as_secs_f64();
                    return End { verdict, at: now, rounds: round, blackout, throttles };
                }
            }
        }
        panic!("never ends");
    }

    /// By itself: the guest is not slowed down, although it could be.
    fn converges(&self) -> u32 {
        let end = self.switches_over();
        assert_eq!(end.throttles, [0; 0]);
        end.rounds
    }

    /// Only because the guest is slowed down. All throttles.
    fn converges_throttled(&self) -> Vec<u16> {
        assert!(matches!(self.play(false).verdict, Verdict::GiveUp(_)));
        let end = self.switches_over();
        assert!(!end.throttles.is_empty());
        assert!(end.throttles.is_sorted_by(|before, after| before < after), "{:?}", end.throttles);
        end.throttles
    }

    fn switches_over(&self) -> End {
        let end = self.play(true);
        let (now, rounds) = (end.at, end.rounds);
        assert_eq!(end.verdict, Verdict::Switchover, "at {now} s after {rounds} rounds, throttled {:?}", end.throttles);
        assert!(end.blackout <= self.max_downtime.as_secs_f64() * 1.2, "predicted within 20 %: {}", end.blackout);
        end
    }

    fn gives_up(&self) -> NotConverging {
        let End { verdict: Verdict::GiveUp(why), at, rounds, throttles, .. } = self.play(false) else {
            panic!("did not give up")
        };
        assert_eq!(throttles, [0; 0]);
        assert!(at < 30.0 && rounds < 200, "early: {at} s, {rounds} rounds");
        why
    }
}

#[test]
fn an_idle_guest_takes_one_round() {
    assert_eq!(Run::default().converges(), 1);
}

#[test]
fn below_the_bandwidth_converges() {
    let run = Run { dirty_rate: |_| 300.0 * MB, ..Run::default() };
    assert!(run.converges() <= 8);
    // Even close to it: each round is a little smaller.
    assert!(Run { dirty_rate: |_| 900.0 * MB, ..Run::default() }.converges() < 40);
}

#[test]
fn above_the_bandwidth_says_so_with_numbers() {
    let run = Run { dirty_rate: |_| 1200.0 * MB, link: |_| 400.0 * MB, working_set: 400.0 * MB, ..Run::default() };
    let why = run.gives_up();
    assert!(why.bandwidth > 380_000_000 && why.bandwidth < 420_000_000, "{why}");
    assert!(why.dirty_rate > 300_000_000, "{why}");
    let text = why.to_string();
    assert!(text.contains("MB/s and the link carries 400 MB/s") && text.contains("> 50 ms"), "{text}");
    assert!(why.hint().contains("--max-downtime"));
}

#[test]
fn a_small_working_set_converges_however_fast_it_is_written() {
    Run { dirty_rate: |_| 1e10, working_set: 30.0 * MB, ..Run::default() }.converges();
    let why = Run { dirty_rate: |_| 1e10, working_set: 100.0 * MB, ..Run::default() }.gives_up();
    assert!(why.predicted > Duration::from_millis(95) && why.predicted < Duration::from_millis(120), "{why}");
    // What the hint says would have worked.
    let enough = why.predicted.mul_f64(1.1);
    Run { dirty_rate: |_| 1e10, working_set: 100.0 * MB, max_downtime: enough, ..Run::default() }.converges();
}

#[test]
fn bursts_are_waited_for() {
    // Two seconds of too much, half a second of little.
    let rate = |now: f64| if now % 2.5 < 2.0 { 2e9 } else { 1e7 };
    Run { dirty_rate: rate, working_set: 300.0 * MB, ..Run::default() }.converges();
}

#[test]
fn a_link_that_becomes_slow_is_noticed() {
    let why =
        Run { dirty_rate: |_| 200.0 * MB, link: |now| if now < 0.4 { 1e9 } else { 1e8 }, ..Run::default() }.gives_up();
    assert!(why.bandwidth < 110_000_000, "{why}");
}

#[test]
fn a_downtime_below_the_fixed_costs_is_said_at_once() {
    // Slowing the guest down would not help, and is not tried.
    let end = Run { max_downtime: Duration::from_millis(2), ..Run::default() }.play(true);
    let Verdict::GiveUp(why) = end.verdict else { panic!() };
    assert_eq!((end.rounds, end.throttles), (1, vec![]));
    assert!(why.to_string().contains("a switchover alone takes"), "{why}");
}

#[test]
fn a_mostly_empty_machine_is_not_taken_for_a_slow_link() {
    // The first round is long because it looks at zero pages, not because the link is slow; the next ones are short.
    let mut policy = Precopy::new(Convergence::default(), Duration::from_millis(50), true);
    policy.costs.rtt = Duration::from_micros(200);
    policy.begin(Duration::ZERO);
    policy.round_done(10_000_000, Duration::from_secs(2));
    assert_eq!(policy.decide(Duration::from_secs(2), 100), Verdict::Another);
    policy.round_done(100 * 4256, Duration::from_micros(700));
    assert_eq!(policy.decide(Duration::from_millis(2001), 100), Verdict::Switchover);
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_no_more_than_it_takes() {
    let link: fn(f64) -> f64 = |_| 100.0 * MB;
    for (times, dirty_rate) in [(1.3, (|_| 130.0 * MB) as fn(f64) -> f64), (3.0, |_| 300.0 * MB), (8.0, |_| 800.0 * MB)]
    {
        // Each write hits another page: what it dirties is in proportion to the time that it has.
        let run = Run { ram: 1e8, working_set: 1e12, dirty_rate, link, ..Run::default() };
        let throttles = run.converges_throttled();
        let enough = 1000.0 * (1.0 - RATE_TOO_HIGH / times);
        let least = 1000.0 * (1.0 - THROTTLED_RATE / times);
        let last = f64::from(*throttles.last().unwrap());
        assert!(last >= enough && last <= least + 2.0, "{times} times the link: {throttles:?}");
        assert_eq!(throttles.len(), 1, "known at once: {throttles:?}");
    }
}

#[test]
fn a_guest_that_writes_the_same_pages_over_and_over_is_slowed_down_step_by_step() {
    let link: fn(f64) -> f64 = |_| 100.0 * MB;
    for working_set in [10.0 * MB, 64.0 * MB, 400.0 * MB] {
        let run = Run { dirty_rate: |_| 500.0 * MB, working_set, link, ..Run::default() };
        let throttles = run.converges_throttled();
        assert!(throttles.len() < 20 && throttles[0] < 350, "{throttles:?}");
        // Milder than what would do for pages that are never the same.
        assert!(*throttles.last().unwrap() < 900, "{throttles:?}");
    }
}

#[test]
fn a_guest_too_fast_for_any_throttle_is_given_up_in_the_end() {
    let run = Run { dirty_rate: |_| 1e12, working_set: 300.0 * MB, link: |_| 100.0 * MB, ..Run::default() };
    let End { verdict: Verdict::GiveUp(why), throttles, .. } = run.play(true) else { panic!() };
    assert_eq!((throttles.last(), why.throttle), (Some(&MAX_THROTTLE), MAX_THROTTLE));
    assert!(why.to_string().contains("(throttled to 1 %)"), "{why}");
    assert!(!why.hint().contains("--throttle"), "{}", why.hint());
    assert!(run.gives_up().hint().contains("--throttle auto"), "{}", run.gives_up().hint());
}

#[test]
fn the_second_round_tells_what_a_switchover_will_carry() {
    let mut policy = Precopy::new(Convergence::default(), Duration::from_millis(50), true);
    policy.costs.rtt = Duration::from_micros(200);
    policy.begin(Duration::ZERO);
    // Zero pages, and memory that the destination has never touched: it would fit, and nothing is known of the link yet.
    policy.round_done(64 << 20, Duration::from_millis(200));
    assert_eq!(policy.decide(Duration::from_millis(200), 1000), Verdict::Another);
    policy.round_done(1000 * PAGE_BYTES, Duration::from_micros(2200));
    assert_eq!(policy.bandwidth(), 2_048_000_000);
    // A round in which the guest was more in the way.
    policy.round_done(1000 * PAGE_BYTES, Duration::from_micros(6200));
    assert_eq!(policy.bandwidth(), 2_048_000_000);
    policy.round_done(1000 * PAGE_BYTES, Duration::from_micros(6200));
    assert!(policy.bandwidth() < 700_000_000, "slow twice is slow");
    assert_eq!(policy.decide(Duration::from_millis(220), 100), Verdict::Switchover);
}

#[test]
fn further_rounds_make_a_blackout_short_where_they_cost_little() {
    let costs = Costs { rtt: Duration::from_micros(200), ..Costs::default() }.total().as_secs_f64();
    for rate in [|_| 100.0 * MB, |_| 300.0 * MB, |_| 600.0 * MB] {
        let end = Run { ram: 4000.0 * MB, dirty_rate: rate, ..Run::default() }.switches_over();
        assert!(end.blackout < 2.0 * costs, "{} of which {costs} cannot be helped", end.blackout);
        // 4 s for all memory, then what was dirtied meanwhile (of 512 MB), ...
        assert!(end.at < 6.3 && end.rounds < 20, "{} s, {} rounds", end.at, end.rounds);
    }
    // A guest that is nearly as fast as the link: they would take long and help little.
    let end = Run { ram: 4000.0 * MB, dirty_rate: |_| 900.0 * MB, ..Run::default() }.switches_over();
    assert!(end.blackout > 0.04, "{}", end.blackout);
    // A small migration: a few milliseconds are much of it.
    let end =
        Run { ram: 20.0 * MB, working_set: 20.0 * MB, dirty_rate: |_| 500.0 * MB, ..Run::default() }.switches_over();
    assert!(end.rounds <= 3, "{}", end.rounds);
}

#[test]
fn there_is_time_while_a_switchover_is_out_of_reach_and_comes_nearer() {
    let ms = Duration::from_millis;
    let policy = || {
        let mut policy = Precopy::new(Convergence::default(), ms(50), true);
        policy.begin(Duration::ZERO);
        policy
    };
    // 1 GB/s.
    let mut idle = policy();
    assert!(idle.has_time(1 << 20), "nothing is known yet");
    idle.round_done(1_000_000_000, ms(1000));
    idle.decide(ms(1000), 30_000);
    assert!(idle.has_time(30_000) && !idle.has_time(10_000));
    // Dirties nearly as much as was sent: it is in a hurry, and stays so.
    let mut busy = policy();
    busy.round_done(1_000_000_000, ms(1000));
    busy.decide(ms(1000), 200_000);
    assert!(!busy.has_time(200_000));
    busy.round_done(820_000_000, ms(820));
    busy.decide(ms(1820), 30_000);
    assert!(!busy.has_time(30_000));
}

#[test]
fn rounds_are_capped() {
    let mut policy =
        Precopy::new(Convergence { max_rounds: 7, ..Convergence::default() }, Duration::from_millis(50), true);
    let mut verdict = Verdict::Another;
    for round in 1..=7u64 {
        assert_eq!(verdict, Verdict::Another);
        policy.round_done(1 << 20, Duration::from_millis(10));
        verdict = policy.decide(Duration::from_millis(round * 10), 100_000 - round * 9000);
    }
    assert!(matches!(verdict, Verdict::GiveUp(NotConverging { rounds: 7, .. })));
}

#[test]
fn hostile_numbers_do_not_overflow() {
    let mut policy = Precopy::new(Convergence::default(), Duration::from_millis(50), true);
    assert_eq!(policy.decide(Duration::ZERO, 0), Verdict::Another);
    policy.round_done(0, Duration::ZERO);
    assert!(policy.predict(1 << 32).is_some());
    policy.round_done(u64::MAX, Duration::ZERO);
    policy.decide(Duration::MAX, 1 << 32);
    assert!(policy.predict(1 << 32).is_some());
}
