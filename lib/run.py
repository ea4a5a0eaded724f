"""What a training step works on: student, teacher, optimizer, centers."""

import copy
import functools
import os
from dataclasses import dataclass

from lib import compiled, data, machine, processor, rng
from lib.batchnorm import sync_batch_norm
from lib.config import Config, UsageError
from lib.weights import load_backbone

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import augment


@dataclass
class Run:
    """What a training step works on. state and load have all that the next step needs."""

    config: Config
    here: machine.Here
    recipe: augment.Recipe
    steps_per_epoch: int
    network: nn.Module  # the student, model.Network
    teacher: nn.Module  # EMA of network, in training mode as DINO's; without one: network itself
    student: nn.Module  # network, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    centers: dict  # head -> center (K,); empty without a teacher
    skipped: torch.Tensor  # (2,) int64: steps skipped in all, and in a row until now
    stream: object  # CUDA stream that makes the next views; None on a CPU
    notes: list  # lines of the first screen: compiled blocks, a shortened warm-up
    teacher_temp: float = 0.0  # of the current step

    @property
    def has_teacher(self):
        return self.teacher is not self.network

    @property
    def total(self):
        """The number of steps of the whole run: of all epochs, or max_steps if that is less."""
        total = self.config.epochs * self.steps_per_epoch
        return min(total, self.config.max_steps or total)

    @property
    def schedule_epoch(self):
        """The steps of an epoch of the schedules: fewer than the data's if max_steps ends it."""
        return self.total / self.config.epochs

    @functools.cached_property
    def trained(self):
        """The parameters that the loss trains: {name: parameter}. A walk through all modules."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @classmethod
    def start(cls, network, has_teacher, config, steps_per_epoch, here):
        """Build a run around a student on the CPU: teacher, optimizer, centers, compiled blocks."""
        device = here.device
        check_method(network, has_teacher, config)
        if config.init_from and not os.path.exists(os.path.join(config.out_dir, "ckpt.pt")):
            init_from(network.backbone, config)
        network = network.to(device)
        teacher = copy.deepcopy(network).requires_grad_(False) if has_teacher else network
        networks = [network, teacher] if has_teacher else [network]
        student = network
        if here.world > 1:
            networks = [sync_batch_norm(net) for net in networks]
            ids = [device.index] if device.type == "cuda" else None
            student = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
        if config.compile is False:  # do not compile the losses and the views either
            compiled.COMPILERS.clear()
        config.compile, line = compiled.compile_blocks(networks, config.compile, device)
        notes = [line] if line else []
        if config.warmup_epochs >= config.epochs:
            clipped = config.epochs / 10
            notes.append(f"warmup_epochs={config.warmup_epochs} would fill the run: now {clipped}")
            config.warmup_epochs = clipped
        # the search for the fastest kernel is worth it for many convolutions, not for a ViT's one
        is_vit = hasattr(network.backbone, "tokens")
        torch.backends.cudnn.benchmark = device.type == "cuda" and not is_vit
        config.device = device.type  # resolved, for config.json
        config.precision = here.precision
        centers = {}
        for name, head in network.heads.items() if has_teacher else ():
            centers[name] = torch.zeros(len(head.last_layer.weight_v), device=device)
        return cls(
            config=config,
            here=here,
            recipe=augment.recipe(config.recipe, config.blur, config.solarize),
            steps_per_epoch=steps_per_epoch,
            network=network,
            teacher=teacher,
            student=student,
            optimizer=make_optimizer(network, config),
            centers=centers,
            skipped=torch.zeros(2, dtype=torch.int64, device=device),
            stream=processor.view_stream(device),
            notes=notes,
        )

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
        with torch.cuda.stream(self.stream):  # None: no effect
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
        return rng.to_device(views[0].device, scales).split(sizes)

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


def refuse_to_skip_more(run, first, last, n_images, terms):
    """Raise UsageError on every rank: in steps first .. last no gradient was finite.

    terms: names of the loss terms that are not finite either.
    """
    config = run.config
    [samples] = data.Schedule(n_images, config.batch_size, config.seed, first, first + 1)
    names = ", ".join(str(i) for _, i in samples[:8])
    cause = f"{', '.join(terms)} not finite either" if terms else "all loss terms are finite"
    path = os.path.join(config.out_dir, "ckpt.pt")
    good = f"{path} holds the last good state; " if os.path.exists(path) else ""
    raise UsageError(
        f"steps {first} to {last}: no gradient was finite ({cause}), all were skipped; step "
        f"{first} saw samples {names} ...; {good}use a lower --lr or --precision=fp32, and another "
        "--out_dir"
    )


def check_method(network, has_teacher, config):
    """Raise UsageError for options that do not fit a method without a teacher or a split."""
    method, has_split = config.method, network.head_ef is not None
    if not (has_teacher and has_split) and config.orth_views != "teacher":
        raise UsageError(f"orth_views={config.orth_views}: not for {method}; remove --orth_views")
    if not has_teacher and config.local_crops:
        fix = "uses two global views only; set --local_crops=0"
        raise UsageError(f"local_crops={config.local_crops}: {method} {fix}")
    if not has_teacher and has_split and config.orth not in ("cosine", "dot"):
        raise UsageError(f"orth={config.orth}: not for {method}; use --orth=cosine or dot")


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


def make_optimizer(network, config):
    """Build AdamW or SGD over two groups: matrices decay; biases, norms and .no_decay do not."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    exempt = getattr(network.backbone, "no_decay", ())  # VMamba's decay rates
    groups = [dict(params=[], decays=True), dict(params=[], decays=False)]
    for name, p in trained.items():
        groups[p.ndim < 2 or name.endswith(exempt)]["params"].append(p)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    for p in trained.values():  # torch sets none if the first step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer
