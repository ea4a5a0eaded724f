"""Draw the log.jsonl of runs: loss terms, kNN, effective ranks, the time spent waiting for data.

    python tools/plot.py out/demo                  writes out/demo/curves.png
    python tools/plot.py out/demo out/demo_dino    both in one picture, out/demo/compared.png

A line style is a part of the representation, a color is a run; of a single run a part. Needs
matplotlib.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib import curves
from lib.config import UsageError
from lib.machine import run_main


def main(argv):
    if not argv or argv[0].startswith("-"):
        raise UsageError("usage: python tools/plot.py RUN [RUN ...], each the out_dir of a run")
    print(curves.draw(argv))


if __name__ == "__main__":
    run_main(main)
