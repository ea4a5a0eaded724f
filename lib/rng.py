"""Randomness as a function: a draw is a hash of (seed, epoch or step, sample, what for), never the state of a generator.

So a resumed run continues bit for bit, the number of workers changes nothing, two ranks never share a draw, and CPU and GPU draw alike.
The hash is splitmix64 (Steele, Lea and Flood 2014) on int64 tensors, whose products wrap as the original's do.
"""

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd constants of splitmix64, as signed 64-bit integers
_MUL1 = 0xBF58476D1CE4E5B9 - 2**64
_MUL2 = 0x94D049BB133111EB - 2**64


def _mix(h):
    """splitmix64's finaliser, elementwise; the masks make int64's arithmetic shifts logical."""
    h = (h ^ (h >> 30 & (1 << 34) - 1)) * _MUL1
    h = (h ^ (h >> 27 & (1 << 37) - 1)) * _MUL2
    return h ^ (h >> 31 & (1 << 33) - 1)


def key(*counters):
    """Integers or int64 tensors that broadcast -> one int64 key for each combination, as (seed, epoch, indices (B,)) -> (B,)."""
    h = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        counter = torch.as_tensor(counter, dtype=torch.int64)
        h = _mix(
            _mix(h.to(counter.device) + _GOLDEN) + counter * _GOLDEN
        )  # mixed twice: neighbouring counters end far apart
    return h


def uniforms(keys, n):
    """keys (...) int64 -> (..., n) float32, uniform in [0, 1) in steps of 2^-24."""
    h = _mix(keys[..., None] + _GOLDEN * torch.arange(1, n + 1, device=keys.device))
    return (h >> 40 & (1 << 24) - 1).float() / (1 << 24)


def noise(keys, n):
    """keys (...) int64 -> (..., n) float32, uniform in [-1, 1) in steps of 2^-15: four numbers a hash, for whole images of noise."""
    h = _mix(keys[..., None] + _GOLDEN * torch.arange(1, (n + 3) // 4 + 1, device=keys.device))
    return h.contiguous().view(torch.int16)[..., :n].float() / (1 << 15)


def kept_branches(draws, rate, depth):
    """Drop path (Huang et al. 2016), for each of `depth` blocks: what a sample's two branches are multiplied by, (B, 2), 0 where dropped and
    1 / (1 - the block's rate) where kept. Rates rise from 0 in the first block to `rate` in the last.

    draws (B, depth, 2): uniforms; None drops nothing: then it is None for each block. Factors, not rates, are given to the blocks: so those of a
    network differ in tensors alone, and torch.compile makes one graph for all."""
    if draws is None:
        return [None] * depth
    rates = torch.linspace(0, rate, depth, device=draws.device)[:, None]  # (depth, 1)
    return list(((draws >= rates) / (1 - rates)).unbind(1))
