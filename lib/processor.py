"""The processor, a CPU or a GPU: which one, how it computes, how numbers get there."""

import contextlib
import ctypes
import faulthandler
import functools
import os

from lib.config import UsageError

import torch


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
            f"{local_ranks()} processes but {n_gpus} GPUs here: "
            "lower --nproc_per_node, or use --device=cpu"
        )
    return torch.device("cuda", local_rank)


def local_ranks():
    """Return how many ranks of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def keep_freed_memory():
    """Tell the C library to keep freed memory. No effect if the library is not glibc.

    By default glibc returns large blocks to the system, which clears their pages when the next step
    asks for them again. With 65536 prototypes that took nearly half of a step's time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)  # no block is mapped by itself
        mallopt(M_TRIM_THRESHOLD, -1)  # nothing goes back to the system


def choose_precision(name, device):
    """Turn 'auto', 'bf16' or 'fp32' into ('bf16' or 'fp32', the autocast context to compute in).

    Parameters, losses and EMA are fp32 either way. On a GPU this also sets, for the process, how
    products of fp32 numbers are computed: the same way in training and in evaluations.
    """
    if device.type == "cuda":
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # without AMX, bf16 on an Intel CPU is slower than its fp32
        fast_bf16 = not _amx_is_broken() and torch.cpu._is_avx512_bf16_supported()
    if name == "auto":
        name = "bf16" if fast_bf16 else "fp32"
    enabled = name == "bf16"
    if device.type == "cuda":
        # TF32 rounds the factors of fp32 matrix products to 11 bits. With bf16 it serves what is
        # outside of autocast: the prototypes' logits, linear classifiers; never convolutions, for
        # which torch's default is True. The old names set torch's new ones (fp32_precision) too,
        # but not the reverse; torch.compile reads both and stops where they differ (PyTorch's issue
        # 166387).
        torch.backends.cuda.matmul.allow_tf32 = enabled
        torch.backends.cudnn.allow_tf32 = False
        # cuDNN's attention comes first on an H100. Its backward has crashed for a single query,
        # which is what the last block has (PyTorch's issue 138529). Off until it is measured.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return name, functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def exact_fp32():
    """Compute products of fp32 numbers inside of the block without TF32. A CPU has no TF32."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@functools.cache
def view_stream(device):
    """Return the CUDA stream in which crops and views are made, one a device; None on a CPU.

    So a GPU makes the next batch's views while the step before still runs.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def to_device(device, values):
    """Move numbers drawn on the CPU to `device`; to a GPU through pinned memory, without a wait."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def copy_packed(device, tensors):
    """Move a dict of small CPU tensors to `device` in one copy -> the same dict there."""
    if not tensors:
        return {}
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that each is aligned
    parts = [tensors[name].flatten().view(torch.uint8) for name in names]
    there = to_device(device, torch.cat(parts)).split([len(part) for part in parts])
    moved = {}
    for name, part in zip(names, there):
        moved[name] = part.view(tensors[name].dtype).view(tensors[name].shape)
    return moved


@functools.cache
def _amx_is_broken():
    """Try AMX, Intel's matrix unit, in a child process. If the child dies, do not use AMX.

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
