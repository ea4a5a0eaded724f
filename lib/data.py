"""Images -> batches: the splits of a run, which image is in which batch, the loaders.

A batch is a function of the step, so a run can be continued. Small images of one size live on the
device (lib/resident.py); others are read and cropped by loading processes.
"""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

from lib import resident
from lib.config import UsageError
from lib.images import Images, cache_in_ram, limit_decode, read_or_reason
from lib.pixels import transform_each
from lib.processor import local_ranks, to_device, view_stream
from lib.resident import place
from lib.rng import fork, sample_seeds
from lib.sources import open_images

import numpy as np
import torch

import augment

PREFETCH = 2  # batches that each worker has ready


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
    threads = max(1, loading_workers(config.workers))
    if config.cache == "auto":
        splits = [images and place(images, config.data, here, threads) for images in splits]
    else:
        splits = [images and replace(images, pixels=None) for images in splits]
    if config.cache == "ram":
        splits = [images and cache_in_ram(images, config.data, here, threads) for images in splits]
    if splits[0].pixels is None:
        check_shared_memory(config, here)
    return splits


def loading_workers(wanted):
    """Return how many processes load for this rank; None: its share of the cores, less its own."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, max(0, cores // local_ranks() - 1))


def check_shared_memory(config, here):
    """UsageError if the batches that wait in /dev/shm may not fit: a worker would die of it."""
    workers = loading_workers(config.workers)
    if workers == 0 or not os.path.isdir("/dev/shm"):
        return
    pixels = 2 * config.img_size**2 + config.local_crops * config.local_size**2
    batch = config.batch_size // here.world * 3 * pixels  # bytes
    # a worker holds PREFETCH ready ones and the one it makes
    needed = batch * (PREFETCH + 1) * workers * local_ranks()
    free = shutil.disk_usage("/dev/shm").free
    if needed > free:
        sizes = f"{needed / 1e9:.2f} GB of batches, /dev/shm has {free / 1e9:.2f} GB free"
        fewer = int(workers * free / needed)
        fix = f"docker run --ipc=host, or --workers={fewer}"
        raise UsageError(f"workers={workers}: they hold up to {sizes}; {fix}")


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
        if images is not None and len(images) < 2:
            n = f"its {split} split holds {len(images)} images, two are needed"
            raise UsageError(f"data={data}: {n}; add some, or fetch it again")
    return train, val


def labeled_splits(data, classes="", root="data", download=False, img_size=64):
    """Open both splits for an evaluation. UsageError unless both exist and have labels."""
    train, val = open_splits(data, classes, root, download, img_size)
    if val is None or train.labels.min() < 0:
        raise UsageError(f"data={data}: an evaluation needs labels, train/CLASS and val/CLASS")
    return train, val


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
    """What makes a batch of a list of (epoch, index), for loading processes or resident images."""

    images: Images
    seed: int
    crops: Callable  # crop_views or one_crop of (an image, its seed) or (images, seeds)
    device: torch.device
    stream: object = None  # CUDA stream to crop resident images in

    def __getitems__(self, items):
        epochs, index = torch.tensor(items).T
        seeds = sample_seeds(self.seed, epochs, index)
        pixels = self.images.pixels
        if pixels is None:
            return self.from_files(index.tolist(), seeds)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            rows = pixels[to_device(pixels.device, index)].to(self.device)
            crops = self.crops(rows, seeds)
        return [*crops, seeds, self.images.labels[index], []]

    def from_files(self, indices, seeds):
        """Read and crop image by image. The next good image takes the place of a broken file."""
        rows, broken = [], []
        for index, seed in zip(indices, seeds):
            for i in chain(range(index, len(self.images)), range(index)):
                image = read_or_reason(self.images.read, i)
                if not isinstance(image, str):
                    break
                broken.append((self.images.name(i), image))
            else:
                name = self.images.name(index)
                raise UsageError(f"{name}: broken, as is every other image of the data set")
            rows.append((*self.crops(image, seed), seed, self.images.labels[i]))
        return [*map(torch.stack, zip(*rows)), broken]


def _loader(samples, batches, workers, here, collate=tuple):
    is_resident = samples.images.pixels is not None
    workers = 0 if is_resident else loading_workers(workers)
    return torch.utils.data.DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=here.device.type == "cuda" and not is_resident,
        prefetch_factor=PREFETCH if workers else None,
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


class BrokenFiles:
    """Report each broken file once; stop the run if more than 1 % of the n images are broken."""

    def __init__(self, n):
        self.n = round(n)
        self.seen = set()

    def report(self, broken, say):
        for name, why in broken:
            if name not in self.seen:
                self.seen.add(name)
                say(f"skipped broken image {name}: {why} ({len(self.seen)} so far)")
        if len(self.seen) > 0.01 * self.n:  # the data set is wrong, not one file
            why = f"{len(self.seen)} of {self.n} images are broken, more than 1%"
            raise UsageError(f"{why}, such as {min(self.seen)}; fix or remove them")


def crop_views(images, seeds, config):
    """Cut the random crops of an image uint8 (3, H, W), seed (), or of a batch (B, 3, H, W), (B,).

    Returns uint8 (..., 2, 3, G, G) and uint8 (..., L, 3, l, l), the recipe's crop_transform done.
    """
    cut = augment.random_crops if images.ndim == 3 else resident.random_crops
    transform = augment.RECIPES[config.recipe].crop_transform
    kinds = {
        "global_crops": (2, config.img_size, config.global_scale),
        "local_crops": (config.local_crops, config.local_size, config.local_scale),
    }
    views = []
    for kind, (stream, (n, size, scale)) in enumerate(kinds.items()):
        crops = cut(images, fork(seeds, stream), n, size, scale)
        if transform:
            of_crops = fork(seeds[..., None], "crop_transform", kind, torch.arange(n))
            crops = transform_each(transform, crops, of_crops)
        views.append(crops)
    return views


def one_crop(images, seeds, size, scale=None):
    """Cut one crop of each image, as crop_views: the center, or with `scale` a random one."""
    cutter = augment if images.ndim == 3 else resident
    if scale is None:
        return [cutter.center_crop(images, size)]
    return [cutter.random_crops(images, fork(seeds, "global_crops"), 1, size, scale).squeeze(-4)]


def _view_samples(images, config, here):
    crops = partial(crop_views, config=config)
    # of resident images only: a loading process may get a copy of this, and a stream has none
    stream = None if images.pixels is None else view_stream(here.device)
    return _Samples(images, config.seed, crops, here.device, stream)


def train_loader(images, config, start, stop, here):
    """Yield a Batch for each of the steps start .. stop-1, all epochs, with the same workers."""
    ranks = here.rank, here.world
    steps = Schedule(len(images), config.batch_size, config.seed, start, stop, *ranks)
    return _loader(_view_samples(images, config, here), steps, config.workers, here, Batch._make)


def first_batch(images, config, n, here):
    """Return the Batch of the run's first n samples; before it 6 whole images (6, 3, G, G)."""
    [first] = Schedule(len(images), config.batch_size, config.seed, 0, 1)
    whole = _Samples(images, config.seed, partial(one_crop, size=config.img_size), here.device)
    views = _view_samples(images, config, here)
    return whole.__getitems__(first[: min(n, 6)])[0].cpu(), Batch(*views.__getitems__(first[:n]))


def part_size(n, limit):
    """Return the largest divisor of n that is at most `limit`."""
    return max(size for size in range(1, min(n, limit) + 1) if n % size == 0)


def split_batch(batch, limit):
    """Split a Batch into equal parts of at most `limit` samples each, to accumulate gradients."""
    size = part_size(len(batch.seeds), limit)
    parts = zip(*(column.split(size) for column in batch[:4]))
    return [Batch(*part, []) for part in parts]


def crop_loader(images, size, scale, steps, workers, here):
    """Yield batches of one random crop of each image, for a Schedule's steps.

    A batch: crops uint8 (B, 3, size, size), seeds (B,), labels (B,), broken [(name, reason)].
    """
    crops = partial(one_crop, size=size, scale=scale)
    return _loader(_Samples(images, steps.seed, crops, here.device), steps, workers, here)


def eval_loader(images, size, batch_size, workers, here, seed=0, epoch=0, scale=None):
    """Yield every world-th image from this rank's on, in order, in batches as crop_loader's.

    Center crops, or with `scale` the epoch's random ones.
    """
    mine = [(epoch, i) for i in range(here.rank, len(images), here.world)]
    batches = [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]
    crops = partial(one_crop, size=size, scale=scale)
    return _loader(_Samples(images, seed, crops, here.device), batches, workers, here)
