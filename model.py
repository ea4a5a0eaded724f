"""Backbones, the split, the heads, the network that student and teacher both are, and reading and writing their weights."""

import argparse
import contextlib
import math
import os
import pickle
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from configurator import UsageError, nearest
from draws import kept_branches
from losses import wide
from vmamba import VMAMBAS, VMamba

# ------------------------------------------------------------------------------------------------ the representation and its two parts


def split(z, ratio=0.8):
    """z (..., D) -> z_ir (..., int(D * ratio)), z_ef (..., the rest): the invariant part and the equivariant factors (paper section 3.2).

    The one place that cuts. For plain DINO the ratio is 1 and z_ef is empty."""
    d_ir = int(z.shape[-1] * ratio)
    return z[..., :d_ir], z[..., d_ir:]


# ------------------------------------------------------------------------------------------------ ViT


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x, n):
        """x (B, N, D) -> the queries of the first n tokens (B, heads, n, D / heads), the keys and values of all (B, heads, N, D / heads)."""
        D, (weight, bias) = x.shape[-1], (self.qkv.weight, self.qkv.bias)
        if n == x.shape[1]:
            rows = self.qkv(x).split(D, -1)
        else:
            rows = (
                F.linear(x[:, :n], weight[:D], bias[:D]),
                *F.linear(x, weight[D:], bias[D:]).split(D, -1),
            )
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in rows]

    def weights(self, x):
        q, k, _ = self.queries_keys_values(x, x.shape[1])
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (B, heads, N, N)

    def forward(self, x, n):
        q, k, v = self.queries_keys_values(x, n)
        if x.is_cuda or not torch.is_grad_enabled():
            x = F.scaled_dot_product_attention(q, k, v)
        else:  # at 17 to 197 tokens the CPU's fused backward is slower than the plain products, its forward alone is not
            with torch.autocast(
                "cpu", enabled=False
            ):  # softmax sums in fp32 but need not be stored so
                x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, heads, n, D / heads) -> (B, n, D)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )

    def forward(self, x, kept=None, n=None):
        """x (B, N, D) -> (B, n, D): the first n tokens (None: all), which attend to all N. kept (B, 2): of kept_branches; None drops nothing."""
        n = n or x.shape[1]
        kept = (1.0, 1.0) if kept is None else kept[:, :, None, None].unbind(1)  # 2 x (B, 1, 1)
        x = x[:, :n] + kept[0] * self.attn(self.norm1(x), n)
        return x + kept[1] * self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) as DINO has it; state_dict keys are DINO's and timm's."""

    def __init__(self, dim, depth, heads, img_size=224, patch_size=16, drop_path=0.0):
        super().__init__()
        self.dim, self.patch_size, self.stride = dim, patch_size, patch_size
        if img_size % patch_size:
            raise UsageError(
                f"image size {img_size} is not a multiple of patch_size={patch_size}: take {max(1, round(img_size / patch_size)) * patch_size}"
            )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, dim))
        self.patch_embed = nn.Sequential(
            OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size))
        )
        self.drop_path = drop_path
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    def embed(self, x):
        """x (B, 3, H, W) -> tokens (B, 1+P, dim), CLS first, with positions."""
        p = self.patch_size
        if x.shape[-2] % p or x.shape[-1] % p:
            raise UsageError(
                f"image of {x.shape[-2]}x{x.shape[-1]} pixels: patch_size={p} must divide both sides"
            )
        patches = self.patch_embed(x)  # (B, dim, h, w)
        positions = self.positions(*patches.shape[-2:])  # (1, 1+P, dim)
        patches = patches.flatten(2).mT + positions[:, 1:]  # (B, P, dim)
        cls = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls.to(patches.dtype), patches], 1)

    def positions(self, h, w):
        """The position embedding (1, 1+h*w, dim), bicubically resized to the exact grid of h x w patches.

        DINO resizes by a scale factor with an offset of 0.1, which misses or overshoots some grids; at 96 px the outputs differ by under 1 %."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].view(1, side, side, self.dim).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)

    def forward(self, x, draws=None):
        """x (B, 3, H, W) -> the normalised CLS token (B, dim). draws (B, depth, 2): drop path's uniforms; None drops nothing."""
        x, kept = self.embed(x), kept_branches(draws, self.drop_path, len(self.blocks))
        for i, block in enumerate(self.blocks):
            only_cls = (
                1 if i == len(self.blocks) - 1 else None
            )  # of the last block nothing else is used, so nothing else is computed
            x = block(x, kept[i], only_cls)
        return self.norm(x[:, 0])

    def tokens(self, x, n=1):
        """x (B, 3, H, W) -> list of the last n blocks' outputs (B, 1+P, dim), each after the final norm."""
        x, outputs = self.embed(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs

    def _into_last_block(self, x):
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].norm1(x)  # (B, 1+P, dim), what the last block attends over

    def last_attention(self, x):
        """x (B, 3, H, W) -> the last block's attention (B, heads, 1+P, 1+P), rows sum to 1."""
        return self.blocks[-1].attn.weights(self._into_last_block(x))

    def last_keys(self, x):
        """x (B, 3, H, W) -> the last block's keys, heads concatenated (B, 1+P, dim)."""
        x = self._into_last_block(x)
        _, keys, _ = self.blocks[-1].attn.queries_keys_values(x, x.shape[1])
        return keys.transpose(1, 2).flatten(2)


def _init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------ backbones by name

VITS = dict(
    vit_micro=(128, 6, 4), vit_tiny=(192, 12, 3), vit_small=(384, 12, 6), vit_base=(768, 12, 12)
)  # dim, depth, heads
RESNETS = tuple(
    name for name in torchvision.models.list_models(module=torchvision.models) if "resne" in name
)
BACKBONES = (*VITS, *VMAMBAS, *RESNETS)


def build_backbone(name, img_size=224, patch_size=16, drop_path=0.0):
    """-> nn.Module with .dim; module(x (B, 3, H, W) float, normalised) -> z (B, dim), for any H, W that module.stride divides.

    img_size (the grid of the position embedding) and patch_size matter to the ViTs alone, drop_path to them and VMamba, where forward is given draws. ResNets are torchvision's own without
    fc (the paper has 18 and 50; any torchvision ResNet will do). UsageError for an unknown name or a patch that does not divide."""
    if name in VITS:
        return ViT(*VITS[name], img_size, patch_size, drop_path)
    if name in VMAMBAS:
        return VMamba(*VMAMBAS[name], drop_path)
    if name in RESNETS:
        backbone = torchvision.models.get_model(name, weights=None)
        backbone.dim, backbone.stride = backbone.fc.in_features, 1
        backbone.fc = nn.Identity()
        return backbone.to(memory_format=torch.channels_last)
    raise UsageError(
        f"unknown backbone {name!r}{nearest(name, BACKBONES)}; there are {', '.join(BACKBONES)}"
    )


def must_divide(backbone, arch, **sides):
    """UsageError that names the knob and the nearest good value, unless the backbone can take images of all these sides."""
    for name, side in sides.items():
        if side % backbone.stride:
            raise UsageError(
                f"{name}={side} is not a multiple of {arch}'s {backbone.stride}: take {max(1, round(side / backbone.stride)) * backbone.stride}"
            )


class SyncBatchNormCPU(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the images of all ranks where torch's own SyncBatchNorm has no kernel: CPU processes. Same keys, same formula."""

    def _check_input_dim(self, x):
        pass  # (N, C) and (N, C, H, W) alike

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        world, images = dist.get_world_size(), (0, *range(2, x.ndim))
        channels = (-1, *(1,) * (x.ndim - 2))  # a row of C numbers as it meets x
        all_reduce = (
            torch.distributed.nn.functional.all_reduce
        )  # the one that gradients flow through
        mean = all_reduce(x.mean(images, dtype=torch.float32)) / world  # (C,)
        var = all_reduce((x - mean.view(channels)).square().mean(images)) / world  # (C,)
        with torch.no_grad():
            n = x.numel() // x.shape[1] * world
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / max(n - 1, 1), self.momentum)
        x = (x - mean.view(channels)) * (var + self.eps).rsqrt().view(channels)
        return (x * self.weight.view(channels) + self.bias.view(channels) if self.affine else x).to(
            x.dtype
        )


def synchronise_batch_norm(module, device):
    """Every batch norm of `module` replaced by one that sees the images of all ranks; parameters, buffers and keys stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            child.__class__ = SyncBatchNormCPU  # only forward differs
    return module


# ------------------------------------------------------------------------------------------------ heads and the whole network


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are unit vectors: weight_v normalised, times the gain weight_g, which is fixed at 1 (DINO)."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.data)

    def forward(self, x):
        return F.linear(x, self.weight_v.to(x.dtype)) * (
            self.weight_g[:, 0] / self.weight_v.norm(dim=1)
        )  # the outputs are fewer than the weights


class ProjectionHead(nn.Module):
    """DINO's head h: MLP in_dim -> hidden -> hidden -> bottleneck with GELU, L2-normalise, then cosine to each of out_dim prototypes."""

    def __init__(self, in_dim, out_dim=65536, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.apply(_init_linear)
        self.last_layer = WeightNormLinear(bottleneck, out_dim)

    def forward(self, z):
        """z (N, in_dim) -> logits (N, out_dim), cosines in [-1, 1], fp32 also under autocast: divided by a temperature of
        0.04, the rounding of a bf16 cosine would be an error of up to 5 % in the probabilities."""
        unit = self.unit(z)
        with torch.autocast(z.device.type, enabled=False):
            return self.last_layer(unit)

    def unit(self, z):
        """z (N, in_dim) -> (N, bottleneck) fp32 or more, of length 1: what meets the prototypes."""
        return F.normalize(wide(self.project(z)), dim=-1)

    def project(self, z):
        """z (N, in_dim) -> (N, bottleneck), before it is normalised."""
        return self.mlp(z)


class SiameseHead(nn.Module):
    """SimSiam's projector and predictor (Chen and He 2021, section 3): projector in_dim -> hidden -> hidden -> hidden with batch norm after each,
    ReLU between; predictor hidden -> bottleneck -> hidden, batch norm and ReLU within. DDCL has one for ir and one for ef."""

    def __init__(self, in_dim, hidden=2048, bottleneck=512):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(in_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(hidden, bottleneck, bias=False),
            nn.BatchNorm1d(bottleneck),
            nn.ReLU(),
            nn.Linear(bottleneck, hidden),
        )

    def forward(self, z):
        """z (2 B, in_dim), first all images' first views -> (2, 2 B, hidden): projections, predictions. Batch norm sees one view at a time."""
        projections = torch.cat([self.project(view) for view in z.chunk(2)])
        return torch.stack(
            [projections, torch.cat([self.predictor(view) for view in projections.chunk(2)])]
        )

    def project(self, z):
        """z (N, in_dim) -> (N, hidden)."""
        return self.projector(z)


class Network(nn.Module):
    """Backbone f and the heads h_ir and h_ef: what student and teacher both are. Plain DINO and SimSiam have ratio 1 and no h_ef.

    make_head(in_dim, name) -> the head of 'ir' or 'ef'."""

    def __init__(self, backbone, ratio, make_head):
        super().__init__()
        self.backbone, self.ratio = backbone, ratio
        d_ir = split(torch.empty(backbone.dim), ratio)[0].numel()
        if not 0 < d_ir <= backbone.dim or (ratio < 1 and d_ir == backbone.dim):
            raise UsageError(
                f"ratio={ratio} leaves one part of the {backbone.dim} dimensions empty: move it towards 0.8"
            )
        self.head_ir = make_head(d_ir, "ir")
        self.head_ef = make_head(backbone.dim - d_ir, "ef") if ratio < 1 else None

    def forward(self, views, draws=None):
        """views: list of tensors (n, B, 3, H, W) -> what the heads make of them, by view: of ir, of ef or None. ProjectionHead's unit vectors
        (V, B, bottleneck), V the sum of n: the losses take them to the prototypes, for the logits are too large to be kept. SiameseHead's
        projections and predictions (2, V, B, hidden).

        One backbone call an entry of the list, as a resolution; one head call for all views. draws: drop path's uniforms (n, B, depth, 2) of each."""
        B = views[0].shape[1]
        z = []
        for i, images in enumerate(views):
            images = images.flatten(0, 1)  # (n * B, 3, H, W)
            z.append(
                self.backbone(images)
                if draws is None
                else self.backbone(images, draws[i].flatten(0, 1))
            )
        z_ir, z_ef = split(torch.cat(z), self.ratio)  # (V * B, d_ir), (V * B, d_ef)
        out = [
            head.unit(part) if isinstance(head, ProjectionHead) else head(part)
            for head, part in zip(self.heads.values(), (z_ir, z_ef))
        ]
        return (*(x.unflatten(-2, (-1, B)) for x in out), None)[:2]

    @property
    def heads(self):
        """{'ir': h_ir, 'ef': h_ef}; 'ir' alone without a split."""
        return {"ir": self.head_ir, "ef": self.head_ef} if self.head_ef else {"ir": self.head_ir}


def build_network(config):
    """A fresh Network as the knobs of `config` say (configurator.Config)."""
    backbone = build_backbone(config.arch, config.img_size, config.patch_size, config.drop_path)
    ratio = config.ratio if config.method in ("clever", "ddcl") else 1.0
    if config.method in ("simsiam", "ddcl"):
        return Network(
            backbone,
            ratio,
            lambda in_dim, _: SiameseHead(in_dim, config.head_hidden, config.head_bottleneck),
        )
    prototypes = dict(ir=config.out_dim, ef=config.out_dim_ef)
    return Network(
        backbone,
        ratio,
        lambda in_dim, name: ProjectionHead(
            in_dim, prototypes[name], config.head_hidden, config.head_bottleneck
        ),
    )


# ------------------------------------------------------------------------------------------------ files


def save_atomically(obj, path):
    """torch.save that leaves at `path` the old file or the new one, whole, whatever happens meanwhile. OSError where the disk refuses."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(partial)  # it may be what fills the disk
        refused = (
            error if isinstance(error, OSError) else error.__context__
        )  # torch says "unexpected pos", in place of what the system said
        raise refused if isinstance(refused, OSError) else error
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)  # the rename itself must reach the disk
    os.close(folder)


def read_checkpoint(path):
    """torch.load of tensors and plain types only; UsageError for anything else. DINO's checkpoints also hold an argparse.Namespace, VMamba's a dict
    of yacs' own kind, read here as a plain one."""
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror or error}; give the path of a checkpoint"
        ) from None
    except pickle.UnpicklingError:
        with open(path, "rb") as file:
            is_pickled = file.read(1) in (
                b"P",
                b"\x80",
            )  # a zip as torch writes it, or a pickle as it once did
        if not is_pickled:
            raise UsageError(
                f"{path}: not a checkpoint; give a run's ckpt.pt or backbone.pt, or a published file of weights"
            ) from None
        raise UsageError(
            f"{path}: refused, more than tensors and plain types, so loading could run code; take a file that torch.load(weights_only=True) reads"
        ) from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        raise UsageError(
            f"{path}: not a checkpoint, or a damaged one ({type(error).__name__}); copy it again"
        ) from None


COUNTER = "num_batches_tracked"  # of batch norm, steps seen: files older than PyTorch 0.4.1 lack it, and at inference nothing needs it


def load_backbone(path, part="teacher"):
    """Backbone weights -> (backbone in eval mode, config dict); prints what was loaded; never leaves a weight at random.

    path: our ckpt.pt or backbone.pt; DINO's full or backbone-only checkpoint; timm's ViT, torchvision's ResNet state dict; VMamba's checkpoint. part: 'teacher' or
    'student', where the file holds both. For foreign files the config tells arch, img_size and patch_size, found from the tensors' shapes.
    Strict: every key and shape must match one of BACKBONES; only the classifiers (head.*, fc.*, classifier.head.*) and projection heads of the files are left out."""
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path}: holds a {type(checkpoint).__name__}, not weights by name")
    config = (
        checkpoint["config"]
        if isinstance(checkpoint.get("config"), dict) and "arch" in checkpoint["config"]
        else {}
    )  # ours, no one else's
    if "student" in checkpoint or "teacher" in checkpoint:
        if part not in checkpoint:
            raise UsageError(
                f"{path}: no part {part!r}; there is {', '.join(name for name in ('student', 'teacher') if name in checkpoint)}"
            )
        state = checkpoint[part]
    else:
        state = next(
            (
                checkpoint[name]
                for name in ("state_dict", "model")
                if isinstance(checkpoint.get(name), dict)
            ),
            checkpoint,
        )
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UsageError(f"{path}: holds no weights by name; give a checkpoint or a state dict")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value
            for key, value in state.items()
            if key.startswith("backbone.")
        }
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith(("head.", "fc.", "classifier.head."))
    }

    one_by_one = (
        ".in_proj.weight",
        ".out_proj.weight",
        ".fc1.weight",
        ".fc2.weight",
    )  # VMamba has saved linear maps as 1 x 1 convolutions too
    state = {
        key: value.flatten(1)
        if key.endswith(one_by_one) and getattr(value, "ndim", 0) == 4
        else value
        for key, value in state.items()
    }

    arch, img_size, patch_size = _recognise(state, path)
    if config and config.get("arch") != arch:
        raise UsageError(
            f"{path}: its config says {config.get('arch')}, its weights are those of {arch}"
        )
    backbone = build_backbone(arch, img_size, patch_size)
    counters = {key: value for key, value in backbone.state_dict().items() if key.endswith(COUNTER)}
    backbone.load_state_dict({**counters, **state}, strict=True)
    config = config or dict(arch=arch, img_size=img_size, patch_size=patch_size)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            f"loaded {path}: {config.get('method', 'foreign')} {arch}, {sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} M parameters"
        )
    return backbone.eval(), config


def _recognise(state, path):
    """The one backbone whose keys and shapes are exactly those of `state` -> (arch, img_size, patch_size)."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if hasattr(value, "shape")}
    img_size, patch_size = 224, 16
    patch, positions = (
        shapes.get("patch_embed.proj.weight", ()),
        shapes.get("pos_embed", ()),
    )  # (D, 3, P, P), (1, 1 + N, D)
    if len(patch) == 4 and patch[-1] > 0 and len(positions) == 3 and positions[1] > 1:
        patch_size = patch[-1]
        img_size = math.isqrt(positions[1] - 1) * patch_size
    best, fewest = None, None
    for arch in BACKBONES:
        with torch.device("meta"):
            expected = {
                key: tuple(value.shape)
                for key, value in build_backbone(arch, img_size, patch_size).state_dict().items()
            }
        wrong = [
            key
            for key in {**expected, **shapes}
            if expected.get(key) != shapes.get(key)
            and not (key.endswith(COUNTER) and key not in shapes)
        ]
        if not wrong and len(shapes) == len(state):
            return arch, img_size, patch_size
        if fewest is None or len(wrong) < len(fewest):
            best, fewest = arch, wrong
    raise UsageError(
        f"{path}: not the weights of a backbone known here; nearest is {best}, where {len(fewest)} entries differ, "
        f"such as {', '.join(sorted(fewest)[:3])}"
    )
