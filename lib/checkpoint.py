"""Checkpoint files: written whole or not at all; checked before they are read."""

import argparse
import contextlib
import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

from lib.config import UsageError

import torch

CHECKPOINT, PREVIOUS = "ckpt.pt", "ckpt.prev.pt"  # of a run, and the one before


class Damaged(UsageError):
    """The content of a file is not what was written."""


def save_atomically(obj, path, previous=""):
    """Save obj so that `path` always holds the old file or the new one, whole; or an OSError.

    previous: another path, which gets the old file.
    """
    try:
        with open(f"{path}.partial", "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            _link(path, previous)
        os.replace(f"{path}.partial", path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.partial")  # it may be what fills the disk
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch hides it behind "unexpected pos"
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)  # the rename itself must reach the disk
    os.close(folder)


def _link(path, other):
    """Give the file of `path` a second name, `other`; on a file system without links, move it."""
    partial = f"{other}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.remove(partial)
    try:
        os.link(path, partial)
    except OSError:
        partial = path
    os.replace(partial, other)


def to_host(obj, copy):
    """Return obj, nested dicts, with its tensors on the host; copy: also those that are there."""
    if isinstance(obj, dict):
        return {key: to_host(value, copy) for key, value in obj.items()}
    return obj.to("cpu", copy=copy) if torch.is_tensor(obj) else obj


def read_checkpoint(path):
    """Load tensors and plain types. UsageError for anything else: no file can run code.

    Damaged if a checksum is wrong; torch does not check them. Files from before PyTorch 1.6 have no
    checksums.
    """
    allowed = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]  # DINO's, VMamba's
    try:
        check_sums(path)
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        cause = f"{error.strerror or error}; give the path of a checkpoint"
    except pickle.UnpicklingError:
        cause = "not a checkpoint; give a run's ckpt.pt or backbone.pt, or published weights"
        with open(path, "rb") as file:
            if file.read(1) in (b"P", b"\x80"):  # torch's zip, or a pickle
                cause = "refused, because it could run code; "
                cause += "give a file that torch.load(weights_only=True) reads"
    except Damaged as error:
        raise Damaged(f"{path}: {error}; copy it again{_or_the_one_before(path)}") from None
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        cause = f"not a checkpoint, or a damaged one ({type(error).__name__}); copy it again"
        raise Damaged(f"{path}: {cause}{_or_the_one_before(path)}") from None
    raise UsageError(f"{path}: {cause}")


def check_sums(path):
    """Raise Damaged if a member of torch's zip archive does not match its checksum."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # an older pickle, or none of torch's
            return
        try:
            with zipfile.ZipFile(file) as archive:
                wrong = archive.testzip()
        except Exception as error:  # a flipped bit can raise anything
            raise Damaged(f"damaged ({type(error).__name__})") from None
    if wrong:
        raise Damaged(f"damaged, {wrong} has a wrong checksum")


def _or_the_one_before(path):
    """Return a hint to use the previous checkpoint beside path, if there is one."""
    previous = Path(path).with_name(PREVIOUS)
    return f", or use {previous}" if Path(path).name == CHECKPOINT and previous.exists() else ""


def digest_of_weights(module):
    """Return eight hex digits that identify these weights."""
    return digest(x.cpu().contiguous().numpy().tobytes() for x in module.state_dict().values())


def digest(pieces):
    return hashlib.sha1(b"".join(pieces)).hexdigest()[:8]
