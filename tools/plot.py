"""Draw the log.jsonl of runs: loss terms, kNN, effective ranks, the time spent waiting for data.

    python tools/plot.py out/demo                  writes out/demo/curves.png
    python tools/plot.py out/demo out/demo_dino    both in one picture, out/demo/compared.png

The line style shows the part of the representation. The color shows the run; with a single run it
shows the part. Needs matplotlib.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib import curves
from lib.config import UsageError
from lib.machine import run_main


def main(argv):
    if not argv or argv[0].startswith("-"):
        raise UsageError("no run given; use python tools/plot.py OUT_DIR [OUT_DIR ...]")
    print(curves.draw(argv))


if __name__ == "__main__":
    run_main(main)
