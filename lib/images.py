"""From files to images: the data set, one decoder, decoded images in memory."""

import contextlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lib.config import UsageError
from lib.processor import local_ranks

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional as TF
from tqdm.contrib.concurrent import thread_map

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
UNREADABLE = (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory or on disk, as loaders and evaluations use it."""

    read: Callable  # i -> uint8 (3, H, W); raises one of UNREADABLE for a broken file
    labels: torch.Tensor  # (N,) int64, -1: unknown
    classes: list  # of names
    name: Callable  # i -> what to call the image in a message
    pixels: torch.Tensor | None = None  # uint8 (N, 3, H, W), if all lie in memory

    def __len__(self):
        return len(self.labels)


def _at(function, values, i):
    return function(values[i])


def memory_images(pixels, labels, classes, name):
    """Return Images of pixels uint8 (N, 3, H, W) and N labels."""
    labels = torch.as_tensor(labels, dtype=torch.int64)
    name = f"{name} image {{}}".format
    pixels = pixels.contiguous()
    return Images(pixels.__getitem__, labels, list(classes), name, pixels)


def file_images(paths, labels, classes, fix=""):
    """Return Images of files. With `fix`: UsageError with this advice if one is missing."""
    missing = [path for path in paths if not os.path.exists(path)] if fix else []
    if missing:
        n = f"{len(missing)} of {len(paths)}"
        raise UsageError(f"{n} images are missing, such as {missing[0]}; {fix}")
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return Images(partial(_at, decode, paths), labels, list(classes), paths.__getitem__)


def decode(path, enough=0):
    """Decode an image file to uint8 RGB (3, H, W), rotated as a JPEG's or PNG's EXIF says.

    Gray, CMYK, palette, alpha and 16 bit become RGB of 8 bit; of an animation the first frame is
    taken. A JPEG with at least 2, 4 or 8 times `enough` pixels a side is decoded at 1/2, 1/4 or 1/8
    of its size, which saves most of the time; 0: the whole image.
    """
    try:
        image = _decode_reduced(path, enough) if enough else None
        if image is None:
            image = decode_image(str(path), mode="RGB", apply_exif_orientation=True)
    except RuntimeError:
        image = _decode_with_pillow(path)  # formats and variants that torchvision does not read
    image = image[0].clone() if image.ndim == 4 else image  # the other frames are freed
    return TF.to_dtype(image, torch.uint8, scale=True)


def _decode_reduced(path, enough):
    """Return None for a file that is no JPEG, too small, or refused by Pillow."""
    with contextlib.suppress(Exception), Image.open(path) as file:
        if file.format in ("JPEG", "MPO") and min(file.size) >= 2 * enough:
            file.draft(None, (enough, enough))
            return TF.pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
    return None


def _decode_with_pillow(path):
    with Image.open(path) as file:
        if not file.mode.startswith(("I", "F")):
            return TF.pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
        gray = np.asarray(file, dtype=np.float32)
    # 16 bit, 32 bit or float: Pillow's own conversion would clip instead of scale
    is_16_bit = file.mode.startswith("I;16") or file.format == "PPM" or gray.max() > 255
    full = 65535 if is_16_bit else 255
    full = 1 if file.mode == "F" and gray.max() <= 1 else full
    gray = (gray.clip(0, full) * (255 / full)).round().astype(np.uint8)
    return torch.from_numpy(gray).expand(3, -1, -1)


def reason(error):
    """Return an exception's message in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def limit_decode(images, config):
    """Return the same Images, large JPEG files decoded no larger than config's crops need."""
    args = getattr(images.read, "args", ())
    if args[:1] != (decode,):
        return images  # in memory already, or a subset: limit the whole
    crops = [(config.img_size, config.global_scale)]
    if config.local_crops:
        crops.append((config.local_size, config.local_scale))
    # the smallest crop, 3:4, still has `size` pixels on its shorter side
    enough = max(size / math.sqrt(scale[0] * 3 / 4) for size, scale in crops)
    return replace(images, read=partial(_at, partial(decode, enough=math.ceil(enough)), args[1]))


def cache_in_ram(images, what, here, threads):
    """Return the same Images, decoded once and cached; loading processes share them.

    For a broken file the reason is cached. UsageError if they do not fit into memory.
    what: the name of the data set.
    """
    read = partial(read_or_reason, images.read)
    sample = map(read, range(0, len(images), max(1, len(images) // 64)))
    sizes = [image.numel() for image in sample if not isinstance(image, str)]
    needed = len(images) * sum(sizes) / max(len(sizes), 1) / 1e9
    free = free_memory(torch.device("cpu")) / 1e9
    if needed > 0.8 * free:
        why = f"{what} needs about {needed:.1f} GB of memory, {free:.1f} GB per rank are free"
        raise UsageError(f"cache=ram: {why}; remove --cache=ram")
    cached = map_images(read, images, what, here, threads)
    return replace(images, read=partial(_at, _image_or_raise, cached))


def map_images(function, images, what, here, threads):
    """Return [function(i) for each image i], computed by threads; the main rank shows a bar."""
    progress = dict(desc=f"decoding {what}", leave=False, delay=1, disable=not here.is_main)
    return thread_map(function, range(len(images)), max_workers=threads, **progress)


def free_memory(device):
    """Return the free bytes of a device; for the host, this rank's share of them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):  # Linux: with what caches of files would give back
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    return free / local_ranks()


def read_or_reason(read, i):
    """Return image i; if its file is broken, the reason in one line."""
    try:
        return read(i)
    except UNREADABLE as error:
        return reason(error)


def _image_or_raise(image):
    if isinstance(image, str):
        raise OSError(image)
    return image


def subset(images, indices):
    """Return the Images at `indices`, in that order."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    read, name = (partial(_at, f, indices.tolist()) for f in (images.read, images.name))
    pixels = None if images.pixels is None else images.pixels[indices.to(images.pixels.device)]
    return Images(read, images.labels[indices], images.classes, name, pixels)
