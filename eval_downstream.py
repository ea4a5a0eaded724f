"""Fine-tuning and linear probes on tasks: few labels, other data sets, rotated images.

    python eval_downstream.py --ckpt=out/in100_clever/ckpt.pt --task=semi10 --data=IMAGENET
    python eval_downstream.py --ckpt=out/in100_clever/ckpt.pt --task=pets --download=True
    python eval_downstream.py --ckpt=out/in100_clever/ckpt.pt --task=pets --mode=linear
    python eval_downstream.py --ckpt=out/in100_clever/ckpt.pt --task=rotation_sensitivity

finetune (the authors' protocol): backbone and classifier together, SGD with momentum 0.9, lr 1e-3
    per 256 images, weight decay 1e-4, 200 epochs, cosine to 0; one network for each part.
linear: the probe of eval_linear.py on the task's images.
A task is an entry of TASKS.
"""

import copy
import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lib import data, evalstate, evaluation, features, linear, machine, results, sources
from lib.batchnorm import sync_batch_norm
from lib.config import UsageError, configure, did_you_mean, option
from lib.rng import fork, uniforms

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from augment import Recipe, augment, quarter_turn

TASK_OPTIONS = ("data", "classes", "subset_list", "degrees")  # each for some of TASKS


@dataclass
class DownstreamConfig(linear.ClassifierConfig):
    """Options of eval_downstream.py: fine-tuning or linear probes on a task."""

    # fmt: off
    data: str = option("", "default: the checkpoint's (semi), pets (rotation); cub200: its "
                       "unpacked archive; folder: with train/CLASS and val/CLASS", group="data")
    classes: str = option("", "file of class names, or 'all'; semi: default the checkpoint's")
    task: str = option("", "what to learn and test", group="task")
    subset_list: str = option("", "semi: file with one file name per line, as SimCLR's "
                              "imagenet_subsets/1percent.txt; default: a share of each class")
    degrees: float = option(180, "rotation_invariance: -degrees .. degrees (our copy of the paper "
                            "lacks its range)", 0, 180)
    mode: str = option("", "default: finetune; rotation: linear", choices=("finetune", "linear"))
    epochs: int = option(0, "0: as the paper, 200 for finetune, 100 for linear", 1, 10**6)
    batch_size: int = option(256, "GLOBAL: of all ranks", 1, 2**24)
    weight_decay: float = option(1e-4, "of finetune", 0, 100)
    # fmt: on

    def __post_init__(self):
        if self.task not in TASKS:
            hint = did_you_mean(self.task, TASKS)
            raise UsageError(f"task={self.task}: choose from {', '.join(TASKS)}{hint}")
        entry = TASKS[self.task]
        for name in TASK_OPTIONS:
            value = getattr(self, name)
            if value != getattr(type(self), name) and name not in entry.options:
                raise UsageError(f"{name}={value}: not for --task={self.task}; remove it")
        self.mode = self.mode or entry.mode
        self.epochs = self.epochs or (200 if self.mode == "finetune" else 100)
        if self.protocol == "fast" and self.mode != "linear":
            raise UsageError("protocol=fast: not for --mode=finetune; remove it")


# --- tasks ----------------------------------------------------------------------------------------


def published_set(config, trained):
    """Take a data set of torchvision, in --data_root."""
    return config.task, ""


def cub_archive(config, trained):
    """Take the unpacked archive of CUB-200-2011."""
    folder = config.data or os.path.join(config.data_root, "CUB_200_2011")
    if not os.path.exists(os.path.join(folder, "images.txt")):
        raise UsageError(f"{folder}: no images.txt of CUB; give the unpacked archive as --data")
    return folder, ""


def folder_images(config, trained, default=""):
    """Take the images of --data, by default the data set `default`."""
    folder = config.data or default
    if not folder:
        raise UsageError("task=folder: give --data=FOLDER, with train/CLASS and val/CLASS in it")
    return folder, "" if config.classes == "all" else config.classes


def which_class(task, config):
    """Ask for the class of clean images."""
    return task


def rotated_class(task, config):
    """Ask for the class of images rotated by -degrees .. degrees."""
    recipe = Recipe(rotate=config.degrees)

    def view(crops, seeds):
        return augment(crops, recipe._replace(flip=0.5), seeds)

    def tests(seed):
        def rotated(images, seeds):
            return augment(images, recipe, fork(seeds, "perturbation", seed))

        return [(f"turned by up to {config.degrees:g}", rotated, None)]

    return task._replace(view=view, tests=tests, chosen_on=tests)


def which_rotation(task, config):
    """Ask how often an image is turned by 90 degrees: 0 .. 3."""

    def tests(seed):
        return [("which of 4 rotations", quarter_turn(n), n) for n in range(4)]

    task = task._replace(n_classes=4, view=flip_and_turn, tests=tests, chosen_on=tests)
    return task._replace(label=lambda seeds, labels: quarter_turns(seeds))


def quarter_turns(seeds):
    """Draw how often each sample is turned by 90 degrees: seeds (B,) -> (B,), 0 .. 3."""
    return (uniforms(fork(seeds, "quarter_turn"), 1)[:, 0] * 4).long()


def flip_and_turn(crops, seeds):
    """Flip at random, then turn by quarter_turns: uint8 (B, 3, S, S) -> normalized float."""
    x = linear.flipped(crops, seeds)
    turns = quarter_turns(seeds)
    for n in range(1, 4):
        mine = (turns == n).nonzero()[:, 0].to(x.device)
        x[mine] = torch.rot90(x[mine], n, (2, 3))
    return x


class Entry(NamedTuple):
    """A task: its images and the question about them."""

    images: Callable  # (config, checkpoint's config) -> (data, classes) of data.labeled_splits
    options: tuple = ()  # those of TASK_OPTIONS that it reads
    share: float = 1.0  # of the training images that keep their labels
    ask: Callable = which_class  # (Task of clean images, config) -> Task
    mode: str = "finetune"


PETS = functools.partial(folder_images, default="pets")
FOLDER = ("data", "classes")
TASKS = {
    "semi1": Entry(evaluation.data_of, (*FOLDER, "subset_list"), share=0.01),
    "semi10": Entry(evaluation.data_of, (*FOLDER, "subset_list"), share=0.1),
    "cub200": Entry(cub_archive, ("data",)),
    "flowers102": Entry(published_set),
    "food101": Entry(published_set),
    "pets": Entry(published_set),
    "folder": Entry(folder_images, FOLDER),
    "rotation_invariance": Entry(PETS, (*FOLDER, "degrees"), ask=rotated_class, mode="linear"),
    "rotation_sensitivity": Entry(PETS, FOLDER, ask=which_rotation, mode="linear"),
}


def open_task(config, trained, size):
    """Open the images of config.task -> linear.Task. Sets config.data and .classes.

    trained: the config of the checkpoint's run. size: side of the crops.
    """
    entry = TASKS[config.task]
    config.data, config.classes = entry.images(config, trained)
    train, test = data.labeled_splits(
        config.data, config.classes, config.data_root, config.download, size
    )
    if config.subset_list:
        train = data.subset(train, sources.indices_in_list(train, config.subset_list))
    elif entry.share < 1:
        train = data.subset(train, sources.stratified_share(train.labels, entry.share, config.seed))
    clean = linear.perturbation_tests("orig")
    images = (config.task, train, test, len(train.classes))
    task = linear.Task(*images, linear.flipped, linear.own_label, clean, chosen_on=clean)
    return entry.ask(task, config)


# --- fine-tuning ----------------------------------------------------------------------------------


class Finetuned(nn.Module):
    """A copy of a backbone, one part of its features, a classifier: (B, 3, S, S) -> (B, C)."""

    def __init__(self, model, part, config, n_classes, seed):
        super().__init__()
        own = model._replace(backbone=copy.deepcopy(model.backbone))
        self.representation = linear.Representation([own], config.cut, config.blocks)
        columns = self.representation.columns[model.row, part]
        self.register_buffer("columns", columns, persistent=False)
        self.dim = n_classes  # of the output, for features.extract
        self.classifier = nn.Linear(len(columns), n_classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.classifier.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        return self.classifier(self.representation(x)[:, self.columns])


def finetune(models, task, config, size, here, state):
    """Fine-tune a network for each seed, model and part; test it after the last epoch.

    state: evalstate.EvalState, to continue from. Returns rows of results.json.
    """
    rows, unfinished = state.read(("rows", "epoch", "which", "network", "optimizer", "scheduler"))
    finished = [[row["row"], row["part"], row["seed"]] for row in rows]
    for seed in range(config.seed, config.seed + config.seeds):
        for row, part in evaluation.chosen_parts(models, config.part, config.ckpt):
            which = [row, part, seed]
            if which in finished:
                continue
            [model] = [model for model in models if model.row == row]
            network = Finetuned(model, part, config, task.n_classes, seed).to(here.device)
            if here.world > 1:
                network = sync_batch_norm(network)
            begun = unfinished if unfinished and unfinished["which"] == which else None
            save = functools.partial(state.write, rows=rows, which=which)
            train_network(network, which, task, config, size, here, begun, save)
            common = dict(size=size, here=here, workers=config.workers)
            tests = linear.extract_tests(network, task.test, task.tests(seed), "test", **common)
            for test, (logits, y) in tests.items():
                facts = dict(classifier="fine-tuned", lr=config.lr, test=test, seed=seed)
                facts["save_correct"] = config.save_correct
                right = logits.argmax(1) == y
                rows.append(results.result_row(row, part, len(network.columns), right, **facts))
            state.write(rows=rows, which=None, epoch=0, network={}, optimizer={}, scheduler={})
    return rows


def train_network(network, which, task, config, size, here, begun, save):
    """Train backbone and classifier under DDP, batch norm over all ranks.

    which: [row, part, seed]. begun: the state to continue from, or None. save(epoch=..., ...) is
    called after each epoch.
    """
    row, part, seed = which
    n = len(task.train)
    per_epoch = n // config.batch_size
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.lr * config.batch_size / 256,
        momentum=0.9,
        weight_decay=config.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    learners = dict(network=network, optimizer=optimizer, scheduler=scheduler)
    start, stop = 0, config.epochs * per_epoch
    if begun:
        start = begun["epoch"] * per_epoch
        for name, learner in learners.items():
            learner.load_state_dict(begun[name])
    together = network
    if here.world > 1:
        together = nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)
    steps = data.Schedule(n, config.batch_size, seed, start, stop, here.rank, here.world)
    crops = data.crop_loader(task.train, size, linear.CROP_SCALE, steps, config.workers, here)
    name = f"{task.name}: {row}, {part}, seed {seed}"
    broken_files = data.BrokenFiles(max(n, 100))
    bar = features.progress_bar(crops, here, name, total=stop, initial=start)
    network.train()
    for step, (images, seeds, labels, broken) in enumerate(bar, start + 1):
        broken_files.report(broken, tqdm.write)
        x = task.view(images.to(here.device, non_blocking=True), seeds)
        with here.autocast():
            logits = together(x).float()
        loss = F.cross_entropy(logits, task.label(seeds, labels).to(here.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % per_epoch == 0:
            epoch = step // per_epoch
            if not machine.mean_over_ranks(loss.detach()).isfinite():
                cause = f"fine-tuning {config.ckpt} diverged in epoch {epoch}"
                raise UsageError(f"{cause}; use a lower --lr")
            scheduler.step()
            save(epoch=epoch, **{name: x.state_dict() for name, x in learners.items()})


# --- main -----------------------------------------------------------------------------------------


def main(argv):
    since = time.perf_counter()
    config = configure(DownstreamConfig, argv, task=TASKS)
    here, models, trained, size, folder = evaluation.start(config)
    task = open_task(config, trained, size)
    n_fit = len(task.train)
    if config.mode == "linear":
        n_fit = len(sources.hold_out(task.train.labels, config.held_out, config.seed)[0])
    config.batch_size = evaluation.batch_size_of(config.batch_size, n_fit, here.world)
    protocol = results.protocol_of(config, models, task, size, here)
    state = evalstate.EvalState(folder, protocol)
    if here.is_main:
        print(
            f"{task.name}, {config.mode}, {config.epochs} epochs, batch {config.batch_size}: "
            f"{len(task.train)} training images, {len(task.test)} test images, {task.n_classes} "
            f"classes, {here.device.type} {here.precision}"
            + (f"; continuing {state.path}" if state.exists() else ""),
            flush=True,
        )
    learn = finetune if config.mode == "finetune" else linear.linear_probe
    rows = learn(models, task, config, size, here, state)
    results.finish(state, protocol, time.perf_counter() - since, rows)


if __name__ == "__main__":
    machine.run_main(main, "stopped; the same command continues after the last finished epoch")
