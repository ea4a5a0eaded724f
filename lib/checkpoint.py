"""Checkpoint files: written whole or not at all; checked before they are read."""

import argparse
import contextlib
import errno
import hashlib
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

from lib.config import UsageError

import torch

CHECKPOINT, PREVIOUS = "ckpt.pt", "ckpt.prev.pt"  # of a run, and the one before


class Damaged(UsageError):
    """The content of a file is not what was written. .cause: the message without its fix."""

    def __init__(self, cause, fix):
        super().__init__(f"{cause}; {fix}")
        self.cause = cause


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
    """Give the file of `path` a second name, `other`; on a file system without links, copy it."""
    partial = f"{other}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.remove(partial)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    os.replace(partial, other)


def to_host(obj):
    """Copy the tensors of obj, nested dicts, to the host."""
    if isinstance(obj, dict):
        return {key: to_host(value) for key, value in obj.items()}
    return obj.to("cpu", copy=True) if torch.is_tensor(obj) else obj


def read_checkpoint(path):
    """Load tensors and plain types. UsageError for anything else: no file can run code.

    Damaged if a checksum of torch's zip archive is wrong; torch does not check them. Files from
    before PyTorch 1.6 have no checksums.
    """
    allowed = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]  # DINO's, VMamba's
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        wrong = None
        if head == b"PK\3\4":
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
        if wrong is None:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True)
        cause = f"damaged, {wrong} has a wrong checksum"
    except pickle.UnpicklingError:
        if head != b"PK\3\4" and head[:1] != b"\x80":  # neither torch's zip nor a pickle
            fix = "give a run's ckpt.pt or backbone.pt, or published weights"
            raise Damaged(f"{path}: not a checkpoint", fix) from None
        fix = "give a file that torch.load(weights_only=True) reads"
        raise UsageError(f"{path}: refused, because it could run code; {fix}") from None
    except Exception as error:  # a flipped bit can raise anything, such as EINVAL of a wrong offset
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UsageError(f"{path}: does not fit into memory; free some") from None
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UsageError(f"{path}: {error.strerror}; give a checkpoint, or try again") from None
        cause = f"damaged, or not a checkpoint ({type(error).__name__})"
    fix = "copy it again"
    previous = Path(path).with_name(PREVIOUS)
    if Path(path).name == CHECKPOINT and previous.exists():
        fix += f", or use {previous}"
    raise Damaged(f"{path}: {cause}", fix)


def digest_of_weights(module):
    """Return eight hex digits that identify these weights."""
    return digest(x.cpu().contiguous().numpy().tobytes() for x in module.state_dict().values())


def digest(pieces):
    return hashlib.sha1(b"".join(pieces)).hexdigest()[:8]
