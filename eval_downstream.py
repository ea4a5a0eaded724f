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
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lib import evalstate, evaluation, features, linear, machine, results, sources
from lib.batchnorm import sync_batch_norm
from lib.config import UsageError, configure, did_you_mean, option
from lib.images import subset
from lib.rng import fork, uniforms

import torch
import torch.nn as nn
import torch.nn.functional as F

from augment import Recipe, augment, quarter_turn

TASK_OPTIONS = ("data", "classes", "subset_list", "degrees")  # each for some of TASKS


@dataclass
class DownstreamConfig(linear.ClassifierConfig):
    """Options of eval_downstream.py: fine-tuning or linear probes on a task."""

    # fmt: off
    data: str = option("", "default: the checkpoint's (semi), pets (rotation); cub200 and folder "
                       "have none", group="data")
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
        others = [name for name in TASK_OPTIONS if name not in entry.options]
        self.refuse(others, f"--task={self.task}")
        self.mode = self.mode or entry.mode
        self.epochs = self.epochs or (200 if self.mode == "finetune" else 100)
        if self.mode == "finetune":
            self.refuse(["protocol", "views", "lrs", "held_out"], "--mode=finetune")
        else:
            super().__post_init__()
            self.refuse(["weight_decay"], "--mode=linear")


# --- tasks ----------------------------------------------------------------------------------------


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

    options: tuple = ()  # those of TASK_OPTIONS that it reads
    data: str = ""  # the default of --data
    given: str = ""  # what --data must be, if there is no default
    holds: str = ""  # a file that must lie in it
    share: float = 1.0  # of the training images that keep their labels; less: the checkpoint's data
    ask: Callable | None = None  # (Task, config) -> Task; None: the class of clean images
    mode: str = "finetune"


FOLDER = ("data", "classes")
TASKS = {
    "semi1": Entry((*FOLDER, "subset_list"), share=0.01),
    "semi10": Entry((*FOLDER, "subset_list"), share=0.1),
    "cub200": Entry(("data",), given="the unpacked archive CUB_200_2011", holds="images.txt"),
    "flowers102": Entry(data="flowers102"),
    "food101": Entry(data="food101"),
    "pets": Entry(data="pets"),
    "folder": Entry(FOLDER, given="with train/CLASS and val/CLASS in it"),
    "rotation_invariance": Entry((*FOLDER, "degrees"), "pets", ask=rotated_class, mode="linear"),
    "rotation_sensitivity": Entry(FOLDER, "pets", ask=which_rotation, mode="linear"),
}


def open_task(config, trained, size):
    """Open the images of config.task -> linear.Task. Sets config.data and .classes.

    trained: the config of the checkpoint's run. size: side of the crops.
    """
    entry = TASKS[config.task]
    if entry.given and not config.data:
        raise UsageError(f"task={config.task}: give --data=FOLDER, {entry.given}")
    if entry.holds and not os.path.exists(os.path.join(config.data, entry.holds)):
        raise UsageError(f"data={config.data}: no {entry.holds} in it; give {entry.given}")
    defaults = trained if entry.share < 1 else dict(data=entry.data)
    config.data, config.classes = evaluation.data_of(config, defaults)
    task = linear.class_task(config.task, config, size)
    train = task.train
    if config.subset_list:
        train = subset(train, sources.indices_in_list(train, config.subset_list))
    elif entry.share < 1:
        train = subset(train, sources.stratified_share(train.labels, entry.share, config.seed))
    task = task._replace(train=train)
    return entry.ask(task, config) if entry.ask else task


# --- fine-tuning ----------------------------------------------------------------------------------


class Finetuned(nn.Module):
    """A copy of a backbone, one part of its features, a classifier: (B, 3, S, S) -> (B, C)."""

    def __init__(self, model, part, config, n_classes, seed):
        super().__init__()
        own = model._replace(backbone=copy.deepcopy(model.backbone))
        self.representation = linear.Representation([own], config.cut)
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
    rows, unfinished = state.read()
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
            begun = unfinished if unfinished.get("which") == which else {}
            common = dict(size=size, here=here, workers=config.workers)
            for learnt in train_network(network, which, task, config, begun, common):
                state.write(rows=rows, which=which, **learnt)
            tests = linear.extract_tests(network, task.test, task.tests(seed), "test", **common)
            for test, (logits, y) in tests.items():
                features.check_finite(logits, config.ckpt)
                facts = dict(classifier="fine-tuned", lr=config.lr, test=test, seed=seed)
                where = row, part, len(network.columns)
                right = logits.argmax(1) == y
                rows.append(results.result_row(*where, right, config.save_correct, **facts))
            state.write(rows=rows, which=None)
    return rows


def train_network(network, which, task, config, begun, common):
    """Train backbone and classifier, batch norm over all ranks; yield the state of each epoch.

    which: [row, part, seed]. begun: the state to continue from, or {}.
    """
    row, part, seed = which
    here = common["here"]

    def loss_of(network, x, labels):
        with here.autocast():
            logits = network(x).float()
        return F.cross_entropy(logits, labels)

    group = dict(params=network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    sgd = evalstate.CosineSGD(network, [group], len(task.train), seed, config, here, begun)
    views = linear.training_views(task, task.train, sgd.steps, **common)
    network.train()
    for loss, learnt in sgd.epochs(views, loss_of, f"{task.name}: {row}, {part}, seed {seed}"):
        if not machine.mean_over_ranks(loss).isfinite():
            cause = f"fine-tuning {config.ckpt} diverged in epoch {learnt['epoch']}"
            raise UsageError(f"{cause}; use a lower --lr")
        yield learnt


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
    about = f"{task.name}, {config.mode}, {config.epochs} epochs, batch {config.batch_size}"
    evaluation.announce(about, task, here)
    protocol = results.protocol_of(config, models, here, img_size=size, **task.facts())
    state = evalstate.EvalState(folder, protocol)
    learn = finetune if config.mode == "finetune" else linear.linear_probe
    rows = learn(models, task, config, size, here, state)
    results.finish(state, protocol, time.perf_counter() - since, rows)


if __name__ == "__main__":
    machine.run_main(main, "stopped; the same command continues after the last finished epoch")
