"""A script that the tests fork is one that Python starts, but for the time that this takes."""

import json
import os
import signal
import subprocess

import pytest
from conftest import ROOT, run_script, start

FACTS = """
import faulthandler, json, os, resource, signal, sys, threading
facts = dict(
    argv=sys.argv, name=__name__, file=__file__, path=sys.path, module=sys.modules["__main__"].x,
    folder=os.getcwd(), environment=sorted(os.environ.items()), threads=threading.active_count(),
    signals=[line for line in open("/proc/self/status") if line.startswith("Sig")],
    interrupt=str(signal.getsignal(signal.SIGINT)), faults=faulthandler.is_enabled(),
    files=os.listdir("/proc/self/fd"), is_leader=os.getpid() == os.getpgrp() == os.getsid(0),
    limits=[resource.getrlimit(getattr(resource, n)) for n in dir(resource) if "RLIMIT" in n],
    printers=[[file.encoding, file.errors, file.line_buffering, file.write_through, file.fileno()]
              for file in (sys.stdout, sys.stderr)],
    children=open(f"/proc/self/task/{os.getpid()}/children").read(), input=sys.stdin.read(),
)
print(json.dumps(facts))
"""


def both_ways(text, folder, *arguments):
    """Write a script and run it forked and fresh -> two CompletedProcess."""
    script = folder / "script.py"
    script.write_text("x = 1\n" + text)
    return [run_script(script, *arguments, fresh=fresh, check=False) for fresh in (False, True)]


def test_a_fork_finds_what_a_fresh_process_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_THE_TEST", "ä b")
    forked, fresh = both_ways(FACTS, tmp_path, "--a=b", "c d")
    expected = json.loads(fresh.stdout)
    assert json.loads(forked.stdout) == expected
    assert expected["argv"] == [str(tmp_path / "script.py"), "--a=b", "c d"]
    assert ["OF_THE_TEST", "ä b"] in expected["environment"] and expected["folder"] == str(ROOT)


@pytest.mark.parametrize(
    "end, code",
    [
        ("sys.exit(3)", 3),
        ("sys.exit()", 0),
        ("1 / 0", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
@pytest.mark.slow
def test_a_fork_ends_as_a_fresh_process_ends(tmp_path, end, code):
    """What is printed, by whom it is printed, and in which order."""
    forked, fresh = both_ways(
        f"""
import atexit, os, signal, sys, threading, time
atexit.register(print, "last")
def later():
    time.sleep(0.2)
    print("a thread")
threading.Thread(target=later).start()
print("first", flush=True)
print("beside", file=sys.stderr)
print("in the buffer")
{end}
""",
        tmp_path,
    )
    assert forked.returncode == fresh.returncode == code
    assert forked.stdout == fresh.stdout and "first" in fresh.stdout
    assert [line for line in forked.stderr.splitlines() if "forkserver" not in line][-1:] == (
        fresh.stderr.splitlines()[-1:]
    )


def test_a_fork_is_signalled_and_watched(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = start(script, stderr=subprocess.STDOUT)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30) == ("ready\n", None)
    assert process.poll() == process.returncode == -signal.SIGTERM
    process.kill()  # does nothing
