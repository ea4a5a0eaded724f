"""VMamba (Liu et al. 2024) without a compiler: the selective scan, SS2D, the backbone.

Glossary. In brackets: the letters of Mamba (Gu and Dao 2023); at the right: VMamba's state keys.
    B       images of a batch
    K = 4   directions in which an H x W map is read: by rows, by columns, both backwards
    C       channels of the scan (E): ssm_ratio * the block's width
    N       state dimensions of each channel (d_state): 1 in VMamba v2
    R       width of the bottleneck that delta comes from (dt_rank): ceil(width / 16)
    L       steps of a scan: H * W
    u       what is scanned (x)                      (B, K*C, L)
    delta   step size before its bias and softplus   (B, K*C, L)   dt_projs_weight, dt_projs_bias
    A       decay rates, negative: -exp(A_logs)      (K*C, N)      A_logs
    B, C    how a step writes and reads the state    (B, K, N, L)  x_proj_weight
    D       the skip: y += D u                       (K*C,)        Ds

The scan:
    dt  = softplus(delta + bias)
    h_l = exp(dt_l A) h_{l-1} + dt_l B_l u_l
    y_l = C_l . h_l + D u_l

`scan_loop` computes just that: the specification. `scan_torch` computes it in about 3 sqrt(L)
large operations instead of L small ones. `scan_triton` (lib/scan_triton.py) runs it on a GPU.
"""

import functools
import math
from collections import OrderedDict
from itertools import repeat

from lib.config import UsageError
from lib.scan_triton import available, scan_triton

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import Permute

# --- the scan, as it is defined -------------------------------------------------------------------


def scan_loop(u, delta, A, B, C, D, delta_bias):
    """Scan step by step: the specification.

    u, delta (K, B, L, C), A (K, C, N), B, C (K, B, L, N), D, delta_bias (K, C)
    -> y (K, B, L, C) in fp32; in fp64 for fp64 inputs.
    """
    work = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C, D, bias = (x.to(work) for x in (u, delta, A, B, C, D, delta_bias))
    A = A[:, None]  # (K, 1, C, N)
    B, C = (x[..., None, :] for x in (B, C))  # (K, B, L, 1, N)
    dt = F.softplus(delta + bias[:, None, None])
    h = 0.0  # then (K, B, C, N)
    y = []
    for dt_l, u_l, B_l, C_l in zip(dt.unbind(2), u.unbind(2), B.unbind(2), C.unbind(2)):
        h = (dt_l[..., None] * A).exp() * h + (dt_l * u_l)[..., None] * B_l
        y.append((h * C_l).sum(-1))
    return torch.stack(y, 2) + D[:, None, None] * u


# --- the same scan, fast, in PyTorch --------------------------------------------------------------


def scan_torch(u, delta, A, B, C, D, delta_bias):
    """Scan as scan_loop, in about 3 sqrt(L) operations, with a hand-written backward.

    The L steps are laid out as rows x width, both about sqrt(L). Where L has no such divisor,
    steps that do nothing are added at the end.
    """
    L = u.shape[2]
    root = math.isqrt(L)
    width = next((w for w in range(root, root // 2, -1) if L % w == 0), None)
    if width is None:
        width = root + 1
        extra = -L % width
        u, B, C = (F.pad(x, (0, 0, 0, extra)) for x in (u, B, C))
        # Softplus makes 0 of -inf: a step of size 0 leaves the state as it is.
        delta = F.pad(delta, (0, 0, 0, extra), value=-math.inf)
    return _TorchScan.apply(width, u, delta, A, B, C, D, delta_bias)[:, :, :L]


class _TorchScan(torch.autograd.Function):
    """Scan within all rows at once from states of zero; from row to row; within the rows again.

    Saves its inputs and the states that enter the rows. The backward recomputes the rest.
    """

    @staticmethod
    def forward(ctx, width, *inputs):
        u, delta, A, B, C, D, bias = inputs
        work = torch.promote_types(u.dtype, torch.float32)
        rows = functools.partial(torch.Tensor.unflatten, dim=2, sizes=(-1, width))
        u32, B32, C32 = (rows(x.to(work)) for x in (u, B, C))  # (K, B, rows, width, .)
        dt = F.softplus(rows(delta.to(work)) + bias.to(work)[:, None, None, None])
        sum_dt = dt.sum(3)
        x = dt * u32
        y = D.to(work)[:, None, None, None] * u32
        entering = []
        for n in range(A.shape[2]):
            A_n = A[..., n].to(work)[:, None, None]  # (K, 1, 1, C)
            a = (dt * A_n[:, :, :, None]).exp_()
            b = x * B32[..., n, None]
            entering.append(_entering_states(a, b, (sum_dt * A_n).exp_()))
            _run(entering[-1], a.unbind(3), b.unbind(3), b.unbind(3))  # b becomes h
            y.addcmul_(b, C32[..., n, None])
        ctx.width = width
        ctx.save_for_backward(u, delta, A, B, C, D, bias, *entering)
        return y.flatten(2, 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        u, delta, A, B, C, D, bias, *entering = ctx.saved_tensors
        work = torch.promote_types(u.dtype, torch.float32)
        rows = functools.partial(torch.Tensor.unflatten, dim=2, sizes=(-1, ctx.width))
        u32, B32, C32, gy = (rows(x.to(work)) for x in (u, B, C, grad_y))
        pre = rows(delta.to(work)) + bias.to(work)[:, None, None, None]
        dt = F.softplus(pre)
        sum_dt = dt.sum(3)
        x = dt * u32
        grad_D = (gy * u32).sum((1, 2, 3))
        grad_u = D.to(work)[:, None, None, None] * gy
        grad_dt = torch.zeros_like(dt)
        grad_A = torch.empty_like(A, dtype=work)
        grad_B, grad_C = (torch.empty_like(B32) for _ in range(2))
        for n in range(A.shape[2]):
            A_n = A[..., n].to(work)[:, None, None]
            B_n = B32[..., n, None]
            a = (dt * A_n[:, :, :, None]).exp_()
            b = x * B_n
            h = torch.empty_like(b)
            _run(entering[n], a.unbind(3), b.unbind(3), h.unbind(3))
            g = _gradients(a, gy * C32[..., n, None], (sum_dt * A_n).exp_())  # dL/dh_l
            grad_C[..., n] = (gy * h).sum(-1)
            grad_B[..., n] = (g * x).sum(-1)
            through_a = h.sub_(b).mul_(g)  # a_l h_{l-1} dL/dh_l
            grad_A[..., n] = (through_a * dt).sum((1, 2, 3))
            grad_dt.addcmul_(through_a, A_n[:, :, :, None])
            g.mul_(B_n)  # dL/dx
            grad_dt.addcmul_(g, u32)
            grad_u.addcmul_(g, dt)
        grad_delta = grad_dt.mul_(torch.sigmoid(pre))
        grad_bias = grad_delta.sum((1, 2, 3))
        grads = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias)
        return None, *(g.reshape(x.shape).to(x.dtype) for g, x in zip(grads, ctx.saved_tensors))


def _run(h, a, b, out):
    """Take the steps h -> a_j h + b_j, write each h into out (None: nowhere), return the last."""
    for a_j, b_j, out_j in zip(a, b, out):
        h = torch.addcmul(b_j, a_j, h, out=out_j)
    return h


def _entering_states(a, b, total):
    """Return the states that enter the rows (K, B, rows, C). total: product of a over each row."""
    a, b = a.unbind(3), b.unbind(3)
    leaving = _run(b[0], a[1:], b[1:], repeat(None))  # each row from a state of zero
    entering = torch.zeros_like(leaving)
    rows = entering.unbind(2)
    _run(rows[0], total.unbind(2), leaving.unbind(2), rows[1:])
    return entering


def _gradients(a, c, total):
    """Compute g_j = c_j + a_{j+1} g_{j+1}, from the last step to the first, in place of c."""
    a, steps = a.unbind(3)[::-1], c.unbind(3)[::-1]
    leaving = a[-1] * _run(steps[0], a, steps[1:], repeat(None))  # to the row before
    entering = torch.zeros_like(leaving)
    rows = entering.unbind(2)[::-1]
    _run(rows[0], total.unbind(2)[::-1], leaving.unbind(2)[::-1], rows[1:])
    _run(steps[0].add_(entering), a, steps[1:], steps[1:])
    return c


# --- which scan runs ------------------------------------------------------------------------------

SCANS = {"loop": scan_loop, "torch": scan_torch, "triton": scan_triton}
default_backend = None  # None: Triton on a GPU that runs it, else PyTorch
CPU = torch.device("cpu")


def set_backend(name, device=CPU):
    """Set the default backend: 'auto' or one of SCANS. UsageError if it cannot run on device."""
    global default_backend
    default_backend = None if name == "auto" else choose_backend(device, name)


def choose_backend(device, backend=None):
    """Return the backend for this torch.device. UsageError for one that does not run there."""
    fastest = "triton" if device.type == "cuda" and available(device) else "torch"
    # the default may differ: a network is checked on the CPU before it moves to the GPU
    gives_way = default_backend == "triton" and not available(device)
    backend = backend or (None if gives_way else default_backend) or fastest
    if backend not in SCANS:
        raise UsageError(f"scan={backend}: choose from {', '.join(SCANS)}")
    if backend == "triton" and not available(device):
        raise UsageError("scan=triton: needs Triton and a GPU that it supports; use --scan=torch")
    return backend


def selective_scan(u, delta, A, B, C, D, delta_bias, backend=None):
    """Scan K groups of C channels each, every one in its own order. Differentiable in all seven.

    u, delta (B, K*C, L), A (K*C, N), B, C (B, K, N, L), D, delta_bias (K*C,)
    -> y (B, K*C, L) in u's dtype. Computes in fp32; 'loop' and 'torch' in fp64 for fp64 inputs.
    backend: one of SCANS, or None for the default one, see choose_backend.
    """
    scan = SCANS[choose_backend(u.device, backend)]
    K, N = B.shape[1:3]
    u, delta = (x.unflatten(1, (K, -1)).permute(1, 0, 3, 2).contiguous() for x in (u, delta))
    B, C = (x.permute(1, 0, 3, 2) for x in (B, C))
    A = A.view(K, -1, N)
    D, delta_bias = (x.view(K, -1) for x in (D, delta_bias))
    return scan(u, delta, A, B, C, D, delta_bias).permute(1, 0, 3, 2).flatten(1, 2).to(u.dtype)


# --- SS2D: the scan of a map in four directions ---------------------------------------------------

RECOMPUTES = {"cuda"}  # devices where backward computes cheap parts again: half the memory


def recomputed(function, x):
    """Return function(x). On a device of RECOMPUTES its insides are not saved for backward.

    Backward computes all but the last operation again. A compiled graph does so itself.
    """
    is_eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if is_eager and x.device.type in RECOMPUTES:
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return function(x)


def in_order(x, k):
    """Read x (B, H, W, C) by rows (k = 0), by columns (1) or so backwards (2, 3): (B, H*W, C)."""
    steps = (x if k % 2 == 0 else x.transpose(1, 2)).flatten(1, 2)
    return steps if k < 2 else steps.flip(1)


def cross_scan(x):
    """Read x (B, H, W, C) in the four directions: (4, B, H*W, C)."""
    return torch.stack([in_order(x, k) for k in range(4)])


def cross_merge(y, H, W):
    """Put y (4, B, H*W, C), each direction in its own order, on a map and add: (B, H, W, C)."""
    by_rows = y[0] + y[2].flip(1)
    by_columns = y[1] + y[3].flip(1)
    return by_rows.unflatten(1, (H, W)) + by_columns.unflatten(1, (W, H)).transpose(1, 2)


class SS2D(nn.Module):
    """2-D selective scan, x (B, H, W, width) -> the same shape (VMamba v2, without the z branch).

    Linear width -> C, depthwise 3 x 3 convolution, SiLU, four scans, LayerNorm, linear C -> width.
    A linear map gives R + 2 N numbers for each position and direction: delta's bottleneck, B, C.
    They are computed once on the map; only these few numbers are then put in four orders.
    """

    def __init__(self, width, ratio, N=1):
        super().__init__()
        K = 4
        C = int(ratio * width)
        R = math.ceil(width / 16)
        self.R = R
        self.in_proj = nn.Linear(width, C, bias=False)
        self.conv2d = nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False)
        x_proj = torch.empty(K, R + 2 * N, C).uniform_(-(C**-0.5), C**-0.5)
        self.x_proj_weight = nn.Parameter(x_proj)
        dt_projs = torch.empty(K, C, R).uniform_(-(R**-0.5), R**-0.5)
        self.dt_projs_weight = nn.Parameter(dt_projs)
        # Softplus of the bias is dt: the first steps have sizes of 0.001 to 0.1, as in Mamba.
        dt = torch.empty(K, C).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_projs_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_logs = nn.Parameter(torch.arange(1, N + 1.0).log().repeat(K * C, 1))
        self.Ds = nn.Parameter(torch.ones(K * C))
        self.out_norm = nn.LayerNorm(C)
        self.out_proj = nn.Linear(C, width, bias=False)

    def forward(self, x):
        u = self.in_proj(x)  # (B, H, W, C)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return recomputed(lambda y: self.out_proj(self.out_norm(y)), self.scan(u))

    def scan(self, u):
        """Scan u (B, H, W, C) in four directions. Returns their sum (B, H, W, C), added in fp32."""
        images, H, W, C = u.shape
        K, N = 4, self.A_logs.shape[1]
        A = -self.A_logs.float().exp().view(K, C, N)
        D = self.Ds.view(K, C)
        bias = self.dt_projs_bias
        backend = choose_backend(u.device)
        scan = SCANS[backend]
        numbers = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (K, -1))
        if backend == "triton":  # all stays in map order: the kernels read the map by index
            numbers = numbers.flatten(1, 2).permute(2, 0, 1, 3)
        else:
            numbers = torch.stack([in_order(numbers[..., k, :], k) for k in range(K)])
        low, write, read = numbers.split([self.R, N, N], -1)  # (K, B, L, R), B and C (K, B, L, N)
        weight = self.dt_projs_weight.mT.to(low.dtype)
        if backend == "triton":
            y = scan(u.flatten(1, 2), (low, weight), A, write, read, D, bias, (H, W))
            return y.view(images, H, W, C).to(u.dtype)
        delta = (low.flatten(1, 2) @ weight).unflatten(1, low.shape[1:3])  # (K, B, L, C)
        y = scan(cross_scan(u), delta, A, write, read, D, bias)
        return cross_merge(y, H, W).to(u.dtype)


# --- the backbone ---------------------------------------------------------------------------------

VMAMBAS = {  # width of the first stage, blocks of each stage, ssm_ratio
    "vmamba_micro": (32, (1, 1, 2, 1), 1.0),  # ours, for a CPU; the others are VMamba v2's configs
    "vmamba_tiny": (96, (2, 2, 8, 2), 1.0),
    "vmamba_small": (96, (2, 2, 15, 2), 2.0),
    "vmamba_base": (128, (2, 2, 15, 2), 2.0),
}


class VSSBlock(nn.Module):
    """SS2D and an MLP, each behind a norm and beside a skip: x (B, H, W, width) -> the same."""

    def __init__(self, width, ratio):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.op = SS2D(width, ratio)
        self.norm2 = nn.LayerNorm(width)
        mlp = dict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(mlp))

    def forward(self, x, scale=None):
        """scale (B, 2): drop path's factors of the two branches. None drops nothing."""
        scales = (1.0, 1.0) if scale is None else scale[:, :, None, None, None].unbind(1)
        x = x + scales[0] * self.op(self.norm(x))
        hidden = recomputed(lambda x: self.mlp.fc1(self.norm2(x)), x)
        return x + scales[1] * recomputed(lambda h: self.mlp.fc2(self.mlp.act(h)), hidden)


class VMamba(nn.Module):
    """x (B, 3, H, W) -> the mean of the last map (B, dim).

    State keys are VMamba's, less classifier.head. `drop_path`: the drop rate of the last block.
    """

    no_decay = ("A_logs", "Ds", "dt_projs_bias")  # no weight decay on these, whatever their shape
    scan_backend = staticmethod(choose_backend)

    def __init__(self, width, depths, ratio, drop_path=0.0):
        super().__init__()
        widths = [width * 2**i for i in range(len(depths))]
        self.stride = 4
        self.dim = widths[-1]
        self.drop_path = drop_path
        to_last = Permute([0, 2, 3, 1])  # (B, C, H, W) -> (B, H, W, C): a view, as the memory is so
        to_first = Permute([0, 3, 1, 2])
        half = width // 2
        stem = (nn.Conv2d(3, half, 3, 2, 1), to_last, nn.LayerNorm(half), to_first, nn.GELU())
        embed = (nn.Conv2d(half, width, 3, 2, 1), to_last, nn.LayerNorm(width))
        self.patch_embed = nn.Sequential(*stem, *embed)  # (B, 3, H, W) -> (B, H/4, W/4, width)
        self.layers = nn.ModuleList()
        for depth, w in zip(depths, widths):
            blocks = nn.Sequential(*(VSSBlock(w, ratio) for _ in range(depth)))
            down = nn.Identity()
            if w < self.dim:
                conv = nn.Conv2d(w, 2 * w, 3, 2, 1)
                down = nn.Sequential(to_first, conv, to_last, nn.LayerNorm(2 * w))
            self.layers.append(nn.Sequential(OrderedDict(blocks=blocks, downsample=down)))
        self.classifier = nn.Sequential(OrderedDict(norm=nn.LayerNorm(self.dim)))
        self.apply(init_linear)
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def keep_scans_out_of_graphs():
        """Exclude the scans from torch.compile: a graph of hundreds of steps gains nothing."""
        for name, scan in SCANS.items():
            SCANS[name] = torch.compiler.disable(scan)

    @property
    def blocks(self):
        """All blocks in order: for drop path, and for compiling them one by one."""
        return [block for layer in self.layers for block in layer.blocks]

    def forward(self, x, drop_path_scale=None):
        """x (B, 3, H, W), drop_path_scale (B, depth, 2) or None -> (B, dim)."""
        return self.feature_map(x, drop_path_scale).mean((1, 2))

    def feature_map(self, x, drop_path_scale=None):
        """Return the last, normalized map (B, H / 32, W / 32, dim), its sides rounded up."""
        depth = len(self.blocks)
        scales = iter([None] * depth if drop_path_scale is None else drop_path_scale.unbind(1))
        x = recomputed(self.patch_embed, x.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x, next(scales))  # (B, H/s, W/s, width), s = 4, 8, 16, 32
            x = layer.downsample(x)
        return self.classifier.norm(x)


def init_linear(module):
    """Initialize a linear layer as DINO: weights N(0, 0.02), truncated, biases 0. For apply()."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
