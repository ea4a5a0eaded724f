"""Random numbers without state: a hash of (seed, epoch or step, sample, stream).

So a resumed run continues bit for bit, the number of workers changes nothing, no two ranks share a
number, and CPU and GPU get the same numbers. The hash is splitmix64 (Steele, Lea and Flood 2014) on
int64 tensors, whose products wrap as the original's do.
"""

import torch

# fmt: off
STREAMS = {  # what the numbers are for -> what is hashed; "+ i": one stream for each i
    # from a sample seed = sample_seeds(seed, epoch, index)
    "global_crops": 0, "local_crops": 1, "augment": 2, "elastic": 3, "crop_transform": 4,
    "global_view": 10,  # + i
    "local_view": 12,   # + i, up to 80
    "perturbation": 20, "quarter_turn": 30,  # of evaluations
    "drop_path": 100, "view": 200,  # + i, the view: of training; of equivariance.py
    # from the seed of a run or of one image of shapes
    "shapes_train": 10, "shapes_val": 11, "video": 30, "video_grain": 31, "cached_view": 40,
    "grain": 1, "motion": 2,
}
# fmt: on
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd constants of splitmix64, as signed 64-bit integers
_INVERSE = 0xF1DE83E19937733D - 2**64  # of _GOLDEN: their product is 1 modulo 2^64
_MUL1 = 0xBF58476D1CE4E5B9 - 2**64
_MUL2 = 0x94D049BB133111EB - 2**64


def _mix(h):
    """Apply splitmix64's finalizer, elementwise. The masks make int64's shifts logical."""
    h = (h ^ (h >> 30 & (1 << 34) - 1)) * _MUL1
    h = (h ^ (h >> 27 & (1 << 37) - 1)) * _MUL2
    return h ^ (h >> 31 & (1 << 33) - 1)


def sample_seeds(*counters):
    """Hash integers or int64 tensors that broadcast: (seed, epoch, indices (B,)) -> (B,) int64."""
    h = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        x = torch.as_tensor(counter, dtype=torch.int64)
        h = _mix(_mix(h.to(x.device) + _GOLDEN) + x * _GOLDEN)  # twice, so that neighbors part
    return h


def fork(seeds, stream, *counters, index=0):
    """Derive a stream's seeds (...) from seeds (...); index: the i of "+ i", may be a tensor."""
    return sample_seeds(seeds, STREAMS[stream] + index, *counters)


def uniforms(seeds, n):
    """Return (..., n) float32 for seeds (...), uniform in [0, 1) in steps of 2^-24."""
    h = _mix(seeds[..., None] + _GOLDEN * torch.arange(1, n + 1, device=seeds.device))
    return (h >> 40 & (1 << 24) - 1).float() / (1 << 24)


def noise(seeds, n):
    """Return (..., n) float32, uniform in [-1, 1) in steps of 2^-15: four of a hash, for images."""
    counts = torch.arange(1, (n + 3) // 4 + 1, device=seeds.device)
    # seeds + _GOLDEN * counts. Of a product of counters alone torch.compile's kernels keep 32 bits.
    h = _mix((seeds[..., None] * _INVERSE + counts) * _GOLDEN)
    return h.contiguous().view(torch.int16)[..., :n].float() / (1 << 15)
