"""The losses as pure functions of tensors (paper section 3; names and formulas in the README's table).

Views v = 0 .. V-1 of an image, the first two global; the teacher sees i = 0, 1. With
    q_i = softmax((t_i - centre) / T_t)  (no gradient)   and   p_v = softmax(s_v / T_s)
both pair losses are means over the images and over the 2V - 2 pairs (i, v), v != i, of something linear in q_i. So the two teacher views
are summed before anything else: student view 0 meets q_1, view 1 meets q_0, and every local view meets q_0 + q_1. That is one pass over
the crops instead of one a pair, and the gradient by s_v is found in the same pass; the double loop over pairs is the oracle in
tests/test_losses.py. SimSiam and DDCL, whose two views have no teacher, follow below. All arithmetic is fp32, or fp64 of fp64.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def wide(x):
    """x in fp32, or as it is where that is more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _partners(q, V):
    """q (2, B, K) -> for each of the V student views what it meets (B, K): view 0 meets q_1, view 1 q_0, a local view both at once."""
    return [q[1], q[0]] + [q.sum(0)] * (V - 2)


def _cross_entropy(s, q):
    """s = logits / T_s (V, B, K), q (2, B, K) -> the sum over pairs and images of -sum_k q_i log p_v, its gradient by s."""
    p, total = torch.log_softmax(s, -1), 0
    for v, (view, partner) in enumerate(
        zip(p, _partners(q, len(s)))
    ):  # view by view, in place: these are the largest tensors of all
        total = total - (view * partner).sum()
        view.exp_().mul_(1 if v < 2 else 2).sub_(partner)  # p_v - q_i of each of its pairs
    return total, p


def _dot(s, q):
    """As _cross_entropy, of <q_i, p_v>."""
    p, total = torch.softmax(s, -1), 0
    for view, partner in zip(p, _partners(q, len(s))):
        products = view * partner  # (B, K)
        dots = products.sum(-1, keepdim=True)  # (B, 1)
        total = total + dots.sum()
        view.mul_(-dots).add_(products)  # p (partner - <partner, p>)
    return total, p


def _cosine(s, q):
    """As _cross_entropy, of cos(q_i, p_v)."""
    p, total = torch.softmax(s, -1), 0
    for view, partner in zip(p, _partners(F.normalize(q, dim=-1), len(s))):
        length = view.norm(dim=-1, keepdim=True)  # (B, 1)
        products = view * partner / length
        cosines = products.sum(-1, keepdim=True)
        total = total + cosines.sum()
        view.square_().mul_(-cosines / length.square()).add_(
            products
        )  # no <., p> as above: a cosine does not change with p's length
    return total, p


PAIRS = {"cross-entropy": _cross_entropy, "dot": _dot, "cosine": _cosine}


class _Known(torch.autograd.Function):
    """value -> value, whose gradients by `inputs` have been found together with it; `once`: hand them on at the first backward, for they are large."""

    @staticmethod
    def forward(ctx, value, gradients, once, *inputs):
        ctx.gradients, ctx.once = gradients, once
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of against_prototypes serve one backward only")
        gradients = [
            gradient.mul_(outer) if ctx.once else gradient * outer for gradient in ctx.gradients
        ]
        if ctx.once:
            ctx.gradients = None
        return None, None, None, *gradients


def _teacher_probabilities(teacher, center, temp):
    with torch.no_grad():
        return torch.softmax((wide(teacher) - center) / temp, dim=-1)  # (2, B, K)


def _mean_over_pairs(kind, student, teacher, center, student_temp, teacher_temp):
    (V, B, _), s = student.shape, wide(student) / student_temp
    with torch.no_grad():
        total, gradient = PAIRS[kind](s, _teacher_probabilities(teacher, center, teacher_temp))
        pairs = (2 * V - 2) * B
    return _Known.apply(total / pairs, [gradient / pairs], False, s)


def dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04):
    """L_CL = mean over pairs and images of -sum_k q_i log p_v (paper eq. of L_CL; DINO eq. 3).

    student (V, B, K), teacher (2, B, K): raw logits; center (K,) -> scalar, in nats, at least 0.
    """
    return _mean_over_pairs("cross-entropy", student, teacher, center, student_temp, teacher_temp)


def orthogonality(student, teacher, center, student_temp=0.1, teacher_temp=0.04, kind="dot"):
    """L_Orth = mean over pairs and images of <q_i, p_v> ('dot', the paper's eq.) or of cos(q_i, p_v) ('cosine', the published scripts).

    student (V, B, K), teacher (2, B, K): raw logits of the ef heads; center (K,) -> scalar in [0, 1].
    """
    if kind not in ("dot", "cosine"):
        raise ValueError(f"kind={kind!r}: 'dot' or 'cosine'")
    return _mean_over_pairs(kind, student, teacher, center, student_temp, teacher_temp)


def against_prototypes(
    kind, student, layer, teacher, teacher_layer, center, student_temp, teacher_temp, images=0
):
    """A pair loss together with the heads' last layers, so that the logits of all views never exist at once.

    kind 'cross-entropy', 'dot' or 'cosine'; student (V, B, d), teacher (2, B, d): unit vectors in front of the prototypes; layer, teacher_layer:
    model.WeightNormLinear of d -> K; center (K,); images: how many images' logits are held at a time, 0: as many as fill 256 MB, on a CPU
    32 MB -> the loss (scalar), the teacher's mean logits (K,), its mean entropy in nats (at ln K the teacher says nothing,
    at 0 it is certain). Its gradients serve one backward. The same as dino_loss or orthogonality of layer(student), teacher_layer(teacher), gradients included."""
    (V, B, _), K, device = student.shape, len(center), student.device
    images = images or max(1, (2**26 if device.type == "cuda" else 2**23) // (V * K))
    pairs, v = (2 * V - 2) * B, layer.weight_v  # (K, d)
    total, entropy, teacher_sum = 0, 0, 0
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        length = v.norm(dim=1)  # (K,)
        scale = layer.weight_g[:, 0] / (length * student_temp)
        by_student, by_v, along = (
            torch.empty_like(student),
            torch.zeros_like(v),
            torch.zeros_like(length),
        )
        for i in range(0, B, images):
            u, t = (
                student[:, i : i + images].flatten(0, 1),
                teacher_layer(teacher[:, i : i + images]),
            )  # (V * b, d), (2, b, K)
            teacher_sum = teacher_sum + t.sum((0, 1))
            q = _teacher_probabilities(t, center, teacher_temp)
            entropy = entropy + torch.special.entr(q).sum()
            s = (u @ v.T).mul_(scale)  # (V * b, K), logits / T_s
            term, gradient = PAIRS[kind](s.unflatten(0, (V, -1)), q)
            total = total + term
            # s_k = scale_k <v_k, u>, where scale_k holds 1 / |v_k|: its gradient by v_k is scale_k u less its part along v_k
            gradient = gradient.flatten(0, 1).div_(pairs)
            along += s.mul_(gradient).sum(0)
            gradient.mul_(scale)
            by_student[:, i : i + images] = (gradient @ v).unflatten(0, (V, -1))
            by_v.addmm_(gradient.T, u)
        by_v.addcmul_(v, (along / length.square())[:, None], value=-1)
    return (
        _Known.apply(total / pairs, [by_student, by_v], True, student, v),
        teacher_sum / (2 * B),
        entropy / (2 * B),
    )


def squared_norm(head):
    """||h||^2: the sum of squares of ALL of a head's parameters, the fixed gain of its weight-normalised layer included (as the scripts do)."""
    return (
        torch.stack([torch.linalg.vector_norm(wide(p)) for p in head.parameters()]).square().sum()
    )


def projection_regularization(head_ir, head_ef):
    """L_PReg = | ||h_ef||^2 - ||h_ir||^2 | of two heads (paper eq. of L_PReg) -> scalar; keeps the ef head from shrinking to nothing."""
    return (squared_norm(head_ef) - squared_norm(head_ir)).abs()


def simsiam_loss(predictions, projections):
    """L_CL of SimSiam and DDCL = -(cos(p_1, sg z_2) + cos(p_2, sg z_1)) / 2, mean over the images (Chen and He 2021, eq. 4).

    predictions p, projections z: (2, B, dim) -> scalar in [-1, 1]. sg stops the gradient; without it both views collapse to one point."""
    return -F.cosine_similarity(
        wide(predictions), wide(projections).detach().flip(0), dim=-1
    ).mean()


def ddcl_orthogonality(predictions, projections, kind="cosine"):
    """L_Orth of DDCL = | m |, m = (cos(p_1, sg z_2) + cos(p_2, sg z_1)) / 2, mean over the images of all ranks, of the ef head.

    predictions p, projections z: (2, B, dim) -> scalar >= 0. That is what DDCL's scripts take; 'dot' leaves the vectors' lengths in, as the paper's
    formula h_V(z_1) . h_V(z_2) is written. The absolute value is of the mean: without it the loss would fall below zero, for 'dot' without
    end, and reward opposite views; with it single images may still have cosines of either sign. Of several ranks each returns its share of
    the mean times the whole mean's sign, so that the average over ranks, of values and of gradients, is that of one process."""
    predictions, projections = wide(predictions), wide(projections).detach().flip(0)
    if kind == "cosine":
        predictions, projections = (
            F.normalize(predictions, dim=-1),
            F.normalize(projections, dim=-1),
        )
    elif kind != "dot":
        raise ValueError(f"kind={kind!r}: 'dot' or 'cosine'")
    mean = (predictions * projections).sum(-1).mean()
    return mean * mean_over_ranks(mean.detach()).sign()


@torch.no_grad()
def update_center(center, teacher_mean, momentum=0.9):
    """center (K,) <- momentum * center + (1 - momentum) * mean over ranks of teacher_mean (K,); in place (DINO eq. 4).

    teacher_mean: the teacher's raw logits, averaged over its two views and the images."""
    mean = mean_over_ranks(teacher_mean)
    center.lerp_(
        torch.where(mean.isfinite().all(), mean, center), 1 - momentum
    )  # a mean that is not finite leaves it alone


def mean_over_ranks(x):
    """x averaged over all processes; x itself where there is only one."""
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()
