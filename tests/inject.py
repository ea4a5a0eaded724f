"""A run of train.py to which something happens.

    python tests/inject.py FAULT [config.py] [--key=value ...]

FAULT is one of
    nan:FROM:TO[:RANK]   the views of those steps are not finite, on one rank
    term:STEP            SIGTERM to this process during that step
    kill:STEP:RANK       SIGKILL to that rank during that step, the first time only
    full:FROM:TO         no file may grow beyond a few bytes from one step to the other (no epoch
                         may end between them: loading workers would inherit the limit)
    readonly:FROM:TO     out_dir is mounted read-only from one step to the other (in a mount
                         namespace of its own)
    gone:STEP            someone removes out_dir
    die:CALL:N           SIGKILL at the N-th call of os.replace, os.fsync or torch.save's write,
                         that is in the middle of a checkpoint
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import machine
from lib.run import Run

import torch

import train

RANK = int(os.environ.get("RANK", 0))


def happen(kind, numbers, step, out_dir):
    """Do what is due before a step."""
    first = int(numbers[0]) == step
    if kind == "term" and first:
        os.kill(os.getpid(), signal.SIGTERM)
    is_first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if kind == "kill" and [step, RANK] == list(map(int, numbers)) and is_first_time:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "full":
        limit = 100 if int(numbers[0]) <= step < int(numbers[1]) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if kind == "readonly":
        mount(numbers, step, out_dir)
    if kind == "gone" and first:
        shutil.rmtree(out_dir)


def mount(numbers, step, out_dir):
    if step == int(numbers[0]):
        subprocess.run(["mount", "--bind", out_dir, out_dir], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", out_dir], check=True)
    if step == int(numbers[1]):
        subprocess.run(["umount", "--lazy", out_dir], check=True)


def dying(function, n):
    """Let the n-th call of a function end the process."""
    calls = iter(range(1, 10**6))

    def call(*arguments, **named):
        if next(calls) == n:
            if function is torch.save:  # half a file
                arguments[1].write(b"half of it")
                arguments[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return call


def inject(fault):
    kind, *numbers = fault.split(":")
    step_of = [None]
    whole_step = train.train_step
    whole_views = Run.views

    def step(run, step, batch):
        step_of[0] = step
        if kind != "die":
            happen(kind, numbers, step, run.config.out_dir)
        return whole_step(run, step, batch)

    def views(run, batch):
        result = whole_views(run, batch)
        if kind == "nan" and step_of[0] is not None:
            first, last, rank = map(int, (*numbers, 0)[:3])
            if first <= step_of[0] < last and rank == RANK:
                result = [view * float("inf") for view in result]
        return result

    train.train_step = step
    Run.views = views
    if kind == "die":
        module = torch if numbers[0] == "save" else os
        function = getattr(module, numbers[0])
        setattr(module, numbers[0], dying(function, int(numbers[1])))


if __name__ == "__main__":
    inject(sys.argv.pop(1))
    machine.run_main(train.main)
