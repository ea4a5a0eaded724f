"""What a training step works on: student, teacher, optimizer, centers."""

import contextlib
import copy
import os

from lib import compiled, data, processor, rng
from lib.batchnorm import sync_batch_norm
from lib.config import UsageError
from lib.weights import load_backbone

import torch
from torch.nn.parallel import DistributedDataParallel

import augment


class Run:
    """What a training step works on. state and load have all that the next step needs."""

    def __init__(self, network, has_teacher, config, steps_per_epoch, here):
        """Take a fresh student on the CPU. Resolves the options of config, for config.json."""
        check_method(network, has_teacher, config, here.world)
        if config.init_from and not os.path.exists(os.path.join(config.out_dir, "ckpt.pt")):
            init_from(network.backbone, config)
        device = here.device
        self.config = config
        self.here = here
        self.recipe = augment.recipe(config.recipe, config.blur, config.solarize)
        self.steps_per_epoch = steps_per_epoch
        # of the whole run: of all epochs, or max_steps if that is less
        total = config.epochs * steps_per_epoch
        self.total = min(total, config.max_steps or total)
        self.schedule_epoch = self.total / config.epochs  # steps of an epoch of the schedules

        # teacher: an EMA of the student, in training mode as DINO's; without one: the student
        self.network = network.to(device)  # model.Network
        self.has_teacher = has_teacher
        self.teacher = copy.deepcopy(network).requires_grad_(False) if has_teacher else network
        self.teacher_temp = 0.0  # of the current step
        self.centers = {}  # head -> center (K,); empty without a teacher
        for name, head in network.heads.items() if has_teacher else ():
            self.centers[name] = torch.zeros(len(head.last_layer.weight_v), device=device)

        # what the loss trains: {name: parameter}
        self.trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.trained, network.backbone, config)
        # (2,): steps skipped in all, and in a row until now
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)
        self.stream = processor.view_stream(device)  # which makes the next views; None on a CPU

        networks = [network, self.teacher] if has_teacher else [network]
        self.student = network  # or DistributedDataParallel around it
        if here.world > 1:
            networks = [sync_batch_norm(net) for net in networks]
            ids = [device.index] if device.type == "cuda" else None
            self.student = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
        config.compile, line = compiled.compile_blocks(networks, config.compile, device)
        # the search for the fastest kernel is worth it for many convolutions, not for a ViT's one
        is_vit = hasattr(network.backbone, "tokens")
        torch.backends.cudnn.benchmark = device.type == "cuda" and not is_vit

        self.notes = [line, *notes_of_short_runs(config, has_teacher)]  # for the first screen
        config.device = device.type
        config.precision = here.precision

    def state(self):
        """Return what the next step depends on, for a checkpoint."""
        return dict(
            student=self.network.state_dict(),
            teacher=self.teacher.state_dict(),
            optimizer=self.optimizer.state_dict(),
            centers=self.centers,
            skipped=self.skipped,
            teacher_temp=self.teacher_temp,
        )

    def load(self, state):
        """Continue from a checkpoint's state."""
        self.network.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, center in self.centers.items():
            center.copy_(state["centers"][name])
        self.skipped.copy_(state["skipped"])
        self.teacher_temp = state["teacher_temp"]

    def views(self, batch):
        """Make the views of a data.Batch on the device: [(2, B, 3, G, G), (L, B, 3, l, l)].

        On a GPU this runs in a stream of its own, while the GPU still computes the step before.
        """
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            crops = [x.to(self.here.device, non_blocking=True) for x in batch[:2]]
            views = augment.augment_views(*crops, batch.seeds, self.recipe)
        if self.stream:
            main_stream = torch.cuda.current_stream()
            main_stream.wait_stream(self.stream)
            for view in views:
                view.record_stream(main_stream)  # so that its memory is not reused in this step
        return views

    def drop_path_scales(self, seeds, views):
        """Return drop path's factors (n, B, depth, 2) for each of views (n, B, 3, H, W), or None.

        0: a block's branch is dropped; 1 / (1 - rate): kept. Rates rise from 0 in the first block
        to drop_path in the last (Huang et al. 2016). A function of the samples' seeds (B,).
        """
        backbone = self.network.backbone
        if not getattr(backbone, "drop_path", 0):
            return None
        depth = len(backbone.blocks)
        sizes = [len(x) for x in views]
        index = torch.arange(sum(sizes))[:, None]  # of the view
        u = rng.uniforms(rng.fork(seeds, "drop_path", index=index), 2 * depth)  # (V, B, .)
        rates = torch.linspace(0, backbone.drop_path, depth)[:, None]
        scales = (u.unflatten(-1, (depth, 2)) >= rates) / (1 - rates)
        return processor.to_device(views[0].device, scales).split(sizes)

    @torch.no_grad()
    def clip_gradients(self):
        """Clip each parameter's gradient to norm clip_grad (0: off) -> whether all are finite."""
        unused = [name for name, p in self.trained.items() if p.grad is None]
        assert not unused, f"no loss term reaches {unused[0]}: use it, or freeze it"
        gradients = [p.grad for p in self.trained.values()]
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.config.clip_grad:
            scales = (self.config.clip_grad / (norms + 1e-6)).clamp(max=1)
            torch._foreach_mul_(gradients, list(scales.unbind()))
        return norms.isfinite().all()

    def step_optimizer(self, is_finite):
        """Update the student, unless a gradient is not finite: then count a skipped step."""
        is_skipped = ~is_finite
        self.optimizer.found_inf = is_skipped.float()  # the device skips; the host does not wait
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += is_skipped
        self.skipped[1] *= is_skipped

    def after_infinity(self):
        """Return in words what to do after numbers that are not finite."""
        path = os.path.join(self.config.out_dir, "ckpt.pt")
        good = f"{path} holds the last good state; " if os.path.exists(path) else ""
        return f"{good}use a lower --lr or --precision=fp32, and another --out_dir"


def refuse_to_skip_more(run, first, last, n_images, terms):
    """Raise UsageError on every rank: in steps first .. last no gradient was finite.

    terms: names of the loss terms that are not finite either.
    """
    config = run.config
    [samples] = data.Schedule(n_images, config.batch_size, config.seed, first, first + 1)
    names = ", ".join(str(i) for _, i in samples[:8])
    cause = f"{', '.join(terms)} not finite either" if terms else "all loss terms are finite"
    raise UsageError(
        f"steps {first} to {last}: no gradient was finite ({cause}), all were skipped; step "
        f"{first} saw samples {names} ...; {run.after_infinity()}"
    )


def check_method(network, has_teacher, config, world):
    """Raise UsageError for options that do not fit the network or the method."""
    method, has_split = config.method, network.head_ef is not None
    if not (has_teacher and has_split) and config.orth_views != "teacher":
        raise UsageError(f"orth_views={config.orth_views}: not for {method}; remove --orth_views")
    if not has_teacher and config.local_crops:
        fix = "uses two global views only; set --local_crops=0"
        raise UsageError(f"local_crops={config.local_crops}: {method} {fix}")
    if not has_teacher and has_split and config.orth not in ("cosine", "dot"):
        raise UsageError(f"orth={config.orth}: not for {method}; use --orth=cosine or dot")
    has_batch_norm = any(
        isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in network.modules()
    )
    at_once = data.part_size(config.batch_size // world, config.max_batch_per_gpu)
    if has_batch_norm and at_once * world == 1:
        cause = f"max_batch_per_gpu={config.max_batch_per_gpu} makes parts of one image of it"
        fix = "batch norm needs two; take another batch_size, a multiple of 8"
        raise UsageError(f"batch_size={config.batch_size}: {cause}, and {fix}")


def notes_of_short_runs(config, has_teacher):
    """Shorten a warm-up that would fill the run. Yield what to tell of it."""
    if config.warmup_epochs >= config.epochs:
        shorter = config.epochs / 10
        yield f"warmup_epochs={config.warmup_epochs} would fill the run: now {shorter}"
        config.warmup_epochs = shorter
    if has_teacher and config.freeze_last_layer >= config.epochs:
        yield f"freeze_last_layer={config.freeze_last_layer}: no epoch trains the prototypes"


def init_from(backbone, config):
    """Load the weights of config.init_from. UsageError if their backbone is another one."""
    given, facts = load_backbone(config.init_from)
    try:
        backbone.load_state_dict(given.state_dict())
    except RuntimeError:
        names = ("arch", "img_size", "patch_size", "stem")
        facts = dict(stem="imagenet") | facts  # third-party weights have no other
        there = ", ".join(f"{name}={facts[name]}" for name in names)
        here = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        fix = f"this run has {here}; set the same"
        raise UsageError(f"init_from={config.init_from}: has {there}; {fix}") from None


def make_optimizer(trained, backbone, config):
    """Build AdamW or SGD over two groups: matrices decay; biases, norms and .no_decay do not."""
    exempt = getattr(backbone, "no_decay", ())  # VMamba's decay rates
    groups = [dict(params=[], decays=True), dict(params=[], decays=False)]
    for name, p in trained.items():
        groups[p.ndim < 2 or name.endswith(exempt)]["params"].append(p)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    for p in trained.values():  # torch sets none if the first step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer
