"""What augment.py does to the pixels of a batch; the operations and numbers are torchvision's.

r, g, b are the color channels (N, 1, H, W) in [0, 1]. Apart from each other, so that torch.compile
makes one loop over the pixels of many operations.
"""

from lib.rng import noise

import torch
from torchvision.transforms.v2.functional import to_dtype

BLUR_RADIUS = 6  # so 13 taps
ELASTIC_RADIUS = 20  # so 41 taps, as torchvision
ELASTIC_SIGMA = 5.0  # pixels, at any crop size


def blur(r, g, b, sigma):
    """Blur by Gaussians of sigma (N,) pixels."""
    matrix = gaussian_matrix(r.shape[-1], sigma, BLUR_RADIUS)[:, None]
    transposed = matrix.mT.contiguous()  # a small product of a view may be rounded otherwise
    return [matrix @ channel @ transposed for channel in (r, g, b)]


def solarize(*rgb):
    """Invert what is not darker than 128 of 255."""
    return [channel.where(channel < 128 / 255, 1 - channel) for channel in rgb]


def gray(r, g, b):
    """Return the luma (ITU-R 601-2)."""
    return 0.2989 * r + 0.587 * g + 0.114 * b


def adjust_hue(r, g, b, turns):
    """Turn the hue by (N,) turns of the color circle; keep value and saturation.

    Through HSV: chroma c = max - min, and a channel is max - c * clamp(min(k, 4 - k), 0, 1) with
    k = (n + 6 hue) mod 6, where n = 5, 3, 1 for R, G, B.
    """
    high = r.maximum(g).maximum(b)
    chroma = high - r.minimum(g).minimum(b)
    scale = 1 / torch.where(chroma > 0, chroma, 1)  # a gray pixel has no hue: any will do
    if_green_or_blue = torch.where(high == g, 2 + (b - r) * scale, 4 + (r - g) * scale)
    sextant = torch.where(high == r, (g - b) * scale, if_green_or_blue)
    sextant = sextant + 6 * turns[:, None, None, None]
    rgb = []
    for n in (5, 3, 1):
        k = torch.remainder(sextant + n, 6)
        rgb.append(high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return rgb


def elastic_displacement(alpha, seeds, S):
    """Smooth uniform noise in [-1, 1), times alpha / S: torchvision's ElasticTransform.

    alpha (n,), seeds (n,) -> (n, S, S, 2), in units of half the image's side. The root mean square
    is alpha / 60 pixels at S = 224; at 32 it is 1.3 times that, because of the mirrored borders.
    """
    sigma = torch.full((1,), ELASTIC_SIGMA, device=alpha.device)
    smooth = gaussian_matrix(S, sigma, ELASTIC_RADIUS)  # (1, S, S)
    field = smooth @ noise(seeds, 2 * S * S).view(-1, 2, S, S) @ smooth.mT
    return (field * (alpha / S)[:, None, None, None]).permute(0, 2, 3, 1)


def gaussian_matrix(S, sigma, radius):
    """Make matrices that blur a column of S pixels, with mirrored borders: (n,) -> (n, S, S).

    A kernel has 2 radius + 1 taps. A blur is then two matrix products, which are fast.
    """
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (taps / sigma[:, None]).square())
    weight = weight / weight.sum(1, keepdim=True)  # (n, taps)
    # The pixel that each tap reads; beyond a border, mirrored without repeating the border pixel.
    period = max(2 * S - 2, 1)
    source = (torch.arange(S, device=sigma.device)[:, None] + taps) % period  # (S, taps)
    source = torch.where(source < S, source, period - source)
    weight = weight[:, None].expand(-1, S, -1)  # (n, S, taps)
    return weight.new_zeros(len(sigma), S, S).scatter_add_(2, source.expand_as(weight), weight)


def transform_each(function, crops, seeds):
    """Apply a function, on the CPU, to crops uint8 (..., 3, S, S); seeds torch's generator."""
    result = crops.cpu().clone(memory_format=torch.contiguous_format)
    with torch.random.fork_rng(devices=[]):
        for x, seed in zip(result.flatten(0, -4), seeds.flatten().tolist()):
            torch.default_generator.manual_seed(seed)  # manual_seed seeds all devices: slow
            x.copy_(to_dtype(function(x), torch.uint8, scale=True))
    return result.to(crops.device)
