"""Has a run collapsed? Metrics, and warnings in plain words."""

import copy
import math

from lib import features

import torch
import torch.nn.functional as F

import losses


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def metrics(run, batch):
    """Measure the heads' outputs for two views of the run's first batch -> {name: number}.

    norm_*: of a head's parameters. std_proj_*, rank_proj_*: features.std_and_rank of its output
    (in front of prototypes). cos_*: mean |cosine| of two views' outputs. dot_ef: mean |product| of
    the vectors that L_Orth takes (targets' and student's probabilities, or projections and
    predictions), lengths_ef: the mean product of their lengths. dot_ef can fall because vectors
    rotate or because they shrink; share_of_lengths tells which. The same on every rank.
    """
    views = run.views(batch._replace(local_crops=batch.local_crops[:, :0]))[0]  # (2, B, 3, G, G)
    parts = features.part_slices(run.network.backbone.dim, run.network.d_ir)
    student = [_frozen(run.network.backbone, view, run.here) for view in views]  # (B, D) each
    numbers, outputs = {}, {}
    for name, head in run.network.heads.items():
        own = copy.deepcopy(head)  # in training mode: batch norm's running means would move
        columns = parts.get(name, slice(None))
        out = own.embed(torch.cat(student)[:, columns])
        projections = (out if run.has_teacher else out[0]).chunk(2)  # (B, dim) of each view
        numbers[f"norm_{name}"] = losses.squared_norm(head).sqrt().item()
        std_and_rank = features.std_and_rank(torch.cat(projections))
        numbers[f"std_proj_{name}"], numbers[f"rank_proj_{name}"] = std_and_rank
        cosine = F.cosine_similarity(*projections, dim=-1)
        numbers[f"cos_{name}"] = cosine.abs().mean().item()
        outputs[name] = own, projections, out
    if "ef" in outputs:
        own, projections, out = outputs["ef"]
        if run.has_teacher and run.config.orth_views == "student":
            p, q = (own.last_layer(x) / run.config.student_temp for x in projections)
            p, q = p.softmax(-1), q.softmax(-1)
        elif run.has_teacher:
            z = _frozen(run.teacher.backbone, views[0], run.here)[:, parts["ef"]]
            center = run.centers["ef"]
            q = losses.teacher_probabilities(run.teacher.head_ef(z), center, run.teacher_temp)
            p = (own.last_layer(projections[1]) / run.config.student_temp).softmax(-1)
        else:
            q, p = projections[0], out[1].chunk(2)[1]  # projection, prediction
        numbers["dot_ef"] = (q * p).sum(-1).abs().mean().item()
        numbers["lengths_ef"] = (q.norm(dim=-1) * p.norm(dim=-1)).mean().item()
    return numbers


def _frozen(backbone, images, here):
    """Return z (B, D) as fp32, in eval mode, computed under autocast."""
    was_training = backbone.training
    backbone.eval()
    with here.autocast():
        z = features.in_pieces(backbone, images).float()
    backbone.train(was_training)
    return z


def share_of_lengths(first, now):
    """Return {"share_ef": how much of dot_ef's decrease lengths_ef's explains, by logarithms}.

    0: the vectors have only rotated; 1: only shrunk; above 1: shrunk and rotated together.
    {} if dot_ef has not decreased. first, now: from metrics.
    """
    fall = {}
    for name in ("dot_ef", "lengths_ef"):
        fall[name] = math.log(max(first.get(name, 0), 1e-30) / max(now.get(name, 0), 1e-30))
    return {"share_ef": fall["lengths_ef"] / fall["dot_ef"]} if fall["dot_ef"] > 0.01 else {}


def warnings(numbers, config):
    """Yield a warning for each sign of collapse in numbers (last logged and evaluated)."""
    fixes = {
        "ir": "lower teacher_temp or lr, or train longer",
        "ef": "this is a trivial solution of L_Orth, so ef learns little; raise beta or lower "
        "lambda_preg",
    }
    norms = {}
    for head, K in (("ir", config.out_dim), ("ef", config.out_dim_ef)):
        entropy = numbers.get(f"H_{head}", 0)
        gains = K if f"H_{head}" in numbers else 0  # of a prototype head, fixed: 1 each
        norms[head] = math.sqrt(max(numbers.get(f"norm_{head}", 0) ** 2 - gains, 0))
        if entropy > 0.99 * math.log(K):
            whose = config.orth_views if head == "ef" else "teacher"
            yield (
                f"the {whose}'s {head} output is almost uniform (entropy {entropy:.3f} of ln K = "
                f"{math.log(K):.3f}): {fixes[head]}"
            )
    for part in ("full", "ir", "ef"):
        std, rank = numbers.get(f"std_{part}", 1), numbers.get(f"rank_{part}", 9)
        if std < 0.05 or rank < 1.02:
            yield (
                f"the representation's {part} part has collapsed (std {std:.3f}, effective rank "
                f"{rank:.1f}): lower lr, or raise batch_size or warmup_epochs"
            )
    if "norm_ef" in numbers and norms["ef"] < 0.1 * norms["ir"]:
        yield (
            f"the ef head has shrunk to norm {norms['ef']:.2g} against the ir head's "
            f"{norms['ir']:.2g} (without fixed gains): raise lambda_preg"
        )
