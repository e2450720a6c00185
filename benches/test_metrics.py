#!/usr/bin/env python3
"""Tests of what the benchmark computes: on answers made up with known holes, and on a recorded move.

    benches/test_metrics.py [NAME…]        parts of test names; the last line is like that of Rust's tests
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest

import cases
import machine
import metrics
import pictures
import report
from guests import Guest
from metrics import MS, Answer

HERE = os.path.dirname(os.path.realpath(__file__))
RECORDED = os.path.join(HERE, "testdata", "move.txt")
START = 10_000 * MS


def answers(until_ms, away=(), slow=(), hidden_ms=0, pages_a_ms=10):
    """One a millisecond, 0.1 ms after its question. `away`: (from, to) without a guest; `slow`: (from, to) at half its pace."""
    found, written, taken, last, asked = [], 0.0, 0, 0, None
    for ms in range(until_ms):
        asked = START + ms * MS if asked is None else asked
        if any(a <= ms < b for a, b in away):
            if any(ms == b - 1 for _, b in away):
                taken = hidden_ms
            continue
        hole = ms - last if found else 1
        hole -= taken if hole > 1 and taken else 0
        last = ms
        written += pages_a_ms * (0.5 if any(a <= ms < b for a, b in slow) else 1)
        came = START + ms * MS + MS // 10
        found.append(Answer(asked, came, 5_000 * MS + (ms - taken) * MS, 0, int(written), 0, 0, hole * MS, 1))
        asked = None
    return found


def seen(found, begin_ms, end_ms, **more):
    return metrics.seen(found, START + begin_ms * MS, START + end_ms * MS, **more)


class OfAnswers(unittest.TestCase):
    def test_a_guest_that_is_never_away_shows_nothing(self):
        s = seen(answers(2000), 1000, 1200)
        for name in ("network_gap_ms", "network_noise_ms", "stall_ms"):
            self.assertAlmostEqual(s[name], 0.1, msg=f"{name}: the way there and back")
        self.assertAlmostEqual(s["brownout_percent"], 0, delta=0.1)
        self.assertAlmostEqual(s["rate_pages_per_s"], 10_000, delta=1)

    def test_a_blackout_is_its_length_and_its_place(self):
        s = seen(answers(2000, away=[(1100, 1120)]), 1000, 1200)
        self.assertAlmostEqual(s["network_gap_ms"], 20.1)
        self.assertAlmostEqual(s["blackout_begins_ms"], 100, places=3)
        self.assertAlmostEqual(s["guest_blackout_ms"], 21)  # from its last turn to its next
        self.assertAlmostEqual(s["hidden_ms"], 0)

    def test_time_taken_out_of_the_guests_clock_counts_as_blackout(self):
        s = seen(answers(2000, away=[(1100, 1120)], hidden_ms=15), 1000, 1200)
        self.assertAlmostEqual(s["hidden_ms"], 15)
        self.assertAlmostEqual(s["guest_hole_ms"], 6)
        self.assertAlmostEqual(s["guest_blackout_ms"], 21)

    def test_the_hole_may_come_with_a_later_answer(self):
        found = answers(2000, away=[(1100, 1120)])
        first = next(n for n, answer in enumerate(found) if answer.hole_ns > 20 * MS)
        found[first], found[first + 3] = found[first]._replace(hole_ns=MS), found[first + 3]._replace(hole_ns=21 * MS)
        s = seen(found, 1000, 1200)
        self.assertAlmostEqual(s["guest_blackout_ms"], 21)
        self.assertAlmostEqual(s["hole_outside_ms"], 1)

    def test_the_longest_stall_is_not_the_blackout(self):
        s = seen(answers(2000, away=[(1050, 1055), (1100, 1120)]), 1000, 1200)
        self.assertAlmostEqual(s["network_gap_ms"], 20.1)
        self.assertAlmostEqual(s["stall_ms"], 5.1)
        self.assertAlmostEqual(s["hole_outside_ms"], 6)

    def test_what_was_before_the_move_is_noise(self):
        s = seen(answers(2000, away=[(800, 809), (1100, 1120)]), 1000, 1200)
        self.assertAlmostEqual(s["network_noise_ms"], 9.1)
        self.assertAlmostEqual(s["stall_ms"], 0.1)

    def test_a_probe_that_asks_late_makes_no_silence(self):
        found = [answer for answer in answers(2000) if not START + 1100 * MS <= answer.asked < START + 1130 * MS]
        self.assertAlmostEqual(seen(found, 1000, 1200)["network_gap_ms"], 0.1)

    def test_questions_that_are_answered_together_waited_once(self):
        found = answers(2000)
        for n in range(1100, 1120):
            found[n] = found[n]._replace(came=START + 1120 * MS + (n - 1100) * 1000)
        s = seen(found, 1000, 1200)
        self.assertAlmostEqual(s["network_gap_ms"], 20, delta=0.01)
        self.assertLess(s["stall_ms"], 0.2)

    def test_lost_work_is_told_apart_from_the_blackout(self):
        s = seen(answers(3000, away=[(1300, 1320)], slow=[(1000, 1200)]), 1000, 1400)
        self.assertAlmostEqual(s["lost_ms"], 120, delta=2)
        self.assertAlmostEqual(s["lost_outside_ms"], 100, delta=3)
        self.assertAlmostEqual(s["brownout_percent"], 100 * 100 / 380, delta=1)

    def test_a_guest_without_a_load_loses_no_work(self):
        s = seen(answers(2000, away=[(1100, 1120)], pages_a_ms=0), 1000, 1200)
        self.assertIsNone(s["brownout_percent"])

    def test_a_guest_that_stays_silent_or_was_never_heard_has_no_figures(self):
        self.assertIsNone(seen(answers(900), 1000, 1200))
        self.assertIsNone(seen([], 1000, 1200))

    def test_the_curve_is_what_was_written(self):
        points = metrics.curve(answers(2000, away=[(1100, 1120)]), START + 1000 * MS, START + 1200 * MS, 10 * MS, 100 * MS, 100 * MS)
        self.assertEqual(len(points), 40)
        self.assertAlmostEqual(dict(map(tuple, points))[55.0], 10_000, delta=10)
        self.assertLess(min(rate for _, rate in points), 600)

    def test_a_recorded_move(self):
        with open(RECORDED) as file:
            head = json.loads(file.readline())
            found = metrics.parse(file)
        s = metrics.seen(found, head["begin"], head["end"])
        for name, value in head["seen"].items():
            self.assertAlmostEqual(s[name], value, places=3, msg=name)


class OfNumbers(unittest.TestCase):
    def test_spread(self):
        self.assertEqual(metrics.spread([3, None, 1, 2]), {"median": 2, "min": 1, "max": 3, "n": 3})
        self.assertIsNone(metrics.spread([None]))

    def test_predictions(self):
        self.assertTrue(metrics.is_predicted(13, 10) and metrics.is_predicted(1.4, 0.5) and metrics.is_predicted(7, 10))
        self.assertFalse(metrics.is_predicted(13.1, 10) or metrics.is_predicted(6.9, 10))

    def test_growth_is_a_slope(self):
        self.assertAlmostEqual(metrics.growth_ms_per_gib([(1, 2.1), (4, 2.4), (8, 2.8)]), 0.1)
        self.assertIsNone(metrics.growth_ms_per_gib([(1, 2.1), (1, 2.4)]))


class OfProcesses(unittest.TestCase):
    def test_mappings_that_were_split_by_advice_are_one(self):
        def mapping(span, resident, inode=0, path=""):
            head = f"{span} rw-p 00000000 00:00 {inode} {path}\n"
            return head + f"Size: 1024 kB\nRss: {resident} kB\nPss: {resident} kB\nAnonHugePages: 0 kB\nVmFlags: rd wr mr\n"

        text = mapping("1000-2000", 10) + mapping("2000-3000", 20) + mapping("3000-4000", 30, 7, "/lib") + mapping("5000-6000", 40)
        self.assertEqual(machine.parse_mappings(text.splitlines()), [[2048, 30, 30], [1024, 30, 30], [1024, 40, 40]])


class OfWarmth(unittest.TestCase):
    def test_it_is_fed_while_free_memory_is_short_and_freed_in_the_end_whatever_happened(self):
        class Small(machine.Warmth):
            PIECE_BYTES, AHEAD_BYTES, SAMPLE_BYTES = 2 << 20, 0, 2 << 20

        fed, never_released, stopped = (Small(4 << 20) for _ in range(3))
        held = [memory for warmth in (fed, never_released, stopped) for memory in (warmth.small, *warmth.pieces)]
        # As if somebody took all that is freed, and as if nobody took any.
        fed.AHEAD_BYTES, stopped.AHEAD_BYTES = 1 << 60, -(1 << 60)
        fed.release()
        fed.feeder.join(10)
        self.assertFalse(fed.feeder.is_alive() or fed.pieces)
        stopped.release()
        stopped.stop()
        self.assertEqual(len(stopped.pieces), 1)
        for warmth in (fed, never_released, stopped):
            warmth.drop()
        self.assertEqual(len(held), 9)
        self.assertTrue(all(memory.closed for memory in held))


class OfCases(unittest.TestCase):
    def test_every_name_is_its_own_and_every_guest_fits(self):
        every = cases.grid()
        self.assertEqual(len({case.name for case in every}), len(every))
        for case in every:
            self.assertLessEqual(case.guest.touched_bytes(), case.guest.memory << 20, case.name)
            self.assertIn(case.link, cases.LINKS)

    def test_a_guest_never_asks_for_more_than_it_has(self):
        words = dict(word.split("=", 1) for word in Guest(memory=256, fill=256, zero=100, working_set=300).cmdline().split())
        sizes = [int(words[key][:-1]) for key in ("ws", "fill", "zero")]
        self.assertLessEqual(sizes[0], sizes[1])
        self.assertLess(sizes[1] + sizes[2], 256)


class OfReports(unittest.TestCase):
    def run_of(self, contestant, number, silence, is_disturbed=False, outcome="completed"):
        used = {side: {"cpu_s": 1.0, "vcpu_s": 0.5, "peak_beyond_mib": 8.0} for side in ("source", "destination")}
        there = {"guest": {"memory": 1024}, "bytes_on_wire": 2**29, "nonzero_bytes": 2**29, "total_ms": 100.0, "blackout_ms": silence,
                 "predicted_ms": silence, "used": used, "errors": 0, "iperf3_bytes_per_s": 1e10, "curve": [[0, 10], [10, 5]],
                 "command_ms": 110.0, "report": {"blackout": {"save": 0.2}, "rounds": [{"zero_pages": 0, "ms": 1.0, "bytes_sent": 2**29}]},
                 "seen": {name: 1.0 for name in ("stall_ms", "hole_outside_ms", "lost_ms", "brownout_percent", "network_noise_ms")}
                 | {"network_gap_ms": silence, "guest_blackout_ms": silence}}
        run = {"kind": "move", "case": "idle, 1 GiB", "contestant": contestant, "number": number, "is_disturbed": is_disturbed,
               "outcome": outcome}
        return run | there if outcome == "completed" else run

    def written(self, runs):
        directory = tempfile.mkdtemp()
        self.addCleanup(subprocess.run, ["rm", "-r", directory])
        with open(os.path.join(directory, "runs.jsonl"), "w") as file:
            file.writelines(json.dumps(run) + "\n" for run in runs)
        environment = {"cpu": "a CPU", "cpus": 2, "kvm": "software", "kernel": "6", "memory": {"read_bytes_per_s": 1e10},
                       "versions": {"iperf3": "3", "microvm": "0", "qemu": "10"}, "settings": {"microvm": "", "qemu": ""}}
        with open(os.path.join(directory, "environment.json"), "w") as file:
            json.dump(environment, file)
        with open(report.write(directory)) as file:
            return directory, file.read()

    def test_ratios_of_medians_and_unmet_targets_are_shown(self):
        runs = [self.run_of(name, n, ms) for name, times in (("microvm", (1, 9, 3)), ("qemu", (4, 4, 400))) for n, ms in enumerate(times)]
        directory, text = self.written(runs)
        self.assertIn("| idle, 1 GiB | 3.00 | 4.00 | 0.75 |", text)
        self.assertIn("| blackout of an idle guest, ms | 3.00 | ≤ 1 | **no** |", text)
        self.assertIn("| blackout at a load of half the link ÷ QEMU's | – | ≤ 0.25 | not measured |", text)
        for name in ("blackout.svg", "total.svg", "brownout.svg"):
            with open(os.path.join(directory, name)) as file:
                self.assertIn("</svg>", file.read())

    def test_disturbed_runs_do_not_count_where_there_are_others(self):
        good = [self.run_of("microvm", n, 2) for n in range(3)]
        _, text = self.written(good + [self.run_of("microvm", 3, 100, is_disturbed=True)])
        self.assertIn("2.00 (2.00 to 2.00)", text)
        _, text = self.written(good[:2] + [self.run_of("microvm", 3, 100, is_disturbed=True)])
        self.assertIn("2.00 (2.00 to 100)", text)
        self.assertIn("| 3* |", text)

    def test_runs_that_did_not_complete_are_counted(self):
        _, text = self.written([self.run_of("microvm", n, 2) for n in range(2)] + [self.run_of("microvm", 2, 0, outcome="gave up")])
        self.assertIn("3 (1 gave up)", text)

    def test_a_case_that_nobody_completed_is_drawn_as_such(self):
        self.assertIn("no move completed", pictures.dots("t", "w", ["c"], ["a"], lambda case, name: []))


if __name__ == "__main__":
    patterns = [argument for name in sys.argv[1:] for argument in ("-k", name)]
    program = unittest.main(argv=[sys.argv[0], *patterns], exit=False, verbosity=2)
    bad = len(program.result.failures) + len(program.result.errors)
    ran = program.result.testsRun
    print(f"test result: {'FAILED' if bad else 'ok'}. {ran - bad} passed; {bad} failed; 0 ignored; 0 measured; 0 filtered out")
    sys.exit(1 if bad else 0)
