"""Segmentation without labels (the protocols of the paper's section 4): TokenCut's saliency, DINO's label propagation through videos, their measures and pictures.

    python eval_seg.py --ckpt=out/demo/ckpt.pt                                       the built-in shapes: nothing to download
    python eval_seg.py --ckpt=... --task=saliency --data=ECSSD                       or DUTS-TEST, DUT-OMRON: photographs and their masks
    python eval_seg.py --ckpt=... --image=photo.jpg                                  one picture
    python eval_seg.py --ckpt=... --task=davis --data=DAVIS [--compare=dino.pt]      DAVIS-2017's own folder layout

Nothing is trained. Beside the checkpoint (or in --out) it leaves results.json, pictures/ to look at, and masks/: the indexed PNGs that DAVIS's
own tool reads, and saliency masks of 0 and 255. ResNets and VMamba take part through their last feature map of stride 32: label propagation
follows them on a grid four times as coarse as a ViT's of patch 16 in area, TokenCut sees 10 to 15 cells a side; expect little."""

import math
import os
import re
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import probe
from augment import normalize, resize
from configurator import UsageError, configure, exit_on_usage_error, nearest


@dataclass
class SegConfig:
    """Knobs of eval_seg.py: saliency by TokenCut and video segmentation by label propagation, from a frozen backbone."""

    # what is judged
    ckpt: str = ""  # checkpoint or weight file: ours, DINO's, timm's, torchvision's or VMamba's
    compare: str = ""  # a second one of the same architecture, such as DINO's: side by side in table and pictures
    untrained: bool = False  # also judge the same backbone with random weights
    part: str = ""  # davis: 'full', 'ir' or 'ef' of the tokens carries the labels; default: all that the checkpoint has
    # on what
    task: str = "saliency"  # or 'davis'
    data: str = "shapes"  # folder in the data set's own layout; 'shapes': built in
    image: str = ""  # saliency of this one file instead
    size: int = 0  # shorter side in pixels; 0: the protocol's (davis 480; saliency the image's own; shapes four times img_size, at most 224)
    # label propagation: DINO's protocol
    n_last: int = 7  # frames before this one that labels come from, beside the first
    radius: int = 12  # patches a label may travel
    topk: int = 5
    temperature: float = 0.1
    # TokenCut
    tau: float = 0.2  # cosine above which patches are joined
    solver: bool = True  # also refine the masks by the bilateral solver
    # the rest
    pictures: int = 8  # images or sequences to draw
    seed: int = 0  # of the built-in shapes and of the untrained weights
    device: str = "auto"
    precision: str = "auto"
    scan: str = "auto"  # VMamba's selective scan, as in train.py
    out: str = ""  # folder for results.json, masks/ and pictures/; default: the checkpoint's

    def __post_init__(self):
        if self.task not in ("saliency", "davis"):
            raise UsageError(
                f"task={self.task!r}: choose from saliency, davis{nearest(self.task, ('saliency', 'davis'))}"
            )
        if self.image and self.task == "davis":
            raise UsageError(f"image={self.image}: one picture is for --task=saliency")
        if self.part and self.task == "saliency":
            raise UsageError(
                f"part={self.part}: TokenCut compares keys, which come before z is cut into parts; leave it away"
            )


# ------------------------------------------------------------------------------------------------ patches of an image


def patch_side(backbone):
    """Pixels between neighbouring cells of feature_map."""
    return getattr(backbone, "patch_size", 32)


def feature_map(backbone, x):
    """x (1, 3, H, W), sides multiples of patch_side -> (H / side, W / side, dim): a ViT's last block's tokens, others' last map before pooling."""
    if hasattr(backbone, "tokens"):
        h, w = (n // backbone.patch_size for n in x.shape[2:])
        return backbone.tokens(x)[0][0, 1:].unflatten(0, (h, w))
    if hasattr(backbone, "feature_map"):
        return backbone.feature_map(x)[0]
    return nn.Sequential(*list(backbone.children())[:-2])(x)[0].permute(
        1, 2, 0
    )  # torchvision's ResNet but for avgpool and fc


def key_map(backbone, x):
    """As feature_map, of what TokenCut compares: the keys of a ViT's last block."""
    if not hasattr(backbone, "last_keys"):
        return feature_map(backbone, x)
    h, w = (n // backbone.patch_size for n in x.shape[2:])
    return backbone.last_keys(x)[0, 1:].unflatten(0, (h, w))


def to_input(image, side, device):
    """image uint8 (3, H, W), (h, w) -> normalised (1, 3, h, w) on the device."""
    return normalize(resize(image, *side)[None].to(device) / 255)


# ------------------------------------------------------------------------------------------------ TokenCut (Wang et al. 2022)

WEAK = 1e-5  # the edge between patches that are not alike: it keeps the graph connected


def tokencut(features, tau=0.2):
    """features (dim, h, w) of the patches -> mask (h, w) bool, eigenvector (h, w) float64, positive where it speaks for the mask.

    A graph joins patches whose cosine exceeds tau. Its second generalised eigenvector, (D - W) v = lambda D v with v' D v = 1, is cut at
    its mean; the foreground is the side of the patch where |v| is largest (the seed), and of it the connected component of the seed.
    Where all pairs are alike, or none (a single patch has none), nothing can be told apart: mask and vector are zero."""
    _, h, w = features.shape
    unit = F.normalize(features.flatten(1).double(), dim=0)  # (dim, N)
    alike = (unit.T @ unit > tau).fill_diagonal_(True)
    if alike.all() or alike.sum() == h * w:
        return torch.zeros(h, w, dtype=torch.bool, device=features.device), torch.zeros(
            h, w, dtype=torch.float64, device=features.device
        )
    graph = torch.where(alike, 1.0, WEAK).double()  # (N, N)
    scale = graph.sum(1).rsqrt()
    symmetric = (
        torch.eye(h * w, dtype=torch.float64, device=graph.device) - scale[:, None] * graph * scale
    )  # its eigenvectors are D^1/2 v
    v = scale * torch.linalg.eigh(symmetric).eigenvectors[:, 1]
    seed = int(v.abs().argmax())
    if v[seed] <= v.mean():
        v = -v
    v = v.view(h, w)
    return component(v > v.mean(), seed // w, seed % w), v


def component(mask, row, column):
    """mask (h, w) bool -> the part of it that is joined to (row, column) by steps up, down, left and right."""
    grown = torch.zeros_like(mask)
    grown[row, column] = mask[row, column]
    while True:
        wider = grown.clone()
        wider[1:] |= grown[:-1]
        wider[:-1] |= grown[1:]
        wider[:, 1:] |= grown[:, :-1]
        wider[:, :-1] |= grown[:, 1:]
        wider &= mask
        if torch.equal(wider, grown):
            return grown
        grown = wider


THRESHOLDS = 255  # of max F: 0, 1/255, ... (TokenCut's metric file)


def saliency_metrics(maps, gts, beta2=0.3):
    """maps: (H, W) each, in [0, 1]; gts: (H, W) each, foreground above 0.5 -> {max_f, iou, acc}, means over the images in [0, 1].

    As TokenCut's own metrics: iou and acc of the map cut at 0.5; F_beta at 255 thresholds, averaged over images, then its maximum. Precision
    where nothing is predicted is 1, recall where there is nothing to find is 1. An image with neither mask counts as iou 1."""
    return mean_metrics(
        [metrics_of_one(map_, gt, beta2) for map_, gt in zip(maps, gts, strict=True)]
    )


def metrics_of_one(map_, gt, beta2=0.3):
    """map_ (H, W), gt (H, W) -> float64 (2 + THRESHOLDS): iou, accuracy, and F_beta at each threshold."""
    map_, gt = map_.double().cpu(), gt.cpu() > 0.5
    mask = map_ > 0.5
    union = (mask | gt).sum()
    iou = (mask & gt).sum().double() / union if union else torch.tensor(1.0).double()
    splits = torch.arange(THRESHOLDS, dtype=torch.float64) / THRESHOLDS
    exceeded = torch.bucketize(map_.flatten(), splits)  # how many thresholds a pixel lies above
    found, right = (
        torch.bincount(e, minlength=THRESHOLDS + 1).flip(0).cumsum(0).flip(0)[1:].double()
        for e in (exceeded, exceeded[gt.flatten()])
    )
    precision = torch.where(found > 0, right / found.clamp(min=1), 1.0)
    recall = right / gt.sum() if gt.any() else torch.ones_like(right)
    curve = ((1 + beta2) * precision * recall / (beta2 * precision + recall)).nan_to_num(0.0)
    return torch.cat([torch.stack([iou, (mask == gt).double().mean()]), curve])


def mean_metrics(of_each):
    """What metrics_of_one gave for each image -> {max_f, iou, acc}."""
    iou, acc, *curve = torch.stack(of_each).mean(0).tolist()
    return dict(max_f=max(curve), iou=iou, acc=acc)


# ------------------------------------------------------------------------------------------------ bilateral solver (Barron and Poole 2016)

TO_YUV = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def bilateral_solver(
    image,
    target,
    spatial=16,
    luma=16,
    chroma=8,
    lam=256,
    confidence=0.999,
    steps=25,
    tolerance=1e-5,
):
    """image uint8 (3, H, W), target (H, W) in [0, 1] -> (H, W) float64: the map near target that is smooth where the image is.

    Minimises lam * roughness + confidence * (distance to target)^2 over the cells of a grid whose axes are place (cells of `spatial` pixels),
    luminance and the two chrominances: pixels of a cell share a value, and neighbouring cells are drawn together. TokenCut's constants."""
    H, W = target.shape
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    Y, U, V = torch.einsum("ij,jhw->ihw", torch.tensor(TO_YUV).double(), image.cpu().double())
    place = (
        torch.stack(
            [x // spatial, y // spatial, Y // luma, (U + 128) // chroma, (V + 128) // chroma]
        )
        .long()
        .flatten(1)
    )  # (5, H*W)
    place, sides = (
        place + 1,
        place.amax(1) + 3,
    )  # a margin, so that a neighbour's number is never another row's
    strides = torch.tensor([math.prod(sides[:i].tolist()) for i in range(5)])
    cells, cell = torch.unique(
        strides @ place, return_inverse=True
    )  # (M,), (H*W,): the cell of each pixel
    neighbours = []
    for step in torch.cat([strides, -strides]):
        at = torch.searchsorted(cells, cells + step).clamp(max=len(cells) - 1)
        neighbours.append(
            torch.where(cells[at] == cells + step, at, len(cells))
        )  # len(cells): no such cell in the image

    def splat(values):
        return torch.zeros(len(cells), dtype=torch.float64).index_add_(0, cell, values)

    def blurred(values):
        return 10 * values + F.pad(values, (0, 1))[torch.stack(neighbours)].sum(0)

    mass = splat(torch.ones(H * W, dtype=torch.float64))
    n = torch.ones_like(mass)
    for _ in range(10):  # make the blur's rows and columns sum to the cells' mass
        n = (n * mass / blurred(n)).sqrt()
    mass = n * blurred(n)
    weight = confidence * splat(torch.ones(H * W, dtype=torch.float64))
    wanted = confidence * splat(target.cpu().double().flatten())

    def system(values):  # the gradient of the objective is system(values) - wanted
        return lam * (mass * values - n * blurred(n * values)) + weight * values

    diagonal = (lam * (mass - 10 * n * n) + weight).clamp(min=1e-5)
    solution = wanted / weight
    residual = wanted - system(solution)  # conjugate gradients, preconditioned by the diagonal
    direction, energy = residual / diagonal, (residual * residual / diagonal).sum()
    for _ in range(steps):
        if residual.norm() <= tolerance * wanted.norm():
            break
        along = system(direction)
        length = energy / (direction @ along)
        solution, residual = solution + length * direction, residual - length * along
        energy, before = (residual * residual / diagonal).sum(), energy
        direction = residual / diagonal + energy / before * direction
    return solution[cell].view(H, W)


# ------------------------------------------------------------------------------------------------ label propagation (DINO's protocol)

TILE = 12  # patches of a frame are done TILE x TILE at a time: their affinities, some 6 MB, stay in the processor's cache


def propagate(features, first, h, w, n_last=7, radius=12, topk=5, temperature=0.1):
    """features (T, h*w, dim) of the frames' patches, first (C, h, w) the first frame's labels -> (T-1, C, h, w), the others' soft labels.

    A patch takes the mean label of the topk patches most like it, weighted by exp(cosine / temperature), among those at most `radius` rows and
    columns away in the first frame and the n_last frames before it."""
    unit = F.normalize(features.float(), dim=-1).unflatten(1, (h, w))  # (T, h, w, dim)
    known, out = (
        Memory(n_last),
        first.new_empty(max(0, len(unit) - 1), *first.shape, dtype=torch.float32),
    )
    for t, frame in enumerate(unit):
        labels = (
            next_labels(frame, *known.frames(), radius, topk, temperature) if t else first.float()
        )
        known.add(frame, labels)
        if t:
            out[t - 1] = labels
    return out


class Memory:
    """The frames that labels come from, features (h, w, dim) and labels (C, h, w) each: the first and the n_last latest; no more is kept."""

    def __init__(self, n_last):
        self.first, self.latest = [], deque(maxlen=n_last)

    def add(self, unit, labels):
        (self.latest if self.first else self.first).append((unit, labels))

    def frames(self):
        """-> features (S, h, w, dim), labels (S, C, h, w)"""
        return (torch.stack(some) for some in zip(*self.first, *self.latest))


@torch.no_grad()
def next_labels(unit, sources, labels, radius, topk, temperature):
    """unit (h, w, dim) of a frame, sources (S, h, w, dim) of unit length and their labels (S, C, h, w) -> (C, h, w), see propagate.

    Tile by tile against the patches in the tile's reach: far affinities are not computed, and memory does not grow with the frame. As in DINO's
    dense form, patches as like as the topk-th count too."""
    (S, C, h, w), device = labels.shape, unit.device
    out = torch.zeros(C, h, w, device=device)
    for top, left in ((top, left) for top in range(0, h, TILE) for left in range(0, w, TILE)):
        tile = unit[top : top + TILE, left : left + TILE]  # (a, b, dim)
        (a, b), low, start = tile.shape[:2], max(0, top - radius), max(0, left - radius)
        source = sources[:, low : top + a + radius, start : left + b + radius]  # (S, s, v, dim)
        s, v = source.shape[1:3]
        far_row = (
            torch.arange(top, top + a)[:, None] - torch.arange(low, low + s)
        ).abs() > radius  # (a, s)
        far_column = (
            torch.arange(left, left + b)[:, None] - torch.arange(start, start + v)
        ).abs() > radius
        far = (far_row[:, None, :, None] | far_column[None, :, None, :]).to(device)  # (a, b, s, v)
        cosine = tile.flatten(0, 1) @ source.flatten(0, 2).T  # (a*b, S*s*v)
        cosine.view(a, b, S, s, v).masked_fill_(far[:, :, None], -math.inf)
        best = cosine.topk(min(topk, cosine.shape[1]), dim=1).values
        who, whom = (
            (cosine >= best[:, -1:].clamp(min=-2)).nonzero().T
        )  # pairs that count; -2: fewer than topk are in reach
        weight = ((cosine[who, whom] - best[who, 0]) / temperature).exp()
        weight = weight / torch.zeros(a * b, device=device).index_add_(0, who, weight)[who]
        known = (
            labels[:, :, low : low + s, start : start + v].transpose(0, 1).flatten(1)
        )  # (C, S*s*v)
        out[:, top : top + a, left : left + b] = (
            torch.zeros(C, a * b, device=device)
            .index_add_(1, who, weight * known[:, whom])
            .view(C, a, b)
        )
    return out


# ------------------------------------------------------------------------------------------------ J and F (DAVIS-2017)

TOLERANCE = (
    0.008  # of the image's diagonal: how far a boundary pixel may lie from the other boundary
)


def davis_jf(pred, gt):
    """pred, gt (T, H, W) bool, one object -> J (T,), F (T,) in [0, 1], as davis2017-evaluation defines them.

    J: intersection over union, 1 where both are empty. F: harmonic mean of how much of each boundary lies within the tolerance of the other."""
    union = (pred | gt).sum((1, 2))
    J = torch.where(union > 0, (pred & gt).sum((1, 2)) / union.clamp(min=1), 1.0)
    radius = math.ceil(TOLERANCE * math.hypot(*pred.shape[1:]))
    offset = torch.arange(-radius, radius + 1, device=pred.device)
    disk = (offset[:, None].square() + offset.square() <= radius**2).float()[None, None]
    scores = []
    for p, g in zip(pred, gt):
        p, g = boundary(p), boundary(g)
        p_wide, g_wide = (
            F.conv2d(x.float()[None, None], disk, padding=radius)[0, 0] > 0.5 for x in (p, g)
        )
        n_p, n_g = p.sum(), g.sum()
        precision = (p & g_wide).sum() / n_p if n_p else torch.tensor(1.0)
        recall = (g & p_wide).sum() / n_g if n_g else torch.tensor(1.0)
        scores.append(
            2 * precision * recall / (precision + recall)
            if precision + recall > 0
            else torch.tensor(0.0)
        )
    return J, torch.stack([score.cpu() for score in scores]).to(J)


def boundary(mask):
    """mask (H, W), bool or object numbers -> bool, its boundary, one pixel wide: where a pixel differs from the one to the right, below, or diagonally below right."""
    right, below, diagonal = mask.clone(), mask.clone(), mask.clone()
    right[:, :-1], below[:-1], diagonal[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    diagonal[-1, :-1], diagonal[:-1, -1] = mask[-1, 1:], mask[1:, -1]
    return (mask != right) | (mask != below) | (mask != diagonal)


def mean_recall_decay(values):
    """values (T,) of a sequence -> their mean, the share above 0.5, and how much the last quarter lies below the first (davis2017-evaluation)."""
    n = len(values)
    edges = [int(math.floor(1 + i * (n - 1) / 4 + 0.5 + 1e-10)) - 1 for i in range(5)]
    quarter = [values[a : b + 1].mean().item() for a, b in zip(edges, edges[1:])]
    return values.mean().item(), (values > 0.5).double().mean().item(), quarter[0] - quarter[3]


# ------------------------------------------------------------------------------------------------ data sets and their folders


def read_ids(path):
    """A mask file -> uint8 (H, W): the object's number at each pixel. Of an indexed PNG the index, as DAVIS has it; of a grey one the value."""
    with Image.open(path) as file:
        if file.mode not in ("P", "L", "1", "I", "I;16"):
            raise UsageError(
                f"{path}: an image of mode {file.mode}, not a mask of object numbers; save it as an indexed (palette) PNG"
            )
        return torch.from_numpy(np.asarray(file).astype(np.uint8))


def read_mask(path):
    """A mask file of 0 and 1, or of 0 and 255 -> bool (H, W), the foreground."""
    with Image.open(path) as file:
        grey = torch.from_numpy(
            np.asarray(file.convert("L") if file.mode != "P" else file).astype(np.uint8)
        )
    return grey > (127 if grey.max() > 1 else 0)


class Video(NamedTuple):
    """A sequence of frames, read one at a time."""

    name: str
    frames: list  # of names, such as 00000
    read: Callable  # t -> uint8 (3, H, W)
    ids: Callable  # t -> uint8 (H, W), or None where no annotation is


def davis_videos(folder):
    """DAVIS-2017's layout -> [Video]: JPEGImages/480p/SEQ/*.jpg, Annotations/480p/SEQ/*.png, ImageSets/2017/val.txt (without it, every SEQ)."""
    frames, masks, listed = (
        Path(folder, "JPEGImages", "480p"),
        Path(folder, "Annotations", "480p"),
        Path(folder, "ImageSets", "2017", "val.txt"),
    )
    if not frames.is_dir():
        raise UsageError(
            f"data={folder}: no {frames}; give the folder that holds DAVIS's JPEGImages, Annotations and ImageSets"
        )
    names = (
        listed.read_text().split()
        if listed.is_file()
        else sorted(entry.name for entry in frames.iterdir() if entry.is_dir())
    )
    data.must_stay_inside(names, listed)  # masks will be written under these names
    videos = []
    for name in names:
        paths = sorted(
            path for path in (frames / name).glob("*") if path.suffix.lower() in data.EXTENSIONS
        )
        annotated = [masks / name / f"{path.stem}.png" for path in paths]
        videos.append(
            Video(
                name,
                [path.stem for path in paths],
                lambda t, paths=paths: data.decode(paths[t]),
                lambda t, annotated=annotated: (
                    read_ids(annotated[t]) if annotated[t].exists() else None
                ),
            )
        )
    return videos


def built_in_videos(size, seed, count=10):
    """[Video] of moving shapes with their truth."""
    drawn = [data.moving_shapes(i, size, seed=seed) for i in range(count)]
    return [
        Video(
            f"shapes{i}",
            [f"{t:05}" for t in range(len(frames))],
            frames.__getitem__,
            ids.__getitem__,
        )
        for i, (frames, ids) in enumerate(drawn)
    ]


FOLDERS = (
    ("img", "gt"),
    ("images", "ground_truth_mask"),
    ("images", "masks"),
    ("Imgs", "Imgs"),
    ("Image", "GT"),
    ("Image", "Mask"),  # ECSSD
    ("DUTS-TE-Image", "DUTS-TE-Mask"),
    ("DUTS-TR-Image", "DUTS-TR-Mask"),
    ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
)


class Photo(NamedTuple):
    """An image and where its salient object is."""

    name: str
    read: Callable  # -> uint8 (3, H, W)
    mask: Callable  # -> bool (H, W), or None where there is no truth


def saliency_photos(folder):
    """A folder of images and one of masks of the same names, called as in FOLDERS, whatever the case -> [Photo]."""
    found = (
        {entry.name.lower(): entry for entry in Path(folder).iterdir() if entry.is_dir()}
        if Path(folder).is_dir()
        else {}
    )
    pair = next(
        (
            (found[i.lower()], found[m.lower()])
            for i, m in FOLDERS
            if i.lower() in found and m.lower() in found
        ),
        None,
    )
    if not pair:
        raise UsageError(
            f"data={folder}: no folder of images beside one of masks; name them img/ and gt/ (also known: {', '.join(f'{i}/ and {m}/' for i, m in FOLDERS[1:])})"
        )
    images, masks = pair
    of_stem = {
        path.stem: path
        for path in sorted(masks.iterdir())
        if path.suffix.lower() in data.EXTENSIONS
        and (images != masks or path.suffix.lower() == ".png")
    }
    paths = sorted(
        path
        for path in images.iterdir()
        if path.suffix.lower() in data.EXTENSIONS
        and (images != masks or path.suffix.lower() != ".png")
    )
    if not paths:
        raise UsageError(f"data={folder}: {images} holds no images ({', '.join(data.EXTENSIONS)})")
    return [
        Photo(
            path.stem,
            lambda path=path: data.decode(path),
            lambda path=path: read_mask(of_stem[path.stem]) if path.stem in of_stem else None,
        )
        for path in paths
    ]


def built_in_photos(size, seed, count=100):
    """[Photo] of the built-in shapes with their truth."""
    images, masks = data.shape_masks("val", size, count, seed)
    return [
        Photo(f"shape{i:03}", lambda i=i: images[i], lambda i=i: masks[i]) for i in range(count)
    ]


# ------------------------------------------------------------------------------------------------ pictures


def davis_palette():
    """The 256 colours (256, 3) uint8 of DAVIS's and PASCAL's indexed masks: an id's bits, three at a time from the lowest, are the highest bits
    of red, green and blue."""
    ids = np.arange(256)
    return np.stack(
        [
            sum((ids >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
            for channel in range(3)
        ],
        1,
    ).astype(np.uint8)


def write_ids(path, ids):
    """ids uint8 (H, W) -> an indexed PNG with DAVIS's palette."""
    picture = Image.fromarray(ids.cpu().numpy(), mode="P")
    picture.putpalette(davis_palette().tobytes())
    picture.save(path)


def overlay(image, ids, opacity=0.55):
    """image uint8 (3, H, W), ids uint8 (H, W) -> uint8 (3, H, W), each object tinted in its colour and outlined in white."""
    ids = ids.cpu().long()
    tint = torch.from_numpy(davis_palette())[ids].permute(2, 0, 1).float()
    mixed = torch.where(ids > 0, (1 - opacity) * image.float() + opacity * tint, image.float())
    return torch.where(boundary(ids), 255.0, mixed).to(torch.uint8)


HEAT = (
    (0, 0, 60),
    (60, 0, 130),
    (190, 40, 110),
    (250, 140, 30),
    (255, 255, 160),
)  # low to high, darker to lighter


def heat(values, image=None):
    """values (H, W) -> uint8 (3, H, W), smallest dark to largest light; over the image (3, H, W) in grey if one is given."""
    values = values.float().cpu()
    at = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12) * (len(HEAT) - 1)
    low, ramp = at.floor().clamp(max=len(HEAT) - 2), torch.tensor(HEAT).float()
    colors = torch.lerp(ramp[low.long()], ramp[low.long() + 1], (at - low)[..., None]).permute(
        2, 0, 1
    )
    return (colors if image is None else 0.3 * image.float().mean(0) + 0.7 * colors).to(torch.uint8)


def enlarge(values, H, W):
    """(h, w) of patches -> (H, W) of pixels, each patch a block."""
    return F.interpolate(values[None, None].float(), size=(H, W), mode="nearest-exact")[0, 0]


def save_sheet(path, rows, height=170):
    """rows: lists of (caption, picture uint8 (3, H, W)) -> a PNG of them, all of one height, captions above."""
    font, margin, line = ImageFont.load_default(13), 6, 18
    tiles = []
    for row in rows:
        tiles.append(
            [
                (caption, Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()))
                for caption, picture in row
            ]
        )
        tiles[-1] = [
            (
                caption,
                tile.resize(
                    (max(1, round(tile.width * height / tile.height)), height),
                    Image.Resampling.BILINEAR,
                ),
            )
            for caption, tile in tiles[-1]
        ]
    widths = [
        [max(tile.width, int(font.getlength(caption))) + margin for caption, tile in row]
        for row in tiles
    ]
    sheet = Image.new(
        "RGB",
        (max(map(sum, widths)) + margin, (height + line + margin) * len(tiles) + margin),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for y, (row, wide) in enumerate(zip(tiles, widths)):
        top = margin + y * (height + line + margin)
        for (caption, tile), x in zip(row, np.cumsum([margin, *wide])):
            pen.text((x, top), caption, "black", font)
            sheet.paste(tile, (int(x), top + line))
    sheet.save(path)


def attention_row(row, backbone, image, x):
    """The picture row of a ViT's last block: how each head's CLS token attends over the image, and their mean; image uint8 (3, H, W)."""
    h, w = (n // backbone.patch_size for n in x.shape[2:])
    heads = backbone.last_attention(x)[0, :, 0, 1:].float().unflatten(1, (h, w))  # (heads, h, w)
    H, W = image.shape[1:]
    named = [*((f"head {i + 1}", head) for i, head in enumerate(heads)), ("mean", heads.mean(0))]
    return [
        (row, image),
        *((f"{row}, {name}", heat(enlarge(values, H, W), image)) for name, values in named),
    ]


# ------------------------------------------------------------------------------------------------ the two tasks


def file_name(text):
    """`text` as part of a file's name: a row may be called by its checkpoint's path."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.")


class Setting(NamedTuple):
    """What both tasks work with."""

    config: SegConfig
    models: list  # of probe.Model
    device: torch.device
    autocast: Callable
    out: str

    def folder(self, *names):
        path = os.path.join(self.out, *map(file_name, names))
        os.makedirs(path, exist_ok=True)
        return path


def photo_sides(H, W, shorter, patch):
    """The sides a photograph is resized to: as they are, or the shorter one `shorter`, rounded to whole patches, at least one (TokenCut's)."""
    scale = shorter / min(H, W) if shorter else 1
    return tuple(max(1, round(side * scale / patch)) * patch for side in (H, W))


def frame_sides(H, W, shorter, patch):
    """The sides a frame is resized to: the shorter one `shorter`, in whole patches, the longer one rounded down to 64 (DINO's protocol)."""
    short = max(1, shorter // patch) * patch
    multiple = math.lcm(64, patch)
    long = max(1, short * max(H, W) // min(H, W) // multiple) * multiple
    return (short, long) if H <= W else (long, short)


@torch.no_grad()
def saliency(setting, photos, test):
    """TokenCut over the photos -> rows of results.json. A broken image, one without truth or without foreground: a line, and the rest goes on."""
    config, measured, unscored, empty, drawn, n = setting.config, {}, 0, 0, 0, 0
    for photo in (
        bar := tqdm(photos, desc="saliency", mininterval=0.5 if sys.stderr.isatty() else 60)
    ):
        try:
            image, truth = photo.read(), photo.mask()
        except (UsageError, *data.UNREADABLE) as error:
            bar.write(f"{photo.name}: skipped, {data.reason(error)}")
            continue
        n, (H, W) = n + 1, image.shape[1:]
        if truth is not None and truth.shape != (H, W):
            bar.write(
                f"{photo.name}: mask of {truth.shape[1]}x{truth.shape[0]} resized to the image's {W}x{H}"
            )
            truth = enlarge(truth, H, W) > 0.5
        unscored += truth is None
        sheet, attention = [], []
        for row, backbone, *_ in setting.models:
            x = to_input(
                image, photo_sides(H, W, config.size, patch_side(backbone)), setting.device
            )
            with setting.autocast():
                keys = key_map(backbone, x).float()  # (h, w, dim)
            probe.must_be_finite(keys, config.ckpt)
            mask, vector = tokencut(keys.permute(2, 0, 1), config.tau)
            if not mask.any():
                empty += 1
                bar.write(
                    f"{photo.name}: {row} finds no foreground, "
                    + (
                        "the image is a single patch"
                        if mask.numel() == 1
                        else "its patches are all alike, or none is like another"
                    )
                )
            maps = {"": enlarge(mask, H, W).cpu()}
            if config.solver:
                maps[", solver"] = bilateral_solver(image, maps[""])
            for name, found in maps.items():
                Image.fromarray((found > 0.5).numpy().astype(np.uint8) * 255).save(
                    os.path.join(setting.folder("masks", row + name), f"{photo.name}.png")
                )
                if truth is not None:
                    measured.setdefault(row, {}).setdefault(name, []).append(
                        metrics_of_one(found, truth)
                    )
            if drawn < config.pictures:
                sheet.append(
                    [
                        (row, image),
                        *([("truth", overlay(image, truth.byte()))] if truth is not None else []),
                        ("eigenvector", heat(enlarge(vector, H, W), image)),
                        *(
                            (f"TokenCut{name}", overlay(image, (found > 0.5).byte()))
                            for name, found in maps.items()
                        ),
                    ]
                )
                if hasattr(backbone, "last_attention"):
                    attention.append(attention_row(row, backbone, image, x))
        if drawn < config.pictures:
            drawn += 1
            save_sheet(
                os.path.join(setting.folder("pictures"), f"saliency_{photo.name}.png"), sheet
            )
            if attention:
                save_sheet(
                    os.path.join(setting.folder("pictures"), f"attention_{photo.name}.png"),
                    attention,
                )
    if not n:
        raise UsageError(f"{test}: not one image could be read")
    if unscored and len(photos) > 1:
        print(f"{unscored} of {n} images have no mask: segmented, not measured")
    if empty:
        print(
            f"no foreground in {empty} of {n * len(setting.models)} masks: written out empty, and measured so"
        )
    rows = []
    for row, by_map in measured.items():
        backbone = next(model.backbone for model in setting.models if model.row == row)
        for name, of_each in by_map.items():
            found = mean_metrics(of_each)
            rows += [
                dict(
                    row=row,
                    part="full",
                    dims=backbone.dim,
                    test=test,
                    metric=metric + name,
                    value=round(100 * found[key], 2),
                    seed=config.seed,
                    n=len(of_each),
                )
                for metric, key in (("max F", "max_f"), ("IoU", "iou"), ("accuracy", "acc"))
            ]
    return rows


MEASURES = ("J&F", "J mean", "J recall", "J decay", "F mean", "F recall", "F decay")


@torch.no_grad()
def davis(setting, videos, test, parts):
    """Label propagation over the videos -> rows of results.json: of each object, then of all. Masks go to masks/ROW_PART/SEQ/FRAME.png.

    As davis2017-evaluation: objects are those of the first mask up to its greatest number, the first and the last frame are not measured,
    255 is nobody's; an object's J and F are means over frames, the table's are means over all objects."""
    per_object, skipped = {}, 0
    for i, video in enumerate(
        bar := tqdm(videos, desc="videos", mininterval=0.5 if sys.stderr.isatty() else 60)
    ):
        try:
            scores = segment_video(setting, video, parts, draw=i < setting.config.pictures, bar=bar)
        except (UsageError, *data.UNREADABLE) as error:
            skipped += 1
            bar.write(f"{video.name}: skipped, {data.reason(error)}")
            continue
        for (row, part), of_objects in scores.items():
            per_object.setdefault((row, part), []).extend(
                (f"{video.name}_{number}", values) for number, values in of_objects.items()
            )
            if of_objects:
                J, F_ = (
                    100 * sum(values[name] for values in of_objects.values()) / len(of_objects)
                    for name in ("J mean", "F mean")
                )
                bar.write(
                    f"{video.name:>20}  {f'{row}, {part}':20} J {J:5.1f}  F {F_:5.1f}  ({len(of_objects)} object{'s' * (len(of_objects) > 1)})"
                )
    if skipped == len(videos):
        raise UsageError(f"{test}: not one of its {len(videos)} videos could be followed")
    rows, totals = [], []
    for (row, part), of_objects in per_object.items():
        backbone, ratio = next(
            (model.backbone, model.ratio) for model in setting.models if model.row == row
        )
        dims = probe.parts(torch.empty(1, backbone.dim), ratio)[part].shape[1]
        common = dict(row=row, part=part, dims=dims, seed=setting.config.seed)
        for name, values in of_objects:
            rows += [
                dict(
                    common,
                    test=name,
                    metric=metric,
                    value=round(100 * values[metric], 2),
                    n=values["n"],
                )
                for metric in MEASURES
            ]
        if of_objects:
            totals += [
                dict(
                    common,
                    test=test,
                    metric=metric,
                    value=round(
                        100 * sum(values[metric] for _, values in of_objects) / len(of_objects), 2
                    ),
                    n=len(of_objects),
                )
                for metric in MEASURES
            ]
    return rows, totals


def segment_video(setting, video, parts, draw, bar):
    """Follow the first mask's objects through a video, write the masks -> {(row, part): {object number: {measure: value in [0, 1], n}}}.

    One frame is in memory at a time, and the features and labels of the n_last before it."""
    config = setting.config
    if not video.frames:
        raise UsageError("holds no frames")
    first = video.ids(0)
    if first is None:
        raise UsageError(f"frame {video.frames[0]} has no annotation to start from")
    numbers = range(1, int((first * (first != 255)).max()) + 1)
    if not numbers:
        raise UsageError(f"the annotation of frame {video.frames[0]} marks no object")
    known = {row_part: Memory(config.n_last) for row_part in parts}
    scores = {row_part: {number: ([], []) for number in numbers} for row_part in known}
    shown, strips = (
        {round(share * (len(video.frames) - 1)) for share in (0, 0.25, 0.5, 0.75, 1)},
        {},
    )
    grid, later, unmeasured = None, set(), 0
    for t, name in enumerate(tqdm(video.frames, desc=video.name, leave=False, disable=None)):
        image, truth = video.read(t), first if t == 0 else video.ids(t)
        H, W = image.shape[1:]
        if truth is not None and truth.shape != (H, W):
            raise UsageError(
                f"the annotation of frame {name} has {truth.shape[1]}x{truth.shape[0]} pixels, the frame {W}x{H}"
            )
        measured = truth is not None and 0 < t < len(video.frames) - 1
        unmeasured += truth is None and 0 < t < len(video.frames) - 1
        if truth is not None:
            later |= {int(number) for number in truth.unique() if number != 255} - {0, *numbers}
        for model in setting.models:
            side = patch_side(model.backbone)
            if grid is None:
                grid = frame_sides(
                    H, W, config.size or 480, side
                )  # of all frames: DAVIS has some of 853 and of 854
            h, w = grid[0] // side, grid[1] // side
            with setting.autocast():
                z = feature_map(
                    model.backbone, to_input(image, grid, setting.device)
                ).float()  # (h, w, dim)
            probe.must_be_finite(z, config.ckpt)
            for part in (part for row, part in parts if row == model.row):
                memory, unit = (
                    known[model.row, part],
                    F.normalize(probe.parts(z, model.ratio)[part], dim=-1),
                )
                if t == 0:
                    small = enlarge(first, h, w).to(setting.device)
                    labels, ids = (
                        torch.stack([(small == number).float() for number in (0, *numbers)]),
                        first,
                    )  # (C, h, w)
                else:
                    labels = next_labels(
                        unit, *memory.frames(), config.radius, config.topk, config.temperature
                    )
                    ids = harden(labels, grid, H, W)
                memory.add(unit, labels)
                write_ids(
                    os.path.join(
                        setting.folder("masks", f"{model.row}_{part}", video.name), f"{name}.png"
                    ),
                    ids,
                )
                if measured:
                    for number, (J, F_) in scores[model.row, part].items():
                        j, f = davis_jf(
                            ((ids == number) & (truth != 255))[None], (truth == number)[None]
                        )
                        J.append(j), F_.append(f)
                if draw and t in shown:
                    strips.setdefault(f"{model.row}, {part}", []).append(
                        (f"{model.row}, {part}: frame {name}", overlay(image, ids))
                    )
        if draw and t in shown and truth is not None:
            strips.setdefault("truth", []).append(
                (f"truth: frame {name}", overlay(image, truth * (truth != 255)))
            )
    if draw:
        save_sheet(
            os.path.join(setting.folder("pictures"), f"davis_{video.name}.png"),
            list(strips.values()),
        )
    if later:
        bar.write(
            f"{video.name}: object{'s' * (len(later) > 1)} {', '.join(map(str, sorted(later)))} not in the first annotation: not followed, not measured"
        )
    if unmeasured:
        bar.write(
            f"{video.name}: {unmeasured} of {len(video.frames) - 2} frames between first and last have no annotation: segmented, not measured"
        )
    return {
        row_part: {
            number: object_measures(torch.cat(J), torch.cat(F_))
            for number, (J, F_) in by_number.items()
            if J
        }
        for row_part, by_number in scores.items()
    }


def harden(labels, grid, H, W):
    """Soft labels (C, h, w) -> ids uint8 (H, W), on the CPU: enlarged to the network's input, each class stretched to [0, 1], the greatest
    taken, brought to the frame's size (DINO's protocol)."""
    soft = F.interpolate(labels[None], size=grid, mode="bilinear", align_corners=False)[0]
    low, high = soft.amin((1, 2), keepdim=True), soft.amax((1, 2), keepdim=True)
    soft = torch.where(high > 0, (soft - low) / (high - low).clamp(min=1e-12), soft)
    return enlarge(soft.argmax(0), H, W).byte().cpu()


def object_measures(J, F_):
    """J (T,), F_ (T,) of an object -> {measure: value}."""
    j, f = mean_recall_decay(J), mean_recall_decay(F_)
    return dict(zip(MEASURES, ((j[0] + f[0]) / 2, *j, *f)), n=len(J))


def main(argv):
    since = time.perf_counter()
    config = configure(SegConfig, argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("eval_seg.py is one process: start it with python, not torchrun")
    device = probe.choose_device(config.device)
    probe.choose_scan(config.scan)
    precision, autocast = probe.choose_precision(config.precision, device)
    models, trained = probe.open_models(config, device, config.untrained)
    parts = probe.chosen_parts(models, config.part, config.ckpt)
    setting = Setting(config, models, device, autocast, probe.results_folder(config))
    built_in = config.data == "shapes" and not config.image
    if built_in:
        config.size = config.size or min(4 * trained["img_size"], 224)
    test = os.path.basename(os.path.normpath(config.image or config.data))
    print(
        f"{config.task} of {test}, {' and '.join(model.row for model in models)}, {trained['arch']}, {device.type} {precision}",
        flush=True,
    )
    if config.task == "davis":
        videos = (
            built_in_videos(max(64, config.size // 64 * 64), config.seed)
            if built_in
            else davis_videos(config.data)
        )
        details, rows = davis(setting, videos, test, parts)
    else:
        if config.image:
            photos = [
                Photo(Path(config.image).stem, lambda: data.decode(config.image), lambda: None)
            ]
        else:
            photos = (
                built_in_photos(config.size, config.seed)
                if built_in
                else saliency_photos(config.data)
            )
        details, rows = [], saliency(setting, photos, test)
    seconds = time.perf_counter() - since
    print(
        "\n" + "\n".join(probe.table_lines(rows))
        if rows
        else "\nno truth to compare with: masks and pictures only"
    )
    probe.append_results(
        os.path.join(setting.out, "results.json"),
        config.task,
        {**asdict(config), "precision": precision},
        seconds,
        details + rows,
    )
    print(f"{seconds:.0f} s; masks/, pictures/ and results.json are in {setting.out}")


if __name__ == "__main__":
    with exit_on_usage_error():
        main(sys.argv[1:])
