"""The last layer and a pair loss together, a few images at a time.

With K = 65536 prototypes and ten views the logits (V, B, K) fill gigabytes. Here they exist for one
chunk of images at a time. Inside a chunk autograd differentiates the plain pair term; the gradients
of the unit vectors and of the normalized prototypes are added up over the chunks. The result equals
losses.pair_loss of all logits, for ANY pair term. On a GPU torch.compile fuses what reads logits.
"""

import functools
import math

from lib.compiled import compiled, or_eagerly

import torch
import torch.nn.functional as F

import losses

CHUNK_ELEMENTS = {"cuda": 2**26, "cpu": 2**23}  # logits held at a time: 256 MB, 32 MB


def prototype_loss(term, student, layer, teacher, teacher_layer, center, temps, chunk=0):
    """Compute losses.pair_loss(term, layer(student), teacher_layer(teacher), center, *temps).

    term: of losses.PAIR_TERMS. student (V, B, d), teacher (2, B, d): unit vectors in front of the
    prototypes. layer, teacher_layer: model.WeightNormLinear, d -> K. center (K,). temps: student's,
    teacher's. chunk: images whose logits are held at a time; 0: as many as fill CHUNK_ELEMENTS.
    Returns the loss, the teacher's mean logits (K,), its mean entropy in nats (ln K: uniform).
    """
    check_term(term)
    given = (term, student, layer, teacher, teacher_layer, center, temps, chunk)
    return or_eagerly("losses", student.device, lambda: _in_chunks(*given))


def _in_chunks(term, student, layer, teacher, teacher_layer, center, temps, chunk):
    V, B, _ = student.shape
    student_temp, teacher_temp = temps
    teacher_side = compiled("losses", _teacher_side, student.device)
    value_of = compiled("losses", _value, student.device)
    with torch.autocast(student.device.type, enabled=False):
        prototypes = layer.prototypes()  # (K, d), differentiable: the weight norm's own backward
        with torch.no_grad():
            W = prototypes.detach()
            chunk = chunk or max(1, CHUNK_ELEMENTS[student.device.type] // (V * len(W)))
            if student.is_cuda:  # chunks of one size are compiled once
                chunk = math.ceil(B / math.ceil(B / chunk))
                teacher_temp = torch.full((), teacher_temp, device=student.device)  # it warms up
            grad_student = torch.empty_like(student)
            grad_W = torch.zeros_like(W)
            sums = []  # of each chunk: of the loss, of the teacher's logits, of its entropy
            for at in range(0, B, chunk):
                u = student[:, at : at + chunk].flatten(0, 1)  # (V b, d)
                t = teacher_layer(teacher[:, at : at + chunk].flatten(0, 1)).unflatten(0, (2, -1))
                q, *of_teacher = teacher_side(t, center, teacher_temp)
                logits = F.linear(u, W).unflatten(0, (V, -1))  # (V, b, K)
                value = _differentiate(value_of, term, q, logits, (student_temp, B * (2 * V - 2)))
                sums.append((value, *of_teacher))
                gradient = logits.flatten(0, 1)
                grad_student[:, at : at + chunk] = (gradient @ W).unflatten(0, (V, -1))
                grad_W.addmm_(gradient.T, u)
            loss, teacher_sum, entropy = (sum(x) for x in zip(*sums))
        # a number whose gradients are those added up; minus itself it leaves the loss as it is
        by_student = torch.dot(student.flatten(), grad_student.flatten())
        by_prototypes = torch.dot(prototypes.flatten(), grad_W.flatten())
        known = by_student + by_prototypes
        loss = loss + (known - known.detach())
    return loss, teacher_sum / (2 * B), entropy / (2 * B)


@functools.cache
def check_term(term):
    """Assert that a pair term maps each row by itself to a number, linearly if declared so."""
    generator = torch.Generator().manual_seed(0)
    q, r = (5 * torch.randn(2, 8, 16, generator=generator)).softmax(-1)
    s = 5 * torch.randn(8, 16, generator=generator)
    values, name = term(q, s), getattr(term, "__name__", term)
    assert values.shape == (8,), f"{name}: must return (B,), returns {tuple(values.shape)}"
    assert values.isfinite().all(), f"{name}: must be finite for random q and s, returns {values}"
    assert torch.allclose(term(q[:1], s[:1]), values[:1]), f"{name}: mixes the images of a batch"
    if term in losses.LINEAR_IN_Q:
        is_linear = torch.allclose(term(q + r, s), values + term(r, s), rtol=1e-4)
        assert is_linear, f"{name}: not linear in q, remove it from LINEAR_IN_Q"


def _teacher_side(t, center, temp):
    """Compute of logits t (2, b, K): probabilities q (2, b, K), sum of t (K,), entropy's sum."""
    q = losses.teacher_probabilities(t, center, temp)
    return q, t.sum((0, 1)), torch.special.entr(q).sum()


def _value(term, targets, logits, temp, pairs):
    """Sum the term of logits (b, K) over targets and images, divide by `pairs` -> scalar."""
    s = logits / temp
    return sum(term(q, s).sum() for q in targets) / pairs


def _differentiate(value_of, term, q, logits, scales):
    """Return the value of a chunk's logits (V, b, K) and replace them by its gradient.

    One view at a time: a global one with the other one's target, a local one with both targets.
    """
    total = 0
    local = [q[0] + q[1]] if term in losses.LINEAR_IN_Q else [q[0], q[1]]
    for v in range(len(logits)):
        targets = [q[1 - v]] if v < 2 else local
        with torch.enable_grad():
            view = logits[v].detach().requires_grad_()
            value = value_of(term, targets, view, *scales)
            [logits[v]] = torch.autograd.grad(value, view)
        total = total + value.detach()
    return total


def plain_loss(term, student, layer, teacher, teacher_layer, center, temps, chunk=0):
    """Compute what prototype_loss computes by the plain formulas, holding all logits (V, B, K)."""
    check_term(term)
    with torch.autocast(student.device.type, enabled=False):
        t = teacher_layer(teacher).detach()  # (2, B, K)
        loss = losses.pair_loss(term, layer(student), t, center, *temps)
        q = losses.teacher_probabilities(t, center, temps[1])
    return loss, t.mean((0, 1)), torch.special.entr(q).sum(-1).mean()
