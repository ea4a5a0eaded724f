"""The views: random crops, then the operations of a recipe (paper, appendix).

1. Workers, one image at a time, uint8: `crop_views` cuts and resizes the random crops. Of small
   images lib/resident.py makes the same crops on the device, a batch at a time.
2. The device, a batch at a time: `augment` = `parameters` (what happens to each sample) and
   `transform`: flip, rotation and elastic in one sampling; color jitter; gray; blur; solarize.

Operations and their order are torchvision's; tests/test_augment.py compares them. Differences:
rotation is bilinear (not nearest), nothing is rounded to uint8 in between, the blur is a Gaussian
of 13 taps (DINO's is Pillow's approximation). Random numbers are a function of a sample's seed.
To add an operation, add a field to Recipe, a line to `parameters` and a line to `transform`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib.rng import fork, noise, sample_seeds, to_device, uniforms

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
ELASTIC_SIGMA = 5.0  # pixels, at any crop size
ELASTIC_RADIUS = 20  # so 41 taps, as torchvision
BLUR_SIGMA = (0.1, 2.0)  # pixels
BLUR_RADIUS = 6
# Pixels that a CPU transforms at a time: they and their temporaries fit its cache. 1.7x faster.
CPU_CHUNK = 1 << 17


class Recipe(NamedTuple):
    """What happens to a crop: probabilities, ranges and strengths. The default does nothing."""

    flip: float = 0.0  # probability
    rotate: float = 0.0  # degrees: uniform in -rotate .. rotate, corners are black
    elastic: float = 0.0  # probability
    elastic_alpha: float = 100.0  # strength, torchvision's alpha
    jitter: float = 0.0  # probability
    jitter_strength: tuple = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    gray: float = 0.0  # probability
    blur: tuple = (0.0, 0.0, 0.0)  # probability for each kind of view
    solarize: tuple = (0.0, 0.0, 0.0)  # probability for each kind of view


GLOBAL_1, GLOBAL_2, LOCAL = range(3)  # kinds of view: the index into blur and solarize

# fmt: off
_DINO = dict(flip=0.5, jitter=0.8, gray=0.2, blur=(1.0, 0.1, 0.5), solarize=(0.0, 0.2, 0.0))
RECIPES = {  # of training views
    "baug":        Recipe(**_DINO),
    "caug":        Recipe(**_DINO, rotate=90),
    "caug+":       Recipe(**_DINO, rotate=90, elastic=0.5),
}
_CJ = dict(jitter=1.0, jitter_strength=(0.4, 0.4, 0.4, 0.1))
PERTURBATIONS = {  # of test images
    "orig":        Recipe(),
    "cj":          Recipe(**_CJ),
    "cj+flip":     Recipe(**_CJ, flip=1.0),
    "cj+ro":       Recipe(**_CJ, rotate=90),
    "cj+ro+et":    Recipe(**_CJ, rotate=90, elastic=1.0),
    # not in the paper's main table
    "ro":          Recipe(rotate=90),
    "cj+ro180":    Recipe(**_CJ, rotate=180),
    "cj+ro+et50":  Recipe(**_CJ, rotate=90, elastic=1.0, elastic_alpha=50),
    "cj+ro+et150": Recipe(**_CJ, rotate=90, elastic=1.0, elastic_alpha=150),
}
# fmt: on


def recipe(name, blur=True, solarize=True):
    """Return RECIPES[name], without blur or solarize if these are switched off."""
    off = (0.0, 0.0, 0.0)
    found = RECIPES[name] if blur else RECIPES[name]._replace(blur=off)
    return found if solarize else found._replace(solarize=off)


def perturbation(name, seed=0):
    """Return a function (images uint8 (N, 3, S, S), seeds (N,)) -> perturbed, normalized float."""
    chosen = PERTURBATIONS[name]
    return lambda images, seeds: augment(images, chosen, fork(seeds, "perturbation", seed))


def quarter_turn(n):
    """Return a function (images, seeds) -> turned by n * 90 degrees, no black corners, float."""
    orig = PERTURBATIONS["orig"]
    return lambda images, seeds: augment(torch.rot90(images, n, (2, 3)).contiguous(), orig, seeds)


# --- stage 1, in the workers: crops -------------------------------------------------------------


def crop_views(image, seed, global_size, local_size, local_crops, global_scale, local_scale):
    """Cut image uint8 (3, H, W), seed () int64, into uint8 (2, 3, G, G) and uint8 (L, 3, l, l)."""
    large = random_crops(image, fork(seed, "global_crops"), 2, global_size, global_scale)
    small = random_crops(image, fork(seed, "local_crops"), local_crops, local_size, local_scale)
    return large, small


def random_crops(image, seed, n, size, scale):
    """Cut n random resized crops: image uint8 (3, H, W) -> uint8 (n, 3, size, size)."""
    crops = torch.empty(n, 3, size, size, dtype=torch.uint8)
    boxes = crop_boxes(*image.shape[1:], seed, n, scale).tolist()
    for i, (top, left, h, w) in enumerate(boxes):
        crops[i] = resize(image[:, top : top + h, left : left + w], size, size)
    return crops


def crop_boxes(H, W, seeds, n, scale, aspect=(3 / 4, 4 / 3)):
    """Choose torchvision's random boxes: seeds (...) -> (..., n, 4) of top, left, height, width.

    The first of 10 tries that fits, else the largest centered box within the aspects.
    """
    u = uniforms(sample_seeds(seeds[..., None], torch.arange(n)), 22).double()
    u_area, u_aspect = u[..., :20].unflatten(-1, (10, 2)).unbind(-1)  # (..., n, 10)
    low, high = (math.log(limit) for limit in aspect)
    area = H * W * (scale[0] + u_area * (scale[1] - scale[0]))
    ratio = torch.exp(low + u_aspect * (high - low))
    h = torch.sqrt(area / ratio).round()
    w = torch.sqrt(area * ratio).round()
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    first = fits.byte().argmax(-1, keepdim=True)
    h, w = (x.gather(-1, first)[..., 0] for x in (h, w))
    top = (u[..., 20] * (H - h + 1)).floor()
    left = (u[..., 21] * (W - w + 1)).floor()

    h_most = min(H, max(1, round(W / aspect[0])))
    w_most = min(W, max(1, round(H * aspect[1])))
    largest = torch.tensor([(H - h_most) // 2, (W - w_most) // 2, h_most, w_most])
    boxes = torch.stack([top, left, h, w], -1).long()
    return torch.where(fits.any(-1, keepdim=True), boxes, largest)


def resize(image, h, w):
    """Resize image uint8 (3, H, W) to (3, h, w): bicubic, antialiased, in training and tests."""
    if image.shape[1:] == (h, w):
        return image
    return F.interpolate(image[None], size=(h, w), mode="bicubic", antialias=True)[0]


def center_crop(image, size):
    """Resize the shorter side to 8/7 of size, cut the center; small images lose no border."""
    h, w, top, left = center_place(*image.shape[1:], size)
    return resize(image, h, w)[:, top : top + size, left : left + size]


def center_place(H, W, size):
    """Return center_crop's height and width after the resize, and the crop's top and left."""
    side = min(max(size, min(H, W)), size * 8 // 7)  # 256 for size 224
    h = max(side, round(H * side / min(H, W)))
    w = max(side, round(W * side / min(H, W)))
    return h, w, (h - size) // 2, (w - size) // 2


# --- stage 2, on the device: a recipe -----------------------------------------------------------


def augment_views(global_crops, local_crops, seeds, recipe):
    """Make what the network sees; every crop has random numbers of its own.

    global_crops uint8 (B, 2, 3, G, G), local_crops uint8 (B, L, 3, l, l), seeds (B,) of the samples
    -> [(2, B, 3, G, G), (L, B, 3, l, l)] normalized float32, without the second if L is 0.
    """
    first = augment(global_crops[:, 0], recipe, fork(seeds, "global_view", index=0), GLOBAL_1)
    second = augment(global_crops[:, 1], recipe, fork(seeds, "global_view", index=1), GLOBAL_2)
    views = [torch.stack([first, second])]
    B, L = local_crops.shape[:2]
    if L:
        local_seeds = fork(seeds, "local_view", index=torch.arange(L)[:, None])  # (L, B)
        crops = local_crops.transpose(0, 1).flatten(0, 1)
        local = augment(crops, recipe, local_seeds.flatten(), LOCAL)
        views.append(local.unflatten(0, (L, B)))
    return views


def augment(images, recipe, seeds, kind=GLOBAL_1):
    """Apply a recipe: images uint8 (N, 3, S, S), seeds (N,) on the CPU -> normalized float32."""
    params = parameters(recipe, seeds, kind)
    if images.is_cuda:
        return transform(images, params)
    chunk = max(1, CPU_CHUNK // images.shape[2:].numel())
    out = torch.empty(images.shape)
    for i in range(0, len(images), chunk):
        rows = slice(i, i + chunk)
        out[rows] = transform(images[rows], {name: p[rows] for name, p in params.items()})
    return out


def parameters(recipe, seeds, kind=GLOBAL_1):
    """Choose what happens to each sample: seeds (N,) -> dict of tensors with N rows.

    They stay on the CPU, so that a branch on them does not wait for the GPU.
    """
    u = uniforms(fork(seeds, "augment"), 16)  # a new operation: 17, and take u[:, 16]
    jitter = u[:, 3] < recipe.jitter
    strength = torch.tensor(recipe.jitter_strength)
    factors = 1 + (2 * u[:, 4:7] - 1) * strength[:3]
    sigma = BLUR_SIGMA[0] + u[:, 14] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])
    return dict(
        flip=u[:, 0] < recipe.flip,
        angle=(2 * u[:, 1] - 1) * recipe.rotate,  # degrees, counter-clockwise
        elastic=(u[:, 2] < recipe.elastic) * recipe.elastic_alpha,  # alpha, 0: off
        elastic_seeds=fork(seeds, "elastic"),
        factors=torch.where(jitter[:, None], factors, 1.0),  # (N, 3) as jitter_strength, 1: off
        hue=jitter * (2 * u[:, 7] - 1) * strength[3],  # turns of the color circle, 0: off
        order=u[:, 8:12].argsort(dim=1),  # (N, 4): of the jitter's four operations
        gray=u[:, 12] < recipe.gray,
        blur=(u[:, 13] < recipe.blur[kind]) * sigma,  # sigma in pixels, 0: off
        solarize=u[:, 15] < recipe.solarize[kind],
    )


@torch.no_grad()
def transform(images, params):
    """Apply what `parameters` chose: images uint8 (N, 3, S, S) -> normalized float32."""
    x = images.float() / 255
    x = warp(x, params["flip"], params["angle"], params["elastic"], params["elastic_seeds"])
    x = color_jitter(x, params["factors"], params["hue"], params["order"])
    x = _on_rows(x, params["gray"], lambda rows: gray(rows).repeat(1, 3, 1, 1))
    x = _on_rows(x, params["blur"] > 0, blur, params["blur"])
    x = _on_rows(x, params["solarize"], lambda rows: rows.where(rows < 128 / 255, 1 - rows))
    return normalize(x)


def _on_rows(x, mask, operation, *values):
    """Apply operation(rows, *their values) in place where mask (N,), on the CPU, is true."""
    chosen = mask.nonzero()[:, 0]
    if not len(chosen):
        return x
    values = [to_device(x.device, value[chosen]) for value in values]
    if len(chosen) == len(x):
        return operation(x, *values)
    chosen = to_device(x.device, chosen)
    x[chosen] = operation(x[chosen], *values)
    return x


def normalize(x):
    """Turn RGB in [0, 1] (N, 3, H, W) into what networks take."""
    channels = [(channel - mean) / std for channel, mean, std in zip(x.unbind(1), MEAN, STD)]
    return torch.stack(channels, 1)


def denormalize(x):
    """Turn normalized (..., 3, H, W) back into RGB in [0, 1], for pictures."""
    channels = [channel * std + mean for channel, mean, std in zip(x.unbind(-3), MEAN, STD)]
    return torch.stack(channels, -3).clamp(0, 1)


def warp(x, flip, angle, alpha, elastic_seeds):
    """Flip, rotate about the center, then deform: one bilinear sampling of x (N, 3, S, S).

    flip, angle (degrees), alpha (0: no elastic) and elastic_seeds are (N,), on the CPU.
    A grid holds for each output pixel the place to read. So it runs backwards: elastic, rotation,
    flip. Places outside the picture are black.
    Elastic may lead out of the rotated square, and the rotation from there back into the picture.
    In the sequence of operations such places are black. So a pixel's weight is the smaller of two
    shares: of its footprint in the rotated square, and in the picture (grid_sample's own weight).
    """
    if not angle.any() and not alpha.any():
        return _on_rows(x, flip, lambda rows: rows.flip(-1))
    N, _, S, _ = x.shape
    centers = (2 * torch.arange(S, device=x.device) + 1) / S - 1  # of pixels, in [-1, 1]
    grid = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), -1)
    grid = grid.repeat(N, 1, 1, 1)  # (N, S, S, 2) of (x, y)

    elastic = alpha.nonzero()[:, 0]
    if len(elastic):
        rows = to_device(x.device, elastic)
        values = [to_device(x.device, value[elastic]) for value in (alpha, elastic_seeds)]
        grid[rows] += elastic_displacement(*values, S)
        in_rotated = _share_inside(grid[rows])  # (n, S, S)

    # Elementwise: a matrix product may be rounded to TF32 or, under autocast, to bf16.
    angle = torch.deg2rad(angle)
    motion = to_device(x.device, torch.stack([angle.cos(), angle.sin(), 1 - 2.0 * flip]))
    cos, sin, mirror = motion[..., None, None]  # (N, 1, 1) each
    grid_x, grid_y = grid.unbind(-1)
    grid = torch.stack([mirror * (cos * grid_x - sin * grid_y), sin * grid_x + cos * grid_y], -1)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if len(elastic):
        in_picture = _share_inside(grid[rows])
        x[rows] *= (in_rotated / in_picture.clamp(min=1e-6)).clamp(max=1)[:, None]
    return x


def _share_inside(grid):
    """Return the share of each pixel read that lies in the square: (n, S, S, 2) -> (n, S, S)."""
    return ((1 - grid.abs()) * grid.shape[1] / 2 + 0.5).clamp(0, 1).prod(-1)


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
    n = len(sigma)
    matrix = torch.zeros(n, S, S, device=sigma.device)
    return matrix.scatter_add_(2, source.expand(n, -1, -1), weight[:, None].expand(-1, S, -1))


def blur(x, sigma):
    """Blur x (N, 3, S, S) by Gaussians of sigma (N,) pixels."""
    matrix = gaussian_matrix(x.shape[-1], sigma, BLUR_RADIUS)[:, None]
    return matrix @ x @ matrix.mT


def gray(x):
    """Return the luma (ITU-R 601-2) of x (N, 3, H, W): (N, 1, H, W)."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def color_jitter(x, factors, hue, order):
    """Change brightness, contrast, saturation and hue, each sample in its own order.

    factors (N, 3) of the first three, hue (N,), order (N, 4) are on the CPU. As torchvision's
    ColorJitter. The first three are one formula, f x + (1 - f) anchor, clamped: the anchor is
    black, the mean of the image's gray, or the gray. So at each place of the order, all samples
    blend together. Those whose hue is due have f = 1 and then turn their hue.
    """
    if (factors == 1).all() and not hue.any():
        return x
    for due in order.unbind(1):  # (N,): 0 brightness, 1 contrast, 2 saturation, 3 hue
        factor = factors.gather(1, due.clamp(max=2)[:, None])[:, 0].masked_fill(due == 3, 1)
        rest = 1 - factor
        weights = torch.stack([factor, rest * (due == 1), rest * (due == 2)])
        f, of_mean, of_gray = to_device(x.device, weights)[..., None, None, None]  # (N, 1, 1, 1)
        luma = gray(x)
        x = (f * x + (of_gray * luma + of_mean * luma.mean((2, 3), keepdim=True))).clamp_(0, 1)
        x = _on_rows(x, (due == 3) & (hue != 0), adjust_hue, hue)
    return x


def adjust_hue(x, turns):
    """Turn the hue of x (N, 3, H, W) by (N,) turns of the color circle; keep value and saturation.

    Through HSV: chroma c = max - min, and a channel is max - c * clamp(min(k, 4 - k), 0, 1) with
    k = (n + 6 hue) mod 6, where n = 5, 3, 1 for R, G, B.
    """
    r, g, b = x.unbind(1)
    high = x.amax(1)
    chroma = high - x.amin(1)
    scale = 1 / torch.where(chroma > 0, chroma, 1)  # a gray pixel has no hue: any will do
    if_green_or_blue = torch.where(high == g, 2 + (b - r) * scale, 4 + (r - g) * scale)
    sextant = torch.where(high == r, (g - b) * scale, if_green_or_blue) + 6 * turns[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(sextant + n, 6)
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)
