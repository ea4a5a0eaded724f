"""How strong is each loss term? The lengths of its gradients for a run's last batch.

    python tools/gradients.py --runs=out/demo                  one run of clever or dino
    python tools/gradients.py --runs="out/nano/*/seed0"        a line for each run
    python tools/gradients.py --runs=out/demo --json=gradients.json

A length is that of the gradient of weight * term; the term itself stands without its weight. H_ef:
the entropy, in nats of at most ln K, of what L_Orth compares the student with: the ef teacher's
output, or with --orth_views=student the student's own.
"""

import glob
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib import data, machine
from lib.checkpoint import CHECKPOINT, read_checkpoint
from lib.config import Config, UsageError, configure, option

import train

PARTS = ("backbone", "head_ir", "head_ef")


@dataclass
class GradientsConfig:
    """Options of gradients.py."""

    runs: str = option("", "out_dir of a run, or in quotes a pattern: 'out/nano/*/seed0'")
    json: str = option("", "also write the numbers to this file")


def lengths_of(saved):
    """Measure a checkpoint (read_checkpoint) -> a dict: for each loss term its value, lengths.

    {term: {"value", "backbone", "head_ir", "head_ef"}}; with ef also "H_ef" and "ln K", in nats.
    """
    config = Config(**saved["config"])
    here = machine.join("cpu", "fp32")
    images, _ = data.open_for_training(config, here)
    run = train.make_run(config, len(images) // config.batch_size, here)
    run.load(saved)
    last = saved["step"] - 1
    batch = next(iter(data.train_loader(images, config, last, last + 1, here)))
    terms, _, logged = train.distil(run, run.views(batch), None)
    found = {}
    for term, value in terms.items():
        weight = getattr(config, train.WEIGHTS[term]) if term in train.WEIGHTS else 1.0
        loss = weight * value
        how = dict(retain_graph=True, materialize_grads=True)
        gradients = torch.autograd.grad(loss, list(run.trained.values()), **how)
        squares = dict.fromkeys(PARTS, 0.0)
        for name, gradient in zip(run.trained, gradients):
            squares[name.split(".")[0]] += gradient.square().sum().item()
        found[term] = dict(value=value.item()) | {part: x**0.5 for part, x in squares.items()}
    if "H_ef" in logged:
        found |= {"H_ef": logged["H_ef"].item(), "ln K": math.log(config.out_dim_ef)}
    return found


COLUMNS = {  # of the table: loss term -> where it has a gradient
    "L_CL": ("backbone", "head_ir"),
    "L_Orth": ("backbone", "head_ef"),
    "L_PReg": ("head_ir", "head_ef"),
}


def table_lines(runs):
    """Yield the lines of the table in docs/results.md, from {run: lengths_of its checkpoint}."""
    names = [name for term, parts in COLUMNS.items() for name in (term, *parts)]
    yield f"| run | {' | '.join(names)} | H_ef |"
    yield "|---|" + "--:|" * (len(names) + 1)
    for run, found in runs.items():
        cells = [run]
        for term, parts in COLUMNS.items():
            cells += [f"{found[term][x]:.2g}" if term in found else "" for x in ("value", *parts)]
        cells.append(f"{found['H_ef']:.2f} of {found['ln K']:.2f}" if "H_ef" in found else "")
        yield f"| {' | '.join(cells)} |"


def main(argv):
    config = configure(GradientsConfig, argv)
    paths = sorted(glob.glob(os.path.join(config.runs, CHECKPOINT)))
    if not paths:
        raise UsageError(f"runs={config.runs!r}: no ckpt.pt there; use --runs=out/demo")
    if config.json and not os.path.isdir(os.path.dirname(config.json) or "."):
        raise UsageError(f"json={config.json}: its folder does not exist; create it")
    runs = {}
    for path in tqdm(paths, leave=False):
        saved = read_checkpoint(path)
        trained = saved.get("config", {}) if isinstance(saved, dict) else {}
        if trained.get("method") not in ("clever", "dino"):
            raise UsageError(f"{path}: not of a run of clever or dino; give one in --runs")
        runs[os.path.dirname(path)] = lengths_of(saved)
    print("\n".join(table_lines(runs)))
    if config.json:
        Path(config.json).write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    machine.run_main(main)
