"""How strong is each loss term? The lengths of its gradients for a run's last batch.

python tools/gradients.py --ckpt=out/demo/ckpt.pt
"""

import os
import sys
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib import data, machine
from lib.checkpoint import read_checkpoint
from lib.config import Config, UsageError, configure, option

import train


@dataclass
class GradientsConfig:
    """Options of gradients.py."""

    ckpt: str = option("", "ckpt.pt of a run of clever or dino")


def lengths_of(saved):
    """Return {loss term: {"backbone", "head_ir", "head_ef": length of its weighted gradient}}."""
    config = Config(**saved["config"])
    here = machine.join("cpu", "fp32")
    images, _ = data.open_for_training(config, here)
    run = train.make_run(config, len(images) // config.batch_size, here)
    run.load(saved)
    last = saved["step"] - 1
    batch = next(iter(data.train_loader(images, config, last, last + 1, here)))
    terms, _, _ = train.distil(run, run.views(batch), None)
    trained = {name: p for name, p in run.network.named_parameters() if p.requires_grad}
    found = {}
    for term, weight in train.WEIGHTS.items():
        if term in terms:
            loss = getattr(config, weight) * terms[term]
            how = dict(retain_graph=True, materialize_grads=True)
            gradients = torch.autograd.grad(loss, list(trained.values()), **how)
            squares = dict.fromkeys(("backbone", "head_ir", "head_ef"), 0.0)
            for name, gradient in zip(trained, gradients):
                squares[name.split(".")[0]] += gradient.square().sum().item()
            found[term] = {part: square**0.5 for part, square in squares.items()}
    return found


def main(argv):
    config = configure(GradientsConfig, argv)
    if not config.ckpt:
        raise UsageError("no checkpoint given; use --ckpt=out/demo/ckpt.pt")
    saved = read_checkpoint(config.ckpt)
    trained = saved.get("config", {}) if isinstance(saved, dict) else {}
    if trained.get("method") not in ("clever", "dino"):
        raise UsageError(f"ckpt={config.ckpt}: not the ckpt.pt of a run of clever or dino")
    for term, lengths in lengths_of(saved).items():
        print(f"{term:7}", "  ".join(f"{part} {length:.1e}" for part, length in lengths.items()))


if __name__ == "__main__":
    machine.run_main(main)
