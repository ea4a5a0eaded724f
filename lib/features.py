"""Quick judges of a frozen backbone: weighted kNN, ridge probes of class and rotation, the collapse watch; and the table of them.

    python probe.py --ckpt=out/demo/ckpt.pt --data=shapes [--compare=other.pt]

Each representation is judged whole (full) and by its parts (ir, ef); beside ef stands as wide a slice of ir, beside all of them the same
backbone untrained. `results.json` beside the checkpoint keeps every number with its protocol."""

import base64
import ctypes
import datetime
import faulthandler
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import vmamba
from augment import PERTURBATIONS, augment
from configurator import UsageError, configure, exit_on_usage_error, nearest
from draws import key
from model import build_backbone, load_backbone, split

# ------------------------------------------------------------------------------------------------ features


def perturbed(name, seed=0):
    """The transform (images uint8 (B, 3, S, S), keys (B,)) -> normalised (B, 3, S, S) of PERTURBATIONS[name], drawn once per image and seed."""
    return lambda images, keys: augment(images, PERTURBATIONS[name], key(keys, 20, seed))


def quarter_turn(n):
    """The transform that turns images by n * 90 degrees, exactly; no border appears that would give the answer away."""
    return lambda images, keys: augment(
        torch.rot90(images, n, (2, 3)).contiguous(), PERTURBATIONS["orig"], keys
    )


@torch.no_grad()
def features(
    backbone,
    images,
    transforms,
    size,
    device,
    autocast,
    workers=0,
    batch_size=256,
    progress="",
    **views,
):
    """z of every image under every transform, in one pass over the decoded images -> list of float32 (N, dim), labels (N,), on `device`.

    Images are cropped at the centre, or by views = dict(scale=..., seed=..., epoch=...) at random (data.eval_loader). All ranks share the work and each gets everything. The labels are those of what was read: a broken image's place is taken by the next
    one, label included. The backbone is put into eval mode for it and back."""
    rank, world = rank_and_world()
    loader = data.eval_loader(images, size, batch_size, workers, device, rank, world, **views)
    outputs = [torch.zeros(len(images), backbone.dim, device=device) for _ in transforms]
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    was_training, at = backbone.training, rank
    broken = data.BrokenFiles(
        max(len(images) / world, 100)
    )  # a small slice may hold the one of a good data set
    backbone.eval()
    for batch, keys, label, bad in tqdm(
        loader,
        desc=progress,
        leave=False,
        disable=rank > 0 or not progress,
        mininterval=0.5 if sys.stderr.isatty() else 60,
    ):
        broken.report(bad, tqdm.write)
        batch = batch.to(device, non_blocking=True)
        mine = slice(at, at + len(batch) * world, world)
        labels[mine] = label.to(device)
        for transform, output in zip(transforms, outputs):
            view = transform(batch, keys)  # fp32: outside of autocast
            with autocast():
                output[mine] = in_pieces(backbone, view).float()
        at += len(batch) * world
    backbone.train(was_training)
    for tensor in (*outputs, labels) if world > 1 else ():
        dist.all_reduce(tensor)  # each row is zero but on one rank
    return outputs, labels


def in_pieces(backbone, x):
    """backbone(x); on a CPU 64 images at a time, whose activations its cache holds: 1.7x faster for vit_micro."""
    return torch.cat([backbone(some) for some in x.split(64 if x.device.type == "cpu" else len(x))])


def parts(z, ratio):
    """z (N, D) -> {'full': z, 'ir': z_ir, 'ef': z_ef}; 'full' alone where ratio is 1, that is without a split."""
    z_ir, z_ef = split(z, ratio)
    return {"full": z} if ratio == 1 else {"full": z, "ir": z_ir, "ef": z_ef}


# ------------------------------------------------------------------------------------------------ judges


def knn_accuracy(*arguments, **knobs):
    """Top-1 in % of knn_answers."""
    return percent(knn_answers(*arguments, **knobs))


def knn_answers(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """The weighted nearest-neighbour vote, exp(cosine / temperature) of the k nearest (DINO's protocol; Wu et al. 2018), of each test image
    -> whether it is right, bool (N,)."""
    train_x, test_x = F.normalize(train_x, dim=-1), F.normalize(test_x, dim=-1)
    train_y, test_y = train_y.to(train_x.device), test_y.to(train_x.device)
    right = []
    at_once = max(1, 2**27 // len(train_x))  # similarities: half a gigabyte
    for x, y in zip(test_x.split(at_once), test_y.split(at_once)):
        similarity, neighbours = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)  # (b, k)
        votes = torch.zeros(len(x), int(train_y.max()) + 1, device=x.device)
        votes.scatter_add_(1, train_y[neighbours], ((similarity - 1) / temperature).exp())
        right.append(votes.argmax(1) == y)
    return torch.cat(right)


def ridge_accuracies(train_x, train_y, tests):
    """Top-1 in % of ridge_answers, [one for each of tests]."""
    return [percent(right) for right in ridge_answers(train_x, train_y, tests)]


def ridge_answers(train_x, train_y, tests):
    """Of each (x, y) of tests whether the linear classifier that least squares with an L2 penalty fits to one-hot labels is right -> [bool (N,)].

    Features are standardised by the training set; the penalty is chosen on every tenth training image, held out, then all are fitted."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    x = ((train_x - mean) / std).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # (N, D + 1)
    train_y = train_y.to(x.device)
    targets = F.one_hot(train_y).double()
    held_out = torch.arange(len(x), device=x.device) % 10 == 9

    def fit(x, targets, penalties):
        values, vectors = torch.linalg.eigh(
            x.T @ x / len(x)
        )  # one decomposition serves all penalties
        projected = vectors.T @ (x.T @ targets) / len(x)
        return [
            vectors @ (projected / (values.clamp(min=0) + penalty)[:, None])
            for penalty in penalties
        ]

    penalties = [10.0**p for p in range(-6, 2)]
    on_held_out = [
        ((x[held_out] @ w).argmax(1) == train_y[held_out]).double().mean()
        for w in fit(x[~held_out], targets[~held_out], penalties)
    ]
    [weight] = fit(x, targets, [penalties[int(torch.stack(on_held_out).argmax())]])
    standardised = [((test_x - mean) / std).double() for test_x, _ in tests]
    return [
        (z @ weight[:-1] + weight[-1]).argmax(1) == y.to(z.device)
        for z, (_, y) in zip(standardised, tests)
    ]


def percent(right):
    """bool (N,) -> how many are, in %."""
    return 100 * right.double().mean().item()


def packed(right):
    """bool (N,) -> text of a bit an image (base64), as results.json keeps it."""
    return base64.b64encode(np.packbits(right.cpu().numpy())).decode()


def unpacked(text, n):
    """The inverse of packed -> bool (n,), a NumPy array."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(bool)


def spread(z):
    """z (N, D) -> (std, effective rank), the two signs of collapse. std: of the L2-normalised z over the images, times sqrt(D): 1 when spread
    evenly over the sphere, 0 when all are one point. Rank: exp of the entropy of the covariance's spectrum, 1 .. D (Roy and Vetterli 2007)."""
    unit = F.normalize(z.double(), dim=-1)
    eigenvalues = torch.linalg.eigvalsh(torch.atleast_2d(torch.cov(unit.T))).clamp(min=0)
    share = eigenvalues / eigenvalues.sum().clamp(min=1e-300)
    rank = torch.special.entr(share).sum().exp()
    return (unit.std(0).mean() * math.sqrt(z.shape[1])).item(), rank.item()


# ------------------------------------------------------------------------------------------------ the table

COLUMNS = ("class", "class, rotated", "which of 4 rotations", "kNN", "kNN, rotated")


def judge(models, train, val, size, device, autocast, workers=0, seed=0, answers=False):
    """models: [(row name, backbone, ratio, ...)], as Model -> the rows of results.json, one a number: {row, part, dims, test, metric, value in %, seed, n}.
    A second 'ir' row holds ir's first dimensions, as many as ef has: what ef is to be compared with. answers: each row also has 'right', which
    of its n test images were (packed).

    Class: a ridge probe fitted to clean training images, tested on the clean validation images and on the same turned by -90 .. 90 degrees
    (corners black). Rotation: a ridge probe for 0 / 90 / 180 / 270 degrees, fitted and tested on images turned exactly so. kNN as DINO's."""
    rows, turns = [], [quarter_turn(n) for n in range(4)]
    which_train, which_val = (
        torch.arange(4).repeat_interleave(len(images)) for images in (train, val)
    )
    chance = 100 / len(val.classes)
    common = dict(size=size, device=device, autocast=autocast, workers=workers)

    def add(row, part, dims, values, all_right=()):
        for i, (column, value) in enumerate(zip(COLUMNS, values)):
            more = dict(right=packed(all_right[i])) if answers and all_right else {}
            n = len(all_right[i]) if all_right else len(val)
            rows.append(
                dict(
                    row=row,
                    part=part,
                    dims=dims,
                    test="ro" if "rotated" in column else "orig",
                    metric=column,
                    value=round(value, 2),
                    seed=seed,
                    n=n,
                    **more,
                )
            )

    for row, backbone, ratio, *_ in models:
        on_train, train_y = features(
            backbone, train, turns, progress=f"features of {row}, train", **common
        )
        on_val, val_y = features(
            backbone,
            val,
            [*turns, perturbed("ro", seed)],
            progress=f"features of {row}, val",
            **common,
        )
        by_part = [
            list(parts(z, ratio).items())
            for z in (torch.cat(on_train), torch.cat(on_val[:4]), on_val[4])
        ]
        if ratio < 1:
            for named in by_part:
                named.insert(2, ("ir", named[1][1][:, : named[2][1].shape[1]]))
        for (part, turned_train), (_, turned_val), (_, rotated) in zip(*by_part):
            clean_train, clean_val = turned_train[: len(train)], turned_val[: len(val)]
            all_right = [
                *ridge_answers(clean_train, train_y, [(clean_val, val_y), (rotated, val_y)]),
                *ridge_answers(turned_train, which_train, [(turned_val, which_val)]),
                *(knn_answers(clean_train, train_y, z, val_y) for z in (clean_val, rotated)),
            ]
            add(row, part, clean_train.shape[1], map(percent, all_right), all_right)
    add("chance", "", "", [chance, chance, 25, chance, chance])
    return rows


def table_lines(rows):
    """Rows of results.json as the lines of a table, to be read on a screen and pasted into a README alike; over several seeds mean ± std.

    A column is a metric; where rows tell their `judge`, a column is a test and the judge stands beside the dims."""
    column = "test" if "judge" in rows[0] else "metric"
    columns, cells = list(dict.fromkeys(row[column] for row in rows)), {}
    for row in rows:
        cells.setdefault(
            (row["row"], row["part"], row["dims"], row.get("judge", "")), {}
        ).setdefault(row[column], []).append(row["value"])
    judges = column == "test"
    wide = max(27, *(len(f"{row}, {part}") for row, part, *_ in cells))
    width = max(len(judge) for *_, judge in cells)
    yield (
        f"| {'in %':{wide}} | dims | "
        + (f"{'judge':{width}} | " if judges else "")
        + " | ".join(columns)
        + " |"
    )
    yield "|---|--:|" + ("---|" if judges else "") + "--:|" * len(columns)
    for (row, part, dims, judge), values in cells.items():
        numbers = (f"{_mean_and_std(values.get(name, [])):>{len(name)}}" for name in columns)
        yield (
            f"| {row + (', ' + part if part else ''):{wide}} | {dims:4} | "
            + (f"{judge:{width}} | " if judges else "")
            + " | ".join(numbers)
            + " |"
        )


def _mean_and_std(values):
    return (f"{statistics.mean(values):.1f}" if values else "") + (
        f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    )


def read_results(path):
    """The list of evaluations in the JSON file `path`; [] where there is none."""
    try:
        with open(path) as file:
            runs = json.load(file)
    except FileNotFoundError:
        return []
    except ValueError:
        runs = None
    if not isinstance(runs, list):
        raise UsageError(f"{path}: not a JSON list of results; move it away")
    return runs


def append_results(path, task, protocol, seconds, rows):
    """Append one evaluation to the list in the JSON file `path` (design: task, protocol, commit, date, seconds, rows)."""
    runs = read_results(path)
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=os.path.dirname(os.path.abspath(__file__)),
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    runs.append(
        dict(
            task=task,
            protocol=protocol,
            commit=commit or None,
            date=datetime.datetime.now().isoformat(timespec="seconds"),
            seconds=round(seconds, 1),
            rows=rows,
        )
    )
    with open(path + ".partial", "w") as file:
        json.dump(runs, file, indent=1)
    os.replace(path + ".partial", path)


# ------------------------------------------------------------------------------------------------ devices and processes


def rank_and_world():
    """-> (this process's rank, number of processes); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device):
    """-> (rank, world size, torch.device); joins the process group where torchrun started us, needs none otherwise."""
    device = choose_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        if world == int(
            os.environ.get("LOCAL_WORLD_SIZE", 0)
        ):  # on one machine: torchrun's restarted ranks would else find the dead ones' addresses
            store = dist.PrefixStore(
                f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
            )
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world
        )
    return *rank_and_world(), device


@functools.cache
def host_group():
    """The process group through which ranks agree on what the hosts know, without waiting for a device: None, the default one, where that is gloo."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None


def wait_for_ranks():
    """The end of a script: every rank has come so far. The process group stays as it is, for exit_on_usage_error ends the process without clearing
    up: destroyed here, its last reference would be DistributedDataParallel's, which at its own end holds Python's lock while it waits for a
    thread of communication that may want the lock to drop a tensor. Two runs of some thousand have hung there."""
    if dist.is_initialized():
        dist.barrier()


def choose_device(name):
    """'auto', 'cpu' or 'cuda' -> torch.device: under torchrun the rank's own GPU; where it is the CPU, freed memory is kept from now on."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: torch sees no GPU here; take --device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes but {torch.cuda.device_count()} GPUs here: lower --nproc_per_node, or take --device=cpu"
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory():
    """Tell the C library to keep what is freed. It hands large blocks back to the system, which clears every page anew when a step asks for
    them again: with 65536 prototypes that was nearly half of a step's time on a CPU. Where the library is not glibc, nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        (
            mallopt(M_MMAP_MAX, 0),
            mallopt(M_TRIM_THRESHOLD, -1),
        )  # no block a mapping of its own; never give back


def choose_scan(name):
    """'auto', 'triton', 'torch' or 'loop': which selective scan VMamba takes from now on."""
    vmamba.default_backend = None if name == "auto" else name


def choose_precision(name, device):
    """'auto', 'bf16' or 'fp32' -> (the one it is, the autocast context to compute in). Parameters, losses and EMA are fp32 either way."""
    amx_is_broken = device.type == "cpu" and _do_without_broken_amx()
    if name == "auto":
        if device.type == "cuda":
            fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast_bf16 = (
                torch.cpu._is_avx512_bf16_supported() and not amx_is_broken
            )  # Intel's bf16 without AMX is slower than its fp32
        name = "bf16" if fast_bf16 else "fp32"
    return name, functools.partial(
        torch.autocast, device.type, torch.bfloat16, enabled=name == "bf16"
    )


@functools.cache
def _do_without_broken_amx():
    """Some virtual machines announce AMX, Intel's matrix unit, and die of its first instruction. So where it is announced a child process
    tries it; if that dies, oneDNN, which has computed nothing yet, is told to keep to AVX-512 -> whether it had to be told."""
    if not torch.cpu._is_amx_tile_supported():
        return False
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
            torch.set_num_threads(1)
            x = torch.ones(64, 64, dtype=torch.bfloat16)
            F.linear(x, x)
            os._exit(0)
        finally:
            os._exit(1)  # whatever was raised: the child must never go on as a second run
    is_broken = os.waitpid(child, 0)[1] != 0
    if is_broken:
        os.environ.setdefault(
            "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"
        )  # processes started by this one inherit it
    return is_broken


# ------------------------------------------------------------------------------------------------ what every evaluation starts from


class Model(NamedTuple):
    """A row of a table."""

    row: str  # what to call it
    backbone: torch.nn.Module  # in eval mode, on the device
    ratio: float  # share of ir; 1: no split, 'full' alone
    trained: (
        dict  # the config it was trained with; of foreign weights arch, img_size and patch_size
    )


def open_models(config, device, untrained):
    """config.ckpt and config.compare, behind the same backbone untrained (from config.seed) if wanted -> [Model], ckpt's config dict.
    UsageError where there is no checkpoint, or they are not alike: never random weights unasked."""
    if not config.ckpt:
        raise UsageError("no checkpoint given: --ckpt=out/demo/ckpt.pt")
    models = []
    for path in filter(None, (config.ckpt, config.compare)):
        backbone, trained = load_backbone(path)
        method = trained.get("method", trained["arch"])
        row = method if method not in [model.row for model in models] else path
        models.append(
            Model(
                row,
                backbone.to(device),
                trained["ratio"] if method in ("clever", "ddcl") else 1,
                trained,
            )
        )
    alike = [
        {name: model.trained[name] for name in ("arch", "img_size", "patch_size")}
        for model in models
    ]
    if alike[0] != alike[-1]:
        raise UsageError(
            f"{config.ckpt} is {alike[0]}, {config.compare} {alike[1]}: a table must compare like with like; give each a table of its own"
        )
    if untrained:
        torch.manual_seed(config.seed)
        fresh = (
            build_backbone(alike[0]["arch"], alike[0]["img_size"], alike[0]["patch_size"])
            .to(device)
            .eval()
        )
        models.append(Model("untrained", fresh, 1, alike[0]))
    return [*models[-1:], *models[:-1]] if untrained else models, models[0].trained


def chosen_parts(models, part, ckpt):
    """[(row, part)] to judge: all, or of each model `part` alone; a model to compare with that has no split stays whole."""
    parts = {model.row: ("full",) if model.ratio == 1 else ("full", "ir", "ef") for model in models}
    if part and part not in ("full", "ir", "ef"):
        raise UsageError(
            f"part={part}: choose from full, ir, ef{nearest(part, ('full', 'ir', 'ef'))}"
        )
    if part and not any(part in names for names in parts.values()):
        raise UsageError(
            f"part={part}: {ckpt} tells of no split, so it has only 'full'; take --part=full, or the ckpt.pt of a CLeVER run"
        )
    return [
        (row, name)
        for row, names in parts.items()
        for name in names
        if not part or name == part or part not in names
    ]


def must_be_finite(z, ckpt):
    if not z.isfinite().all():
        raise UsageError(
            f"{ckpt}: the backbone gives features that are not finite; take an earlier checkpoint, or try --precision=fp32"
        )


def data_of(config, trained):
    """-> the data's name and class list: config's, or where that leaves them open the checkpoint's."""
    source = config.data or trained.get("data", "")
    if not source:
        raise UsageError(f"{config.ckpt} does not tell what it was trained on: give --data")
    if config.classes:
        return source, "" if config.classes == "all" else config.classes
    return source, trained.get("classes", "") if source not in ("shapes", *data.TORCHVISION) else ""


def results_folder(config):
    """Where results.json goes: config.out, or the folder of config.ckpt. UsageError if it cannot be written there."""
    out = config.out or os.path.dirname(config.ckpt) or "."
    if not os.path.isdir(out) or not os.access(out, os.W_OK):
        raise UsageError(f"{out}: no such folder, or not writable; --out=FOLDER takes results.json")
    read_results(os.path.join(out, "results.json"))
    return out


@dataclass
class ProbeConfig:
    """Knobs of probe.py: the table of kNN and ridge probes of one or two checkpoints beside the untrained backbone."""

    ckpt: str = ""  # checkpoint or backbone file
    compare: str = ""  # a second one, such as DINO's beside CLeVER's
    data: str = ""  # as in train.py, with labels, train and val; default: what the checkpoint was trained on
    classes: str = (
        ""  # default: the list the checkpoint was trained on, if any; 'all': every class folder
    )
    data_root: str = "data"
    workers: int = 2
    seed: int = 0  # of the rotations and of the untrained weights
    device: str = "auto"
    precision: str = "auto"
    scan: str = "auto"  # VMamba's selective scan, as in train.py
    answers: bool = False  # also keep which test images were right, for error bars (evidence.py)
    out: str = ""  # folder for results.json; default: the checkpoint's


def main(argv):
    config = configure(ProbeConfig, argv)
    device = choose_device(config.device)
    choose_scan(config.scan)
    precision, autocast = choose_precision(config.precision, device)
    start = time.perf_counter()
    models, trained = open_models(config, device, untrained=True)
    out = results_folder(config)
    size = trained["img_size"]
    config.data, config.classes = data_of(config, trained)
    train, val = data.labelled_splits(config.data, config.classes, config.data_root, img_size=size)
    rows = judge(
        models, train, val, size, device, autocast, config.workers, config.seed, config.answers
    )
    print("\n".join(table_lines(rows)))
    append_results(
        os.path.join(out, "results.json"),
        "probe",
        {**asdict(config), "precision": precision},
        time.perf_counter() - start,
        rows,
    )


if __name__ == "__main__":
    with exit_on_usage_error():
        main(sys.argv[1:])
