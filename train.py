"""Pre-train CLeVER, DINO, DDCL or SimSiam.

    python train.py configs/demo.py                                   one process: CPU or one GPU
    torchrun --nproc_per_node=4 train.py configs/in100_clever.py      one process a GPU
    python train.py configs/demo.py --epochs=5 --out_dir=out/try      any knob; --help lists them

The same command started again continues where the last checkpoint is. A run writes out_dir/: ckpt.pt (everything to continue), backbone.pt
(the teacher's backbone alone), log.jsonl, config.json, views.png (what the network sees).
"""

import ast
import atexit
import copy
import errno
import fcntl
import glob
import importlib.util
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Callable

import torch
import torch.distributed as dist
import torchvision
from tqdm import tqdm

import data
import losses
import probe
import vmamba
from augment import RECIPES, augment_views, denormalize, to_device
from configurator import Config, UsageError, configure, exit_on_usage_error
from draws import key, uniforms
from model import (
    VITS,
    Network,
    build_network,
    load_backbone,
    must_divide,
    read_checkpoint,
    save_atomically,
    split,
    synchronise_batch_norm,
)

MAY_CHANGE = (
    "out_dir",
    "workers",
    "cache",
    "max_batch_per_gpu",
    "loss_images",
    "device",
    "compile",
    "scan",
    "log_every",
    "eval_every",
    "save_every",
    "probe_at_end",
    "data_root",
    "download",
)  # on resume
MOST_SKIPPED = 3  # steps in a row whose gradients are not finite before a run stops

# ------------------------------------------------------------------------------------------------ schedules: functions of the step


def cosine(step, start, end, total):
    """From `start` at step 0 to `end` at the last step, total - 1, along half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(total - 1, 1)))


def learning_rate(step, config, steps_per_epoch):
    """Linear warm-up from 0 to lr * batch_size / 256, then a cosine to min_lr at the last step."""
    peak, warmup = config.lr * config.batch_size / 256, int(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * step / warmup
    return cosine(step - warmup, peak, config.min_lr, config.epochs * steps_per_epoch - warmup)


def teacher_temperature(step, config, steps_per_epoch):
    """Linear from teacher_temp_start to teacher_temp over teacher_temp_epochs."""
    done = min(1.0, step / max(1, config.teacher_temp_epochs * steps_per_epoch))
    return (
        config.teacher_temp_start + done * (config.teacher_temp - config.teacher_temp_start)
        if config.teacher_temp_epochs
        else config.teacher_temp
    )


# ------------------------------------------------------------------------------------------------ the method


@dataclass
class Run:
    """What a training step works on."""

    config: Config
    steps_per_epoch: int
    device: torch.device
    autocast: Callable  # () -> the context of mixed precision
    student: torch.nn.Module  # Network, or DistributedDataParallel around it
    network: Network  # the student itself
    teacher: Network  # SimSiam and DDCL have none: the student itself
    optimizer: torch.optim.Optimizer
    centers: dict  # head -> centre (K,); empty where there is no teacher
    recipe: tuple  # augment.Recipe
    skipped: (
        torch.Tensor
    )  # (2,) int64: steps skipped so far, and in a row up to now, because a gradient was not finite
    side_stream: torch.cuda.Stream | None  # of a GPU: for the views, beside the step before


def distil(run, step, views, draws):
    """DINO and CLeVER: the student's views against the teacher's two -> loss terms, the teacher's mean output of each head (K,), what else is
    to be logged. views [(2, B, 3, G, G), (L, B, 3, l, l)]; the teacher sees the global ones only."""
    config, teacher_temp = run.config, teacher_temperature(step, run.config, run.steps_per_epoch)
    with torch.no_grad():
        t_ir, t_ef = run.teacher(views[:1])  # (2, B, bottleneck) each; None without a split
    s_ir, s_ef = run.student(views, draws)  # (V, B, bottleneck) each

    def pair_loss(kind, name, student, teacher):
        layers = run.network.heads[name].last_layer, run.teacher.heads[name].last_layer
        return losses.against_prototypes(
            kind,
            student,
            layers[0],
            teacher,
            layers[1],
            run.centers[name],
            config.student_temp,
            teacher_temp,
            config.loss_images,
        )

    terms, means, logged = {}, {}, {}
    terms["L_CL"], means["ir"], logged["H_ir"] = pair_loss("cross-entropy", "ir", s_ir, t_ir)
    if config.method == "clever":
        terms["L_Orth"], means["ef"], logged["H_ef"] = pair_loss(config.orth, "ef", s_ef, t_ef)
        terms["L_PReg"] = losses.projection_regularization(run.network.head_ir, run.network.head_ef)
    logged["KL"] = (
        terms["L_CL"].detach() - logged["H_ir"]
    )  # of student from teacher: what there is to learn
    return terms, means, logged


def siamese(run, step, views, draws):
    """SimSiam and DDCL: two views [(1, B, 3, G, G)] * 2 predict each other's projection -> loss terms; no teacher, nothing else to log."""
    config, (ir, ef) = (
        run.config,
        run.student(views, draws),
    )  # (2, 2, B, hidden) each: projections and predictions, of two views
    terms = {"L_CL": losses.simsiam_loss(predictions=ir[1], projections=ir[0])}
    if config.method == "ddcl":
        terms["L_Orth"] = losses.ddcl_orthogonality(
            predictions=ef[1], projections=ef[0], kind=config.orth
        )
        pairs = [
            (getattr(run.network.head_ir, name), getattr(run.network.head_ef, name))
            for name in ("projector", "predictor")
        ]
        terms["L_PReg"] = (
            sum(losses.projection_regularization(*pair) for pair in pairs) / 2
        )  # as DDCL's scripts
    return terms, {}, {}


METHODS = dict(dino=distil, clever=distil, simsiam=siamese, ddcl=siamese)


def train_step(run, step, global_crops, local_crops, keys):
    """One step on this rank's share of the global batch -> {name: 0-dim tensor, mean over the share}; nothing waits for the device.

    global_crops uint8 (B, 2, 3, G, G), local_crops uint8 (B, L, 3, l, l), keys (B,): of the samples, for their draws."""
    config, total = run.config, run.config.epochs * run.steps_per_epoch
    parts = list(
        zip(
            *(
                tensor.split(micro_batch(len(keys), config))
                for tensor in (global_crops, local_crops, keys)
            )
        )
    )
    logged, teacher_means = {}, {}
    for i, (global_crops, local_crops, keys) in enumerate(
        parts
    ):  # one part, unless gradients are accumulated
        views = views_of(run, global_crops, local_crops, keys)
        draws = drop_path_draws(run.network.backbone, views, keys, config.drop_path)
        is_last = i == len(parts) - 1
        with (
            nullcontext() if is_last or run.student is run.network else run.student.no_sync()
        ):  # ranks exchange gradients once
            with run.autocast():
                terms, means, more = METHODS[config.method](run, step, views, draws)
            # L = alpha L_CL + beta L_Orth + lambda L_PReg; DINO and SimSiam are L_CL alone, on the whole representation
            weights = dict(L_CL=config.alpha, L_Orth=config.beta, L_PReg=config.lam)
            loss = sum(weights[name] * term for name, term in terms.items())
            (loss / len(parts)).backward()

        for head, mean in means.items():
            teacher_means[head] = teacher_means.get(head, 0) + mean / len(parts)  # (K,)
        for name, value in {"loss": loss, **terms, **more}.items():
            logged[name] = logged.get(name, 0) + value.detach() / len(parts)

    # student by gradient: each parameter's clipped on its own, prototypes frozen at first; nothing moves where one is not finite
    finite = clip_each(run.network.parameters(), config.clip)
    run.optimizer.found_inf = (
        ~finite
    ).float()  # torch's sign to its fused optimisers to skip this step, without waiting for the device
    run.skipped[0] += ~finite
    run.skipped[1] = (run.skipped[1] + 1) * ~finite
    if step < config.freeze_last_layer * run.steps_per_epoch and run.centers:
        for head in run.network.heads.values():
            head.last_layer.weight_v.grad = None
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, config, run.steps_per_epoch)
        group["weight_decay"] = (
            cosine(step, config.weight_decay, config.weight_decay_end, total)
            if group["decays"]
            else 0.0
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)

    # teacher and centres by moving average
    if run.centers:
        update_teacher(run.teacher, run.network, cosine(step, config.ema, 1.0, total))
    for head, mean in teacher_means.items():
        losses.update_center(
            run.centers[head], torch.where(finite, mean, torch.nan), config.center_momentum
        )  # of a step that is skipped it learns nothing
    return logged


def views_of(run, global_crops, local_crops, keys):
    """The crops as the network sees them, an entry a call of the backbone: [(2, B, 3, G, G), (L, B, 3, l, l)]; of SimSiam and DDCL the two
    views apart, [(1, B, 3, G, G)] * 2, for batch norm sees one at a time.

    On a GPU they are made in a stream of their own: Python is ahead of the card, so that is while the card is still at the step before."""
    with torch.cuda.stream(run.side_stream) if run.side_stream else nullcontext():
        views = augment_views(
            global_crops.to(run.device, non_blocking=True),
            local_crops.to(run.device, non_blocking=True),
            keys,
            run.recipe,
        )
    if run.side_stream:
        torch.cuda.current_stream().wait_stream(run.side_stream)
        for view in views:
            view.record_stream(
                torch.cuda.current_stream()
            )  # or their memory would be taken for the next views while this step still reads them
    return views if run.centers else list(views[0].split(1))


def is_logged(step, run):
    """Every log_every steps, and before each checkpoint: so a resumed run logs the same averages."""
    return step % run.config.log_every == 0 or is_saved(step, run)


def is_saved(step, run):
    """Every save_every steps and at the end of an epoch."""
    return (
        (step + 1) % run.steps_per_epoch == 0
        or run.config.save_every
        and (step + 1) % run.config.save_every == 0
    )


def micro_batch(share, config):
    """The largest part of a rank's share that fits max_batch_per_gpu and divides the share evenly."""
    return max(
        size for size in range(1, min(share, config.max_batch_per_gpu) + 1) if share % size == 0
    )


def drop_path_draws(backbone, views, keys, rate):
    """Uniforms (n, B, depth, 2) for each resolution, a function of the samples' keys; None where nothing is ever dropped."""
    if not rate or not hasattr(backbone, "blocks"):
        return None
    depth, draws, first = len(backbone.blocks), [], 100
    for images in views:
        n, B = images.shape[:2]
        u = uniforms(key(keys, first + torch.arange(n)[:, None]), 2 * depth)  # (n, B, 2 * depth)
        draws.append(to_device(images.device, u.view(n, B, depth, 2)))
        first += n
    return draws


@torch.no_grad()
def clip_each(parameters, max_norm):
    """Scale each parameter's gradient, on its own, to a norm of at most max_norm (DINO's clip; 0: off) -> whether all of them are finite, a
    0-dim tensor, the same on every rank, for gradients have been averaged over ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        torch._foreach_mul_(gradients, list((max_norm / (norms + 1e-6)).clamp(max=1).unbind()))
    return norms.isfinite().all()


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, every parameter."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


# ------------------------------------------------------------------------------------------------ start and continue


def make_run(config, steps_per_epoch, device, world=1):
    """Student, teacher (a copy, where the method has one), optimiser and centres, fresh from config.seed or from config.init_from."""
    torch.manual_seed(config.seed)
    network = build_network(config)
    if config.arch in vmamba.VMAMBAS:
        vmamba.choose_backend(device)  # one that cannot run here is refused now
    must_divide(
        network.backbone,
        config.arch,
        img_size=config.img_size,
        **(dict(local_size=config.local_size) if config.local_crops else {}),
    )
    if config.init_from and not os.path.exists(
        os.path.join(config.out_dir, "ckpt.pt")
    ):  # a run that continues needs it no more
        given, facts = load_backbone(config.init_from)
        if [(name, p.shape) for name, p in given.named_parameters()] != [
            (name, p.shape) for name, p in network.backbone.named_parameters()
        ]:
            raise UsageError(
                f"init_from={config.init_from}: holds {facts['arch']} for {facts['img_size']} px, patch {facts['patch_size']}; "
                f"this run is {config.arch}, {config.img_size} px, patch {config.patch_size}"
            )
        network.backbone.load_state_dict(given.state_dict())
    student = network.to(device)
    teaches = METHODS[config.method] is distil
    teacher = (
        copy.deepcopy(network).requires_grad_(False) if teaches else network
    )  # it is called without draws, so it drops no path
    if world > 1:
        synchronise_batch_norm(network, device), synchronise_batch_norm(teacher, device)
        student = torch.nn.parallel.DistributedDataParallel(
            network,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
        )
    if (
        config.compile is None
    ):  # a CPU gains little and compiles for minutes; a ResNet would be one large graph, a block of VMamba six
        config.compile = (
            device.type == "cuda"
            and config.arch in VITS
            and importlib.util.find_spec("triton") is not None
        )
        go_on_uncompiled(config.compile)
    if config.compile:
        vmamba.keep_out_of_graphs()
        torch._dynamo.config.recompile_limit = (
            64  # a ViT's blocks share six graphs, VMamba's those of four widths
        )
        for net in (network, teacher) if teaches else (network,):
            for block in getattr(net.backbone, "blocks", [net.backbone]):
                block.compile(dynamic=False)
    centers = (
        {
            name: torch.zeros(head.last_layer.weight_v.shape[0], device=device)
            for name, head in network.heads.items()
        }
        if teaches
        else {}
    )
    switched_off = {
        name: (0.0, 0.0, 0.0) for name in ("blur", "solarize") if not getattr(config, name)
    }
    _, autocast = probe.choose_precision(config.precision, device)
    return Run(
        config,
        steps_per_epoch,
        device,
        autocast,
        student,
        network,
        teacher,
        make_optimizer(network, config),
        centers,
        RECIPES[config.recipe]._replace(**switched_off),
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.cuda.Stream(device) if device.type == "cuda" else None,
    )


def go_on_uncompiled(wanted):
    """Whether a graph that cannot be compiled is done without, rather than an error: what nobody asked for must not end a run."""
    torch._dynamo.config.suppress_errors = wanted
    torch._functorch.config.force_non_lazy_backward_lowering = (
        wanted  # or the backward's failure would come later, where nothing is waiting for it
    )


def make_optimizer(network, config):
    """AdamW or SGD over two groups: matrices, which decay, and biases, norms and VMamba's decay rates, which do not."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    matrices = [
        name for name, p in trained.items() if p.ndim > 1 and not name.endswith(vmamba.NO_DECAY)
    ]
    groups = [
        dict(params=[trained[name] for name in matrices], decays=True),
        dict(params=[p for name, p in trained.items() if name not in matrices], decays=False),
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    for p in trained.values():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(
            p
        )  # torch leaves them unset where the first step is skipped
    return optimizer


def save(run, step, n_images):
    """ckpt.pt: all that the next step depends on, tensors and plain types; backbone.pt: the teacher's backbone for timm or torchvision.

    Weights that are not finite are not saved: UsageError, and the file keeps the last good state. OSError where the disk refuses: likewise."""
    path = os.path.join(run.config.out_dir, "ckpt.pt")
    tensors = [
        x
        for network in (run.network, run.teacher)
        for x in (*network.parameters(), *network.buffers())
        if x.is_floating_point()
    ]
    if not torch.stack(torch._foreach_norm(tensors)).isfinite().all():
        raise UsageError(
            f"the weights are not finite at step {step}: {path} holds the last good state; lower lr, or try precision=fp32"
        )
    os.makedirs(run.config.out_dir, exist_ok=True)  # someone may have removed it
    save_atomically(
        dict(
            config=asdict(run.config),
            step=step,
            images=n_images,
            student=run.network.state_dict(),
            teacher=run.teacher.state_dict(),
            optimizer=run.optimizer.state_dict(),
            centers=run.centers,
            skipped=run.skipped,
        ),
        path,
    )
    save_atomically(
        {name: value.cpu() for name, value in run.teacher.backbone.state_dict().items()},
        os.path.join(run.config.out_dir, "backbone.pt"),
    )


def restore(run, n_images):
    """Load out_dir/ckpt.pt into the run if there is one -> the step to do next."""
    path = os.path.join(run.config.out_dir, "ckpt.pt")
    if not os.path.exists(path):
        return 0
    checkpoint = read_checkpoint(path)
    if (
        not isinstance(checkpoint, dict)
        or not {"config", "images", "optimizer"} <= checkpoint.keys()
    ):
        raise UsageError(
            f"{path}: not a checkpoint that train.py can continue; move it away, or start from its weights with --init_from in another --out_dir"
        )
    refuse_other_config(checkpoint["config"], run.config)
    if checkpoint["images"] != n_images:
        raise UsageError(
            f"{run.config.data} has {n_images} images, and had {checkpoint['images']} when {path} was written: put them back, or choose another --out_dir"
        )
    run.network.load_state_dict(checkpoint["student"])
    run.teacher.load_state_dict(checkpoint["teacher"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    for name, center in run.centers.items():
        center.copy_(checkpoint["centers"][name])
    run.skipped.copy_(
        checkpoint.get("skipped", run.skipped)
    )  # checkpoints of the first versions lack it
    return checkpoint["step"]


def refuse_other_config(there, config):
    """UsageError if the run in out_dir was started with knobs that this one may not change."""
    here, there = json.loads(json.dumps(asdict(config))), json.loads(json.dumps(there))
    differ = [
        f"{name}={there.get(name)!r} there, {here.get(name)!r} here"
        for name in here | there
        if name not in MAY_CHANGE and there.get(name) != here.get(name)
    ]
    if differ:
        raise UsageError(
            f"out_dir={config.out_dir} holds another run ({'; '.join(differ)}): choose another --out_dir or remove it"
        )


def keep_log_until(path, step):
    """Drop the log's lines of steps that will be done again."""
    if os.path.exists(path):
        with open(path) as file:
            lines = [
                line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step
            ]
        with open(path + ".partial", "w") as file:
            file.writelines(lines)
        os.replace(path + ".partial", path)


# ------------------------------------------------------------------------------------------------ what a person sees


def describe(run, step, world, images):
    """The first screen of a run."""
    config = run.config
    line = ""
    for knob in (f"{name}={value}" for name, value in asdict(config).items()):
        if len(line) + len(knob) > 118:
            print(line)
            line = ""
        line += knob + "  "
    print(line + "\n")
    millions = [
        sum(p.numel() for p in module.parameters()) / 1e6
        for module in (run.network.backbone, run.network)
    ]
    device = (
        torch.cuda.get_device_name(run.device)
        if run.device.type == "cuda"
        else f"CPU with {torch.get_num_threads()} threads"
    )
    share = config.batch_size // world
    print(
        f"{config.method} {config.arch}: backbone {millions[0]:.2f} M parameters, with heads {millions[1]:.2f} M"
    )
    print(
        f"{len(images)} images of {config.data}"
        + (f", {len(images.classes)} classes" if images.classes else ", no labels")
    )
    print(
        f"{world} x {device}, {config.precision}; batch {config.batch_size} = {world} x {share // micro_batch(share, config)} x {micro_batch(share, config)} "
        f"(ranks x accumulated x at once); peak lr {config.lr * config.batch_size / 256:.3g}"
    )
    if config.arch in vmamba.VMAMBAS:
        print(f"selective scan: {vmamba.choose_backend(run.device)}")
    if step:
        print(
            f"continuing {config.out_dir} at step {step} of {config.epochs * run.steps_per_epoch}"
        )
    elif config.init_from:
        print(f"a new schedule from the weights of {config.init_from}")
    print(flush=True)


def picture_views(run, images):
    """views.png's pixels, on a tensor: a row an image, first the image, then its two global and its local views as the network sees them."""
    whole, global_crops, local_crops, keys = data.first_samples(images, run.config, 6)
    views = augment_views(global_crops, local_crops, keys, run.recipe)
    size = run.config.img_size
    pictures = [whole[None] / 255]  # each (n, B, 3, size, size)
    for view in views:
        border = size - view.shape[-1]
        pictures.append(
            torch.nn.functional.pad(
                denormalize(view), (border // 2, border - border // 2) * 2, value=1.0
            )
        )
    pictures = torch.cat(pictures).transpose(0, 1)  # (B, 1 + V, 3, size, size)
    grid = torchvision.utils.make_grid(
        pictures.flatten(0, 1), nrow=pictures.shape[1], padding=max(2, size // 32), pad_value=1
    )
    zoom = max(1, 96 // size)  # small images are shown enlarged, pixel by pixel
    return grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


@torch.compiler.set_stance("force_eager")  # its batches would be compiled for, each size once
def evaluate(run, train, val, workers):
    """kNN accuracy on clean and on rotated validation images for each part, and the collapse watch -> {name: number}."""
    config, ratio = run.config, run.network.ratio
    common = dict(size=config.img_size, device=run.device, autocast=run.autocast, workers=workers)
    numbers = collapse_watch(run, train)
    labelled = val is not None and train.labels.min() >= 0
    [on_train], train_y = probe.features(
        run.teacher.backbone,
        train,
        [probe.perturbed("orig")],
        progress="kNN: features of train",
        **common,
    )
    if labelled:
        on_val, val_y = probe.features(
            run.teacher.backbone,
            val,
            [probe.perturbed("orig"), probe.perturbed("ro")],
            progress="kNN: of val",
            **common,
        )
    for part, z in probe.parts(on_train, ratio).items():
        numbers[f"std_{part}"], numbers[f"rank_{part}"] = probe.spread(z)
        if labelled:
            for name, of in zip(("knn", "knn_rotated"), on_val):
                numbers[f"{name}_{part}"] = probe.knn_accuracy(
                    z, train_y, probe.parts(of, ratio)[part], val_y
                )
    return numbers


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def collapse_watch(run, train):
    """What the heads make of two views of the run's first batch -> {name: number}; the same on every rank.

    norm_*: of a head's parameters. std_proj_*, rank_proj_*: the spread of its projections, as probe.spread (of a head with prototypes: in front of them).
    cos_*: mean |cosine| of two views' projections. And of the ef vectors whose product L_Orth takes, that is teacher's and student's
    probabilities, or projections and predictions: dot_ef, their mean |product|, and lengths_ef, the mean product of their lengths. What of
    dot_ef's fall since step 0 the lengths explain, orthogonality has not brought about (share_of_lengths)."""
    _, global_crops, local_crops, keys = data.first_samples(
        train, run.config, min(run.config.batch_size, 256)
    )
    views = views_of(run, global_crops, local_crops[:, :0], keys)
    z = {}
    for name, network in dict(
        student=run.network,
        **({"teacher": run.teacher} if run.centers and run.network.head_ef else {}),
    ).items():
        was_training = network.backbone.training
        network.backbone.eval()
        with run.autocast():
            z[name] = torch.cat(
                [probe.in_pieces(network.backbone, view.flatten(0, 1)) for view in views]
            ).float()  # (2 * B, D)
        network.backbone.train(was_training)
    numbers = {}
    for name, head in run.network.heads.items():
        own = copy.deepcopy(
            head
        )  # in training mode, so that batch norm takes the batch, but its running means stay as they are
        numbers[f"norm_{name}"] = losses.squared_norm(head).sqrt().item()
        of_part = {
            who: split(features, run.network.ratio)[name == "ef"] for who, features in z.items()
        }
        projections = torch.stack(
            [own.project(view) for view in of_part["student"].chunk(2)]
        )  # (2, B, dim)
        numbers[f"std_proj_{name}"], numbers[f"rank_proj_{name}"] = probe.spread(
            projections.flatten(0, 1)
        )
        numbers[f"cos_{name}"] = (
            torch.nn.functional.cosine_similarity(*projections, dim=-1).abs().mean().item()
        )
        if name == "ef" and run.centers:
            a = (
                (
                    (run.teacher.head_ef(of_part["teacher"]) - run.centers["ef"])
                    / run.config.teacher_temp
                )
                .softmax(-1)
                .chunk(2)[0]
            )
            b = (own(of_part["student"]) / run.config.student_temp).softmax(-1).chunk(2)[1]
        elif name == "ef":
            (a, _), (_, b) = own(of_part["student"]).unflatten(
                1, (2, -1)
            )  # first view's projections, second view's predictions
    if run.network.head_ef:
        numbers["dot_ef"], numbers["lengths_ef"] = (
            (a * b).sum(-1).abs().mean().item(),
            (a.norm(dim=-1) * b.norm(dim=-1)).mean().item(),
        )
    return numbers


def share_of_lengths(first, now):
    """What share of the fall of dot_ef since `first` the fall of lengths_ef explains, in logarithms: 0 where the vectors have only turned, 1
    where they have only shrunk, above 1 where they shrank and turned together. first, now: of collapse_watch. nan where dot_ef has not fallen."""
    fell, shrank = (
        math.log(max(first[name], 1e-30) / max(now[name], 1e-30))
        for name in ("dot_ef", "lengths_ef")
    )
    return shrank / fell if fell > 0.01 else math.nan


def collapse_warnings(numbers, config):
    """Plain words for numbers that mean a collapse; numbers: what was last logged and evaluated."""
    for head, K, mend in (
        ("ir", config.out_dim, "lower teacher_temp or lr, or train longer"),
        (
            "ef",
            config.out_dim_ef,
            "that alone brings L_Orth down to 1/K, and ef learns little from it; raise beta or lower lam",
        ),
    ):
        entropy = numbers.get(f"H_{head}")
        if entropy is not None and entropy > 0.99 * math.log(K):
            yield f"the teacher's {head} output is all but uniform (entropy {entropy:.3f} of ln K = {math.log(K):.3f}): {mend}"
    for part in ("full", "ir", "ef"):
        if numbers.get(f"std_{part}", 1) < 0.05 or numbers.get(f"rank_{part}", 9) < 1.02:
            yield (
                f"the representation's {part} part has collapsed (std {numbers[f'std_{part}']:.3f}, effective rank {numbers[f'rank_{part}']:.1f}): "
                "lower lr, raise the batch size or the warm-up"
            )
    if "norm_ef" in numbers and numbers["norm_ef"] < 0.1 * numbers["norm_ir"]:
        yield f"the ef head has shrunk to norm {numbers['norm_ef']:.2g} against the ir head's {numbers['norm_ir']:.2g}: raise lam"


# ------------------------------------------------------------------------------------------------ the loop


def main(argv):
    if not argv:
        return print(greeting())
    config = configure(Config, argv)
    rank, world, device = probe.join_processes(config.device)
    probe.choose_scan(config.scan)
    config.device, (config.precision, _) = (
        device.type,
        probe.choose_precision(config.precision, device),
    )  # resolved, for config.json and a resume elsewhere
    if device.type == "cuda" and config.precision == "bf16":
        torch.set_float32_matmul_precision(
            "high"
        )  # TF32 for what stays fp32: the prototypes' logits

    # everything that can be wrong with what the user gave is found before anything is written
    train, val = data.open_splits(
        config.data, config.classes, config.data_root, config.download, config.img_size
    )
    if config.batch_size % world:
        raise UsageError(
            f"batch_size={config.batch_size} does not divide among {world} ranks: take {math.ceil(config.batch_size / world) * world}"
        )
    if config.batch_size > len(train):
        raise UsageError(
            f"batch_size={config.batch_size} exceeds the {len(train)} images of {config.data}: lower it"
            + (f", and start fewer than {world} ranks" if world > len(train) else "")
        )
    train, val = (images and data.reduced(images, config) for images in (train, val))
    if config.cache == "ram":
        train, val = (
            images and data.in_memory(images, f"{config.data}'s {split} images", config.workers)
            for split, images in (("train", train), ("val", val))
        )
    steps_per_epoch = len(train) // config.batch_size
    run = make_run(config, steps_per_epoch, device, world)
    step, total = restore(run, len(train)), config.epochs * steps_per_epoch
    if losses.mean_over_ranks(torch.tensor(float(step), device=device)) != step:
        raise UsageError(
            f"out_dir={config.out_dir}: the machines do not see the same checkpoint there; give a folder that all of them share"
        )
    main_rank, log_path = rank == 0, os.path.join(config.out_dir, "log.jsonl")
    if main_rank:
        picture = picture_views(run, train) if step == 0 else None
        prepare_out_dir(config, step)
        describe(run, step, world, train)
        if step == 0:
            torchvision.utils.save_image(picture, os.path.join(config.out_dir, "views.png"))
        keep_log_until(log_path, step or -1)  # a run that starts anew logs step 0 again
    if step == 0:
        log(log_path, main_rank, step=0, epoch=0.0, **collapse_watch(run, train))
    numbers = {}  # what was last logged

    def judge(step):
        """At the ends of epochs that are to be evaluated: kNN and collapse watch, to the log and the screen."""
        epoch = step // steps_per_epoch
        if step % steps_per_epoch or not (
            step == total or config.eval_every and epoch % config.eval_every == 0
        ):
            return
        judged = evaluate(run, train, val, config.workers)
        first = first_line(log_path) if main_rank else {}
        if "dot_ef" in judged and "dot_ef" in first:
            judged["share_ef"] = share_of_lengths(first, judged)
        log(log_path, main_rank, step=step, epoch=step / steps_per_epoch, **judged)
        if main_rank:
            tqdm.write(
                f"epoch {epoch}: "
                + "  ".join(
                    f"{name} {value:.3g}"
                    for name, value in judged.items()
                    if name.startswith(("knn", "rank_", "norm"))
                )
            )
            for warning in collapse_warnings(numbers | judged, config):
                tqdm.write(f"WARNING: {warning}")

    if step and not was_judged(
        log_path, step, main_rank, device
    ):  # the run ended between a checkpoint and its evaluation
        judge(step)
    if step == total:
        if main_rank:
            print(
                f"{config.out_dir} is finished: nothing to train. Raise --epochs only with another --out_dir, for it changes the whole schedule"
            )
        finish(run, train, val, main_rank)
        return probe.wait_for_ranks()

    loader = data.train_loader(train, config, step, total, rank, world, device)
    broken_files, sums, notices = data.BrokenFiles(len(train)), {}, notices_of_the_end()
    bar = tqdm(
        total=total,
        initial=step,
        disable=not main_rank,
        unit="step",
        smoothing=0.1,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    waited, since, batches = 0.0, time.perf_counter(), iter(loader)
    for step in range(step, total):
        asked = time.perf_counter()
        global_crops, local_crops, keys, _, broken = next(batches)
        waited += time.perf_counter() - asked
        broken_files.report(broken, bar.write)
        for name, value in train_step(run, step, global_crops, local_crops, keys).items():
            sums[name] = (*sums.get(name, ()), value)

        done, notice = step + 1, notice_to_any(notices)
        if is_logged(step, run) or notice:
            numbers = average_over_ranks(sums)
            skipped, in_a_row = run.skipped.tolist()
            if in_a_row >= MOST_SKIPPED:
                refuse_steps_in_vain(run, step, in_a_row, train)
            seconds, images = time.perf_counter() - since, len(sums["loss"]) * config.batch_size
            numbers |= dict(skipped=skipped) if skipped else {}
            numbers |= dict(
                lr=learning_rate(step, config, steps_per_epoch),
                img_per_s=images / seconds,
                data_wait=waited / seconds,
            )
            log(log_path, main_rank, step=done, epoch=done / steps_per_epoch, **numbers)
            bar.set_postfix_str(
                f"{'  '.join(f'{k} {v:.4g}' for k, v in numbers.items() if k[0] in 'lL')}  {numbers['img_per_s']:.0f} img/s  "
                f"data {numbers['data_wait']:.0%}",
                refresh=False,
            )
            sums, waited, since = {}, 0.0, time.perf_counter()
        bar.update()

        if main_rank and (is_saved(step, run) or notice):
            try_to_save(run, done, len(train), bar.write, is_last=done == total or notice)
        if notice:
            bar.close()
            stop_at(notice, done, config, main_rank)
        judge(done)
        since = time.perf_counter() if done % steps_per_epoch == 0 else since
    bar.close()
    (
        signal.signal(signal.SIGTERM, signal.SIG_DFL),
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # all is saved
    finish(run, train, val, main_rank)
    probe.wait_for_ranks()


def greeting():
    """What `python train.py` alone prints: what this is and which configs there are."""
    lines = [__doc__.strip(), "", "Configs:"]
    for path in sorted(
        glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "*.py"))
    ):
        with open(path) as file:
            lines.append(
                f"  configs/{os.path.basename(path):28}{(ast.get_docstring(ast.parse(file.read())) or '').splitlines()[0]}"
            )
    return "\n".join(lines)


def prepare_out_dir(config, step):
    """Make out_dir, lock it and write config.json; UsageError if another run lives or works there, or it cannot be written."""
    path = os.path.join(config.out_dir, "config.json")
    if os.path.exists(path) and step == 0:
        there = None
        with open(path) as file, suppress(ValueError):
            there = json.load(file)
        if not isinstance(there, dict):
            raise UsageError(f"{path} is not a run's: choose another --out_dir")
        refuse_other_config(there, config)
    try:
        os.makedirs(config.out_dir, exist_ok=True)
        lock = open(os.path.join(config.out_dir, ".lock"), "w")
        try:
            fcntl.lockf(
                lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the system lifts it when this process ends, however it ends,
            atexit.register(lock.close)  # or when nothing refers to the file any more
        except BlockingIOError:
            raise UsageError(
                f"out_dir={config.out_dir}: another run is at work there; wait for its end, or choose another"
            ) from None
        with open(path + ".partial", "w") as file:
            json.dump(asdict(config), file, indent=1)
        os.replace(path + ".partial", path)
    except OSError as error:
        raise UsageError(f"out_dir={config.out_dir}: {error.strerror}; choose another") from None


def average_over_ranks(sums):
    """{name: tuple of 0-dim tensors} -> {name: their mean over finite steps and ranks}; waits for the device, as nothing between logged steps does."""
    means = losses.mean_over_ranks(
        torch.stack(
            [
                torch.stack(values).nan_to_num(math.nan, math.nan, math.nan).nanmean()
                for values in sums.values()
            ]
        )
    )
    return dict(zip(sums, means.tolist()))


def refuse_steps_in_vain(run, step, in_a_row, train):
    """UsageError, on every rank at once: the last in_a_row steps have been skipped, for their gradients were not finite."""
    first = step + 1 - in_a_row
    [samples] = data.Schedule(len(train), run.config.batch_size, run.config.seed, first, first + 1)
    raise UsageError(
        f"steps {first} to {step}: no gradient was finite, all were skipped; step {first} saw samples {', '.join(str(i) for _, i in samples[:8])} ...; "
        f"{run.config.out_dir}/ckpt.pt holds the last good state; lower lr, or try precision=fp32"
    )


# ------------------------------------------------------------------------------------------------ the end, whatever brings it


def notices_of_the_end():
    """-> a list that fills with the signals that ask this process to end: SIGTERM (Slurm, torchrun), SIGINT (Ctrl-C). A second one of a kind ends it at once."""
    notices = []

    def note(number, _):
        signal.signal(number, signal.SIG_DFL)
        notices.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return notices


def notice_to_any(notices):
    """The signal that any rank was sent, 0 if none was; the same answer on all ranks, after the same step."""
    number = notices[0] if notices else 0
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(
        numbers, dist.ReduceOp.MAX, group=probe.host_group()
    )  # between the hosts' processes: the device need not be waited for
    return numbers.item()


def stop_at(notice, step, config, main_rank):
    """Leave after a checkpoint, with the exit code that tells the signal: 143 of SIGTERM, 130 of SIGINT."""
    if main_rank:
        print(
            f"stopped by {signal.Signals(notice).name} after step {step}; the same command continues from there",
            file=sys.stderr,
            flush=True,
        )
    probe.wait_for_ranks()
    sys.exit(128 + notice)


def try_to_save(run, step, n_images, say, is_last):
    """save(); where the disk refuses, say so and go on, for the next interval may find it mended. UsageError where there is no next."""
    try:
        save(run, step, n_images)
    except OSError as error:
        problem = (
            f"no checkpoint after step {step}: {run.config.out_dir}: {error.strerror or error}"
        )
        if is_last:
            raise UsageError(
                f"{problem}; make room, then the same command continues from the last one"
            ) from None
        say(f"WARNING: {problem}; the last good one stands, the next is tried in its turn")


def log(path, main_rank, **numbers):
    """A line of log.jsonl, whole or not at all; where the disk refuses, the run goes on without it."""
    if main_rank:
        line = (
            json.dumps(
                {
                    name: round(value, 6) if isinstance(value, float) else value
                    for name, value in numbers.items()
                }
            ).encode()
            + b"\n"
        )
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)  # someone may have removed it
            with open(path, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)  # half a line would spoil the next one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            tqdm.write(f"WARNING: step {numbers['step']} is not in {path}: {error.strerror}")


def first_line(path):
    """Of the log, {} where someone has removed it, or nothing could be written to it."""
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        return json.loads(file.readline() or "{}")


def was_judged(path, step, main_rank, device):
    """Whether the log holds the evaluation after `step`: read by the main rank, which has mended the log, and told to all."""
    found = False
    if main_rank and os.path.exists(path):
        with open(path) as file:
            found = any(
                line["step"] == step and "std_full" in line for line in map(json.loads, file)
            )
    return losses.mean_over_ranks(torch.tensor(float(found), device=device)).item() > 0


@torch.compiler.set_stance("force_eager")
def finish(run, train, val, main_rank):
    """With probe_at_end: the probe's table of this run beside the same backbone untrained, once."""
    config, start = run.config, time.perf_counter()
    results = os.path.join(config.out_dir, "results.json")
    if not config.probe_at_end or os.path.exists(results):
        return
    if val is None or train.labels.min() < 0:
        return (
            print("no table: a probe needs labels, train/CLASS and val/CLASS folders")
            if main_rank
            else None
        )
    torch.manual_seed(config.seed)
    untrained = build_network(config).backbone.to(run.device)
    models = [("untrained", untrained, 1), (config.method, run.teacher.backbone, run.network.ratio)]
    rows = probe.judge(
        models, train, val, config.img_size, run.device, run.autocast, config.workers, config.seed
    )
    if main_rank:
        print("\n" + "\n".join(probe.table_lines(rows)), flush=True)
        probe.append_results(results, "probe", asdict(config), time.perf_counter() - start, rows)


if __name__ == "__main__":
    with exit_on_usage_error("stopped; the same command continues from the last checkpoint"):
        main(sys.argv[1:])
