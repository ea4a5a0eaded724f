"""Backbones, the split of their output, the heads, and the network of student and teacher."""

import copy
import functools
import math
from collections import OrderedDict, namedtuple

from lib.config import UsageError, did_you_mean
from lib.siamese import SiameseHead

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from vmamba import VMAMBAS, VMamba, init_linear


def ir_dims(dim, ratio):
    """Return d_ir = int(dim * ratio), the dimensions of ir. d_ir == dim means no split."""
    d_ir = int(dim * ratio)
    if not 0 < d_ir <= dim or (ratio < 1 and d_ir == dim):
        raise UsageError(f"ratio={ratio} leaves one part of {dim} dimensions empty; try 0.8")
    return d_ir


def split(z, ratio=0.8):
    """Cut z (..., D) into z_ir (..., int(D * ratio)) and z_ef (..., the rest) (section 3.2)."""
    return z.tensor_split([int(z.shape[-1] * ratio)], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x, n):
        """Map x (B, N, D) to q of the first n tokens, k and v of all: (B, heads, ., D / heads)."""
        D = x.shape[-1]
        if n == x.shape[1]:
            q, k, v = self.qkv(x).split(D, -1)
        else:
            q = F.linear(x[:, :n], self.qkv.weight[:D], self.qkv.bias[:D])
            k, v = F.linear(x, self.qkv.weight[D:], self.qkv.bias[D:]).split(D, -1)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v)]

    def weights(self, q, k):
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (B, heads, n, N)

    def forward(self, x, n):
        q, k, v = self.queries_keys_values(x, n)
        if x.is_cuda or not torch.is_grad_enabled():
            x = F.scaled_dot_product_attention(q, k, v)
        else:  # at 17 to 197 tokens the CPU's fused backward is slower than plain products
            with torch.autocast("cpu", enabled=False):  # softmax sums in fp32 and stores bf16
                x = self.weights(q, k) @ v
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, heads, n, D / heads) -> (B, n, D)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = dict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, drop_path_scale=None, n=None):
        """Map x (B, N, D) to its first n tokens (B, n, D); drop_path_scale (B, 2) or None."""
        n = n or x.shape[1]
        scale = 1.0, 1.0
        if drop_path_scale is not None:
            scale = drop_path_scale[:, :, None, None].unbind(1)  # (B, 1, 1) of each branch
        x = x[:, :n] + scale[0] * self.attn(self.norm1(x), n)
        return x + scale[1] * self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021); state_dict keys are DINO's and timm's."""

    def __init__(self, dim, depth, heads, img_size=224, patch_size=16, drop_path=0.0):
        super().__init__()
        self.dim = dim
        self.stride = self.patch_size = patch_size
        self.drop_path = drop_path
        check_divisible(self, None, img_size=img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, dim))
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def embed(self, x):
        """Map x (B, 3, H, W) to tokens (B, 1+P, dim), CLS first, with positions."""
        check_divisible(self, None, height=x.shape[-2], width=x.shape[-1])
        patches = self.patch_embed(x)  # (B, dim, h, w)
        positions = self.positions(*patches.shape[-2:])  # (1, 1+P, dim)
        patches = patches.flatten(2).mT + positions[:, 1:]  # (B, P, dim)
        cls = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls.to(patches.dtype), patches], 1)

    def positions(self, h, w):
        """Return the position embedding (1, 1+h*w, dim), bicubically resized to h x w patches."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].view(1, side, side, self.dim).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)

    def forward(self, x, drop_path_scale=None):
        """Map x (B, 3, H, W) to the CLS token (B, dim); drop_path_scale (B, depth, 2) or None."""
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            scale = None if drop_path_scale is None else drop_path_scale[:, i]
            only_cls = 1 if i == len(self.blocks) - 1 else None  # no other token is used after it
            x = block(x, scale, only_cls)
        return self.norm(x[:, 0])

    def tokens(self, x, n=1):
        """Return the last n blocks' outputs, each after the final norm: n x (B, 1+P, dim)."""
        x = self.embed(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs

    def _last_queries_keys(self, x):
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.queries_keys_values(last.norm1(x), x.shape[1])[:2]

    def last_attention(self, x):
        """Return the last block's attention (B, heads, 1+P, 1+P); rows sum to 1."""
        return self.blocks[-1].attn.weights(*self._last_queries_keys(x))

    def last_keys(self, x):
        """Return the last block's keys, heads concatenated: (B, 1+P, dim)."""
        return self._last_queries_keys(x)[1].transpose(1, 2).flatten(2)


# name -> dim, depth, heads
VITS = dict(vit_nano=(64, 4, 2), vit_micro=(128, 6, 4), vit_tiny=(192, 12, 3))
VITS |= dict(vit_small=(384, 12, 6), vit_base=(768, 12, 12))


def _vmamba(shape, img_size, patch_size, drop_path):
    return VMamba(*shape, drop_path)  # any size, a patch of 4


def _resnet(name, img_size, patch_size, drop_path, stem="imagenet"):
    """Build torchvision's ResNet without fc; stem 'small': 3x3, stride 1, no pooling.

    The small stem is for 32 px: ImageNet's leaves a 1 x 1 map (He et al. 2016, section 4.2).
    """
    backbone = torchvision.models.get_model(name, weights=None)
    backbone.dim = backbone.fc.in_features
    backbone.stride = 1
    backbone.fc = nn.Identity()
    if stem == "small":
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone.to(memory_format=torch.channels_last)


RESNETS = [n for n in torchvision.models.list_models(torchvision.models) if "resne" in n]
SMALL = 64  # up to this side of a global crop, a ResNet has the small stem
BACKBONES = {  # name -> function(img_size, patch_size, drop_path); a new one is ONE entry
    **{name: functools.partial(ViT, *shape) for name, shape in VITS.items()},
    **{name: functools.partial(_vmamba, shape) for name, shape in VMAMBAS.items()},
    **{name: functools.partial(_resnet, name) for name in RESNETS},
}


def build_backbone(name, img_size=224, patch_size=16, drop_path=0.0, stem="imagenet"):
    """Build a backbone f: x (B, 3, H, W) float -> z (B, dim); its .stride divides H and W.

    img_size (of the position embedding) and patch_size are a ViT's, drop_path a ViT's or VMamba's,
    stem ('imagenet' or 'small') a ResNet's.
    """
    if name not in BACKBONES:
        near = did_you_mean(name, BACKBONES)
        raise UsageError(f"unknown backbone {name!r}{near}; choose from {', '.join(BACKBONES)}")
    if stem == "small" and name not in RESNETS:
        raise UsageError(f"stem=small: only for a ResNet, not for {name}; remove --stem")
    sizes = dict(img_size=img_size, patch_size=patch_size, drop_path=drop_path)
    backbone = BACKBONES[name](**sizes, **(dict(stem=stem) if name in RESNETS else {}))
    if not next(backbone.parameters()).is_meta:
        check_contract(backbone, name)
    return backbone


@torch.no_grad()
def check_contract(backbone, name):
    """Raise UsageError unless z depends on x and the weights only: no random teacher."""
    for attribute in ("dim", "stride"):
        if not hasattr(backbone, attribute):
            raise UsageError(f"backbone {name}: has no .{attribute}; set it in model.py")
    side = backbone.stride * math.ceil(32 / backbone.stride)
    x = torch.linspace(-1, 1, 6 * side**2).view(2, 3, side, side)
    trial = copy.deepcopy(backbone).train()  # a copy: batch norm's running means would move
    state = torch.get_rng_state()
    z = trial(x)
    same_state = torch.equal(state, torch.get_rng_state())
    trial.eval()
    if not same_state or not torch.equal(trial(x), trial(x)) or z.shape != (2, backbone.dim):
        raise UsageError(
            f"backbone {name} uses random numbers of its own, or its output is not (B, .dim): "
            "turn off its dropout and stochastic depth in model.py"
        )


def check_divisible(backbone, arch, **sides):
    """Raise UsageError with the option and the nearest good value unless .stride divides each."""
    n = backbone.stride
    for name, side in sides.items():
        if side % n:
            good = max(1, round(side / n)) * n
            what = f"{arch}'s {n}" if arch else f"patch_size={n}"
            raise UsageError(f"{name}={side} is not a multiple of {what}: take {good}")


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows have the length weight_g, fixed at 1 (DINO's last)."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.data)

    def prototypes(self):
        """Return the rows as they are used, weight_g * weight_v / |weight_v|: (out_dim, in_dim)."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x):
        """The same as x @ prototypes().T, with fewer numbers to scale."""
        scale = self.weight_g[:, 0] / self.weight_v.norm(dim=1)
        return F.linear(x, self.weight_v.to(x.dtype)) * scale


class ProjectionHead(nn.Module):
    """DINO's head h: an MLP, L2-normalization, then the cosines to out_dim prototypes."""

    def __init__(self, in_dim, out_dim=65536, hidden=2048, bottleneck=256):
        super().__init__()
        layers = [nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.apply(init_linear)
        self.last_layer = WeightNormLinear(bottleneck, out_dim)

    def embed(self, z):
        """Map z (N, in_dim) to unit vectors (N, bottleneck), at least fp32."""
        x = self.mlp(z)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def forward(self, z):
        """Map z (N, in_dim) to logits (N, out_dim) in [-1, 1]; bf16 would not be exact enough."""
        unit = self.embed(z)
        with torch.autocast(z.device.type, enabled=False):
            return self.last_layer(unit)


# V views of B images: z_ir (V, B, d_ir), z_ef (V, B, d_ef); ir, ef: the heads' embed, unit vectors
# (V, B, bottleneck) whose logits are head.last_layer(ir), or SimSiam's (2, V, B, hidden)
Output = namedtuple("Output", "z_ir z_ef ir ef")


class Network(nn.Module):
    """Backbone f and the heads h_ir and h_ef (None without a split: d_ir == backbone.dim)."""

    def __init__(self, backbone, d_ir, head_ir, head_ef=None):
        super().__init__()
        self.backbone = backbone
        self.d_ir = d_ir
        self.head_ir = head_ir
        self.head_ef = head_ef

    @property
    def heads(self):
        """{'ir': h_ir, 'ef': h_ef}; 'ir' alone without a split."""
        return {"ir": self.head_ir, "ef": self.head_ef} if self.head_ef else {"ir": self.head_ir}

    def forward(self, views, drop_path_scale=None):
        """Map views, a list of (n, B, 3, H, W) by resolution, to the Output of all of them."""
        z = []
        for i, x in enumerate(views):
            scale = [] if drop_path_scale is None else [drop_path_scale[i].flatten(0, 1)]
            z.append(self.backbone(x.flatten(0, 1), *scale))  # (n * B, dim)
        z_ir, z_ef = torch.cat(z).tensor_split([self.d_ir], dim=-1)  # (V * B, .)
        ir = self.head_ir.embed(z_ir)
        ef = self.head_ef.embed(z_ef) if self.head_ef else None

        B = views[0].shape[1]
        by_view = [x if x is None else x.unflatten(-2, (-1, B)) for x in (z_ir, z_ef, ir, ef)]
        return Output(*by_view)


def build_network(config, head="prototypes"):
    """Build a fresh Network from the options of `config`; head: 'prototypes' or 'siamese'."""
    if config.stem == "auto":
        is_small = config.arch in RESNETS and config.img_size <= SMALL
        config.stem = "small" if is_small else "imagenet"  # resolved, for config.json
    sizes = config.img_size, config.patch_size
    backbone = build_backbone(config.arch, *sizes, config.drop_path, config.stem)
    check_divisible(backbone, config.arch, img_size=config.img_size)
    if config.local_crops:
        check_divisible(backbone, config.arch, local_size=config.local_size)
    d_ir = ir_dims(backbone.dim, config.ratio)
    width = config.head_hidden, config.head_bottleneck
    dims = (d_ir, backbone.dim - d_ir) if d_ir < backbone.dim else (d_ir,)
    if head == "siamese":
        heads = [SiameseHead(dim, *width) for dim in dims]
    else:
        prototypes = (config.out_dim, config.out_dim_ef)
        heads = [ProjectionHead(dim, K, *width) for dim, K in zip(dims, prototypes)]
    return Network(backbone, d_ir, *heads)
