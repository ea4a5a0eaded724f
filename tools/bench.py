"""How fast is this code? Each row times our code and a plain reference, in turns.

    python tools/bench.py                    all rows, one to two minutes each on two CPU cores
    python tools/bench.py --rows=step        rows whose name contains 'step'
    python tools/bench.py --json=bench.json  also to a file
    python tools/bench.py --profile=True --rows=vit_tiny      instead: where our time goes

Reference: the same mathematics as the published scripts write it. A step in fp32, losses by a loop
over pairs, every token through the last block, clipping and EMA by a loop over parameters; views
image by image through torchvision's transforms of Pillow images. A row is timed only after both
sides gave the same values. Each side is a process of its own, so that ours keeps its freed memory
and the reference has what Python starts with. MB: what the first call adds to a process that has
its weights and inputs. Limit: our share of what this machine could do, of its rate at a large
matrix product in our precision or at copying memory.
"""

import atexit
import contextlib
import functools
import gc
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as T
from PIL import ImageFilter
from torch import multiprocessing
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib import data, evaluation, features, fused, linear, machine, processor, sources
from lib.config import Config, UsageError, configure, option
from lib.evalstate import EvalState
from lib.images import limit_decode, subset
from lib.rng import sample_seeds
from lib.shapes import shapes

import augment
import eval_linear
import eval_seg
import losses
import train
import vmamba
from model import WeightNormLinear, build_backbone


@dataclass
class BenchConfig:
    """Options of bench.py."""

    rows: str = option("", "only rows whose name contains this")
    data: str = option("", "folder of JPEGs for the end-to-end row; default: generated ones")
    repeats: int = option(7, "calls of each side after one warm-up; medians are compared", 1, 1000)
    device: str = option("auto", "a GPU if there is one", choices=("auto", "cpu", "cuda"))
    json: str = option("", "also write the rows to this file")
    profile: bool = option(False, "instead: print our time for each of PyTorch's operators")


class Row(NamedTuple):
    """Two ways to one result. Their values must agree before they are timed."""

    ours: Callable
    reference: Callable
    images: int  # of one call
    rtol: float
    values: tuple = ()  # the two sides' values, if not what one call of each returns
    flops: bool = False  # our limit is the arithmetic of matrix products, which is counted, ...
    bytes: float = 0  # ... or that one call must move so many bytes
    reference_images: int = 0  # of one call of the reference, if not the same number
    one_core: bool = False

    def check(self):
        ours, reference = self.values or (self.ours, self.reference)
        must_agree(ours(), reference(), self.rtol)


def must_agree(ours, reference, rtol):
    """Refuse to time two things that are not the same: tensors, numbers, or sequences of them."""
    if not isinstance(ours, (list, tuple)):
        ours, reference = [ours], [reference]
    for pair in zip(ours, reference, strict=True):
        a, b = (torch.as_tensor(x).detach().cpu().double() for x in pair)
        if not (a - b).abs().mean() <= rtol * b.abs().mean():
            message = f"ours gives {a.mean():.6g} on average, the reference {b.mean():.6g}"
            raise UsageError(f"{message}; the results must agree before speeds are compared")


def here_on(device, precision="auto"):
    return machine.Here(0, 1, device, *machine.choose_precision(precision, device))


Size = namedtuple("Size", "arch patch_size img_size local_size out_dim")  # options of a step row
STEPS = [  # size, batch on a CPU, on a GPU: small ones would time how fast Python starts kernels
    (Size("vit_tiny", 8, 64, 32, 4096), 32, 512),
    (Size("vit_tiny", 16, 224, 96, 65536), 8, 128),
    (Size("vit_small", 16, 224, 96, 65536), 4, 128),
    (Size("resnet18", 16, 224, 96, 65536), 4, 128),
    (Size("resnet50", 16, 224, 96, 65536), 2, 128),
    (Size("vmamba_tiny", 16, 224, 96, 65536), None, 64),
    (Size("vmamba_micro", 16, 64, 32, 4096), 4, None),
]


# so many that Python runs ahead of a GPU, as in training; the reference waits for each
STEPS_A_CALL = {"cpu": 1, "cuda": 10}
PLAIN = {"drop_path": 0.0, "compile": False, "orth": "dot"}  # as the reference


def our_run(device, size, n, precision="auto", **options):
    """Make a run for batches of n images that trains the prototypes from its first step on."""
    options |= dict(batch_size=n, max_batch_per_gpu=n, freeze_last_layer=0)
    return train.make_run(Config(**size._asdict(), **options), 1000, here_on(device, precision))


def reference_run(device, size, n, **options):
    run = our_run(device, size, n, "fp32", **options, **PLAIN)
    trained = [p for p in run.network.parameters() if p.requires_grad]
    run.optimizer = torch.optim.AdamW(trained, lr=1e-6, foreach=False)
    return run


def reference_logits(network, views):
    """Return the views' logits of each head, two of (V, B, K)."""
    z = []
    for x in (images.flatten(0, 1) for images in views):
        is_vit = hasattr(network.backbone, "tokens")
        z.append(network.backbone.tokens(x)[0][:, 0] if is_vit else network.backbone(x))
    parts = torch.cat(z).tensor_split([network.d_ir], dim=1)
    B = views[0].shape[1]
    return [head(z).unflatten(0, (-1, B)) for head, z in zip(network.heads.values(), parts)]


def reference_step(run, views):
    """Train on ready views -> the loss, L_Orth."""
    with torch.no_grad():
        t_ir, t_ef = reference_logits(run.teacher, views[:1])
    s_ir, s_ef = reference_logits(run.network, views)
    cl = losses.dino_loss(s_ir, t_ir, run.centers["ir"])
    orth = losses.orthogonality(s_ef, t_ef, run.centers["ef"])
    preg = losses.projection_regularization(run.network.head_ir, run.network.head_ef)
    loss = cl + orth + run.config.lambda_preg * preg
    loss.item()  # the scripts look at each loss
    run.optimizer.zero_grad()
    loss.backward()
    for p in run.network.parameters():
        torch.nn.utils.clip_grad_norm_(p, 3.0, foreach=False)
    run.optimizer.step()
    with torch.no_grad():
        for p, q in zip(run.teacher.parameters(), run.network.parameters()):
            p.mul_(0.996).add_((1 - 0.996) * q)
    losses.update_center(run.centers["ir"], t_ir.mean((0, 1)))
    losses.update_center(run.centers["ef"], t_ef.mean((0, 1)))
    return loss, orth


def random_batch(device, n, img_size=224, local_size=96):
    """Return a Batch as a loader gives it, for a GPU in pinned memory."""
    crops = []
    for views, side in ((2, img_size), (8, local_size)):
        some = torch.randint(0, 256, (n, views, 3, side, side), dtype=torch.uint8)
        crops.append(some.pin_memory() if device.type == "cuda" else some)
    return data.Batch(*crops, sample_seeds(0, torch.arange(n)), torch.zeros(n).long(), [])


def our_steps(run, batch, steps):
    """Return the loss and L_Orth of the last of so many steps."""
    for _ in range(steps):
        terms = train.train_step(run, 1, batch)
    return terms["loss"], terms["L_Orth"]


def step_row(device, size, n):
    """Whole steps on random crops; ours makes its views of them, the reference gets ready views."""
    batch = random_batch(device, n, size.img_size, size.local_size)
    ours = our_run(device, size, n, orth="dot")  # the reference's
    slow = reference_run(device, size, n)
    crops = (some.to(device) for some in batch[:2])
    views = augment.augment_views(*crops, batch.seeds, slow.recipe)

    def reference():
        vmamba.set_backend("auto" if device.type == "cuda" else "loop")
        values = reference_step(slow, views)
        vmamba.set_backend("auto")
        return values

    steps = STEPS_A_CALL[device.type]
    in_fp32 = partial(our_run, device, size, n, "fp32", **PLAIN)
    values = (lambda: our_steps(in_fp32(), batch, 1)), reference
    sides = partial(our_steps, ours, batch, steps), reference
    return Row(*sides, n * steps, rtol=1e-3, values=values, flops=True, reference_images=n)


def step_without_row(device, what, n=128):
    """What 'compiled blocks' or the 'side stream' of the views gain on a GPU, against without."""
    size = Size("vit_small", 16, 224, 96, 65536)
    batch = random_batch(device, n)
    without = {"compile": False} if what == "compiled blocks" else {}
    runs = [our_run(device, size, n, recipe="caug+", **options) for options in ({}, without)]
    if what == "side stream":
        runs[1].stream = None
    steps = STEPS_A_CALL[device.type]
    sides = [partial(our_steps, run, batch, steps) for run in runs]
    return Row(*sides, n * steps, rtol=1e-2, flops=True)


def busy_step_row(device):
    """The demo's step beside one busy process; reference: alone, on half the threads.

    That is the fair share on two cores. If waiting threads spin, it is a tenth of that.
    """
    config = configure(Config, [os.path.join(sys.path[0], "configs", "demo.py")])
    here = here_on(device)
    images, _ = data.open_for_training(config, here)
    run = train.make_run(config, len(images) // config.batch_size, here)
    batch = next(iter(data.train_loader(images, config, 0, 1, here)))
    threads = torch.get_num_threads()
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: pass"

    def step(n):
        torch.set_num_threads(n)
        logged = train.train_step(run, 0, batch)  # at a learning rate of 0: the same each time
        torch.set_num_threads(threads)
        return logged["L_CL"]

    def ours():
        busy = subprocess.Popen([sys.executable, "-c", spin])
        try:
            return step(threads)
        finally:
            busy.kill()

    return Row(ours, lambda: step(max(1, threads // 2)), len(batch.seeds), rtol=1e-2)


RECIPE_NAMES = {"baug": "BAug", "caug": "CAug", "caug+": "CAug+"}
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.05, 0.4)


def ten_crops(image, seed):
    return data.crop_views(image, seed, Config())


def reference_transforms(recipe):
    """Return the published scripts' transforms of a Pillow image, one for each of the ten crops."""

    def blur(picture):
        return picture.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2).item()))

    def crop(size, scale, kind):
        bicubic = T.InterpolationMode.BICUBIC
        steps = [T.RandomResizedCrop(size, scale, interpolation=bicubic), T.RandomHorizontalFlip()]
        if recipe.rotate:
            steps.append(T.RandomRotation(recipe.rotate))
        if recipe.elastic:
            elastic = T.ElasticTransform(recipe.elastic_alpha, sigma=5.0)
            steps.append(T.RandomApply([elastic], recipe.elastic))
        steps.append(T.RandomApply([T.ColorJitter(*recipe.jitter_strength)], recipe.jitter))
        steps.append(T.RandomGrayscale(recipe.gray))
        steps.append(T.RandomApply([blur], recipe.blur[kind]))
        steps.append(T.RandomSolarize(128, recipe.solarize[kind]))
        return T.Compose([*steps, T.ToTensor(), T.Normalize(augment.MEAN, augment.STD)])

    local = crop(96, LOCAL_SCALE, augment.LOCAL)
    return [crop(224, GLOBAL_SCALE, 0), crop(224, GLOBAL_SCALE, 1), *[local] * 8]


def reference_views(transforms, pictures):
    """Return the views of n pictures, image by image: (2, n, 3, 224, 224), (8, n, 3, 96, 96)."""
    views = [torch.stack([f(picture) for picture in pictures]) for f in transforms]
    return torch.stack(views[:2]), torch.stack(views[2:])


def photos(n, H=440, W=440):
    """Make n images uint8 (3, H, W). Waves are the stronger the longer: they compress as photos."""
    images = torch.zeros(n, 3, H, W)
    generator = torch.Generator().manual_seed(0)
    for k in (2**i for i in range(9)):
        noise = torch.rand(n, 3, max(2, H // k), max(2, W // k), generator=generator) - 0.5
        images += F.interpolate(noise, size=(H, W), mode="bicubic") * k**0.7
    images = (images - images.mean()) / images.std() * 0.22 + 0.5
    return images.clamp(0, 1).mul(255).to(torch.uint8)


def folder_of_jpegs(images):
    """Write the images to a folder that lives as long as this process."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    for i, image in enumerate(images):
        torchvision.io.write_jpeg(image, os.path.join(folder, f"{i}.jpg"), quality=90)
    return folder


def views_row(recipe, n=8):
    """All ten crops of decoded images, on one core, from cropping to normalized floats."""
    images = photos(n)
    pictures = [to_pil_image(image) for image in images]
    reference = partial(reference_views, reference_transforms(augment.RECIPES[recipe]), pictures)
    calls = itertools.count()

    def ours():
        seeds = sample_seeds(next(calls), torch.arange(n))
        crops = zip(*map(ten_crops, images, seeds))
        return augment.augment_views(*map(torch.stack, crops), seeds, augment.RECIPES[recipe])

    def moments(make):  # random numbers differ, so distributions are compared, of a few batches
        torch.manual_seed(0)
        pixels = [torch.cat([x.flatten() for x in some]) for some in zip(*(make() for _ in "123"))]
        # means lie near 0, hence + 5: the tolerance is a quarter of a std
        return [moment(x) + 5 for x in pixels for moment in (torch.mean, torch.std)]

    values = partial(moments, ours), partial(moments, reference)
    return Row(ours, reference, n, rtol=0.05, values=values, one_core=True)


def small_crops_row(n=128):
    """The crops of a batch of small images, at once; reference: image by image, as from files."""
    config = Config(img_size=48, local_size=24, local_crops=4, batch_size=n, workers=0)
    images = shapes("train", 64, n)
    here = here_on(torch.device("cpu"), "fp32")

    def crops(some):
        return next(iter(data.train_loader(some, config, 0, 1, here)))[:2]

    sides = [partial(crops, some) for some in (images, replace(images, pixels=None))]
    return Row(*sides, n, rtol=0, one_core=True)


def photo_row(H=2000, W=3000):
    """The ten crops of a large JPEG, decoded no larger than needed; reference: decoded whole."""
    whole = sources.open_images(folder_of_jpegs(photos(1, H, W)), "train")

    def crops(images):
        return ten_crops(images.read(0), sample_seeds(0, torch.tensor(0)))

    limited = limit_decode(whole, Config())
    sides = [partial(crops, images) for images in (limited, whole)]
    return Row(*sides, images=1, rtol=0.02, one_core=True)


def end_to_end_row(device, folder, arch, recipe, n):
    """From JPEG files to a new student; reference: Pillow, torchvision's transforms, its own step.

    A call starts the loading processes, two or one less than a GPU's host has cores.
    """
    gpu = device.type == "cuda"
    workers = len(os.sched_getaffinity(0)) - 1 if gpu else 2
    images = sources.open_images(folder or folder_of_jpegs(photos(16)), "train")
    options = dict(recipe=recipe, workers=workers)
    ours = our_run(device, Size(arch, 16, 224, 96, 4096), n, **options, drop_path=0.0)
    slow = reference_run(device, Size(arch, 16, 224, 96, 4096), n, **options)
    transforms = reference_transforms(slow.recipe)
    limited = limit_decode(images, ours.config)

    def order(steps):
        return torch.arange(n * steps) % len(images)

    def run_ours(steps):
        many = subset(limited, order(steps))
        for batch in data.train_loader(many, ours.config, 0, steps, ours.here):
            loss, _ = our_steps(ours, batch, 1)
        return loss

    def load(numbers):
        return reference_views(transforms, [pil_loader(images.name(i)) for i in numbers])

    def run_reference(steps):
        options = dict(collate_fn=load, num_workers=workers, pin_memory=gpu)
        for views in torch.utils.data.DataLoader(order(steps), n, **options):
            loss, _ = reference_step(slow, [x.to(device) for x in views])
        return loss

    steps, slow_steps = (200, 20) if gpu else (8, 8)
    sides = partial(run_ours, steps), partial(run_reference, slow_steps)
    # views differ at random (views_row compares them); a fresh head's loss is near ln K either way
    values = partial(run_ours, 1), partial(run_reference, 1)
    return Row(*sides, n * steps, rtol=0.1, values=values, reference_images=n * slow_steps)


def loss_row(device, n=64, K=65536, d=256):
    """L_CL and L_Orth over ten views with both heads' last layers, forward and backward."""
    torch.manual_seed(0)
    center, temps = torch.zeros(K, device=device), (0.1, 0.04)
    pairs = {}  # pair term -> student's unit vectors, its last layer, the teacher's
    for term in (losses.cross_entropy, losses.dot):
        student, teacher = (F.normalize(torch.randn(v, n, d), dim=-1).to(device) for v in (10, 2))
        layers = [WeightNormLinear(d, K).to(device) for _ in ("student", "teacher")]
        pairs[term] = student.requires_grad_(), layers[0], teacher, layers[1]

    def run(pair_loss):
        for student, layer, *_ in pairs.values():
            student.grad = layer.weight_v.grad = None
        total = sum(pair_loss(term, *pair) for term, pair in pairs.items())
        total.backward()
        return total, *(layer.weight_v.grad.norm() for _, layer, *_ in pairs.values())

    def ours(*given):
        return fused.prototype_loss(*given, center, temps)[0]

    def reference(term, student, layer, teacher, teacher_layer):
        t = teacher_layer(teacher).detach()  # (2, B, K)
        return losses.pair_loss(term, layer(student), t, center, *temps)

    return Row(lambda: run(ours), lambda: run(reference), images=n, rtol=1e-4, flops=True)


def scan_row(device, n=2, channels=384, L=3136):
    """selective_scan at VMamba-T's first stage, both ways; reference: a loop, on a GPU PyTorch."""
    torch.manual_seed(0)
    shapes_given = [(n, channels, L)] * 2 + [(channels, 1)] + [(n, 4, 1, L)] * 2 + [(channels,)] * 2
    given = [torch.randn(*shape).to(device) for shape in shapes_given]  # u, delta, A, B, C, D, bias
    given[2] = -given[2].exp()
    given = [x.requires_grad_() for x in given]

    def run(backend):
        y = vmamba.selective_scan(*given, backend=backend)
        return y, *torch.autograd.grad(y.square().mean(), given)

    slow = "torch" if device.type == "cuda" else "loop"
    # forward reads u, delta, B, C and writes y; backward reads them and y's gradient and writes
    # theirs; a row of B and C serves channels / 4 of u
    moved = 4 * n * L * (channels * (3 + 5) + 4 * (2 + 4))
    return Row(lambda: run(None), lambda: run(slow), images=n, rtol=1e-3, bytes=moved)


def vmamba_row(device, n=2):
    """vmamba_tiny at 224 pixels, forward and backward; reference: the same with the loop."""
    torch.manual_seed(0)
    backbone = build_backbone("vmamba_tiny").to(device)
    x = torch.randn(n, 3, 224, 224, device=device)

    def run(backend):
        vmamba.set_backend(backend, device)
        backbone.zero_grad()
        backbone(x).square().mean().backward()
        vmamba.set_backend("auto")
        return backbone.patch_embed[0].weight.grad

    return Row(lambda: run("auto"), lambda: run("loop"), images=n, rtol=1e-3, flops=True)


def features_row(device, n=512):
    """z from decoded pixels; reference: torchvision's test transform, then every token in fp32."""
    torch.manual_seed(0)
    images = shapes("train", 64, n)
    backbone = build_backbone("vit_micro", 64, 8).to(device).eval()
    steps = [T.Resize(64, T.InterpolationMode.BICUBIC), T.CenterCrop(64), T.ToTensor()]
    transform = T.Compose([*steps, T.Normalize(augment.MEAN, augment.STD)])
    pictures = [to_pil_image(images.read(i)) for i in range(n)]

    def ours(precision="auto"):
        orig = [augment.perturbation("orig")]
        return features.extract(backbone, images, orig, 64, here_on(device, precision))[0][0]

    @torch.no_grad()
    def reference():
        x = torch.stack([transform(picture) for picture in pictures]).to(device)
        return torch.cat([backbone.tokens(part)[0][:, 0] for part in x.split(256)])

    return Row(ours, reference, n, rtol=1e-3, values=(lambda: ours("fp32"), reference))


def linear_row(device, n=2048, n_test=32):
    """The whole linear evaluation of one epoch: full, ir, ef; five learning rates; nine tests.

    Reference: one probe with one learning rate, tested on clean images.
    """
    torch.manual_seed(0)
    backbone = build_backbone("vit_micro", 64, 8).to(device)
    models = [evaluation.Model("clever", backbone, int(0.8 * backbone.dim), dict(arch="vit_micro"))]
    images = shapes("train", 64, n), shapes("val", 64, n_test)
    options = dict(ckpt="-", epochs=1, batch_size=256, workers=0)
    everything = eval_linear.LinearConfig(**options)
    single = eval_linear.LinearConfig(**options, part="full", lrs=(), tests="orig")

    def run(config):
        """Return the accuracy of full, at the fixed learning rate, on clean images."""
        tests = linear.perturbation_tests(config.tests), linear.perturbation_tests("orig")
        labels = linear.flipped, linear.own_label
        task = linear.Task("linear", *images, 10, *labels, *tests)
        with tempfile.TemporaryDirectory() as folder:
            state = EvalState(folder, dict(task="linear"))
            rows = linear.linear_probe(models, task, config, 64, here_on(device), state)
        fixed = dict(part="full", test="orig", classifier="linear, lr 0.001").items()
        [value] = [row["value"] for row in rows if row.items() >= fixed]
        return value

    return Row(lambda: run(everything), lambda: run(single), images=n, rtol=1e-3)


def labels_row(device, h=30, w=52, dim=384, radius=12, topk=5, temperature=0.1):
    """Labels of a DAVIS frame from eight; reference: all affinities, then far ones set to zero."""
    torch.manual_seed(0)
    unit = F.normalize(torch.randn(9, h, w, dim), dim=-1).to(device)
    labels = torch.rand(8, 3, h, w).to(device)
    y = torch.arange(h, device=device).repeat_interleave(w)
    x = torch.arange(w, device=device).repeat(h)

    def ours():
        return eval_seg.next_labels(unit[8], unit[:8], labels, radius, topk, temperature)

    def reference():
        near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
        frames = unit.flatten(1, 2)  # (9, h*w, dim)
        affinity = [(frame @ frames[8].T / temperature).exp() * near for frame in frames[:8]]
        affinity = torch.cat(affinity)  # (8*h*w, h*w)
        affinity[affinity < affinity.topk(topk, dim=0).values[-1]] = 0
        return (labels.transpose(0, 1).flatten(1) @ (affinity / affinity.sum(0))).view(-1, h, w)

    return Row(ours, reference, images=1, rtol=1e-3)


def rows(device, folder):
    """Return {name: () -> Row} for a device and a folder of JPEGs."""
    gpu = device.type == "cuda"
    found = {}
    for size, *batches in STEPS:
        n = batches[gpu]
        patch = f"/{size.patch_size}" if size.arch.startswith("vit") else ""
        crops = f"2x{size.img_size}+8x{size.local_size}"
        if n:
            name = f"step {size.arch}{patch}, {crops}, batch {n}, K {size.out_dim}"
            found[name] = partial(step_row, device, size, n)
    if gpu:
        for what in ("compiled blocks", "side stream"):
            name = f"step vit_small/16, CAug+, {what} or not"
            found[name] = partial(step_without_row, device, what)
    else:
        found["demo's step beside a busy process / half alone"] = partial(busy_step_row, device)
    arch, n = ("vit_small", 128) if gpu else ("vit_micro", 16)
    for recipe in ("caug", "caug+"):
        name = f"JPEG to weights, {arch}/16, {RECIPE_NAMES[recipe]}, batch {n}"
        found[name] = partial(end_to_end_row, device, folder, arch, recipe, n)
    for recipe, name in RECIPE_NAMES.items():
        found[f"views {name}, one core"] = partial(views_row, recipe)
    found["crops of a JPEG of 2000x3000, one core"] = photo_row
    found["crops of 64 px images, 2x48+4x24, one core"] = small_crops_row
    n = 128 if gpu else 64
    found[f"loss and last layers, 10 views, batch {n}, K 65536"] = partial(loss_row, device, n)
    n = 64 if gpu else 2
    found[f"selective scan ({n}, 384, 3136), N 1"] = partial(scan_row, device, n)
    found["vmamba_tiny at 224, forward + backward"] = partial(vmamba_row, device)
    found["features, vit_micro/8 at 64 px"] = partial(features_row, device)
    found["label propagation, 30x52 patches of 8 frames"] = partial(labels_row, device)
    found["linear: 3 parts x 5 lrs x 9 tests / one probe"] = partial(linear_row, device)
    return found


SIDES = ("reference", "ours")


def table_line(row):
    """Return a row of bench.json as a line of the table, for the screen and docs/performance.md."""
    cells = [f"{row['row']:49}"]
    for side in SIDES:
        low, high = row[f"{side}_quartiles"]
        cells.append(f"{row[side]:.4g} ({low:.4g}..{high:.4g})".ljust(22))
    cells.append(f"{row['ratio']:.2f}x")
    peaks = [row[f"{side}_MB"] for side in SIDES]
    cells.append(" / ".join("-" if MB is None else f"{MB:,.0f}" for MB in peaks).rjust(14))
    cells.append((f"{row['of_limit']:.0%}" if row["of_limit"] else "").rjust(4))
    return f"| {' | '.join(cells)} |"


@functools.cache
def open_side(name, side, device, folder):
    """Build a row and set this process up as one of its sides needs it -> that side's call."""
    multiprocessing.set_start_method("fork", force=True)  # of loading workers
    if side == "ours" and device.type == "cpu":
        processor.keep_freed_memory()
    row = rows(device, folder)[name]()
    here_on(device, "auto" if side == "ours" else "fp32")  # each side's build has set its own
    if side == "reference":  # as torch has it by default, and so the published scripts
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(True)
    if row.one_core:
        torch.set_num_threads(1)
    return getattr(row, side)


def call_side(name, side, device, folder):
    return timed(open_side(name, side, device, folder), device)


def timed(call, device):
    """Return a call's seconds and the MB that it adds at its peak, None if that is unknown."""
    before = peak_memory(device, starts_now=True)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, None if before is None else peak_memory(device) - before


def peak_memory(device, starts_now=False):
    """Return the MB in use at the peak, which may start now; None if the system does not tell."""
    if device.type == "cuda":
        if starts_now:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError):
        if starts_now:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    return None


def limits(device):
    """Return the most this machine does: flops (a second, in our precision), bytes (of a copy)."""
    gpu = device.type == "cuda"
    n = 8192 if gpu else 2048
    dtype = torch.bfloat16 if here_on(device).precision == "bf16" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    big = torch.zeros(2**28 if gpu else 2**26, device=device)
    target = torch.empty_like(big)
    product = min(timed(lambda: a @ a, device)[0] for _ in range(6))
    copy = min(timed(lambda: target.copy_(big), device)[0] for _ in range(6))
    return dict(flops=2 * n**3 / product, bytes=8 * len(big) / copy)  # read and written


def count_flops(call):
    """Count the operations of a call's matrix products and convolutions, backward ones too."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def profile_table(call, device):
    """Return where the time of three calls goes, by operator, on a GPU by kernel, largest first."""
    gpu = device.type == "cuda"
    call()
    kinds = torch.profiler.ProfilerActivity
    activity = kinds.CUDA if gpu else kinds.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(3):
            call()
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=12)


def time_sides(name, device, config):
    """Call both sides of a row in turns -> {side: [(seconds, MB) of each call]}."""
    seen = {side: [] for side in SIDES}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as one, ProcessPoolExecutor(1, spawn) as other:
        for _ in tqdm(range(config.repeats + 1), desc=name, leave=False):
            for side, pool in zip(SIDES, (one, other)):
                called = pool.submit(call_side, name, side, device, config.data)
                seen[side].append(called.result())
    return seen


def measure(name, make, device, config, most):
    """Check and time a row -> its entry in bench.json."""
    row = make()
    row.check()
    # seconds that a call takes at least
    needs = count_flops(row.ours) / most["flops"] if row.flops else row.bytes / most["bytes"]
    images = dict(ours=row.images, reference=row.reference_images or row.images)
    del row
    gc.collect()  # the sides need the memory
    torch.cuda.empty_cache()
    result = {"row": name}
    for side, (warm_up, *calls) in time_sides(name, device, config).items():
        rates = torch.tensor([images[side] / seconds for seconds, _ in calls])
        low, result[side], high = rates.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        result |= {f"{side}_quartiles": [low, high], f"{side}_MB": warm_up[1]}
    result["ratio"] = result["ours"] / result["reference"]
    result["of_limit"] = needs * result["ours"] / images["ours"]
    return result


def main(argv):
    config = configure(BenchConfig, argv)
    device = machine.choose_device(config.device)
    known = rows(device, config.data)
    chosen = {name: make for name, make in known.items() if config.rows in name}
    if not chosen:
        raise UsageError(f"rows={config.rows}: no such row; choose from {'; '.join(known)}")
    if config.data and not os.path.isdir(config.data):
        raise UsageError(f"data={config.data}: no such folder; omit --data to use generated JPEGs")
    if config.json and not os.path.isdir(os.path.dirname(config.json) or "."):
        raise UsageError(f"json={config.json}: its folder does not exist; create it")
    if config.profile:
        for name, make in chosen.items():
            print(f"{name}: our side", profile_table(make().ours, device), sep="\n", flush=True)
        return
    name = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else name
    facts = dict(device=name, torch=torch.__version__, precision=here_on(device).precision)
    facts["limits"] = most = limits(device)
    most_of = f"{most['flops'] / 1e9:,.0f} GFLOP/s, {most['bytes'] / 1e9:,.0f} GB/s"
    print(f"{name}, torch {facts['torch']}, {facts['precision']}: at most {most_of}")
    print(f"Median of {config.repeats} (quartiles), in turns; MB: what a call adds at its peak\n")
    head = f"| {'images per second':49} | {'reference':22} | {'ours':22}"
    print(f"{head} | ratio | MB, both sides | limit |\n|---|--:|--:|--:|--:|--:|", flush=True)
    table = []
    for name, make in chosen.items():
        table.append(measure(name, make, device, config, most))
        print(table_line(table[-1]), flush=True)
        if config.json:
            with open(config.json, "w") as file:
                json.dump(dict(**facts, rows=table), file, indent=1)


if __name__ == "__main__":
    machine.run_main(main)
