"""Files that survive whatever happens: checkpoints, and the state of an interrupted evaluation."""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

from lib import machine
from lib.config import UsageError

import torch

MACHINE = ("workers", "device", "out", "data_root", "download")  # options that change no number


def save_atomically(obj, path):
    """Save obj so that `path` always holds the old file or the new one, whole; or an OSError."""
    try:
        with open(f"{path}.partial", "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.partial", path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.partial")  # it may be what fills the disk
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch hides it behind its own "unexpected pos"
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)  # the rename itself must reach the disk
    os.close(folder)


def to_host(obj, copy):
    """Return obj, nested dicts, with its tensors on the host; copy: also those that are there."""
    if isinstance(obj, dict):
        return {key: to_host(value, copy) for key, value in obj.items()}
    return obj.to("cpu", copy=copy) if torch.is_tensor(obj) else obj


def read_checkpoint(path):
    """Load tensors and plain types; UsageError for anything else, so that no file can run code."""
    allowed = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]  # DINO's, VMamba's
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        cause = f"{error.strerror or error}; give the path of a checkpoint"
    except pickle.UnpicklingError:
        cause = "not a checkpoint; give a run's ckpt.pt or backbone.pt, or published weights"
        with open(path, "rb") as file:
            if file.read(1) in (b"P", b"\x80"):  # torch's zip, or a pickle
                cause = "refused, for it could run code; give one that weights_only=True reads"
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        cause = f"not a checkpoint, or a damaged one ({type(error).__name__}); copy it again"
    raise UsageError(f"{path}: {cause}")


def digest_of_weights(module):
    """Return eight letters that tell these weights from others."""
    return _digest(x.cpu().contiguous().numpy().tobytes() for x in module.state_dict().values())


def _digest(pieces):
    return hashlib.sha1(b"".join(pieces)).hexdigest()[:8]


class EvalState:
    """The file beside results.json from which an interrupted evaluation continues.

    protocol: of protocol_of; its digest in the file's name tells the evaluation from others.
    """

    def __init__(self, folder, protocol):
        differs = {name: value for name, value in protocol.items() if name not in MACHINE}
        digest = _digest([json.dumps(differs, sort_keys=True).encode()])
        self.path = os.path.join(folder, f"{protocol['task']}-{digest}.partial.pt")
        self.is_main = machine.rank_and_world()[0] == 0

    def exists(self):
        """Return whether there is something to continue."""
        return os.path.exists(self.path)

    def read(self, names):
        """Return the rows of what is finished, and all that was written, with at least `names`.

        The same on all ranks; [] and None if nothing was written.
        """
        is_read = self.is_main and self.exists()
        state = machine.broadcast(read_checkpoint(self.path) if is_read else None)
        if state is None:
            return [], None
        if not isinstance(state, dict) or not state.keys() >= set(names):
            raise UsageError(f"{self.path}: not the state of an evaluation; remove it")
        return state["rows"], state

    def write(self, **state):
        """Write rows=[...] of what is finished and the state of what is not."""
        if self.is_main:
            save_atomically(state, self.path)

    def remove(self):
        """Remove the file: the evaluation is finished."""
        if self.is_main:
            Path(self.path).unlink(missing_ok=True)
