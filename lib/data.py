"""Images and labels: the built-in shapes, folders, torchvision's data sets; one decoder; loaders whose every batch is a function of the step.

images = open_images("shapes" | "cifar10" | ... | "pets" | folder, "train" | "val", ...)
images.read(i) -> uint8 (3, H, W);  images.labels (N,) int64, -1 where unknown;  images.classes, a list of names
"""

import contextlib
import functools
import math
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from augment import center_crop, crop_views, random_crops
from configurator import UsageError, nearest
from draws import key, uniforms

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_sets = torchvision.datasets
TORCHVISION = {  # name -> its class, and the arguments for 'train' and for 'val', which is the official test set
    "cifar10": (_sets.CIFAR10, [dict(train=True)], [dict(train=False)]),
    "cifar100": (_sets.CIFAR100, [dict(train=True)], [dict(train=False)]),
    "stl10": (_sets.STL10, [dict(split="train")], [dict(split="test")]),
    "flowers102": (
        _sets.Flowers102,
        [dict(split="train"), dict(split="val")],
        [dict(split="test")],
    ),  # the 1020 + 1020 images, as is usual
    "food101": (_sets.Food101, [dict(split="train")], [dict(split="test")]),
    "pets": (_sets.OxfordIIITPet, [dict(split="trainval")], [dict(split="test")]),
}
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)  # what decoders raise at a broken file
BROKEN_SHARE = (
    0.01  # of the data; more broken files than this and the data set is at fault, not the file
)


class Images(NamedTuple):
    """A data set in memory or on disk: all that loaders and evaluations know of it."""

    read: Callable  # i -> uint8 (3, H, W)
    labels: torch.Tensor  # (N,) int64, -1: unknown
    classes: list
    name: Callable  # i -> what to call the image in a message

    def __len__(self):
        return len(self.labels)


def open_splits(data, classes="", root="data", download=False, img_size=64):
    """-> the 'train' and 'val' Images of open_images, the second None where there is none; UsageError if their classes differ."""
    train, val = (
        open_images(data, split, classes, root, download, img_size) for split in ("train", "val")
    )
    if val is not None and val.classes != train.classes:
        differ = sorted(set(val.classes) ^ set(train.classes))
        raise UsageError(
            f"data={data}: train has {len(train.classes)} classes, val {len(val.classes)}, and they differ in {', '.join(differ[:3])}; "
            "give both the same class folders, or choose common ones with --classes"
        )
    for split, images in (("train", train), ("val", val)):
        if images is not None and len(images) == 0:
            raise UsageError(f"data={data}: its {split} split holds no images")
    return train, val


def labelled_splits(data, classes="", root="data", download=False, img_size=64):
    """open_splits for evaluations: UsageError unless both splits are there and labelled."""
    train, val = open_splits(data, classes, root, download, img_size)
    if val is None or train.labels.min() < 0:
        raise UsageError(
            f"data={data}: an evaluation needs labels, train/CLASS and val/CLASS folders"
        )
    return train, val


def open_images(data, split, classes="", root="data", download=False, img_size=64):
    """-> Images of `data`'s split ('train' or 'val'), or None where a folder has no such split.

    data: 'shapes', a torchvision name, or a folder: `train/CLASS/**` with or without `val/CLASS/**`, the unpacked archive of CUB-200-2011,
    else any tree of images, without labels, all of it 'train'. classes: a file with a class folder's name a line. root, download: torchvision's. img_size: what shapes are drawn at."""
    if classes and data in ("shapes", *TORCHVISION):
        raise UsageError(
            f"classes={classes}: a class list chooses among a folder's classes; {data} has none, leave it away"
        )
    if data == "shapes":
        return shapes(split, img_size)
    if data in TORCHVISION:
        return _torchvision_images(data, split, root, download)
    folder = Path(data)
    if not folder.is_dir():
        raise UsageError(
            f"data={data}: no such folder{nearest(data, ('shapes', *TORCHVISION))}; give a folder of images, "
            f"or one of shapes, {', '.join(TORCHVISION)}"
        )
    if (folder / "train").is_dir():
        return _labelled_folder(folder / split, classes) if (folder / split).is_dir() else None
    if classes:
        raise UsageError(f"classes={classes}: {data} has no train/CLASS folders to choose from")
    if (folder / "images.txt").exists():
        return _cub_archive(folder, split)
    return _unlabelled_tree(folder) if split == "train" else None


# ------------------------------------------------------------------------------------------------ files


def decode(path, enough=0):
    """An image file -> uint8 RGB (3, H, W), turned as a JPEG's or PNG's EXIF says; grey, CMYK, palette, alpha and 16 bit become RGB of 8; of an
    animation the first frame. torchvision's codecs, Pillow for the formats and variants they do not read.

    enough: a JPEG that has at least two, four or eight times so many pixels a side is decoded at a half, a quarter or an eighth of its size;
    libjpeg then leaves out the fine frequencies and most of the time. 0: every image as it is."""
    try:
        image = _decode_reduced(path, enough) if enough else None
        image = (
            torchvision.io.decode_image(str(path), mode="RGB", apply_exif_orientation=True)
            if image is None
            else image
        )
    except RuntimeError:
        image = _decode_with_pillow(path)
    image = image[0] if image.ndim == 4 else image
    return image if image.dtype == torch.uint8 else TF.to_dtype(image, torch.uint8, scale=True)


def reason(error):
    """What an exception says, in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _decode_reduced(path, enough):
    """None where the file is no JPEG, none that is large enough, or one that Pillow stumbles over: the whole decoder then has its say."""
    with contextlib.suppress(Exception), Image.open(path) as file:
        if file.format in ("JPEG", "MPO") and min(file.size) >= 2 * enough:
            file.draft(None, (enough, enough))
            return TF.pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))


def _decode_with_pillow(path):
    with Image.open(path) as file:
        if file.mode.startswith(
            ("I", "F")
        ):  # 16 bit, 32 bit or float: Pillow's own conversion would clip them instead of scaling
            grey = np.asarray(file, dtype=np.float32)
            full = (
                65535
                if file.mode.startswith("I;16") or grey.max() > 255
                else 1
                if file.mode == "F" and grey.max() <= 1
                else 255
            )
            return torch.from_numpy((grey.clip(0, full) * (255 / full)).round().astype(np.uint8))[
                None
            ].expand(3, -1, -1)
        return TF.pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))


def _read_file(paths, i, enough=0):
    return decode(paths[i], enough)


def _file_images(paths, labels, classes):
    return Images(
        functools.partial(_read_file, paths),
        torch.as_tensor(labels, dtype=torch.int64),
        classes,
        paths.__getitem__,
    )


class _ChosenClasses(torchvision.datasets.ImageFolder):
    """ImageFolder that only looks into the class folders of a list."""

    def __init__(self, root, chosen):
        self.chosen = chosen
        super().__init__(
            root, is_valid_file=lambda path: path.lower().endswith(EXTENSIONS), allow_empty=True
        )

    def find_classes(self, directory):
        names = sorted(
            entry.name
            for entry in os.scandir(directory)
            if entry.is_dir() and (not self.chosen or entry.name in self.chosen)
        )
        return names, {name: i for i, name in enumerate(names)}


def _labelled_folder(folder, class_file):
    chosen = read_classes(class_file) if class_file else None
    there = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    missing = sorted(set(chosen or ()) - set(there))
    if missing:
        raise UsageError(
            f"{folder}: {len(missing)} of the {len(chosen)} classes of {class_file} are not there, such as {missing[0]}; "
            "mend the list or the folder"
        )
    if not there:
        raise UsageError(
            f"{folder}: holds no class folders; sort its images into {folder}/CLASS/"
            + (
                f", or for images without labels give data={folder}"
                if folder.name == "train"
                else ", or remove it to train without kNN"
            )
        )
    found = _ChosenClasses(str(folder), chosen)
    empty = sorted(set(range(len(found.classes))) - set(found.targets))
    if not found.samples or empty:
        what = f"class folder {found.classes[empty[0]]} holds" if found.samples else "holds"
        raise UsageError(
            f"{folder}: {what} no images ({' '.join(EXTENSIONS)}); put some there or remove it"
        )
    return _file_images([path for path, _ in found.samples], found.targets, found.classes)


def _unlabelled_tree(folder):
    paths = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    )
    if not paths:
        raise UsageError(
            f"data={folder}: no images in it ({' '.join(EXTENSIONS)}); give a folder that holds some"
        )
    return _file_images(paths, [-1] * len(paths), [])


def _cub_archive(folder, split):
    """CUB-200-2011 as its archive unpacks: images.txt (id, path below images/), image_class_labels.txt (id, class), train_test_split.txt
    (id, 1: train)."""
    tables = []
    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt"):
        try:
            tables.append(
                dict(
                    line.split()
                    for line in (folder / name).read_text().splitlines()
                    if line.strip()
                )
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{folder / name}: {getattr(error, 'strerror', None) or 'not two words a line'}; unpack the archive again"
            ) from None
    paths, labels, is_train = tables
    if (
        not paths.keys() == labels.keys() == is_train.keys()
        or not set(is_train.values()) <= {"0", "1"}
        or not all(map(str.isdigit, labels.values()))
    ):
        raise UsageError(
            f"{folder}: images.txt, image_class_labels.txt and train_test_split.txt do not fit together; unpack the archive again"
        )
    must_stay_inside(paths.values(), folder / "images.txt")
    of_label = {
        int(labels[i]): os.path.dirname(paths[i]) for i in paths
    }  # 1 -> 001.Black_footed_Albatross
    numbers = sorted(of_label)
    chosen = [i for i in paths if is_train[i] == ("1" if split == "train" else "0")]
    files = [str(folder / "images" / paths[i]) for i in chosen]
    _must_exist(files, f"data={folder}")
    return _file_images(
        files, [numbers.index(int(labels[i])) for i in chosen], [of_label[n] for n in numbers]
    )


def must_stay_inside(names, listed):
    """UsageError where a name from the list `listed` leads out of the folder that it is meant for."""
    for name in names:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UsageError(f"{listed}: {name} leads out of its folder; unpack the archive again")


def _must_exist(paths, what):
    """Better now than at the test, after the training."""
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UsageError(
            f"{what}: {len(missing)} of {len(paths)} images are missing, such as {missing[0]}; fetch or unpack it again"
        )


def read_classes(path):
    """A class list: one folder name a line; what follows a blank, and lines of #, are comments."""
    shipped = (
        Path(__file__).parent / path
    )  # a config names its list from the project's folder, wherever it is started from
    try:
        lines = (Path(path) if Path(path).exists() else shipped).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"classes={path}: {getattr(error, 'strerror', None) or 'not a text file'}; configs/in100_classes.txt is one"
        ) from None
    names = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    if not names or len(set(names)) < len(names):
        raise UsageError(
            f"classes={path}: {'a class is listed twice' if names else 'lists no class'}; one folder name a line"
        )
    return names


# ------------------------------------------------------------------------------------------------ torchvision's data sets


def _torchvision_images(name, split, root, download):
    make, *arguments = TORCHVISION[name]
    first = not dist.is_initialized() or int(os.environ["LOCAL_RANK"]) == 0
    try:
        if download and first:
            for some in arguments[0] + arguments[1]:
                make(root, download=True, **some)
        if dist.is_initialized():
            dist.barrier()  # one rank of each machine downloads, the others wait for it
        pieces = [make(root, **some) for some in arguments[split != "train"]]
    except ImportError as error:
        raise UsageError(
            f"data={name}: torchvision reads its labels with {error.name}: pip install {error.name}"
        ) from None
    except Exception as error:  # whatever torchvision stumbles over in a damaged archive
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"data={name}: not in {root}/, or damaged ({reason}); --download=True fetches it, --data_root=... is where it lies"
        ) from None
    if hasattr(pieces[0], "data"):
        [images] = pieces
        pixels = torch.from_numpy(images.data)
        pixels = pixels.permute(0, 3, 1, 2) if name != "stl10" else pixels  # uint8 (N, 3, H, W)
        labels = images.labels if name == "stl10" else images.targets
        return _memory_images(
            pixels, torch.as_tensor(labels, dtype=torch.int64), list(images.classes), name
        )
    paths = [
        str(path)
        for piece in pieces
        for path in (piece._images if hasattr(piece, "_images") else piece._image_files)
    ]
    labels = [
        label for piece in pieces for label in piece._labels
    ]  # torchvision tells paths and labels only one decoded image at a time
    if any(not 0 <= label < len(pieces[0].classes) for label in labels):
        raise UsageError(
            f"data={name}: {root}/ holds labels outside its {len(pieces[0].classes)} classes; fetch it again"
        )
    _must_exist(paths, f"data={name}")
    return _file_images(paths, labels, list(pieces[0].classes))


def _memory_images(pixels, labels, classes, name):
    """pixels uint8 (N, 3, H, W), labels (N,) -> Images."""
    return Images(pixels.contiguous().__getitem__, labels, classes, f"{name} image {{}}".format)


# ------------------------------------------------------------------------------------------------ the same images otherwise, and some of them


def reduced(images, config):
    """The same images, large JPEG files decoded no larger than the random crops of config need."""
    if getattr(images.read, "func", None) is not _read_file:
        return images  # in memory already, or chosen from others: reduce those
    crops = [
        (config.img_size, config.global_scale),
        *[(config.local_size, config.local_scale)] * (config.local_crops > 0),
    ]
    enough = max(
        size / math.sqrt(scale[0] * 3 / 4) for size, scale in crops
    )  # the smallest crop, 3:4, is still `size` pixels on its shorter side
    return Images(
        functools.partial(images.read, enough=math.ceil(enough)),
        images.labels,
        images.classes,
        images.name,
    )


def in_memory(images, what, threads):
    """The same images, decoded once and kept, of broken ones the reason; loading processes share them. UsageError where they would not fit.

    what: what to call them in a message."""
    sample = range(0, len(images), max(1, len(images) // 64))
    sizes = [
        image.numel()
        for image in map(functools.partial(_read_or_reason, images.read), sample)
        if not isinstance(image, str)
    ]
    needed, free = (
        len(images) * sum(sizes) / max(len(sizes), 1),
        os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    if needed > 0.8 * free:
        raise UsageError(
            f"cache=ram: {what} decoded take about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: leave --cache=ram away"
        )
    with ThreadPoolExecutor(max(1, threads)) as pool:  # decoders do not hold Python's lock
        kept = list(
            tqdm(
                pool.map(functools.partial(_read_or_reason, images.read), range(len(images))),
                total=len(images),
                desc=f"decoding {what}",
                leave=False,
                disable=dist.is_initialized() and dist.get_rank() > 0,
            )
        )
    return Images(functools.partial(_kept, kept), images.labels, images.classes, images.name)


def _read_or_reason(read, i):
    try:
        return read(i)
    except UNREADABLE as error:
        return reason(error)


def _kept(kept, i):
    if isinstance(kept[i], str):
        raise OSError(kept[i])
    return kept[i]


def subset(images, indices):
    """The Images at `indices`, in that order."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    read, name = (
        functools.partial(_at, function, indices.tolist())
        for function in (images.read, images.name)
    )
    return Images(read, images.labels[indices], images.classes, name)


def _at(function, indices, i):
    return function(indices[i])


def hold_out(labels, share, seed):
    """labels (N,) -> indices to fit on, indices held out: about `share` of the images, at least one, each class in its proportion."""
    order = np.random.default_rng([seed, 1]).permutation(len(labels))
    order = order[
        np.argsort(labels.numpy()[order], kind="stable")
    ]  # class by class, shuffled within
    n = max(1, round(share * len(labels)))
    held = order[((np.arange(n) + 0.5) * len(labels) / n).astype(int)]  # evenly spaced
    return np.setdiff1d(order, held), np.sort(held)


def some_of_each(labels, share, seed):
    """labels (N,) -> indices of `share` of each class's images, rounded, at least one, chosen by the seed."""
    rng, chosen = np.random.default_rng([seed, 2]), []
    for label in labels.unique().numpy():
        members = np.flatnonzero(labels.numpy() == label)
        chosen.append(rng.permutation(members)[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def listed(images, path):
    """Indices of the images whose file names stand in the list `path`, one a line, as n01440764_10043.JPEG (SimCLR's imagenet_subsets/).
    Lines of classes that the data do not have are passed over; UsageError if one of the others is missing."""
    try:
        names = Path(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"subset_list={path}: {getattr(error, 'strerror', None) or 'not a text file'}; SimCLR's imagenet_subsets/1percent.txt is one"
        ) from None
    index = {os.path.basename(images.name(i)): i for i in range(len(images))}
    classes = set(images.classes)
    wanted = sorted({name for name in names if name.rsplit("_", 1)[0] in classes})
    missing = [name for name in wanted if name not in index]
    if missing or not wanted:
        raise UsageError(
            f"subset_list={path}: "
            + (
                f"{len(missing)} of its {len(wanted)} images of these classes are not in the data, such as {missing[0]}"
                if wanted
                else "none of its lines is of a class of the data, such as " + images.classes[0]
            )
            + "; without a list a stratified share is taken"
        )
    return np.array(sorted(index[name] for name in wanted))


# ------------------------------------------------------------------------------------------------ built-in data: shapes

SHAPES = ("arrow", "crescent", "cup", "drop", "flag", "house", "key", "ell", "mushroom", "tee")
SHAPE_COUNTS = dict(train=8000, val=2000)
TINT = 0.1  # how far a colour's channels spread
UPRIGHT = 15  # degrees a shape may lean: so "which way is up" has an answer, and rotation by 90 degrees is something to predict


def shapes(split, size=64, count=None, seed=0):
    """Textured shapes on varied backgrounds: the class is the shape; orientation, place, size, colours and textures are free.

    -> Images of (3, size, size), 8000 for 'train' and 2000 for 'val'; everything a function of (seed, split, index)."""
    n = count or SHAPE_COUNTS[split]
    keys = key(seed, 10 + list(SHAPE_COUNTS).index(split), torch.arange(n))
    labels = torch.arange(n) % len(SHAPES)
    pixels = torch.cat(
        [draw_shapes(k, y, size) for k, y in zip(keys.split(500), labels.split(500))]
    )
    return _memory_images(pixels, labels, list(SHAPES), f"shapes {split}")


def shape_facts(keys):
    """What is free in an image of shapes: keys (n,) -> {'angle' (n,) degrees counter-clockwise from upright, 'radius' (n,) and 'center' (n, 2)
    in half image sides, x right and y up, 'front' and 'back': two RGB colours each (n, 2, 3), 'waves' (n, 2, 4) of their textures}."""
    u = uniforms(keys, 32)  # (n, 32); a column a property
    radius = 0.5 + 0.3 * u[:, 1]
    # shades of grey with a tint, light on dark or dark on light: were the colours free, they would be what tells images apart, and two
    # minutes of training would find nothing else
    tints, waves = u[:, 4:16].view(-1, 2, 2, 3), u[:, 16:24].view(-1, 2, 4)
    shade = 0.45 + 0.1 * u[:, 24, None, None]
    side = torch.where(u[:, 25] < 0.5, -0.35, 0.35)[:, None, None]
    front, back = (shade + move + TINT * (tints[:, i] - 0.5) for i, move in ((0, side), (1, 0)))
    return dict(
        angle=(2 * u[:, 0] - 1) * UPRIGHT,
        radius=radius,
        center=(2 * u[:, 2:4] - 1) * (0.9 - radius)[:, None],
        front=front,
        back=back,
        waves=waves,
    )


def draw_shapes(keys, labels, size):
    """keys (n,), labels (n,) index into SHAPES -> uint8 (n, 3, size, size)."""
    back, front, cover = paint_shapes(shape_facts(keys), labels, size)
    return _with_grain(back + cover * (front - back), keys)


def _with_grain(image, keys):
    """image (n, 3, S, S) in [0, 1] -> uint8, a little noise added."""
    grain = 0.06 * (uniforms(key(keys, 1), image[0].numel()).view(image.shape) - 0.5)
    return ((image + grain).clamp(0, 1) * 255).round().to(torch.uint8)


def paint_shapes(facts, labels, size):
    """facts of shape_facts, labels (n,) -> background and shape's texture, (n, 3, size, size) in [0, 1] each, and how far the shape covers
    each pixel (n, 1, size, size)."""
    facts = {name: value[..., None, None] for name, value in facts.items()}
    centres = (2 * torch.arange(size) + 1) / size - 1
    y, x = torch.meshgrid(-centres, centres, indexing="ij")  # (size, size) in [-1, 1], y up
    angle, radius, (center_x, center_y) = (
        torch.deg2rad(facts["angle"]),
        facts["radius"],
        facts["center"].unbind(1),
    )
    own_x = (
        angle.cos() * (x - center_x) + angle.sin() * (y - center_y)
    ) / radius  # the shape's own coordinates (n, size, size)
    own_y = (-angle.sin() * (x - center_x) + angle.cos() * (y - center_y)) / radius
    distance = torch.empty_like(own_x)
    for label, name in enumerate(SHAPES):
        rows = labels == label
        distance[rows] = _shape_distance(name, own_x[rows], own_y[rows])
    cover = (0.5 - distance * radius * size / 2).clamp(0, 1)[
        :, None
    ]  # (n, 1, size, size), antialiased over one pixel

    def textured(colors, wave):
        """Two colours (n, 2, 3, 1, 1), mixed by a plane wave of free direction, length, phase and contrast: from plain to stripes."""
        direction, frequency, phase, contrast = wave.unbind(1)
        direction = 2 * math.pi * direction
        wave = torch.sin(
            (2 + 14 * frequency) * (direction.cos() * x + direction.sin() * y) + 2 * math.pi * phase
        )
        mix = (0.5 + 0.5 * contrast * wave)[:, None]  # (n, 1, size, size)
        return colors[:, 0] * mix + colors[:, 1] * (1 - mix)

    return (
        textured(facts["back"], facts["waves"][:, 1]),
        textured(facts["front"], facts["waves"][:, 0]),
        cover,
    )


def shape_masks(split, size, count, seed=0):
    """The first images of shapes(split, size, seed=seed) and where their shapes are -> uint8 (count, 3, size, size), bool (count, size, size)."""
    keys, labels = (
        key(seed, 10 + list(SHAPE_COUNTS).index(split), torch.arange(count)),
        torch.arange(count) % len(SHAPES),
    )
    cover = paint_shapes(shape_facts(keys), labels, size)[2]
    return draw_shapes(keys, labels, size), cover[:, 0] > 0.5


def moving_shapes(index, size, frames=16, objects=2, seed=0):
    """A video: `objects` shapes wander and turn before a background, the later ones in front -> uint8 (frames, 3, size, size), ids uint8
    (frames, size, size): 0 the background. A function of (seed, index)."""
    time = torch.linspace(0, 1, frames)
    image, ids = None, torch.zeros(frames, size, size, dtype=torch.uint8)
    for i in range(objects):
        key_ = key(seed, 30, index, i)
        facts = {
            name: value.repeat_interleave(frames, 0)
            for name, value in shape_facts(key_[None]).items()
        }
        u = uniforms(key(key_, 2), 5)
        start, end = 1.1 * u[0:2] - 0.55, 1.1 * u[2:4] - 0.55
        facts["radius"] = 0.6 * facts["radius"]
        facts["center"] = start + time[:, None] * (end - start)
        facts["angle"] = facts["angle"] + 90 * (u[4] - 0.5) * time
        back, front, cover = paint_shapes(
            facts, (index + 3 * i) % len(SHAPES) + torch.zeros(frames, dtype=torch.int64), size
        )
        image = back if image is None else image
        image = image + cover * (front - image)
        ids[cover[:, 0] > 0.5] = i + 1
    return _with_grain(image, key(seed, 31, index, torch.arange(frames))), ids


def _shape_distance(name, x, y):
    """Signed distance (about; negative inside) to a shape of radius 1, y up; none of them looks the same upside down or on its side."""

    def box(cx, cy, hx, hy):
        return torch.maximum((x - cx).abs() - hx, (y - cy).abs() - hy)

    def disc(cx, cy, r):
        return ((x - cx).square() + (y - cy).square()).sqrt() - r

    def wedge(
        top, bottom, half
    ):  # triangle with its tip at (0, top) and its base of 2 half at height bottom
        lean = half / (top - bottom)
        side = (x.abs() + (y - top) * lean) / math.hypot(1, lean)
        return torch.maximum(side, (bottom - y) if top > bottom else (y - bottom))

    union, cut = torch.minimum, lambda a, b: torch.maximum(a, -b)
    return {
        "arrow": lambda: union(box(0, -0.4, 0.22, 0.6), wedge(1, 0, 0.75)),
        "crescent": lambda: cut(disc(0, -0.1, 0.9), disc(0, 0.45, 0.75)),
        "cup": lambda: cut(box(0, 0, 0.75, 0.85), box(0, 0.35, 0.4, 0.85)),
        "drop": lambda: union(disc(0, -0.35, 0.6), wedge(1, -0.1, 0.52)),
        "flag": lambda: union(box(-0.6, 0, 0.15, 1), box(0.1, 0.5, 0.75, 0.45)),
        "house": lambda: cut(
            union(box(0, -0.45, 0.6, 0.5), wedge(0.95, 0, 0.95)), box(0, -0.6, 0.2, 0.4)
        ),
        "key": lambda: union(
            cut(disc(0, 0.5, 0.5), disc(0, 0.5, 0.24)),
            union(box(0, -0.45, 0.14, 0.55), box(0.25, -0.8, 0.25, 0.12)),
        ),
        "ell": lambda: union(box(-0.4, 0, 0.25, 0.95), box(0.1, -0.7, 0.7, 0.25)),
        "mushroom": lambda: union(torch.maximum(disc(0, 0, 0.9), -y), box(0, -0.45, 0.22, 0.5)),
        "tee": lambda: union(box(0, 0.7, 0.85, 0.25), box(0, -0.15, 0.22, 0.8)),
    }[name]()


# ------------------------------------------------------------------------------------------------ loaders


class Schedule:
    """The batches of steps start .. stop-1 as lists of (epoch, index): this rank's share of each global batch.

    An epoch is a permutation that depends on (seed, epoch) alone; step t takes its t-th batch_size images, rank r the r-th part of them.
    The incomplete batch at an epoch's end is left out."""

    def __init__(self, n, batch_size, seed, start, stop, rank=0, world=1):
        self.n, self.batch_size, self.seed, self.start, self.stop, self.rank, self.world = (
            n,
            batch_size,
            seed,
            start,
            stop,
            rank,
            world,
        )

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        per_epoch, share, shuffled = self.n // self.batch_size, self.batch_size // self.world, -1
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, per_epoch)
            if epoch != shuffled:
                order, shuffled = (
                    np.random.default_rng([self.seed, epoch]).permutation(self.n),
                    epoch,
                )
            first = batch * self.batch_size + self.rank * share
            yield [(epoch, int(i)) for i in order[first : first + share]]


class _Samples(torch.utils.data.Dataset):
    """What workers run: read an image, make its crops. A broken file is named and its place taken by the next image that can be read."""

    def __init__(self, images, seed, make):
        self.images, self.seed, self.make = images, seed, make

    def __getitem__(self, item):
        epoch, index = item
        broken = []
        for i in range(index, index + len(self.images)):
            i %= len(self.images)
            try:
                image = self.images.read(i)
                break
            except UNREADABLE as error:
                broken.append((self.images.name(i), reason(error)))
        else:
            raise UsageError(f"{broken[0][0]}: broken, as is every other image of the data set")
        key_ = key(self.seed, epoch, index)
        return (*self.make(image, key_), key_, self.images.labels[i], broken)


def _collate(samples):
    *columns, broken = zip(*samples)
    return [torch.stack(column) for column in columns] + [[b for many in broken for b in many]]


def _loader(images, seed, make, batches, workers, device):
    return torch.utils.data.DataLoader(
        _Samples(images, seed, make),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_outlast_the_notice,
    )


def _outlast_the_notice(_):
    """Ctrl-C and a cluster's SIGTERM reach every process of a job; but the step under way still needs its loading workers, so these end at
    their parent's word alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_parent, daemon=True).start()


def _obey_the_parent():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _make_center(image, key_, size):
    return (center_crop(image, size),)


def train_loader(images, config, start, stop, rank, world, device):
    """One pass over the steps start .. stop-1, all epochs, with the same workers throughout. A batch: global crops uint8 (B, 2, 3, G, G),
    local crops uint8 (B, L, 3, l, l), keys (B,), labels (B,), broken [(name, reason)]; B is this rank's share of batch_size."""
    batches = Schedule(len(images), config.batch_size, config.seed, start, stop, rank, world)
    return _loader(images, config.seed, _crops(config), batches, config.workers, device)


def first_samples(images, config, n):
    """The first n samples of the run, for a picture: whole images uint8 (n, 3, G, G) and, as in a batch, global crops, local crops, keys."""
    items = next(iter(Schedule(len(images), config.batch_size, config.seed, 0, 1)))[:n]
    whole = _collate(
        [
            _Samples(images, config.seed, functools.partial(_make_center, size=config.img_size))[
                item
            ]
            for item in items
        ]
    )
    return [
        whole[0],
        *_collate([_Samples(images, config.seed, _crops(config))[item] for item in items])[:3],
    ]


def _crops(config):
    return functools.partial(
        crop_views,
        global_size=config.img_size,
        local_size=config.local_size,
        local_crops=config.local_crops,
        global_scale=config.global_scale,
        local_scale=config.local_scale,
    )


def _make_crop(image, key_, size, scale):
    return (random_crops(image, key(key_, 0), 1, size, scale)[0],)


def crop_loader(
    images, size, scale, batch_size, seed, start, stop, workers, device, rank=0, world=1
):
    """The steps start .. stop-1 of a classifier's training, as train_loader. A batch: one random resized crop of each image, uint8
    (B, 3, size, size), keys (B,), labels (B,), broken [(name, reason)]."""
    batches = Schedule(len(images), batch_size, seed, start, stop, rank, world)
    return _loader(
        images,
        seed,
        functools.partial(_make_crop, size=size, scale=scale),
        batches,
        workers,
        device,
    )


def eval_loader(
    images, size, batch_size, workers, device, rank=0, world=1, seed=0, epoch=0, scale=None
):
    """Every world-th image from this rank's on, in order. A batch: centre crops, or with `scale` the epoch's random ones, uint8
    (B, 3, size, size), keys (B,), labels (B,), broken [(name, reason)]."""
    mine = range(rank, len(images), world)
    batches = [
        [(epoch, i) for i in mine[at : at + batch_size]] for at in range(0, len(mine), batch_size)
    ]
    make = (
        functools.partial(_make_crop, size=size, scale=scale)
        if scale
        else functools.partial(_make_center, size=size)
    )
    return _loader(images, seed, make, batches, workers, device)


class BrokenFiles:
    """Names each broken file once and stops the run where they are more than 1 % of the data."""

    def __init__(self, n):
        self.n, self.seen = round(n), set()

    def report(self, broken, say):
        for name, reason in broken:
            if name not in self.seen:
                self.seen.add(name)
                say(f"skipped broken image {name}: {reason} ({len(self.seen)} so far)")
        if len(self.seen) > BROKEN_SHARE * self.n:
            raise UsageError(
                f"{len(self.seen)} of {self.n} images are broken, more than {BROKEN_SHARE:.0%}, such as {min(self.seen)}; "
                "mend or remove them"
            )
