"""How fast, and against what: each row times our path and the textbook's, in turns in one run, after checking that both compute the same.

    python bench.py                    all rows, one to two minutes each on two CPU cores
    python bench.py --rows=step        rows whose name contains 'step'
    python bench.py --json=bench.json  also to a file
    python bench.py --profile=True --rows=vit_tiny      instead: where our side's time goes

Textbook: the same mathematics as the published scripts write it. A step in fp32, losses by a loop over pairs, every token through the last
block, clip and EMA by a loop over parameters; the views image by image through torchvision's transforms on Pillow images. Each side is a
process of its own, so that ours keeps its freed memory and the textbook has what Python starts with; both may use all cores.
Peak memory is what the first call adds to a process that has its weights and inputs. Beside the rate stands the share of what this machine could
do: of its rate at a large matrix product in our precision (MFU), or of its rate at copying memory."""

import atexit
import contextlib
import gc
import io
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
import torchvision
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torchvision.transforms.functional import to_pil_image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import eval_linear
import eval_seg
import losses
import probe
import train
import vmamba
from augment import MEAN, RECIPES, STD, augment_views, crop_views
from configurator import Config, UsageError, configure, exit_on_usage_error
from draws import key
from model import WeightNormLinear, build_backbone
from probe import choose_device, choose_precision


@dataclass
class BenchConfig:
    """Knobs of bench.py."""

    rows: str = ""  # only rows whose name contains this
    data: str = ""  # folder of JPEGs for the end-to-end row; without one they are made
    repeats: int = 7  # of each side, after one warm-up; the medians are compared
    device: str = "auto"
    json: str = ""  # also write the rows to this file
    profile: bool = (
        False  # instead of comparing, share out our side's time among PyTorch's operators
    )


RECIPE_NAMES = (("baug", "BAug"), ("caug", "CAug"), ("caug+", "CAug+"))


class Row(NamedTuple):
    """Two ways to one result."""

    ours: Callable
    textbook: Callable
    images: int  # a call of either
    check: Callable  # raises UsageError where the two differ in value
    flops: bool = (
        False  # what limits our side: the arithmetic of its matrix products, which is counted;
    )
    bytes: float = 0  # or that one call must move so many bytes
    textbook_images: int = 0  # a call of the textbook, where it is another number


def must_agree(what, ours, textbook, rtol):
    """Refuse to time two things that are not the same."""
    if not abs(ours - textbook) <= rtol * abs(textbook):
        raise UsageError(
            f"{what}: ours gives {ours:.6g}, the textbook {textbook:.6g}; a comparison of speed would mean nothing"
        )


# ------------------------------------------------------------------------------------------------ the training step


def textbook_terms(config, student, teacher, centers, views):
    """L_CL, L_Orth, L_PReg by the loop over pairs -> the terms, the teacher's logits."""

    def forward(network, views):
        z = torch.cat(
            [
                network.backbone.tokens(images.flatten(0, 1))[0][:, 0]
                if hasattr(network.backbone, "tokens")
                else network.backbone(images.flatten(0, 1))
                for images in views
            ]
        )
        d = network.head_ir.mlp[0].in_features
        return network.head_ir(z[:, :d]).chunk(sum(map(len, views))), network.head_ef(
            z[:, d:]
        ).chunk(sum(map(len, views)))

    with torch.no_grad():
        t_ir, t_ef = forward(teacher, views[:1])
    s_ir, s_ef = forward(student, views)
    cross, dot, pairs = 0, 0, 0
    for i in range(2):
        for v in range(len(s_ir)):
            if v != i:
                q = F.softmax((t_ir[i] - centers["ir"]) / config.teacher_temp, dim=-1).detach()
                cross = (
                    cross
                    + torch.sum(
                        -q * F.log_softmax(s_ir[v] / config.student_temp, dim=-1), dim=-1
                    ).mean()
                )
                q = F.softmax((t_ef[i] - centers["ef"]) / config.teacher_temp, dim=-1).detach()
                dot = (
                    dot
                    + torch.sum(q * F.softmax(s_ef[v] / config.student_temp, dim=-1), dim=-1).mean()
                )
                pairs += 1
    norms = [
        sum(torch.norm(p) ** 2 for p in head.parameters())
        for head in (student.head_ir, student.head_ef)
    ]
    return (cross / pairs, dot / pairs, (norms[1] - norms[0]).abs()), {
        "ir": torch.cat(t_ir),
        "ef": torch.cat(t_ef),
    }


def textbook_step(run, views):
    (cross, dot, preg), logits = textbook_terms(
        run.config, run.network, run.teacher, run.centers, views
    )
    loss = cross + dot + run.config.lam * preg
    loss.item()  # the scripts look at each loss
    run.optimizer.zero_grad()
    loss.backward()
    for p in run.network.parameters():
        if p.grad is not None:
            norm = p.grad.norm(2)
            if 3.0 / (norm + 1e-6) < 1:
                p.grad.mul_(3.0 / (norm + 1e-6))
    run.optimizer.step()
    with torch.no_grad():
        for p, q in zip(run.teacher.parameters(), run.network.parameters()):
            p.mul_(0.996).add_((1 - 0.996) * q)
        for name, t in logits.items():
            run.centers[name] = run.centers[name] * 0.9 + t.mean(0) * 0.1
    return loss


def random_crops_of(device, batch, img_size, local_size):
    """As a loader gives them, for a GPU in pinned memory."""
    crops = [
        torch.randint(0, 256, (batch, n, 3, size, size), dtype=torch.uint8)
        for n, size in ((2, img_size), (8, local_size))
    ]
    return [some.pin_memory() for some in crops] if device.type == "cuda" else crops


def step_knobs(device, arch, patch_size, img_size, local_size, batch, out_dim):
    return dict(
        arch=arch,
        patch_size=patch_size,
        img_size=img_size,
        local_size=local_size,
        batch_size=batch,
        out_dim=out_dim,
        local_crops=8,
        warmup_epochs=0,
        freeze_last_layer=0,
        log_every=10**6,
        max_batch_per_gpu=batch,
        device=device.type,
    )


def step_row(device, arch, patch_size, img_size, local_size, batch, out_dim):
    """Whole steps on random crops; ours includes the device stage of the views, the textbook gets ready views."""
    knobs = step_knobs(device, arch, patch_size, img_size, local_size, batch, out_dim)
    crops = random_crops_of(device, batch, img_size, local_size)
    keys = key(0, torch.arange(batch))
    ours, slow = (
        train.make_run(
            Config(precision=precision, drop_path=rate, compile=compiled, **knobs), 1000, device
        )
        for precision, rate, compiled in (("auto", 0.1, None), ("fp32", 0.0, False))
    )
    slow.optimizer = torch.optim.AdamW(
        [p for p in slow.network.parameters() if p.requires_grad], lr=1e-6, foreach=False
    )
    views = [
        v.to(device)
        for v in augment_views(crops[0].to(device), crops[1].to(device), keys, slow.recipe)
    ]

    def check():
        terms = [
            term.item()
            for term in textbook_terms(
                slow.config, slow.network, slow.teacher, slow.centers, views
            )[0]
        ]
        got = train.train_step(train.make_run(slow.config, 1000, device), 0, *crops, keys)
        norm = losses.squared_norm(
            slow.network.head_ir
        ).item()  # L_PReg is a small difference of two such sums: theirs is the rounding
        for name, expected, offset in zip(("L_CL", "L_Orth", "L_PReg"), terms, (0, 0, norm)):
            must_agree(name, got[name].item() + offset, expected + offset, 1e-3)

    def textbook():
        vmamba.default_backend = None if device.type == "cuda" else "loop"
        return textbook_step(slow, views).item()

    return Row(
        lambda: some_steps(ours, crops, keys),
        textbook,
        batch * steps_a_call(device),
        check,
        flops=True,
        textbook_images=batch,
    )


def steps_a_call(device):
    """So many that Python can run ahead of a GPU, as it does in training; textbook_step waits for each, as the scripts do."""
    return 10 if device.type == "cuda" else 1


def some_steps(run, crops, keys):
    for _ in range(steps_a_call(run.device)):
        logged = train.train_step(run, 1, *crops, keys)
    return logged["loss"].item()  # waits for the device


def step_without_row(device, what, batch=64):
    """What one of a GPU's means brings to vit_small's step: 'compiled blocks' or 'side stream' of the views; textbook: our own without."""
    knobs = step_knobs(device, "vit_small", 16, 224, 96, batch, 65536) | dict(recipe="caug+")
    crops, keys = random_crops_of(device, batch, 224, 96), key(0, torch.arange(batch))
    ours, without = (
        train.make_run(Config(compile=compiled, **knobs), 1000, device)
        for compiled in (None, None if what == "side stream" else False)
    )
    without.side_stream = None if what == "side stream" else without.side_stream
    return Row(
        lambda: some_steps(ours, crops, keys),
        lambda: some_steps(without, crops, keys),
        batch * steps_a_call(device),
        lambda: must_agree(
            "loss", some_steps(ours, crops, keys), some_steps(without, crops, keys), 1e-2
        ),
        flops=True,
    )


# ------------------------------------------------------------------------------------------------ the views


def textbook_views(recipe):
    """The published scripts' transforms of the ten crops, on a Pillow image."""

    def crop(size, scale, kind):
        steps = [
            T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5),
        ]
        steps += [T.RandomRotation((-recipe.rotate, recipe.rotate))] if recipe.rotate else []
        steps += (
            [
                T.RandomApply(
                    [T.ElasticTransform(alpha=recipe.elastic_alpha, sigma=5.0)], p=recipe.elastic
                )
            ]
            if recipe.elastic
            else []
        )
        steps += [
            T.RandomApply([T.ColorJitter(*recipe.jitter_strength)], p=recipe.jitter),
            T.RandomGrayscale(recipe.grey),
        ]
        steps += [
            T.Lambda(
                lambda im: (
                    im.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
                    if random.random() < recipe.blur[kind]
                    else im
                )
            )
        ]
        return T.Compose(
            [
                *steps,
                T.RandomSolarize(128, recipe.solarize[kind]),
                T.ToTensor(),
                T.Normalize(MEAN, STD),
            ]
        )

    return [crop(224, (0.4, 1.0), 0), crop(224, (0.4, 1.0), 1)] + [crop(96, (0.05, 0.4), 2)] * 8


def on_one_core(function):
    def timed():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return timed


def views_row(recipe, n=8):
    """All ten crops of decoded 440 x 440 images, on one core, from cropping to normalised floats."""
    noise = torch.rand(n, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(noise, size=(440, 440), mode="bicubic").clamp(0, 1) * 255).to(
        torch.uint8
    )
    pictures, transforms, calls = (
        [to_pil_image(image) for image in images],
        textbook_views(RECIPES[recipe]),
        iter(range(10**9)),
    )

    def ours():
        keys = key(next(calls), torch.arange(n))
        crops = [
            crop_views(image, k, 224, 96, 8, (0.4, 1.0), (0.05, 0.4))
            for image, k in zip(images, keys)
        ]
        return augment_views(
            torch.stack([g for g, _ in crops]),
            torch.stack([l for _, l in crops]),
            keys,
            RECIPES[recipe],
        )

    def textbook():
        views = [[transform(picture) for transform in transforms] for picture in pictures]
        return [
            torch.stack([torch.stack(v[:2]) for v in views], 1),
            torch.stack([torch.stack(v[2:]) for v in views], 1),
        ]

    def moments(
        make,
    ):  # the draws differ, so distributions are compared: mean and std of pixels over a few batches
        pixels = [torch.cat([make()[i].flatten() for _ in range(3)]) for i in range(2)]
        return [f(p).item() for p in pixels for f in (torch.mean, torch.std)]

    def check():
        torch.manual_seed(0), random.seed(0)
        for name, a, b in zip(
            ("mean, global", "std, global", "mean, local", "std, local"),
            moments(ours),
            moments(textbook),
        ):
            must_agree(
                f"pixels' {name}", a + 5, b + 5, 0.05
            )  # means lie near 0: an absolute tolerance of a quarter of a std

    return Row(on_one_core(ours), on_one_core(textbook), n, check)


def device_views_row(device, recipe, batch=64):
    """The device stage of all ten crops, copied there as uint8; textbook: the same stage on all the host's cores."""
    crops = random_crops_of(device, batch, 224, 96)
    keys = key(0, torch.arange(batch))

    def on(where):
        views = augment_views(
            *(some.to(where, non_blocking=True) for some in crops), keys, RECIPES[recipe]
        )
        return [view.flatten()[0].item() for view in views] and views

    def check():
        for name, a, b in zip(("global", "local"), on(device), on(torch.device("cpu"))):
            must_agree(
                f"{name} views, apart from their mean difference,",
                1 + (a.cpu() - b).abs().mean().item(),
                1,
                1e-3,
            )

    return Row(lambda: on(device), lambda: on(torch.device("cpu")), batch, check)


def photo_row(H=2000, W=3000):
    """The ten crops of a large JPEG on one core, decoded no larger than they need; textbook: decoded whole. Its waves are the stronger the
    longer, so that it compresses as a photograph does, to 1.2 bits a pixel."""
    rng = torch.Generator().manual_seed(0)
    octaves = [
        F.interpolate(
            torch.rand(1, 3, max(2, H // k), max(2, W // k), generator=rng) - 0.5,
            size=(H, W),
            mode="bicubic",
        )[0]
        * k**0.7
        for k in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ]
    image = sum(octaves)
    folder = tempfile.mkdtemp()
    torchvision.io.write_jpeg(
        ((image - image.mean()) / image.std() * 0.22 + 0.5).clamp(0, 1).mul(255).to(torch.uint8),
        os.path.join(folder, "0.jpg"),
        quality=90,
    )
    atexit.register(shutil.rmtree, folder)
    whole = data.open_images(folder, "train")
    reduced = data.reduced(whole, Config())

    def crops(images):
        return crop_views(
            images.read(0), key(0, torch.tensor(0)), 224, 96, 8, (0.4, 1.0), (0.05, 0.4)
        )

    def check():
        for kind, a, b in zip(("global", "local"), crops(reduced), crops(whole)):
            difference = (a.float() - b.float()).abs().mean().item()
            must_agree(
                f"pixels of {kind} crops, apart from their mean difference,",
                255 + difference,
                255,
                0.01,
            )

    return Row(on_one_core(lambda: crops(reduced)), on_one_core(lambda: crops(whole)), 1, check)


# ------------------------------------------------------------------------------------------------ from JPEGs to weights


def end_to_end_row(device, folder, arch, recipe, batch, n=64):
    """From JPEG files to a new student, two loading processes on a CPU, all cores but one on a GPU's host; textbook: Pillow, torchvision's
    transforms image by image, textbook_step. A call begins with the start of its loading processes and ends with the last of its batches, so that
    nothing is loaded outside of the time that is taken. Without bench.py's --data the files are soft noise of 440 x 440."""
    if not folder:
        folder, noise = (
            tempfile.mkdtemp(),
            torch.rand(n, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        )
        for i, image in enumerate(
            (F.interpolate(noise, size=(440, 440), mode="bicubic").clamp(0, 1) * 255).to(
                torch.uint8
            )
        ):
            torchvision.io.write_jpeg(image, os.path.join(folder, f"{i}.jpg"), quality=90)
        atexit.register(shutil.rmtree, folder)
    gpu = device.type == "cuda"
    workers, steps, textbook_steps = (
        (len(os.sched_getaffinity(0)) - 1, 200, 20) if gpu else (2, 8, 8)
    )  # the textbook's are many times slower there
    images = data.open_images(folder, "train")
    knobs = dict(
        arch=arch,
        patch_size=16,
        batch_size=batch,
        out_dim=4096,
        recipe=recipe,
        warmup_epochs=0,
        freeze_last_layer=0,
        log_every=10**6,
        max_batch_per_gpu=batch,
        device=device.type,
        workers=workers,
    )
    ours, slow = (
        train.make_run(
            Config(precision=precision, drop_path=0.0, compile=compiled, **knobs), 1000, device
        )
        for precision, compiled in (("auto", None), ("fp32", False))
    )
    slow.optimizer = torch.optim.AdamW(
        [p for p in slow.network.parameters() if p.requires_grad], lr=1e-6, foreach=False
    )
    dataset = _Transformed(
        [images.name(i) for i in range(len(images))], textbook_views(RECIPES[recipe])
    )
    many = data.subset(data.reduced(images, ours.config), torch.arange(batch * steps) % len(images))

    def run_ours(steps=steps):
        for crops in data.train_loader(many, ours.config, 0, steps, 0, 1, device):
            logged = train.train_step(ours, 1, *crops[:3])
        return logged["loss"].item()

    def textbook(steps=textbook_steps):
        batches = [
            [i % len(images) for i in range(start, start + batch)]
            for start in range(0, batch * steps, batch)
        ]
        for views in torch.utils.data.DataLoader(
            dataset, batch_sampler=batches, num_workers=workers, pin_memory=gpu
        ):
            loss = textbook_step(slow, [some.transpose(0, 1).to(device) for some in views])
        return loss.item()

    def check():  # the views differ by draw (views_row compares them, step_row the steps); K prototypes of a fresh head: a loss near ln K either way
        must_agree("loss", run_ours(1), textbook(1), 0.1)

    return Row(run_ours, textbook, batch * steps, check, textbook_images=batch * textbook_steps)


class _Transformed(torch.utils.data.Dataset):
    """The published scripts' way: open with Pillow, then each transform for each crop."""

    def __init__(self, paths, transforms):
        self.paths, self.transforms = paths, transforms

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as file:
            picture = file.convert("RGB")
        views = [transform(picture) for transform in self.transforms]
        return torch.stack(views[:2]), torch.stack(views[2:])


# ------------------------------------------------------------------------------------------------ the loss


def loss_row(device, batch=64, K=65536, d=256):
    """L_CL and L_Orth over ten views with both heads' last layers, forward and backward, from the unit vectors in front of the prototypes."""
    torch.manual_seed(0)
    heads = [
        [WeightNormLinear(d, K).to(device) for _ in ("student", "teacher")] for _ in ("ir", "ef")
    ]
    units = [
        [F.normalize(torch.randn(n, batch, d), dim=-1).to(device) for n in (10, 2)]
        for _ in ("ir", "ef")
    ]
    center = torch.zeros(K, device=device)

    def run(function):
        total = 0
        for layer, _ in heads:
            layer.weight_v.grad = None
        for kind, (layer, teacher_layer), (student, teacher) in zip(
            ("cross-entropy", "dot"), heads, units
        ):
            total = total + function(
                kind, student.clone().requires_grad_(), layer, teacher, teacher_layer
            )
        total.backward()
        return total.item()

    def by_pairs(kind, student, layer, teacher, teacher_layer):
        with torch.no_grad():
            t = F.linear(teacher, F.normalize(teacher_layer.weight_v, dim=-1))  # (2, B, K)
        s, total = F.linear(student, F.normalize(layer.weight_v, dim=-1)), 0  # (V, B, K)
        for i in range(2):
            for v in range(10):
                if v != i:
                    q = F.softmax((t[i] - center) / 0.04, dim=-1)
                    term = (
                        -q * F.log_softmax(s[v] / 0.1, dim=-1)
                        if kind == "cross-entropy"
                        else q * F.softmax(s[v] / 0.1, dim=-1)
                    )
                    total = total + term.sum(-1).mean()
        return total / 18

    def ours(kind, student, layer, teacher, teacher_layer):
        return losses.against_prototypes(
            kind, student, layer, teacher, teacher_layer, center, 0.1, 0.04
        )[0]

    def check():
        (loss, *gradients), (expected, *wanted) = (
            (run(way), *(layer.weight_v.grad.norm().item() for layer, _ in heads))
            for way in (ours, by_pairs)
        )
        must_agree("loss", loss, expected, 1e-4)
        for name, gradient, want in zip(("ir", "ef"), gradients, wanted):
            must_agree(f"norm of the gradient by {name}'s prototypes", gradient, want, 1e-4)

    return Row(lambda: run(ours), lambda: run(by_pairs), batch, check, flops=True)


# ------------------------------------------------------------------------------------------------ the selective scan


def scan_row(device, images=2, channels=384, L=3136):
    """selective_scan forward and backward at VMamba-T's first stage; textbook: the loop, on a GPU the scan in PyTorch."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    given = [
        x.requires_grad_()
        for x in (
            normal(images, channels, L),
            normal(images, channels, L),
            -normal(channels, 1).exp(),
            normal(images, 4, 1, L),
            normal(images, 4, 1, L),
            normal(channels),
            normal(channels),
        )
    ]

    textbook = "torch" if device.type == "cuda" else "loop"

    def run(backend):
        y = vmamba.selective_scan(*given, backend=backend)
        grads = torch.autograd.grad(y.square().mean(), given)
        return y.detach().cpu(), *(g.cpu() for g in grads)  # also waits for the device

    def check():
        for name, ours, slow in zip(
            ("y", "u", "delta", "A", "B", "C", "D", "bias"), run(None), run(textbook)
        ):
            must_agree(
                f"1 + the largest difference of {name}, relative",
                1 + ((ours - slow).abs().max() / slow.abs().max()).item(),
                1.0,
                1e-3,
            )

    # forward reads u, delta, B, C and writes y; backward reads them and y's gradient and writes theirs; a row of B and C serves channels / 4 of u
    moved = 4 * images * L * (channels * (3 + 5) + 4 * (2 + 4))
    return Row(lambda: run(None), lambda: run(textbook), images, check, bytes=moved)


def vmamba_row(device, batch=2):
    """vmamba_tiny at 224 pixels, forward and backward; textbook: the same with the loop."""
    torch.manual_seed(0)
    backbone, x = (
        build_backbone("vmamba_tiny").to(device),
        torch.randn(batch, 3, 224, 224, device=device),
    )

    def run(backend):
        vmamba.default_backend = backend
        backbone.zero_grad()
        loss = backbone(x).square().mean()
        loss.backward()
        vmamba.default_backend = None
        return backbone.patch_embed[0].weight.grad.norm().item()

    return Row(
        lambda: run(None),
        lambda: run("loop"),
        batch,
        lambda: must_agree("the first layer's gradient", run(None), run("loop"), 1e-3),
        flops=True,
    )


# ------------------------------------------------------------------------------------------------ the evaluations


def features_row(device, n=512):
    """z of 64-pixel images, from the decoded pixels on; textbook: image by image through torchvision's test transform, then every token in fp32."""
    torch.manual_seed(0)
    images, backbone = (
        data.shapes("train", 64, n),
        build_backbone("vit_micro", 64, 8).to(device).eval(),
    )
    transform = T.Compose(
        [
            T.Resize(64, T.InterpolationMode.BICUBIC),
            T.CenterCrop(64),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    pictures = [to_pil_image(images.read(i)) for i in range(n)]

    def ours(precision="auto"):
        return probe.features(
            backbone,
            images,
            [probe.perturbed("orig")],
            64,
            device,
            choose_precision(precision, device)[1],
        )[0][0]

    @torch.no_grad()
    def textbook():
        return torch.cat(
            [
                backbone.tokens(torch.stack([transform(p) for p in some]).to(device))[0][:, 0]
                for some in (pictures[i : i + 256] for i in range(0, n, 256))
            ]
        )

    return Row(
        ours,
        textbook,
        n,
        lambda: must_agree(
            "features", ours("fp32").square().mean().item(), textbook().square().mean().item(), 1e-3
        ),
    )


def linear_row(device, n=2048, n_test=32):
    """The whole linear evaluation against the cost of a single probe. Textbook: one classifier, one learning rate, clean test images. Ours: full,
    ir and ef, five learning rates, nine perturbations. One epoch, and more test images for it than 100 epochs of ImageNet have."""
    torch.manual_seed(0)
    models = [
        probe.Model(
            "clever", build_backbone("vit_micro", 64, 8).to(device), 0.8, dict(arch="vit_micro")
        )
    ]
    train_images, test_images = data.shapes("train", 64, n), data.shapes("val", 64, n_test)

    def run(config, tests):
        task = eval_linear.Task(
            "linear",
            train_images,
            test_images,
            10,
            eval_linear.flipped,
            eval_linear.own_label,
            eval_linear.perturbations(tests),
            eval_linear.perturbations("orig"),
        )
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            return eval_linear.linear_probe(
                models,
                task,
                config,
                64,
                device,
                choose_precision("auto", device)[1],
                eval_linear.Partial(folder, dict(task="linear")),
            )

    everything = eval_linear.LinearConfig(ckpt="-", epochs=1, batch_size=256, workers=0)
    single = eval_linear.LinearConfig(
        ckpt="-", epochs=1, batch_size=256, workers=0, part="full", lrs=()
    )
    ours, textbook = lambda: run(everything, everything.tests), lambda: run(single, "orig")

    def check():
        [fixed] = [
            row["value"]
            for row in ours()
            if (row["part"], row["test"], row["lr"]) == ("full", "orig", 0.001)
            and row["judge"] == "linear, lr 0.001"
        ]
        must_agree("accuracy at the fixed learning rate", fixed, textbook()[0]["value"], 1e-3)

    return Row(ours, textbook, n, check)


def labels_row(device, h=30, w=52, dim=384, radius=12, topk=5, temperature=0.1):
    """Labels of one frame of DAVIS by vit_small's tokens, from eight frames; textbook: all affinities at once, the far ones then set to zero."""
    generator = torch.Generator().manual_seed(0)
    unit = F.normalize(torch.randn(9, h, w, dim, generator=generator), dim=-1).to(device)
    labels = torch.rand(8, 3, h, w, generator=generator).to(device)
    y, x = (
        place.flatten().to(device)
        for place in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    )

    def ours():
        return eval_seg.next_labels(unit[8], unit[:8], labels, radius, topk, temperature).cpu()

    def textbook():
        near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
        target = unit[8].flatten(0, 1)
        affinity = torch.cat(
            [(source.flatten(0, 1) @ target.T / temperature).exp() * near for source in unit[:8]]
        )  # (8*h*w, h*w)
        kth = affinity.topk(topk, dim=0).values[-1]
        affinity[affinity < kth] = 0
        return (
            (labels.transpose(0, 1).flatten(1) @ (affinity / affinity.sum(0))).view(-1, h, w).cpu()
        )

    return Row(
        ours,
        textbook,
        1,
        lambda: must_agree(
            "1 + the largest difference of labels",
            1 + (ours() - textbook()).abs().max().item(),
            1.0,
            1e-3,
        ),
    )


def rows(device, folder):
    """{name: () -> Row} for a device and a folder of JPEGs; on a GPU with larger batches, for small ones would time how fast Python starts its kernels."""
    gpu = device.type == "cuda"

    def step(arch, patch_size, img_size, local_size, K, cpu_batch, gpu_batch):
        batch = gpu_batch if gpu else cpu_batch
        name = f"step {arch}{f'/{patch_size}' if arch.startswith('vit') else ''}, 2x{img_size}+8x{local_size}, batch {batch}, K {K}"
        return {name: lambda: step_row(device, arch, patch_size, img_size, local_size, batch, K)}

    def end_to_end(recipe):
        arch, batch = ("vit_small", 128) if gpu else ("vit_micro", 16)
        return {
            f"JPEG to weights, {arch}/16, {dict(RECIPE_NAMES)[recipe]}, batch {batch}": lambda: (
                end_to_end_row(device, folder, arch, recipe, batch)
            )
        }

    return {
        **step("vit_tiny", 8, 64, 32, 4096, 32, 512),
        **step("vit_tiny", 16, 224, 96, 65536, 8, 128),
        **step("vit_small", 16, 224, 96, 65536, 4, 64),
        **step("resnet18", 16, 224, 96, 65536, 4, 128),
        **step("resnet50", 16, 224, 96, 65536, 2, 64),
        **(
            step("vmamba_tiny", 16, 224, 96, 65536, 0, 32)
            if gpu
            else step("vmamba_micro", 16, 64, 32, 4096, 4, 0)
        ),
        **(
            {
                f"step vit_small/16, CAug+, {what} or not": lambda what=what: step_without_row(
                    device, what
                )
                for what in ("compiled blocks", "side stream")
            }
            if gpu
            else {}
        ),
        **{
            f"views {name}, one core": lambda recipe=recipe: views_row(recipe)
            for recipe, name in RECIPE_NAMES
        },
        **(
            {
                f"device stage of views {name}, batch 64": lambda recipe=recipe: device_views_row(
                    device, recipe
                )
                for recipe, name in RECIPE_NAMES
            }
            if gpu
            else {}
        ),
        "crops of a JPEG of 2000x3000, one core": lambda: photo_row(),
        **(end_to_end("caug") if gpu else {}),
        **end_to_end("caug+"),
        "loss and last layers, 10 views, batch 64, K 65536": lambda: loss_row(device),
        "selective scan (2, 384, 3136), N 1": lambda: scan_row(device),
        "vmamba_tiny at 224, forward + backward": lambda: vmamba_row(device),
        "features, vit_micro/8 at 64 px": lambda: features_row(device),
        "label propagation, 30x52 patches of 8 frames": lambda: labels_row(device),
        "linear: 3 parts x 5 lrs x 9 tests / one probe": lambda: linear_row(device),
    }


def table_line(row):
    """A row of bench.json as a line of the table, for the screen and the README alike."""
    cells = (
        "{:.4g} ({:.4g}..{:.4g})".format(row[side], *row[f"{side}_quartiles"])
        for side in ("textbook", "ours")
    )
    memory = " / ".join(
        f"{row[f'{side}_MB']:,.0f}" if row[f"{side}_MB"] is not None else "-"
        for side in ("textbook", "ours")
    )
    limit = f"{row['of_limit']:.0%}" if row["of_limit"] else ""
    return (
        f"| {row['row']:49} | "
        + " | ".join(f"{cell:22}" for cell in cells)
        + f" | {row['ratio']:.2f}x | {memory:>14} | {limit:>4} |"
    )


def settle(device):
    """What train.py does to its process before it trains."""
    if device.type == "cpu":
        probe.keep_freed_memory()
    elif choose_precision("auto", device)[0] == "bf16":
        torch.set_float32_matmul_precision("high")


def side_of(name, side, device, folder, pipe):
    """One side of a row in its own process: for each message that comes, makes one call and answers (seconds, MB that the call added at its peak)."""
    multiprocessing.set_start_method(
        "fork", force=True
    )  # for loading workers; a spawned process would spawn them
    if side == "ours":
        settle(device)
    call = getattr(rows(device, folder)[name](), side)
    pipe.send("ready")
    while pipe.recv():
        start_of_peak(device)
        before, start = memory(device)[0], time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        pipe.send((seconds, None if before is None else memory(device)[1] - before))


def start_of_peak(device):
    """From here on memory(device) tells the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def memory(device):
    """-> MB in use now, MB at the peak; None, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e6, torch.cuda.max_memory_allocated() / 1e6
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return tuple(int(lines[name].split()[0]) / 1e3 for name in ("VmRSS", "VmHWM"))
    except OSError:
        return None, None


def limits(device):
    """What this machine can do at most -> {'flops': per second in a large matrix product of our precision, 'bytes': per second in a copy, read and written}."""
    n = 8192 if device.type == "cuda" else 2048
    a, autocast = torch.randn(n, n, device=device), choose_precision("auto", device)[1]
    big = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    a = a.bfloat16() if choose_precision("auto", device)[0] == "bf16" else a

    def seconds(call):
        times = []
        for _ in range(6):
            start = time.perf_counter()
            call().flatten()[0].item()  # waits for the device
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.no_grad(), autocast():
        target = torch.empty_like(big)
        return dict(
            flops=2 * n**3 / seconds(lambda: a @ a),
            bytes=8 * len(big) / seconds(lambda: target.copy_(big)),
        )


def count_flops(call):
    """The floating-point operations of a call's matrix products and convolutions, backward ones too."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def profile_lines(call, device, calls=3, most=12):
    """Where a call's time goes, by operator, those that take most of it first; on a GPU by kernel, and of all kernels' time, in whatever stream."""
    call()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kinds.CUDA if device.type == "cuda" else kinds.CPU], acc_events=True
    ) as profiler:
        for _ in range(calls):
            call()
    spent = {
        event.key: event.self_device_time_total
        if device.type == "cuda"
        else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    total = sum(spent.values())
    for name, microseconds in sorted(spent.items(), key=lambda item: -item[1])[:most]:
        yield f"{microseconds / total:6.1%}  {microseconds / calls / 1e3:8.1f} ms  {name}"


def main(argv):
    config = configure(BenchConfig, argv)
    device = choose_device(config.device)
    known = rows(device, config.data)
    chosen = {name: make for name, make in known.items() if config.rows in name}
    if not chosen:
        raise UsageError(f"rows={config.rows}: there is no such row; there are {'; '.join(known)}")
    if config.data and not os.path.isdir(config.data):
        raise UsageError(
            f"data={config.data}: no such folder; leave --data away, and JPEGs are made"
        )
    if config.json and not os.path.isdir(os.path.dirname(config.json) or "."):
        raise UsageError(f"json={config.json}: its folder does not exist")
    if config.profile:
        settle(device)
        for name, make in chosen.items():
            print(
                "\n".join(
                    [
                        f"{name}: share of our side's time, a call's milliseconds, operator (on a GPU kernel)",
                        *profile_lines(make().ours, device),
                    ]
                ),
                flush=True,
            )
        return
    machine = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    precision, most = choose_precision("auto", device)[0], limits(device)
    print(
        f"{machine}, torch {torch.__version__}, {precision}: at most {most['flops'] / 1e9:,.0f} GFLOP/s, {most['bytes'] / 1e9:,.0f} GB/s; "
        f"images per second, median of {config.repeats} (quartiles), in turns; MB that a call adds at its peak; ours of the limit\n"
    )
    print(
        f"| {'images per second':49} | {'textbook':22} | {'ours':22} | ratio | MB, both sides | limit |\n|---|--:|--:|--:|--:|--:|",
        flush=True,
    )
    table, start_process = [], multiprocessing.get_context("spawn")
    for name, make in chosen.items():
        row = make()
        row.check()
        needs = (
            count_flops(row.ours) / most["flops"] if row.flops else row.bytes / most["bytes"]
        )  # seconds that a call takes at least
        images = dict(ours=row.images, textbook=row.textbook_images or row.images)
        del row
        gc.collect(), torch.cuda.empty_cache()  # the sides need the memory
        sides, seen, result = {}, {"textbook": [], "ours": []}, {"row": name}
        try:
            for side in seen:
                sides[side], other_end = start_process.Pipe()
                start_process.Process(
                    target=side_of, args=(name, side, device, config.data, other_end)
                ).start()
                sides[side].recv()
            for _ in tqdm(range(config.repeats + 1), desc=name, leave=False):
                for side, pipe in sides.items():
                    pipe.send(True)
                    seen[side].append(pipe.recv())
        finally:
            for pipe in sides.values():
                with contextlib.suppress(OSError):  # one of them may have died
                    pipe.send(False)
        for side, ((_, peak), *calls) in seen.items():  # the first is the warm-up
            rates = [images[side] / seconds for seconds, _ in calls]
            quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else [rates[0]] * 3
            result |= {
                side: statistics.median(rates),
                f"{side}_quartiles": [quartiles[0], quartiles[2]],
                f"{side}_MB": peak,
            }
        result |= dict(
            ratio=result["ours"] / result["textbook"],
            of_limit=needs * result["ours"] / images["ours"],
        )
        table.append(result)
        print(table_line(result), flush=True)
        if config.json:
            with open(config.json, "w") as file:
                json.dump(
                    dict(
                        device=machine,
                        torch=torch.__version__,
                        precision=precision,
                        limits=most,
                        rows=table,
                    ),
                    file,
                    indent=1,
                )


if __name__ == "__main__":
    with exit_on_usage_error():
        main(sys.argv[1:])
