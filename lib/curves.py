"""The log.jsonl of runs as a picture: loss terms, kNN, effective ranks, the wait for data.

A color is a run, a line style is a part of the representation. Needs matplotlib.
"""

import json
import os

from lib.config import UsageError

DRAWN = ("loss", "L_", "knn", "rank", "data_wait")  # beginnings of fields of the log, in this order
STYLES = {"full": "-", "ir": "--", "ef": ":"}


def read_log(run):
    """Return the records of RUN/log.jsonl; a last line that a crash cut short is left out."""
    path = os.path.join(run, "log.jsonl")
    try:
        with open(path) as file:
            return [json.loads(line) for line in file if line.endswith("\n")]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the out_dir of a run") from None
    except ValueError:
        raise UsageError(f"{path}: not a log of train.py; give the out_dir of a run") from None


def panel_and_part(field):
    """Split 'knn_rotated_ir' into 'knn_rotated' and 'ir'; of other fields the part is 'full'."""
    stem, _, part = field.rpartition("_")
    return (stem, part) if part in STYLES else (field, "full")


def draw(runs):
    """Draw the logs of runs, a list of folders -> the picture's path, curves.png in the first."""
    logs = {run: read_log(run) for run in runs}
    fields = dict.fromkeys(name for log in logs.values() for record in log for name in record)
    panels = {}  # title -> its fields
    for start in DRAWN:
        for field in (name for name in fields if name.startswith(start)):
            panels.setdefault(panel_and_part(field)[0], []).append(field)
    if not panels:
        raise UsageError(f"{', '.join(runs)}: nothing to draw yet; wait for the first log line")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("curves.png needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 1.8 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False).flat
    for axes, (title, shown) in zip(all_axes, panels.items()):
        for color, (run, log) in enumerate(logs.items()):
            for field in shown:
                points = [(record["epoch"], record[field]) for record in log if field in record]
                _, part = panel_and_part(field)
                label = run if field == title else f"{run} {part}"
                if points:
                    axes.plot(*zip(*points), STYLES[part], color=f"C{color}", label=label)
        axes.set_ylabel(title)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("epoch")
    path = os.path.join(runs[0], "curves.png")
    figure.savefig(path, dpi=110)
    return path


def draw_if_possible(run):
    """Draw a run's curves.png; nothing where matplotlib is missing or the disk is full."""
    try:
        draw([run])
    except (UsageError, OSError):
        return
