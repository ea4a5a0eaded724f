"""What a GPU gets at once: a batch's numbers as one copy, its operations as one graph."""

import functools

from lib import rng

import torch

COMPILERS = {"cuda": "inductor"}  # device -> torch.compile's backend; none, or it fails: eager


def copy_packed(device, tensors):
    """Move a dict of small CPU tensors to `device` in one copy -> the same dict there."""
    if not tensors:
        return {}
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that each lies aligned
    parts = [tensors[name].flatten().view(torch.uint8) for name in names]
    there = rng.to_device(device, torch.cat(parts)).split([len(part) for part in parts])
    moved = {}
    for name, part in zip(names, there):
        moved[name] = part.view(tensors[name].dtype).view(tensors[name].shape)
    return moved


def run_compiled(what, function, images, *arguments, **options):
    """Return function(images, ...), compiled as one graph for each shape of its tensors.

    Eagerly on a device without a compiler, and from when one fails; a line then says why.
    what: the word for the results in that line.
    """
    device = images.device.type
    if device in COMPILERS:
        try:
            return _compiled(function, COMPILERS[device])(images, *arguments, **options)
        except Exception as error:
            del COMPILERS[device]
            why = " ".join(str(error).split())[:200]
            print(f"{what} are not compiled: {type(error).__name__}: {why}", flush=True)
    return function(images, *arguments, **options)


@functools.cache
def _compiled(function, backend):
    torch._dynamo.config.recompile_limit = 64  # a graph for each size of views and each recipe
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
