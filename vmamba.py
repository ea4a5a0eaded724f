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
from draws import kept_branches

BACKENDS = ("loop", "torch", "triton")
default_backend = None  # what backend=None means; None: Triton on a GPU that has it, else torch. The scripts set it from --scan
INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # the kernels run on the CPU, very slowly: for tests

try:
    if not (torch.cuda.is_available() or INTERPRETED):
        raise ImportError  # importing it takes a second, and there is nothing to run it on
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def choose_backend(device, backend=None):
    """-> 'loop', 'torch' or 'triton' for tensors on `device`; UsageError for one that cannot run here."""
    can_triton = triton is not None and (
        INTERPRETED or device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    )
    backend = (
        backend
        or default_backend
        or ("triton" if can_triton and device.type == "cuda" else "torch")
    )
    if backend not in BACKENDS:
        raise UsageError(f"scan={backend}: choose from {', '.join(BACKENDS)}")
    if backend == "triton" and not can_triton:
        raise UsageError(
            "scan=triton: Triton is not installed, or there is no GPU that it runs on; take --scan=torch"
        )
    return backend


def selective_scan(u, delta, A, B, C, D, delta_bias, backend=None):
    """u, delta (B, K*C, L), A (K*C, N), B, C (B, K, N, L), D, delta_bias (K*C,) -> y (B, K*C, L), in u's dtype.

    fp32 inside (for fp64 inputs 'loop' and 'torch' compute in fp64).

    backend: 'loop', 'torch', 'triton' or None, see choose_backend. Differentiable in all seven."""
    backend = choose_backend(u.device, backend)
    if backend == "loop":
        return scan_loop(u, delta, A, B, C, D, delta_bias)
    K, N, L = B.shape[1:]
    u, delta = (
        x.unflatten(1, (K, -1)).permute(1, 0, 3, 2).contiguous() for x in (u, delta)
    )  # (K, B, L, C)
    A, D, delta_bias = (
        A.view(K, -1, N),
        D.view(K, -1),
        delta_bias.view(K, -1),
    )  # (K, C, N), (K, C), (K, C)
    B, C = B.permute(1, 0, 3, 2), C.permute(1, 0, 3, 2)  # (K, B, L, N)
    scan = scan_triton if backend == "triton" else scan_torch
    return scan(u, delta, A, B, C, D, delta_bias).permute(1, 0, 3, 2).flatten(1, 2).to(u.dtype)


def scan_loop(u, delta, A, B, C, D, delta_bias):
    """The specification: arguments and result as selective_scan's."""
    work = torch.promote_types(u.dtype, torch.float32)
    K, N, L = B.shape[1:]
    u32, delta, A, D, bias = (x.to(work) for x in (u, delta, A, D, delta_bias))
    B, C = (x.to(work).repeat_interleave(u.shape[1] // K, dim=1) for x in (B, C))  # (B, K*C, N, L)
    dt = F.softplus(delta + bias[:, None])  # (B, K*C, L)
    h, y = torch.zeros_like(B[..., 0]), []  # (B, K*C, N)
    for dt_l, u_l, B_l, C_l in zip(dt.unbind(2), u32.unbind(2), B.unbind(3), C.unbind(3)):
        h = (dt_l[..., None] * A).exp() * h + (dt_l * u_l)[..., None] * B_l
        y.append((h * C_l).sum(-1))
    return (torch.stack(y, -1) + D[:, None] * u32).to(u.dtype)


def keep_out_of_graphs():
    """Before torch.compile: it is to leave the scans as they are, for a graph of hundreds of unrolled steps would gain nothing."""
    for name in ("scan_loop", "scan_torch", "scan_triton"):
        globals()[name] = torch.compiler.disable(globals()[name])


# ------------------------------------------------------------------------------------------------ the fast scan in PyTorch


def scan_torch(u, delta, A, B, C, D, delta_bias):
    """u, delta (K, B, L, C), A (K, C, N), B, C (K, B, L, N), D, delta_bias (K, C) -> y (K, B, L, C), fp32 (fp64).

    The L steps are laid out as rows x width, both about sqrt(L). Where L is prime or nearly so, steps that do nothing are added at the end."""
    L = u.shape[2]
    width = next((w for w in range(math.isqrt(L), math.isqrt(L) // 2, -1) if L % w == 0), None)
    if width is None:
        width = math.isqrt(L) + 1
        extra = -L % width
        u, B, C = (F.pad(x, (0, 0, 0, extra)) for x in (u, B, C))
        delta = F.pad(
            delta, (0, 0, 0, extra), value=-math.inf
        )  # softplus makes it 0: the state stays as it is
    return _TorchScan.apply(u, delta, A, B, C, D, delta_bias, width)[:, :, :L]


class _TorchScan(torch.autograd.Function):
    """Two levels: within all rows at once, step by step, from a state of zero; then from row to row; then within the rows again from what
    enters each. Saves its inputs and the states that enter the rows; backward recomputes the rest."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias, width):
        work = torch.promote_types(u.dtype, torch.float32)
        rows = functools.partial(
            torch.Tensor.unflatten, dim=2, sizes=(-1, width)
        )  # (K, B, L, .) -> (K, B, rows, width, .)
        u32, B32, C32 = (rows(x.to(work)) for x in (u, B, C))
        dt = F.softplus(
            rows(delta.to(work)) + bias.to(work)[:, None, None, None]
        )  # (K, B, rows, width, C)
        x, sum_dt = dt * u32, dt.sum(3)
        y, entering = D.to(work)[:, None, None, None] * u32, []
        for n in range(A.shape[2]):
            A_n = A[..., n].to(work)[:, None, None]  # (K, 1, 1, C)
            a, b = (dt * A_n[:, :, :, None]).exp_(), x * B32[..., n, None]
            entering.append(_entering_states(a, b, (sum_dt * A_n).exp_()))
            y.addcmul_(_states(a, b, entering[-1], out=b), C32[..., n, None])
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
        x, sum_dt = dt * u32, dt.sum(3)
        grad_D = (gy * u32).sum((1, 2, 3))
        grad_u, grad_dt = D.to(work)[:, None, None, None] * gy, torch.zeros_like(dt)
        grad_A, grad_B, grad_C = (
            torch.empty_like(A, dtype=work),
            torch.empty_like(B32),
            torch.empty_like(C32),
        )
        for n in range(A.shape[2]):
            A_n, B_n = A[..., n].to(work)[:, None, None], B32[..., n, None]
            a, b = (dt * A_n[:, :, :, None]).exp_(), x * B_n
            h = _states(a, b, entering[n], out=torch.empty_like(b))
            g = gy * C32[..., n, None]
            g = _gradients(a, g, (sum_dt * A_n).exp_())  # dL/dh_l = C_l gy_l + a_{l+1} dL/dh_{l+1}
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
        flat = [
            g.flatten(2, 3).to(given.dtype)
            for g, given in ((grad_u, u), (grad_delta, delta), (grad_B, B), (grad_C, C))
        ]
        return (
            flat[0],
            flat[1],
            grad_A.to(A.dtype),
            flat[2],
            flat[3],
            grad_D.to(D.dtype),
            grad_bias.to(bias.dtype),
            None,
        )


def _entering_states(a, b, total):
    """a, b (K, B, rows, width, C), total (K, B, rows, C): each row's product of a -> the states that enter the rows (K, B, rows, C)."""
    a, b = a.unbind(3), b.unbind(3)
    h = b[0]
    for a_j, b_j in zip(a[1:], b[1:]):
        h = torch.addcmul(b_j, a_j, h)
    entering = torch.zeros_like(h)
    for r in range(1, h.shape[2]):
        torch.addcmul(
            h[:, :, r - 1], total[:, :, r - 1], entering[:, :, r - 1], out=entering[:, :, r]
        )
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
    leaving = a[0] * g  # what a row hands to the one before it
    entering = torch.zeros_like(leaving)
    for r in range(leaving.shape[2] - 1, 0, -1):
        torch.addcmul(
            leaving[:, :, r], total[:, :, r], entering[:, :, r], out=entering[:, :, r - 1]
        )
    g = by_step[-1].add_(entering)
    for j in range(len(a) - 2, -1, -1):
        g = torch.addcmul(by_step[j], a[j + 1], g, out=by_step[j])
    return c


# ------------------------------------------------------------------------------------------------ the Triton kernels
#
# A program owns one image, one direction and BLOCK_C channels, and walks over the L steps in chunks of CHUNK. Within a chunk
# tl.associative_scan composes the maps h -> a h + b; the chunk's first state comes from the one before. The forward saves each chunk's first
# state. The projection to delta stays a matrix product outside, and a program does one direction: the four run side by side. The number of
# chunks is a constant of the compiled kernel, one for each size of map. The backward is two kernels, so that each only ever scans in the order
# in which it loads (a scan with reverse=True has been wrong on some versions of Triton): the first walks from the end and writes dL/dh, the second walks from the start, recomputes h and has all it needs.
# With CROSS a step l of direction k is the map's position _position(l, k): nothing is permuted or copied four times. Sums over channels and images
# are partial sums added up outside, in a fixed order: the same bits each time.

if triton:

    @triton.jit
    def _compose(a1, b1, a2, b2):
        return a1 * a2, a2 * b1 + b2

    @triton.jit
    def _softplus(x):
        e = tl.exp(tl.where(x > 20.0, 20.0, x))  # not tl.minimum, which turns NaN into 20
        series = e * (
            1.0 - e * (0.5 - e * (1.0 / 3.0 - 0.25 * e))
        )  # 1 + e would round much of a small e away
        return tl.where(x > 20.0, x, tl.where(e < 0.03, series, tl.log(1.0 + e)))

    @triton.jit
    def _position(l, k, L, H, W, CROSS: tl.constexpr):
        """Step l of direction k (0 by rows, 1 by columns, 2 and 3 the same backwards) -> its place in the map, read by rows."""
        if not CROSS:
            return l
        step = tl.where(k >= 2, L - 1 - l, l)
        return tl.where(k % 2 == 1, step % H * W + step // H, step)

    @triton.jit
    def _load(pointer, strides, k, b, position, channel, mask):
        """An element for each (step, channel) of a tensor with strides for (K, B, L, C); fp32, 0 where masked."""
        at = k * strides[0] + b * strides[1] + position * strides[2] + channel * strides[3]
        return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _step_sizes(delta, delta_strides, bias, k, b, position, channel, inside, channels):
        """delta + bias and dt = softplus of it, 0 outside: there the state stays as it is."""
        pre = _load(delta, delta_strides, k, b, position, channel, inside) + tl.load(
            bias + k * channels + channel, mask=channel < channels, other=0.0
        ).to(tl.float32)
        return pre, tl.where(inside, _softplus(pre), 0.0)

    @triton.jit
    def _scan_forward(
        u,
        us,
        delta,
        ds,
        A,
        B,
        bs,
        C,
        cs,
        D,
        bias,
        y,
        ys,
        states,
        images,
        channels,
        L,
        H,
        W,
        n: tl.constexpr,
        N: tl.constexpr,
        CHUNKS: tl.constexpr,
        CROSS: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """State n of the scan: adds its part to y (n = 0 sets it, with the skip) and writes states (K, B, chunks, C)."""
        k, b = tl.program_id(1) // images, (tl.program_id(1) % images).to(tl.int64)
        k64 = k.to(tl.int64)
        channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        step = tl.arange(0, CHUNK)[:, None]
        a_n = tl.load(A + (k * channels + channel) * N + n, mask=channel < channels, other=0.0).to(
            tl.float32
        )
        d = tl.load(D + k * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
        h0 = tl.zeros((1, BLOCK_C), tl.float32)
        for chunk in range(CHUNKS):
            l = chunk * CHUNK + step
            inside = (l < L) & (channel < channels)
            position = _position(l, k, L, H, W, CROSS)
            x = _load(u, us, k64, b, position, channel, inside)
            _, dt = _step_sizes(delta, ds, bias, k64, b, position, channel, inside, channels)
            at_state = ((k64 * images + b) * CHUNKS + chunk) * channels + channel
            tl.store(states + at_state, h0, mask=channel < channels)
            write = dt * x * _load(B, bs, k64, b, position, n, l < L)
            a, h = tl.associative_scan((tl.exp(dt * a_n), write), 0, _compose)
            h += a * h0
            part = h * _load(C, cs, k64, b, position, n, l < L)
            at_y = y + k64 * ys[0] + b * ys[1] + position * ys[2] + channel * ys[3]
            if n == 0:
                part += d * x
            else:
                part += tl.load(at_y, mask=inside, other=0.0)
            tl.store(at_y, part, mask=inside)
            h0 = tl.sum(tl.where(step == CHUNK - 1, h, 0.0), 0)[None, :]

    @triton.jit
    def _scan_adjoint(
        delta,
        ds,
        A,
        C,
        cs,
        bias,
        gy,
        gys,
        g,
        gs,
        images,
        channels,
        L,
        H,
        W,
        n: tl.constexpr,
        N: tl.constexpr,
        CHUNKS: tl.constexpr,
        CROSS: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """g_l = dL/dh_l = C_l gy_l + a_{l+1} g_{l+1}, loaded and scanned from the last step to the first."""
        k, b = tl.program_id(1) // images, (tl.program_id(1) % images).to(tl.int64)
        k64 = k.to(tl.int64)
        channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        step = tl.arange(0, CHUNK)[:, None]
        a_n = tl.load(A + (k * channels + channel) * N + n, mask=channel < channels, other=0.0).to(
            tl.float32
        )
        g0 = tl.zeros((1, BLOCK_C), tl.float32)
        for chunk in range(CHUNKS):
            l = L - 1 - chunk * CHUNK - step
            inside = (l >= 0) & (channel < channels)
            position, after = _position(l, k, L, H, W, CROSS), _position(l + 1, k, L, H, W, CROSS)
            _, dt = _step_sizes(
                delta, ds, bias, k64, b, after, channel, inside & (l + 1 < L), channels
            )
            read = _load(C, cs, k64, b, position, n, l >= 0) * _load(
                gy, gys, k64, b, position, channel, inside
            )
            a, grad = tl.associative_scan((tl.exp(dt * a_n), read), 0, _compose)
            grad += a * g0
            tl.store(
                g + k64 * gs[0] + b * gs[1] + position * gs[2] + channel * gs[3], grad, mask=inside
            )
            g0 = tl.sum(tl.where(step == CHUNK - 1, grad, 0.0), 0)[None, :]

    @triton.jit
    def _scan_backward(
        u,
        us,
        delta,
        ds,
        A,
        B,
        bs,
        D,
        bias,
        gy,
        gys,
        g,
        gs,
        states,
        du,
        ddelta,
        dA,
        dB,
        dC,
        dD,
        dbias,
        images,
        channels,
        L,
        H,
        W,
        n: tl.constexpr,
        N: tl.constexpr,
        CHUNKS: tl.constexpr,
        CROSS: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """State n's part of all gradients. du, ddelta have g's strides (ddelta before softplus' slope is applied, which the last n does);
        dA (K, B, C, N), dD, dbias (K, B, C), dB, dC (blocks of channels, K, B, N, L): sums still to be completed."""
        k, b = tl.program_id(1) // images, (tl.program_id(1) % images).to(tl.int64)
        k64, row = k.to(tl.int64), tl.program_id(1).to(tl.int64)
        channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        step, here = tl.arange(0, CHUNK)[:, None], channel < channels
        a_n = tl.load(A + (k * channels + channel) * N + n, mask=here, other=0.0).to(tl.float32)
        d = tl.load(D + k * channels + channel, mask=here, other=0.0).to(tl.float32)
        sum_a, sum_d, sum_bias = (
            tl.zeros((1, BLOCK_C), tl.float32),
            tl.zeros((1, BLOCK_C), tl.float32),
            tl.zeros((1, BLOCK_C), tl.float32),
        )
        for chunk in range(CHUNKS):
            l = chunk * CHUNK + step
            inside = (l < L) & here
            position = _position(l, k, L, H, W, CROSS)
            x = _load(u, us, k64, b, position, channel, inside)
            pre, dt = _step_sizes(delta, ds, bias, k64, b, position, channel, inside, channels)
            b_l = _load(B, bs, k64, b, position, n, l < L)
            h0 = tl.load(
                states + ((k64 * images + b) * CHUNKS + chunk) * channels + channel,
                mask=here,
                other=0.0,
            )
            write = dt * x * b_l
            a, h = tl.associative_scan((tl.exp(dt * a_n), write), 0, _compose)
            h += a * h0
            grad, grad_y = (
                _load(g, gs, k64, b, position, channel, inside),
                _load(gy, gys, k64, b, position, channel, inside),
            )
            through_a = grad * (h - write)  # dL/dh_l a_l h_{l-1}
            at = k64 * gs[0] + b * gs[1] + position * gs[2] + channel * gs[3]
            grad_x, grad_dt = grad * b_l * dt, through_a * a_n + grad * b_l * x
            if n == 0:
                grad_x += d * grad_y
                sum_d += tl.sum(grad_y * x, 0)[None, :]
            else:
                grad_x += tl.load(du + at, mask=inside, other=0.0)
                grad_dt += tl.load(ddelta + at, mask=inside, other=0.0)
            if n == N - 1:
                grad_dt *= tl.sigmoid(pre)
                sum_bias += tl.sum(tl.where(inside, grad_dt, 0.0), 0)[None, :]
            tl.store(du + at, grad_x, mask=inside)
            tl.store(ddelta + at, grad_dt, mask=inside)
            sum_a += tl.sum(through_a * dt, 0)[None, :]
            at_l = ((tl.program_id(0) * tl.num_programs(1) + row) * N + n) * L + position
            tl.store(dB + at_l, tl.sum(grad * dt * x, 1)[:, None], mask=l < L)
            tl.store(dC + at_l, tl.sum(tl.where(inside, h * grad_y, 0.0), 1)[:, None], mask=l < L)
        tl.store(dA + (row * channels + channel) * N + n, sum_a, mask=here)
        if n == 0:
            tl.store(dD + row * channels + channel, sum_d, mask=here)
        if n == N - 1:
            tl.store(dbias + row * channels + channel, sum_bias, mask=here)


CHUNK, BLOCK_C = 64, 32


def scan_triton(u, delta, A, B, C, D, delta_bias, size=None):
    """scan_torch's arguments and result, always fp32 inside. With size = (H, W) all is in map order: u (B, H*W, C), the same for all directions, delta (K, B, H*W, C),
    B, C (K, B, H*W, N) -> y (B, H*W, C), the directions' sum."""
    with torch.cuda.device_of(u):  # Triton launches on the current device
        return _TritonScan.apply(u, delta, A, B, C, D, delta_bias, size)


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias, size=None):
        (K, images, L, channels), N = delta.shape, A.shape[2]
        A, D, bias = (x.float().contiguous() for x in (A, D, bias))
        H, W = size or (1, L)
        us = u.stride() if size is None else (0, *u.stride())
        y = torch.empty_like(delta, dtype=torch.float32)
        states = [
            torch.empty(
                K, images, triton.cdiv(L, CHUNK), channels, device=u.device, dtype=torch.float32
            )
            for _ in range(N)
        ]
        ctx.grid, ctx.size = (triton.cdiv(channels, BLOCK_C), K * images), size
        ctx.static = dict(
            N=N, CHUNKS=triton.cdiv(L, CHUNK), CROSS=size is not None, CHUNK=CHUNK, BLOCK_C=BLOCK_C
        )
        for n in range(N):
            _scan_forward[ctx.grid](
                u,
                us,
                delta,
                delta.stride(),
                A,
                B,
                B.stride(),
                C,
                C.stride(),
                D,
                bias,
                y,
                y.stride(),
                states[n],
                images,
                channels,
                L,
                H,
                W,
                n=n,
                **ctx.static,
            )
        ctx.save_for_backward(u, delta, A, B, C, D, bias, *states)
        return y if size is None else y.sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        u, delta, A, B, C, D, bias, *states = ctx.saved_tensors
        (K, images, L, channels), N, (H, W) = (
            delta.shape,
            A.shape[2],
            ctx.size or (1, delta.shape[2]),
        )
        us, gys = (x.stride() if ctx.size is None else (0, *x.stride()) for x in (u, gy))
        new = functools.partial(torch.empty, device=u.device, dtype=torch.float32)
        g, du, ddelta = (torch.empty_like(delta, dtype=torch.float32) for _ in range(3))
        dA, dD, dbias = (
            new(K, images, channels, N),
            new(K, images, channels),
            new(K, images, channels),
        )
        dB, dC = (new(ctx.grid[0], K, images, N, L) for _ in range(2))
        for n in range(N):
            _scan_adjoint[ctx.grid](
                delta,
                delta.stride(),
                A,
                C,
                C.stride(),
                bias,
                gy,
                gys,
                g,
                g.stride(),
                images,
                channels,
                L,
                H,
                W,
                n=n,
                **ctx.static,
            )
            _scan_backward[ctx.grid](
                u,
                us,
                delta,
                delta.stride(),
                A,
                B,
                B.stride(),
                D,
                bias,
                gy,
                gys,
                g,
                g.stride(),
                states[n],
                du,
                ddelta,
                dA,
                dB,
                dC,
                dD,
                dbias,
                images,
                channels,
                L,
                H,
                W,
                n=n,
                **ctx.static,
            )
        dB, dC = (x.sum(0).transpose(2, 3) for x in (dB, dC))  # (K, B, L, N)
        du = du if ctx.size is None else du.sum(0)
        return (
            du.to(u.dtype),
            ddelta.to(delta.dtype),
            dA.sum(1),
            dB.to(B.dtype),
            dC.to(C.dtype),
            dD.sum(1),
            dbias.sum(1),
            None,
        )


# ------------------------------------------------------------------------------------------------ SS2D: the scan of a map in four directions


def in_order(x, k):
    """x (B, H, W, C) -> (B, H*W, C): its positions by rows (k = 0), by columns (1), or either backwards (2, 3)."""
    steps = (x if k % 2 == 0 else x.transpose(1, 2)).flatten(1, 2)
    return steps if k < 2 else steps.flip(1)


def cross_scan(x):
    """x (B, H, W, C) -> (4, B, H*W, C): its positions in the four orders."""
    return torch.stack([in_order(x, k) for k in range(4)])


def cross_merge(y, H, W):
    """y (4, B, H*W, C), each direction in its own order -> (B, H, W, C), their sum at each position."""
    by_rows, by_columns = y[0] + y[2].flip(1), y[1] + y[3].flip(1)
    return by_rows.unflatten(1, (H, W)) + by_columns.unflatten(1, (W, H)).transpose(1, 2)


class SS2D(nn.Module):
    """2-D selective scan (VMamba, version 2 without the z branch): x (B, H, W, width) -> the same shape.

    Linear width -> C, depthwise 3 x 3 convolution, SiLU, four scans, LayerNorm, linear C -> width. delta, B and C of the four scans are a linear
    map of each position to 4 (R + 2 N) numbers. It is computed once on the map; what is then put in four orders are those few numbers."""

    def __init__(self, width, ratio, N=1):
        super().__init__()
        K = 4
        C, self.R, self.N = int(ratio * width), math.ceil(width / 16), N
        self.in_proj = nn.Linear(width, C, bias=False)
        self.conv2d = nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False)
        self.x_proj_weight = nn.Parameter(
            torch.empty(K, self.R + 2 * N, C).uniform_(-(C**-0.5), C**-0.5)
        )
        self.dt_projs_weight = nn.Parameter(
            torch.empty(K, C, self.R).uniform_(-(self.R**-0.5), self.R**-0.5)
        )
        dt = torch.empty(K, C).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_projs_bias = nn.Parameter(
            dt + torch.log(-torch.expm1(-dt))
        )  # softplus of it is dt: steps of 0.001 to 0.1 (Mamba)
        self.A_logs = nn.Parameter(torch.arange(1, N + 1.0).log().repeat(K * C, 1))
        self.Ds = nn.Parameter(torch.ones(K * C))
        self.out_norm = nn.LayerNorm(C)
        self.out_proj = nn.Linear(C, width, bias=False)

    def forward(self, x):
        u = self.in_proj(x)  # (B, H, W, C)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.out_proj(self.out_norm(self.scan(u)))

    def scan(self, u):
        """u (B, H, W, C) -> (B, H, W, C), the four scans' sum, added up in fp32."""
        (images, H, W, C), K, N = u.shape, len(self.x_proj_weight), self.N
        backend = choose_backend(u.device)
        numbers = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(
            -1, (K, -1)
        )  # (B, H, W, K, R + 2 N)
        A, D = -self.A_logs.float().exp().view(K, C, N), self.Ds.view(K, C)
        if backend == "triton":  # everything stays in map order, the kernels read it by index
            low, write, read = (
                numbers.flatten(1, 2).permute(2, 0, 1, 3).split([self.R, N, N], -1)
            )  # (K, B, H*W, .)
            delta = self.delta(low)  # (K, B, H*W, C)
            return (
                scan_triton(u.flatten(1, 2), delta, A, write, read, D, self.dt_projs_bias, (H, W))
                .view(images, H, W, C)
                .to(u.dtype)
            )
        numbers = torch.stack(
            [in_order(numbers[..., k, :], k) for k in range(K)]
        )  # (K, B, L, R + 2 N), each in its own order
        low, write, read = numbers.split([self.R, N, N], -1)
        us, delta = cross_scan(u), self.delta(low)  # (K, B, L, C)
        if backend == "torch":
            y = scan_torch(us, delta, A, write, read, D, self.dt_projs_bias)
        else:
            by_channel = (x.permute(1, 0, 3, 2) for x in (us, delta, write, read))  # (B, K, ., L)
            us, delta, write, read = by_channel
            y = selective_scan(
                us.flatten(1, 2),
                delta.flatten(1, 2),
                A.view(-1, N),
                write,
                read,
                D.flatten(),
                self.dt_projs_bias.flatten(),
                backend,
            )
            y = y.unflatten(1, (K, C)).permute(1, 0, 3, 2)
        return cross_merge(y, H, W).to(u.dtype)

    def delta(self, low):
        """low (K, B, L, R) -> (K, B, L, C), before the bias and softplus."""
        return (low.flatten(1, 2) @ self.dt_projs_weight.mT.to(low.dtype)).unflatten(
            1, low.shape[1:3]
        )


# ------------------------------------------------------------------------------------------------ the backbone

VMAMBAS = {  # width of the first stage, blocks of each, ssm_ratio: VMamba's own v2 configs; micro is ours, for a CPU
    "vmamba_micro": (32, (1, 1, 2, 1), 1.0),
    "vmamba_tiny": (96, (2, 2, 8, 2), 1.0),
    "vmamba_small": (96, (2, 2, 15, 2), 2.0),
    "vmamba_base": (128, (2, 2, 15, 2), 2.0),
}
NO_DECAY = (
    "A_logs",
    "Ds",
    "dt_projs_bias",
)  # parameters that weight decay leaves alone, whatever their shape


class VSSBlock(nn.Module):
    """x (B, H, W, width) -> the same: SS2D and an MLP, each behind a norm and beside a skip."""

    def __init__(self, width, ratio):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.op = SS2D(width, ratio)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)
            )
        )

    def forward(self, x, kept=None):
        """kept (B, 2): of kept_branches; None drops nothing."""
        kept = (
            (1.0, 1.0) if kept is None else kept[:, :, None, None, None].unbind(1)
        )  # 2 x (B, 1, 1, 1)
        x = x + kept[0] * self.op(self.norm(x))
        return x + kept[1] * self.mlp(self.norm2(x))


class _ToRows(nn.Module):
    """(B, C, H, W) -> (B, H, W, C) or back: a view of channels-last memory, so that no LayerNorm permutes anything."""

    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


class VMamba(nn.Module):
    """x (B, 3, H, W) -> the pooled, normalised map (B, dim); H, W multiples of 4, the patch. State keys are VMamba's, less classifier.head."""

    def __init__(self, width, depths, ratio, drop_path=0.0):
        super().__init__()
        self.stride, widths = 4, [width * 2**i for i in range(len(depths))]
        self.dim, self.drop_path = widths[-1], drop_path
        rows, channels = _ToRows(0, 2, 3, 1), _ToRows(0, 3, 1, 2)
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 2, 1),
            rows,
            nn.LayerNorm(width // 2),
            channels,
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
            rows,
            nn.LayerNorm(width),
        )  # (B, H/4, W/4, width)
        self.layers = nn.ModuleList()
        for i, (depth, w) in enumerate(zip(depths, widths)):
            blocks = nn.Sequential(*(VSSBlock(w, ratio) for _ in range(depth)))
            down = (
                nn.Sequential(channels, nn.Conv2d(w, 2 * w, 3, 2, 1), rows, nn.LayerNorm(2 * w))
                if i + 1 < len(depths)
                else nn.Identity()
            )
            self.layers.append(nn.Sequential(OrderedDict(blocks=blocks, downsample=down)))
        self.classifier = nn.Sequential(OrderedDict(norm=nn.LayerNorm(self.dim)))
        self.apply(_init_weights)
        self.to(memory_format=torch.channels_last)

    @property
    def blocks(self):
        """All blocks in order, for drop path's draws and for compiling them one by one."""
        return [block for layer in self.layers for block in layer.blocks]

    def forward(self, x, draws=None):
        """x (B, 3, H, W) -> (B, dim). draws (B, depth, 2): drop path's uniforms; None drops nothing."""
        return self.feature_map(x, draws).mean((1, 2))

    def feature_map(self, x, draws=None):
        """x (B, 3, H, W) -> the last stage's normalised map (B, H / 32, W / 32, dim), rounded up, of which forward is the mean."""
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise UsageError(
                f"image of {x.shape[-2]}x{x.shape[-1]} pixels: VMamba's patch of {self.stride} must divide both sides"
            )
        x, kept = (
            self.patch_embed(x.contiguous(memory_format=torch.channels_last)),
            iter(kept_branches(draws, self.drop_path, len(self.blocks))),
        )
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x, next(kept))  # (B, H/s, W/s, width), s 4 .. 32
            x = layer.downsample(x)
        return self.classifier.norm(x)


def _init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
