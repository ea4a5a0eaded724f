"""The text files of a run: log.jsonl, each line written whole or not at all, and config.json."""

import errno
import json
import os
from pathlib import Path

from lib.config import UsageError


def append(path, numbers):
    """Append a line, whole or not at all; OSError if it cannot be written."""
    rounded = {k: float(f"{x:.7g}") if isinstance(x, float) else x for k, x in numbers.items()}
    line = json.dumps(rounded).encode() + b"\n"
    os.makedirs(os.path.dirname(path), exist_ok=True)  # someone may have removed it
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        if file.write(line) < len(line):
            file.truncate(end)  # half a line would spoil the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def replace(path, text):
    """Write a text file so that `path` always holds the old one or the new one, whole."""
    Path(f"{path}.partial").write_text(text)
    os.replace(f"{path}.partial", path)


def records(path):
    """Return the lines as dicts, without a last one that was cut short; [] if there is no file."""
    if not os.path.exists(path):
        return []
    found = []
    with open(path, errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                found += [dict(json.loads(line))] if line.endswith("\n") else []
            except (ValueError, TypeError):
                raise UsageError(
                    f"{path}: not a log, or line {number} is damaged; remove the line"
                ) from None
    return found


def cut(path, step):
    """Drop the lines of steps after `step`, which will be done again; at step 0 all of them."""
    if os.path.exists(path):
        lines = [r for r in records(path) if r["step"] <= step and step]
        replace(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_config(folder):
    """Return the options in a folder's config.json as a dict; {} if it has none."""
    try:
        with open(os.path.join(folder, "config.json")) as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
