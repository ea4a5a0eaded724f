"""Quick judges of a frozen backbone: weighted kNN, ridge probes of class and rotation, the collapse watch; and the table of them.

    python probe.py --ckpt=out/demo/ckpt.pt --data=shapes [--compare=other.pt]

Each representation is judged whole (full) and by its parts (ir, ef); beside ef stands as wide a slice of ir, beside all of them the same
backbone untrained. `results.json` beside the checkpoint keeps every number with its protocol."""
import datetime
import functools
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from augment import PERTURBATIONS, augment
from configurator import UsageError, configure, exit_on_usage_error
from draws import key
from model import build_backbone, load_backbone, split

# ------------------------------------------------------------------------------------------------ features


def perturbed(name, seed=0):
    """The transform (images uint8 (B, 3, S, S), keys (B,)) -> normalised (B, 3, S, S) of PERTURBATIONS[name], drawn once per image and seed."""
    return lambda images, keys: augment(images, PERTURBATIONS[name], key(keys, 20, seed))


def quarter_turn(n):
    """The transform that turns images by n * 90 degrees, exactly; no border appears that would give the answer away."""
    return lambda images, keys: augment(torch.rot90(images, n, (2, 3)).contiguous(), PERTURBATIONS["orig"], keys)


@torch.no_grad()
def features(backbone, images, transforms, size, device, autocast, workers=0, batch_size=256, progress=""):
    """z of every image under every transform, in one pass over the decoded images -> list of float32 (N, dim), labels (N,), on `device`.

    All ranks share the work and each gets everything. The labels are those of what was read: a broken image's place is taken by the next
    one, label included. The backbone is put into eval mode for it and back."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loader = data.eval_loader(images, size, batch_size, workers, device, rank, world)
    outputs = [torch.zeros(len(images), backbone.dim, device=device) for _ in transforms]
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    was_training, at = backbone.training, rank
    broken = data.BrokenFiles(len(images) / world)
    backbone.eval()
    for batch, keys, label, bad in tqdm(loader, desc=progress, leave=False, disable=rank > 0 or not progress, mininterval=0.5 if sys.stderr.isatty() else 60):
        broken.report(bad, tqdm.write)
        batch = batch.to(device, non_blocking=True)
        mine = slice(at, at + len(batch) * world, world)
        labels[mine] = label.to(device)
        for transform, output in zip(transforms, outputs):
            view = transform(batch, keys)  # fp32: outside of autocast
            with autocast():
                output[mine] = backbone(view).float()
        at += len(batch) * world
    backbone.train(was_training)
    for tensor in (*outputs, labels) if world > 1 else ():
        dist.all_reduce(tensor)  # each row is zero but on one rank
    return outputs, labels


def parts(z, ratio):
    """z (N, D) -> {'full': z, 'ir': z_ir, 'ef': z_ef}; 'full' alone where ratio is 1, that is without a split."""
    z_ir, z_ef = split(z, ratio)
    return {"full": z} if ratio == 1 else {"full": z, "ir": z_ir, "ef": z_ef}


# ------------------------------------------------------------------------------------------------ judges


def knn_accuracy(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """Top-1 in % of the weighted nearest-neighbour vote: exp(cosine / temperature) of the k nearest (DINO's protocol; Wu et al. 2018)."""
    train_x, test_x = F.normalize(train_x, dim=-1), F.normalize(test_x, dim=-1)
    train_y, test_y = train_y.to(train_x.device), test_y.to(train_x.device)
    right = 0
    for x, y in zip(test_x.split(1024), test_y.split(1024)):
        similarity, neighbours = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)  # (b, k)
        votes = torch.zeros(len(x), int(train_y.max()) + 1, device=x.device)
        votes.scatter_add_(1, train_y[neighbours], ((similarity - 1) / temperature).exp())
        right += (votes.argmax(1) == y).sum().item()
    return 100 * right / len(test_y)


def ridge_accuracies(train_x, train_y, tests):
    """Top-1 in % on each (x, y) of tests, of the linear classifier that least squares with an L2 penalty fits to one-hot labels.

    Features are standardised by the training set; the penalty is chosen on every tenth training image, held out, then all are fitted."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    x = ((train_x - mean) / std).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # (N, D + 1)
    train_y = train_y.to(x.device)
    targets = F.one_hot(train_y).double()
    held_out = torch.arange(len(x), device=x.device) % 10 == 9

    def fit(x, targets, penalties):
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))  # one decomposition serves all penalties
        projected = vectors.T @ (x.T @ targets) / len(x)
        return [vectors @ (projected / (values.clamp(min=0) + penalty)[:, None]) for penalty in penalties]

    penalties = [10.0**p for p in range(-6, 2)]
    on_held_out = [((x[held_out] @ w).argmax(1) == train_y[held_out]).double().mean() for w in fit(x[~held_out], targets[~held_out], penalties)]
    [weight] = fit(x, targets, [penalties[int(torch.stack(on_held_out).argmax())]])
    standardised = [((test_x - mean) / std).double() for test_x, _ in tests]
    return [100 * ((z @ weight[:-1] + weight[-1]).argmax(1) == y.to(z.device)).double().mean().item() for z, (_, y) in zip(standardised, tests)]


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


def judge(models, train, val, size, device, autocast, workers=0, seed=0):
    """models: [(row name, backbone, ratio)] -> the rows of results.json, one a number: {row, part, dims, test, metric, value in %, seed, n}.
    A second 'ir' row holds ir's first dimensions, as many as ef has: what ef is to be compared with.

    Class: a ridge probe fitted to clean training images, tested on the clean validation images and on the same turned by -90 .. 90 degrees
    (corners black). Rotation: a ridge probe for 0 / 90 / 180 / 270 degrees, fitted and tested on images turned exactly so. kNN as DINO's."""
    rows, turns = [], [quarter_turn(n) for n in range(4)]
    which_train, which_val = (torch.arange(4).repeat_interleave(len(images)) for images in (train, val))
    chance = 100 / len(val.classes)
    common = dict(size=size, device=device, autocast=autocast, workers=workers)

    def add(row, part, dims, values):
        rows.extend(dict(row=row, part=part, dims=dims, test="ro" if "rotated" in column else "orig", metric=column, value=round(value, 2), seed=seed, n=len(val))
                    for column, value in zip(COLUMNS, values))

    for row, backbone, ratio in models:
        on_train, train_y = features(backbone, train, turns, progress=f"features of {row}, train", **common)
        on_val, val_y = features(backbone, val, [*turns, perturbed("ro", seed)], progress=f"features of {row}, val", **common)
        by_part = [list(parts(z, ratio).items()) for z in (torch.cat(on_train), torch.cat(on_val[:4]), on_val[4])]
        if ratio < 1:
            for named in by_part:
                named.insert(2, ("ir", named[1][1][:, :named[2][1].shape[1]]))
        for (part, turned_train), (_, turned_val), (_, rotated) in zip(*by_part):
            clean_train, clean_val = turned_train[:len(train)], turned_val[:len(val)]
            add(row, part, clean_train.shape[1],
                [*ridge_accuracies(clean_train, train_y, [(clean_val, val_y), (rotated, val_y)]),
                 *ridge_accuracies(turned_train, which_train, [(turned_val, which_val)]),
                 *(knn_accuracy(clean_train, train_y, z, val_y) for z in (clean_val, rotated))])
    add("chance", "", "", [chance, chance, 25, chance, chance])
    return rows


def table_lines(rows):
    """judge's rows as the lines of a table, to be read on a screen and pasted into a README alike."""
    cells = {}
    for row in rows:
        cells.setdefault((row["row"], row["part"], row["dims"]), {})[row["metric"]] = row["value"]
    yield f"| {'accuracy in %':27} | dims | " + " | ".join(COLUMNS) + " |"
    yield "|---|--:|" + "--:|" * len(COLUMNS)
    for (row, part, dims), values in cells.items():
        yield f"| {row + (', ' + part if part else ''):27} | {dims:4} | " + " | ".join(f"{values[column]:{len(column)}.1f}" for column in COLUMNS) + " |"


def append_results(path, task, protocol, seconds, rows):
    """Append one evaluation to the list in the JSON file `path` (design: task, protocol, commit, date, seconds, rows)."""
    try:
        with open(path) as file:
            runs = json.load(file)
    except FileNotFoundError:
        runs = []
    except ValueError:
        raise UsageError(f"{path}: not a JSON list of results; move it away") from None
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    runs.append(dict(task=task, protocol=protocol, commit=commit or None, date=datetime.datetime.now().isoformat(timespec="seconds"),
                     seconds=round(seconds, 1), rows=rows))
    with open(path + ".partial", "w") as file:
        json.dump(runs, file, indent=1)
    os.replace(path + ".partial", path)


# ------------------------------------------------------------------------------------------------ devices


def choose_device(name):
    """'auto', 'cpu' or 'cuda' -> torch.device: under torchrun the rank's own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: torch sees no GPU here; take --device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UsageError(f"{os.environ['LOCAL_WORLD_SIZE']} processes but {torch.cuda.device_count()} GPUs here: lower --nproc_per_node, or take --device=cpu")
    return torch.device("cuda", local_rank)


def choose_precision(name, device):
    """'auto', 'bf16' or 'fp32' -> (the one it is, the autocast context to compute in). Parameters, losses and EMA are fp32 either way."""
    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if has_bf16 else "fp32"
    return name, functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=name == "bf16")


@dataclass
class ProbeConfig:
    """Knobs of probe.py: the table of kNN and ridge probes of one or two checkpoints beside the untrained backbone."""
    ckpt: str = ""          # checkpoint or backbone file
    compare: str = ""       # a second one, such as DINO's beside CLeVER's
    data: str = "shapes"    # as in train.py; needs labels, train and val
    classes: str = ""
    data_root: str = "data"
    workers: int = 2
    seed: int = 0           # of the rotations and of the untrained weights
    device: str = "auto"
    precision: str = "auto"
    out: str = ""           # folder for results.json; default: the checkpoint's


def main(argv):
    config = configure(ProbeConfig, argv)
    if not config.ckpt:
        raise UsageError("no checkpoint given: --ckpt=out/demo/ckpt.pt")
    device = choose_device(config.device)
    precision, autocast = choose_precision(config.precision, device)
    out = config.out or os.path.dirname(config.ckpt) or "."
    if not os.path.isdir(out):
        raise UsageError(f"{out}: no such folder; --out must be one, for results.json")
    start, models, facts = time.perf_counter(), [], set()
    for path in filter(None, (config.ckpt, config.compare)):
        backbone, trained = load_backbone(path)
        facts.add((trained["arch"], trained["img_size"], trained["patch_size"]))
        method = trained.get("method", "foreign")
        name = method if method not in [name for name, *_ in models] else path
        models.append((name, backbone.to(device), trained["ratio"] if method == "clever" else 1))
    if len(facts) > 1:
        raise UsageError(f"{config.ckpt} and {config.compare} differ in arch, img_size or patch_size ({facts}): a table must compare like with like")
    size = trained["img_size"]
    torch.manual_seed(config.seed)
    models.insert(0, ("untrained", build_backbone(trained["arch"], size, trained["patch_size"]).to(device), 1))
    train, val = data.open_splits(config.data, config.classes, config.data_root, img_size=size)
    if val is None or train.labels.min() < 0:
        raise UsageError(f"data={config.data}: a probe needs labels, train/CLASS and val/CLASS folders")
    rows = judge(models, train, val, size, device, autocast, config.workers, config.seed)
    print("\n".join(table_lines(rows)))
    append_results(os.path.join(out, "results.json"), "probe", {**asdict(config), "precision": precision}, time.perf_counter() - start, rows)


if __name__ == "__main__":
    with exit_on_usage_error():
        main(sys.argv[1:])
