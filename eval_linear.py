"""Linear probes and kNN of frozen backbones on clean and perturbed test images: the paper's main tables (its section 4).

    python eval_linear.py --ckpt=out/in100_clever/ckpt.pt --data=/path/to/imagenet
    python eval_linear.py --ckpt=out/demo/ckpt.pt --protocol=fast                         in a minute: fixed views, their features kept
    python eval_linear.py --ckpt=A/ckpt.pt --compare=B/ckpt.pt --untrained=True --seeds=5

One pass of the backbones over a batch serves every part (full, ir, ef) and every learning rate: the classifiers train together. The learning
rate that counts is the one that did best on a slice of the training set held out for it, after the last epoch; the scripts' fixed one
stands beside it. The test decodes an image once for all perturbations, each drawn from (seed, image)."""

import hashlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import probe
from augment import PERTURBATIONS, Recipe, augment
from configurator import UsageError, configure, exit_on_usage_error, nearest
from draws import key, uniforms
from model import must_divide, read_checkpoint, save_atomically, split

CROP_SCALE = (
    0.08,
    1.0,
)  # of the image's area, a classifier's training views (torchvision's default; DINO's eval_linear)
PUBLISHED = {  # (method, arch, recipe) -> linear top-1 of IN-100, 200 epochs (the authors' README): orig, cj+ro
    ("dino", "vit_tiny", "caug"): (66.2, 62.6),
    ("clever", "vit_tiny", "caug"): (68.7, 66.0),
    ("dino", "vit_tiny", "baug"): (71.9, 46.0),
    ("clever", "vit_tiny", "baug"): (74.9, 48.3),
    ("dino", "vit_small", "caug"): (73.2, 71.0),
    ("clever", "vit_small", "caug"): (75.7, 73.6),
    ("dino", "vit_small", "baug"): (75.9, 50.7),
    ("clever", "vit_small", "baug"): (76.7, 50.4),
    ("dino", "resnet18", "caug"): (71.5, 68.7),
    ("clever", "resnet18", "caug"): (74.2, 71.3),
    ("dino", "resnet18", "baug"): (74.4, 46.8),
    ("clever", "resnet18", "baug"): (76.8, 46.5),
    ("dino", "resnet50", "caug"): (78.4, 76.4),
    ("clever", "resnet50", "caug"): (79.1, 77.7),
    ("dino", "resnet50", "baug"): (80.6, 53.8),
    ("clever", "resnet50", "baug"): (81.1, 53.9),
    ("dino", "vmamba_tiny", "caug"): (80.9, 79.5),
    ("clever", "vmamba_tiny", "caug"): (83.0, 81.1),
    ("dino", "vmamba_tiny", "baug"): (83.2, 53.4),
    ("clever", "vmamba_tiny", "baug"): (83.7, 54.4),
}


@dataclass
class LinearConfig:
    """Knobs of eval_linear.py: linear probes and kNN on clean and perturbed images."""

    # what is judged
    ckpt: str = ""  # checkpoint or weight file: ours, DINO's, timm's, torchvision's or VMamba's
    compare: str = ""  # a second one of the same architecture, such as DINO's beside CLeVER's
    untrained: bool = False  # also judge the same backbone with random weights
    arch: str = ""  # of a foreign file; found from its weights, this is a check
    img_size: int = 0  # side of the test crop; 0: the checkpoint's
    part: str = ""  # 'full', 'ir' or 'ef'; default: all that the checkpoint has
    cut: str = "last"  # of several concatenated blocks: 'last' cuts ir and ef in the last one only (published), 'every' in each
    blocks: int = 0  # CLS of so many last blocks; 0: the protocol's (ViT 4; vit_base CLS and mean patch of the last; others pooled)
    # on what
    data: str = ""  # as in train.py; default: what the checkpoint was trained on
    classes: str = (
        ""  # default: the list the checkpoint was trained on, if any; 'all': every class folder
    )
    data_root: str = "data"
    download: bool = False
    tests: str = "orig,cj,cj+flip,cj+ro,cj+ro+et,ro,cj+ro180,cj+ro+et50,cj+ro+et150"  # columns: names of augment.PERTURBATIONS
    # how
    protocol: str = "paper"  # 'paper': new random crops each epoch; 'fast': features of a few fixed views, kept, train in a minute
    views: int = 4  # 'fast': random crops of each image whose features are kept
    epochs: int = 100
    batch_size: int = 512  # global; the paper's 128 per GPU x 4
    lr: float = 0.001  # per 256 images, the scripts' (the paper's text: 0.002); reported whatever the held-out slice says
    lrs: tuple = (0.01, 0.05, 0.2, 1.0)  # more to choose from, trained at the same time
    held_out: float = (
        0.05  # share of the training set that chooses the learning rate and trains nothing
    )
    knn: bool = True  # also weighted kNN (k 20, temperature 0.07) on the backbone's z
    answers: bool = False  # also keep which test images were right, for error bars (evidence.py)
    seeds: int = 1  # repeat with seed, seed + 1, ...: mean and standard deviation
    seed: int = 0  # of the order, crops, classifiers, held-out slice and perturbations
    # the machine
    workers: int = 8
    device: str = "auto"
    precision: str = "auto"
    scan: str = "auto"  # VMamba's selective scan, as in train.py
    out: str = ""  # folder for results.json; default: the checkpoint's


# ------------------------------------------------------------------------------------------------ what a classifier sees


class Representation(nn.Module):
    """Frozen backbones side by side: x (B, 3, H, W) -> (B, dim), each model's features; a part of a model is a choice of columns.

    .columns[(row, part)] and .z_columns[(row, part)]: indices into dim of the part, and of the part of the backbone's own z within it.
    A ViT gives CLS of its last 4 blocks, vit_base CLS and mean patch of the last (DINO's linear protocol), other backbones their z;
    blocks = n gives CLS of the last n instead. cut: 'last' cuts ir and ef in the last block alone (the published scripts; both of vit_base's
    rows are of that block), 'every' in each."""

    def __init__(self, models, cut="last", blocks=0):
        super().__init__()
        self.backbones = nn.ModuleList(model.backbone for model in models)
        self.taken, self.columns, self.z_columns, self.dim = [], {}, {}, 0
        for model in models:
            is_vit, D = hasattr(model.backbone, "tokens"), model.backbone.dim
            depth = len(model.backbone.blocks) if is_vit else 1
            if blocks > depth:
                raise UsageError(
                    f"blocks={blocks}: {model.trained['arch']} has "
                    + (f"{depth}" if is_vit else "no blocks to concatenate, take --blocks=0")
                )
            mean_patch = is_vit and not blocks and model.trained["arch"] == "vit_base"
            n = 1 if not is_vit or mean_patch else blocks or min(4, depth)
            columns = self.dim + torch.arange((n + mean_patch) * D).view(
                -1, D
            )  # a row a block; vit_base: CLS, then mean patch
            for part, (there, z) in cut_columns(
                columns, model.ratio, "every" if mean_patch else cut, z_row=n - 1
            ).items():
                self.columns[model.row, part], self.z_columns[model.row, part] = there, z
            self.taken.append((n, mean_patch))
            self.dim += columns.numel()
        self.eval()

    def forward(self, x):
        features = []
        for backbone, (n, mean_patch) in zip(self.backbones, self.taken):
            if n == 1 and not mean_patch:
                features.append(backbone(x))
                continue
            tokens = backbone.tokens(x, n)  # n of (B, 1+P, D)
            features += [t[:, 0] for t in tokens]
            if mean_patch:
                features.append(tokens[-1][:, 1:].mean(1))
        return torch.cat(features, 1)


def cut_columns(columns, ratio, cut, z_row):
    """columns (blocks, D) -> {part: (its columns, those of them in the backbone's z, which is row z_row)}."""
    z = dict(probe.parts(columns[z_row], ratio))
    if ratio == 1:
        return {"full": (columns.flatten(), z["full"])}
    ir, ef = split(columns, ratio)
    if cut == "last":
        ir, ef = torch.cat([columns[:-1].flatten(), ir[-1]]), ef[-1]
    return {
        "full": (columns.flatten(), z["full"]),
        "ir": (ir.flatten(), z["ir"]),
        "ef": (ef.flatten(), z["ef"]),
    }


class Classifiers(nn.Module):
    """A linear classifier for each of some columns of the features and each of n_lrs learning rates: z (B, dim) -> [(n_lrs, B, C)].

    Weights start at N(0, 0.01), the same for all learning rates, biases at 0 (DINO). Each classifier's gradient is its own: they only share
    the matrix product."""

    def __init__(self, columns, n_classes, n_lrs, seed=0):
        super().__init__()
        self.columns, self.n_classes = columns, n_classes
        first = [
            0.01 * torch.randn(n_classes, len(c), generator=torch.Generator().manual_seed(seed))
            for c in columns
        ]
        self.weights = nn.ModuleList(
            nn.ParameterList(w.clone() for _ in range(n_lrs)) for w in first
        )
        self.biases = nn.ModuleList(
            nn.ParameterList(torch.zeros(n_classes) for _ in range(n_lrs)) for _ in first
        )

    def forward(self, z):
        logits = []
        for c, weights, biases in zip(self.columns, self.weights, self.biases):
            part = F.linear(
                z[:, c], torch.cat(list(weights)), torch.cat(list(biases))
            )  # (B, n_lrs * C)
            logits.append(part.unflatten(1, (-1, self.n_classes)).transpose(0, 1))
        return logits

    def groups(self, lrs):
        """The optimiser's parameter groups: one a learning rate."""
        return [
            dict(
                params=[
                    p for parts in (self.weights, self.biases) for part in parts for p in [part[i]]
                ],
                lr=lr,
            )
            for i, lr in enumerate(lrs)
        ]


def sum_of_losses(logits, labels):
    """The cross entropies of all classifiers, each the mean over the batch, added up."""
    return sum(F.cross_entropy(l.flatten(0, 1), labels.repeat(len(l))) * len(l) for l in logits)


@torch.no_grad()
def answers(classifiers, z, labels):
    """Whether z (N, dim) is taken for its label, labels (N,) -> [bool (n_lrs, N)]."""
    right = [
        [l.argmax(2) == y for l in classifiers(some)]
        for some, y in zip(z.split(4096), labels.split(4096))
    ]
    return [torch.cat(pieces, 1) for pieces in zip(*right)]


def accuracies(classifiers, z, labels):
    """Top-1 of answers in %: [(n_lrs,)]."""
    return [100 * right.double().mean(1) for right in answers(classifiers, z, labels)]


# ------------------------------------------------------------------------------------------------ the protocol


class Task(NamedTuple):
    """What classifiers are to learn."""

    name: str
    train: data.Images
    test: data.Images
    classes: int
    view: Callable  # (crops uint8 (B, 3, S, S), keys (B,)) -> normalised (B, 3, S, S): a training batch
    label: Callable  # (keys (B,), labels (B,)) -> (B,), what view made of the labels
    tests: (
        Callable  # seed -> [(name, transform of a centre crop, label or None for the image's own)]
    )
    chosen_on: Callable  # as tests: what the held-out slice chooses the learning rate on


def flipped(crops, keys):
    """The views that classifiers train on: a flip with probability 0.5, nothing else."""
    return augment(crops, Recipe(flip=0.5), keys)


def own_label(keys, labels):
    return labels


def perturbations(names):
    """'orig,cj+ro' -> a Task's tests."""
    chosen = [name.strip() for name in names.split(",")]
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"tests={names}: names a test twice")
    for name in chosen:
        if name not in PERTURBATIONS:
            raise UsageError(
                f"tests={name}: choose from {', '.join(PERTURBATIONS)}{nearest(name, list(PERTURBATIONS))}"
            )
    return lambda seed: [(name, probe.perturbed(name, seed), None) for name in chosen]


def test_features(module, images, tests, progress, **common):
    """-> {test name: (features (N, dim), labels (N,))} in one pass; tests of one name, such as four turns, are joined."""
    on_tests, labels = probe.features(
        module, images, [transform for _, transform, _ in tests], progress=progress, **common
    )
    joined = {}
    for (name, _, label), z in zip(tests, on_tests):
        joined.setdefault(name, ([], []))
        joined[name][0].append(z)
        joined[name][1].append(labels if label is None else torch.full_like(labels, label))
    return {name: (torch.cat(z), torch.cat(y)) for name, (z, y) in joined.items()}


def linear_probe(models, task, config, size, device, autocast, partial, knn=False):
    """-> rows of results.json (result). partial: Partial, what an interrupted evaluation had done. knn: also judge the backbones' own z by kNN; its neighbours are the whole training set.

    SGD with momentum 0.9, no weight decay, a cosine to 0 over the epochs, lr per 256 images of the batch."""
    rank, world = probe.rank_and_world()
    common = dict(size=size, device=device, autocast=autocast, workers=config.workers)
    wanted = probe.chosen_parts(models, config.part, config.ckpt)
    representation = Representation(models, config.cut, config.blocks)
    columns = [representation.columns[name].to(device) for name in wanted]
    lrs = sorted({config.lr, *config.lrs})
    rows, state = partial.read(("rows", "epoch", "seed", "classifiers", "optimizer", "scheduler"))
    on_train = None
    for seed in range(config.seed, config.seed + config.seeds):
        if any(row["seed"] == seed for row in rows):
            continue
        fit, held = data.hold_out(task.train.labels, config.held_out, seed)
        fit, held = data.subset(task.train, fit), data.subset(task.train, held)
        batch, per_epoch = config.batch_size, len(fit) // config.batch_size
        classifiers = Classifiers(columns, task.classes, len(lrs), seed).to(device)
        optimizer = torch.optim.SGD(
            classifiers.groups([lr * batch / 256 for lr in lrs]), momentum=0.9
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        done = 0
        if state and state["seed"] == seed:
            done = state["epoch"]
            for name, part in (
                ("classifiers", classifiers),
                ("optimizer", optimizer),
                ("scheduler", scheduler),
            ):
                part.load_state_dict(state[name])
        together = nn.parallel.DistributedDataParallel(classifiers) if world > 1 else classifiers
        start, stop = done * per_epoch, config.epochs * per_epoch
        if config.protocol == "fast":
            kept = (
                kept_features(representation, task, fit, seed, config, common)
                if start < stop
                else ()
            )
            stream = from_kept(
                kept, data.Schedule(len(fit), batch, seed, start, stop, rank, world), seed
            )
        else:
            stream = from_images(representation, task, fit, batch, seed, start, stop, common)
        bar = tqdm(
            stream,
            total=stop,
            initial=start,
            disable=rank > 0,
            unit="step",
            desc=f"{task.name}, seed {seed}",
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        for step, (z, labels) in enumerate(bar, start):
            loss = sum_of_losses(together(z), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (step + 1) % per_epoch == 0:
                scheduler.step()
                partial.write(
                    rows=rows,
                    seed=seed,
                    epoch=(step + 1) // per_epoch,
                    classifiers=classifiers.state_dict(),
                    optimizer=optimizer.state_dict(),
                    scheduler=scheduler.state_dict(),
                )

        tests = task.tests(seed)
        [(z, y)] = test_features(
            representation, held, task.chosen_on(seed), "features of the held-out slice", **common
        ).values()
        probe.must_be_finite(z, config.ckpt)
        best = [
            int(a.argmax()) for a in accuracies(classifiers, z, y)
        ]  # of each part, its learning rate
        on_tests = test_features(
            representation, task.test, tests, "features of the test images", **common
        )
        for test, (z, y) in on_tests.items():
            for i, ((row, part), of_lrs) in enumerate(zip(wanted, answers(classifiers, z, y))):
                for judge, lr in (
                    ("linear, chosen lr", lrs[best[i]]),
                    (f"linear, lr {config.lr:g}", config.lr),
                ):
                    rows.append(
                        result(
                            row,
                            part,
                            len(columns[i]),
                            judge,
                            lr,
                            test,
                            of_lrs[lrs.index(lr)],
                            seed,
                            config.answers,
                        )
                    )
        if knn:
            if on_train is None:
                own_z = Representation(models, blocks=1)
                [on_train], train_y = probe.features(
                    own_z,
                    task.train,
                    [probe.perturbed("orig")],
                    progress="features for kNN",
                    **common,
                )
            for test, (z, y) in on_tests.items():
                for name in wanted:
                    right = probe.knn_answers(
                        on_train[:, own_z.columns[name]],
                        train_y,
                        z[:, representation.z_columns[name]],
                        y,
                    )
                    rows.append(
                        result(
                            *name,
                            len(own_z.columns[name]),
                            "kNN",
                            None,
                            test,
                            right,
                            seed,
                            config.answers,
                        )
                    )
    return rows


def result(row, part, dims, judge, lr, test, right, seed, keep):
    """A row of results.json from right, bool (n,): top-1 in %, and if they are to be kept the answers."""
    numbers = dict(
        row=row,
        part=part,
        dims=dims,
        judge=judge,
        lr=lr,
        test=test,
        metric="top1",
        value=round(probe.percent(right), 2),
        seed=seed,
        n=len(right),
    )
    return numbers | dict(right=probe.packed(right)) if keep else numbers


def batch_of(batch_size, n):
    """The global batch: batch_size, or where there are fewer images as many, in eights if possible so that the ranks can share it."""
    world = probe.rank_and_world()[1]
    if n < 1:
        raise UsageError("no image is left to train on when one is held out; give more images")
    batch = min(batch_size, n // 8 * 8 or n)
    if batch % world:
        raise UsageError(
            f"a batch of {batch} does not divide among {world} ranks: take --batch_size={math.ceil(batch / world) * world} or other ranks"
        )
    return batch


def from_images(representation, task, images, batch, seed, start, stop, common):
    """Batches (z (B, dim), labels (B,)) of new random crops, this rank's share."""
    device, broken_files = common["device"], data.BrokenFiles(max(len(images), 100))
    for crops, keys, labels, broken in data.crop_loader(
        images,
        common["size"],
        CROP_SCALE,
        batch,
        seed,
        start,
        stop,
        common["workers"],
        device,
        *probe.rank_and_world(),
    ):
        broken_files.report(broken, tqdm.write)
        x = task.view(crops.to(device, non_blocking=True), keys)
        with torch.no_grad(), common["autocast"]():
            z = probe.in_pieces(representation, x).float()
        yield z, task.label(keys, labels).to(device)


def kept_features(representation, task, images, seed, config, common):
    """-> [(z (N, dim) in half precision, labels (N,))], one for each of `views` fixed random crops of every image."""
    kept = []
    for v in range(config.views):
        [z], labels = probe.features(
            representation,
            images,
            [task.view],
            progress=f"features of view {v + 1} of {config.views}",
            seed=seed,
            epoch=v,
            scale=CROP_SCALE,
            **common,
        )
        probe.must_be_finite(z, config.ckpt)
        kept.append(
            (
                z.half(),
                task.label(key(seed, v, torch.arange(len(images))), labels.cpu()).to(z.device),
            )
        )
    return kept


def from_kept(kept, schedule, seed):
    """Batches as from_images gives them, of the images that `schedule` names, each in one of its kept views."""
    for items in schedule:
        epoch, index = items[0][0], torch.tensor([i for _, i in items])
        view = (uniforms(key(seed, 40, epoch, index), 1)[:, 0] * len(kept)).long()
        z, y = kept[0]
        z, y = (
            torch.empty(len(index), z.shape[1], device=z.device),
            torch.empty(len(index), dtype=y.dtype, device=y.device),
        )
        for v, (kept_z, kept_y) in enumerate(kept):
            mine, chosen = (view == v).nonzero()[:, 0].to(z.device), index[view == v].to(z.device)
            z[mine], y[mine] = kept_z[chosen].float(), kept_y[chosen]
        yield z, y


class Partial:
    """The file beside results.json that keeps an interrupted evaluation; its name tells the evaluation apart from others."""

    def __init__(self, folder, protocol):
        self.path = os.path.join(
            folder,
            f"{protocol['task']}-{digest_of(json.dumps(protocol, sort_keys=True).encode())}.partial.pt",
        )

    def read(self, names):
        """-> rows of what is finished, the state of what is not (or None), on every rank what the first one reads."""
        held = [
            read_checkpoint(self.path)
            if os.path.exists(self.path) and probe.rank_and_world()[0] == 0
            else None
        ]
        if dist.is_initialized():
            dist.broadcast_object_list(held)
        if held[0] is None:
            return [], None
        if not isinstance(held[0], dict) or not held[0].keys() >= set(names):
            raise UsageError(f"{self.path}: not what an interrupted evaluation leaves; remove it")
        return held[0]["rows"], held[0]

    def write(self, **state):
        if probe.rank_and_world()[0] == 0:
            save_atomically(state, self.path)

    def remove(self):
        if probe.rank_and_world()[0] == 0 and os.path.exists(self.path):
            os.remove(self.path)


def digest_of(data):
    return hashlib.sha1(data).hexdigest()[:8]


def digest_of_weights(module):
    """Eight letters that tell these weights from others."""
    return digest_of(
        b"".join(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            for value in module.state_dict().values()
        )
    )


MACHINE = (
    "workers",
    "device",
    "out",
    "data_root",
    "download",
)  # knobs that change nothing of an evaluation's numbers


def resolved_protocol(config, models, task, size, precision):
    """What results.json tells of an evaluation: the knobs, the weights, how many images."""
    return dict(
        asdict(config),
        task=task.name,
        img_size=size,
        precision=precision,
        arch=models[-1].trained["arch"],
        weights={model.row: digest_of_weights(model.backbone) for model in models},
        classes_n=task.classes,
        train_n=len(task.train),
        test_n=len(task.test),
    )


# ------------------------------------------------------------------------------------------------ main


def published_rows(models, classes, tests):
    """Rows of the authors' table for what is a cell of it: IN-100, and a model's method, backbone and recipe."""
    if sorted(classes) != sorted(data.read_classes("configs/in100_classes.txt")):
        return []
    known = [
        (
            model,
            PUBLISHED.get(
                tuple(model.trained.get(name) for name in ("method", "arch", "recipe")), ()
            ),
        )
        for model in models
    ]
    return [
        dict(
            row=f"{model.row}, published",
            part="full",
            dims="",
            judge="linear, 200 epochs",
            test=test,
            value=value,
        )
        for model, values in known
        for test, value in zip(("orig", "cj+ro"), values)
        if test in tests
    ]


def start(config):
    """What every evaluation begins with -> models, the checkpoint's config, its crop's side, device, precision, autocast, results folder."""
    _, _, device = probe.join_processes(config.device)
    probe.choose_scan(config.scan)
    precision, autocast = probe.choose_precision(config.precision, device)
    models, trained = probe.open_models(config, device, config.untrained)
    if config.arch and config.arch != trained["arch"]:
        raise UsageError(
            f"arch={config.arch}: {config.ckpt} holds a {trained['arch']}; leave --arch away"
        )
    probe.chosen_parts(models, config.part, config.ckpt)
    size = config.img_size or trained["img_size"]
    must_divide(models[0].backbone, trained["arch"], img_size=size)
    return models, trained, size, device, precision, autocast, probe.results_folder(config)


def finish(task, protocol, partial, out, seconds, rows, published=()):
    """Print the table and append the rows to results.json."""
    if probe.rank_and_world()[0] == 0:
        print("\n" + "\n".join(probe.table_lines([*rows, *published])), flush=True)
        chosen = dict.fromkeys(
            f"{row['row']} {row['part']} {row['lr']:g}"
            for row in rows
            if row["judge"] == "linear, chosen lr"
        )
        print(f"\nchosen learning rates: {', '.join(chosen)}" if chosen else "")
        probe.append_results(os.path.join(out, "results.json"), task.name, protocol, seconds, rows)
        print(
            f"{seconds:.0f} s; every number with its protocol is in {os.path.join(out, 'results.json')}"
        )
    partial.remove()
    probe.wait_for_ranks()


def main(argv):
    since = time.perf_counter()
    config = configure(LinearConfig, argv)
    tests = perturbations(config.tests)
    models, trained, size, device, precision, autocast, out = start(config)
    config.data, config.classes = probe.data_of(config, trained)
    train, val = data.labelled_splits(
        config.data, config.classes, config.data_root, config.download, size
    )
    config.batch_size = batch_of(
        config.batch_size, len(data.hold_out(train.labels, config.held_out, config.seed)[0])
    )
    task = Task(
        "linear", train, val, len(train.classes), flipped, own_label, tests, perturbations("orig")
    )
    protocol = resolved_protocol(config, models, task, size, precision)
    partial = Partial(out, {name: value for name, value in protocol.items() if name not in MACHINE})
    if probe.rank_and_world()[0] == 0:
        print(
            f"{config.protocol} protocol, {len(train)} training images ({config.held_out:.0%} of them held out), {len(val)} test images, {task.classes} classes, "
            f"{config.epochs} epochs, batch {config.batch_size}, {device.type} {precision}"
            + (f"; continuing {partial.path}" if os.path.exists(partial.path) else ""),
            flush=True,
        )
    rows = linear_probe(models, task, config, size, device, autocast, partial, config.knn)
    finish(
        task,
        protocol,
        partial,
        out,
        time.perf_counter() - since,
        rows,
        published_rows(models, train.classes, {row["test"] for row in rows}),
    )


if __name__ == "__main__":
    with exit_on_usage_error("stopped; the same command continues after the last finished epoch"):
        main(sys.argv[1:])
