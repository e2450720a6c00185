"""This machine: what it is, whether it is quiet, its memory, and what processes use of it."""

import mmap
import os
import platform
import subprocess
import threading
import time

PAGE_BYTES = 4096


def environment(versions):
    """What a reader must know to judge the figures."""
    with open("/proc/cpuinfo") as cpus:
        info = [line.split(":", 1) for line in cpus if ":" in line]
    fields = {key.strip(): value.strip() for key, value in info}
    flags = set(fields.get("flags", "").split())
    kvm = "VMX" if "vmx" in flags else "SVM" if "svm" in flags else "software (no VMX or SVM)"
    with open("/proc/meminfo") as memory:
        total_kib = int(memory.readline().split()[1])
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as huge:
        huge_pages = huge.read().strip()
    return {"cpu": fields.get("model name"), "cpus": os.cpu_count(), "memory_gib": round(total_kib / 2**20, 1),
            "kernel": platform.release(), "kvm": kvm, "hypervisor": "hypervisor" in flags, "transparent_hugepages": huge_pages,
            "free_page_reporting": reporting(),
            "python": platform.python_version(), "versions": versions}


class Interference:
    """What others do on this machine: their CPU time, and CPU time that the hypervisor took."""

    # More than so much of all CPUs, and a run is marked.
    MOST_BUSY, MOST_STOLEN = 0.10, 0.02

    @staticmethod
    def times():
        with open("/proc/stat") as stat:
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
        return user + nice + system + irq + softirq, idle + iowait, steal

    @classmethod
    def between(cls, before, after):
        busy, idle, stolen = (b - a for a, b in zip(before, after))
        total = max(busy + idle + stolen, 1)
        return {"busy": busy / total, "stolen": stolen / total}

    @classmethod
    def now(cls, for_s=0.3):
        """To be asked while nothing of ours works."""
        before = cls.times()
        time.sleep(for_s)
        return {**cls.between(before, cls.times()), "load_average": os.getloadavg()[0]}

    @classmethod
    def is_quiet(cls, seen):
        return seen["busy"] <= cls.MOST_BUSY and seen["stolen"] <= cls.MOST_STOLEN

    @classmethod
    def wait_for_quiet(cls, patience_s):
        """The state of things when it became quiet, or when patience was over."""
        deadline = time.monotonic() + patience_s
        while True:
            seen = cls.now()
            if cls.is_quiet(seen) or time.monotonic() > deadline:
                return seen
            time.sleep(0.5)


class Warmth:
    """Memory that is touched, held, and freed just before somebody else takes it.

    On a machine that is a VM itself, its hypervisor takes free memory back, within a tenth of a second: whoever touches it next waits for
    it. What was freed last is handed out first. Small pages are freed all at once, which was seen to keep them warm. Huge
    ones, of which that is not true, are freed piece by piece, as the machine's free memory goes: there is always a little more of it than
    there was.
    """

    SAMPLE_BYTES = 16 << 20
    # If the sample takes more seconds a GiB, it was of no use: others have taken that memory, or the hypervisor has.
    MOST_AFTER = 0.5
    PIECE_BYTES = 32 << 20
    # So much more is free, which a destination takes in 50 ms.
    AHEAD_BYTES = 192 << 20

    def __init__(self, memory_bytes):
        self.pieces, self.first_touch, self.feeder, self.is_over = [], {}, None, threading.Event()
        times = []
        for _ in range(-(-(memory_bytes + self.AHEAD_BYTES) // self.PIECE_BYTES)):
            piece, time_taken = touched(self.PIECE_BYTES, mmap.MADV_HUGEPAGE)
            self.pieces.append(piece)
            times.append(time_taken)
        self.first_touch["huge"] = sum(times) / len(times)
        # Where both do not fit, huge ones: small ones can be made of them.
        self.small = None
        if free_bytes() > 2 * memory_bytes:
            self.small, self.first_touch["small"] = touched(memory_bytes, mmap.MADV_NOHUGEPAGE)

    def stop(self):
        """Frees no more."""
        self.is_over.set()
        if self.feeder:
            self.feeder.join()

    def drop(self):
        """Frees what is left of it."""
        self.stop()
        for memory in filter(None, [self.small, *self.pieces]):
            memory.close()
        self.small, self.pieces = None, []

    def release(self):
        """Frees it from now on; seconds a GiB that each kind took before, and that a sample of huge pages takes now."""
        if self.small:
            self.small.close()
            self.small = None
        self.feeder = threading.Thread(target=self.feed, args=(free_bytes("MemFree"),), daemon=True)
        self.pieces.pop().close()
        sample, self.first_touch["sample after"] = touched(self.SAMPLE_BYTES, mmap.MADV_HUGEPAGE)
        sample.close()
        self.feeder.start()
        return self.first_touch

    def feed(self, before):
        while self.pieces and not self.is_over.is_set():
            if free_bytes("MemFree") < before + self.AHEAD_BYTES:
                self.pieces.pop().close()
            else:
                time.sleep(0.001)


def touched(memory_bytes, advice):
    """So much memory, and how many seconds a GiB its first touch took."""
    pages = max(memory_bytes // PAGE_BYTES, 1)
    memory = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    begin = time.monotonic()
    memory[::PAGE_BYTES] = b"\1" * pages
    return memory, (time.monotonic() - begin) / (pages * PAGE_BYTES / 2**30)


def free_bytes(which="MemAvailable"):
    with open("/proc/meminfo") as memory:
        fields = dict(line.split(":") for line in memory)
    return int(fields[which].split()[0]) * 1024


def reporting():
    """How the kernel tells its hypervisor of free memory, by its settings and counters; empty where it does not."""
    folder = "/sys/module/page_reporting/parameters"
    found = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with open(os.path.join(folder, name)) as file:
            found[name] = file.read().strip()
    return found


def cpu_s(pid):
    """CPU time of a process, threads that have ended included. Raises OSError when it is gone."""
    return time.clock_gettime(~pid << 3 | 2)


def vcpu_s(pid):
    """CPU time of its vCPU threads, by their names."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/comm") as comm:
                name = comm.read().strip()
            if name.startswith("vcpu") or name.endswith("/KVM"):
                with open(f"/proc/{pid}/task/{task}/schedstat") as schedstat:
                    total += int(schedstat.read().split()[0])
        except OSError:
            pass  # it has just ended
    return total / 1e9


def status_kib(pid, field):
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1])
    return 0


def mappings(pid):
    """Size, resident and proportional KiB of each mapping. Neighbours that differ only in advice count as one."""
    with open(f"/proc/{pid}/smaps") as smaps:
        return parse_mappings(smaps)


def parse_mappings(lines):
    """The same from the lines of an smaps file."""
    found, last = [], None
    for line in lines:
        key, _, value = line.partition(":")
        if key in ("Rss", "Pss"):
            found[-1][1 if key == "Rss" else 2] += int(value.split()[0])
        elif key == "Size":
            found[-1][0] += int(value.split()[0])
        elif "-" in key.split()[0]:
            # START-END PERMISSIONS OFFSET DEVICE INODE PATH
            fields = line.split()
            start, end = fields[0].split("-")
            identity = (fields[1], fields[4], fields[5:])
            if last != (start, identity):
                found.append([0, 0, 0])
            last = (end, identity)
    return found


def memory_beyond_guest(pid, guest_bytes):
    """Proportional memory of a process without its guest's RAM, and the RAM that is resident; KiB."""
    # A guest's RAM is one mapping, or a few when address space has a hole in it; nothing else is as large.
    least = guest_bytes // 1024 // 4
    every = mappings(pid)
    guest = [(resident, proportional) for size, resident, proportional in every if size >= least and resident]
    return {"beyond_kib": sum(p for _, _, p in every) - sum(p for _, p in guest), "guest_kib": sum(r for r, _ in guest)}


class Meter:
    """CPU time and peak memory of the source's process during a move, of the destination's after it."""

    EVERY_S = 0.01

    def __init__(self, source_pid, destination_pid, guest_bytes):
        self.source, self.guest_bytes = source_pid, guest_bytes
        self.guest_kib = memory_beyond_guest(source_pid, guest_bytes)["guest_kib"]
        self.destination_before = (cpu_s(destination_pid), vcpu_s(destination_pid)) if destination_pid else (0.0, 0.0)
        self.before = self.last = (cpu_s(source_pid), vcpu_s(source_pid))
        self.peak_kib = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self):
        try:
            while not self.stopped.wait(self.EVERY_S):
                # What was read last before the process ends counts: at most EVERY_S is missed. Its vCPU threads may end before it.
                self.last = (cpu_s(self.source), max(self.last[1], vcpu_s(self.source)))
                self.peak_kib = status_kib(self.source, "VmHWM") or self.peak_kib
        except OSError:
            pass

    def finish(self, destination_pid):
        self.stopped.set()
        self.thread.join()
        cpu, vcpu = (after - before for before, after in zip(self.before, self.last))
        result = {"source": {"cpu_s": cpu - vcpu, "vcpu_s": vcpu, "peak_beyond_mib": (self.peak_kib - self.guest_kib) / 1024}}
        if destination_pid:
            cpu, vcpu = cpu_s(destination_pid) - self.destination_before[0], vcpu_s(destination_pid) - self.destination_before[1]
            peak = status_kib(destination_pid, "VmHWM")
            guest = memory_beyond_guest(destination_pid, self.guest_bytes)["guest_kib"]
            result["destination"] = {"cpu_s": cpu - vcpu, "vcpu_s": vcpu, "peak_beyond_mib": (peak - guest) / 1024}
        return result


def version(command):
    """The first line of what a program says of itself."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20)
        return (said.stdout or said.stderr).splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None
