"""Draw docs/method.png, the method as a picture: views, student and teacher, ir and ef, losses.

    python tools/method.py                 writes docs/method.png
    python tools/method.py picture.png     or another file

Blue is the invariant part ir, orange are the equivariant factors ef. Needs matplotlib.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib.config import UsageError
from lib.machine import run_main

PICTURE = os.path.normpath(os.path.join(__file__, "..", "..", "docs", "method.png"))
IR, EF, INK, PALE = "#2f6db5", "#d97a1c", "#333333", "#f2f2f2"
BROWN = "#7a4b3a", "#cfe3f2"  # of the house and the sky
WIDTH, HEIGHT = 18, 9.4  # of the drawing, in its own units
HOUSE = ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.1), (0, 0.9), (-0.8, 0.1))


def box(axes, x, y, width, height, text, color=INK, fill="white"):
    """Draw a rounded box around the center (x, y) with a text in it."""
    from matplotlib.patches import FancyBboxPatch

    look = dict(facecolor=fill, edgecolor=color, linewidth=1.4)
    look["boxstyle"] = "round,pad=0,rounding_size=0.15"
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, **look))
    axes.text(x, y, text, ha="center", va="center", color=color, linespacing=1.5)


def arrow(axes, *points, color=INK, style="-"):
    """Draw a line through the points; it ends in an arrowhead."""
    axes.plot(*zip(*points[:-1]), color=color, linewidth=1.4, linestyle=style)
    look = dict(arrowstyle="-|>", color=color, linewidth=1.4, linestyle=style)
    axes.annotate("", points[-1], points[-2], arrowprops=dict(look, shrinkA=0, shrinkB=0))


def view(axes, x, y, side, turn, colors, shift=0.0):
    """Draw an image: a house, rotated by `turn` degrees and shifted, in a square around (x, y)."""
    from matplotlib.transforms import Affine2D

    fill, sky = colors
    [frame] = axes.bar(x, side, side, y - side / 2, color=sky, edgecolor=INK)
    place = Affine2D().scale(max(0.4 * side, 0.5)).rotate_deg(turn).translate(x + shift, y - shift)
    [house] = axes.fill(*place.transform(HOUSE).T, color=fill)
    house.set_clip_path(frame)


def draw_views(axes):
    """Draw the image and its augmented views; arrows to the student and to the teacher."""
    view(axes, 1.2, 4.7, 1.7, 0, BROWN)
    axes.text(1.2, 3.4, "image", ha="center")
    arrow(axes, (2.2, 4.7), (3.1, 4.7))
    arrow(axes, (2.2, 5.4), (3.0, 7.3))
    axes.text(4.1, 8.65, "local views", ha="center")
    view(axes, 3.6, 7.8, 0.8, 60, ("#8a8a8a", "#e3e3e3"), -0.3)
    view(axes, 4.6, 7.8, 0.8, -20, ("#6a5a9a", "#e6ddf0"), 0.3)
    view(axes, 4.1, 5.45, 1.3, 35, BROWN)
    view(axes, 4.1, 3.95, 1.3, -50, ("#4a7a4a", "#dff0dc"))
    axes.text(4.1, 2.75, "2 global views", ha="center")
    arrow(axes, (5.15, 7.7), (5.75, 7.4))
    arrow(axes, (4.9, 4.9), (5.75, 6.5))
    arrow(axes, (4.9, 4.5), (5.75, 2.9))


def draw_networks(axes):
    """Draw student and teacher: backbone, z cut into ir and ef, the two heads."""
    for name, y, up in (("student", 7.0, 1), ("teacher", 2.4, -1)):  # mirrored
        box(axes, 6.8, y, 1.9, 1.7, f"{name}\n$f$", fill=PALE)
        arrow(axes, (7.8, y), (8.55, y))
        axes.text(9.0, y + 1.6 * up, "$z$", ha="center", va="center")
        for part, color, start, stop in (("ir", IR, -0.5, 1.3), ("ef", EF, -1.1, -0.5)):
            axes.bar(9.0, (stop - start) * up, 0.7, y + start * up, color=color)
            middle = y + (start + stop) / 2 * up
            axes.text(9.0, middle, part, color="white", ha="center", va="center")
            arrow(axes, (9.45, middle), (10.2, middle), color=color)
            box(axes, 10.9, middle, 1.3, 0.95, f"$h_{{{part}}}$", color=color)
    arrow(axes, (6.8, 6.05), (6.8, 3.35), style="--")
    axes.text(7.05, 4.7, "EMA of\nthe weights", va="center", fontsize=9)
    axes.text(6.8, 1.05, "no gradient", ha="center", fontsize=9)


def draw_losses(axes):
    """Draw the three losses and what each of them compares."""
    box(axes, 13.6, 6.8, 2.5, 1.1, "$L_{PReg}$\nequal norms")
    arrow(axes, (11.65, 7.3), (12.25, 7.05), style=":")
    arrow(axes, (11.65, 6.3), (12.25, 6.55), style=":")
    box(axes, 10.9, 4.7, 2.4, 1.1, "$L_{Orth}$\nviews differ", color=EF)
    arrow(axes, (10.9, 5.68), (10.9, 5.27), color=EF)
    arrow(axes, (10.9, 3.72), (10.9, 4.13), color=EF)
    box(axes, 16.2, 4.7, 2.4, 1.1, "$L_{CL}$\nviews agree", color=IR)
    arrow(axes, (11.6, 7.6), (16.2, 7.6), (16.2, 5.3), color=IR)
    arrow(axes, (11.6, 1.8), (16.2, 1.8), (16.2, 4.1), color=IR)
    total = r"$L = \alpha\,L_{CL} + \beta\,L_{Orth} + \lambda\,L_{PReg}$"
    axes.text(13.6, 0.7, total, ha="center", fontsize=12)


def main(argv):
    path = argv[0] if argv else PICTURE
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("the picture needs matplotlib: pip install matplotlib") from None
    with rc_context({"font.size": 10.5}):
        figure = Figure(figsize=(9, 9 * HEIGHT / WIDTH), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.set_axis_off()
        draw_views(axes)
        draw_networks(axes)
        draw_losses(axes)
        figure.savefig(path, dpi=200)
    print(path)


if __name__ == "__main__":
    run_main(main)
