"""Start scripts without the seconds that a fresh Python takes to import torch.

A server process has imported what every script imports, and has computed nothing. For each script
it forks: the child takes the given environment, arguments, stdout and stderr, and runs the file as
`python FILE` does, in a session of its own. It imports the project itself. Under torchrun only the
start of a rank is another one: the launcher forks instead of starting Python.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import io
import json
import math
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run"]


# --- the tests' side


class Forked:
    """A script that runs in a fork of the server: what the tests use of subprocess.Popen.

    command: as for Popen, [Python, FILE, ...] or [Python, "-m", "torch.distributed.run", ...].
    stderr: subprocess.PIPE, or subprocess.STDOUT to join it with stdout.
    """

    def __init__(self, command, environment, stderr=subprocess.PIPE):
        self.args = command
        self.returncode = None
        self._readers = []
        self._printed = {}
        status, told = os.pipe()
        self._status = io.FileIO(status)  # unbuffered: select sees what is not yet read
        written = [told, self._read("stdout")]
        written.append(self._read("stderr") if stderr == subprocess.PIPE else written[-1])
        request = json.dumps([command[1:], environment]).encode()
        socket.send_fds(server()[0], [request], written)
        for file in set(written):
            os.close(file)
        line = self._status.readline()
        assert line, "the server has ended"
        self.pid = int(line)

    def _read(self, name):
        """Read all that the script prints into a new pipe, beside the test -> its other end."""
        end, written = os.pipe()

        def read():
            with open(end) as file:
                self._printed[name] = file.read()

        self._readers.append(threading.Thread(target=read, daemon=True))
        self._readers[-1].start()
        return written

    def poll(self):
        return self._end(0)

    def _end(self, timeout):
        """Return the exit code, negative for a signal; None if there is no end within seconds."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def wait(self, timeout=None):
        if self._end(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Wait until nobody can print any more, and for the end -> stdout, stderr or None."""
        until = time.monotonic() + timeout if timeout else None
        for reader in self._readers:
            reader.join(max(0, until - time.monotonic()) if until else None)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(max(0, until - time.monotonic()) if until else None)
        return self._printed["stdout"], self._printed.get("stderr")

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.cache
def server():
    """Start the server -> our end of the socket to it, its process. It ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    # a session of its own: Ctrl-C is for the tests
    process = subprocess.Popen(command, stdin=theirs, env=environment, start_new_session=True)
    theirs.close()
    return ours, process


# --- the server's side


def serve():
    """Start what is asked for, and tell how it ends. Returns in the child: the command to run."""
    control = socket.socket(fileno=os.dup(0))
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running = {}  # process: the file to tell its end
    while True:
        ready, _, _ = select.select([control, ended], [], [])
        if ended in ready:
            os.read(ended, 1000)
            for pid in list(running):
                if (code := exit_code(pid)) is not None:
                    tell(running[pid], code)
                    os.close(running.pop(pid))
        if control in ready:
            request, files, *_ = socket.recv_fds(control, 2**20, 3)
            if not request:
                os._exit(0)
            command, environment = json.loads(request)
            pid = os.fork()
            if pid == 0:
                become(environment, files[1:])
                return command
            running[pid] = files[0]
            tell(files[0], pid)
            for file in files[1:]:
                os.close(file)


def exit_code(pid):
    """Return the exit code of a child, negative for a signal; None if it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def tell(file, number):
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(file, f"{number}\n".encode())


def become(environment, printed=(), is_buffered=True):
    """Make the forked process one that has just been started.

    printed: stdout and stderr; by default those that it has.
    """
    os.setsid()
    for number, file in enumerate(printed, 1):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(environment)
    is_buffered = is_buffered and not environment.get("PYTHONUNBUFFERED")
    sys.stdout = text_file(1, sys.stdout, is_buffered)
    sys.stderr = text_file(2, sys.stderr, is_buffered, line_buffering=is_buffered)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if environment.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()


def text_file(number, like, is_buffered, line_buffering=False):
    """Return stdout or stderr as Python opens it, `like` another's; unbuffered: as python -u."""
    file = io.FileIO(number, "w", closefd=False)
    file = io.BufferedWriter(file) if is_buffered else file
    buffering = dict(line_buffering=line_buffering, write_through=not is_buffered)
    return io.TextIOWrapper(file, like.encoding, like.errors, **buffering)


def run(command):
    """Do what Python does with [FILE, ...] or [*TORCHRUN, ...], and end the process.

    Only Python's last act is left out: to take all modules apart costs a fork 0.3 s.
    """
    code = 1
    try:
        if command[:2] == TORCHRUN:
            subprocess_handler.SubprocessHandler._popen = lambda _, *given: Rank(*given)
            torchrun.main(command[2:])
        else:
            sys.argv = command
            sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
            runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(code)


class Rank:
    """A rank, forked from torchrun: what torchrun uses of subprocess.Popen."""

    def __init__(self, command, environment):
        python, unbuffered, *self.args = command
        assert (python, unbuffered) == (sys.executable, "-u")
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                become(environment, is_buffered=False)
                run(self.args)
            finally:
                os._exit(1)  # torchrun's frames lie below: never return to them

    def poll(self):
        if self.returncode is None:
            self.returncode = exit_code(self.pid)
        return self.returncode

    def wait(self, timeout=math.inf):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode


if __name__ == "__main__":
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import subprocess_handler

    for name in ("torchvision", "torchvision.transforms.v2", "tqdm.auto"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child's collections pass over what it shares with the others
    run(serve())
