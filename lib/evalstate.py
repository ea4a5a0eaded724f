"""The state of an interrupted evaluation, from which it continues."""

import json
import os
from pathlib import Path

from lib import machine
from lib.checkpoint import digest, read_checkpoint, save_atomically
from lib.config import UsageError

MACHINE = ("workers", "device", "out", "data_root", "download")  # options that change no number


class EvalState:
    """The file beside results.json from which an interrupted evaluation continues.

    protocol: of protocol_of; its digest in the file's name tells the evaluation from others.
    """

    def __init__(self, folder, protocol):
        differs = {name: value for name, value in protocol.items() if name not in MACHINE}
        name = digest([json.dumps(differs, sort_keys=True).encode()])
        self.path = os.path.join(folder, f"{protocol['task']}-{name}.partial.pt")
        self.is_main = machine.rank_and_world()[0] == 0

    def exists(self):
        """Return whether there is something to continue."""
        return os.path.exists(self.path)

    def read(self, names):
        """Return the finished rows, and the whole state, which must have `names`.

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
        """Write the finished rows=[...] and the state of what is not finished."""
        if self.is_main:
            save_atomically(state, self.path)

    def remove(self):
        """Remove the file: the evaluation is finished."""
        if self.is_main:
            Path(self.path).unlink(missing_ok=True)
