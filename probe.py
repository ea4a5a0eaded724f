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
    """z of every image under every transform: one pass over the decoded images -> list of float32 (N, dim), on `device`; all ranks share the
    work and each gets everything. The backbone is put into eval mode for it and back."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loader = data.eval_loader(images, size, batch_size, workers, device, rank, world)
    outputs = [torch.zeros(len(images), backbone.dim, device=device) for _ in transforms]
    was_training, at = backbone.training, rank
    broken = data.BrokenFiles(len(images))
    backbone.eval()
    for batch, keys, _, bad in tqdm(loader, desc=progress, leave=False, disable=rank > 0 or not progress, mininterval=0.5 if sys.stderr.isatty() else 60):
        broken.report(bad, tqdm.write)
        batch = batch.to(device, non_blocking=True)
        for transform, output in zip(transforms, outputs):
            with autocast():
                z = backbone(transform(batch, keys))
            output[at:at + len(batch) * world:world] = z.float()
        at += len(batch) * world
    backbone.train(was_training)
    for output in outputs if world > 1 else ():
        dist.all_reduce(output)  # each row is zero but on one rank
    return outputs


def parts(z, ratio):
    """z (N, D) -> {'full': z, 'ir': ..., 'ir as wide as ef': ..., 'ef': ...}; 'full' alone where ratio is 1, that is without a split."""
    z_ir, z_ef = split(z, ratio)
    if ratio == 1:
        return {"full": z}
    return {"full": z, "ir": z_ir, "ir as wide as ef": z_ir[:, :z_ef.shape[1]], "ef": z_ef}


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

    Class: a ridge probe fitted to clean training images, tested on the clean validation images and on the same turned by -90 .. 90 degrees
    (corners black). Rotation: a ridge probe for 0 / 90 / 180 / 270 degrees, fitted and tested on images turned exactly so. kNN as DINO's."""
    rows, turns = [], [quarter_turn(n) for n in range(4)]
    which_train, which_val = (torch.arange(4).repeat_interleave(len(images)) for images in (train, val))
    chance = 100 / len(val.classes)

    def add(row, part, dims, values):
        rows.extend(dict(row=row, part=part, dims=dims, test="ro" if "rotated" in column else "orig", metric=column, value=round(value, 2), seed=seed, n=len(val))
                    for column, value in zip(COLUMNS, values))

    for row, backbone, ratio in models:
        on_train = features(backbone, train, turns, size, device, autocast, workers, progress=f"features of {row}, train")
        on_val = features(backbone, val, [*turns, perturbed("ro", seed)], size, device, autocast, workers, progress=f"features of {row}, val")
        by_part = [parts(z, ratio) for z in (torch.cat(on_train), torch.cat(on_val[:4]), on_val[4])]
        for part in by_part[0]:
            turned_train, turned_val, rotated = (z[part] for z in by_part)
            clean_train, clean_val = turned_train[:len(train)], turned_val[:len(val)]
            add(row, part, clean_train.shape[1],
                [*ridge_accuracies(clean_train, train.labels, [(clean_val, val.labels), (rotated, val.labels)]),
                 *ridge_accuracies(turned_train, which_train, [(turned_val, which_val)]),
                 *(knn_accuracy(clean_train, train.labels, z, val.labels) for z in (clean_val, rotated))])
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
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True)
    runs.append(dict(task=task, protocol=protocol, commit=git.stdout.strip() or None, date=datetime.datetime.now().isoformat(timespec="seconds"),
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
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def choose_precision(name, device):
    """'auto', 'bf16' or 'fp32' -> (the one it is, the autocast context to compute in). Parameters, losses and EMA are fp32 either way."""
    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
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
    start, models = time.perf_counter(), []
    for path in filter(None, (config.ckpt, config.compare)):
        backbone, trained = load_backbone(path)
        name = trained.get("method", os.path.basename(path))
        models.append((name, backbone.to(device), trained["ratio"] if name == "clever" else 1))
    size = trained["img_size"]
    torch.manual_seed(config.seed)
    models.insert(0, ("untrained", build_backbone(trained["arch"], size, trained["patch_size"]).to(device), 1))
    train, val = (data.open_images(config.data, split, config.classes, config.data_root, img_size=size) for split in ("train", "val"))
    if val is None or train.labels.min() < 0:
        raise UsageError(f"data={config.data}: a probe needs labels, train/CLASS and val/CLASS folders")
    rows = judge(models, train, val, size, device, autocast, config.workers, config.seed)
    print("\n".join(table_lines(rows)))
    out = config.out or os.path.dirname(config.ckpt) or "."
    append_results(os.path.join(out, "results.json"), "probe", {**asdict(config), "precision": precision}, time.perf_counter() - start, rows)


if __name__ == "__main__":
    with exit_on_usage_error():
        main(sys.argv[1:])
