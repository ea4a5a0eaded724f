"""What the processor can do: choose the device and the precision, keep freed memory."""

import ctypes
import faulthandler
import functools
import os

import torch

from lib.config import UsageError


def choose_device(name):
    """Turn 'auto', 'cpu' or 'cuda' into a torch.device: under torchrun the rank's own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: torch sees no GPU here; use --device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise UsageError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes but {n_gpus} GPUs here: "
            "lower --nproc_per_node, or use --device=cpu"
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory():
    """Tell the C library to keep freed memory. No effect if the library is not glibc.

    By default glibc returns large blocks to the system, which clears every page again when the next
    step asks for them. With 65536 prototypes that took nearly half of a step's time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)  # no block is a mapping of its own
        mallopt(M_TRIM_THRESHOLD, -1)  # nothing goes back to the system


def choose_precision(name, device):
    """Turn 'auto', 'bf16' or 'fp32' into ('bf16' or 'fp32', the autocast context to compute in).

    Parameters, losses and EMA are fp32 either way.
    """
    if device.type == "cuda":
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # without AMX, bf16 on an Intel CPU is slower than its fp32
        fast_bf16 = not _amx_is_broken() and torch.cpu._is_avx512_bf16_supported()
    if name == "auto":
        name = "bf16" if fast_bf16 else "fp32"
    enabled = name == "bf16"
    return name, functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=enabled)


@functools.cache
def _amx_is_broken():
    """Try AMX, Intel's matrix unit, in a child process. If the child dies, do without AMX.

    Some virtual machines announce AMX and kill a process at its first AMX instruction. oneDNN can
    be limited to AVX-512 only before it computes anything, so this comes first.
    """
    if not torch.cpu._is_amx_tile_supported():
        return False
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
            torch.set_num_threads(1)
            x = torch.ones(64, 64, dtype=torch.bfloat16)
            torch.nn.functional.linear(x, x)
            os._exit(0)
        finally:
            os._exit(1)  # whatever was raised: the child must never go on as a second run
    is_broken = os.waitpid(child, 0)[1] != 0
    if is_broken:  # the processes that this one starts inherit it
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    return is_broken
