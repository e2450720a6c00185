"""What is measured: cases, and which of them the short grid has."""

import dataclasses

from guests import Guest
from network import LINKS


@dataclasses.dataclass(frozen=True)
class Case:
    """A guest, a link, and how pages travel, by default as each contestant does. `load` is the guest's dirty rate as a share of what the link carries."""

    name: str
    guest: Guest = Guest()
    link: str = "loopback"
    load: float = 0.0
    streams: int | None = None
    is_short: bool = False

    def with_rate(self, link_bytes_per_s):
        """The guest with its rate in bytes a second."""
        return dataclasses.replace(self.guest, rate=int(self.load * link_bytes_per_s))


def sized(memory, fill_percent=50, working_set_percent=10, **more):
    """A guest by shares of its memory."""
    return Guest(memory=memory, fill=memory * fill_percent // 100, working_set=max(memory * working_set_percent // 100, 1), **more)


def grid():
    """All cases. Not the product of all axes, which would take weeks: one axis at a time around a middle, and load by link."""
    short = {"is_short": True}
    cases = [
        Case("idle, 256 MiB", sized(256), **short),
        Case("idle, 1 GiB", sized(1024), **short),
        Case("idle, 1 GiB, half of it written with zeros", Guest(memory=1024, fill=512, zero=480), **short),
        Case("idle, 4 GiB, 10 % non-zero", sized(4096, 10), **short),
        Case("load 30 %, 1 GiB", sized(1024), load=0.3, **short),
        Case("load 50 %, 1 GiB", sized(1024), load=0.5, **short),
        Case("1 Gb/s, load 50 %, 256 MiB", sized(256), link="1gbit", load=0.5, **short),
        Case("1 GiB of zeros", sized(1024, 100, content="zero"), **short),
    ]
    for memory in (1024, 4096, 8192):
        for fill in (10, 50, 100):
            is_short = (memory, fill) == (1024, 100)
            cases.append(Case(f"idle, {memory // 1024} GiB, {fill} % non-zero", sized(memory, fill), is_short=is_short))
    cases += [Case(f"load 10 %, working set {share} %", sized(1024, 50, share), load=0.1) for share in (1, 10, 50)]
    cases += [Case(f"load {load * 100:.0f} %, 1 GiB", sized(1024), load=load) for load in (0.1, 1.0, 2.0)]
    cases += [Case(f"load 10 %, {pattern} writes", sized(1024, pattern=pattern), load=0.1) for pattern in ("seq", "sparse")]
    for link in LINKS:
        # Small on a slow link: else hours pass.
        memory = {"100mbit": 128, "1gbit": 512}.get(link, 1024)
        cases += [Case(f"{link}, {content} content", sized(memory, content=content), link=link)
                  for content in ("random", "text", "binary", "zero")]
        cases += [Case(f"{link}, load {load * 100:.0f} %", sized(memory), link=link, load=load)
                  for load in (0.0, 0.1, 0.5, 1.0, 2.0) if link != "loopback"]
    cases += [Case(f"{streams} streams, 1 GiB, all non-zero", sized(1024, 100), streams=streams, is_short=streams == 1) for streams in (1, 2, 4)]
    cases += [Case("2 vCPUs, load 10 %", sized(1024, cpus=2), load=0.1)]
    names = [case.name for case in cases]
    return [case for number, case in enumerate(cases) if case.name not in names[:number]]
