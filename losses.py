"""The losses as pure functions of tensors (paper section 3; names and formulas in the README's table).

Views v = 0 .. V-1 of an image, the first two global; the teacher sees i = 0, 1. With
    q_i = softmax((t_i - centre) / T_t)  (no gradient)   and   p_v = softmax(s_v / T_s)
both pair losses are means over the images and over the 2V - 2 pairs (i, v), v != i, of something linear in q_i. So the two teacher views
are summed before anything else: student view 0 meets q_1, view 1 meets q_0, and every local view meets q_0 + q_1. That is one pass over
the crops instead of one a pair; the double loop over pairs is the oracle in tests/test_losses.py. SimSiam and DDCL, whose two views have
no teacher, follow below. All arithmetic is fp32.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


def _partners(q):
    """q (2, B, K) -> what the student's global views meet (2, B, K), what each local view meets (B, K)."""
    return q.flip(0), q.sum(0)


def _teacher_probabilities(teacher, center, temp):
    with torch.no_grad():
        return torch.softmax((teacher.float() - center) / temp, dim=-1)  # (2, B, K)


def dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04):
    """L_CL = mean over pairs and images of -sum_k q_i log p_v (paper eq. of L_CL; DINO eq. 3).

    student (V, B, K), teacher (2, B, K): raw logits; center (K,) -> scalar, in nats, at least 0.
    """
    V, B, _ = student.shape
    to_globals, to_locals = _partners(_teacher_probabilities(teacher, center, teacher_temp))
    student = student.float() / student_temp
    # -sum_k q log p = logsumexp(s) - <q, s> where q sums to 1; a local view has two partners
    normaliser = torch.logsumexp(student, dim=-1)  # (V, B)
    total = normaliser[:2].sum() + 2 * normaliser[2:].sum()
    total = total - (student[:2] * to_globals).sum() - (student[2:].sum(0) * to_locals).sum()
    return total / ((2 * V - 2) * B)


def orthogonality(student, teacher, center, student_temp=0.1, teacher_temp=0.04, kind="dot"):
    """L_Orth = mean over pairs and images of <q_i, p_v> ('dot', the paper's eq.) or of cos(q_i, p_v) ('cosine', the published scripts).

    student (V, B, K), teacher (2, B, K): raw logits of the ef heads; center (K,) -> scalar in [0, 1].
    """
    V, B, _ = student.shape
    q = _teacher_probabilities(teacher, center, teacher_temp)
    p = torch.softmax(student.float() / student_temp, dim=-1)  # (V, B, K)
    if kind == "cosine":
        q, p = F.normalize(q, dim=-1), F.normalize(p, dim=-1)
    elif kind != "dot":
        raise ValueError(f"kind={kind!r}: 'dot' or 'cosine'")
    to_globals, to_locals = _partners(q)
    return ((p[:2] * to_globals).sum() + (p[2:].sum(0) * to_locals).sum()) / ((2 * V - 2) * B)


def squared_norm(head):
    """||h||^2: the sum of squares of ALL of a head's parameters, the fixed gain of its weight-normalised layer included (as the scripts do)."""
    return sum(p.float().square().sum() for p in head.parameters())


def projection_regularization(head_ir, head_ef):
    """L_PReg = | ||h_ef||^2 - ||h_ir||^2 | of two heads (paper eq. of L_PReg) -> scalar; keeps the ef head from shrinking to nothing."""
    return (squared_norm(head_ef) - squared_norm(head_ir)).abs()


def simsiam_loss(predictions, projections):
    """L_CL of SimSiam and DDCL = -(cos(p_1, sg z_2) + cos(p_2, sg z_1)) / 2, mean over the images (Chen and He 2021, eq. 4).

    predictions p, projections z: (2, B, dim) -> scalar in [-1, 1]. sg stops the gradient; without it both views collapse to one point."""
    return -F.cosine_similarity(predictions.float(), projections.float().detach().flip(0), dim=-1).mean()


def ddcl_orthogonality(predictions, projections, kind="cosine"):
    """L_Orth of DDCL = | m |, m = (cos(p_1, sg z_2) + cos(p_2, sg z_1)) / 2, mean over the images of all ranks, of the ef head.

    predictions p, projections z: (2, B, dim) -> scalar >= 0. That is what DDCL's scripts take; 'dot' leaves the vectors' lengths in, as the paper's
    formula h_V(z_1) . h_V(z_2) is written. The absolute value is of the mean: without it the loss would fall below zero, for 'dot' without
    end, and reward opposite views; with it single images may still have cosines of either sign. Of several ranks each returns its share of
    the mean times the whole mean's sign, so that the average over ranks, of values and of gradients, is that of one process."""
    predictions, projections = predictions.float(), projections.float().detach().flip(0)
    if kind == "cosine":
        predictions, projections = F.normalize(predictions, dim=-1), F.normalize(projections, dim=-1)
    elif kind != "dot":
        raise ValueError(f"kind={kind!r}: 'dot' or 'cosine'")
    mean = (predictions * projections).sum(-1).mean()
    return mean * mean_over_ranks(mean.detach()).sign()


def teacher_entropy(teacher, center, temp):
    """teacher (2, B, K), center (K,) -> mean entropy of q in nats: at ln K the teacher says nothing, at 0 it is certain."""
    return torch.special.entr(_teacher_probabilities(teacher, center, temp)).sum(-1).mean()


@torch.no_grad()
def update_center(center, teacher_mean, momentum=0.9):
    """center (K,) <- momentum * center + (1 - momentum) * mean over ranks of teacher_mean (K,); in place (DINO eq. 4).

    teacher_mean: the teacher's raw logits (2, B, K), averaged over views and images."""
    center.lerp_(mean_over_ranks(teacher_mean), 1 - momentum)


def mean_over_ranks(x):
    """x averaged over all processes; x itself where there is only one."""
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()
