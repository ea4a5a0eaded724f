"""The built-in images: textured shapes on varied backgrounds, with masks, and videos of them.

The class is the shape, all else is free; no shape looks the same upside down or on its side.
Everything is a function of (seed, split, index), so nothing is downloaded or stored.
"""

import math

from lib.images import memory_images
from lib.rng import fork, uniforms

import torch

COUNTS = {"train": 8000, "val": 2000}
UPRIGHT = 15  # degrees a shape may lean: so "up" has an answer, and rotation can be predicted


def shapes(split, size=64, count=None, seed=0):
    """Return Images of (3, size, size): the first `count` of 'train' (8000) or 'val' (2000)."""
    seeds, labels = _seeds_and_labels(split, count or COUNTS[split], seed)
    pieces = zip(seeds.split(500), labels.split(500))
    pixels = torch.cat([draw_shapes(s, y, size) for s, y in pieces])
    return memory_images(pixels, labels, list(SHAPES), f"shapes {split}")


def shape_masks(split, size, count, seed=0):
    """Return images of `shapes`, (count, 3, size, size), and masks, bool (count, size, size)."""
    seeds, labels = _seeds_and_labels(split, count, seed)
    cover = paint_shapes(shape_facts(seeds), labels, size)[2]
    return draw_shapes(seeds, labels, size), cover[:, 0] > 0.5


def moving_shapes(index, size, frames=16, objects=2, seed=0):
    """Draw a video: shapes move and turn in front of a background, the later ones in front.

    Returns uint8 (frames, 3, size, size) and ids, uint8 (frames, size, size): 0 is the background.
    """
    time = torch.linspace(0, 1, frames)
    ids = torch.zeros(frames, size, size, dtype=torch.uint8)
    for i in range(objects):
        object_seed = fork(seed, "video", index, i)
        facts = shape_facts(object_seed.expand(frames))
        u = uniforms(fork(object_seed, "motion"), 5)
        start, end = (1.1 * u[:4] - 0.55).view(2, 2)
        facts["radius"] = 0.6 * facts["radius"]
        facts["center"] = start + time[:, None] * (end - start)
        facts["angle"] = facts["angle"] + 90 * (u[4] - 0.5) * time
        labels = torch.full((frames,), (index + 3 * i) % len(SHAPES))
        back, front, cover = paint_shapes(facts, labels, size)
        if i == 0:
            image = back
        image = image + cover * (front - image)
        ids[cover[:, 0] > 0.5] = i + 1
    return _with_grain(image, fork(seed, "video_grain", index, torch.arange(frames))), ids


def _seeds_and_labels(split, n, seed):
    index = torch.arange(n)
    return fork(seed, f"shapes_{split}", index), index % len(SHAPES)


def shape_facts(seeds):
    """Draw what is free in an image, for sample seeds (n,). Lengths are in half image sides.

    Returns a dict: angle (n,) degrees counter-clockwise from upright; radius (n,); center (n, 2),
    x right and y up; front and back, two RGB colors each (n, 2, 3); waves (n, 2, 4), the textures.
    """
    u = uniforms(seeds, 32)  # (n, 32), a column for each property
    radius = 0.5 + 0.3 * u[:, 1]
    # Shades of gray with a tint, light on dark or dark on light. Free colors would be what tells
    # images apart, and a short training would find nothing else.
    tint = 0.1 * (u[:, 4:16].view(-1, 2, 2, 3) - 0.5)
    shade = 0.45 + 0.1 * u[:, 24, None, None]
    side = torch.where(u[:, 25] < 0.5, -0.35, 0.35)[:, None, None]
    return dict(
        angle=(2 * u[:, 0] - 1) * UPRIGHT,
        radius=radius,
        center=(2 * u[:, 2:4] - 1) * (0.9 - radius)[:, None],
        front=shade + side + tint[:, 0],
        back=shade + tint[:, 1],
        waves=u[:, 16:24].view(-1, 2, 4),
    )


def draw_shapes(seeds, labels, size):
    """Draw uint8 (n, 3, size, size) for sample seeds (n,) and labels (n,), indices into SHAPES."""
    back, front, cover = paint_shapes(shape_facts(seeds), labels, size)
    return _with_grain(back + cover * (front - back), seeds)


def paint_shapes(facts, labels, size):
    """Paint background and texture of the shape, (n, 3, size, size) in [0, 1] each, from facts.

    Returns also how far the shape covers each pixel, (n, 1, size, size), antialiased.
    """
    facts = {name: value[..., None, None] for name, value in facts.items()}
    centers = (2 * torch.arange(size) + 1) / size - 1  # of the pixels
    y, x = torch.meshgrid(-centers, centers, indexing="ij")  # (size, size) in [-1, 1], y up

    # the shape's own coordinates (n, size, size): turned upright, of radius 1
    angle = torch.deg2rad(facts["angle"])
    radius = facts["radius"]
    center_x, center_y = facts["center"].unbind(1)
    own_x = (angle.cos() * (x - center_x) + angle.sin() * (y - center_y)) / radius
    own_y = (-angle.sin() * (x - center_x) + angle.cos() * (y - center_y)) / radius
    distance = torch.empty_like(own_x)
    for label, signed_distance in enumerate(SHAPES.values()):
        rows = labels == label
        distance[rows] = signed_distance((own_x[rows], own_y[rows]))
    cover = (0.5 - distance * radius * size / 2).clamp(0, 1)[:, None]
    front_wave, back_wave = facts["waves"].unbind(1)
    back = _texture(facts["back"], back_wave, x, y)
    return back, _texture(facts["front"], front_wave, x, y), cover


def _texture(colors, wave, x, y):
    """Mix two colors (n, 2, 3, 1, 1) by a plane wave (n, 4, 1, 1): from plain to stripes."""
    direction, frequency, phase, contrast = wave.unbind(1)
    direction = 2 * math.pi * direction
    along = direction.cos() * x + direction.sin() * y
    wave = torch.sin((2 + 14 * frequency) * along + 2 * math.pi * phase)
    mix = (0.5 + 0.5 * contrast * wave)[:, None]  # (n, 1, size, size)
    return colors[:, 0] * mix + colors[:, 1] * (1 - mix)


def _with_grain(image, seeds):
    """Add a little noise to images (n, 3, S, S) in [0, 1]. Returns uint8."""
    grain = 0.06 * (uniforms(fork(seeds, "grain"), image[0].numel()).view(image.shape) - 0.5)
    return ((image + grain).clamp(0, 1) * 255).round().to(torch.uint8)


_join, _meet = torch.minimum, torch.maximum  # two signed distances: inside either, inside both


def _box(p, x, y, half_width, half_height):
    return _meet((p[0] - x).abs() - half_width, (p[1] - y).abs() - half_height)


def _disc(p, x, y, radius):
    return ((p[0] - x).square() + (p[1] - y).square()).sqrt() - radius


def _wedge(p, tip, base, half):
    """A triangle with its tip at (0, tip) and its base of width 2 half at height `base`."""
    lean = half / (tip - base)
    side = (p[0].abs() + (p[1] - tip) * lean) / math.hypot(1, lean)
    return _meet(side, base - p[1] if tip > base else p[1] - base)


# fmt: off
SHAPES = {  # name -> signed distance (roughly; negative inside) to the shape from p = (x, y), y up
    "arrow": lambda p: _join(_box(p, 0, -0.4, 0.22, 0.6), _wedge(p, 1, 0, 0.75)),
    "crescent": lambda p: _meet(_disc(p, 0, -0.1, 0.9), -_disc(p, 0, 0.45, 0.75)),
    "cup": lambda p: _meet(_box(p, 0, 0, 0.75, 0.85), -_box(p, 0, 0.35, 0.4, 0.85)),
    "drop": lambda p: _join(_disc(p, 0, -0.35, 0.6), _wedge(p, 1, -0.1, 0.52)),
    "flag": lambda p: _join(_box(p, -0.6, 0, 0.15, 1), _box(p, 0.1, 0.5, 0.75, 0.45)),
    "house": lambda p: _meet(_join(_box(p, 0, -0.45, 0.6, 0.5), _wedge(p, 0.95, 0, 0.95)),
                             -_box(p, 0, -0.6, 0.2, 0.4)),
    "key": lambda p: _join(_meet(_disc(p, 0, 0.5, 0.5), -_disc(p, 0, 0.5, 0.24)),
                           _join(_box(p, 0, -0.45, 0.14, 0.55), _box(p, 0.25, -0.8, 0.25, 0.12))),
    "ell": lambda p: _join(_box(p, -0.4, 0, 0.25, 0.95), _box(p, 0.1, -0.7, 0.7, 0.25)),
    "mushroom": lambda p: _join(_meet(_disc(p, 0, 0, 0.9), -p[1]), _box(p, 0, -0.45, 0.22, 0.5)),
    "tee": lambda p: _join(_box(p, 0, 0.7, 0.85, 0.25), _box(p, 0, -0.15, 0.22, 0.8)),
}
# fmt: on
