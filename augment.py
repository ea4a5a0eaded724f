"""The views (paper appendix, and the authors' scripts for the figures), in two stages.

Worker, one image at a time: `crop_views` cuts and resizes the random crops, uint8 in and out, antialiased bicubic.
Device, a whole batch at a time: `augment` = `parameters` (a vector over the batch for each operation, on the CPU) then `transform`:
flip, rotation and elastic as ONE sampling grid with one bilinear gather; jitter; grey; blur; solarise; normalise.

Operations and their order are torchvision's, and tests/test_augment.py holds each against it. Where ours differs: rotation is bilinear
(torchvision's default is nearest), intermediate images are not rounded to uint8, the blur is a true Gaussian of 13 taps (DINO's is Pillow's
approximation). Every draw is a function of a sample's key (draws.py).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from draws import key, noise, uniforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in [0, 1]


class Recipe(NamedTuple):
    """What happens to a crop. Probabilities of blur and solarise: for the first global view, the second, the local ones."""

    flip: float = 0.0  # probability
    rotate: float = 0.0  # degrees: uniform in -rotate .. rotate, black corners
    elastic: float = 0.0  # probability of the elastic transformation ...
    elastic_alpha: float = 100.0  # ... its strength (torchvision's alpha); sigma is ELASTIC_SIGMA
    jitter: float = 0.0  # probability of colour jitter ...
    jitter_strength: tuple = (0.4, 0.4, 0.2, 0.1)  # ... brightness, contrast, saturation, hue
    grey: float = 0.0
    blur: tuple = (0.0, 0.0, 0.0)
    solarize: tuple = (0.0, 0.0, 0.0)


BAUG = Recipe(flip=0.5, jitter=0.8, grey=0.2, blur=(1.0, 0.1, 0.5), solarize=(0.0, 0.2, 0.0))
CAUG = BAUG._replace(rotate=90)
RECIPES = {"baug": BAUG, "caug": CAUG, "caug+": CAUG._replace(elastic=0.5)}

_CJ = Recipe(jitter=1.0, jitter_strength=(0.4, 0.4, 0.4, 0.1))
PERTURBATIONS = {  # of test images; 'ro' alone and the last four are not in the paper's main table
    "orig": Recipe(),
    "cj": _CJ,
    "cj+flip": _CJ._replace(flip=1.0),
    "cj+ro": _CJ._replace(rotate=90),
    "cj+ro+et": _CJ._replace(rotate=90, elastic=1.0),
    "ro": Recipe(rotate=90),
    "cj+ro180": _CJ._replace(rotate=180),
    "cj+ro+et50": _CJ._replace(rotate=90, elastic=1.0, elastic_alpha=50),
    "cj+ro+et150": _CJ._replace(rotate=90, elastic=1.0, elastic_alpha=150),
}
GLOBAL_1, GLOBAL_2, LOCAL = range(
    3
)  # kinds of view: the index into Recipe.blur and Recipe.solarize
ELASTIC_SIGMA, ELASTIC_RADIUS = (
    5.0,
    20,
)  # pixels, whatever the crop's size; torchvision's kernel of 8 sigma + 1 taps
BLUR_SIGMA, BLUR_RADIUS = (0.1, 2.0), 6
CPU_CHUNK = (
    1 << 17
)  # pixels that a CPU transforms at a time: they and their temporaries stay in its cache, 1.7x faster than whole batches

# ------------------------------------------------------------------------------------------------ worker stage


def crop_views(image, key_, global_size, local_size, local_crops, global_scale, local_scale):
    """image uint8 (3, H, W), key_ () int64 -> global crops uint8 (2, 3, G, G), local crops uint8 (L, 3, l, l)."""
    return (
        random_crops(image, key(key_, 0), 2, global_size, global_scale),
        random_crops(image, key(key_, 1), local_crops, local_size, local_scale),
    )


def random_crops(image, key_, n, size, scale):
    """n random resized crops of image uint8 (3, H, W) -> uint8 (n, 3, size, size)."""
    if n == 0:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    boxes = crop_boxes(*image.shape[1:], uniforms(key(key_, torch.arange(n)), 22), scale)
    return torch.stack(
        [resize(image[:, top : top + h, left : left + w], size, size) for top, left, h, w in boxes]
    )


def crop_boxes(H, W, u, scale, aspect=(3 / 4, 4 / 3)):
    """u (n, 22) uniforms -> n boxes (top, left, height, width): area uniform in `scale` of the image, log aspect uniform.

    torchvision's RandomResizedCrop: the first of 10 draws that fits, else the largest centred crop within the aspect limits."""
    low, high = math.log(aspect[0]), math.log(aspect[1])
    boxes = []
    for *draws, u_top, u_left in u.tolist():
        for u_area, u_aspect in zip(draws[::2], draws[1::2]):
            area = H * W * (scale[0] + u_area * (scale[1] - scale[0]))
            ratio = math.exp(low + u_aspect * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= W and 0 < h <= H:
                boxes.append((int(u_top * (H - h + 1)), int(u_left * (W - w + 1)), h, w))
                break
        else:
            w, h = min(W, max(1, round(H * aspect[1]))), min(H, max(1, round(W / aspect[0])))
            boxes.append(((H - h) // 2, (W - w) // 2, h, w))
    return boxes


def resize(image, h, w):
    """image uint8 (3, H, W) -> uint8 (3, h, w), bicubic, antialiased: the one interpolation of the project, training and test."""
    if image.shape[1:] == (h, w):
        return image
    return F.interpolate(image[None], size=(h, w), mode="bicubic", antialias=True)[0]


def center_crop(image, size):
    """image uint8 (3, H, W) -> uint8 (3, size, size): the shorter side to 8/7 of size (256 for 224), then the centre.

    An image whose shorter side is below that is not enlarged more than it takes to fill the crop, so small images lose no border."""
    _, H, W = image.shape
    side = min(max(size, min(H, W)), size * 8 // 7)
    h, w = max(side, round(H * side / min(H, W))), max(side, round(W * side / min(H, W)))
    top, left = (h - size) // 2, (w - size) // 2
    return resize(image, h, w)[:, top : top + size, left : left + size]


# ------------------------------------------------------------------------------------------------ device stage


def augment(images, recipe, keys, kind=GLOBAL_1):
    """images uint8 (N, 3, S, S), keys (N,) int64 on the CPU -> normalised float32 (N, 3, S, S) on the images' device."""
    params = parameters(recipe, keys, kind)
    if images.is_cuda:
        return transform(images, params)
    n = max(1, CPU_CHUNK // images[0, 0].numel())
    out = torch.empty(images.shape)
    for i in range(0, len(images), n):
        out[i : i + n] = transform(
            images[i : i + n], {name: values[i : i + n] for name, values in params.items()}
        )
    return out


def augment_views(global_crops, local_crops, keys, recipe):
    """What the network sees: global crops uint8 (B, 2, 3, G, G), local crops (B, L, 3, l, l), keys (B,) of the samples
    -> [(2, B, 3, G, G)] or [(2, B, 3, G, G), (L, B, 3, l, l)], normalised float32; each crop with draws of its own."""
    first = augment(global_crops[:, 0], recipe, key(keys, 10), GLOBAL_1)
    second = augment(global_crops[:, 1], recipe, key(keys, 11), GLOBAL_2)
    B, L = local_crops.shape[:2]
    if L == 0:
        return [torch.stack([first, second])]
    local_keys = key(keys, 12 + torch.arange(L)[:, None])  # (L, B)
    local = augment(local_crops.transpose(0, 1).flatten(0, 1), recipe, local_keys.flatten(), LOCAL)
    return [torch.stack([first, second]), local.unflatten(0, (L, B))]


def parameters(recipe, keys, kind=GLOBAL_1):
    """A value for each sample and operation -> dict of tensors with N rows, on the CPU so that branching on them waits for no device."""
    u = uniforms(
        key(keys, 2), 16
    )  # (N, 16); a draw has its own column, so recipes that share an operation share its draws
    jitter = u[:, 3] < recipe.jitter
    strength = torch.tensor(recipe.jitter_strength)
    factors = torch.where(jitter[:, None], 1 + (2 * u[:, 4:7] - 1) * strength[:3], 1.0)
    return dict(
        flip=u[:, 0] < recipe.flip,
        angle=(2 * u[:, 1] - 1) * recipe.rotate,  # degrees, counter-clockwise
        elastic=(u[:, 2] < recipe.elastic) * recipe.elastic_alpha,  # alpha, 0: none
        elastic_key=key(keys, 3),
        factors=factors,  # (N, 3) of brightness, contrast, saturation; 1: unchanged
        hue=jitter * (2 * u[:, 7] - 1) * strength[3],  # turns of the colour circle, 0: unchanged
        order=u[:, 8:12].argsort(
            dim=1
        ),  # (N, 4): a uniform permutation of the four operations of the jitter
        grey=u[:, 12] < recipe.grey,
        blur=(u[:, 13] < recipe.blur[kind])
        * (BLUR_SIGMA[0] + u[:, 14] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])),  # sigma in pixels, 0: none
        solarize=u[:, 15] < recipe.solarize[kind],
    )


@torch.no_grad()
def transform(images, params):
    """images uint8 (N, 3, S, S) and what `parameters` returns -> normalised float32 (N, 3, S, S)."""
    x = images.float() / 255
    x = warp(x, params["flip"], params["angle"], params["elastic"], params["elastic_key"])
    x = color_jitter(x, params["factors"], params["hue"], params["order"])
    x = _on_rows(
        x, params["grey"], lambda rows, _: grey(rows).repeat(1, 3, 1, 1)
    )  # expanded it could not be written to
    x = _on_rows(x, params["blur"] > 0, lambda rows, chosen: blur(rows, params["blur"][chosen]))
    x = _on_rows(
        x, params["solarize"], lambda rows, _: torch.where(rows >= 128 / 255, 1 - rows, rows)
    )
    return normalize(x)


def normalize(x):
    """RGB in [0, 1] (N, 3, H, W) -> as networks take it."""
    return torch.stack(
        [(channel - mean) / std for channel, mean, std in zip(x.unbind(1), MEAN, STD)], 1
    )


def to_device(device, values):
    """A CPU tensor on `device`; to a GPU through pinned memory, from which the copy does not make us wait."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def _on_rows(x, mask, function):
    """function(rows, their indices) on the rows of x (N, ...) where mask (N,), a CPU tensor, is true; x may be changed in place."""
    chosen = mask.nonzero()[:, 0]
    if len(chosen) == len(x):
        return function(x, chosen)
    if len(chosen):
        on_device = to_device(x.device, chosen)
        x[on_device] = function(x[on_device], chosen)
    return x


def warp(x, flip, angle, alpha, elastic_key):
    """Flip, then rotation about the centre, then elastic: x (N, 3, S, S) resampled once, bilinearly, outside is 0.

    A grid runs backwards: an output pixel p lies at c = p + displacement in the rotated image, from there at c' = R c in the flipped one,
    and there at the mirrored x. Where c leaves the rotated square the result must be black although R may lead back into the picture: the
    gather, which is zero outside the picture, has weighted by the footprint of c' in the picture, and what counts is the smaller of c's and that."""
    N, _, S, _ = x.shape
    if not angle.any() and not alpha.any():
        return _on_rows(x, flip, lambda rows, _: rows.flip(-1))
    centres = (2 * torch.arange(S, device=x.device) + 1) / S - 1  # of pixels, in [-1, 1]
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).repeat(
        N, 1, 1, 1
    )  # (N, S, S, 2) of (x, y)
    elastic = alpha.nonzero()[:, 0]
    on_device = to_device(x.device, elastic)
    if len(elastic):
        grid[on_device] += elastic_displacement(
            to_device(x.device, alpha[elastic]), to_device(x.device, elastic_key[elastic]), S
        )
        in_rotated = _inside(grid[on_device])  # (n, S, S)
    radians = torch.deg2rad(angle)
    cos, sin, mirror = to_device(
        x.device, torch.stack([radians.cos(), radians.sin(), 1 - 2.0 * flip])
    )[:, :, None, None]  # (N, 1, 1) each
    grid_x, grid_y = grid.unbind(
        -1
    )  # elementwise, for a matrix product might be rounded to TF32 or, under autocast, to bf16
    grid = torch.stack([mirror * (cos * grid_x - sin * grid_y), sin * grid_x + cos * grid_y], -1)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if len(elastic):
        x[on_device] *= (in_rotated / _inside(grid[on_device]).clamp(min=1e-6)).clamp(max=1)[
            :, None
        ]
    return x


def _inside(grid):
    """grid (n, S, S, 2) -> (n, S, S): the share of a pixel's bilinear footprint that lies within the square."""
    return ((1 - grid.abs()) * grid.shape[1] / 2 + 0.5).clamp(0, 1).prod(-1)


def elastic_displacement(alpha, keys, S):
    """alpha (n,), keys (n,) -> displacements (n, S, S, 2) in units of half the image's side: uniform noise in [-1, 1), smoothed, times
    alpha / S (torchvision's ElasticTransform); alpha / 60 pixels in the mean square at 224, 1.3 times that at 32, where mirrored borders take part."""
    smooth = gaussian_matrix(
        S, torch.full((1,), ELASTIC_SIGMA, device=alpha.device), ELASTIC_RADIUS
    )  # (1, S, S)
    field = smooth @ noise(keys, 2 * S * S).view(-1, 2, S, S) @ smooth.mT
    return (field * (alpha / S)[:, None, None, None]).permute(0, 2, 3, 1)


def gaussian_matrix(S, sigma, radius):
    """sigma (n,) -> (n, S, S): multiplying a column of S pixels by it is a Gaussian blur of 2 radius + 1 taps with mirrored borders.

    A blur is two such products: fewer operations than the taps would suggest, and matrix products are what the machine does best."""
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (taps / sigma[:, None]).square())
    weight = weight / weight.sum(1, keepdim=True)  # (n, taps)
    source = (
        torch.arange(S, device=sigma.device)[:, None] + taps
    )  # (S, taps), beyond the border for some
    period = max(2 * S - 2, 1)
    source = source % period
    source = torch.where(
        source < S, source, period - source
    )  # mirrored without repeating the border pixel
    matrix = torch.zeros(len(sigma), S, S, device=sigma.device)
    return matrix.scatter_add_(
        2, source.expand(len(sigma), S, -1), weight[:, None].expand(-1, S, -1)
    )


def blur(x, sigma):
    """x (N, 3, S, S), sigma (N,) pixels -> the same, blurred."""
    matrix = gaussian_matrix(x.shape[-1], to_device(x.device, sigma), BLUR_RADIUS)[:, None]
    return matrix @ x @ matrix.mT


def grey(x):
    """x (N, 3, H, W) -> luma (N, 1, H, W), ITU-R 601-2."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def color_jitter(x, factors, hue, order):
    """Brightness, contrast, saturation (factors (N, 3)) and hue (N,), each sample in its own order (N, 4), as torchvision's ColorJitter.

    The first three are one blend f x + (1 - f) anchor, clamped: the anchor is black, the image's mean grey, or its grey. So in each of the
    four places of the order all samples blend together, those whose hue is due with f = 1, and these then turn their hue."""
    if (factors == 1).all() and not hue.any():
        return x
    for place in range(4):
        due = order[:, place]  # (N,): 0 brightness, 1 contrast, 2 saturation, 3 hue
        factor = factors.gather(1, due.clamp(max=2)[:, None])[:, 0].masked_fill(due == 3, 1)
        f, of_mean, of_grey = (
            to_device(x.device, v)[:, None, None, None]
            for v in (factor, (1 - factor) * (due == 1), (1 - factor) * (due == 2))
        )
        luma = grey(x)
        x = (f * x + (of_grey * luma + of_mean * luma.mean((2, 3), keepdim=True))).clamp_(0, 1)
        x = _on_rows(
            x,
            (due == 3) & (hue != 0),
            lambda rows, chosen: turn_hue(rows, to_device(x.device, hue[chosen])),
        )
    return x


def turn_hue(x, turns):
    """x (N, 3, H, W) in [0, 1] with its hue turned by (N,) turns of the colour circle, value and saturation kept.

    Through HSV: with chroma c = max - min, a channel is max - c * clamp(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6, n = 5, 3, 1."""
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    scale = 1 / torch.where(chroma > 0, chroma, 1)  # a grey pixel has no hue: any will do
    sextant = torch.where(
        high == r, (g - b) * scale, torch.where(high == g, 2 + (b - r) * scale, 4 + (r - g) * scale)
    )
    sextant = sextant + 6 * turns[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(sextant + n, 6)
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def denormalize(x):
    """Normalised (..., 3, H, W) -> RGB in [0, 1], for pictures."""
    return (
        x * torch.tensor(STD, device=x.device)[:, None, None]
        + torch.tensor(MEAN, device=x.device)[:, None, None]
    ).clamp(0, 1)
