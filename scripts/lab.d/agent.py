#!/usr/bin/env python3
"""Runs commands in the lab's hosts: `serve` inside a host, the other verbs outside (scripts/lab).

One TCP connection a command. Frames: a type byte, a length (4 bytes, big endian), the data.
  to the host     R request (JSON)   I piece of stdin   E end of stdin   S signal number
  from the host   O stdout  F stderr  A that piece of stdin is written  X exit status  T time (ns)
One piece of stdin is on its way at a time, so that the host always reads: a signal, or the end of
the connection, never waits behind a command that does not read. When the connection ends before
the command does, the command's process group is killed. What it left in the background stays.
"""

import argparse
import fcntl
import json
import os
import pty
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import tty

PORT = 7435
PIECE = 65536
LAB_FAILED = 255  # exit status, as ssh has it


class Frames:
    """Frames on a connection."""

    def __init__(self, connection):
        self.connection = connection
        self.buffer = bytearray()
        self.complete = []

    def send(self, kind, data=b""):
        self.connection.sendall(struct.pack("!cI", kind, len(data)) + data)

    def receive(self):
        """Reads once, and puts the frames that it ended into `complete`. False: the other side has gone."""
        try:
            data = self.connection.recv(PIECE)
        except OSError:
            return False
        self.buffer += data
        while len(self.buffer) >= 5:
            kind, length = struct.unpack_from("!cI", self.buffer)
            if len(self.buffer) < 5 + length:
                break
            self.complete.append((kind, bytes(self.buffer[5 : 5 + length])))
            del self.buffer[: 5 + length]
        return bool(data)

    def next(self):
        """The next frame; None when the other side has gone."""
        while not self.complete:
            if not self.receive():
                return None
        return self.complete.pop(0)


# --- inside a host ---


class Command:
    """A command that runs for a connection."""

    def __init__(self, frames, request):
        self.frames = frames
        self.pending = b""  # of its stdin
        self.stdin_ended = False
        argv = request["argv"]
        options = {"cwd": request["cwd"], "env": request["env"]}
        if request.get("tty"):
            ours, theirs = pty.openpty()
            rows, columns = request["tty"]
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            self.process = subprocess.Popen(
                ["setsid", "-cw", *argv], stdin=theirs, stdout=theirs, stderr=theirs, **options
            )
            os.close(theirs)
            self.stdin = ours
            self.outputs = {ours: b"O"}
        else:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, bufsize=0, **options
            )
            self.stdin = self.process.stdin.fileno()
            self.outputs = {self.process.stdout.fileno(): b"O", self.process.stderr.fileno(): b"F"}
        for fd in (self.stdin, *self.outputs):
            os.set_blocking(fd, False)
        self.exited = os.pidfd_open(self.process.pid)

    def forward(self, fd):
        """Passes on some output. False when there is no more for now."""
        try:
            data = os.read(fd, PIECE)
        except BlockingIOError:
            return False
        except OSError:  # a terminal that was hung up
            data = b""
        if data:
            self.frames.send(self.outputs[fd], data)
            return True
        del self.outputs[fd]
        return False

    def write_stdin(self):
        try:
            written = os.write(self.stdin, self.pending)
        except BlockingIOError:
            return
        except OSError:  # it does not read any more
            written = len(self.pending)
        self.pending = self.pending[written:]
        if not self.pending:
            self.frames.send(b"A")
            self.close_stdin_if_ended()

    def close_stdin_if_ended(self):
        if self.stdin_ended and not self.pending and self.process.stdin:
            self.process.stdin.close()

    def handle(self, kind, data):
        if kind == b"I":
            self.pending = data
        elif kind == b"E":
            self.stdin_ended = True
            self.close_stdin_if_ended()
        elif kind == b"S":
            self.kill(struct.unpack("!B", data)[0])

    def kill(self, number):
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def run(self):
        """Until the command has ended; its exit status."""
        connection = self.frames.connection.fileno()
        while True:
            while self.frames.complete:
                self.handle(*self.frames.complete.pop(0))
            poll = select.poll()
            for fd in (connection, self.exited, *self.outputs):
                poll.register(fd, select.POLLIN)
            if self.pending:
                poll.register(self.stdin, select.POLLOUT | (select.POLLIN if self.stdin in self.outputs else 0))
            ready = [fd for fd, _ in poll.poll()]
            for fd in list(self.outputs):
                if fd in ready:
                    self.forward(fd)
            if self.pending and self.stdin in ready:
                self.write_stdin()
            if connection in ready and not self.frames.receive():
                raise ConnectionError("the caller has gone")
            if self.exited in ready:
                # All it wrote is in the pipes by now. Others may hold them open, and write on.
                for fd in list(self.outputs):
                    for _ in range(64):
                        if not self.forward(fd):
                            break
                status = self.process.wait()
                return status if status >= 0 else 128 - status

    def close(self):
        """Ends the command if it still runs."""
        if self.process.poll() is None:
            self.kill(signal.SIGTERM)
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                self.kill(signal.SIGKILL)
                self.process.wait()
        os.close(self.exited)
        for file in (self.process.stdin, self.process.stdout, self.process.stderr):
            if file:
                file.close()
        if not self.process.stdout:
            os.close(self.stdin)


def serve_command(frames, request):
    try:
        command = Command(frames, request)
    except OSError as error:
        name = request["argv"][0] if error.filename in (None, request["argv"][0]) else error.filename
        frames.send(b"F", f"{name}: {error.strerror}\n".encode())
        frames.send(b"X", struct.pack("!B", 127 if isinstance(error, FileNotFoundError) else 126))
        return
    try:
        frames.send(b"X", struct.pack("!B", command.run()))
    except OSError:
        pass
    finally:
        command.close()


def serve_connection(connection):
    with connection:
        set_keepalive(connection)
        frames = Frames(connection)
        try:
            while (frame := frames.next()) is not None:
                request = json.loads(frame[1])
                if "argv" in request:
                    serve_command(frames, request)
                    return
                if "step_ns" in request:
                    now = time.clock_gettime_ns(time.CLOCK_REALTIME) + request["step_ns"]
                    time.clock_settime_ns(time.CLOCK_REALTIME, now)
                frames.send(b"T", struct.pack("!q", time.clock_gettime_ns(time.CLOCK_REALTIME)))
        except OSError:
            pass


def set_keepalive(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)


def serve(args):
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1048576))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Whoever is on another network of this host, a guest for one, has no business here.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, args.interface.encode())
        listener.bind((args.address, PORT))
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve_connection, args=(connection,), daemon=True).start()


# --- outside ---


def connect(address, timeout=10):
    connection = socket.create_connection((address, PORT), timeout=timeout)
    connection.settimeout(None)
    set_keepalive(connection)
    return Frames(connection)


def watch_process(pid):
    """A descriptor that is readable once the process has ended; None if it has already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


class Terminal:
    """Our terminal, raw while the command has one."""

    def __enter__(self):
        self.before = termios.tcgetattr(0)
        tty.setraw(0, termios.TCSADRAIN)

    def __exit__(self, *_):
        termios.tcsetattr(0, termios.TCSADRAIN, self.before)


def write_all(fd, data):
    while data:
        data = data[os.write(fd, data) :]


def command_loop(frames, host_ended, stdin):
    """Passes everything to and fro; the exit status."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)
    signals = 0
    may_send = True
    connection = frames.connection.fileno()
    while True:
        poll = select.poll()
        for fd in (connection, host_ended, wake_read):
            poll.register(fd, select.POLLIN)
        if stdin is not None and may_send:
            poll.register(stdin, select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        if connection in ready:
            alive = frames.receive()
            while frames.complete:
                kind, data = frames.complete.pop(0)
                if kind == b"O":
                    write_all(1, data)
                elif kind == b"F":
                    write_all(2, data)
                elif kind == b"A":
                    may_send = True
                elif kind == b"X":
                    return data[0]
            if not alive:
                return lost("the connection to it is lost")
        elif host_ended in ready:
            return lost("it has stopped")
        if wake_read in ready:
            for number in os.read(wake_read, 64):
                signals += 1
                if signals > 3:
                    return 128 + number
                frames.send(b"S", struct.pack("!B", number))
        if stdin in ready:
            try:
                data = os.read(stdin, PIECE)
            except OSError:
                data = b""
            if data:
                frames.send(b"I", data)
                may_send = False
            else:
                frames.send(b"E")
                stdin = None


def lost(why):
    print(f"lab: no answer from the host: {why}", file=sys.stderr)
    return LAB_FAILED


def run(args):
    if args.tty and not os.isatty(0):
        print("lab: there is no terminal here to give to the command", file=sys.stderr)
        return 2
    host_ended = watch_process(args.pid)
    if host_ended is None:
        return lost("it is not running")
    try:
        frames = connect(args.address)
    except OSError as error:
        return lost(error.strerror or error)
    request = {"argv": args.command, "cwd": args.cwd, "env": dict(pair.split("=", 1) for pair in args.env)}
    try:
        if args.tty:
            size = os.get_terminal_size(0)
            request["tty"] = [size.lines, size.columns]
            frames.send(b"R", json.dumps(request).encode())
            with Terminal():
                return command_loop(frames, host_ended, 0)
        frames.send(b"R", json.dumps(request).encode())
        if args.no_stdin:
            frames.send(b"E")
        return command_loop(frames, host_ended, None if args.no_stdin else 0)
    except BrokenPipeError:  # nobody reads what we print
        return 128 + signal.SIGPIPE
    except ConnectionError:
        return lost("the connection to it is lost")


def wait(args):
    """Until all hosts answer, or one has ended, or the time is up."""
    deadline = time.monotonic() + args.timeout
    for host in args.hosts:
        address, pid = host.split("=")
        host_ended = watch_process(int(pid))
        while True:
            if host_ended is None or select.select([host_ended], [], [], 0)[0]:
                print(f"lab: {address} has stopped", file=sys.stderr)
                return 1
            try:
                connect(address, timeout=1).connection.close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    print(f"lab: {address} does not answer", file=sys.stderr)
                    return 1
                time.sleep(0.05)
    return 0


def clock_offset(frames, step_ns=None):
    """How much to add to the host's clock, and how wrong that may be (ns)."""
    best = None
    for _ in range(20):
        before = time.clock_gettime_ns(time.CLOCK_REALTIME)
        frames.send(b"R", json.dumps({} if step_ns is None else {"step_ns": step_ns}).encode())
        frame = frames.next()
        after = time.clock_gettime_ns(time.CLOCK_REALTIME)
        if frame is None:
            raise ConnectionError("the host has gone")
        theirs = struct.unpack("!q", frame[1])[0]
        measured = ((before + after) // 2 - theirs, (after - before) // 2)
        if best is None or measured[1] < best[1]:
            best = measured
        if step_ns is not None:
            break
    return best


def clock(args):
    for address in args.addresses:
        frames = connect(address)
        offset, error = clock_offset(frames)
        if args.set:
            clock_offset(frames, step_ns=offset)
            offset, error = clock_offset(frames)
        print(f"{address} {offset / 1e6:.3f} {error / 1e6:.3f}")
    return 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)

    verb = verbs.add_parser("serve", help="serve commands at ADDRESS on INTERFACE, forever")
    verb.add_argument("interface")
    verb.add_argument("address")
    verb.set_defaults(run=serve)

    verb = verbs.add_parser("run", help="run a command in a host; exits as the command does")
    verb.add_argument("--tty", action="store_true", help="with a terminal")
    verb.add_argument("--no-stdin", action="store_true")
    verb.add_argument("--pid", type=int, required=True, help="the process that is the host")
    verb.add_argument("--cwd", default="/")
    verb.add_argument("--env", metavar="NAME=VALUE", action="append", default=[])
    verb.add_argument("address")
    verb.add_argument("command", nargs=argparse.REMAINDER)
    verb.set_defaults(run=run)

    verb = verbs.add_parser("wait", help="wait until all hosts answer")
    verb.add_argument("--timeout", type=float, default=120)
    verb.add_argument("hosts", nargs="+", metavar="ADDRESS=PID")
    verb.set_defaults(run=wait)

    verb = verbs.add_parser("clock", help="print how far hosts' clocks are behind, and the error (ms)")
    verb.add_argument("--set", action="store_true", help="set them first")
    verb.add_argument("addresses", nargs="+")
    verb.set_defaults(run=clock)

    args = parser.parse_args()
    try:
        sys.exit(args.run(args))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except ConnectionError as error:
        sys.exit(lost(error.strerror or error))


if __name__ == "__main__":
    main()
