"""Copy a batch's small tensors to a GPU at once."""

from lib import rng

import torch


def copy_packed(device, tensors):
    """Move a dict of small CPU tensors to `device` in one copy -> the same dict there."""
    if not tensors:
        return {}
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that each is aligned
    parts = [tensors[name].flatten().view(torch.uint8) for name in names]
    there = rng.to_device(device, torch.cat(parts)).split([len(part) for part in parts])
    moved = {}
    for name, part in zip(names, there):
        moved[name] = part.view(tensors[name].dtype).view(tensors[name].shape)
    return moved
