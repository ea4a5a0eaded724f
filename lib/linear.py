"""Linear classifiers of frozen features: their input, their task, their training."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lib import data, features, rng, sources
from lib.config import UsageError, did_you_mean, option
from lib.evalstate import CosineSGD
from lib.evaluation import EvalConfig, chosen_parts
from lib.images import Images, subset
from lib.results import result_row

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from augment import PERTURBATIONS, Recipe, augment, perturbation

CROP_SCALE = (0.08, 1.0)  # area of a classifier's training crops (torchvision's and DINO's)


@dataclass
class ClassifierConfig(EvalConfig):
    """Options of the evaluations that train classifiers."""

    # fmt: off
    arch: str = option("", "check that third-party weights are of this backbone", group="features")
    img_size: int = option(0, "side of the crops; 0: the checkpoint's", 8, 4096)
    cut: str = option("last", "blocks whose features are split into ir and ef; last: as the "
                      "published scripts", choices=("last", "every"))
    protocol: str = option("paper", "linear: as in eval_linear.py", choices=("paper", "fast"),
                           group="classifiers")
    views: int = option(4, "fast: random crops of each image, for cached features", 1, 1000)
    lr: float = option(0.001, "per 256 images, as the scripts (paper's text: 0.002); linear: "
                       "one of the rates to choose from, always reported", 0, 100)
    lrs: tuple = option((0.01, 0.05, 0.2, 1.0), "linear: more rates to choose from", 1e-9, 100)
    held_out: float = option(0.05, "linear: share of the training set that is held out to choose "
                             "the learning rate", 0.001, 0.9)
    seeds: int = option(1, "repeat with seed, seed + 1, ...: mean and standard deviation", 1, 1000)
    # fmt: on

    def __post_init__(self):
        if self.protocol != "fast":
            self.refuse(["views"], f"--protocol={self.protocol}")


class Representation(nn.Module):
    """Frozen backbones side by side: x (B, 3, H, W) -> (B, dim), each model's features.

    A ViT gives CLS of its last `blocks` blocks, vit_base CLS and mean patch of the last (DINO's
    linear protocol), other backbones z. With blocks=1 all give z.
    columns[row, part]: indices into dim. cut: 'last' splits ir and ef in the last block only (the
    published scripts; vit_base has only features of that block), 'every' in each block.
    z_columns[row, part]: the same for the backbone's own z.
    """

    def __init__(self, models, cut="last", blocks=4):
        super().__init__()
        self.backbones = nn.ModuleList(model.backbone for model in models)
        self.kinds = []  # for each: number of blocks, whether with the mean patch
        self.columns = {}
        self.z_columns = {}
        self.dim = 0
        for model in models:
            depth = len(model.backbone.blocks) if hasattr(model.backbone, "tokens") else 1
            mean_patch = model.trained["arch"] == "vit_base" and blocks > 1
            n = 1 if mean_patch else min(blocks, depth)
            rows = torch.arange((n + mean_patch) * model.backbone.dim).view(n + mean_patch, -1)
            rows += self.dim  # a row for each block; vit_base: CLS, mean patch
            # earlier blocks, if uncut: all columns go to full and ir, none to ef
            uncut = n - 1 if cut == "last" else 0
            for part, columns in features.part_slices(model.backbone.dim, model.d_ir).items():
                whole = rows[: 0 if part == "ef" else uncut].flatten()
                is_part = torch.cat([whole, rows[uncut:, columns].flatten()])
                self.columns[model.row, part] = is_part
                self.z_columns[model.row, part] = rows[n - 1, columns]
            self.kinds.append((n, mean_patch))
            self.dim += rows.numel()
        self.eval()

    def forward(self, x):
        z = []
        for backbone, (n, mean_patch) in zip(self.backbones, self.kinds):
            if n == 1 and not mean_patch:
                z.append(backbone(x))
                continue
            tokens = backbone.tokens(x, n)  # n of (B, 1+P, D)
            z += [t[:, 0] for t in tokens]
            if mean_patch:
                z.append(tokens[-1][:, 1:].mean(1))
        return torch.cat(z, 1)


class Classifiers(nn.Module):
    """A linear classifier for each list of columns and each of n_lrs learning rates.

    They share a matrix product, not a gradient. Weights start at N(0, 0.01), the same for all
    learning rates, biases at 0 (DINO).
    """

    def __init__(self, columns, n_classes, n_lrs, seed=0):
        super().__init__()
        self.columns = columns
        self.weights = nn.ModuleList()
        self.biases = nn.ModuleList()
        for c in columns:
            generator = torch.Generator().manual_seed(seed)
            first = 0.01 * torch.randn(n_classes, len(c), generator=generator)
            self.weights.append(nn.ParameterList(first.clone() for _ in range(n_lrs)))
            self.biases.append(nn.ParameterList(torch.zeros(n_classes) for _ in range(n_lrs)))

    def forward(self, z):
        """Map z (B, dim) to logits, (n_lrs, B, C) for each list of columns."""
        logits = []
        for c, weights, biases in zip(self.columns, self.weights, self.biases):
            x = F.linear(z[:, c], torch.cat(list(weights)), torch.cat(list(biases)))
            logits.append(x.unflatten(1, (len(weights), -1)).transpose(0, 1))
        return logits

    def groups(self, lrs):
        """Return the optimizer's parameter groups, one for each learning rate."""
        lists = [*self.weights, *self.biases]
        return [dict(params=[p[i] for p in lists], lr=lr) for i, lr in enumerate(lrs)]


def sum_of_losses(classifiers, z, labels):
    """Add the cross-entropies of all classifiers, each the mean over the batch."""
    logits = classifiers(z)
    return sum(F.cross_entropy(l.flatten(0, 1), labels.repeat(len(l))) * len(l) for l in logits)


@torch.no_grad()
def linear_correct(classifiers, z, labels):
    """Return whether each z (N, dim) is classified as labels (N,): [(n_lrs, N) bool]."""
    right = []
    for some, y in zip(z.split(4096), labels.split(4096)):
        right.append([logits.argmax(2) == y for logits in classifiers(some)])
    return [torch.cat(pieces, 1) for pieces in zip(*right)]


class Task(NamedTuple):
    """What classifiers learn. Transforms are those of features.extract."""

    name: str
    train: Images
    test: Images
    n_classes: int
    view: Callable  # the transform of training crops
    label: Callable  # (sample seeds (B,), labels (B,)) -> (B,): what `view` makes of the labels
    tests: Callable  # seed -> [(test, transform of center crops, label; None: the image's own)]
    chosen_on: Callable  # the same: what chooses the learning rate, on the held-out slice

    def facts(self):
        """Return what results.json tells of a task."""
        counts = dict(train_n=len(self.train), test_n=len(self.test), classes_n=self.n_classes)
        return dict(task=self.name) | counts


def flipped(crops, seeds):
    """Flip crops with probability 0.5: the view of most tasks."""
    return augment(crops, Recipe(flip=0.5), seeds)


def own_label(seeds, labels):
    """Return the labels as they are: the label of most tasks."""
    return labels


def perturbation_tests(names):
    """Turn "orig,cj+ro" into a Task's tests."""
    chosen = [name.strip() for name in names.split(",")]
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"tests={names}: names a test twice; name each once")
    for name in chosen:
        if name not in PERTURBATIONS:
            hint = did_you_mean(name, PERTURBATIONS)
            raise UsageError(f"tests={name}: choose from {', '.join(PERTURBATIONS)}{hint}")
    return lambda seed: [(name, perturbation(name, seed), None) for name in chosen]


def class_task(name, config, size):
    """Open the images of config.data -> the Task to tell the class of clean ones."""
    where = config.data, config.classes, config.data_root, config.download
    train, test = data.labeled_splits(*where, size)
    clean = perturbation_tests("orig")
    return Task(name, train, test, len(train.classes), flipped, own_label, clean, clean)


def training_views(task, images, steps, here, **common):
    """Yield the task's views of new random crops, and their labels (B,), for a Schedule's steps."""
    broken = data.BrokenFiles(max(len(images), 100))
    for crops, seeds, labels, bad in data.crop_loader(
        images, scale=CROP_SCALE, steps=steps, here=here, **common
    ):
        broken.report(bad, tqdm.write)
        view = task.view(crops.to(here.device, non_blocking=True), seeds)
        yield view, task.label(seeds, labels).to(here.device)


def extract_tests(module, images, tests, progress, **common):
    """Extract the features of a Task's tests in one pass: {test: (z (N, dim), labels (N,))}.

    Tests of one name, such as four turns, are joined. common: size, here, workers of extract.
    """
    transforms = [transform for _, transform, _ in tests]
    outputs, labels = features.extract(module, images, transforms, progress=progress, **common)
    joined = {}
    for (name, _, label), z in zip(tests, outputs):
        y = labels if label is None else torch.full_like(labels, label)
        joined.setdefault(name, []).append((z, y))
    return {name: [torch.cat(x) for x in zip(*pairs)] for name, pairs in joined.items()}


class LinearProbe:
    """Linear classifiers of frozen features, one for each part and learning rate.

    They train together, without weight decay.
    """

    def __init__(self, models, task, config, size, here):
        self.models = models
        self.task = task
        self.config = config
        self.here = here
        self.parts = chosen_parts(models, config.part, config.ckpt)
        self.module = Representation(models, config.cut)
        self.columns = [self.module.columns[part].to(here.device) for part in self.parts]
        self.lrs = sorted({config.lr, *config.lrs})
        self.common = dict(size=size, here=here, workers=config.workers)

    def fit(self, images, seed, state, rows, begun):
        """Train on images -> Classifiers. begun: the state of this seed, or {}.

        After each epoch writes the state, with the rows of the seeds before.
        """
        config, here = self.config, self.here
        classifiers = Classifiers(self.columns, self.task.n_classes, len(self.lrs), seed)
        classifiers.to(here.device)
        groups = classifiers.groups(self.lrs)
        sgd = CosineSGD(classifiers, groups, len(images), seed, config, here, begun)
        batches = self.cached_batches if config.protocol == "fast" else self.batches
        name = f"{self.task.name}, seed {seed}"
        for _, learnt in sgd.epochs(batches(images, sgd.steps), sum_of_losses, name):
            state.write(rows=rows, which=seed, **learnt)
        return classifiers

    def batches(self, images, steps):
        """Yield z (B, dim) and labels (B,) of new random crops; steps: data.Schedule."""
        for view, labels in training_views(self.task, images, steps, **self.common):
            with torch.no_grad(), self.here.autocast():
                z = features.in_pieces(self.module, view).float()
            yield z, labels

    def cached_batches(self, images, steps):
        """Yield the same from a few fixed crops of each image, with features cached in fp16."""
        if not len(steps):
            return
        views, n = self.config.views, len(images)
        device = self.here.device
        z = torch.empty(views, n, self.module.dim, dtype=torch.float16, device=device)
        y = torch.empty(views, n, dtype=torch.int64, device=device)
        for v in range(views):
            crops = dict(scale=CROP_SCALE, seed=steps.seed, epoch=v, **self.common)
            name = f"features of view {v + 1} of {views}"
            view = [self.task.view]
            [new], labels = features.extract(self.module, images, view, progress=name, **crops)
            features.check_finite(new, self.config.ckpt)
            z[v] = new
            y[v] = self.task.label(rng.sample_seeds(steps.seed, v, torch.arange(n)), labels.cpu())
        for items in steps:
            index = torch.tensor([i for _, i in items])
            seeds = rng.fork(steps.seed, "cached_view", items[0][0], index)
            v = (rng.uniforms(seeds, 1)[:, 0] * views).long().to(device)
            yield z[v, index.to(device)].float(), y[v, index.to(device)]

    def rows(self, classifiers, held, seed, knn):
        """Choose learning rates on the held-out images, then test -> rows of results.json."""
        config, module = self.config, self.module
        run = functools.partial(extract_tests, module, **self.common)
        [(z, y)] = run(held, self.task.chosen_on(seed), "held-out slice").values()
        features.check_finite(z, config.ckpt)
        best = [int(right.double().mean(1).argmax()) for right in linear_correct(classifiers, z, y)]
        tests = run(self.task.test, self.task.tests(seed), "test images")
        rows = []
        for test, (z, y) in tests.items():
            facts = dict(save_correct=config.save_correct, test=test, seed=seed)
            for i, right in enumerate(linear_correct(classifiers, z, y)):
                rates = {"linear, chosen lr": self.lrs[best[i]]}
                rates[f"linear, lr {config.lr:g}"] = config.lr
                for name, lr in rates.items():
                    where = *self.parts[i], len(self.columns[i]), right[self.lrs.index(lr)]
                    rows.append(result_row(*where, classifier=name, lr=lr, **facts))
            for part in self.parts if knn else ():
                own, train_z, train_y = self.neighbors
                train = train_z[:, own.columns[part]], train_y
                right = features.knn_correct(*train, z[:, module.z_columns[part]], y)
                where = *part, train[0].shape[1], right
                rows.append(result_row(*where, classifier="kNN", lr=None, **facts))
        return rows

    @functools.cached_property
    def neighbors(self):
        """Extract the models' own z of all training images: Representation, z (N, dim), labels."""
        own = Representation(self.models, blocks=1)
        given = self.task.train, [perturbation("orig")]
        [z], labels = features.extract(own, *given, progress="kNN features", **self.common)
        return own, z, labels


def linear_probe(models, task, config, size, here, state, knn=False):
    """Train linear classifiers on frozen features and test them -> rows of results.json.

    A held-out slice of the training images chooses the learning rate of each part.
    state: EvalState, from which an interrupted evaluation continues. knn: also kNN of each
    model's own z, among all training images.
    """
    probe = LinearProbe(models, task, config, size, here)
    rows, unfinished = state.read()
    for seed in range(config.seed, config.seed + config.seeds):
        if not any(row["seed"] == seed for row in rows):
            fit, held = sources.hold_out(task.train.labels, config.held_out, seed)
            begun = unfinished if unfinished.get("which") == seed else {}
            classifiers = probe.fit(subset(task.train, fit), seed, state, rows, begun)
            rows += probe.rows(classifiers, subset(task.train, held), seed, knn)
            state.write(rows=rows, which=None)
    return rows
