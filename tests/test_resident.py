"""Small images on the device: the pixels of the file path, for any batch, thread and device."""

import os
from collections import namedtuple
from dataclasses import replace
from functools import partial

from lib import data, resident
from lib.config import Config, UsageError
from lib.images import subset
from lib.rng import fork, sample_seeds
from lib.shapes import shapes

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import CPU, HERE, TINY, tiny_config
from torchvision.transforms.v2 import RandomErasing

import augment
import train

SEEDS = sample_seeds(7, torch.arange(40))


def random_images(n, H, W):
    generator = torch.Generator().manual_seed(H * W)
    images = torch.randint(0, 256, (n, 3, H, W), generator=generator)
    images[: n // 2] = 255 * (images[: n // 2] > 127)  # the cubic overshoots at such edges
    return images.to(torch.uint8)


@pytest.mark.parametrize(
    "H, W, size, scale",
    [
        (32, 32, 32, (0.4, 1.0)),
        (32, 32, 16, (0.05, 0.4)),
        (64, 64, 48, (0.4, 1.0)),
        (64, 64, 32, (0.05, 0.4)),
        (64, 64, 28, (0.9, 1.0)),
        (96, 96, 32, (0.9, 1.0)),
        (48, 96, 64, (0.2, 1.0)),
        (7, 5, 16, (0.1, 1.0)),
    ],
)
def test_crops_are_those_of_the_file_path(H, W, size, scale):
    images = random_images(40, H, W)
    crops = resident.random_crops(images, SEEDS, 3, size, scale)
    assert crops.shape == (40, 3, 3, size, size) and crops.dtype == torch.uint8
    for image, seed, found in zip(images, SEEDS, crops):
        assert torch.equal(found, augment.random_crops(image, seed, 3, size, scale))


@pytest.mark.parametrize("H, W, size", [(96, 96, 20), (128, 64, 16), (128, 128, 17)])
def test_beyond_a_quarter_few_pixels_differ_by_one_level(H, W, size):
    images = random_images(40, H, W)
    crops = resident.random_crops(images, SEEDS, 2, size, (0.9, 1.0))
    files = [augment.random_crops(*pair, 2, size, (0.9, 1.0)) for pair in zip(images, SEEDS)]
    difference = (crops.int() - torch.stack(files).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02


def test_one_crop_is_torchs_antialiased_bicubic():
    """Without augment.py: a box that shrinks in one direction and grows in the other."""
    images = 64 + random_images(6, 40, 60) // 2  # nothing overshoots 0 .. 255
    down, across = (
        resident.resize_weights(torch.tensor([start]), torch.tensor([length]), n_in, 24, length)
        for start, length, n_in in ((3, 35, 40), (10, 20, 60))
    )
    weights = [matrix.expand(6, 1, -1, -1) for matrix in (down, across)]
    found = resident._products(images, *weights)[:, 0].float()
    part = images[:, :, 3:38, 10:30]
    exact = F.interpolate(part.double(), size=(24, 24), mode="bicubic", antialias=True)
    assert (found - exact).abs().max() <= 1.5  # two roundings
    resized = F.interpolate(part, size=(24, 24), mode="bicubic", antialias=True)
    assert torch.equal(found, resized.float())


@pytest.mark.parametrize("H, W, size", [(32, 32, 32), (64, 64, 48), (40, 60, 32), (20, 30, 64)])
def test_center_crops_are_those_of_the_file_path(H, W, size):
    images = random_images(10, H, W)
    expected = torch.stack([augment.center_crop(image, size) for image in images])
    assert torch.equal(resident.center_crop(images, size), expected)


def test_sums_are_exact_so_no_batch_or_thread_changes_a_pixel(monkeypatch):
    """Products in fp64 are the same; as are a batch in pieces and other numbers of threads."""
    images = random_images(40, 64, 64)
    cut = partial(resident.random_crops, n=4, size=24, scale=(0.05, 1.0))
    expected = cut(images, SEEDS)
    in_pieces = torch.cat([cut(*pair) for pair in zip(images.split(7), SEEDS.split(7))])
    assert torch.equal(in_pieces, expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(cut(images, SEEDS), expected)
    torch.set_num_threads(threads)
    rounded = []
    monkeypatch.setattr(resident, "CPU_CHUNK", 1 << 30)
    monkeypatch.setattr(resident, "_round", lambda x, weight: rounded.append(x.clone()) or x)
    boxes = augment.crop_boxes(64, 64, SEEDS, 1, (0.05, 1.0))
    start, length = boxes[..., 1], boxes[..., 3]
    weights = resident.resize_weights(start, length, 64, 24, 64)
    resident._products(images, weights, weights)
    columns = images.permute(0, 3, 1, 2).double().flatten(2) - 128
    assert torch.equal(rounded[0].double(), weights[:, 0].double() @ columns)


@pytest.mark.parametrize("local_crops", [0, 4])
def test_crop_transforms_are_those_of_the_file_path(local_crops, monkeypatch):
    """Resident or not, with loading processes or without: the same crops, all changed."""
    images = shapes("train", 32, 60)
    config = tiny_config(local_crops=local_crops)
    off = replace(images, pixels=None)
    plain = next(iter(data.train_loader(images, config, 2, 3, HERE)))
    erased = augment.RECIPES["caug"]._replace(crop_transform=RandomErasing(p=1.0))
    monkeypatch.setitem(augment.RECIPES, "caug", erased)
    batches = []
    for some, workers in ((images, 0), (off, 0), (off, 1)):
        config = tiny_config(local_crops=local_crops, workers=workers)
        batches.append(next(iter(data.train_loader(some, config, 2, 3, HERE))))
    for batch in batches:
        assert all(torch.equal(a, b) for a, b in zip(batch[:4], batches[0][:4]))
    for crops, before in zip(batches[0][:2], plain[:2]):
        assert crops.shape == before.shape
        assert (crops != before).flatten(2).any(-1).all()
    assert torch.equal(batches[0].seeds, plain.seeds)


@pytest.mark.parametrize("local_crops", [0, 4])
def test_a_batch_is_that_of_the_file_path(local_crops):
    images = shapes("train", 32, 60)
    config = tiny_config(local_crops=local_crops)
    off = replace(images, pixels=None)
    pairs = zip(*(data.train_loader(some, config, 2, 5, HERE) for some in (images, off)))
    for ours, files in pairs:
        assert type(ours) is type(files) is data.Batch
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], files[:4])) and ours.broken == []
    whole = [data.first_batch(some, config, 5, HERE)[0] for some in (images, off)]
    assert torch.equal(*whole)
    for scale in (None, (0.2, 1.0)):
        loaders = [data.eval_loader(some, 32, 25, 0, HERE, 3, 1, scale) for some in (images, off)]
        for ours, files in zip(*loaders):
            assert all(torch.equal(a, b) for a, b in zip(ours[:3], files[:3]))


@pytest.mark.slow
def test_a_run_is_that_of_the_file_path(folder, tmp_path):
    """Weights and log, with loading processes or without any: cache changes no number."""
    from test_train import assert_same, logged, state

    for cache, workers in (("auto", 2), ("off", 1), ("ram", 0)):
        options = dict(TINY, data=folder, out_dir=tmp_path / cache, cache=cache, workers=workers)
        train.main([f"--{name}={value}" for name, value in options.items()])
    for cache in ("off", "ram"):
        assert_same(state(tmp_path / "auto")["student"], state(tmp_path / cache)["student"])
        assert logged(tmp_path / "auto") == logged(tmp_path / cache)


# --- which data sets --------------------------------------------------------------------------


def opened(root, **options):
    return data.open_for_training(tiny_config(data=str(root), batch_size=4, **options), HERE)


def write(root, sizes):
    root.mkdir(exist_ok=True)
    for i, (H, W) in enumerate(sizes):
        torchvision.io.write_png(random_images(1, H, W)[0], str(root / f"{i}.png"))
    return root


def test_a_folder_of_one_size_is_decoded_once(folder):
    train_set, val_set = opened(folder)
    files = data.open_splits(str(folder))
    for images, on_disk in zip((train_set, val_set), files):
        assert images.pixels.shape == (len(on_disk), 3, 32, 32)
        assert all(torch.equal(images.pixels[i], on_disk.read(i)) for i in range(len(on_disk)))
        assert torch.equal(images.labels, on_disk.labels)
    some = subset(train_set, [5, 3])
    assert torch.equal(some.pixels, train_set.pixels[[5, 3]])
    assert opened(folder, cache="off")[0].pixels is None
    ram = opened(folder, cache="ram")[0]
    assert ram.pixels is None and ram.read(0) is ram.read(0)


def test_others_stay_files(tmp_path, monkeypatch, capsys):
    other = [(8, 8)] * 70 + [(8, 9)]
    assert opened(write(tmp_path / "two sizes", other[::-1]))[0].pixels is None
    assert capsys.readouterr().out == ""
    # not in the sample of 64: noticed while decoding, and said
    assert opened(write(tmp_path / "one of another size", other[:-2] + other[-1:] * 2)) is not None
    assert opened(write(tmp_path / "large", [(129, 128)] * 4))[0].pixels is None
    broken = write(tmp_path / "broken", [(8, 8)] * 200)
    (broken / "13.png").write_bytes(b"no image")
    images, _ = opened(broken)
    assert images.pixels is None
    said = capsys.readouterr().out
    assert "13.png is broken" in said and "from its files" in said
    assert opened(write(tmp_path / "fits", [(8, 8)] * 9))[0].pixels is not None
    monkeypatch.setattr(resident, "free_memory", lambda device: 9 * 3 * 64 * 3.9)
    assert opened(tmp_path / "fits")[0].pixels is None


def test_workers_are_this_ranks_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    for ranks, workers in ((1, 15), (4, 3), (8, 1), (16, 0), (32, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert data.loading_workers(None) == workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert data.loading_workers(None) == 16
    assert data.loading_workers(3) == 3 and Config().workers is None


def test_too_small_a_dev_shm_is_named_at_the_start(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    # a batch: 4 images of 2 x 32 and 2 x 16 pixels, in three colors
    batch = 4 * 3 * (2 * 32**2 + 2 * 16**2)
    for free, fits in ((batch * 3 * 2, True), (batch * 3 * 2 - 1, False)):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        if fits:
            opened(folder, cache="off", workers=2)
            continue
        with pytest.raises(UsageError, match=r"/dev/shm has .* --ipc=host, or --workers=1$"):
            opened(folder, cache="off", workers=2)
        opened(folder, workers=2)  # no worker is at work
        opened(folder, cache="off", workers=0)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_crops():
    images = random_images(40, 64, 64)
    seeds = fork(SEEDS, "global_crops")
    for function in (
        lambda x: resident.random_crops(x, seeds, 4, 32, (0.05, 1.0)),
        lambda x: resident.center_crop(x, 48),
    ):
        assert torch.equal(function(images), function(images.cuda()).to(CPU))
