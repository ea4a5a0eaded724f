"""A name or a folder -> Images: torchvision's data sets, folders of classes, lists, subsets."""

import os
from pathlib import Path

from lib.config import UsageError, did_you_mean
from lib.images import EXTENSIONS, file_images, memory_images, reason
from lib.machine import wait_for_ranks
from lib.shapes import COUNTS, shapes

import numpy as np
import torch
from torchvision import datasets

TORCHVISION = {  # name -> class, its splits that are 'train', those that are 'val': the test set
    "cifar10": (datasets.CIFAR10, [True], [False]),
    "cifar100": (datasets.CIFAR100, [True], [False]),
    "stl10": (datasets.STL10, ["train"], ["test"]),
    "flowers102": (datasets.Flowers102, ["train", "val"], ["test"]),
    "food101": (datasets.Food101, ["train"], ["test"]),
    "pets": (datasets.OxfordIIITPet, ["trainval"], ["test"]),
}


def open_images(data, split, classes="", root="data", download=False, img_size=64):
    """Open Images of the 'train' or 'val' split. None if a folder has no such split.

    data: 'shapes', a name of TORCHVISION, or a folder: `train/CLASS/**` with or without
    `val/CLASS/**`; the unpacked archive of CUB-200-2011; else any tree of images, without labels,
    all of it 'train'. classes: a file with one class folder a line. root, download: torchvision's.
    """
    folder = Path(data)
    built_in = (*COUNTS, *TORCHVISION)
    if classes and data in built_in:
        raise UsageError(f"classes={classes}: {data} has no class folders; remove --classes")
    if data in COUNTS:
        return shapes(split, img_size, name=data)
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
        wait_for_ranks()  # one rank of each machine downloads, the others wait for it
        pieces = [make(root, piece) for piece in splits[split != "train"]]
    except ImportError as error:
        raise UsageError(f"data={name}: torchvision needs: pip install {error.name}") from None
    except Exception as error:  # anything, where an archive is damaged
        why = f"not in {root}/, or damaged ({reason(error)})"
        fix = "use --download=True, or --data_root=FOLDER if it is elsewhere"
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
        raise UsageError(f"data={name}: has labels without a class; download {name} again")
    return file_images(paths, labels, first.classes, f"download {name} again")


def _find_images(folder, classes):
    """Return paths and labels of the images in folder/CLASS/**. Class "" is the folder itself."""
    labels = {name: i for i, name in enumerate(classes)}
    samples = datasets.folder.make_dataset(str(folder), labels, EXTENSIONS, allow_empty=True)
    empty = {*range(len(classes))} - {label for _, label in samples}
    if empty:
        where = folder / classes[min(empty)]
        fix = "add some, remove it, or give another folder"
        raise UsageError(f"{where}: holds no images ({' '.join(EXTENSIONS)}); {fix}")
    return zip(*samples)


def _labeled_folder(folder, class_file):
    there = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    classes = sorted(read_classes(class_file)) if class_file else there
    missing = [name for name in classes if name not in there]
    if missing:
        why = f"{len(missing)} of the {len(classes)} classes of {class_file} are not there"
        fix = "fix the list or the folder; an evaluation also takes --classes=all"
        raise UsageError(f"{folder}: {why}, such as {missing[0]}; {fix}")
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
        raise UsageError(f"{folder}: the ids of its three lists do not match; {again}")
    check_inside(paths, folder / "images.txt")
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    classes = [os.path.dirname(path) for path in paths[first]]
    chosen = is_train == ("1" if split == "train" else "0")
    files = [str(folder / "images" / path) for path in paths[chosen]]
    return file_images(files, labels[chosen], classes, again)


def check_inside(names, listed):
    """Raise UsageError if a name in the list `listed` is a path out of its folder."""
    for name in names:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UsageError(f"{listed}: {name} leads out of its folder; unpack the archive again")


def _read_lines(path, option):
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"{option}={path}: {why}; give a text file, one name per line") from None
    return [line for line in lines if line.strip() and not line.startswith("#")]


def read_classes(path):
    """Read a class list: one folder name per line. Text after a blank and # lines are comments."""
    shipped = Path(__file__).parents[1] / path  # so configs work from any current folder
    lines = _read_lines(path if os.path.exists(path) else shipped, "classes")
    names = [line.split()[0] for line in lines]
    if not names or len(set(names)) < len(names):
        why = "lists a class twice" if names else "lists no class"
        raise UsageError(f"classes={path}: {why}; write one folder name per line")
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

    Lines of other classes are ignored. UsageError if an image of the data's classes is missing.
    """
    names = {line.strip() for line in _read_lines(path, "subset_list")}
    index = {os.path.basename(images.name(i)): i for i in range(len(images))}
    wanted = sorted(name for name in names if name.rsplit("_", 1)[0] in images.classes)
    missing = [name for name in wanted if name not in index]
    if missing or not wanted:
        why = f"names no image of the data's classes, such as {images.classes[0]}"
        if missing:
            why = f"{len(missing)} of its images are not in the data, such as {missing[0]}"
        raise UsageError(f"subset_list={path}: {why}; fix the list, or remove --subset_list")
    return np.array(sorted(index[name] for name in wanted))
