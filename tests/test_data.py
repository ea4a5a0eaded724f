"""Images from everywhere, broken ones included; the schedule of batches."""

import os
import pickle
import zipfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

import lib.images
from lib import data, sources
from lib.config import UsageError
from lib.images import UNREADABLE, cache_in_ram, decode, free_memory, limit_decode, subset
from lib.rng import sample_seeds
from lib.shapes import SHAPES, moving_shapes, shape_masks, shapes

import numpy as np
import pytest
import torch
import torchvision
from conftest import HERE, ROOT, SHARED, tiny_config
from PIL import Image

from augment import center_crop, random_crops


def color(path, pixel=(0, 0)):
    return decode(str(path))[:, pixel[1], pixel[0]].tolist()


@pytest.mark.parametrize(
    "mode, suffix, value, expected",
    [
        ("RGB", "png", (200, 100, 50), [200, 100, 50]),
        ("RGB", "bmp", (200, 100, 50), [200, 100, 50]),
        ("RGB", "gif", (200, 100, 50), [200, 100, 50]),
        ("RGB", "webp", (200, 100, 50), [200, 100, 50]),
        ("RGB", "tif", (200, 100, 50), [200, 100, 50]),
        ("RGB", "jpg", (200, 100, 50), [200, 100, 50]),
        ("L", "png", 77, [77] * 3),
        ("L", "jpg", 77, [77] * 3),
        ("1", "png", 1, [255] * 3),
        ("RGBA", "png", (200, 100, 50, 128), [200, 100, 50]),
        ("LA", "png", (77, 10), [77] * 3),
        ("CMYK", "jpg", (255, 0, 0, 0), [0, 255, 255]),
        ("CMYK", "tif", (255, 0, 0, 0), [0, 255, 255]),
        ("I;16", "png", 128 * 257, [128] * 3),
        ("I;16", "tif", 128 * 257, [128] * 3),
        ("I;16", "tif", 257, [1] * 3),
        ("F", "tif", 0.5, [128] * 3),
        ("I", "tif", 128 * 257, [128] * 3),
        ("P", "png", 5, [10, 20, 30]),
        ("P", "gif", 5, [10, 20, 30]),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix, value, expected):
    image = Image.new(mode, (9, 6), value)
    if mode == "P":
        image.putpalette([0] * 15 + [10, 20, 30])
    path = tmp_path / f"x.{suffix}"
    options = {}
    if suffix == "webp":
        options["lossless"] = True
    if mode == "P" and suffix == "png":
        options["transparency"] = 0
    image.save(path, **options)
    decoded = decode(str(path))
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, 6, 9)
    assert np.abs(np.array(color(path, (4, 3))) - expected).max() <= (8 if suffix == "jpg" else 1)


def test_exif_rotation_and_animation(tmp_path):
    image = Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "rotated.jpg", exif=exif)
    assert decode(str(tmp_path / "rotated.jpg")).shape == (3, 40, 20)
    frames = [Image.new("RGB", (8, 8), c) for c in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert color(tmp_path / "moving.gif")[0] > 240
    first = decode(str(tmp_path / "moving.gif"))
    assert first.untyped_storage().nbytes() == first.numel()  # no other frame stays in memory


def test_a_dark_image_of_16_bits_stays_dark(tmp_path):
    values = np.arange(200, dtype=np.uint16).reshape(10, 20)
    (tmp_path / "dark.pgm").write_bytes(b"P5 20 10 65535\n" + values.byteswap().tobytes())
    assert decode(str(tmp_path / "dark.pgm")).max() <= 1


def photo(H, W, seed=0):
    """Return noise uint8 (3, H, W), its long waves the strongest, as in a photograph."""
    rng = torch.Generator().manual_seed(seed)
    octaves = []
    for k in (2, 4, 8, 16, 32):
        coarse = torch.rand(1, 3, H // k, W // k, generator=rng) - 0.5
        wave = torch.nn.functional.interpolate(coarse, size=(H, W), mode="bicubic")[0]
        octaves.append(wave * k)
    return (128 + 4 * sum(octaves)).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    "side, enough, expected",
    [
        (400, 201, 400),
        (400, 200, 200),
        (400, 100, 100),
        (400, 60, 100),
        (400, 20, 50),
        (400, 0, 400),
    ],
)
def test_a_large_jpeg_is_decoded_no_larger_than_needed(tmp_path, side, enough, expected):
    picture = Image.fromarray(photo(side, 600).permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "rotated.jpg", "gray.jpg", "a.png"):
        options = dict(exif=exif) if name == "rotated.jpg" else {}
        image = picture.convert("L") if name == "gray.jpg" else picture
        image.save(tmp_path / name, **options)
        whole = decode(str(tmp_path / name))
        found = decode(str(tmp_path / name), enough)
        short = expected if name.endswith("jpg") else side
        sides = (short, 600 * short // 400)
        assert found.shape == (3, *(sides[::-1] if name == "rotated.jpg" else sides))
        by_pixels = torch.nn.functional.interpolate(
            whole[None].float(), size=found.shape[1:], mode="area"
        )[0]
        assert (by_pixels - found).abs().mean() < 2  # of 255


def test_what_pillow_refuses_to_reduce_is_decoded_whole(tmp_path, monkeypatch):
    torchvision.io.write_jpeg(photo(200, 300), str(tmp_path / "a.jpg"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a decompression bomb to Pillow
    assert decode(str(tmp_path / "a.jpg"), 50).shape == (3, 200, 300)


def test_crops_of_smaller_decoded_images_are_the_crops(tmp_path):
    for i in range(3):
        torchvision.io.write_jpeg(photo(1000, 1200, i), str(tmp_path / f"{i}.jpg"), quality=95)
    whole = sources.open_images(str(tmp_path), "train")
    crops = [(64, (0.25, 1.0)), (48, (0.1, 0.4))]
    config = tiny_config(
        img_size=64, global_scale=crops[0][1], local_size=48, local_scale=crops[1][1]
    )
    limited = limit_decode(whole, config)
    assert limited.read(0).shape == (3, 250, 300)  # 48 / sqrt(0.1 * 3 / 4) = 176 pixels are enough
    for i in range(3):
        for size, scale in crops:
            a, b = (
                random_crops(images.read(i), sample_seeds(0, i), 4, size, scale).float()
                for images in (whole, limited)
            )
            # of 255; boxes are rounded to coarser pixels
            assert (a - b).abs().mean() < 5 < 30 < (a - b.flip(0)).abs().mean()
    memory = shapes("train", 32, 10)
    assert limit_decode(memory, config) is memory
    some = subset(whole, [2, 0])
    assert limit_decode(some, config) is some
    assert limit_decode(limited, config) is limited


BROKEN = {
    "zero.jpg": b"",
    "text.jpg": b"hello",
    "cut.jpg": None,
    "noise.png": b"\x89PNG\r\n\x1a\n" + bytes(50),
}


def make_tree(root, good, broken=()):
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(good):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(
            root / f"good {i} ä.png"
        )
    for name in broken:
        if name == "cut.jpg":
            Image.fromarray(rng.integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(root / name)
            (root / name).write_bytes((root / name).read_bytes()[:300])
        elif name == "dangling.png":
            (root / name).symlink_to(root / "nowhere.png")
        else:
            (root / name).write_bytes(BROKEN[name])
    return root


@pytest.mark.parametrize("name", [*BROKEN, "dangling.png"])
def test_a_broken_file_is_named_skipped_and_counted(tmp_path, name):
    root = make_tree(tmp_path / "tree", 120, [name])
    (root / "folder.jpg").mkdir()  # a directory is no image file
    images = sources.open_images(str(root), "train")
    assert len(images) == 121
    batch = next(iter(data.train_loader(images, tiny_config(batch_size=121), 0, 1, HERE)))
    assert len(batch.global_crops) == 121
    assert [os.path.basename(path) for path, _ in batch.broken] == [name]
    said = []
    files = data.BrokenFiles(len(images))
    files.report(batch.broken, said.append)
    files.report(batch.broken, said.append)
    assert len(said) == 1 and name in said[0]


def test_cached_images_are_the_same_and_must_fit(tmp_path, monkeypatch):
    images = sources.open_images(str(make_tree(tmp_path / "tree", 12, ["zero.jpg"])), "train")
    cached = cache_in_ram(images, "tree", HERE, 2)
    (bad,) = (i for i in range(13) if "zero" in images.name(i))
    for i in set(range(13)) - {bad}:
        assert torch.equal(cached.read(i), images.read(i)) and cached.read(i) is cached.read(i)
    with pytest.raises(UNREADABLE) as error:
        cached.read(bad)
    assert cached.name(bad) == images.name(bad) and str(error.value)
    monkeypatch.setattr(lib.images, "free_memory", lambda device: 1e4)
    with pytest.raises(UsageError, match=r"needs about .* GB .*are free; remove --cache=ram"):
        cache_in_ram(images, "tree", HERE, 2)


def test_more_than_one_percent_broken_stops(tmp_path):
    images = sources.open_images(str(make_tree(tmp_path / "tree", 20, ["zero.jpg"])), "train")
    batch = next(iter(data.train_loader(images, tiny_config(batch_size=21), 0, 1, HERE)))
    message = "1 of 21 images are broken, more than 1%, such as .*zero.jpg"
    with pytest.raises(UsageError, match=message):
        data.BrokenFiles(len(images)).report(batch.broken, print)


def test_images_can_be_sent_to_workers_of_any_kind(folder, tmp_path):
    """Where processes are not forked, they get the Images pickled."""
    images = sources.open_images(str(folder), "train")
    limited = limit_decode(images, tiny_config())
    cached = cache_in_ram(subset(images, [3, 4]), "folder", HERE, 1)
    for some in (images, limited, cached, shapes("train", 32, 4)):
        again = pickle.loads(pickle.dumps(some))
        assert torch.equal(again.read(1), some.read(1)) and again.name(1) == some.name(1)
    on_a_gpu = HERE._replace(device=torch.device("cuda"))  # there is none: no stream is made
    samples = data._view_samples(images, tiny_config(), on_a_gpu)
    assert samples.stream is None and pickle.loads(pickle.dumps(samples)).seed == 0


def test_folders(folder, tmp_path):
    train, val = data.open_splits(str(folder))
    assert len(train) == 80 and len(val) == 40
    assert train.classes == val.classes == sorted(SHAPES)
    assert train.labels.bincount().tolist() == [8] * 10
    for i in range(80):
        assert f"/{train.classes[train.labels[i]]}/" in train.name(i)
    chosen = tmp_path / "list.txt"
    chosen.write_text("# two of ten\ntee a letter\nkey\n")
    some = sources.open_images(str(folder), "train", str(chosen))
    assert some.classes == ["key", "tee"] and len(some) == 16 and "key" in some.name(0)
    flat = sources.open_images(str(folder / "train" / "key"), "train")
    assert len(flat) == 8 and (flat.labels == -1).all()
    assert sources.open_images(str(folder / "train" / "key"), "val") is None
    # any tree: the class folders are just folders
    deep = sources.open_images(str(folder / "val"), "train")
    assert len(deep) == 40 and (deep.labels == -1).all() and deep.classes == []


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda t: dict(data=str(t / "nowhere")), "no such folder"),
        (lambda t: dict(data="shape"), "did you mean 'shapes'"),
        (lambda t: dict(data=str(t)), "holds no images"),
        (lambda t: (t / "train").mkdir() or dict(data=str(t)), "holds no class folders"),
        (
            lambda t: (t / "train" / "cat").mkdir(parents=True) or dict(data=str(t)),
            "holds no images",
        ),
        (lambda t: dict(data="shapes", classes="x.txt"), "shapes has no class folders"),
        (
            lambda t: (t / "c.txt").write_text("") or dict(data=str(t), classes=str(t / "c.txt")),
            "no train/CLASS folders",
        ),
        (lambda t: dict(data="cifar10", root=str(t)), "use --download=True"),
    ],
)
def test_unusable_data_is_one_line(tmp_path, make, message):
    options = make(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        sources.open_images(split="train", **options)
    assert "\n" not in str(error.value)


def test_train_and_val_must_have_the_same_classes(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "key").symlink_to(folder / "val" / "key")
    with pytest.raises(UsageError, match="train has 10 classes, val 1, and they differ in arrow"):
        data.open_splits(str(tmp_path))
    (tmp_path / "list.txt").write_text("key\n")
    train, val = data.open_splits(str(tmp_path), str(tmp_path / "list.txt"))
    assert train.classes == val.classes == ["key"]


def test_a_class_list_that_does_not_match_is_refused(folder, tmp_path):
    path = tmp_path / "list.txt"
    for content, message in (
        ("key\nzebra\n", "1 of the 2 classes .* such as zebra"),
        ("", "lists no class"),
        ("key\nkey\n", "lists a class twice"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            sources.open_images(str(folder), "train", str(path))


def test_torchvision_formats_are_read(tmp_path):
    """CIFAR-10's files are pickled batches with md5 sums: only a wrong sum can be tested here."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"not the real one")
    with pytest.raises(UsageError, match="cifar10: not in"):
        sources.open_images("cifar10", "train", root=str(tmp_path))


def test_in_memory_sets_of_torchvision(monkeypatch):
    """Without their archives: classes that hold what torchvision's would."""

    class Cifar:
        data = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
        targets = (3, 1)
        classes = ("a", "b", "c", "d")

        def __init__(self, root, train):
            assert train is True

    class Stl(Cifar):
        data = Cifar.data.transpose(0, 3, 1, 2)
        labels = np.array([3, 1], dtype=np.uint8)
        targets = None

    monkeypatch.setitem(sources.TORCHVISION, "cifar10", (Cifar, [True], [False]))
    monkeypatch.setitem(sources.TORCHVISION, "stl10", (Stl, [True], [False]))
    for name in ("cifar10", "stl10"):
        images = sources.open_images(name, "train")
        expected = torch.from_numpy(Cifar.data[1]).permute(2, 0, 1)
        assert torch.equal(images.read(1), expected) and images.classes == list("abcd")
        assert images.labels.tolist() == [3, 1] and images.labels.dtype == torch.int64
        assert images.name(1) == f"{name} image 1"


def test_in100_list_is_cmcs(tmp_path, monkeypatch):
    """A list is also found from the project's folder, wherever a run is started."""
    assert (ROOT / "configs" / "in100_classes.txt").is_file()
    monkeypatch.chdir(tmp_path)
    names = sources.read_classes("configs/in100_classes.txt")
    assert len(names) == 100 and all(name[0] == "n" and len(name) == 9 for name in names)


def test_training_data_is_checked_limited_and_cached(folder):
    config = tiny_config(data=str(folder), cache="ram")
    train, val = data.open_for_training(config, HERE)
    assert train.read(0) is train.read(0) and val.read(0) is val.read(0)
    assert (
        data.open_for_training(tiny_config(data=str(folder / "train" / "key"), batch_size=8), HERE)[
            1
        ]
        is None
    )
    for size, world, message in (
        (15, 2, "batch_size=15 does not divide among 2 ranks: take 16"),
        (800, 1, "batch_size=800 exceeds the 80 images"),
    ):
        config = tiny_config(data=str(folder), batch_size=size)
        with pytest.raises(UsageError, match=message):
            data.open_for_training(config, HERE._replace(world=world))


@pytest.mark.parametrize("n", [0, 1])
def test_a_split_needs_two_images(monkeypatch, n):
    few = replace(shapes("train", 32, 4), labels=torch.zeros(n, dtype=torch.int64))
    monkeypatch.setattr(data, "open_images", lambda *_: few)
    with pytest.raises(UsageError, match=f"its train split holds {n} images, two are needed"):
        data.open_splits("some")


def test_free_memory_counts_what_the_page_cache_would_give_back(monkeypatch):
    facts = "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    2000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: facts)
    assert free_memory(torch.device("cpu")) == 2000 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 500 * 1024


def test_shapes_are_a_function_of_seed_and_index():
    a = shapes("train", 32, 40)
    b = shapes("train", 32, 60)
    assert all(torch.equal(a.read(i), b.read(i)) for i in range(40))
    assert torch.equal(a.labels, b.labels[:40])
    assert not torch.equal(a.read(0), shapes("val", 32, 40).read(0))
    assert not torch.equal(a.read(0), shapes("train", 32, 40, seed=1).read(0))
    assert a.labels.bincount().tolist() == [4] * 10 and a.read(0).shape == (3, 32, 32)


def test_shapes_stay_what_they_are():
    """Published results depend on these pixels: their sums, but for the rounding of a machine."""
    images, masks = shape_masks("val", 32, 20)
    frames, ids = moving_shapes(3, 32, frames=4)
    train = shapes("train", 32, 40).read(torch.arange(40))
    colored = shapes("val", 16, 40, name="shapes20k").read(torch.arange(40))
    sums = [int(x.long().sum()) for x in (train, images, masks, frames, ids, colored)]
    assert sums == pytest.approx([15666059, 7482346, 3175, 1487319, 408, 3983307], rel=1e-3)


def test_cheap_attributes_go_with_the_class():
    """Light or dark is that of the class in 9 of 10 images; a class has its colors."""
    images = shapes("train", 32, 4000)
    pixels, masks = shape_masks("train", 32, 4000)
    gray = pixels.float().mean(1)
    inside = (gray * masks).sum((1, 2)) / masks.sum((1, 2))
    outside = (gray * ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    is_light = (inside > outside).float()
    by_class = torch.stack([is_light[images.labels == c].mean() for c in range(10)])
    expected = torch.tensor([0.1, 0.9] * 5)
    torch.testing.assert_close(by_class, expected, rtol=0, atol=0.06)
    colored = shapes("train", 16, 4000, name="shapes20k").read(torch.arange(4000)).float()
    corner = colored[:, :, :2, :2].mean((2, 3))
    hue = (corner - corner.mean(1, keepdim=True)).view(400, 10, 3)
    within = hue.var(0).sum(1).mean()
    assert hue.mean(0).var(0).sum() > within  # between classes more than within them


def test_schedule_is_a_permutation_an_epoch_split_among_ranks():
    whole = list(data.Schedule(50, 12, 3, 0, 8))
    assert len(whole) == len(data.Schedule(50, 12, 3, 0, 8)) == 8
    assert [batch[0][0] for batch in whole] == [0] * 4 + [1] * 4
    for epoch in range(2):
        indices = [i for batch in whole[4 * epoch : 4 * epoch + 4] for _, i in batch]
        assert len(set(indices)) == 48
    assert [i for _, i in whole[0]] != [i for _, i in whole[4]]
    # a resumed run sees what it would have seen
    assert list(data.Schedule(50, 12, 3, 5, 8)) == whole[5:]
    for world in (2, 3, 4):
        ranks = [list(data.Schedule(50, 12, 3, 0, 8, rank, world)) for rank in range(world)]
        assert [[*chain(*batches)] for batches in zip(*ranks)] == whole
    assert list(data.Schedule(50, 12, 4, 0, 1)) != whole[:1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    images = sources.open_images(str(folder), "train")
    alone = list(data.train_loader(images, tiny_config(workers=0), 3, 6, HERE))
    many = list(data.train_loader(images, tiny_config(workers=workers), 3, 6, HERE))
    assert len(alone) == len(many) == 3
    for a, b in zip(alone, many):
        assert type(a) is type(b) is data.Batch
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4]))


def test_the_first_batch_is_the_runs(folder):
    images = sources.open_images(str(folder), "train")
    whole, first = data.first_batch(images, tiny_config(), 5, HERE)
    batch = next(iter(data.train_loader(images, tiny_config(), 0, 1, HERE)))
    assert all(torch.equal(a, b[:5]) for a, b in zip(first[:4], batch[:4]))
    [items] = data.Schedule(80, 16, 0, 0, 1)
    for image, (_, i) in zip(whole, items):
        assert torch.equal(image, center_crop(images.read(i), 32))


def test_a_batch_is_split_evenly(folder):
    images = sources.open_images(str(folder), "train")
    batch = next(iter(data.train_loader(images, tiny_config(batch_size=12), 0, 1, HERE)))
    for limit, parts in ((100, 1), (12, 1), (11, 2), (5, 3), (1, 12)):
        split = data.split_batch(batch, limit)
        assert len(split) == parts and all(len(part.seeds) == 12 // parts for part in split)
        for i in range(4):
            assert torch.equal(torch.cat([part[i] for part in split]), batch[i])


def test_eval_loader_visits_each_image_once(folder):
    images = sources.open_images(str(folder), "val")
    labels = []
    for rank in range(3):
        loader = data.eval_loader(images, 32, 7, 0, HERE._replace(rank=rank, world=3))
        labels.append(torch.cat([batch[2] for batch in loader]))
    assert [len(part) for part in labels] == [14, 13, 13]
    assert torch.equal(torch.cat(labels).bincount(), images.labels.bincount())


def test_random_crops_of_evaluations_are_a_function_of_seed_and_epoch(folder):
    images = sources.open_images(str(folder), "val")
    steps = data.Schedule(40, 8, 3, 0, 5)
    for crops, seeds, labels, broken in data.crop_loader(images, 32, (0.2, 1.0), steps, 0, HERE):
        assert crops.shape == (8, 3, 32, 32) and len(labels) == 8 and broken == []
        again = dict(seed=3, epoch=0, scale=(0.2, 1.0))
        for other, other_seeds, *_ in data.eval_loader(images, 32, 40, 0, HERE, **again):
            where = (other_seeds[None] == seeds[:, None]).nonzero()[:, 1]
            assert torch.equal(other[where], crops)


@pytest.mark.skipif(not (SHARED / "jpeg64.zip").exists(), reason="no ../shared/data here")
def test_real_photographs(tmp_path):
    with zipfile.ZipFile(SHARED / "jpeg64.zip") as archive:
        archive.extractall(tmp_path)
    images = sources.open_images(str(tmp_path / "jpeg64"), "train")
    assert len(images) == 64 and len(images.classes) == 64
    crops, _, _, broken = next(iter(data.eval_loader(images, 224, 64, 0, HERE)))
    assert crops.shape == (64, 3, 224, 224) and not broken
