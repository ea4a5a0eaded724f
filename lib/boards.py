"""TensorBoard and Weights & Biases: each gets the numbers of log.jsonl. Off by default."""

import os
import secrets
from dataclasses import asdict
from functools import partial

from lib.config import UsageError


def import_boards(config):
    """Import what config asks for; UsageError if it is not installed.

    Returns [open_board]. open_board(config, step) -> log(numbers); step: where the run continues.
    """
    found = []
    package = "tensorboard"
    try:
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            found.append(partial(_tensorboard, SummaryWriter))
        package = "wandb"
        if config.wandb:
            import wandb

            found.append(partial(_wandb, wandb))
    except ImportError:
        value = getattr(config, package)
        raise UsageError(f"{package}={value}: not installed; pip install {package}") from None
    return found


def _tensorboard(open_writer, config, step):
    writer = open_writer(config.out_dir, purge_step=step + 1)  # hides what will be done again

    def log(numbers):
        for name, number in numbers.items():
            writer.add_scalar(name, number, numbers["step"])
        writer.flush()

    return log


def _wandb(wandb, config, step):
    path = os.path.join(config.out_dir, ".wandb_id")
    if not step or not os.path.exists(path):  # else it continues the same run there
        with open(path, "w") as file:
            file.write(secrets.token_hex(8))
    with open(path) as file:
        about = dict(id=file.read(), resume="allow", name=os.path.basename(config.out_dir))
    run = wandb.init(project=config.wandb, dir=config.out_dir, config=asdict(config), **about)
    run.define_metric("*", step_metric="step")
    return run.log
