"""What a training step works on: student, teacher, optimizer, centers; the first screen on it."""

import contextlib
import copy
import importlib.util
import os
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import augment
from lib import data, machine, rng
from lib.config import Config, UsageError
from lib.weights import load_backbone


@dataclass
class Run:
    """What a training step works on. What the next step needs is in RunDir.save and restore too."""

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
    teacher_temp: float = 0.0  # of the current step

    @property
    def has_teacher(self):
        return self.teacher is not self.network

    @property
    def total(self):
        """The number of steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @classmethod
    def start(cls, network, has_teacher, config, steps_per_epoch, here):
        """Build a run around a student on the CPU: teacher, optimizer, centers, compiled blocks."""
        device = here.device
        if not has_teacher:
            check_two_views(config, network)
        if config.init_from and not os.path.exists(os.path.join(config.out_dir, "ckpt.pt")):
            init_from(network.backbone, config)
        network = network.to(device)
        teacher = copy.deepcopy(network).requires_grad_(False) if has_teacher else network
        networks = [network, teacher] if has_teacher else [network]
        student = network
        if here.world > 1:
            networks = [sync_batch_norm(net, device) for net in networks]
            ids = [device.index] if device.type == "cuda" else None
            student = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
        config.compile = compile_blocks(networks, config.compile, device)
        if device.type == "cuda" and here.precision == "bf16":  # TF32 for the prototypes' logits
            torch.set_float32_matmul_precision("high")
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
            stream=torch.cuda.Stream(device) if device.type == "cuda" else None,
        )

    def views(self, batch):
        """Make the views of a data.Batch on the device: [(2, B, 3, G, G), (L, B, 3, l, l)].

        On a GPU this runs in a stream of its own, while the GPU still computes the step before.
        """
        main_stream = torch.cuda.current_stream() if self.stream else None
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            crops = [x.to(self.here.device, non_blocking=True) for x in batch[:2]]
            views = augment.augment_views(*crops, batch.seeds, self.recipe)
        if self.stream:
            main_stream.wait_stream(self.stream)
            for view in views:
                view.record_stream(main_stream)  # so that its memory stays taken for this step
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
        scales, first = [], 0
        for x in views:
            index = first + torch.arange(len(x))[:, None]  # of the view
            u = rng.uniforms(rng.fork(seeds, "drop_path", index=index), 2 * depth)
            u = rng.to_device(x.device, u.unflatten(-1, (depth, 2)))
            rates = torch.linspace(0, backbone.drop_path, depth, device=x.device)[:, None]
            scales.append((u >= rates) / (1 - rates))
            first += len(x)
        return scales

    @torch.no_grad()
    def clip_gradients(self):
        """Scale each gradient by itself to at most clip_grad (0: off) -> whether all are finite."""
        trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        unused = [name for name, p in trained.items() if p.grad is None]
        assert not unused, f"no loss term reaches {unused[0]}: use it, or freeze it"
        gradients = [p.grad for p in trained.values()]
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.config.clip_grad:
            scales = (self.config.clip_grad / (norms + 1e-6)).clamp(max=1)
            torch._foreach_mul_(gradients, list(scales.unbind()))
        return norms.isfinite().all()

    def step_optimizer(self, is_finite):
        """Update the student, unless a gradient is not finite: then count a skipped step."""
        self.optimizer.found_inf = (~is_finite).float()  # the device skips, nothing waits for it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped[0] += ~is_finite
        self.skipped[1] = (self.skipped[1] + 1) * ~is_finite


def first_screen(run, step, train_set):
    """Say what is about to be trained, on what, and how."""
    config, here = run.config, run.here
    lines = [""]
    for option in (f"{name}={value}" for name, value in asdict(config).items()):
        if len(lines[-1]) + len(option) > 98:
            lines.append("")
        lines[-1] += option + "  "
    backbone, network = (
        sum(p.numel() for p in net.parameters()) / 1e6
        for net in (run.network.backbone, run.network)
    )
    device = f"CPU with {torch.get_num_threads()} threads"
    if here.device.type == "cuda":
        device = torch.cuda.get_device_name(here.device)
    share = config.batch_size // here.world
    size = data.part_size(share, config.max_batch_per_gpu)
    classes = f", {len(train_set.classes)} classes" if train_set.classes else ", no labels"
    lines += [
        "",
        f"{config.method} {config.arch}: backbone {backbone:.2f} M parameters, with heads "
        f"{network:.2f} M",
        f"{len(train_set)} images of {config.data}{classes}",
        f"{here.world} x {device}, {here.precision}; batch {config.batch_size} = {here.world} x "
        f"{share // size} x {size} (ranks x accumulated x at once); peak lr "
        f"{config.lr * config.batch_size / 256:.3g}",
    ]
    if hasattr(run.network.backbone, "scan_backend"):
        lines.append(f"selective scan: {run.network.backbone.scan_backend(here.device)}")
    if step:
        lines.append(f"continuing {config.out_dir} at step {step} of {run.total}")
    elif config.init_from:
        lines.append(f"a new schedule from the weights of {config.init_from}")
    return "\n".join([*lines, ""])


def check_two_views(config, network):
    """UsageError for options that a method without a teacher cannot follow."""
    if config.local_crops:
        fix = "has two views only: use --local_crops=0"
        raise UsageError(f"local_crops={config.local_crops}: {config.method} {fix}")
    if network.head_ef is not None and config.orth not in ("cosine", "dot"):
        raise UsageError(f"orth={config.orth}: {config.method} has cosine and dot only")


def init_from(backbone, config):
    """Load the weights of config.init_from; UsageError if they are of another backbone."""
    given, facts = load_backbone(config.init_from)
    state = given.state_dict()
    own = backbone.state_dict()
    if [(name, x.shape) for name, x in state.items()] != [
        (name, x.shape) for name, x in own.items()
    ]:
        names = ("arch", "img_size", "patch_size")
        there = ", ".join(f"{name}={facts[name]}" for name in names)
        here = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        raise UsageError(f"init_from={config.init_from}: holds {there}; this run is {here}")
    backbone.load_state_dict(state)


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
    for p in trained.values():  # torch leaves them unset if the first step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def sync_batch_norm(network, device):
    """Let every batch norm see the images of all ranks; parameters and keys stay the same."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncBatchNormCPU  # only forward differs
    return network


class SyncBatchNormCPU(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the images of all ranks on CPUs; torch's SyncBatchNorm has no kernel."""

    def _check_input_dim(self, x):
        pass  # (N, C) and (N, C, H, W) alike

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        world = dist.get_world_size()
        images = (0, *range(2, x.ndim))
        channels = (-1, *(1,) * (x.ndim - 2))  # a row of C numbers as it meets x
        all_reduce = dist.nn.functional.all_reduce  # gradients flow through this one
        mean = all_reduce(x.mean(images, dtype=torch.float32)) / world  # (C,)
        var = all_reduce((x - mean.view(channels)).square().mean(images)) / world  # (C,)
        with torch.no_grad():
            n = x.numel() // x.shape[1] * world
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / max(n - 1, 1), self.momentum)
        y = (x - mean.view(channels)) * (var + self.eps).rsqrt().view(channels)
        if self.affine:
            y = y * self.weight.view(channels) + self.bias.view(channels)
        return y.to(x.dtype)


def compile_blocks(networks, wanted, device):
    """Compile the backbones' blocks one by one, and return whether; None: only a ViT's on a GPU.

    A CPU gains little and compiles for minutes; a ResNet would be one large graph.
    """
    if wanted is None:
        is_vit = hasattr(networks[0].backbone, "tokens")
        has_triton = importlib.util.find_spec("triton") is not None
        wanted = device.type == "cuda" and is_vit and has_triton
        fall_back_to_eager(wanted)
    if wanted:
        torch._dynamo.config.recompile_limit = 64  # a ViT's blocks share six graphs
        for net in networks:
            getattr(net.backbone, "keep_scans_out_of_graphs", lambda: None)()
            for block in getattr(net.backbone, "blocks", [net.backbone]):
                block.compile(dynamic=False)
    return wanted


def fall_back_to_eager(wanted):
    """Fall back to eager when a block fails to compile: what nobody asked for ends no run."""
    torch._dynamo.config.suppress_errors = wanted
    torch._functorch.config.force_non_lazy_backward_lowering = wanted  # so the backward fails now
