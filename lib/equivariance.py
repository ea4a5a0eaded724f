"""What a representation holds of the view, apart from the image: view share, view parameters.

View share: the variance of z between views of one image, divided by its variance between all views
of all images, each summed over z's dimensions. 0: z is invariant. 1: z tells nothing but the view.
Raw, it is what nearest neighbors see; one direction of large variance may dominate it. Whitened by
z's own covariance, all directions count the same: what a linear classifier can use.

View parameters: R^2 of ridge regression from z to what was done to the view: the angle, the color
factors, the crop's place. 1: z tells them exactly. 0: no better than their mean. This measure is
that of EquiMod (Devillers and Lefort 2023), SIE (Garrido et al. 2023) and E-SSL (Dangovski et al.
2022). For flip and elastic it is the accuracy.

Views are made from center crops: each image is decoded once, and image sizes do not matter.
"""

import functools
from typing import NamedTuple

from lib import features, resident
from lib.features import extract, fit_ridge, part_slices, ridge_correct
from lib.images import subset
from lib.rng import fork, sample_seeds

import torch
import torch.nn.functional as F

from augment import PERTURBATIONS, RECIPES, Recipe, augment, crop_boxes, parameters

VIEWS = 4  # of each image and change
LEAST_IMAGES = 500  # of a set, if it has so many, or
IMAGES_PER_DIM = 4  # times z's dimensions: whitening needs more images than dimensions
CROP = (0.25, 1.0)  # share of the image that a random crop covers
BOOTSTRAPS = 1000
NEGLIGIBLE = 1e-6  # of the largest variance: a direction with less is rounding


class Change(NamedTuple):
    """What differs between the views of an image."""

    recipe: Recipe
    crop: tuple | None  # scale of random crops; None: the center crop
    parameters: tuple  # that ridge regression is asked for


_OFF = dict(blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0))
CHANGES = {
    "all": Change(RECIPES["caug+"]._replace(**_OFF), CROP, ()),
    "rotation": Change(PERTURBATIONS["ro"], None, ("angle", "relative angle")),
    "jitter": Change(PERTURBATIONS["cj"], None, ("brightness", "contrast", "saturation", "hue")),
    "crop": Change(Recipe(), CROP, ("crop center", "crop scale")),
    "flip": Change(Recipe(flip=0.5), None, ("flip",)),
    "elastic": Change(Recipe(elastic=0.5), None, ("elastic",)),
}
BINARY = ("flip", "elastic")  # parameters that happen or do not


# --- views and their features ---------------------------------------------------------------------


def change_views(name, view, seed, images, seeds):
    """Make a view: images uint8 (B, 3, S, S), sample seeds (B,) -> normalized (B, 3, S, S)."""
    change = CHANGES[name]
    seeds = fork(seeds, "view", seed, index=view)
    if change.crop:
        images = resident.random_crops(images, seeds, 1, images.shape[-1], change.crop)[:, 0]
    return augment(images, change.recipe, seeds)


def view_features(backbone, images, size, here, workers, seed, changes, progress=""):
    """Extract z of VIEWS views of each image and change: {change: z (N, VIEWS, D) float32}."""
    names = [(name, view) for name in changes for view in range(VIEWS)]
    views = [functools.partial(change_views, *name, seed) for name in names]
    z, _ = extract(backbone, images, views, size, here, workers, progress=progress)
    stacked = torch.stack(z, 1).split(VIEWS, 1)  # one for each change
    return dict(zip(changes, stacked))


def thinned(images, dim):
    """Return enough images for z of `dim` dimensions, taken evenly from the data set."""
    enough = max(LEAST_IMAGES, IMAGES_PER_DIM * dim)
    n = len(images)
    return images if n <= enough else subset(images, torch.arange(enough) * n // enough)


def compared_parts(dim, d_ir, d_split):
    """Return the columns of the parts of z that are compared: {name: slice}.

    d_ir is the model's own split. A model without a split is cut where another is: at d_split.
    """
    parts = part_slices(dim, d_ir, matched=True)
    if d_ir == dim and d_split < dim:
        parts[f"[:{dim - d_split}]"] = slice(0, dim - d_split)
        parts[f"[-{dim - d_split}:]"] = slice(d_split, dim)
    return parts


# --- view share -----------------------------------------------------------------------------------


def view_share(z, weights=None):
    """Return the view share of z (N, M, D), M views of N images; in 0 .. 1.

    weights (..., N): how often each image counts, for the bootstrap; returns (...).
    Both variances are unbiased: for noise the share is 1 for any M.
    """
    N, M, _ = z.shape
    z = z.double()
    z = z - z.mean((0, 1))
    center = z.mean(1)  # (N, D), of each image
    within = (z - center[:, None]).square().sum((1, 2)) / (M - 1)  # (N,)
    length = center.square().sum(1)
    if weights is None:
        weights = torch.ones(N, dtype=torch.float64, device=z.device)
    share = weights / weights.sum(-1, keepdim=True)
    mean = share @ center
    # the images' centers vary by themselves and, by 1/M, because their views do
    between = (share @ length - mean.square().sum(-1)) * N / (N - 1)
    within = share @ within
    return within / (within + (between - within / M).clamp(min=0)).clamp(min=1e-300)


def whitened(z):
    """Map z (N, M, D) to coordinates in which its covariance is the identity: (N, M, rank)."""
    flat = z.double().flatten(0, 1)
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    is_large = values > NEGLIGIBLE * values[-1]
    return (flat @ (vectors[:, is_large] * values[is_large].rsqrt())).view(*z.shape[:2], -1)


def share_and_bootstrap(z):
    """Return the view share of z (N, M, D) and its bootstrap over images (BOOTSTRAPS,)."""
    return view_share(z).item(), view_share(z, resamplings(len(z), z.device))


@functools.cache
def resamplings(n, device, seed=0):
    """Return how often each of n images is drawn in each bootstrap: float64 (BOOTSTRAPS, n)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (BOOTSTRAPS, n), generator=generator)
    counts = torch.zeros(BOOTSTRAPS, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return counts.to(device)


def interval(samples):
    """Return low and high, in %, of 95 % of bootstrapped values (BOOTSTRAPS,)."""
    limits = torch.tensor([0.025, 0.975], dtype=torch.float64, device=samples.device)
    return [round(100 * x, 2) for x in samples.quantile(limits).tolist()]


# --- view parameters ------------------------------------------------------------------------------


def view_parameters(name, n, size, seed):
    """Return what was done to the views of n images in view_features: {name: (n, VIEWS, .)}."""
    change = CHANGES[name]
    sample = sample_seeds(0, 0, torch.arange(n))  # data.eval_loader's
    seeds = fork(sample[:, None], "view", seed, index=torch.arange(VIEWS))
    p = parameters(change.recipe, seeds.flatten())
    angle = torch.deg2rad(p["angle"])
    found = dict(zip(("brightness", "contrast", "saturation"), p["factors"].unbind(1)))
    found |= dict(hue=p["hue"], flip=p["flip"].float(), elastic=(p["elastic"] > 0).float())
    found["angle"] = torch.stack([angle.cos(), angle.sin()], 1)
    found["relative angle"] = angle  # of a view; pairs_of_views takes the difference
    if change.crop:
        box = crop_boxes(size, size, seeds.flatten(), 1, change.crop)[:, 0] / size
        top, left, height, width = box.float().unbind(1)
        found["crop center"] = torch.stack([left + width / 2, top + height / 2], 1)
        found["crop scale"] = height * width
    return {name: x.reshape(n, VIEWS, -1) for name, x in found.items()}


def pairs_of_views(z, angle):
    """Put the views of an image side by side, each beside the next; the angles' difference.

    z (N, M, D), angle (N, M, 1) -> (N, M, 2 D), (N, M, 1).
    """
    return torch.cat([z, z.roll(-1, 1)], -1), angle - angle.roll(-1, 1)


def r_squared(train_z, train_y, test_z, test_y):
    """Return the R^2 of ridge regression from z to y, and its bootstrap over images (BOOTSTRAPS,).

    z (N, M, D), y (N, M, T): M views of N images. The penalty is chosen on every tenth image.
    """
    device = test_z.device
    train_y, test_y = (y.to(device).double() for y in (train_y, test_y))
    mean = train_y.mean((0, 1))
    std = train_y.std((0, 1)).clamp(min=1e-12)
    target = ((train_y - mean) / std).flatten(0, 1)
    views = train_z.shape[1]
    squared_error = functools.partial(F.mse_loss, reduction="sum")
    predict = fit_ridge(train_z.flatten(0, 1), target, torch.clone, squared_error, group=views)
    predicted = torch.cat(list(predict(test_z.flatten(0, 1))))
    error = predicted.view(test_y.shape) * std + mean - test_y
    error = error.square().sum((1, 2))  # (N,)
    variance = (test_y - test_y.mean((0, 1))).square().sum((1, 2))
    counts = resamplings(len(test_z), device)
    return (1 - error.sum() / variance.sum()).item(), 1 - counts @ error / (counts @ variance)


def accuracy(train_z, train_y, test_z, test_y):
    """Return the accuracy of a ridge classifier of whether a change was made, and its bootstrap."""
    [right] = ridge_correct(
        train_z.flatten(0, 1),
        train_y.flatten().long(),
        [(test_z.flatten(0, 1), test_y.flatten().long())],
        group=train_z.shape[1],
    )
    right = right.view(test_z.shape[:2]).double().mean(1)
    counts = resamplings(len(test_z), test_z.device)
    return right.mean().item(), counts @ right / len(right)


# --- rows of a table ------------------------------------------------------------------------------


def ridge_protocol(models, train, val, size, here, workers=0, seed=0, parameters=True, **options):
    """Evaluate models by features.ridge_rows and equivariance_rows -> rows, [sentence].

    parameters: evaluate view parameters too. options: for ridge_rows.
    """
    given = (size, here, workers, seed)
    rows = features.ridge_rows(models, train, val, *given, **options)
    on_views, shares = equivariance_rows(models, train if parameters else None, val, *given)
    order = [model.row for model in models]
    rows = sorted([*rows, *on_views], key=lambda row: order.index(row["row"]))
    sentences = verdict(shares)
    white = [row for row in on_views if row["metric"] == "view share, whitened"]
    if any(row["n"] * VIEWS <= row["dims"] for row in white):
        sentences.append("ignore the whitened shares: there are fewer views than dimensions")
    return [*rows, *features.chance_rows(len(val.classes), len(val), seed)], sentences


def equivariance_rows(models, train, val, size, here, workers=0, seed=0):
    """Measure models on views of val: rows of results.json, and what verdict needs.

    train: the view parameters are fitted on its views; None: no parameters. A row has an interval:
    95 % by a bootstrap over images. verdict's: {(row, part): [raw and whitened share of all
    changes, each with its bootstrap]}.
    """
    rows, shares = [], {}
    d_split = min(model.d_ir for model in models)
    for model in models:
        dim = model.backbone.dim
        given = (size, here, workers, seed, tuple(CHANGES))
        val_z = view_features(model.backbone, thinned(val, dim), *given, "views of val")
        if train is not None:
            train_z = view_features(model.backbone, thinned(train, dim), *given, "views of train")
        for part, columns in compared_parts(dim, model.d_ir, d_split).items():
            for name, whole in val_z.items():
                z = whole[..., columns]
                found = [("view share", name, *share_and_bootstrap(z))]
                found.append(("view share, whitened", name, *share_and_bootstrap(whitened(z))))
                if name == "all":
                    shares[model.row, part] = [measured[2:] for measured in found]
                if train is not None:
                    found += parameters_told(name, train_z[name][..., columns], z, size, seed)
                facts = dict(row=model.row, part=part, dims=z.shape[-1], seed=seed, n=len(z))
                rows += [_row(facts, *measured) for measured in found]
    return rows, shares


def parameters_told(name, train_z, test_z, size, seed):
    """Return (measure, parameter, value, its bootstrap) for each parameter of a change."""
    told = []
    train_y, test_y = (view_parameters(name, len(z), size, seed) for z in (train_z, test_z))
    for parameter in CHANGES[name].parameters:
        both = [(train_z, train_y[parameter]), (test_z, test_y[parameter])]
        if parameter == "relative angle":
            both = [pairs_of_views(*side) for side in both]
        metric, measure = ("accuracy", accuracy) if parameter in BINARY else ("R2", r_squared)
        told.append((metric, parameter, *measure(*both[0], *both[1])))
    return told


def _row(facts, metric, test, value, bootstrap):
    value = round(100 * value, 2)
    return dict(facts, metric=metric, test=test, value=value, interval=interval(bootstrap))


def shares_to_log(model, images, config, here):
    """Return {"view_share_PART", "view_share_white_PART": share of all changes}, for log.jsonl."""
    images = thinned(images, model.backbone.dim)
    how = (config.img_size, here, config.workers, config.seed)
    z = view_features(model.backbone, images, *how, ["all"])["all"]
    numbers = {}
    for part, columns in part_slices(model.backbone.dim, model.d_ir).items():
        numbers[f"view_share_{part}"] = view_share(z[..., columns]).item()
        numbers[f"view_share_white_{part}"] = view_share(whitened(z[..., columns])).item()
    return numbers


def verdict(shares):
    """Say in a line for each split model whether ef depends more on the view than matched ir.

    "about as much as": the interval of the difference, over images, contains 0.
    """
    lines = []
    for row in [row for row, part in shares if part == "ef"]:
        pairs = zip(shares[row, "ef"], shares[row, "ir[:d_ef]"])
        found = []
        for (ef, of_ef), (ir, of_ir) in pairs:
            low, high = interval(of_ef - of_ir)
            more = "more than" if low > 0 else "less than" if high < 0 else "about as much as"
            values = " and ".join(f"{round(100 * x, 2):.1f}" for x in (ef, ir))  # as in the table
            found.append(f"{more} ir[:d_ef] ({values} %)")
        lines.append(f"{row}: ef depends on the view {found[0]}; whitened, {found[1]}")
    return lines


def tell(rows, sentences, path):
    """Print verdict's sentences, draw the picture of the rows, and say where it is."""
    print(*sentences, sep="\n")
    if draw(rows, path):
        print(f"the view shares as a picture: {path}", flush=True)


def draw(rows, path):
    """Draw the view shares of equivariance_rows as bars -> whether matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("view share", "view share, whitened")):
        bars = {}  # label -> rows, one for each change
        for row in rows:
            if row["metric"] == metric:
                label = f"{row['row']}, {row['part']} ({row['dims']})"
                bars.setdefault(label, []).append(row)
        width = 0.8 / len(bars)
        for i, (label, of_label) in enumerate(bars.items()):
            places = [x + (i - (len(bars) - 1) / 2) * width for x in range(len(of_label))]
            values = [row["value"] for row in of_label]
            color = {"ef": "C1", "ir[:d_ef]": "C0"}.get(of_label[0]["part"], str(0.85 - 0.08 * i))
            axes.bar(places, values, 0.9 * width, label=label, color=color)
            ends = zip(*(row["interval"] for row in of_label))
            axes.vlines(places, *ends, color="black", linewidth=1)
        axes.set_xticks(range(len(CHANGES)), CHANGES)
        axes.set_title(f"{metric}, in %")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    return True
