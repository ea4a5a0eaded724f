"""What a pre-trained backbone is worth elsewhere: few labels, other data sets, rotated images (the paper's other classification tables).

    python eval_downstream.py --ckpt=out/in100_clever/ckpt.pt --task=semi10 --data=/path/to/imagenet      10 % of the labels, fine-tuned
    python eval_downstream.py --ckpt=out/in100_clever/ckpt.pt --task=pets --download=True                 another data set, fine-tuned
    python eval_downstream.py --ckpt=out/in100_clever/ckpt.pt --task=pets --mode=linear                   the same on the frozen backbone
    python eval_downstream.py --ckpt=out/in100_clever/ckpt.pt --task=rotation_sensitivity --data=FOLDER   which of 4 rotations is it?

Fine-tuning (the authors' protocol): backbone and classifier together, SGD with momentum 0.9, lr 1e-3 per 256 images, weight decay 1e-4, 200
epochs of a cosine to 0; a network for each part. Linear is eval_linear.py's probe, on the task's images."""

import copy
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import eval_linear
import losses
import probe
from augment import Recipe, augment
from configurator import UsageError, configure, exit_on_usage_error, nearest
from draws import key, uniforms
from model import synchronise_batch_norm

SEMI = {"semi1": 0.01, "semi10": 0.1}  # share of the labels
ROTATION = ("rotation_invariance", "rotation_sensitivity")
SETS = ("cub200", "flowers102", "food101", "pets")


@dataclass
class DownstreamConfig:
    """Knobs of eval_downstream.py: fine-tuning or linear probes on a task."""

    # what is judged
    ckpt: str = ""  # checkpoint or weight file: ours, DINO's, timm's, torchvision's or VMamba's
    compare: str = ""  # a second one of the same architecture, such as DINO's beside CLeVER's
    untrained: bool = False  # also judge the same backbone with random weights
    arch: str = ""  # of a foreign file; found from its weights, this is a check
    img_size: int = 0  # side of the crops; 0: the checkpoint's
    part: str = ""  # 'full', 'ir' or 'ef'; default: all that the checkpoint has
    cut: str = "last"  # of several concatenated blocks: 'last' cuts ir and ef in the last one only (published), 'every' in each
    blocks: int = 0  # CLS of so many last blocks; 0: the protocol's (ViT 4; vit_base CLS and mean patch of the last; others pooled)
    # on what
    task: str = ""  # semi1 semi10; cub200 flowers102 food101 pets; folder; rotation_invariance rotation_sensitivity
    data: str = ""  # images: semi and default the checkpoint's, rotation: pets, folder: any train/CLASS val/CLASS, cub200: its archive
    classes: str = ""  # semi: default the checkpoint's list; a list chooses class folders, 'all' takes every one
    data_root: str = "data"  # where torchvision keeps its data sets
    download: bool = False  # fetch the data set if it is not there
    subset_list: str = ""  # semi: file names a line, as SimCLR's imagenet_subsets/1percent.txt; default: a share of each class by the seed
    degrees: float = 180  # rotation_invariance: images turn by -degrees .. degrees (the paper's range is lost in our copy)
    # how
    mode: str = ""  # 'finetune' or 'linear'; default: linear for the rotation tasks, else finetune
    epochs: int = 0  # 0: the paper's, 200 fine-tuning, 100 linear
    batch_size: int = 256  # global
    lr: float = (
        0.001  # per 256 images; linear: one of the rates, reported whatever the held-out slice says
    )
    weight_decay: float = 1e-4  # finetune
    lrs: tuple = (0.01, 0.05, 0.2, 1.0)  # linear: more to choose from
    held_out: float = 0.05  # linear: share of the training set that chooses the learning rate
    protocol: str = "paper"  # linear: 'paper' new random crops each epoch, 'fast' kept features of a few fixed views
    views: int = 4  # linear, fast: random crops of each image whose features are kept
    answers: bool = False  # also keep which test images were right, for error bars (evidence.py)
    seeds: int = 1  # repeat with seed, seed + 1, ...: mean and standard deviation; the subset is the first one's
    seed: int = 0  # of the subset, order, crops, classifiers and rotations
    # the machine
    workers: int = 8
    device: str = "auto"
    precision: str = "auto"
    scan: str = "auto"  # VMamba's selective scan, as in train.py
    out: str = ""  # folder for results.json; default: the checkpoint's

    def __post_init__(self):
        tasks = (*SEMI, *SETS, "folder", *ROTATION)
        if self.task not in tasks:
            raise UsageError(
                f"task={self.task}: choose from {', '.join(tasks)}{nearest(self.task, tasks)}"
            )
        self.mode = self.mode or ("linear" if self.task in ROTATION else "finetune")
        self.epochs = self.epochs or (200 if self.mode == "finetune" else 100)
        for name, value, where, wanted in (
            (
                "data",
                self.data,
                "tasks other than torchvision's own sets, which lie in --data_root",
                self.task not in SETS[1:],
            ),
            ("classes", self.classes, "tasks on image folders", self.task not in SETS),
            ("subset_list", self.subset_list, "semi1 and semi10", self.task in SEMI),
            ("protocol", self.protocol == "fast", "--mode=linear", self.mode == "linear"),
        ):
            if value and not wanted:
                raise UsageError(
                    f"{name}={getattr(self, name)}: is for {where}; leave it away with --task={self.task} --mode={self.mode}"
                )


# ------------------------------------------------------------------------------------------------ tasks


def open_task(config, trained, size):
    """-> eval_linear.Task: the images, what is done to them and what is asked."""
    name = config.task
    if name == "cub200":
        config.data = config.data or os.path.join(config.data_root, "CUB_200_2011")
        if not os.path.exists(os.path.join(config.data, "images.txt")):
            raise UsageError(
                f"task=cub200: {config.data} does not hold the unpacked archive CUB_200_2011 (images.txt and so on); give it as --data"
            )
    elif name in SETS:
        config.data = name
    elif name in SEMI:
        config.data, config.classes = probe.data_of(config, trained)
    else:
        config.data, config.classes = (
            config.data or ("pets" if name in ROTATION else ""),
            "" if config.classes == "all" else config.classes,
        )
        if not config.data:
            raise UsageError(
                "task=folder: give --data=FOLDER, with train/CLASS and val/CLASS in it"
            )
    train, test = data.labelled_splits(
        config.data, config.classes, config.data_root, config.download, size
    )
    if name in SEMI:
        chosen = (
            data.listed(train, config.subset_list)
            if config.subset_list
            else data.some_of_each(train.labels, SEMI[name], config.seed)
        )
        train = data.subset(train, chosen)
    clean, n_classes = eval_linear.perturbations("orig"), len(train.classes)
    if name == "rotation_invariance":
        view, tests = rotated(config.degrees)
        return eval_linear.Task(
            name, train, test, n_classes, view, eval_linear.own_label, tests, chosen_on=tests
        )
    if name == "rotation_sensitivity":
        return eval_linear.Task(
            name,
            train,
            test,
            4,
            quarter_turned,
            lambda keys, _: quarter_turns(keys),
            which_of_4,
            chosen_on=which_of_4,
        )
    return eval_linear.Task(
        name,
        train,
        test,
        n_classes,
        eval_linear.flipped,
        eval_linear.own_label,
        clean,
        chosen_on=clean,
    )


def rotated(degrees):
    """-> a Task's view and tests of images turned by -degrees .. degrees, the views flipped at random as well."""
    recipe = Recipe(rotate=degrees)
    return (
        lambda crops, keys: augment(crops, recipe._replace(flip=0.5), keys),
        lambda seed: [
            (
                f"turned by up to {degrees:g}",
                lambda images, keys: augment(images, recipe, key(keys, 20, seed)),
                None,
            )
        ],
    )


def which_of_4(seed):
    """A Task's tests: every image in each of its four turns."""
    return [("which of 4 rotations", probe.quarter_turn(n), n) for n in range(4)]


def quarter_turns(keys):
    """keys (B,) -> how often each sample is turned by 90 degrees (B,), 0 .. 3."""
    return (uniforms(key(keys, 30), 1)[:, 0] * 4).long()


def quarter_turned(crops, keys):
    """Flipped at random, then turned by quarter_turns: uint8 (B, 3, S, S) -> normalised (B, 3, S, S)."""
    x, turns = eval_linear.flipped(crops, keys), quarter_turns(keys)
    for n in range(1, 4):
        mine = (turns == n).nonzero()[:, 0].to(x.device)
        x[mine] = torch.rot90(x[mine], n, (2, 3))
    return x


# ------------------------------------------------------------------------------------------------ fine-tuning


class Finetuned(nn.Module):
    """A backbone of its own, the columns of one part, a classifier: x (B, 3, S, S) -> logits (B, C)."""

    def __init__(self, model, part, config, n_classes, seed):
        super().__init__()
        self.representation = eval_linear.Representation(
            [model._replace(backbone=copy.deepcopy(model.backbone))], config.cut, config.blocks
        )
        self.register_buffer(
            "columns", self.representation.columns[model.row, part], persistent=False
        )
        self.dim = n_classes  # of what it gives, for probe.features
        self.classifier = nn.Linear(len(self.columns), n_classes)
        nn.init.normal_(
            self.classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed)
        )
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        return self.classifier(self.representation(x)[:, self.columns])


def finetune(models, task, config, size, device, autocast, partial):
    """-> rows of results.json (eval_linear.result), tested after the last epoch.

    The whole network trains under DDP, batch norm over all ranks. partial: eval_linear.Partial."""
    rank, world = probe.rank_and_world()
    common = dict(size=size, device=device, autocast=autocast, workers=config.workers)
    batch, per_epoch = config.batch_size, len(task.train) // config.batch_size
    rows, state = partial.read(("rows", "epoch", "which", "network", "optimizer", "scheduler"))
    for seed in range(config.seed, config.seed + config.seeds):
        for row, part in probe.chosen_parts(models, config.part, config.ckpt):
            which = [row, part, seed]
            if which in [[done["row"], done["part"], done["seed"]] for done in rows]:
                continue
            [model] = [model for model in models if model.row == row]
            network = Finetuned(model, part, config, task.classes, seed).to(device)
            network = synchronise_batch_norm(network, device) if world > 1 else network
            optimizer = torch.optim.SGD(
                network.parameters(),
                lr=config.lr * batch / 256,
                momentum=0.9,
                weight_decay=config.weight_decay,
            )
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
            done = 0
            if state and state["which"] == which:
                done = state["epoch"]
                for name, thing in (
                    ("network", network),
                    ("optimizer", optimizer),
                    ("scheduler", scheduler),
                ):
                    thing.load_state_dict(state[name])
            together = (
                nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)
                if world > 1
                else network
            )
            start, stop = done * per_epoch, config.epochs * per_epoch
            loader = data.crop_loader(
                task.train,
                size,
                eval_linear.CROP_SCALE,
                batch,
                seed,
                start,
                stop,
                config.workers,
                device,
                rank,
                world,
            )
            broken_files = data.BrokenFiles(max(len(task.train), 100))
            network.train()
            bar = tqdm(
                loader,
                total=stop,
                initial=start,
                disable=rank > 0,
                unit="step",
                desc=f"{task.name}: {row}, {part}, seed {seed}",
                leave=False,
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 30,
            )
            for step, (crops, keys, labels, broken) in enumerate(bar, start):
                broken_files.report(broken, tqdm.write)
                x, labels = (
                    task.view(crops.to(device, non_blocking=True), keys),
                    task.label(keys, labels).to(device),
                )
                with autocast():
                    logits = together(x)
                loss = F.cross_entropy(logits.float(), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if (step + 1) % per_epoch == 0:
                    if not losses.mean_over_ranks(loss.detach()).isfinite():
                        raise UsageError(
                            f"fine-tuning {config.ckpt} diverged in epoch {(step + 1) // per_epoch}; take a lower --lr"
                        )
                    scheduler.step()
                    partial.write(
                        rows=rows,
                        which=which,
                        epoch=(step + 1) // per_epoch,
                        network=network.state_dict(),
                        optimizer=optimizer.state_dict(),
                        scheduler=scheduler.state_dict(),
                    )
            for test, (logits, y) in eval_linear.test_features(
                network, task.test, task.tests(seed), "test", **common
            ).items():
                rows.append(
                    eval_linear.result(
                        row,
                        part,
                        len(network.columns),
                        "fine-tuned",
                        config.lr,
                        test,
                        logits.argmax(1) == y,
                        seed,
                        config.answers,
                    )
                )
            partial.write(rows=rows, which=None, epoch=0, network={}, optimizer={}, scheduler={})
    return rows


# ------------------------------------------------------------------------------------------------ main


def main(argv):
    since = time.perf_counter()
    config = configure(DownstreamConfig, argv)
    models, trained, size, device, precision, autocast, out = eval_linear.start(config)
    task = open_task(config, trained, size)
    n_fit = (
        len(task.train)
        if config.mode == "finetune"
        else len(data.hold_out(task.train.labels, config.held_out, config.seed)[0])
    )
    config.batch_size = eval_linear.batch_of(config.batch_size, n_fit)
    protocol = eval_linear.resolved_protocol(config, models, task, size, precision)
    partial = eval_linear.Partial(
        out, {name: value for name, value in protocol.items() if name not in eval_linear.MACHINE}
    )
    if probe.rank_and_world()[0] == 0:
        print(
            f"{task.name}, {config.mode}: {len(task.train)} training images, {len(task.test)} test images, {task.classes} classes, {config.epochs} epochs, "
            f"batch {config.batch_size}, {device.type} {precision}"
            + (f"; continuing {partial.path}" if os.path.exists(partial.path) else ""),
            flush=True,
        )
    learn = finetune if config.mode == "finetune" else eval_linear.linear_probe
    rows = learn(models, task, config, size, device, autocast, partial)
    eval_linear.finish(task, protocol, partial, out, time.perf_counter() - since, rows)


if __name__ == "__main__":
    with exit_on_usage_error("stopped; the same command continues after the last finished epoch"):
        main(sys.argv[1:])
