"""The built-in images: shapes on varied backgrounds, with masks, and videos of them.

The class is the shape; no shape looks the same upside down or on its side. As in the world, easy
attributes that all views of an image share go with the class, with exceptions: in `shapes` the
polarity (light or dark), in `shapes20k` also two hues and stripes.
Everything is a function of (seed, split, index), so nothing is downloaded or stored.
"""

import math

from lib.images import memory_images
from lib.outlines import SHAPES
from lib.rng import fork, uniforms

import torch

COUNTS = {  # --data=NAME -> images of each split
    "shapes": dict(train=8000, val=2000),  # gray: the class must be read from the shape
    "shapes20k": dict(train=20_000, val=10_000),  # in color: many things to learn; narrow intervals
}
EXCEPTIONS = 0.2  # share of images in which an attribute is drawn without regard to class
HUES = 5
UPRIGHT = 15  # degrees a shape may lean: so "up" has an answer, and rotation can be predicted


def shapes(split, size=64, count=None, seed=0, name="shapes"):
    """Return Images of (3, size, size): the first `count` of 'train' or 'val'; name: of COUNTS."""
    seeds, labels = _seeds_and_labels(split, count or COUNTS[name][split], seed)
    pieces = zip(seeds.split(500), labels.split(500))
    in_color = name == "shapes20k"
    pixels = torch.cat([draw_shapes(s, y, size, in_color)[0] for s, y in pieces])
    return memory_images(pixels, labels, list(SHAPES), f"{name} {split}")


def shape_masks(split, size, count, seed=0):
    """Return images of `shapes`, (count, 3, size, size), and masks, bool (count, size, size)."""
    return draw_shapes(*_seeds_and_labels(split, count, seed), size)


def moving_shapes(index, size, frames=16, seed=0):
    """Draw a video: two shapes move and turn in front of a background, the second one in front.

    Returns uint8 (frames, 3, size, size) and ids, uint8 (frames, size, size): 0 is the background.
    """
    time = torch.linspace(0, 1, frames)
    ids = torch.zeros(frames, size, size, dtype=torch.uint8)
    for i in range(2):
        object_seed = fork(seed, "video", index, i)
        labels = torch.full((frames,), (index + 3 * i) % len(SHAPES))
        facts = shape_facts(object_seed.expand(frames), labels)
        u = uniforms(fork(object_seed, "motion"), 5)
        start, end = (1.1 * u[:4] - 0.55).view(2, 2)
        facts["radius"] = 0.6 * facts["radius"]
        facts["center"] = start + time[:, None] * (end - start)
        facts["angle"] = facts["angle"] + 90 * (u[4] - 0.5) * time
        back, front, cover = paint_shapes(facts, labels, size)
        if i == 0:
            image = back
        image = image + cover * (front - image)
        ids[cover[:, 0] > 0.5] = i + 1
    return _with_grain(image, fork(seed, "video_grain", index, torch.arange(frames))), ids


def _seeds_and_labels(split, n, seed):
    index = torch.arange(n)
    return fork(seed, f"shapes_{split}", index), index % len(SHAPES)


def shape_facts(seeds, labels, in_color=False):
    """Draw what is free in an image, for sample seeds (n,) and labels (n,). In half image sides.

    Returns a dict: angle (n,) degrees counter-clockwise; radius (n,); center (n, 2), x right and y
    up; RGB colors front (n, 3), back (n, 2, 3); wave (n, 3), which mixes the two of the background:
    direction in turns, speed, phase.
    """
    u = uniforms(seeds, 32)  # (n, 32), a column for each property
    radius = 0.5 + 0.3 * u[:, 1]
    center = (2 * u[:, 2:4] - 1) * (0.9 - radius)[:, None]
    place = dict(angle=(2 * u[:, 0] - 1) * UPRIGHT, radius=radius, center=center)
    return place | (_colors if in_color else _grays)(u, labels)


def _attribute(of_class, n, drawn):
    """Return of_class (m,) in 0 .. n - 1; a share EXCEPTIONS is set by drawn (m,) in 0 .. 1."""
    drawn = drawn / EXCEPTIONS
    return torch.where(drawn < 1, (drawn * n).long(), of_class)


def _grays(u, labels):
    """Return shades of gray with a tint; half of the classes mostly light, half mostly dark."""
    is_light = _attribute(labels % 2, 2, u[:, 24])
    tint = 0.1 * (u[:, 4:16].view(-1, 4, 3) - 0.5)
    shade = 0.45 + 0.1 * u[:, 25, None]
    contrast = 0.05 * u[:, 23, None] * torch.ones(3)
    wave = torch.stack([u[:, 20], 2 + 14 * u[:, 21], u[:, 22]], 1)
    back = shade[:, None] + tint[:, 2:] + torch.stack([contrast, -contrast], 1)
    return dict(front=shade + 0.7 * (is_light[:, None] - 0.5) + tint[:, 0], back=back, wave=wave)


def _colors(u, labels):
    """Return colors and stripes. Each tells a part of the class, together they tell all."""
    is_light = _attribute(labels % 2, 2, u[:, 24])
    back_hue = _attribute(labels // 2, HUES, u[:, 25]) + 0.4 * (u[:, 28] - 0.5)
    front_hue = _attribute(labels % HUES, HUES, u[:, 26]) + 0.4 * (u[:, 29] - 0.5)
    has_stripes = _attribute(labels // 5, 2, u[:, 27])
    front_gray = 0.3 + 0.4 * is_light + 0.1 * (u[:, 4] - 0.5)
    back_gray = 0.7 - 0.4 * is_light + 0.1 * (u[:, 5] - 0.5)
    back = (back_gray[:, None] + _tint(back_hue))[:, None]  # (n, 1, 3)
    light_and_dark = 0.18 * torch.tensor([1.0, -1.0])[:, None]
    return dict(
        front=front_gray[:, None] + _tint(front_hue),
        back=back + has_stripes[:, None, None] * light_and_dark,
        wave=torch.stack([u[:, 20], 6 + 4 * u[:, 21], u[:, 22]], 1),
    )


def _tint(hue):
    """Return what a hue (n,) in 0 .. HUES adds to gray: (n, 3)."""
    turn = 2 * math.pi * hue[:, None] / HUES
    return 0.2 * torch.cos(turn + 2 * math.pi / 3 * torch.arange(3))


def draw_shapes(seeds, labels, size, in_color=False):
    """Draw images for sample seeds (n,) and labels (n,), indices into SHAPES.

    Returns uint8 (n, 3, size, size) and where the shape is, bool (n, size, size).
    """
    facts = shape_facts(seeds, labels, in_color)
    back, front, cover = paint_shapes(facts, labels, size)
    return _with_grain(back + cover * (front - back), seeds), cover[:, 0] > 0.5


def paint_shapes(facts, labels, size):
    """Paint the background (n, 3, size, size) and the shape's color (n, 3, 1, 1), in [0, 1].

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

    # the background: two colors, mixed by a plane wave
    direction, speed, phase = facts["wave"].unbind(1)
    along = (2 * math.pi * direction).cos() * x + (2 * math.pi * direction).sin() * y
    mix = 0.5 + 0.5 * torch.sin(speed * along + 2 * math.pi * phase)[:, None]  # (n, 1, size, size)
    back = facts["back"][:, 0] * mix + facts["back"][:, 1] * (1 - mix)
    return back, facts["front"], cover


def _with_grain(image, seeds):
    """Add a little noise to images (n, 3, S, S) in [0, 1]. Returns uint8."""
    grain = 0.06 * (uniforms(fork(seeds, "grain"), image[0].numel()).view(image.shape) - 0.5)
    return ((image + grain).clamp(0, 1) * 255).round().to(torch.uint8)
