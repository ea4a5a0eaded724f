"""Small images on the device: a data set is one tensor, a batch is cropped at once.

A crop is resized by two matrix products, out = W_y image W_x^T. Their weights are built from the
crops' boxes. They are torch's: antialiased bicubic, rounded to 1/2^bits, with 8 bits after each
product. So every sum times 2^bits is a whole number below 2^24, which fp32 holds exactly. No order
of sums, number of threads or device changes a pixel. The pixels are those of augment.resize; where
a crop shrinks by more than four, a few differ by one level (tests/test_resident.py).
"""

from dataclasses import replace
from functools import partial

from lib.images import free_memory, map_images, read_or_reason
from lib.processor import exact_fp32, to_device

import torch
from tqdm import tqdm

from augment import center_place, crop_boxes

SMALL = 128 * 128  # pixels of an image; for larger ones the matrix products cost too much
SHARE = 0.25  # of the memory that is free, for a data set
GRAY = 128  # pixels are -128 .. 127 in the products, which saves a bit
BITS = 16  # of a weight's fraction at most: 128 * 1.25 * 2^16 < 2^24
CPU_CHUNK = 1 << 19  # numbers between the two products that a CPU holds at a time: 2 MB


# --- the data set ---------------------------------------------------------------------------------


def place(images, what, here, threads):
    """Return Images whose pixels are one tensor on the device, if they have one size and fit.

    Otherwise the same Images. Files are decoded once, by threads. what: the data set's name.
    """
    if images.pixels is None:
        images = _decode_all(images, what, here, threads)
    if images.pixels is None or not _fits(images.pixels[0], len(images), here.device):
        return images
    return replace(images, pixels=images.pixels.to(here.device))


def _decode_all(images, what, here, threads):
    """Read the files into one tensor; not if a sample of 64 does not fit, or a file is broken."""
    read = partial(read_or_reason, images.read)
    first = read(0)
    devices = (torch.device("cpu"), here.device)
    if isinstance(first, str) or not all(_fits(first, len(images), each) for each in devices):
        return images
    if not all(_is_like(read(i), first) for i in range(0, len(images), len(images) // 64 or 1)):
        return images
    pixels = torch.empty(len(images), *first.shape, dtype=torch.uint8)

    def load(i):
        image = read(i)
        if _is_like(image, first):
            pixels[i] = image
            return ""
        return "broken" if isinstance(image, str) else "of another size"

    for i, why in enumerate(map_images(load, images, what, here, threads)):
        if why:
            if here.is_main:
                tqdm.write(f"{images.name(i)} is {why}: each step reads {what} from its files")
            return images
    return replace(images, pixels=pixels)


def _is_like(image, first):
    """Tell whether an image, or the reason why there is none, has the size of the first."""
    return not isinstance(image, str) and image.shape == first.shape


def _fits(image, n, device):
    return image[0].numel() <= SMALL and n * image.numel() < SHARE * free_memory(device)


# --- crops, as augment.py's of one image ----------------------------------------------------------


def random_crops(images, seeds, n, size, scale):
    """Cut n random resized crops of each: images uint8 (B, 3, H, W) -> (B, n, 3, size, size).

    seeds (B,) lie on the CPU, the crops on the images' device.
    """
    B, _, H, W = images.shape
    if n == 0:
        return images.new_empty(B, 0, 3, size, size)
    boxes = crop_boxes(H, W, seeds, n, scale)  # (B, n, 4)
    longest = boxes[..., 2:].max().item()
    boxes = to_device(images.device, boxes)
    chunk = max(1, CPU_CHUNK // (n * size * 3 * H)) if images.device.type == "cpu" else B
    crops = []
    for some, box in zip(images.split(chunk), boxes.split(chunk)):
        top, left, height, width = box.unbind(-1)
        across = resize_weights(left, width, W, size, longest)
        down = resize_weights(top, height, H, size, longest)
        crops.append(_products(some, down, across))
    return torch.cat(crops)


def center_crop(images, size):
    """Cut the center of each as augment.center_crop: uint8 (B, 3, H, W) -> (B, 3, size, size)."""
    H, W = images.shape[2:]
    h, w, top, left = center_place(H, W, size)
    start, *sides = to_device(images.device, torch.tensor([0, H, W]))
    down = resize_weights(start, sides[0], H, h, H)[top : top + size]  # (size, H)
    across = resize_weights(start, sides[1], W, w, W)[left : left + size]
    weights = (matrix.expand(len(images), 1, -1, -1) for matrix in (down, across))
    return _products(images, *weights)[:, 0]


@torch.no_grad()
def resize_weights(start, length, n_in, n_out, longest):
    """Build the matrices (..., n_out, n_in) float32 that resize a part of a row of n_in pixels.

    start, length: int64 (...), the part, at most `longest`. An output pixel is a sum over the taps
    within 2 pixels of its place; within 2 pixels of the output if the part shrinks. There are none
    beyond the ends of the part.
    """
    device = length.device
    scale = (length.double() / n_out)[..., None]  # (..., 1)
    stretch = scale.clamp(min=1)
    place = (torch.arange(n_out, device=device) + 0.5) * scale  # (..., n_out), in the part
    first = (place - 2 * stretch + 0.5).floor().clamp(min=0)
    n_taps = min(n_in, int(4 * max(1, longest / n_out)) + 2)
    tap = first[..., None] + torch.arange(n_taps, device=device)  # (..., n_out, n_taps)
    weight = _cubic((tap + 0.5 - place[..., None]).abs() / stretch[..., None])
    weight = weight * (tap < length[..., None, None])
    weight = weight / weight.sum(-1, keepdim=True)

    # torch's fixed point: so many bits that the largest weight stays below 2^15
    largest = weight.amax((-2, -1), keepdim=True)
    bits = torch.log2((2**15 - 0.5) / largest).ceil() - 1
    unit = torch.exp2(bits.clamp(max=BITS))
    weight = torch.trunc(weight * unit + 0.5 * weight.sign()) / unit

    column = (tap + start[..., None, None]).long().clamp(max=n_in - 1)
    matrix = torch.zeros(*length.shape, n_out, n_in, device=device)
    return matrix.scatter_add_(-1, column, weight.float())


def _cubic(x):
    """Keys' cubic (1981) with a = -1/2 at distances x >= 0; 0 from 2 on."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far.masked_fill(x >= 2, 0))


@torch.no_grad()
def _products(images, down, across):
    """Return W_y image W_x^T, rounded: uint8 (B, 3, H, W), (B, n, h, H), (B, n, w, W) -> uint8."""
    B, _, H, W = images.shape
    n, h = down.shape[1:3]
    w = across.shape[2]
    with exact_fp32():
        columns = images.permute(0, 3, 1, 2).float().flatten(2).sub_(GRAY)  # (B, W, 3 H)
        across = across.reshape(B, n * w, W)
        x = _round(across @ columns, across.sum(-1, keepdim=True))  # (B, n w, 3 H)
        down = down.reshape(B * n, h, H).mT
        x = _round(x.view(B * n, w * 3, H) @ down, down.sum(-2, keepdim=True))
    x = x.add_(GRAY).to(torch.uint8).view(B, n, w, 3, h)
    return x.permute(0, 1, 3, 4, 2).contiguous()


def _round(x, weight):
    """Round sums of weights times (pixels - GRAY) to pixels - GRAY. weight: sums of the weights."""
    return x.add_(GRAY * weight + (0.5 - GRAY)).floor_().clamp_(-GRAY, 255 - GRAY)
