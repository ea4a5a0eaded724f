"""The selective scan as Triton kernels, for a GPU. vmamba.scan_loop is what they compute.

A program owns one image, one direction and BLOCK_C channels, and walks over the L steps in chunks
of CHUNK. Within a chunk, tl.associative_scan composes the maps h -> a h + b; the chunk starts from
the last state of the chunk before. The forward kernel saves the state that enters each chunk.

- The four directions run side by side. With a map's size (H, W), step l of direction k is read and
  written at the map's position _position(l, k): nothing is permuted, nothing is copied four times.
- The backward is two kernels, so that each one scans in the order in which it loads (a scan with
  reverse=True is wrong on some versions of Triton). _scan_adjoint walks from the end and writes
  dL/dh. _scan_backward walks from the start, recomputes h, and then has all it needs.
- Sums over channels and images are partial sums, added up outside in a fixed order: the same bits
  each time.
- The number of chunks is a constant of the compiled kernel: one kernel for each size of map.

The letters are those of vmamba.py's glossary. A strided array is a pair (pointer, strides), its
strides for (K, B, L, C). `sizes` is (B, C, L, (H, W)); None in place of (H, W) stands for arrays
in which each direction is stored in its own order.
"""

import functools
import os

import torch

CHUNK, BLOCK_C = 64, 32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, very slowly: for tests

triton = None
if torch.cuda.is_available() or INTERPRETED:  # else the import costs a second and serves nothing
    try:
        import triton
        import triton.language as tl
    except ImportError:
        pass


def available(device):
    """Return whether the kernels run on tensors of this torch.device."""
    if triton is None:
        return False
    is_gpu = device.type == "cuda"
    return INTERPRETED or (is_gpu and torch.cuda.get_device_capability(device) >= (7, 0))


# fmt: off
if triton:

    @triton.jit
    def _compose(a1, b1, a2, b2):
        """Compose h -> a1 h + b1 and then h -> a2 h + b2."""
        return a1 * a2, a2 * b1 + b2

    @triton.jit
    def _softplus(x):
        e = tl.exp(tl.where(x > 20.0, 20.0, x))  # not tl.minimum, which turns NaN into 20
        series = e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - 0.25 * e)))  # 1 + e loses a small e's bits
        return tl.where(x > 20.0, x, tl.where(e < 0.03, series, tl.log(1.0 + e)))

    @triton.jit
    def _position(l, k, L, size):
        """Return where step l of direction k is stored: in a map that is read by rows, or at l.

        Directions: 0 by rows, 1 by columns, 2 and 3 the same backwards.
        """
        position = l
        if size is not None:
            H, W = size
            step = tl.where(k >= 2, L - 1 - l, l)
            position = tl.where(k % 2 == 1, step % H * W + step // H, step)
        return position

    @triton.jit
    def _at(array, k, b, position, channel):
        """Return the addresses of the elements of a strided array."""
        pointer, strides = array
        offset = k * strides[0] + b * strides[1] + position * strides[2] + channel * strides[3]
        return pointer + offset

    @triton.jit
    def _load(address, mask):
        """Load as fp32, 0 where masked."""
        return tl.load(address, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _plus_stored(x, address, mask, n: tl.constexpr):
        """Add what the states before state n have stored at the address."""
        if n == 0:
            return x
        return x + tl.load(address, mask=mask, other=0.0)

    @triton.jit
    def _this_program(images, channels, BLOCK_C: tl.constexpr):
        """Return the program's row of (K, B), its k and b, its channels and which of them exist."""
        row = tl.program_id(1).to(tl.int64)
        channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        return row, row // images, row % images, channel, channel < channels

    @triton.jit
    def _step_sizes(delta, bias, k, b, position, channel, inside, channels):
        """Return delta + bias and its softplus dt; dt is 0 outside, where the state stays."""
        bias_here = _load(bias + k * channels + channel, channel < channels)
        pre = _load(_at(delta, k, b, position, channel), inside) + bias_here
        return pre, tl.where(inside, _softplus(pre), 0.0)

    @triton.jit
    def _scan_chunk(dt, a_n, write, h0):
        """Return a chunk's states h_j = exp(dt_j a_n) h_{j-1} + write_j; h0 enters the chunk."""
        a, h = tl.associative_scan((tl.exp(dt * a_n), write), 0, _compose)
        return h + a * h0

    @triton.jit
    def _last_step(h, CHUNK: tl.constexpr):
        """h (CHUNK, BLOCK_C) -> its last row (1, BLOCK_C)."""
        step = tl.arange(0, CHUNK)[:, None]
        return tl.sum(tl.where(step == CHUNK - 1, h, 0.0), 0)[None, :]

    @triton.jit
    def _store_sums(pointers, sums, at, exists, n: tl.constexpr, N: tl.constexpr):
        """Store the sums of dA, of dD (the first state's) and of dbias (the last state's)."""
        dA, dD, dbias = pointers
        sum_a, sum_d, sum_bias = sums
        tl.store(dA + at * N + n, sum_a, mask=exists)
        if n == 0:
            tl.store(dD + at, sum_d, mask=exists)
        if n == N - 1:
            tl.store(dbias + at, sum_bias, mask=exists)

    @triton.jit
    def _scan_forward(arrays, sizes, n: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr,
                      CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
        """Add state n's part to y, with n = 0 also the skip. Write states (K, B, CHUNKS, C)."""
        u, delta, A, B, C, D, bias, y, states = arrays
        images, channels, L, size = sizes
        row, k, b, channel, exists = _this_program(images, channels, BLOCK_C)
        a_n = _load(A + (k * channels + channel) * N + n, exists)
        d = _load(D + k * channels + channel, exists)
        h0 = tl.zeros((1, BLOCK_C), tl.float32)
        for chunk in range(CHUNKS):
            l = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
            inside = (l < L) & exists
            position = _position(l, k, L, size)
            x = _load(_at(u, k, b, position, channel), inside)
            dt = _step_sizes(delta, bias, k, b, position, channel, inside, channels)[1]
            at_state = (row * CHUNKS + chunk) * channels + channel
            tl.store(states + at_state, h0, mask=exists)

            write = dt * x * _load(_at(B, k, b, position, n), l < L)
            h = _scan_chunk(dt, a_n, write, h0)
            part = h * _load(_at(C, k, b, position, n), l < L)
            if n == 0:
                part += d * x
            at_y = _at(y, k, b, position, channel)
            tl.store(at_y, _plus_stored(part, at_y, inside, n), mask=inside)
            h0 = _last_step(h, CHUNK)

    @triton.jit
    def _scan_adjoint(arrays, sizes, n: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr,
                      CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
        """Write g_l = dL/dh_l = C_l gy_l + a_{l+1} g_{l+1}, from the last step to the first."""
        delta, A, C, bias, gy, g = arrays
        images, channels, L, size = sizes
        _, k, b, channel, exists = _this_program(images, channels, BLOCK_C)
        a_n = _load(A + (k * channels + channel) * N + n, exists)
        g0 = tl.zeros((1, BLOCK_C), tl.float32)
        for chunk in range(CHUNKS):
            l = L - 1 - chunk * CHUNK - tl.arange(0, CHUNK)[:, None]
            inside = (l >= 0) & exists
            position = _position(l, k, L, size)
            after = _position(l + 1, k, L, size)
            has_next = inside & (l + 1 < L)
            dt = _step_sizes(delta, bias, k, b, after, channel, has_next, channels)[1]
            grad_y = _load(_at(gy, k, b, position, channel), inside)
            read = _load(_at(C, k, b, position, n), l >= 0) * grad_y
            grad = _scan_chunk(dt, a_n, read, g0)
            tl.store(_at(g, k, b, position, channel), grad, mask=inside)
            g0 = _last_step(grad, CHUNK)

    @triton.jit
    def _scan_backward(arrays, sizes, n: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr,
                       CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
        """Add state n's part to all gradients.

        du, ddelta (K, B, L, C), strided: the last n multiplies ddelta by the slope of softplus.
        dA (K, B, C, N), dD, dbias (K, B, C): the caller adds up the images.
        dB, dC (blocks of channels, K, B, N, L): the caller adds up the blocks.
        """
        u, delta, A, B, D, bias, gy, g, states, du, ddelta, dA, dB, dC, dD, dbias = arrays
        images, channels, L, size = sizes
        row, k, b, channel, exists = _this_program(images, channels, BLOCK_C)
        a_n = _load(A + (k * channels + channel) * N + n, exists)
        d = _load(D + k * channels + channel, exists)
        sum_a = tl.zeros((1, BLOCK_C), tl.float32)
        sum_d = tl.zeros((1, BLOCK_C), tl.float32)
        sum_bias = tl.zeros((1, BLOCK_C), tl.float32)
        for chunk in range(CHUNKS):
            l = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
            inside = (l < L) & exists
            position = _position(l, k, L, size)
            x = _load(_at(u, k, b, position, channel), inside)
            pre, dt = _step_sizes(delta, bias, k, b, position, channel, inside, channels)
            h0 = _load(states + (row * CHUNKS + chunk) * channels + channel, exists)

            b_l = _load(_at(B, k, b, position, n), l < L)
            write = dt * x * b_l
            h = _scan_chunk(dt, a_n, write, h0)
            grad = _load(_at(g, k, b, position, channel), inside)
            grad_y = _load(_at(gy, k, b, position, channel), inside)
            through_a = grad * (h - write)  # dL/dh_l a_l h_{l-1}
            grad_x = grad * b_l * dt
            grad_dt = through_a * a_n + grad * b_l * x
            if n == 0:
                grad_x += d * grad_y
                sum_d += tl.sum(grad_y * x, 0)[None, :]
            at_du = _at(du, k, b, position, channel)
            at_ddelta = _at(ddelta, k, b, position, channel)
            grad_dt = _plus_stored(grad_dt, at_ddelta, inside, n)
            if n == N - 1:
                grad_dt *= tl.sigmoid(pre)
                sum_bias += tl.sum(tl.where(inside, grad_dt, 0.0), 0)[None, :]
            tl.store(at_du, _plus_stored(grad_x, at_du, inside, n), mask=inside)
            tl.store(at_ddelta, grad_dt, mask=inside)
            sum_a += tl.sum(through_a * dt, 0)[None, :]
            at_l = ((tl.program_id(0) * tl.num_programs(1) + row) * N + n) * L + position
            tl.store(dB + at_l, tl.sum(grad * dt * x, 1)[:, None], mask=l < L)
            tl.store(dC + at_l, tl.sum(tl.where(inside, h * grad_y, 0.0), 1)[:, None], mask=l < L)
        at = row * channels + channel
        _store_sums((dA, dD, dbias), (sum_a, sum_d, sum_bias), at, exists, n, N)
# fmt: on


def scan_triton(u, delta, A, B, C, D, delta_bias, size=None):
    """Scan with the arguments and the result of vmamba.scan_torch, always in fp32.

    With size = (H, W), everything is in map order and the directions share u: u (B, H*W, C),
    delta (K, B, H*W, C), B, C (K, B, H*W, N) -> y (B, H*W, C), the sum over directions.
    delta: or its factors low (K, B, L, R), weight (K, R, C), to be saved in place of the product.
    """
    low, weight = delta if isinstance(delta, tuple) else (delta, None)
    with torch.cuda.device_of(u):  # Triton launches on the current device
        return _TritonScan.apply(size, u, low, weight, A, B, C, D, delta_bias)


def _project(low, weight):
    """Return low (K, B, L, R) @ weight (K, R, C), or low if there is no weight."""
    return low if weight is None else (low.flatten(1, 2) @ weight).unflatten(1, low.shape[1:3])


def _strided(x):
    """Pair x with its strides for (K, B, L, C); x without K is the same in all directions."""
    return x, x.stride() if x.ndim == 4 else (0, *x.stride())


class _TritonScan(torch.autograd.Function):
    """Run the kernels. Saves the inputs and the states that enter the chunks."""

    @staticmethod
    def forward(ctx, size, *inputs):
        u, low, weight, A, B, C, D, bias = inputs
        delta = _project(low, weight)
        A, D, bias = (x.float().contiguous() for x in (A, D, bias))
        K, images, L, channels = delta.shape
        N = A.shape[2]
        chunks = triton.cdiv(L, CHUNK)
        ctx.sizes = (images, channels, L, size)
        ctx.grid = (triton.cdiv(channels, BLOCK_C), K * images)
        ctx.constants = dict(N=N, CHUNKS=chunks, CHUNK=CHUNK, BLOCK_C=BLOCK_C)

        y = torch.empty_like(delta, dtype=torch.float32)
        states = [y.new_empty(K, images, chunks, channels) for _ in range(N)]
        given = (_strided(u), _strided(delta), A, _strided(B), _strided(C), D, bias, _strided(y))
        for n in range(N):
            _scan_forward[ctx.grid]((*given, states[n]), ctx.sizes, n=n, **ctx.constants)
        ctx.save_for_backward(u, low, weight, A, B, C, D, bias, *states)
        return y if size is None else y.sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        u, low, weight, A, B, C, D, bias, *states = ctx.saved_tensors
        delta = _project(low, weight)
        K, images, L, channels = delta.shape
        N = A.shape[2]
        new = functools.partial(torch.empty, device=u.device, dtype=torch.float32)
        g, du = (torch.empty_like(delta, dtype=torch.float32) for _ in range(2))
        ddelta = torch.empty_like(delta, dtype=delta.dtype if N == 1 else torch.float32)
        dA = new(K, images, channels, N)
        dD, dbias = (new(K, images, channels) for _ in range(2))
        dB, dC = (new(ctx.grid[0], K, images, N, L) for _ in range(2))

        gy = _strided(grad_y)
        to_adjoint = (_strided(delta), A, _strided(C), bias, gy, _strided(g))
        given = (_strided(u), _strided(delta), A, _strided(B), D, bias, gy, _strided(g))
        grads = (_strided(du), _strided(ddelta), dA, dB, dC, dD, dbias)
        for n in range(N):
            _scan_adjoint[ctx.grid](to_adjoint, ctx.sizes, n=n, **ctx.constants)
            _scan_backward[ctx.grid]((*given, states[n], *grads), ctx.sizes, n=n, **ctx.constants)
        dB = dB.sum(0).transpose(2, 3).to(B.dtype)  # (K, B, L, N)
        dC = dC.sum(0).transpose(2, 3).to(C.dtype)
        du = du.sum(0) if u.ndim == 3 else du
        du = du.to(u.dtype)
        dlow, dweight = ddelta.to(delta.dtype), None
        if weight is not None:
            dweight = low.flatten(1, 2).mT @ dlow.flatten(1, 2)
            dlow = _project(dlow, weight.mT)
        return None, du, dlow, dweight, dA.sum(1), dB, dC, dD.sum(1), dbias.sum(1)
