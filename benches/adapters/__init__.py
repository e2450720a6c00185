"""The contestants. Another VMM is one more file here: a class with what `Contestant` names, and a line in `contestants`."""

import dataclasses


class ContestantError(Exception):
    """A contestant does not do what it should; its text is for people."""


@dataclasses.dataclass
class Move:
    """How a move ended, by the contestant's own account. Times in milliseconds."""

    outcome: str  # "completed", "gave up" (it says that it will not converge), "stopped" (it took too long), "failed"
    message: str = ""
    total_ms: float | None = None
    blackout_ms: float | None = None
    predicted_ms: float | None = None
    report: dict = dataclasses.field(default_factory=dict)  # all that it said


class Contestant:
    """A VMM with its settings. One guest at a time: `start`, `prepare`, `move`, `stop`; between `open` and `close`."""

    name = ""
    # What the settings are, for the table.
    what = ""

    def version(self):
        """Program and version, or None if it is not installed."""
        raise NotImplementedError

    def cannot(self, case):
        """Why a case cannot be measured with it; None if it can."""
        return None

    def open(self, network, directory):
        """Gets ready for a link: `network.set_link` was called before."""

    def start(self, guest, streams):
        """Boots the guest on host 0; its pages will go over so many connections, by default as many as the contestant takes."""
        raise NotImplementedError

    def prepare(self):
        """Makes the destination ready, as far as whoever moves VMs has to do that before; not part of a move's time."""

    def move(self, limit_s):
        """Moves the guest to host 1; a `Move`. One that takes longer than `limit_s` is stopped."""
        raise NotImplementedError

    def source_pid(self):
        raise NotImplementedError

    def destination_pid(self):
        """None if there is no process yet."""
        raise NotImplementedError

    def stop(self):
        """Ends the guest and what belongs to it, whatever state it is in."""

    def close(self):
        """Undoes `open`."""

    def run_command(self, guest, directory, tap):
        """The command that boots a guest with its console on standard output and its card on a TAP, for measuring starts."""
        raise NotImplementedError

    def idle_command(self, guest, directory, number):
        """The command that boots one of many guests, without a network, and the file that its console goes to."""
        raise NotImplementedError


def contestants(programs):
    """All of them, in the order in which tables show them."""
    from adapters.microvm import Microvm
    from adapters.qemu import Qemu

    return [
        Microvm(programs, "microvm", "its defaults, without TLS", 7437),
        Microvm(programs, "microvm-tls", "its defaults, between hosts that trust each other", 7447, is_trusted=True),
        Qemu(programs, "qemu", "its defaults, but for the cap of 128 MiB a second, which management tools lift as well"),
        Qemu(programs, "qemu-best", "multifd, zero pages found by its threads, downtime-limit 20 ms, the link's bandwidth known",
             is_best=True),
    ]
