"""What torch.compile compiles: a backbone's blocks; on a GPU also the losses and the views.

If it fails, the same functions run eagerly, and a printed line gives the reason.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig

from lib import machine
from lib.config import UsageError

import torch

COMPILERS = {"cuda": "inductor"}  # device -> torch.compile's backend of functions; none: eager
EAGER = set()  # what failed to compile and now runs eagerly: "losses", "views"


def run_compiled(what, function, images, *arguments, **options):
    """Return function(images, ...), compiled as one graph for each shape of its tensors."""

    def compute():
        whole = compiled(what, function, images.device, dynamic=False, fullgraph=True)
        return whole(images, *arguments, **options)

    return or_eagerly(what, images.device, compute)


def or_eagerly(what, device, compute):
    """Return compute(). If compiled `what` fails, make `what` eager from now on and try again."""
    try:
        return compute()
    except Exception as error:
        if what in EAGER or device.type not in COMPILERS:
            raise
        EAGER.add(what)
        print(f"{what} are not compiled: {type(error).__name__}: {_one_line(error)}", flush=True)
    return compute()


def compiled(what, function, device, **options):
    """Return the function compiled for the device, or itself if `what` is eager there."""
    backend = None if what in EAGER else COMPILERS.get(device.type)
    return _compile(function, backend, **options) if backend else function


@functools.cache
def _compile(function, backend, **options):
    torch._dynamo.config.recompile_limit = 64  # a graph for each size of views and each recipe
    return torch.compile(function, backend=backend, **options)


def _one_line(error):
    return " ".join(str(error).split())[:200]


def compile_blocks(networks, wanted, device):
    """Compile the backbones' blocks one by one -> whether, and a line for the first screen.

    wanted: True; False, which holds for the losses and the views too; or None: only a ViT's on a
    GPU, if a trial kernel compiles on every rank.
    A CPU gains little and compiles for minutes; a ResNet would be one large graph.
    UsageError if it is True and the trial fails.
    """
    is_vit = hasattr(networks[0].backbone, "tokens")
    if wanted is False:
        COMPILERS.clear()
    if wanted is False or (wanted is None and not (device.type == "cuda" and is_vit)):
        return False, ""
    cause = trial_on_all_ranks(device) if device.type == "cuda" else ""
    if cause and wanted:
        raise UsageError(f"compile=True: {cause}, or omit --compile")
    if cause:
        return False, f"blocks run eagerly: {cause}"
    if wanted is None:
        fall_back_to_eager(True)
    torch._dynamo.config.recompile_limit = 64  # a ViT's blocks share six graphs
    # Under DistributedDataParallel dynamo splits a graph where 1 MB of gradients is ready, then at
    # each 25 MB, so that ranks exchange them while the rest computes. Here each block is a graph
    # of its own and is exchanged after it is done: a split would only undo fusions.
    torch._dynamo.config.optimize_ddp = False
    for net in networks:
        getattr(net.backbone, "keep_scans_out_of_graphs", lambda: None)()
        for block in getattr(net.backbone, "blocks", [net.backbone]):
            block.compile(dynamic=False)
    return True, "blocks compiled"


def fall_back_to_eager(wanted):
    """Fall back to eager when a block fails to compile: automatic compiling must not end a run.

    torch prints a warning for each such block.
    """
    torch._dynamo.config.suppress_errors = wanted
    torch._functorch.config.force_non_lazy_backward_lowering = wanted  # so the backward fails now


def trial_on_all_ranks(device):
    """Return in one line why a rank cannot compile and what to do; "" if all ranks can."""
    cause = why_not(device)
    if machine.rank_and_world()[1] > 1:
        failures = machine.mean_over_ranks(torch.tensor(float(cause != ""), device=device))
        if failures > 0 and not cause:
            return "another rank cannot compile; install the same software on all machines"
    return cause


@functools.cache
def why_not(device):
    """Compile a trial kernel for the device and launch it -> "" or why that fails and what to do.

    A kernel needs Triton, and a C compiler and Python.h for the code that launches it.
    """
    if importlib.util.find_spec("triton") is None:
        return "no package triton; pip install triton"
    try:
        fall_back_to_eager(False)
        result = torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return "" if result.sum() == 16 else "a trial kernel is wrong; update the GPU driver"
    except Exception as error:
        compilers = [os.environ.get("CC"), "gcc", "clang"]
        if not any(shutil.which(name) for name in compilers if name):
            return "no C compiler; install gcc"
        headers = sysconfig.get_path("include", "posix_prefix")  # where Triton looks
        if not os.path.exists(os.path.join(headers, "Python.h")):
            return "no Python.h; install python3-dev"
        why = _one_line(error)
        return f"{type(error).__name__}: {why}; set TORCH_LOGS=+inductor for details"
