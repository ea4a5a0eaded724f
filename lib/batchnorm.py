"""Batch norm over the images of all ranks; each rank holds equally many.

torch's SyncBatchNorm does not run on CPUs. On a GPU it allows a different number of images on each
rank, and for that it waits for the device in every layer.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def sync_batch_norm(network):
    """Let every batch norm see the images of all ranks; parameters and keys stay the same."""
    for module in network.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = BatchNormOverRanks  # only forward differs
    return network


class BatchNormOverRanks(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the images of all ranks: one collective forward, one backward."""

    def _check_input_dim(self, x):
        pass  # (N, C) and (N, C, H, W) alike

    @torch.compiler.disable  # the collectives stay out of graphs
    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        with torch.no_grad():
            mean, var = over_ranks(x)
            n = x.numel() // x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / max(n - 1, 1), self.momentum)
        return _Normalize.apply(x, self.weight, self.bias, mean, var, self.eps)


def over_ranks(x):
    """Return mean and variance (C,), at least fp32, of x (N, C, ...) over the images of all ranks.

    var = mean over ranks of var_r + variance over ranks of mean_r: nothing cancels, as it would in
    the difference of mean squares.
    """
    if not x.is_cuda:  # a GPU's kernel sums half precision in fp32
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    mine = torch.cat(torch.batch_norm_update_stats(x, None, None, 0.0))  # mean_r, var_r: (2 C,)
    all_ranks = mine.new_empty(dist.get_world_size() * len(mine))
    dist.all_gather_into_tensor(all_ranks, mine)
    means, variances = all_ranks.view(-1, 2, x.shape[1]).unbind(1)  # (ranks, C)
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


class _Normalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias; mean and var depend on all ranks' x."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps):
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, mean, invstd = ctx.saved_tensors
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        x, dy = (tensor.contiguous(memory_format=layout) for tensor in (x, dy))
        sum_dy, sum_dy_x = _sums(dy, x, mean, invstd, weight)
        sums = torch.cat([sum_dy, sum_dy_x])
        dist.all_reduce(sums)
        dx = _gradient(dy, x, mean, invstd, weight, *sums.chunk(2))
        if weight is None:
            return dx, None, None, None, None, None
        return dx, sum_dy_x * invstd, sum_dy, None, None, None  # DDP averages these two


def _sums(dy, x, mean, invstd, weight):
    """Return the sums of dy and of dy (x - mean) over this rank's images: (C,) each."""
    if x.is_cuda:
        wanted = (True, False, False)  # the gradients of weight and bias are the same sums
        return torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, *wanted)[:2]
    images = (0, *range(2, x.ndim))
    return dy.sum(images, dtype=mean.dtype), (dy * (x - _as_row(mean, x))).sum(images)


def _gradient(dy, x, mean, invstd, weight, sum_dy, sum_dy_x):
    """Return dL/dx: a channel's dy minus its mean and its part along x - mean, times its scale."""
    ranks = dist.get_world_size()
    n = x.numel() // x.shape[1]
    if x.is_cuda:
        counts = torch.full((ranks,), n, dtype=torch.int32, device=x.device)
        sums = sum_dy, sum_dy_x
        return torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, counts)
    slope = sum_dy_x / (n * ranks) * invstd.square()
    scale = invstd if weight is None else invstd * weight
    along = (x - _as_row(mean, x)) * _as_row(slope, x)
    dx = (dy - _as_row(sum_dy / (n * ranks), x) - along) * _as_row(scale, x)
    return dx.to(x.dtype)


def _as_row(values, x):
    """View values (C,) so that they meet x (N, C, ...)."""
    return values.view(-1, *(1,) * (x.ndim - 2))
