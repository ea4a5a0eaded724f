"""A run of train.py to which something happens: python tests/inject.py FAULT [config.py] [--key=value ...], FAULT one of

nan:FROM:TO[:RANK]     the views of those steps are not finite, on one rank
term:STEP              SIGTERM to this process during that step
kill:STEP:RANK         SIGKILL to that rank during that step, the first time only
full:FROM:TO           no file may grow beyond a few bytes from one step to the other (let no epoch end between them: loading workers would inherit it)
readonly:FROM:TO       out_dir is mounted read-only from one step to the other (in a mount namespace of its own)
gone:STEP              someone removes out_dir
die:CALL:N             SIGKILL at the N-th call of os.replace, os.fsync or torch.save's write, that is in the middle of a checkpoint
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import train  # noqa: E402
from configurator import exit_on_usage_error  # noqa: E402


def inject(fault):
    kind, *numbers = fault.split(":")
    rank, step_of, whole_step, views_of = (
        int(os.environ.get("RANK", 0)),
        [None],
        train.train_step,
        train.views_of,
    )

    def step(run, step, *batch):
        step_of[0] = step
        if kind == "term" and step == int(numbers[0]):
            os.kill(os.getpid(), signal.SIGTERM)
        if (
            kind == "kill"
            and [step, rank] == list(map(int, numbers))
            and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full":
            limit = 100 if int(numbers[0]) <= step < int(numbers[1]) else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if kind == "readonly" and step == int(numbers[0]):
            subprocess.run(["mount", "--bind", run.config.out_dir, run.config.out_dir], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", run.config.out_dir], check=True)
        if kind == "readonly" and step == int(numbers[1]):
            subprocess.run(["umount", "--lazy", run.config.out_dir], check=True)
        if kind == "gone" and step == int(numbers[0]):
            shutil.rmtree(run.config.out_dir)
        return whole_step(run, step, *batch)

    def views(*arguments):
        result = views_of(*arguments)
        if (
            kind == "nan"
            and step_of[0] is not None
            and int(numbers[0]) <= step_of[0] < int(numbers[1])
            and rank == int((*numbers, 0)[2])
        ):
            result = [view * float("inf") for view in result]
        return result

    def dying(function):
        calls = iter(range(1, 10**6))

        def call(*arguments, **named):
            if next(calls) == int(numbers[1]):
                if function is torch.save:  # half a file
                    arguments[1].write(b"half of it"), arguments[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    train.train_step, train.views_of = step, views
    if kind == "die":
        module = torch if numbers[0] == "save" else os
        setattr(module, numbers[0], dying(getattr(module, numbers[0])))


if __name__ == "__main__":
    inject(sys.argv[1])
    with exit_on_usage_error():
        train.main(sys.argv[2:])
