"""What all evaluations start from: options, models and their parts, data."""

import os
from dataclasses import dataclass
from typing import NamedTuple

from lib import machine, sources
from lib.config import Config, UsageError, option
from lib.features import part_slices
from lib.results import read_results
from lib.weights import load_backbone

import torch
import torch.nn as nn

import vmamba
from model import build_backbone, check_divisible, ir_dims

TRAIN = Config.__dataclass_fields__  # for options that mean the same in an evaluation


@dataclass
class EvalConfig:
    """Options that all evaluations share."""

    # fmt: off
    ckpt: str = option("", "checkpoint or weight file, ours or third-party", group="model")
    compare: str = option("", "a second checkpoint of the same architecture, such as DINO's")
    untrained: bool = option(False, "also evaluate the same backbone with random weights")
    part: str = option("", "default: all that the checkpoint has", choices=("full", "ir", "ef"))
    ratio: float = option(None, "ir's share, for a weight file without a config", 0.001, 0.999)
    data: str = option("", "as in train.py; default: the checkpoint's", group="data")
    classes: str = option("", "default: the checkpoint's, if any; 'all': every class folder")
    data_root: str = TRAIN["data_root"]
    download: bool = TRAIN["download"]
    seed: int = TRAIN["seed"]
    workers: int = TRAIN["workers"]
    device: str = TRAIN["device"]
    precision: str = TRAIN["precision"]
    scan: str = TRAIN["scan"]
    save_correct: bool = option(False, "keep per-image correctness, for error bars", group="output")
    out: str = option("", "folder for results.json; default: the checkpoint's")
    # fmt: on

    unused = ()  # options that this evaluation does not read

    def refuse(self, names, where):
        """Raise UsageError if one of the options `names` is given, which are not for `where`."""
        self.unused = (*self.unused, *names)
        for name in names:
            value = getattr(self, name)
            if value != getattr(type(self), name):
                raise UsageError(f"{name}={value}: not for {where}; remove it")


class Model(NamedTuple):
    """A row of a table."""

    row: str  # its name
    backbone: nn.Module  # in eval mode, on the device
    d_ir: int  # dimensions of ir; all of them: no split
    trained: dict  # the config of its run; for third-party weights: of load_backbone
    ridge_features: tuple | None = None  # of ridge_features, if they are known already


def start(config):
    """Start an evaluation -> here, models, config of ckpt's run, crop size, folder of results."""
    here = machine.join(config.device, config.precision)
    vmamba.set_backend(config.scan, here.device)
    models, trained = open_models(config, here)
    arch = trained["arch"]
    if config.arch not in ("", arch):
        raise UsageError(f"arch={config.arch}: {config.ckpt} holds a {arch}; remove --arch")
    chosen_parts(models, config.part, config.ckpt)
    size = config.img_size or trained["img_size"]
    check_divisible(models[0].backbone, arch, img_size=size)
    return here, models, trained, size, results_folder(config)


def results_folder(config):
    """Return the folder for results.json: config.out, or that of config.ckpt. It is writable."""
    out = config.out or os.path.dirname(config.ckpt) or "."
    if not os.path.isdir(out) or not os.access(out, os.W_OK):
        raise UsageError(f"{out}: no such folder, or not writable; give another --out=FOLDER")
    read_results(os.path.join(out, "results.json"))
    return out


def open_models(config, here):
    """Load config.ckpt and config.compare: [Model], the config of ckpt's run.

    With config.untrained the list begins with the same backbone untrained.
    """
    if not config.ckpt:
        raise UsageError("no checkpoint given; use --ckpt=out/demo/ckpt.pt")
    models = []
    for path in filter(None, (config.ckpt, config.compare)):
        backbone, trained = load_backbone(path, ratio=config.ratio)
        method = trained.get("method", trained["arch"])
        row = path if method in [model.row for model in models] else method
        d_ir = ir_dims(backbone.dim, trained.get("ratio", 1.0))
        models.append(Model(row, backbone.to(here.device), d_ir, trained))
    facts = [_facts(model.trained) for model in models]
    if facts[0] != facts[-1]:
        differ = f"{facts[1]}, and ckpt={config.ckpt} is {facts[0]}"
        raise UsageError(f"compare={config.compare} is {differ}: must be equal; remove --compare")
    trained = models[0].trained
    first = [untrained_model(trained, config.seed, here)] if config.untrained else []
    return first + models, trained


def _facts(trained):
    facts = {name: trained[name] for name in ("arch", "img_size", "patch_size")}
    return facts | dict(stem=trained.get("stem", "imagenet"))  # older runs have no other


def untrained_model(trained, seed, here):
    """Return the Model with the backbone of the config `trained` and random weights of the seed."""
    torch.manual_seed(seed)
    facts = _facts(trained)
    sizes = {name: facts[name] for name in ("img_size", "patch_size", "stem")}
    backbone = build_backbone(facts["arch"], **sizes).to(here.device).eval()
    return Model("untrained", backbone, backbone.dim, facts)


def model_of(run):
    """Return the Model of a training run: its teacher."""
    return Model(run.config.method, run.teacher.backbone, run.network.d_ir, vars(run.config))


def chosen_parts(models, part, ckpt):
    """Return [(row, part)] to evaluate: all, or `part`; a model without a split stays whole."""
    chosen = []
    for model in models:
        names = part_slices(model.backbone.dim, model.d_ir)
        chosen += [(model.row, name) for name in ([part] if part in names else names)]
    if part and part not in dict(chosen).values():
        fix = "use --part=full or the ckpt.pt of a CLeVER run; for third-party weights --ratio=0.8"
        raise UsageError(f"part={part}: {ckpt} has no split into ir and ef; {fix}")
    return chosen


def data_of(config, trained):
    """Return name and class list of the data: config's, by default the run's."""
    source = config.data or trained.get("data", "")
    if not source:
        raise UsageError(f"{config.ckpt}: its training data is unknown; give --data")
    classes = config.classes
    if not classes and source not in (*sources.COUNTS, *sources.TORCHVISION):
        classes = trained.get("classes", "")
        if classes and machine.rank_and_world()[0] == 0:
            print(f"classes of the checkpoint's {classes}; --classes=all: every class folder")
    return source, "" if config.classes == "all" else classes


def announce(what, task, here):
    """Print what is evaluated, with which images, and where."""
    if here.is_main:
        images = f"{len(task.train)} training images, {len(task.test)} test images"
        where = f"{here.device.type} {here.precision}"
        print(f"{what}: {images}, {task.n_classes} classes, {where}", flush=True)


def batch_size_of(batch_size, n, world):
    """Return the global batch: batch_size; if there are only n images, n or a multiple of 8."""
    if n < 1:
        raise UsageError("too few images: none is left to train on, one is held out; give more")
    batch = batch_size if batch_size <= n else n // 8 * 8 or n
    if batch % world:
        fewer = f"--batch_size={batch // world * world} or " if batch > world else ""
        fix = f"use {fewer}fewer ranks"
        raise UsageError(f"batch_size={batch} does not divide among {world} ranks: {fix}")
    return batch
