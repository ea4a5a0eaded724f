"""Frozen backbone -> features -> kNN and ridge classifiers."""

import functools
import math
import sys

from lib import data
from lib.config import UsageError
from lib.processor import exact_fp32
from lib.results import result_row

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from augment import perturbation, quarter_turn

RIDGE_TESTS = {  # metric of ridge_rows -> test
    "class": "orig",
    "class, rotated": "ro",
    "which of 4 rotations": "orig",
    "kNN": "orig",
    "kNN, rotated": "ro",
}
CHUNK = 2**25  # numbers computed at a time, whole rows: 256 MB in fp64

# --- features -------------------------------------------------------------------------------------


def part_slices(dim, d_ir, matched=False):
    """Return the columns of the parts of z: {"full": slice, "ir": slice, "ef": slice}.

    Without a split (d_ir == dim) there is only "full". matched: also "ir[:d_ef]", as many of ir's
    columns as ef has, to compare ef with.
    """
    parts = {"full": slice(0, dim)}
    if d_ir < dim:
        parts["ir"] = slice(0, d_ir)
        if matched:
            parts["ir[:d_ef]"] = slice(0, min(d_ir, dim - d_ir))
        parts["ef"] = slice(d_ir, dim)
    return parts


@torch.no_grad()
def extract(
    backbone, images, transforms, size, here, workers=0, batch_size=256, progress="", **views
):
    """Compute z of every image under every transform, in one pass over the decoded images.

    Returns [z (N, dim) float32, one for each transform] and labels (N,), the same on all ranks.
    A transform maps crops uint8 (B, 3, size, size) and sample seeds (B,) to the backbone's input.
    views: scale=(low, high), seed, epoch of random crops instead of central ones (eval_loader).
    The next image takes the place of a broken one, with its label.
    """
    n = len(images)
    outputs = [torch.zeros(n, backbone.dim, device=here.device) for _ in transforms]
    labels = torch.zeros(n, dtype=torch.int64, device=here.device)
    loader = data.eval_loader(images, size, batch_size, workers, here, **views)
    broken = data.BrokenFiles(max(n / here.world, 100))  # a small slice may have a broken one
    was_training = backbone.training
    backbone.eval()
    at = here.rank
    for crops, seeds, batch_labels, bad in progress_bar(loader, here, progress):
        broken.report(bad, tqdm.write)
        rows = slice(at, at + len(crops) * here.world, here.world)
        at = rows.stop
        labels[rows] = batch_labels.to(here.device)
        on_device = crops.to(here.device, non_blocking=True)
        for transform, output in zip(transforms, outputs):
            view = transform(on_device, seeds)  # fp32: outside of autocast
            with here.autocast():
                output[rows] = in_pieces(backbone, view).float()
    backbone.train(was_training)
    for tensor in [*outputs, labels] if here.world > 1 else []:
        dist.all_reduce(tensor)  # a row is zero on all ranks but one
    return outputs, labels


def in_pieces(backbone, x):
    """Return backbone(x). On a CPU 64 images at a time fit its cache: 1.7x faster for vit_micro."""
    n = 64 if x.device.type == "cpu" else len(x)
    return torch.cat([backbone(some) for some in x.split(n)])


def progress_bar(items, here, name, **numbers):
    """Show a tqdm bar on the main rank; in a log file a line every 30 s. No name: no bar."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    is_off = not (here.is_main and name)
    return tqdm(items, name, leave=False, disable=is_off, mininterval=seconds, **numbers)


def check_finite(z, ckpt):
    """Raise UsageError if a feature of a checkpoint is NaN or infinite."""
    if not z.isfinite().all():
        fix = "use an earlier checkpoint, or --precision=fp32"
        raise UsageError(f"{ckpt}: features that are not finite (NaN, inf); {fix}")


def std_and_rank(z):
    """Return two measures of collapse of z (N, D): standard deviation and effective rank.

    std: of L2-normalized z over the images, times sqrt(D). 1: spread evenly; 0: a single point.
    Rank: exp of the entropy of the covariance's spectrum, 1 .. D (Roy and Vetterli 2007).
    """
    N, D = z.shape
    chunks = z.split(max(1, CHUNK // D))
    mean = sum(F.normalize(x.double(), dim=-1).sum(0) for x in chunks) / N
    covariance = torch.zeros(D, D, dtype=torch.float64, device=z.device)
    for x in chunks:
        centered = F.normalize(x.double(), dim=-1) - mean
        covariance.addmm_(centered.T, centered)
    covariance /= N - 1
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    share = eigenvalues / eigenvalues.sum().clamp(min=1e-300)
    rank = torch.special.entr(share).sum().exp()
    return (covariance.diag().sqrt().mean() * math.sqrt(D)).item(), rank.item()


# --- kNN and ridge classifiers --------------------------------------------------------------------


@exact_fp32()
def knn_correct(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """Return whether kNN classifies test images correctly, (N,) bool (Wu et al. 2018; DINO).

    The k nearest vote with the weight exp(cosine / temperature).
    """
    device = train_x.device
    train_x = F.normalize(train_x, dim=-1)
    train_y = train_y.to(device)
    n_classes = int(train_y.max()) + 1
    chunk = max(1, 2**27 // len(train_x))  # similarities: half a gigabyte
    right = []
    for x, y in zip(F.normalize(test_x, dim=-1).split(chunk), test_y.to(device).split(chunk)):
        similarity, neighbors = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)  # (b, k)
        votes = torch.zeros(len(x), n_classes, device=device)
        votes.scatter_add_(1, train_y[neighbors], ((similarity - 1) / temperature).exp())
        right.append(votes.argmax(1) == y)
    return torch.cat(right)


def ridge_correct(train_x, train_y, tests, group=1):
    """Return whether a ridge classifier is right on tests [(x, y)]: [(N,) bool].

    Least squares with an L2 penalty, fitted to one-hot labels (N,).
    """
    train_y = train_y.to(train_x.device)
    n_classes = int(train_y.max()) + 1

    def one_hot(y):
        return F.one_hot(y, n_classes).double()

    def n_wrong(logits, y):
        return (logits.argmax(1) != y).sum()

    predict = fit_ridge(train_x, train_y, one_hot, n_wrong, group)
    return [torch.cat([l.argmax(1) for l in predict(x)]) == y.to(x.device) for x, y in tests]


def fit_ridge(train_x, train_y, targets, error, group=1):
    """Fit ridge regression: x (N, D), y (N, ...) -> function of x (n, D), yields (b, T) fp64.

    targets(y (b, ...)) -> what is fitted (b, T) fp64. Features are standardized by the training
    set. Every tenth training image is held out: the smallest error(prediction, y), a sum over them,
    chooses the penalty. Then all images are fitted. group: rows that are views of one image.
    """
    mean = train_x.mean(0)
    std = train_x.std(0) + 1e-6
    n_targets = targets(train_y[:1]).shape[1]
    rows = max(1, CHUNK // max(train_x.shape[1], n_targets))  # in fp64 at a time

    def standardized(x):
        return ((x - mean) / std).double()

    def chunks(taken):  # of training images: x (b, D + 1), y (b, ...); taken (N,): which ones
        for x, y, some in zip(train_x.split(rows), train_y.split(rows), taken.split(rows)):
            known = standardized(x[some])
            yield torch.cat([known, torch.ones_like(known[:, :1])], 1), y[some]

    def fit(taken, penalties):  # one decomposition serves all penalties
        n = int(taken.sum())
        gram = target = 0
        for x, y in chunks(taken):
            gram = gram + x.T @ x
            target = target + x.T @ targets(y)
        values, vectors = torch.linalg.eigh(gram / n)
        target = vectors.T @ target / n
        return [vectors @ (target / (values.clamp(min=0) + p)[:, None]) for p in penalties]

    held_out = torch.arange(len(train_x), device=train_x.device) // group % 10 == 9
    penalties = [10.0**p for p in range(-6, 2)]
    trials = fit(~held_out, penalties)
    errors = torch.zeros(len(penalties), dtype=torch.float64, device=train_x.device)
    for x, y in chunks(held_out):
        errors += torch.stack([error(x @ w, y) for w in trials])
    [weight] = fit(torch.ones_like(held_out), [penalties[int(errors.argmin())]])
    return lambda x: (standardized(some) @ weight[:-1] + weight[-1] for some in x.split(rows))


def ridge_features(model, train, val, size, here, workers=0, seed=0):
    """Extract (z, labels) of train in four turns; of val in four turns and randomly rotated."""
    run = functools.partial(extract, model.backbone, size=size, here=here, workers=workers)
    turns = [quarter_turn(n) for n in range(4)]
    of_train = run(train, turns, progress=f"features of {model.row}, train")
    rotated = perturbation("ro", seed)
    return of_train, run(val, [*turns, rotated], progress=f"features of {model.row}, val")


def ridge_rows(models, train, val, size, here, workers=0, seed=0, save_correct=False):
    """Evaluate models by kNN and ridge classifiers -> rows of results.json.

    Class: trained on clean images, tested on clean ones and on rotated ones (-90 .. 90 degrees,
    corners black). Which of 4 rotations: trained and tested on images turned by 0, 90, 180, 270
    degrees. kNN: as the class.
    """
    y_turns, val_y_turns = (torch.arange(4).repeat_interleave(len(x)) for x in (train, val))
    rows = []
    for model in models:
        known = model.ridge_features or ridge_features(model, train, val, size, here, workers, seed)
        (z, y), (val_z, val_y) = known
        whole = [torch.cat(z), torch.cat(val_z[:4]), val_z[4]]
        parts = part_slices(model.backbone.dim, model.d_ir, matched=True)
        for part, columns in parts.items():
            turns, val_turns, rotated = (x[:, columns] for x in whole)
            clean = turns[: len(train)], y
            tests = [(val_turns[: len(val)], val_y), (rotated, val_y)]
            right = ridge_correct(*clean, tests)
            right += ridge_correct(turns, y_turns, [(val_turns, val_y_turns)])
            right += [knn_correct(*clean, *test) for test in tests]
            for (metric, test), of_test in zip(RIDGE_TESTS.items(), right):
                where = model.row, part, turns.shape[1], of_test, save_correct
                rows.append(result_row(*where, test=test, metric=metric, seed=seed))
    return rows


def chance_rows(n_classes, n, seed=0):
    """Return the rows of ridge_rows for a classifier that guesses, n images."""
    rows = []
    for metric, test in RIDGE_TESTS.items():
        value = 25 if "4" in metric else round(100 / n_classes, 2)
        row = dict(row="chance", part="", dims="", test=test, metric=metric, value=value)
        rows.append(row | dict(seed=seed, n=n))
    return rows
