"""The processes of a script: ranks and what they share, signals, exit."""

import atexit
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

from lib.config import UsageError
from lib.processor import choose_device, choose_precision, local_ranks

import torch
import torch.distributed as dist

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_hosts = None  # the process group of the CPUs (gloo); join makes it on all ranks


class Here(NamedTuple):
    """Where this process runs: its rank, how many ranks there are, its device and precision."""

    rank: int
    world: int
    device: torch.device
    precision: str  # 'bf16' or 'fp32': how the backbone computes
    autocast: Callable  # () -> the context manager to compute in

    @property
    def is_main(self):
        return self.rank == 0


def join(device="auto", precision="auto"):
    """Choose device and precision, join torchrun's process group if there is one -> Here."""
    global _hosts
    device = choose_device(device)
    precision, autocast = choose_precision(precision, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        if world == local_ranks():
            # On one machine torchrun keeps the store when it restarts the ranks. Without a prefix
            # for each attempt the new ranks would find the addresses of the dead ones.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"attempt {attempt}", store)
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        group = dict(store=store, rank=rank, world_size=world, device_id=gpu)
        dist.init_process_group(backend, **group)
        _hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return Here(*rank_and_world(), device, precision, autocast)


def rank_and_world():
    """Return this process's rank and the number of processes: (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_ranks(x):
    """Average the tensor x over all ranks; without a process group return x itself."""
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def broadcast(obj):
    """Return rank 0's object (anything that pickles) on every rank."""
    held = [obj]
    if dist.is_initialized():
        dist.broadcast_object_list(held, src=0, group=_hosts)
    return held[0]


def wait_for_ranks():
    """Wait up to a day until every rank is here: NCCL's barrier would stop after ten minutes."""
    if dist.is_initialized():
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # another rank may still need what the GPU computes
        dist.all_reduce(torch.zeros(1), group=_hosts)


@contextlib.contextmanager
def catch_signals():
    """Note SIGTERM (Slurm, torchrun) and SIGINT (Ctrl-C) instead of dying -> pending.

    pending() -> the signal that any rank received, 0 if none: the same answer on all ranks. It is a
    collective: all ranks call it after the same step. A second signal of a kind ends the process at
    once. When the block ends normally, the default handlers are back.
    """
    received = []

    def note(number, _frame):
        signal.signal(number, signal.SIG_DFL)
        received.append(number)

    def pending():
        number = torch.tensor(received[0] if received else 0)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX, group=_hosts)
        return number.item()

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    yield pending
    if number := pending():
        leave(number, "the last step")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(number, step):
    """Leave because of a signal, all ranks together: exit code 143 for SIGTERM, 130 for SIGINT."""
    if rank_and_world()[0] == 0:
        name = signal.Signals(number).name
        message = f"stopped by {name} after {step}; the same command continues from there"
        print(message, file=sys.stderr, flush=True)
    wait_for_ranks()
    sys.exit(128 + number)


def run_main(main, when_interrupted="stopped", usage=""):
    """Run main(sys.argv[1:]) and end the process; without arguments print the usage, if any.

    A UsageError or a full disk is one line on stderr and exit code 2, Ctrl-C is exit code 130.
    A rank of torchrun skips Python's own clean-up and keeps the process group: the clean-up can
    wait forever for threads that still hold tensors (PyTorch's issue 190489), and all ranks with
    it. DistributedDataParallel, when freed, keeps Python's lock while it waits for such a thread.
    """
    code = 0
    try:
        if usage and not sys.argv[1:]:
            print(usage)
        else:
            main(sys.argv[1:])
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr, flush=True)
        code = 130
    except SystemExit as leaving:
        code = leaving.code or 0
    except Exception as error:
        code, cause = 2, ""
        if isinstance(error, UsageError):  # from a loading process, a traceback comes before it
            cause = str(error).strip().splitlines()[-1].removeprefix("lib.config.UsageError: ")
        elif getattr(error, "errno", None) in DISK_IS_FULL:
            cause = f"{error.filename or 'a file'}: {error.strerror}; make room and try again"
        if cause:
            print(f"{os.path.basename(sys.argv[0])}: {cause}", file=sys.stderr, flush=True)
        else:
            sys.excepthook(*sys.exc_info())  # torchrun's puts the rank before each line
            code = 1
    if "RANK" not in os.environ:
        sys.exit(code)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # even if a pipe is closed
        os._exit(code)
