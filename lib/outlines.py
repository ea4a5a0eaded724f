"""The outlines of the built-in shapes, ten classes, as signed distances.

p = (x, y), y up: coordinates in which a shape is upright and about 1 in radius. A distance is
roughly that of p to the outline, negative inside.
"""

import math

import torch

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
SHAPES = {  # name -> signed distance of p
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
