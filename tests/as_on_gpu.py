"""A script, on a CPU, that saves by a thread and logs one window late, as it does on a GPU.

    python tests/as_on_gpu.py [--slowly] SCRIPT [arguments]

--slowly: each file of a checkpoint takes a second.
"""

import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import monitor, rundir


def forced(cls, name):
    """Let each new object of cls have the attribute `name` True."""
    begin = cls.__init__

    def init(self, *arguments):
        begin(self, *arguments)
        setattr(self, name, True)

    cls.__init__ = init


def slowly(*given, write=rundir.save_atomically):
    time.sleep(0.3)
    write(*given)


if __name__ == "__main__":
    forced(rundir.RunDir, "in_thread")
    forced(monitor.Monitor, "is_late")
    sys.argv.pop(0)
    if sys.argv[0] == "--slowly":
        rundir.save_atomically = slowly
        sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
