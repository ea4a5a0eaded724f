"""Rows of an evaluation, their table, and results.json."""

import base64
import datetime
import functools
import json
import os
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path

from lib import log, machine
from lib.checkpoint import digest, digest_of_weights
from lib.config import UsageError

import numpy as np


def result_row(row, part, dims, right, save_correct=False, **facts):
    """Make a row of results.json from right (n,) bool: how many are, in %.

    facts: test, seed, where there are such classifier, lr, metric. save_correct: keep `right`.
    """
    value = round(percent(right), 2)
    facts = dict(row=row, part=part, dims=dims, metric="top1", value=value, n=len(right)) | facts
    return facts | dict(right=pack_correct(right)) if save_correct else facts


def percent(right):
    """Return how many of right (n,) bool are True, in %."""
    return 100 * right.double().mean().item()


def pack_correct(right):
    """Return right (n,) bool as text, one bit per image (base64)."""
    return base64.b64encode(np.packbits(right.cpu().numpy())).decode()


def unpack_correct(text, n):
    """Return the (n,) bool of pack_correct, a NumPy array."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(bool)


def table_lines(rows):
    """Yield the lines of a table, for the screen and docs/; over several seeds mean ± std.

    A column is a metric; where rows have a classifier, a test. Rows with an interval, of
    equivariance.py, have two more tables: shares and parameters by test.
    """
    on_views = [row for row in rows if "interval" in row]
    main = [row for row in rows if "interval" not in row or row["test"] == "all"]
    kind = "classifier" if "classifier" in main[0] else ""
    yield from _table_lines(main, "test" if kind else "metric", kind)
    for is_share in (True, False):
        of_table = [row for row in on_views if row["metric"].startswith("view share") == is_share]
        if of_table:
            yield from ("", *_table_lines(of_table, "test", "metric"))


def _table_lines(rows, column, kind):
    """Yield a table: a column for each row[column]; kind: a key to show beside the dims, or ""."""
    names = list(dict.fromkeys(row[column] for row in rows))
    cells = {}
    for row in rows:
        label = ", ".join(filter(None, (row["row"], row["part"])))
        line = cells.setdefault((label, row["dims"], row.get(kind, "")), {})
        line.setdefault(row[column], []).append(row["value"])
    width = max(27, *(len(label) for label, *_ in cells))
    kind_width = max(len(of_kind) for *_, of_kind in cells)

    def line(label, dims, of_kind, values):
        left = [f"{label:{width}}", f"{dims:4}", f"{of_kind:{kind_width}}"]
        return f"| {' | '.join([*left[: 2 + bool(kind)], *values])} |"

    yield line("in %", "dims", kind, names)
    yield "|---|--:|" + "---|" * bool(kind) + "--:|" * len(names)
    for left, values in cells.items():
        yield line(*left, [f"{_mean_and_std(values.get(n, [])):>{len(n)}}" for n in names])


def _mean_and_std(values):
    std = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{std}" if values else ""


def read_results(path):
    """Return the list of evaluations in the JSON file `path`; [] if it does not exist."""
    try:
        runs = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return []
    except ValueError:
        runs = None
    if not isinstance(runs, list):
        raise UsageError(f"{path}: not a JSON list of results; move it away")
    return runs


@functools.cache
def revision():
    """Return git's name of this revision; of changed code 'a27829e-dirty' and a digest; or None."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    commands = [[*git, "describe", "--always", "--dirty"], [*git, "diff", "HEAD", "--", "*.py"]]
    try:
        name, diff = (subprocess.run(c, capture_output=True).stdout for c in commands)
    except OSError:  # no git on this machine
        return None
    changed = f".{digest([diff])}" if diff else ""
    return name.decode().strip() + changed or None


def append_results(path, task, protocol, seconds, rows):
    """Append an evaluation to the list in the JSON file `path`."""
    runs = read_results(path)
    date = datetime.datetime.now().isoformat(timespec="seconds")
    run = dict(task=task, protocol=protocol, commit=revision(), date=date)
    runs.append(run | dict(seconds=round(seconds, 1), rows=rows))
    log.replace(path, json.dumps(runs, indent=1))


def protocol_of(config, models, here, **facts):
    """Return what results.json tells of an evaluation: its options, weights and `facts`."""
    used = {name: value for name, value in asdict(config).items() if name not in config.unused}
    weights = {model.row: digest_of_weights(model.backbone) for model in models}
    facts |= dict(arch=models[-1].trained["arch"], precision=here.precision, weights=weights)
    return used | facts


def finish(state, protocol, seconds, rows, more=()):
    """Print the table of rows and `more`, append rows to results.json, remove the state."""
    path = os.path.join(os.path.dirname(state.path), "results.json")
    if state.is_main:
        print("", *table_lines([*rows, *more]), "", sep="\n")
        best = [row for row in rows if row.get("classifier") == "linear, chosen lr"]
        rates = dict.fromkeys("{row} {part} {lr:g} (seed {seed})".format(**row) for row in best)
        if rates:
            print(f"chosen learning rates: {', '.join(rates)}")
        append_results(path, protocol["task"], protocol, seconds, rows)
        print(f"{seconds:.0f} s; every number with its protocol is in {path}", flush=True)
    state.remove()
    machine.wait_for_ranks()
