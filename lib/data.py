"""File -> image -> batch: folders, torchvision's data sets, the built-in shapes; their loaders.

images = open_images("shapes" | "cifar10" | ... | folder, "train" | "val", ...)
images.read(i) -> uint8 (3, H, W). A batch is a function of the step, so a run can be continued.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torchvision import datasets

from augment import center_crop, crop_views, random_crops
from lib.config import UsageError, did_you_mean
from lib.images import (
    EXTENSIONS,
    Images,
    cache_in_ram,
    file_images,
    limit_decode,
    memory_images,
    read_or_reason,
    reason,
)
from lib.images import UNREADABLE as UNREADABLE  # other files take these four from here
from lib.images import BrokenFiles as BrokenFiles
from lib.images import decode as decode
from lib.images import subset as subset
from lib.rng import fork, sample_seeds
from lib.shapes import shapes

TORCHVISION = {  # name -> class, its splits that are 'train', those that are 'val': the test set
    "cifar10": (datasets.CIFAR10, [True], [False]),
    "cifar100": (datasets.CIFAR100, [True], [False]),
    "stl10": (datasets.STL10, ["train"], ["test"]),
    "flowers102": (datasets.Flowers102, ["train", "val"], ["test"]),
    "food101": (datasets.Food101, ["train"], ["test"]),
    "pets": (datasets.OxfordIIITPet, ["trainval"], ["test"]),
}


def open_for_training(config, here):
    """Open train and val (or None) of a run, decoded no larger than needed, cached if wanted."""
    names = ("data", "classes", "data_root", "download", "img_size")
    splits = open_splits(*(getattr(config, name) for name in names))
    size, n = config.batch_size, len(splits[0])
    if size % here.world:
        fix = size + -size % here.world
        raise UsageError(f"batch_size={size} does not divide among {here.world} ranks: take {fix}")
    if size > n:
        raise UsageError(f"batch_size={size} exceeds the {n} images of {config.data}: lower it")
    splits = [images and limit_decode(images, config) for images in splits]
    if config.cache == "ram":
        return [images and cache_in_ram(images, config.data, config.workers) for images in splits]
    return splits


def open_splits(data, classes="", root="data", download=False, img_size=64):
    """Open Images 'train' and 'val' (None if there is none). UsageError if their classes differ."""
    given = classes, root, download, img_size
    train, val = (open_images(data, split, *given) for split in ("train", "val"))
    if val and val.classes != train.classes:
        n = f"train has {len(train.classes)} classes, val {len(val.classes)}"
        differ = ", ".join(sorted(set(val.classes) ^ set(train.classes))[:3])
        fix = "choose common ones with --classes"
        raise UsageError(f"data={data}: {n}, and they differ in {differ}; {fix}")
    for split, images in (("train", train), ("val", val)):
        if images is not None and len(images) == 0:
            raise UsageError(f"data={data}: its {split} split holds no images; fetch it again")
    return train, val


def labeled_splits(data, classes="", root="data", download=False, img_size=64):
    """Open both splits for an evaluation. UsageError unless both exist and have labels."""
    train, val = open_splits(data, classes, root, download, img_size)
    if val is None or train.labels.min() < 0:
        raise UsageError(f"data={data}: an evaluation needs labels, train/CLASS and val/CLASS")
    return train, val


def open_images(data, split, classes="", root="data", download=False, img_size=64):
    """Open Images of the 'train' or 'val' split. None if a folder has no such split.

    data: 'shapes', a name of TORCHVISION, or a folder: `train/CLASS/**` with or without
    `val/CLASS/**`; the unpacked archive of CUB-200-2011; else any tree of images, without labels,
    all of it 'train'. classes: a file with one class folder a line. root, download: torchvision's.
    """
    folder = Path(data)
    built_in = ("shapes", *TORCHVISION)
    if classes and data in built_in:
        raise UsageError(f"classes={classes}: {data} has none to choose from; remove --classes")
    if data == "shapes":
        return shapes(split, img_size)
    if data in TORCHVISION:
        return _torchvision_images(data, split, root, download)
    if not folder.is_dir():
        fix = f"give a folder of images, or one of {', '.join(built_in)}"
        raise UsageError(f"data={data}: no such folder{did_you_mean(data, built_in)}; {fix}")
    if (folder / "train").is_dir():
        return _labeled_folder(folder / split, classes) if (folder / split).is_dir() else None
    if classes:
        raise UsageError(f"classes={classes}: {data} has no train/CLASS folders to choose from")
    if (folder / "images.txt").exists():
        return _cub_archive(folder, split)
    if split != "train":
        return None
    paths, _ = _find_images(folder, [""])
    return file_images(sorted(paths), [-1] * len(paths), [])


def _torchvision_images(name, split, root, download):
    make, *splits = TORCHVISION[name]
    try:
        if download and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            for piece in splits[0] + splits[1]:
                make(root, piece, download=True)
        if dist.is_initialized():
            dist.barrier()  # one rank of each machine downloads, the others wait for it
        pieces = [make(root, piece) for piece in splits[split != "train"]]
    except ImportError as error:
        raise UsageError(f"data={name}: torchvision needs: pip install {error.name}") from None
    except Exception as error:  # anything, where an archive is damaged
        why = f"not in {root}/, or damaged ({reason(error)})"
        fix = "--download=True fetches it, --data_root=... is where it lies"
        raise UsageError(f"data={name}: {why}; {fix}") from None
    first = pieces[0]
    if hasattr(first, "data"):  # STL10 (N, 3, H, W) or CIFAR (N, H, W, 3)
        pixels = torch.from_numpy(first.data)
        pixels = pixels if name == "stl10" else pixels.permute(0, 3, 1, 2)
        labels = first.labels if name == "stl10" else first.targets
        return memory_images(pixels, labels, first.classes, name)
    paths, labels = [], []
    for piece in pieces:  # no public attribute gives paths and labels without decoding
        paths += map(str, piece._images if hasattr(piece, "_images") else piece._image_files)
        labels += piece._labels
    if any(not 0 <= label < len(first.classes) for label in labels):
        raise UsageError(f"data={name}: labels outside of its classes; fetch {name} again")
    return file_images(paths, labels, first.classes, f"fetch {name} again")


def _find_images(folder, classes):
    """Return paths and labels of the images in folder/CLASS/**. Class "" is the folder itself."""
    labels = {name: i for i, name in enumerate(classes)}
    samples = datasets.folder.make_dataset(str(folder), labels, EXTENSIONS, allow_empty=True)
    paths, found = zip(*samples) if samples else ([], [])
    there = set(found)
    for name in classes:
        if labels[name] not in there:
            why = f"class folder {name} holds no images" if name else "no images in it"
            raise UsageError(f"{folder}: {why} ({' '.join(EXTENSIONS)}); add some or remove it")
    return paths, found


def _labeled_folder(folder, class_file):
    there = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    classes = sorted(read_classes(class_file)) if class_file else there
    missing = [name for name in classes if name not in there]
    if missing:
        why = f"{len(missing)} of the {len(classes)} classes of {class_file} are not there"
        raise UsageError(f"{folder}: {why}, such as {missing[0]}; fix the list or the folder")
    if not classes:
        fix = f"sort its images into {folder}/CLASS/, or give the folder itself as --data"
        raise UsageError(f"{folder}: holds no class folders; {fix}")
    return file_images(*_find_images(folder, classes), classes)


def _cub_archive(folder, split):
    """Open CUB-200-2011: images.txt (id, path), image_class_labels.txt, train_test_split.txt."""
    again = "unpack the archive again"
    try:
        names = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
        tables = [np.loadtxt(folder / name, str, None, ndmin=2).T for name in names]
        (ids, paths), (label_ids, labels), (split_ids, is_train) = tables
        labels = labels.astype(int)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: {reason(error)}; {again}") from None
    fit = np.array_equal(ids, label_ids) and np.array_equal(ids, split_ids)
    if not fit or not set(is_train) <= {"0", "1"}:
        raise UsageError(f"{folder}: the ids of its three lists do not fit together; {again}")
    check_inside(paths, folder / "images.txt")
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    classes = [os.path.dirname(path) for path in paths[first]]
    chosen = is_train == ("1" if split == "train" else "0")
    files = [str(folder / "images" / path) for path in paths[chosen]]
    return file_images(files, labels[chosen], classes, again)


def check_inside(names, listed):
    """Raise UsageError if a name from the list `listed` leads out of the folder it is meant for."""
    for name in names:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UsageError(f"{listed}: {name} leads out of its folder; unpack the archive again")


def _read_lines(path, option):
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"{option}={path}: {why}; give a list, one name a line") from None
    return [line for line in lines if line.strip() and not line.startswith("#")]


def read_classes(path):
    """Read a class list: one folder name a line; after a blank, and in # lines, are comments."""
    shipped = Path(__file__).parents[1] / path  # as configs name theirs, wherever one starts them
    lines = _read_lines(path if os.path.exists(path) else shipped, "classes")
    names = [line.split()[0] for line in lines]
    if not names or len(set(names)) < len(names):
        why = "a class is listed twice" if names else "lists no class"
        raise UsageError(f"classes={path}: {why}; one folder name a line")
    return names


def hold_out(labels, share, seed):
    """Split labels (N,): indices to fit on, and about `share` of them, at least one, held out.

    Each class is held out in its proportion.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(labels))
    order = order[np.argsort(labels.numpy()[order], kind="stable")]  # by class, shuffled within
    n = max(1, round(share * len(labels)))
    held = order[((np.arange(n) + 0.5) * len(labels) / n).astype(int)]  # evenly spaced
    return np.setdiff1d(order, held), np.sort(held)


def stratified_share(labels, share, seed):
    """Return indices of a random `share` of each class, at least one image, for labels (N,)."""
    rng = np.random.default_rng([seed, 2])
    chosen = []
    for label in labels.unique().numpy():
        members = np.flatnonzero(labels.numpy() == label)
        chosen.append(rng.permutation(members)[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def indices_in_list(images, path):
    """Return indices of the images that a list names, as n01440764_10043.JPEG (SimCLR's subsets).

    Lines of classes that the data do not have are ignored. UsageError if another is missing.
    """
    names = {line.strip() for line in _read_lines(path, "subset_list")}
    index = {os.path.basename(images.name(i)): i for i in range(len(images))}
    wanted = sorted(name for name in names if name.rsplit("_", 1)[0] in images.classes)
    missing = [name for name in wanted if name not in index]
    if missing or not wanted:
        why = f"none of its lines is of a class of the data, such as {images.classes[0]}"
        if missing:
            why = f"{len(missing)} of its images are not in the data, such as {missing[0]}"
        raise UsageError(f"subset_list={path}: {why}; without a list a stratified share is taken")
    return np.array(sorted(index[name] for name in wanted))


# ------------------------------------------------------------------------------ batches


class Batch(NamedTuple):
    """A rank's share of a global batch, B samples."""

    global_crops: torch.Tensor  # uint8 (B, 2, 3, G, G)
    local_crops: torch.Tensor  # uint8 (B, L, 3, l, l)
    seeds: torch.Tensor  # (B,) int64, sample seeds
    labels: torch.Tensor  # (B,) int64
    broken: list  # [(name, reason)] of files that could not be read


@dataclass
class Schedule:
    """The batches of steps start .. stop-1, lists of (epoch, index): a rank's share of each.

    An epoch is a permutation that depends on (seed, epoch) alone; its t-th step takes the t-th
    batch_size images, rank r the r-th part of them. The incomplete batch at the end is left out.
    """

    n: int  # images
    batch_size: int  # of all ranks
    seed: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        share = self.batch_size // self.world
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, self.n // self.batch_size)
            if batch == 0 or step == self.start:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.n).tolist()
            first = batch * self.batch_size + self.rank * share
            yield [(epoch, i) for i in order[first : first + share]]


@dataclass
class _Samples:
    """What workers run. The next image that can be read takes the place of a broken file."""

    images: Images
    seed: int
    crops: Callable  # (image, sample seed) -> tuple of uint8 tensors

    def __getitem__(self, item):
        epoch, index = item
        seed = sample_seeds(self.seed, epoch, index)
        broken = []
        for i in chain(range(index, len(self.images)), range(index)):
            image = read_or_reason(self.images.read, i)
            if not isinstance(image, str):
                return (*self.crops(image, seed), seed, self.images.labels[i], broken)
            broken.append((self.images.name(i), image))
        raise UsageError(f"{broken[0][0]}: broken, as is every other image of the data set")


def _collate(samples):
    *columns, broken = zip(*samples)
    batch = [*map(torch.stack, columns), list(chain(*broken))]
    return Batch._make(batch) if len(batch) == len(Batch._fields) else batch


def _loader(samples, batches, workers, here):
    return torch.utils.data.DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=here.device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_outlast_signals,
    )


def _outlast_signals(_):
    """Let only the parent end a worker: after Ctrl-C or SIGTERM to all, a step still needs it."""

    def obey_the_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_the_parent, daemon=True).start()


def _views(config):
    names = ("local_size", "local_crops", "global_scale", "local_scale")
    sizes = {name: getattr(config, name) for name in names}
    return partial(crop_views, global_size=config.img_size, **sizes)


def train_loader(images, config, start, stop, here):
    """Yield a Batch for each of the steps start .. stop-1, all epochs, with the same workers."""
    size, seed = config.batch_size, config.seed
    steps = Schedule(len(images), size, seed, start, stop, here.rank, here.world)
    return _loader(_Samples(images, seed, _views(config)), steps, config.workers, here)


def first_batch(images, config, n):
    """Return the Batch of the run's first n samples; before it 6 whole images (6, 3, G, G)."""
    [first] = Schedule(len(images), config.batch_size, config.seed, 0, 1)
    center = partial(_crop, size=config.img_size)
    samples = _Samples(images, config.seed, center)
    whole = _collate([samples[item] for item in first[: min(n, 6)]])
    samples = _Samples(images, config.seed, _views(config))
    return whole[0], _collate([samples[item] for item in first[:n]])


def part_size(n, limit):
    """Return the largest divisor of n that is at most `limit`."""
    return max(size for size in range(1, min(n, limit) + 1) if n % size == 0)


def split_batch(batch, limit):
    """Split a Batch into equal parts of at most `limit` samples each, to accumulate gradients."""
    size = part_size(len(batch.seeds), limit)
    parts = zip(*(column.split(size) for column in batch[:4]))
    return [Batch(*part, []) for part in parts]


def _crop(image, seed, size, scale=None):
    if scale is None:
        return (center_crop(image, size),)
    return (random_crops(image, fork(seed, "global_crops"), 1, size, scale)[0],)


def crop_loader(images, size, scale, steps, workers, here):
    """Yield batches of one random crop of each image, for a Schedule's steps.

    A batch: crops uint8 (B, 3, size, size), seeds (B,), labels (B,), broken [(name, reason)].
    """
    crops = partial(_crop, size=size, scale=scale)
    return _loader(_Samples(images, steps.seed, crops), steps, workers, here)


def eval_loader(images, size, batch_size, workers, here, seed=0, epoch=0, scale=None):
    """Yield every world-th image from this rank's on, in order, in batches as crop_loader's.

    Center crops, or with `scale` the epoch's random ones.
    """
    mine = [(epoch, i) for i in range(here.rank, len(images), here.world)]
    batches = [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]
    crops = partial(_crop, size=size, scale=scale)
    return _loader(_Samples(images, seed, crops), batches, workers, here)
