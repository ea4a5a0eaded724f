"""Images from everywhere, broken ones included; the schedule of batches."""

import os

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
from configurator import UsageError
from conftest import SHARED, tiny_config

CPU = torch.device("cpu")


def color(path, pixel=(0, 0)):
    return data.decode(str(path))[:, pixel[1], pixel[0]].tolist()


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
    image.save(
        path,
        **dict(lossless=True) if suffix == "webp" else {},
        **dict(transparency=0) if mode == "P" and suffix == "png" else {},
    )
    decoded = data.decode(str(path))
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, 6, 9)
    assert np.abs(np.array(color(path, (4, 3))) - expected).max() <= (8 if suffix == "jpg" else 1)


def test_exif_rotation_and_animation(tmp_path):
    image = Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert data.decode(str(tmp_path / "turned.jpg")).shape == (3, 40, 20)
    frames = [Image.new("RGB", (8, 8), c) for c in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert color(tmp_path / "moving.gif")[0] > 240


def photo(H, W, seed=0):
    """uint8 (3, H, W): noise whose waves are the stronger the longer, as in a photograph."""
    rng = torch.Generator().manual_seed(seed)
    octaves = [
        torch.nn.functional.interpolate(
            torch.rand(1, 3, H // k, W // k, generator=rng) - 0.5, size=(H, W), mode="bicubic"
        )[0]
        * k
        for k in (2, 4, 8, 16, 32)
    ]
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
    for name, options in (
        ("a.jpg", {}),
        ("turned.jpg", dict(exif=exif)),
        ("grey.jpg", {}),
        ("a.png", {}),
    ):
        (picture.convert("L") if name == "grey.jpg" else picture).save(tmp_path / name, **options)
        whole, found = data.decode(str(tmp_path / name)), data.decode(str(tmp_path / name), enough)
        short = expected if name.endswith("jpg") else side
        assert found.shape == (
            (3, 600 * short // 400, short)
            if name == "turned.jpg"
            else (3, short, 600 * short // 400)
        )
        by_pixels = torch.nn.functional.interpolate(
            whole[None].float(), size=found.shape[1:], mode="area"
        )[0]
        assert (by_pixels - found).abs().mean() < 2  # of 255


def test_what_pillow_refuses_to_reduce_is_decoded_whole(tmp_path, monkeypatch):
    torchvision.io.write_jpeg(photo(200, 300), str(tmp_path / "a.jpg"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a decompression bomb to Pillow
    assert data.decode(str(tmp_path / "a.jpg"), 50).shape == (3, 200, 300)


def test_crops_of_reduced_images_are_the_crops(tmp_path):
    from augment import random_crops
    from draws import key

    for i in range(3):
        torchvision.io.write_jpeg(photo(1000, 1200, i), str(tmp_path / f"{i}.jpg"), quality=95)
    whole, crops = data.open_images(str(tmp_path), "train"), [(64, (0.25, 1.0)), (48, (0.1, 0.4))]
    config = tiny_config(
        img_size=64, global_scale=crops[0][1], local_size=48, local_scale=crops[1][1]
    )
    reduced = data.reduced(whole, config)
    assert reduced.read(0).shape == (3, 250, 300)  # 48 / sqrt(0.1 * 3 / 4) = 176 pixels are enough
    for i in range(3):
        for size, scale in crops:
            a, b = (
                random_crops(images.read(i), key(0, torch.tensor(i)), 4, size, scale).float()
                for images in (whole, reduced)
            )
            assert (
                (a - b).abs().mean() < 5 < 30 < (a - b.flip(0)).abs().mean()
            )  # of 255; boxes are rounded to coarser pixels
    memory = data.shapes("train", 32, 10)
    assert data.reduced(memory, config) is memory


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
    images = data.open_images(str(root), "train")
    assert len(images) == 121
    config = tiny_config(batch_size=121)
    global_crops, _, _, _, broken = next(iter(data.train_loader(images, config, 0, 1, 0, 1, CPU)))
    assert len(global_crops) == 121 and [os.path.basename(path) for path, _ in broken] == [name]
    said, files = [], data.BrokenFiles(len(images))
    files.report(broken, said.append)
    files.report(broken, said.append)
    assert len(said) == 1 and name in said[0]


def test_images_kept_in_memory_are_the_same_and_must_fit(tmp_path, monkeypatch):
    images = data.open_images(str(make_tree(tmp_path / "tree", 12, ["zero.jpg"])), "train")
    kept = data.in_memory(images, "images", 2)
    (bad,) = [i for i in range(13) if "zero" in images.name(i)]
    for i in set(range(13)) - {bad}:
        assert torch.equal(kept.read(i), images.read(i)) and kept.read(i) is kept.read(i)
    with pytest.raises(data.UNREADABLE) as error:
        kept.read(bad)
    assert kept.name(bad) == images.name(bad) and str(error.value)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(UsageError, match="take about .* GB, .* are free: leave --cache=ram away"):
        data.in_memory(images, "images", 2)


def test_more_than_one_percent_broken_stops(tmp_path):
    images = data.open_images(str(make_tree(tmp_path / "tree", 20, ["zero.jpg"])), "train")
    *_, broken = next(iter(data.train_loader(images, tiny_config(batch_size=21), 0, 1, 0, 1, CPU)))
    with pytest.raises(
        UsageError, match="1 of 21 images are broken, more than 1%, such as .*zero.jpg"
    ):
        data.BrokenFiles(len(images)).report(broken, print)


def test_folders(folder, tmp_path):
    train, val = data.open_images(str(folder), "train"), data.open_images(str(folder), "val")
    assert (
        len(train) == 80 and len(val) == 40 and train.classes == val.classes == sorted(data.SHAPES)
    )
    assert train.labels.bincount().tolist() == [8] * 10
    chosen = tmp_path / "list.txt"
    chosen.write_text("# two of ten\ntee a letter\nkey\n")
    some = data.open_images(str(folder), "train", str(chosen))
    assert some.classes == ["key", "tee"] and len(some) == 16 and "key" in some.name(0)
    flat = data.open_images(str(folder / "train" / "key"), "train")
    assert (
        len(flat) == 8
        and (flat.labels == -1).all()
        and data.open_images(str(folder / "train" / "key"), "val") is None
    )
    deep = data.open_images(
        str(folder / "val"), "train"
    )  # any tree: the class folders are just folders
    assert len(deep) == 40 and (deep.labels == -1).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda t: dict(data=str(t / "nowhere")), "no such folder"),
        (lambda t: dict(data="shape"), "did you mean 'shapes'"),
        (lambda t: dict(data=str(t)), "no images in it"),
        (lambda t: (t / "train").mkdir() or dict(data=str(t)), "holds no class folders"),
        (
            lambda t: (t / "train" / "cat").mkdir(parents=True) or dict(data=str(t)),
            "holds no images",
        ),
        (lambda t: dict(data="shapes", classes="x.txt"), "shapes has none"),
        (
            lambda t: (
                (t / "c.txt").write_text("") and None or dict(data=str(t), classes=str(t / "c.txt"))
            ),
            "no train/CLASS folders",
        ),
        (lambda t: dict(data="cifar10", root=str(t)), "--download=True fetches it"),
    ],
)
def test_unusable_data_is_one_line(tmp_path, make, message):
    knobs = make(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        data.open_images(split="train", **knobs)
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
        ("key\nkey\n", "listed twice"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            data.open_images(str(folder), "train", str(path))


def test_torchvision_formats_are_read(tmp_path):
    """CIFAR-10's own files on disk: pickled batches with md5 sums, so only a wrong sum can be told from here; STL-10's are raw bytes."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"not the real one")
    with pytest.raises(UsageError, match="cifar10: not in"):
        data.open_images("cifar10", "train", root=str(tmp_path))


def test_in100_list_is_cmcs():
    names = data.read_classes(
        "configs/in100_classes.txt"
        if os.path.exists("configs/in100_classes.txt")
        else os.path.join(os.path.dirname(data.__file__), "configs/in100_classes.txt")
    )
    assert len(names) == 100 and all(name[0] == "n" and len(name) == 9 for name in names)


def test_shapes_are_a_function_of_seed_and_index():
    a, b = data.shapes("train", 32, 40), data.shapes("train", 32, 60)
    assert all(torch.equal(a.read(i), b.read(i)) for i in range(40)) and torch.equal(
        a.labels, b.labels[:40]
    )
    assert not torch.equal(a.read(0), data.shapes("val", 32, 40).read(0)) and not torch.equal(
        a.read(0), data.shapes("train", 32, 40, seed=1).read(0)
    )
    assert a.labels.bincount().tolist() == [4] * 10 and a.read(0).shape == (3, 32, 32)


def test_schedule_is_a_permutation_an_epoch_split_among_ranks():
    whole = list(data.Schedule(50, 12, 3, 0, 8))
    assert (
        len(whole) == 8
        and [epoch for batch in whole for epoch, _ in batch[:1]] == [0] * 4 + [1] * 4
    )
    for epoch in range(2):
        indices = [i for batch in whole[4 * epoch : 4 * epoch + 4] for _, i in batch]
        assert len(set(indices)) == 48
    assert [i for _, i in whole[0]] != [i for _, i in whole[4]]
    assert (
        list(data.Schedule(50, 12, 3, 5, 8)) == whole[5:]
    )  # a resumed run sees what it would have seen
    for world in (2, 3, 4):
        ranks = [list(data.Schedule(50, 12, 3, 0, 8, rank, world)) for rank in range(world)]
        assert [sum(batches, []) for batches in zip(*ranks)] == whole
    assert list(data.Schedule(50, 12, 4, 0, 1)) != whole[:1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    images = data.open_images(str(folder), "train")
    alone, many = (
        [batch for batch in data.train_loader(images, tiny_config(workers=n), 3, 6, 0, 1, CPU)]
        for n in (0, workers)
    )
    for a, b in zip(alone, many):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4]))


def test_eval_loader_visits_each_image_once(folder):
    images = data.open_images(str(folder), "val")
    labels = [
        torch.cat([batch[2] for batch in data.eval_loader(images, 32, 7, 0, CPU, rank, 3)])
        for rank in range(3)
    ]
    assert [len(part) for part in labels] == [14, 13, 13]
    assert torch.equal(torch.cat(labels).bincount(), images.labels.bincount())


@pytest.mark.skipif(not (SHARED / "jpeg64.zip").exists(), reason="no ../shared/data here")
def test_real_photographs(tmp_path):
    import zipfile

    with zipfile.ZipFile(SHARED / "jpeg64.zip") as archive:
        archive.extractall(tmp_path)
    images = data.open_images(str(tmp_path / "jpeg64"), "train")
    assert len(images) == 64 and len(images.classes) == 64
    batch = next(iter(data.eval_loader(images, 224, 64, 0, CPU)))
    assert batch[0].shape == (64, 3, 224, 224) and not batch[3]
