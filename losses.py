"""Every formula of the method, plain, differentiated by autograd (paper, section 3).

Views v = 0 .. V-1 of an image, the first two global; the teacher sees i = 0 and 1 only.

    q_i = softmax((t_i - center) / T_t)     teacher's probabilities, without gradient
    p_v = softmax(s_v / T_s)                student's probabilities

L_CL and L_Orth are means over images and over the 2V - 2 pairs (i, v), v != i, of a pair term.
lib/fused.py computes the same without holding all logits. Arithmetic is fp32, or fp64 of fp64.
"""

import torch
import torch.nn.functional as F


def at_least_fp32(x):
    """Upcast half precision to fp32; keep fp32 and fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# A pair term maps teacher probabilities q (B, K), student logits / T_s s (B, K) -> (B,).
# Row b of it depends on row b of q and s only: lib/fused.py gives it a few images at a time.
def cross_entropy(q, s):
    """L_CL: -sum_k q log p (DINO eq. 3)."""
    return -(q * s.log_softmax(-1)).sum(-1)


def dot(q, s):
    """L_Orth as the paper writes it: <q, p>."""
    return (q * s.softmax(-1)).sum(-1)


def cosine(q, s):
    """L_Orth as the published scripts compute it: cos(q, p)."""
    p = s.softmax(-1)
    return (q * p).sum(-1) / (q.norm(dim=-1) * p.norm(dim=-1))


PAIR_TERMS = {"cross-entropy": cross_entropy, "dot": dot, "cosine": cosine}  # --orth: any
LINEAR_IN_Q = {cross_entropy, dot}  # f(q_0 + q_1, s) = f(q_0, s) + f(q_1, s)


def teacher_probabilities(teacher, center, temp):
    """Return q (2, B, K) of raw logits (2, B, K) and center (K,). No gradient."""
    return ((at_least_fp32(teacher.detach()) - center) / temp).softmax(-1)


def pair_loss(term, student, teacher, center, student_temp, teacher_temp):
    """Average a pair term over images and over the pairs (i, v), v != i.

    student (V, B, K), teacher (2, B, K): raw logits; center (K,). Returns a scalar.
    """
    q = teacher_probabilities(teacher, center, teacher_temp)
    s = at_least_fp32(student) / student_temp
    total = 0
    for i in range(len(q)):
        for v in range(len(s)):
            if v != i:
                total = total + term(q[i], s[v]).mean()
    return total / (len(q) * (len(s) - 1))


def dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04):
    """L_CL, of the ir heads: the cross-entropy as a pair_loss; in nats, at least 0."""
    return pair_loss(cross_entropy, student, teacher, center, student_temp, teacher_temp)


def orthogonality(student, teacher, center, student_temp=0.1, teacher_temp=0.04, kind="dot"):
    """L_Orth, of the ef heads: a pair_loss; 'dot' and 'cosine' lie in [0, 1]."""
    if kind not in PAIR_TERMS:
        raise ValueError(f"kind={kind!r}: choose from {', '.join(PAIR_TERMS)}")
    return pair_loss(PAIR_TERMS[kind], student, teacher, center, student_temp, teacher_temp)


def squared_norm(head):
    """Return ||h||^2: all parameters squared and summed, the fixed gain too, as in the scripts."""
    norms = [torch.linalg.vector_norm(at_least_fp32(p)) for p in head.parameters()]
    return torch.stack(norms).square().sum()


def projection_regularization(head_ir, head_ef):
    """L_PReg = | ||h_ef||^2 - ||h_ir||^2 |: meant to keep the ef head from shrinking."""
    return (squared_norm(head_ef) - squared_norm(head_ir)).abs()


def simsiam_loss(predictions, projections):
    """L_CL = -(cos(p_1, sg z_2) + cos(p_2, sg z_1)) / 2 of SimSiam; p, z (2, B, dim) -> scalar.

    Chen and He 2021, eq. 4. sg stops the gradient; without it the views collapse to one direction.
    """
    other = at_least_fp32(projections).detach().flip(0)
    return -F.cosine_similarity(at_least_fp32(predictions), other, dim=-1).mean()


def ddcl_orthogonality(predictions, projections, kind="cosine", mean_over_ranks=lambda x: x):
    """L_Orth of DDCL = |m|, m the mean over all images of (h(p_1, sg z_2) + h(p_2, sg z_1)) / 2.

    h is the 'cosine' (DDCL's scripts) or the 'dot' product (the paper). The absolute value is of
    the mean: without it the loss would reward opposite views. One process returns |m|. Each of
    several ranks returns its share of m times the sign of the whole m: their average is |m|.
    """
    p = at_least_fp32(predictions)
    z = at_least_fp32(projections).detach().flip(0)
    if kind == "cosine":
        p = F.normalize(p, dim=-1)
        z = F.normalize(z, dim=-1)
    elif kind != "dot":
        raise ValueError(f"kind={kind!r}: DDCL knows dot and cosine")
    mean = (p * z).sum(-1).mean()
    return mean * mean_over_ranks(mean.detach()).sign()


@torch.no_grad()
def update_center(center, teacher_mean, momentum=0.9):
    """Move center (K,) in place towards the teacher's mean logits (K,), if finite (DINO eq. 4)."""
    mean = torch.where(teacher_mean.isfinite().all(), teacher_mean, center)
    center.lerp_(mean, 1 - momentum)
