"""The views: random crops, then the operations of a recipe (paper, appendix).

1. Workers, one image at a time, uint8: `random_crops` cuts and resizes, global crops then local
   ones (lib/data.py). Of small images lib/resident.py makes the same crops on the device, a batch
   at a time.
2. The device, a batch at a time: `augment` = `parameters` (what happens to each sample) and
   `transform`: flip, rotation and elastic in one sampling; color jitter; gray; blur; solarize.
   A CPU skips the samples that an operation does not change. A GPU computes all and chooses by
   masks: no branch and no shape depends on a random number, so that one graph can be compiled.

Operations and their order are torchvision's; tests/test_augment.py compares them. Differences:
rotation is bilinear (not nearest), nothing is rounded to uint8 in between, the blur is a Gaussian
of 13 taps (DINO's is Pillow's approximation). Random numbers are a function of a sample's seed.
To add an operation, add a field to Recipe and a line to `parameters`, `_in_use` and `transform`.
Or give a recipe a crop_transform, such as one of torchvision's. docs/fork.md does both.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lib.compiled import run_compiled
from lib.pixels import adjust_hue, blur, elastic_displacement, gray, solarize, transform_each
from lib.processor import copy_packed
from lib.rng import fork, sample_seeds, uniforms

import torch
import torch.nn.functional as F

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
BLUR_SIGMA = (0.1, 2.0)  # pixels
# Pixels that a CPU transforms at a time: they and their temporaries fit its cache. 1.7x faster.
CPU_CHUNK = 1 << 17
BY_ROWS = {"cpu"}  # devices that skip the samples that an operation does not change


class Recipe(NamedTuple):
    """What happens to a crop: probabilities, ranges and strengths. The default does nothing."""

    crop_transform: Callable | None = None  # of a crop uint8 (3, S, S), before all else
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
    B, L = local_crops.shape[:2]
    index = torch.arange(2 + L)[:, None]  # of the view
    of_global = fork(seeds, "global_view", index=index[:2])  # (2, B)
    of_local = fork(seeds, "local_view", index=index[:L])  # (L, B)
    kinds = index.clamp(max=LOCAL).expand(-1, B)  # GLOBAL_1, GLOBAL_2, LOCAL, LOCAL, ...
    params = parameters(recipe, torch.cat([of_global, of_local]).flatten(), kinds.flatten())
    sizes = [global_crops, local_crops] if L else [global_crops]
    crops = [x.transpose(0, 1).flatten(0, 1) for x in sizes]  # (V * B, 3, S, S)
    views = _on_device(crops, params, recipe, partial(run_compiled, "views", transform))
    return [view.unflatten(0, (-1, B)) for view in views]


def augment(images, recipe, seeds, kind=GLOBAL_1):
    """Apply a recipe: images uint8 (N, 3, S, S), seeds (N,) on the CPU -> normalized float32."""
    if recipe.crop_transform:
        images = transform_each(recipe.crop_transform, images, fork(seeds, "crop_transform"))
    params = parameters(recipe, seeds, kind)
    return _on_device([images], params, recipe, transform)[0]  # eager: tests have many recipes


def _each(run, parts, params):
    """Return run(images, their rows of params) for each of parts, images (n, 3, S, S)."""
    rows = {name: p.split([len(images) for images in parts]) for name, p in params.items()}
    return [run(x, {name: p[i] for name, p in rows.items()}) for i, x in enumerate(parts)]


def _on_device(parts, params, recipe, run):
    """Transform parts, images (n, 3, S, S): by rows, or by masks with `run`, maybe compiled."""
    if parts[0].device.type in BY_ROWS:
        return _each(_in_chunks, parts, params)
    params = copy_packed(parts[0].device, _in_use(params, recipe))
    return _each(partial(run, masked=True), parts, params)


def _in_chunks(images, params):
    chunk = max(1, CPU_CHUNK // images.shape[2:].numel())
    return torch.cat(_each(transform, images.split(chunk), params))


def parameters(recipe, seeds, kind=GLOBAL_1):
    """Choose what happens to each sample: seeds (N,) -> dict of tensors with N rows, on the CPU.

    kind: of view, one for all samples or (N,).
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
        blur=(u[:, 13] < torch.tensor(recipe.blur)[kind]) * sigma,  # sigma in pixels, 0: off
        solarize=u[:, 15] < torch.tensor(recipe.solarize)[kind],
    )


def _in_use(params, recipe):
    """Leave out the parameters of what the recipe never does."""
    moves = recipe.rotate or recipe.elastic
    used = dict(flip=recipe.flip or moves, angle=moves, elastic=recipe.elastic)
    used |= dict.fromkeys(("factors", "hue", "order"), recipe.jitter)
    used |= dict(gray=recipe.gray, blur=any(recipe.blur), solarize=any(recipe.solarize))
    used["elastic_seeds"] = recipe.elastic
    return {name: p for name, p in params.items() if used[name]}


@torch.no_grad()
def transform(images, params, masked=False):
    """Apply what `parameters` chose: images uint8 (N, 3, S, S) -> normalized float32.

    masked: by masks, as a GPU does. An operation that is not in params happens to no sample.
    """
    p = params.get
    x = images.float() / 255
    x = warp(x, p("flip"), p("angle"), p("elastic"), p("elastic_seeds"), masked)
    rgb = x.split(1, dim=1)
    rgb = color_jitter(rgb, p("factors"), p("hue"), p("order"), masked)
    rgb = _where(p("gray"), masked, lambda *rgb: [gray(*rgb)] * 3, rgb)
    rgb = _where(p("blur"), masked, blur, rgb, p("blur"))
    rgb = _where(p("solarize"), masked, solarize, rgb)
    return normalize(rgb)


def _where(mask, masked, operation, tensors, *values):
    """Return operation(*tensors, *values) of the samples whose mask (N,) is not 0, else tensors.

    mask None: of no sample. masked: compute all and choose; otherwise those alone, in place.
    """
    if mask is None:
        return tensors
    if masked:
        mask = mask.view(-1, *[1] * (tensors[0].ndim - 1)) != 0
        pairs = zip(operation(*tensors, *values), tensors)
        return [torch.where(mask, new, old) for new, old in pairs]
    chosen = mask.nonzero()[:, 0]
    if not len(chosen):
        return tensors
    if len(chosen) == len(mask):
        return operation(*tensors, *values)
    for x, new in zip(tensors, operation(*(x[chosen] for x in (*tensors, *values)))):
        x[chosen] = new
    return tensors


def normalize(x):
    """Turn RGB in [0, 1], (N, 3, H, W) or three of (N, 1, H, W), into what networks take."""
    rgb = x.split(1, dim=1) if isinstance(x, torch.Tensor) else x
    return torch.cat([(c - mean) / std for c, mean, std in zip(rgb, MEAN, STD)], 1)


def denormalize(x):
    """Turn normalized (..., 3, H, W) back into RGB in [0, 1], for pictures."""
    channels = [channel * std + mean for channel, mean, std in zip(x.unbind(-3), MEAN, STD)]
    return torch.stack(channels, -3).clamp(0, 1)


def warp(x, flip, angle, alpha, elastic_seeds, masked=False):
    """Flip, rotate about the center, then deform: one bilinear sampling of x (N, 3, S, S).

    flip, angle (degrees), alpha (0: no elastic) and elastic_seeds are (N,).
    A grid holds for each output pixel the place to read. So it runs backwards: elastic, rotation,
    flip. Places outside the picture are black.
    Elastic may lead out of the rotated square, and the rotation from there back into the picture.
    In the sequence of operations such places are black. So a pixel's weight is the smaller of two
    shares: of its footprint in the rotated square, and in the picture (grid_sample's own weight).
    """
    if angle is None or not (masked or angle.any() or alpha.any()):
        return _where(flip, masked, lambda x: [x.flip(-1)], [x])[0]
    N, _, S, _ = x.shape
    centers = (2 * torch.arange(S, device=x.device) + 1) / S - 1  # of pixels, in [-1, 1]
    square = [centers.repeat(N, S, 1), centers[:, None].repeat(N, 1, S)]  # x and y, (N, S, S) each
    rotated = _where(alpha, masked, _deform, square, alpha, elastic_seeds)

    # Elementwise: a matrix product may be rounded to TF32 or, under autocast, to bf16.
    angle = torch.deg2rad(angle)
    motion = torch.stack([angle.cos(), angle.sin(), 1 - 2.0 * flip])
    cos, sin, mirror = motion[..., None, None]  # (N, 1, 1) each
    grid_x, grid_y = rotated
    grid = torch.stack([mirror * (cos * grid_x - sin * grid_y), sin * grid_x + cos * grid_y], -1)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _where(alpha, masked, _blacken, [x], *rotated, *grid.unbind(-1))[0]


def _deform(x, y, alpha, seeds):
    shift_x, shift_y = elastic_displacement(alpha, seeds, x.shape[-1]).unbind(-1)
    return [x + shift_x, y + shift_y]


def _blacken(x, *places):
    """Blacken what is read outside of the rotated square. places: x, y in it and in the picture."""
    inside = [((1 - place.abs()) * x.shape[-1] / 2 + 0.5).clamp(0, 1) for place in places]  # shares
    share = inside[0] * inside[1] / (inside[2] * inside[3]).clamp(min=1e-6)
    return [x * share.clamp(max=1)[:, None]]


def color_jitter(rgb, factors, hue, order, masked=False):
    """Change brightness, contrast, saturation and hue, each sample in its own order.

    rgb: three of (N, 1, H, W). factors (N, 3) of the first three, hue (N,), order (N, 4). As
    torchvision's ColorJitter. The first three are one formula, f x + (1 - f) anchor, clamped: the
    anchor is black, the mean of the image's gray, or the gray. So at each place of the order, all
    samples blend together. Those whose hue is due have f = 1 and then turn their hue.
    """
    if factors is None or not (masked or (factors != 1).any() or hue.any()):
        return rgb
    factor = factors.gather(1, order.clamp(max=2)).masked_fill(order == 3, 1)  # (N, 4)
    rest = 1 - factor
    weights = torch.stack([factor, rest * (order == 1), rest * (order == 2)])
    turns = hue[:, None] * (order == 3)
    for place in range(4):
        f, of_mean, of_gray = weights[:, :, place, None, None, None]  # (N, 1, 1, 1) each
        luma = gray(*rgb)
        anchor = of_gray * luma + of_mean * luma.mean((2, 3), keepdim=True)
        rgb = [(f * channel + anchor).clamp_(0, 1) for channel in rgb]
        rgb = _where(turns[:, place], masked, adjust_hue, rgb, turns[:, place])
    return rgb
