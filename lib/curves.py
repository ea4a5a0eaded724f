"""The log.jsonl of runs as a picture: loss terms, kNN, effective ranks, the wait for data.

A line style is a part of the representation, a color is a run; of a single run a part. Needs
matplotlib.
"""

import math
import os

from lib.config import UsageError
from lib.log import records

# prefixes of the log's fields, in this order
DRAWN = ("loss", "L_", "H_", "KL", "knn", "rank", "view_share", "data_wait")
STYLES = {"full": "o-", "ir": "s--", "ef": "^:"}  # part: its marker and line


def read_log(run):
    """Return the records of RUN/log.jsonl. UsageError if there is none."""
    path = os.path.join(run, "log.jsonl")
    try:
        os.stat(path)  # records takes a missing file for an empty one
        return records(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the out_dir of a run") from None


def panel_and_part(field):
    """Split 'knn_rotated_ir' into 'knn_rotated' and 'ir'; of other fields the part is 'full'."""
    stem, _, part = field.rpartition("_")
    return (stem, part) if part in STYLES else (field, "full")


def panels_of(logs):
    """Return {title: its fields} of logs, {run: records}, in the order of DRAWN."""
    fields = dict.fromkeys(name for log in logs.values() for record in log for name in record)
    panels = {}
    for start in DRAWN:
        for field in (name for name in fields if name.startswith(start)):
            panels.setdefault(panel_and_part(field)[0], []).append(field)
    return panels


def draw(runs):
    """Draw the logs of runs, a list of folders -> the picture's path in the first one's.

    It is curves.png, or compared.png of several runs.
    """
    logs = {run: read_log(run) for run in runs}
    panels = panels_of(logs)
    if not panels:
        raise UsageError(f"{', '.join(runs)}: nothing to draw yet; wait for the first log line")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("curves.png needs matplotlib: pip install matplotlib") from None
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 2.2 * rows), layout="constrained")
    figure.suptitle(", ".join(runs), fontsize=10)
    all_axes = list(figure.subplots(rows, 2, sharex=True, squeeze=False).flat)
    for axes, (title, fields) in zip(all_axes, panels.items()):
        _draw_panel(axes, logs, fields)
        axes.set_title(title, fontsize=9, loc="left")
        if title == "data_wait":
            axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    for axes in all_axes[-2:]:
        axes.set_xlabel("epoch", fontsize=8)
    path = os.path.join(runs[0], "curves.png" if len(runs) == 1 else "compared.png")
    figure.savefig(path, dpi=110)
    return path


def _draw_panel(axes, logs, fields):
    for number, (run, log) in enumerate(logs.items()):
        for field in fields:
            points = [(record["epoch"], record[field]) for record in log if field in record]
            _, part = panel_and_part(field)
            names = [run] * (len(logs) > 1) + [part] * (len(fields) > 1)
            color = number if len(logs) > 1 else list(STYLES).index(part)
            # some markers on a long line; a single point has no line
            style = dict(color=f"C{color}", markersize=4, markevery=1 + len(points) // 20)
            if points:
                axes.plot(*zip(*points), STYLES[part], label=" ".join(names), **style)
    if len(logs) > 1 or len(fields) > 1:
        axes.legend(fontsize=7)


def draw_if_possible(run):
    """Draw a run's curves.png; nothing where matplotlib is missing or the disk is full."""
    try:
        draw([run])
    except (UsageError, OSError):
        return
