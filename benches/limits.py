"""What this machine carries at most, for the ratios: memory bandwidth, and one TCP stream over each link."""

import json
import subprocess
import time

MIB = 1 << 20


def best_of(times, measure):
    return max(measure() for _ in range(times))


def memory_bandwidth(size=256 * MIB):
    """Bytes a second that one core reads (comparing two equal buffers) and copies (memcpy; the bytes copied, not read plus written)."""
    first, second = bytearray(size), bytearray(size)
    first[::4096] = second[::4096] = b"\1" * (size // 4096)

    def copy():
        begin = time.monotonic()
        second[:] = first
        return size / (time.monotonic() - begin)

    def read():
        begin = time.monotonic()
        is_same = first == second
        took = time.monotonic() - begin
        return 2 * size / took if is_same else 0.0

    return {"copy_bytes_per_s": best_of(3, copy), "read_bytes_per_s": best_of(3, read)}


def iperf3(network, seconds=2):
    """Bytes a second of one TCP stream from host 0 to host 1, as they arrive."""
    address, port = network.address(1), "7599"
    server = subprocess.Popen(network.on_host(1, "iperf3", "-s", "-1", "-p", port, "-B", address),
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.3)
        command = network.on_host(0, "iperf3", "-c", address, "-p", port, "-t", seconds, "-J")
        said = subprocess.run(command, check=True, capture_output=True, timeout=seconds + 30)
        server.wait(10)
        return json.loads(said.stdout)["end"]["sum_received"]["bits_per_second"] / 8
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
