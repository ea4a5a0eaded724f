"""Segmentation without labels from a frozen backbone (section 4 of the paper).

    python eval_seg.py --ckpt=out/demo/ckpt.pt                        the built-in shapes
    python eval_seg.py --ckpt=... --data=ECSSD                        or DUTS-TEST, DUT-OMRON
    python eval_seg.py --ckpt=... --image=photo.jpg --size=480        one picture
    python eval_seg.py --ckpt=... --task=davis --data=DAVIS [--compare=dino.pt]

saliency: TokenCut. davis: DINO's label propagation carries the first frame's masks through a video.
Writes results.json, pictures/ and masks/ beside the checkpoint or in --out. davis masks are indexed
PNGs that DAVIS's own tool reads; saliency masks are 0 and 255.
"""

import math
import os
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib import evaluation, features, machine, results, shapes, sources
from lib.config import UsageError, configure, option
from lib.images import EXTENSIONS, UNREADABLE, decode, reason

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from augment import normalize, resize


# fmt: off
@dataclass
class SegConfig(evaluation.EvalConfig):
    """Options of eval_seg.py: saliency and video segmentation from a frozen backbone."""

    data: str = option("shapes", "folder in a data set's layout; 'shapes': built in", group="data")
    task: str = option("saliency", "saliency by TokenCut; davis: label propagation",
                       choices=("saliency", "davis"), group="task")
    image: str = option("", "saliency of this one file, instead of --data")
    size: int = option(0, "shorter side in pixels; 0: the protocol's (davis 480; saliency the "
                       "image's own; shapes 4 img_size, at most 224)", 1, 2**16)
    pictures: int = option(8, "how many images or videos to draw", 0, 10**6)
    n_last: int = option(7, "latest frames that give labels, and the first", 0, 1000, group="davis")
    radius: int = option(12, "how far a label may move, in patches", 0, 1000)
    topk: int = option(5, "most similar patches that give a patch its label", 1, 1000)
    temperature: float = option(0.1, "of the weights exp(cosine / temperature)", 1e-6, 100)
    tau: float = option(0.2, "cosine above which patches are joined", -1, 1, group="saliency")
    solver: bool = option(True, "also refine the masks with the bilateral solver")
    arch, img_size = "", 0  # not options: the checkpoint's

    def __post_init__(self):
        self.refuse(["classes", "save_correct"], "segmentation")
        if self.task == "davis":
            self.refuse(["image", "tau", "solver"], "--task=davis")
        else:
            self.refuse(["part"], "--task=saliency (TokenCut compares keys, not parts of z)")
            self.refuse(["n_last", "radius", "topk", "temperature"], "--task=saliency")
# fmt: on

# --- TokenCut -------------------------------------------------------------------------------------

TO_YUV = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
MOST = 10_000  # patches of an image: the graph's matrix has 0.8 GB then
WEAK = 1e-5  # weight of the edge between dissimilar patches: it keeps the graph connected


def tokencut(features, tau=0.2):
    """Cut features (dim, h, w) of patches: mask (h, w) bool, eigenvector (h, w) float64.

    Patches whose cosine exceeds tau are joined (Wang et al. 2022). The second generalized
    eigenvector of that graph, (D - W) v = lambda D v with v' D v = 1, is cut at its mean. The patch
    with the largest |v| is the seed, its side is positive, its component there is the foreground.
    Mask and vector are zero if all pairs are joined or none is: nothing to cut.
    """
    _, h, w = features.shape
    unit = F.normalize(features.flatten(1).double(), dim=0)  # (dim, N)
    alike = (unit.T @ unit > tau).fill_diagonal_(True)
    if alike.all() or alike.sum() == h * w:
        nothing = torch.zeros(h, w, dtype=torch.float64, device=features.device)
        return nothing.bool(), nothing
    graph = torch.where(alike, 1.0, WEAK).double()  # (N, N)
    scale = graph.sum(1).rsqrt()
    identity = torch.eye(h * w, dtype=torch.float64, device=graph.device)
    symmetric = identity - scale[:, None] * graph * scale  # its eigenvectors are D^1/2 v
    v = scale * torch.linalg.eigh(symmetric).eigenvectors[:, 1]
    seed = int(v.abs().argmax())
    v = v.view(h, w) * (1 if v[seed] > v.mean() else -1)
    return component(v > v.mean(), seed // w, seed % w), v


def component(mask, row, column):
    """Return the part of mask (h, w) bool that steps up, down, left, right join to its cell."""
    picture = to_pil_image(mask.byte().cpu()).copy()  # of an array it is read-only
    ImageDraw.floodfill(picture, (column, row), 2)
    return (pil_to_tensor(picture)[0] == 2).to(mask.device)


def bilateral_solver(image, target, spatial=16, steps=25, tolerance=1e-5):
    """Smooth target (H, W) in [0, 1] where image uint8 (3, H, W) is smooth: (H, W) float64.

    Minimizes 256 * roughness + 0.999 * (distance to target)^2 over cells of place and color (Barron
    and Poole 2016, TokenCut's constants): a cell has one value, neighboring cells differ little.
    """
    cell, neighbors = bilateral_grid(image, spatial)

    def splat(pixels):  # sums over the pixels of each cell
        return torch.zeros(neighbors.shape[1]).double().index_add_(0, cell, pixels)

    def blur(values):
        return 10 * values + F.pad(values, (0, 1))[neighbors].sum(0)

    # make the rows and columns of the blur sum to the cells' sizes
    size = splat(torch.ones(len(cell)).double())
    n = torch.ones_like(size)
    for _ in range(10):
        n = (n * size / blur(n)).sqrt()
    mass = n * blur(n)

    def system(values):  # the gradient of the objective is system(values) - wanted
        return 256 * (mass * values - n * blur(n * values)) + 0.999 * size * values

    # conjugate gradients, preconditioned by the diagonal
    wanted = 0.999 * splat(target.cpu().double().flatten())
    diagonal = (256 * (mass - 10 * n * n) + 0.999 * size).clamp(min=1e-5)
    solution = wanted / (0.999 * size)
    residual = wanted - system(solution)
    direction = residual / diagonal
    energy = (residual * residual / diagonal).sum()
    for _ in range(steps):
        if residual.norm() <= tolerance * wanted.norm():
            break
        along = system(direction)
        length = energy / (direction @ along)
        solution = solution + length * direction
        residual = residual - length * along
        before = energy
        energy = (residual * residual / diagonal).sum()
        direction = residual / diagonal + energy / before * direction
    return solution[cell].view(target.shape)


def bilateral_grid(image, spatial):
    """Return the cell of each pixel (H*W,), and the neighbors of each cell (10, M); M: no such.

    A cell is `spatial` pixels a side, 16 levels of luma and 8 of each chroma.
    """
    y, x = torch.meshgrid(*map(torch.arange, image.shape[1:]), indexing="ij")
    Y, U, V = torch.einsum("ij,jhw->ihw", torch.tensor(TO_YUV).double(), image.cpu().double())
    color = [Y // 16, (U + 128) // 8, (V + 128) // 8]
    place = torch.stack([x // spatial, y // spatial, *color]).long().flatten(1)  # (5, H*W)
    strides = torch.tensor([4096**axis for axis in range(5)])  # no axis has as many cells
    cells, cell = torch.unique(strides @ place, return_inverse=True)
    beside = cells + torch.cat([strides, -strides])[:, None]  # (10, M)
    at = torch.searchsorted(cells, beside).clamp(max=len(cells) - 1)
    return cell, torch.where(cells[at] == beside, at, len(cells))


# --- label propagation ----------------------------------------------------------------------------

TILE = 12  # a frame is done TILE x TILE patches at a time: their affinities, 6 MB, stay in cache


def propagate(features, first, h, w, n_last=7, radius=12, topk=5, temperature=0.1):
    """Carry the first frame's labels (C, h, w) through a video: soft labels (T-1, C, h, w).

    features (T, h*w, dim): of the patches of each frame. A patch takes the mean label of the topk
    patches most like it, weighted by exp(cosine / temperature), among those at most `radius` rows
    and columns away in the first frame and in the n_last frames before it (DINO's protocol).
    """
    propagation = Propagation(first, n_last, radius, topk, temperature)
    return torch.stack([propagation.step(z) for z in features.unflatten(1, (h, w))])[1:]


class Propagation:
    """`propagate`, one frame at a time. Keeps the first frame and the n_last latest, no more."""

    def __init__(self, first, n_last, radius, topk, temperature):
        self.first = first.float()
        self.n_last = n_last
        self.options = (radius, topk, temperature)
        self.frames = []  # (features (h, w, dim) of unit length, labels (C, h, w))

    def step(self, features):
        """Take the next frame's features (h, w, dim), return its labels (C, h, w)."""
        unit = F.normalize(features.float(), dim=-1)
        labels = self.first
        if self.frames:
            labels = next_labels(unit, *map(torch.stack, zip(*self.frames)), *self.options)
        self.frames.append((unit, labels))
        if len(self.frames) > 1 + self.n_last:
            del self.frames[1]
        return labels


@torch.no_grad()
def next_labels(unit, sources, labels, radius, topk, temperature):
    """Return a frame's labels (C, h, w) from those of the frames before; see propagate.

    unit (h, w, dim): its features; sources (S, h, w, dim), labels (S, C, h, w): of those frames.
    Tile by tile, so memory does not grow with the frame. Ties with the topk-th count, as in DINO.
    """
    C, h, w = labels.shape[1:]
    y = torch.arange(h, device=unit.device)
    x = torch.arange(w, device=unit.device)
    out = torch.zeros(C, h, w, device=unit.device)
    for start in torch.cartesian_prod(y[::TILE], x[::TILE]).tolist():
        tile = tuple(slice(s, s + TILE) for s in start)
        near = tuple(slice(max(0, s.start - radius), s.stop + radius) for s in tile)
        target = unit[tile]  # (a, b, dim)
        source = sources[:, *near]  # (S, s, v, dim)
        cosine = target.flatten(0, 1) @ source.flatten(0, 2).T  # (a*b, S*s*v)
        far_y = (y[tile[0], None] - y[near[0]]).abs() > radius  # (a, s)
        far_x = (x[tile[1], None] - x[near[1]]).abs() > radius  # (b, v)
        far = far_y[:, None, None, :, None] | far_x[:, None, None, :]  # (a, b, 1, s, v)
        cosine.view(*target.shape[:2], *source.shape[:3]).masked_fill_(far, -math.inf)

        # the pairs that count; -2, less than any cosine: fewer than topk are in reach
        best = cosine.topk(min(topk, cosine.shape[1]), dim=1).values
        who, whom = (cosine >= best[:, -1:].clamp(min=-2)).nonzero().T
        weight = ((cosine[who, whom] - best[who, 0]) / temperature).exp()
        total = torch.zeros(len(cosine), device=unit.device).index_add_(0, who, weight)
        known = labels[:, :, *near].transpose(0, 1).flatten(1)[:, whom]  # (C, pairs)
        mean = torch.zeros(C, len(cosine), device=unit.device)
        mean.index_add_(1, who, weight / total[who] * known)
        out[:, *tile] = mean.view(C, *target.shape[:2])
    return out


def harden(labels, sides, H, W):
    """Turn soft labels (C, h, w) into object numbers uint8 (H, W) on the CPU."""
    # enlarged to the network's input, each class is stretched to [0, 1], and the greatest wins
    soft = F.interpolate(labels[None], size=sides, mode="bilinear", align_corners=False)[0]
    low, high = soft.amin((1, 2), keepdim=True), soft.amax((1, 2), keepdim=True)
    soft = torch.where(high > 0, (soft - low) / (high - low).clamp(min=1e-12), soft)
    return enlarge(soft.argmax(0), H, W).byte().cpu()


# --- measures -------------------------------------------------------------------------------------

BETA2 = 0.3  # weight of the recall in a saliency map's F
TOLERANCE = 0.008  # of the image's diagonal: how far a boundary may lie from the other boundary
MEASURES = ("J&F", "J mean", "J recall", "J decay", "F mean", "F recall", "F decay")


def ratio(part, whole):
    """Divide counts, float64; 1 where there is nothing to count."""
    return torch.where(whole > 0, part.double() / whole.clamp(min=1), 1.0)


def saliency_metrics(maps, gts):
    """Score maps (H, W) in [0, 1] by gts (H, W), foreground above 0.5: {max_f, iou, acc} in [0, 1].

    As TokenCut's own metrics: iou and acc of the map cut at 0.5; F_beta at 255 thresholds, averaged
    over the images, then its maximum.
    """
    scores = [image_metrics(map_, gt) for map_, gt in zip(maps, gts)]
    iou, acc, *f_beta = torch.stack(scores).mean(0).tolist()
    return dict(max_f=max(f_beta), iou=iou, acc=acc)


def image_metrics(map_, gt):
    """Return iou, acc, and F_beta at 0, 1/255, ... 254/255 of one image: (2 + 255,) float64."""
    map_ = torch.as_tensor(map_).double().cpu()
    gt = torch.as_tensor(gt).cpu() > 0.5
    mask = map_ > 0.5
    iou = ratio((mask & gt).sum(), (mask | gt).sum())
    acc = (mask == gt).double().mean()
    thresholds = torch.arange(255, dtype=torch.float64) / 255
    found, right = (
        len(values) - torch.searchsorted(values.sort().values, thresholds, right=True)
        for values in (map_.flatten(), map_[gt])
    )
    precision, recall = ratio(right, found), ratio(right, gt.sum())
    f_beta = ((1 + BETA2) * precision * recall / (BETA2 * precision + recall)).nan_to_num(0.0)
    return torch.cat([torch.stack([iou, acc]), f_beta])


def davis_jf(pred, gt):
    """Score masks pred, gt (T, H, W) bool as davis2017-evaluation does: J (T,), F (T,) in [0, 1].

    J: intersection over union. F: harmonic mean of how much of each boundary is near the other.
    """
    radius = math.ceil(TOLERANCE * math.hypot(*pred.shape[1:]))
    offset = torch.arange(-radius, radius + 1, device=pred.device)
    disk = (offset[:, None].square() + offset.square() <= radius**2).float()[None, None]

    def share_near(edge, other):
        near = F.conv2d(other.float()[:, None], disk, padding=radius)[:, 0] > 0.5
        return ratio((edge & near).sum((1, 2)), edge.sum((1, 2)))

    pred_edge, gt_edge = boundary(pred), boundary(gt)
    precision, recall = share_near(pred_edge, gt_edge), share_near(gt_edge, pred_edge)
    J = ratio((pred & gt).sum((1, 2)), (pred | gt).sum((1, 2)))
    return J, (2 * precision * recall / (precision + recall)).nan_to_num(0.0)


def boundary(mask):
    """Return where mask (T, H, W) differs from the pixel to the right, below, or below right."""
    mask = mask.float()  # bool or object numbers
    shifted = F.pad(mask, (0, 1, 0, 1), mode="replicate")  # (T, H + 1, W + 1)
    beside = (shifted[:, :-1, 1:], shifted[:, 1:, :-1], shifted[:, 1:, 1:])
    return (mask != beside[0]) | (mask != beside[1]) | (mask != beside[2])


def object_measures(name, jf):
    """Summarize J and F (n, 2, T) of a video's objects: [(NAME_NUMBER, T, MEASURES (7,))]."""
    edges = (np.linspace(1, jf.shape[2], 5) + 1e-10).round().astype(int) - 1  # of quarters
    first = jf[..., edges[0] : edges[1] + 1].mean(-1)
    last = jf[..., edges[3] : edges[4] + 1].mean(-1)
    means = torch.stack([jf.mean(-1), (jf > 0.5).double().mean(-1), first - last], -1)  # (n, 2, 3)
    vectors = torch.cat([means[:, :, 0].mean(1, keepdim=True), means.flatten(1)], 1)
    return [(f"{name}_{i}", jf.shape[2], vector) for i, vector in enumerate(vectors, 1)]


# --- data sets ------------------------------------------------------------------------------------

FOLDERS = (  # of images and of masks: any data set's, ECSSD's, DUTS-TEST's, DUT-OMRON's
    ("img", "gt"),
    ("images", "ground_truth_mask"),
    ("DUTS-TE-Image", "DUTS-TE-Mask"),
    ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
)


class Unreadable(UsageError):
    """A sequence that is skipped."""


class Sequence(NamedTuple):
    """The frames of a video and their masks; a photo is a sequence of one."""

    name: str
    images: list  # of files, or of uint8 (3, H, W)
    masks: list  # of files, or of (H, W), or None where there is no truth

    def frame(self, t):
        """Return what frame t is called, such as 00000."""
        image = self.images[t]
        return image.stem if isinstance(image, Path) else f"{t:05}"

    def read(self, t):
        """Return frame t, uint8 (3, H, W), and its mask (H, W) or None."""
        image, mask = self.images[t], self.masks[t]
        try:
            image = decode(image) if isinstance(image, Path) else image
            mask = read_mask(mask) if isinstance(mask, Path) else mask
        except UNREADABLE as error:
            raise Unreadable(reason(error)) from error
        return image, mask


def read_mask(path):
    """Read a mask file as (H, W) uint8: a palette's index, or the gray value, of each pixel."""
    with Image.open(path) as file:
        is_gray = file.mode in ("P", "L", "1", "I", "I;16")
        pixels = np.atleast_3d(file if is_gray else file.convert("RGB"))
    if (pixels != pixels[..., :1]).any():
        raise UsageError(f"{path}: a color image, not a mask; save it as an indexed (palette) PNG")
    return torch.from_numpy(pixels[..., 0].astype(np.uint8))


def image_files(folder):
    """List the image files of a folder by name; none if there is no folder."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in EXTENSIONS)


def davis_videos(folder):
    """Open DAVIS-2017's layout: the sequences of ImageSets/2017/val.txt, or all without it."""
    images = Path(folder, "JPEGImages", "480p")
    listed = Path(folder, "ImageSets", "2017", "val.txt")
    if not images.is_dir():
        raise UsageError(f"data={folder}: no folder JPEGImages/480p; give the folder of DAVIS")
    names = sorted(entry.name for entry in images.iterdir() if entry.is_dir())
    if listed.is_file():
        names = listed.read_text().split()
        sources.check_inside(names, listed)  # masks are written under these names
    videos = []
    for name in names:
        files = image_files(images / name)
        masks = [Path(folder, "Annotations", "480p", name, f"{file.stem}.png") for file in files]
        videos.append(Sequence(name, files, [m if m.exists() else None for m in masks]))
    return videos


def saliency_photos(folder):
    """Open a folder of images and one of masks of the same names, called as in FOLDERS."""
    subfolders = {path.name.lower(): path for path in Path(folder).glob("*") if path.is_dir()}
    pairs = [[subfolders.get(name.lower()) for name in pair] for pair in FOLDERS]
    images, masks = next(filter(all, pairs), (None, None))
    if not images:
        known = " or ".join(f"{i}/ and {m}/" for i, m in FOLDERS)
        raise UsageError(f"data={folder}: no folders of images and masks; name them {known}")
    mask_of = {file.stem: file for file in image_files(masks)}
    return [Sequence(f.stem, [f], [mask_of.get(f.stem)]) for f in image_files(images)]


def open_data(config):
    """Return the sequences that the options ask for; of the built-in shapes, 10 or 100."""
    if config.image:
        return [Sequence(Path(config.image).stem, [Path(config.image)], [None])]
    if config.data != "shapes":
        return (davis_videos if config.task == "davis" else saliency_photos)(config.data)
    if config.task == "saliency":
        drawn = zip(*shapes.shape_masks("val", config.size, 100, config.seed))
        return [Sequence(f"shape{i:03}", [x], [mask]) for i, (x, mask) in enumerate(drawn)]
    size = max(64, config.size // 64 * 64)
    videos = [shapes.moving_shapes(i, size, seed=config.seed) for i in range(10)]
    return [Sequence(f"shapes{i}", *video) for i, video in enumerate(videos)]


# --- pictures, and what both tasks use ------------------------------------------------------------

# DAVIS's and PASCAL's colors (256, 3): the bits of an object's number, three at a time from the
# lowest, are the highest bits of red, green and blue
_BITS = np.arange(256)[:, None] >> np.arange(9) & 1
PALETTE = np.packbits(_BITS.reshape(256, 3, 3), axis=1)[:, 0]


def write_ids(path, ids):
    """Write object numbers uint8 (H, W) as an indexed PNG with DAVIS's palette."""
    picture = to_pil_image(ids)
    picture.putpalette(PALETTE.tobytes())
    picture.save(path)


def enlarge(values, H, W):
    """Resize (h, w) of patches to (H, W) of pixels, each patch a block."""
    return F.interpolate(values[None, None].float(), size=(H, W), mode="nearest-exact")[0, 0]


def overlay(image, ids, opacity=0.55):
    """Tint the objects ids (H, W) in image uint8 (3, H, W), outlined in white."""
    ids = ids.cpu().long()
    tint = torch.from_numpy(PALETTE)[ids].permute(2, 0, 1)
    mixed = torch.where(ids > 0, (1 - opacity) * image + opacity * tint, image.float())
    return torch.where(boundary(ids[None]), 255.0, mixed).to(torch.uint8)


def heat(values, image):
    """Color values (h, w), smallest dark to largest light, over image uint8 (3, H, W) in gray."""
    low, high = values.aminmax()
    level = enlarge(255 * (values - low) / (high - low).clamp(min=1e-12), *image.shape[1:])
    level = to_pil_image(level.byte().cpu())
    colors = ImageOps.colorize(level, black="#00003c", mid="#be286e", white="#ffffa0")
    return pil_to_tensor(Image.blend(to_pil_image(image).convert("L").convert("RGB"), colors, 0.7))


def save_sheet(path, rows, height=170):
    """Save rows of (caption, picture uint8 (3, H, W)) as a PNG, all scaled to the first's shape."""
    font = ImageFont.load_default(13)
    H, W = rows[0][0][1].shape[1:]
    width = max(1, round(W * height / H))
    step = max(width, *(round(font.getlength(name)) for row in rows for name, _ in row)) + 6
    sheet = Image.new("RGB", (step * max(map(len, rows)), (height + 24) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (caption, picture) in enumerate(row):
            x, y = j * step, i * (height + 24)
            pen.text((x, y), caption, "black", font)
            sheet.paste(to_pil_image(picture).resize((width, height)), (x, y + 18))
    sheet.save(path)


def feature_map(backbone, x, kind="tokens"):
    """Map x (1, 3, H, W) to (H / p, W / p, dim), p: Setting.side.

    kind: a ViT's last block gives "tokens", "keys", or the CLS token's "attention" (dim: heads).
    Any other backbone gives its last map before pooling, which is coarse.
    """
    if hasattr(backbone, "tokens"):
        if kind == "attention":
            patches = backbone.last_attention(x)[0, :, 0, 1:].T
        else:
            tokens = backbone.last_keys(x) if kind == "keys" else backbone.tokens(x)[0]
            patches = tokens[0, 1:]
        return patches.unflatten(0, [side // backbone.patch_size for side in x.shape[2:]])
    if hasattr(backbone, "feature_map"):
        return backbone.feature_map(x)[0]
    layers = list(backbone.children())[:-2]  # without torchvision's avgpool and fc
    return torch.nn.Sequential(*layers)(x)[0].permute(1, 2, 0)


class Setting:
    """Models, device, options and the folder for the results."""

    def __init__(self, config):
        self.here, models, self.trained, _, self.out = evaluation.start(config)
        self.config = config
        self.models = {model.row: model for model in models}  # all of one architecture
        stride = 8 if self.trained.get("stem") == "small" else 32
        self.side = getattr(models[0].backbone, "patch_size", stride)  # of a cell of feature_map
        slices = {m.row: features.part_slices(m.backbone.dim, m.d_ir) for m in models}
        chosen = evaluation.chosen_parts(models, config.part, config.ckpt)
        self.parts = {(row, part): slices[row][part] for row, part in chosen}  # columns of z

    def file(self, *names):
        """Return a path in `out`, its folders made. A row's name may be a path: no slashes."""
        path = Path(self.out, *(re.sub(r"[^\w.-]+", "_", name).strip("_.") for name in names))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def feature_map(self, row, image, sides, kind="tokens"):
        """Return the feature_map of image uint8 (3, H, W), resized to sides, in fp32."""
        x = normalize(resize(image, *sides)[None].to(self.here.device) / 255)
        with self.here.autocast():
            z = feature_map(self.models[row].backbone, x, kind).float()
        features.check_finite(z, self.config.ckpt)
        return z

    def rows(self, key, test, n, scores):
        """Make rows of results.json from key = (row, part, kind of map) and its scores (k,)."""
        row, part, kind = key
        dims = self.parts[row, part].stop - self.parts[row, part].start
        common = dict(row=row, part=part, dims=dims, test=test, seed=self.config.seed, n=n)
        values = dict(zip(MEASURES, scores.tolist()))
        if self.config.task == "saliency":
            iou, acc, *f_beta = scores.tolist()
            values = {f"max F{kind}": max(f_beta), f"IoU{kind}": iou, f"accuracy{kind}": acc}
        return [dict(common, metric=m, value=round(100 * v, 2)) for m, v in values.items()]


@torch.no_grad()
def evaluate(setting, sequences, test):
    """Run the task on all sequences: rows of results.json, of each object (davis) and of all."""
    config = setting.config
    work = follow if config.task == "davis" else find_object
    scores = defaultdict(list)  # (row, part, kind of map) -> [(name, n, scores (k,))]
    n_done, n_unscored = 0, 0
    for sequence in features.progress_bar(sequences, setting.here, config.task):
        try:
            found = work(setting, sequence, draw=n_done < config.pictures)
        except Unreadable as error:
            tqdm.write(f"{sequence.name}: skipped, {error}")
            continue
        n_done += 1
        n_unscored += not found
        for key, objects in found.items():
            scores[key] += objects
    if not n_done:
        raise UsageError(f"{test}: none of {len(sequences)} could be read; check the files")
    if n_unscored:
        print(f"{n_unscored} of {n_done} have no ground truth: segmented, not scored")
    details, totals = [], []
    for key, objects in scores.items():
        if config.task == "davis":
            details += [row for one in objects for row in setting.rows(key, *one)]
        mean = torch.stack([vector for *_, vector in objects]).mean(0)
        totals += setting.rows(key, test, len(objects), mean)
    return details, totals


def photo_sides(H, W, shorter, patch):
    """Return a photo's sides in whole patches: its own, or the shorter one `shorter` (TokenCut)."""
    scale = shorter / min(H, W) if shorter else 1
    return tuple(max(1, round(side * scale / patch)) * patch for side in (H, W))


def find_object(setting, photo, draw):
    """Find a photo's salient object by TokenCut and write masks/ROW/NAME.png.

    Returns {(row, "full", kind): [(NAME, 1, image_metrics)]}; kind: "", or ", solver" if refined.
    """
    image, truth = photo.read(0)
    H, W = image.shape[1:]
    if truth is not None:
        truth = truth > (127 if truth.max() > 1 else 0)  # of 0 and 1, or of 0 and 255
        if truth.shape != (H, W):
            h, w = truth.shape
            tqdm.write(f"{photo.name}: mask of {w}x{h} resized to {W}x{H}, the image's size")
            truth = enlarge(truth, H, W) > 0.5
    sides = photo_sides(H, W, setting.config.size, setting.side)
    n = math.prod(sides) // setting.side**2
    if n > MOST:
        raise UsageError(f"{photo.name}: {n} patches take too much memory; use --size=480")
    found, scores = {}, {}
    for row in setting.models:
        keys = setting.feature_map(row, image, sides, "keys").permute(2, 0, 1)
        mask, vector = tokencut(keys, setting.config.tau)
        if not mask.any():
            why = "all patches are alike, or no two are"
            tqdm.write(f"{photo.name}: {row} finds no foreground: {why}")
        maps = {"": enlarge(mask, H, W).cpu()}
        if setting.config.solver:
            maps[", solver"] = bilateral_solver(image, maps[""])
        found[row] = (vector, maps)
        for kind, map_ in maps.items():
            picture = to_pil_image((map_ > 0.5).byte() * 255)
            picture.save(setting.file("masks", row + kind, f"{photo.name}.png"))
            if truth is not None:
                scores[row, "full", kind] = [(photo.name, 1, image_metrics(map_, truth))]
    if draw:
        draw_photo(setting, photo.name, image, truth, found, sides)
    return scores


def draw_photo(setting, name, image, truth, found, sides):
    """Save two pictures: found {row: (eigenvector, maps)}, and where a ViT's heads attend."""
    sheet, attention = [], []
    for row, (vector, maps) in found.items():
        true = [] if truth is None else [("truth", overlay(image, truth))]
        cut = [(f"TokenCut{kind}", overlay(image, map_ > 0.5)) for kind, map_ in maps.items()]
        sheet.append([(row, image), *true, ("eigenvector", heat(vector, image)), *cut])
        if hasattr(setting.models[row].backbone, "last_attention"):
            heads = setting.feature_map(row, image, sides, "attention")
            tiles = [(f"head {i + 1}", heat(x, image)) for i, x in enumerate(heads.unbind(-1))]
            attention.append([(row, image), *tiles, ("mean", heat(heads.mean(-1), image))])
    save_sheet(setting.file("pictures", f"saliency_{name}.png"), sheet)
    if attention:
        save_sheet(setting.file("pictures", f"attention_{name}.png"), attention)


def follow(setting, video, draw):
    """Follow the objects of the first mask through a video, write masks/ROW_PART/VIDEO/FRAME.png.

    As davis2017-evaluation: objects are numbered up to the first mask's maximum, the first and the
    last frame are not measured, 255 is nobody's. Returns {(row, part, ""): object_measures(...)}.
    """
    first, numbers = first_objects(video)
    last = len(video.images) - 1
    shown = {round(last * quarter / 4) for quarter in range(5)} if draw else ()
    strips, scores = defaultdict(list), defaultdict(list)
    seen = set()
    for t, (image, truth, found) in enumerate(propagate_masks(setting, video, first, len(numbers))):
        frame = video.frame(t)
        for (row, part), ids in found.items():
            write_ids(setting.file("masks", f"{row}_{part}", video.name, f"{frame}.png"), ids)
            if truth is not None and 0 < t < last:
                pred = (ids == numbers) & (truth != 255)
                scores[row, part, ""].append(torch.stack(davis_jf(pred, truth == numbers), 1))
        if truth is not None:
            seen.update(truth.unique().tolist())
            found["truth",] = truth * (truth != 255)
        for title, ids in found.items() if t in shown else ():
            strips[title].append((f"{', '.join(title)}: frame {frame}", overlay(image, ids)))
    if draw:
        save_sheet(setting.file("pictures", f"davis_{video.name}.png"), list(strips.values()))
    later = ", ".join(map(str, sorted(seen - {0, 255, *numbers.flatten().tolist()})))
    if later:
        tqdm.write(f"{video.name}: object {later} not in the first annotation: not tracked")
    return {key: object_measures(video.name, torch.stack(jf, -1)) for key, jf in scores.items()}


def first_objects(video):
    """Return the first frame's mask (H, W) and the object numbers (n, 1, 1) in it."""
    if len(video.images) == 0:
        raise Unreadable("has no frames")
    first = video.read(0)[1]
    if first is None:
        raise Unreadable(f"frame {video.frame(0)} has no annotation to start from")
    numbers = torch.arange(1, int((first * (first != 255)).max()) + 1)
    if not len(numbers):
        raise Unreadable(f"the annotation of frame {video.frame(0)} marks no object")
    return first, numbers[:, None, None]


def frame_sides(H, W, shorter, patch):
    """Return a frame's sides, the shorter one `shorter` in patches, the longer one in 64 (DINO)."""
    short = max(1, shorter // patch) * patch
    multiple = math.lcm(64, patch)
    long = max(1, short * max(H, W) // min(H, W) // multiple) * multiple
    return (short, long) if H <= W else (long, short)


def propagate_masks(setting, video, first, n_objects):
    """Carry the mask first (H, W) through a video: yield image, truth, {(row, part): ids}."""
    config = setting.config
    # one grid for all frames: DAVIS has videos with frames of 853 and of 854 pixels
    sides = frame_sides(*first.shape, config.size, setting.side)
    small = enlarge(first, *(side // setting.side for side in sides)).to(setting.here.device)
    labels = torch.stack([small == number for number in range(n_objects + 1)])
    options = (config.n_last, config.radius, config.topk, config.temperature)
    propagations = {row_part: Propagation(labels, *options) for row_part in setting.parts}
    for t in tqdm(range(len(video.images)), video.name, leave=False, disable=None):
        image, truth = video.read(t)
        if truth is not None and truth.shape != image.shape[1:]:
            raise Unreadable(f"frame {video.frame(t)} and its annotation differ in size")
        z = {row: setting.feature_map(row, image, sides) for row in setting.models}
        found = {}
        for (row, part), propagation in propagations.items():
            labels = propagation.step(z[row][..., setting.parts[row, part]])
            found[row, part] = harden(labels, sides, *image.shape[1:]) if t else first
        yield image, truth, found


def main(argv):
    began = time.perf_counter()
    config = configure(SegConfig, argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("eval_seg.py runs as one process; start it with python, not torchrun")
    setting = Setting(config)
    here = setting.here
    if config.data == "shapes" and not config.image:
        config.size = config.size or min(4 * setting.trained["img_size"], 224)
    elif config.task == "davis":
        config.size = config.size or 480
    test = os.path.basename(os.path.normpath(config.image or config.data))
    where = f"{setting.trained['arch']}, {here.device.type} {here.precision}"
    print(f"{config.task} of {test}, {' and '.join(setting.models)}, {where}", flush=True)
    details, rows = evaluate(setting, open_data(config), test)
    seconds = time.perf_counter() - began
    if rows:
        print("", *results.table_lines(rows), sep="\n")
    protocol = results.protocol_of(config, list(setting.models.values()), here)
    path = os.path.join(setting.out, "results.json")
    results.append_results(path, config.task, protocol, seconds, details + rows)
    print(f"{seconds:.0f} s; masks/, pictures/ and results.json are in {setting.out}")


if __name__ == "__main__":
    machine.run_main(main)
