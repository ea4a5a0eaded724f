"""VMamba (Liu et al. 2024) in one file, without a compiler: the selective scan three times over, SS2D, the backbone.

Glossary; in brackets the letters of Mamba (Gu and Dao 2023) and the names in VMamba's state dict:
    B       images of a batch
    K = 4   directions in which an H x W map is read: by rows, by columns, and both backwards
    C       channels of the scan (E): ssm_ratio * the block's width
    N       state dimensions of each channel (d_state): 1 in VMamba v2
    R       width of the bottleneck that delta comes from (dt_rank): ceil(width / 16)
    L       steps of a scan: H * W
    u       what is scanned (x)                              (B, K*C, L)
    delta   step size before softplus and its bias           (B, K*C, L)    dt_projs_weight, dt_projs_bias
    A       decay rates, negative: -exp(A_logs)              (K*C, N)       A_logs
    B, C    how a step writes and reads the state            (B, K, N, L)   x_proj_weight gives R + 2 N numbers a position
    D       the skip: y += D u                               (K*C,)         Ds

The scan:  dt = softplus(delta + bias);  h_l = exp(dt_l A) h_{l-1} + dt_l B_l u_l;  y_l = C_l . h_l + D u_l.

`scan_loop` says just that and is the specification. `_TorchScan` computes it in about 3 sqrt(L) large operations instead of L small ones, with
a hand-written backward that recomputes the states. The Triton kernels do the same on a GPU, reading the map in four directions by index.
"""
import functools
import math
import os
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UsageError

BACKENDS = ("loop", "torch", "triton")
default_backend = None  # what backend=None means; None: Triton on a GPU that has it, else torch. train.py sets it from --scan

try:
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
        raise ImportError  # importing it takes a second, and there is nothing to run it on
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def choose_backend(device, backend=None):
    """-> 'loop', 'torch' or 'triton' for tensors on `device`; UsageError for one that cannot run here."""
    backend = backend or default_backend or ("triton" if triton and device.type == "cuda" else "torch")
    if backend not in BACKENDS:
        raise UsageError(f"scan={backend}: choose from {', '.join(BACKENDS)}")
    if backend == "triton" and not triton:
        raise UsageError("scan=triton: Triton is not installed, or there is no GPU to run it; take --scan=torch")
    return backend


def selective_scan(u, delta, A, B, C, D, delta_bias, backend=None):
    """u, delta (B, K*C, L), A (K*C, N), B, C (B, K, N, L), D, delta_bias (K*C,) -> y (B, K*C, L), in u's dtype, fp32 inside (fp64 for fp64).

    backend: 'loop', 'torch', 'triton' or None, see choose_backend. Differentiable in all seven."""
    backend = choose_backend(u.device, backend)
    if backend == "loop":
        return scan_loop(u, delta, A, B, C, D, delta_bias)
    K, N, L = B.shape[1:]
    u, delta = (x.unflatten(1, (K, -1)).permute(1, 0, 3, 2) for x in (u, delta))                   # (K, B, L, C)
    A, D, delta_bias = A.view(K, -1, N), D.view(K, -1), delta_bias.view(K, -1)                     # (K, C, N), (K, C), (K, C)
    B, C = B.permute(1, 0, 3, 2), C.permute(1, 0, 3, 2)                                            # (K, B, L, N)
    scan = _TritonScan.apply if backend == "triton" else scan_torch
    return scan(u, delta, A, B, C, D, delta_bias).permute(1, 0, 3, 2).flatten(1, 2)


def scan_loop(u, delta, A, B, C, D, delta_bias):
    """The specification: arguments and result as selective_scan's."""
    work = torch.promote_types(u.dtype, torch.float32)
    K, N, L = B.shape[1:]
    u32, delta, A, D, bias = (x.to(work) for x in (u, delta, A, D, delta_bias))
    B, C = (x.to(work).repeat_interleave(u.shape[1] // K, dim=1) for x in (B, C))                  # (B, K*C, N, L)
    dt = F.softplus(delta + bias[:, None])                                                         # (B, K*C, L)
    h, y = torch.zeros_like(B[..., 0]), []                                                         # (B, K*C, N)
    for dt_l, u_l, B_l, C_l in zip(dt.unbind(2), u32.unbind(2), B.unbind(3), C.unbind(3)):
        h = (dt_l[..., None] * A).exp() * h + (dt_l * u_l)[..., None] * B_l
        y.append((h * C_l).sum(-1))
    return (torch.stack(y, -1) + D[:, None] * u32).to(u.dtype)


# ------------------------------------------------------------------------------------------------ the fast scan in PyTorch


@torch.compiler.disable  # a graph of hundreds of unrolled steps would gain nothing
def scan_torch(u, delta, A, B, C, D, delta_bias):
    """u, delta (K, B, L, C), A (K, C, N), B, C (K, B, L, N), D, delta_bias (K, C) -> y (K, B, L, C).

    The L steps are laid out as rows x width, both about sqrt(L). Where L is prime or nearly so, steps that do nothing are added at the end."""
    L = u.shape[2]
    width = next((w for w in range(math.isqrt(L), math.isqrt(L) // 2, -1) if L % w == 0), None)
    if width is None:
        width = math.isqrt(L) + 1
        extra = -L % width
        u, B, C = (F.pad(x, (0, 0, 0, extra)) for x in (u, B, C))
        delta = F.pad(delta, (0, 0, 0, extra), value=-math.inf)  # softplus makes it 0: the state stays as it is
    return _TorchScan.apply(u, delta, A, B, C, D, delta_bias, width)[:, :, :L]


class _TorchScan(torch.autograd.Function):
    """Two levels: within all rows at once, step by step, from a state of zero; then from row to row; then within the rows again from what
    enters each. Saves its inputs and the states that enter the rows; backward recomputes the rest."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias, width):
        work = torch.promote_types(u.dtype, torch.float32)
        rows = functools.partial(torch.Tensor.unflatten, dim=2, sizes=(-1, width))                 # (K, B, L, .) -> (K, B, rows, width, .)
        u32, B32, C32 = (rows(x.to(work)) for x in (u, B, C))
        dt = F.softplus(rows(delta.to(work)) + bias.to(work)[:, None, None, None])                 # (K, B, rows, width, C)
        x, sum_dt = dt * u32, dt.sum(3)
        y, entering = D.to(work)[:, None, None, None] * u32, []
        for n in range(A.shape[2]):
            A_n = A[..., n].to(work)[:, None, None]                                                # (K, 1, 1, C)
            a, b = (dt * A_n[:, :, :, None]).exp_(), x * B32[..., n, None]
            entering.append(_entering_states(a, b, (sum_dt * A_n).exp_()))
            y.addcmul_(_states(a, b, entering[-1], out=b), C32[..., n, None])
        ctx.width = width
        ctx.save_for_backward(u, delta, A, B, C, D, bias, *entering)
        return y.flatten(2, 3).to(u.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        u, delta, A, B, C, D, bias, *entering = ctx.saved_tensors
        work = torch.promote_types(u.dtype, torch.float32)
        rows = functools.partial(torch.Tensor.unflatten, dim=2, sizes=(-1, ctx.width))
        u32, B32, C32, gy = (rows(x.to(work)) for x in (u, B, C, grad_y))
        pre = rows(delta.to(work)) + bias.to(work)[:, None, None, None]
        dt = F.softplus(pre)
        x, sum_dt = dt * u32, dt.sum(3)
        grad_D = torch.einsum("kbrwc,kbrwc->kc", gy, u32)
        grad_u, grad_dt = D.to(work)[:, None, None, None] * gy, torch.zeros_like(dt)
        grad_A, grad_B, grad_C = torch.empty_like(A, dtype=work), torch.empty_like(B32), torch.empty_like(C32)
        for n in range(A.shape[2]):
            A_n, B_n = A[..., n].to(work)[:, None, None], B32[..., n, None]
            a, b = (dt * A_n[:, :, :, None]).exp_(), x * B_n
            h = _states(a, b, entering[n], out=torch.empty_like(b))
            g = gy * C32[..., n, None]
            g = _gradients(a, g, (sum_dt * A_n).exp_())                                            # dL/dh_l = C_l gy_l + a_{l+1} dL/dh_{l+1}
            grad_C[..., n] = torch.linalg.vecdot(gy, h)
            grad_B[..., n] = torch.linalg.vecdot(g, x)
            through_a = h.sub_(b).mul_(g)                                                          # a_l h_{l-1} dL/dh_l
            grad_A[..., n] = torch.einsum("kbrwc,kbrwc->kc", through_a, dt)
            grad_dt.addcmul_(through_a, A_n[:, :, :, None])
            g.mul_(B_n)                                                                            # dL/dx
            grad_dt.addcmul_(g, u32)
            grad_u.addcmul_(g, dt)
        grad_delta = grad_dt.mul_(torch.sigmoid(pre))
        grad_bias = grad_delta.sum((1, 2, 3))
        flat = [g.flatten(2, 3).to(given.dtype) for g, given in ((grad_u, u), (grad_delta, delta), (grad_B, B), (grad_C, C))]
        return flat[0], flat[1], grad_A.to(A.dtype), flat[2], flat[3], grad_D.to(D.dtype), grad_bias.to(bias.dtype), None


def _entering_states(a, b, total):
    """a, b (K, B, rows, width, C), total (K, B, rows, C): each row's product of a -> the states that enter the rows (K, B, rows, C)."""
    a, b = a.unbind(3), b.unbind(3)
    h = b[0]
    for a_j, b_j in zip(a[1:], b[1:]):
        h = torch.addcmul(b_j, a_j, h)
    entering = torch.zeros_like(h)
    for r in range(1, h.shape[2]):
        torch.addcmul(h[:, :, r - 1], total[:, :, r - 1], entering[:, :, r - 1], out=entering[:, :, r])
    return entering


def _states(a, b, entering, out):
    """h_j = a_j h_{j-1} + b_j along each row, from what enters it, into `out`, which may be b."""
    h = entering
    for a_j, b_j, out_j in zip(a.unbind(3), b.unbind(3), out.unbind(3)):
        h = torch.addcmul(b_j, a_j, h, out=out_j)
    return out


def _gradients(a, c, total):
    """g_j = c_j + a_{j+1} g_{j+1} over the rows from the last step to the first, in place of c."""
    a, by_step = a.unbind(3), c.unbind(3)
    g = by_step[-1]
    for j in range(len(a) - 2, -1, -1):
        g = torch.addcmul(by_step[j], a[j + 1], g)
    leaving = a[0] * g                                                                             # what a row hands to the one before it
    entering = torch.zeros_like(leaving)
    for r in range(leaving.shape[2] - 1, 0, -1):
        torch.addcmul(leaving[:, :, r], total[:, :, r], entering[:, :, r], out=entering[:, :, r - 1])
    g = by_step[-1].add_(entering)
    for j in range(len(a) - 2, -1, -1):
        g = torch.addcmul(by_step[j], a[j + 1], g, out=by_step[j])
    return c
