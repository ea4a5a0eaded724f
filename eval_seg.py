"""Segmentation without labels (method.md section 5): TokenCut's masks, DINO's label propagation through a video, and their measures.

Functions of tensors; nothing is trained. The commands that run them over DAVIS-2017, ECSSD, DUTS-TEST and DUT-OMRON are not built yet."""
import math

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------ TokenCut (Wang et al. 2022)

WEAK = 1e-5  # the edge between patches that are not alike: it keeps the graph connected


def tokencut(features, tau=0.2):
    """features (dim, h, w) of the patches -> mask (h, w) bool, eigenvector (h, w) float64, positive where it speaks for the mask.

    A graph joins patches whose cosine exceeds tau. Its second generalised eigenvector, (D - W) v = lambda D v with v' D v = 1, is cut at
    its mean; the foreground is the side of the patch where |v| is largest (the seed), and of it the connected component of the seed."""
    _, h, w = features.shape
    unit = F.normalize(features.flatten(1).double(), dim=0)                   # (dim, N)
    graph = torch.where(unit.T @ unit > tau, 1.0, WEAK).double()              # (N, N)
    scale = graph.sum(1).rsqrt()
    symmetric = torch.eye(h * w, dtype=torch.float64, device=graph.device) - scale[:, None] * graph * scale  # its eigenvectors are D^1/2 v
    v = scale * torch.linalg.eigh(symmetric).eigenvectors[:, 1]
    seed = int(v.abs().argmax())
    if v[seed] <= v.mean():
        v = -v
    v = v.view(h, w)
    return component(v > v.mean(), seed // w, seed % w), v


def component(mask, row, column):
    """mask (h, w) bool -> the part of it that is joined to (row, column) by steps up, down, left and right."""
    grown = torch.zeros_like(mask)
    grown[row, column] = mask[row, column]
    while True:
        wider = grown.clone()
        wider[1:] |= grown[:-1]
        wider[:-1] |= grown[1:]
        wider[:, 1:] |= grown[:, :-1]
        wider[:, :-1] |= grown[:, 1:]
        wider &= mask
        if torch.equal(wider, grown):
            return grown
        grown = wider


THRESHOLDS = 255  # of max F: 0, 1/255, ... (TokenCut's metric file)


def saliency_metrics(maps, gts, beta2=0.3):
    """maps: (H, W) each, in [0, 1]; gts: (H, W) each, foreground above 0.5 -> {max_f, iou, acc}, means over the images in [0, 1].

    As TokenCut's own metrics: iou and acc of the map cut at 0.5; F_beta at 255 thresholds, averaged over images, then its maximum. Precision
    where nothing is predicted is 1, recall where there is nothing to find is 1. An image with neither mask counts as iou 1."""
    curves, iou, acc = [], [], []
    splits = torch.arange(THRESHOLDS, dtype=torch.float64) / THRESHOLDS
    for map_, gt in zip(maps, gts, strict=True):
        map_, gt = map_.double().cpu(), gt.cpu() > 0.5
        mask = map_ > 0.5
        union = (mask | gt).sum()
        iou.append(((mask & gt).sum() / union) if union else torch.tensor(1.0))
        acc.append((mask == gt).double().mean())
        exceeded = torch.bucketize(map_.flatten(), splits)                    # how many thresholds a pixel lies above
        found, right = (torch.bincount(e, minlength=THRESHOLDS + 1).flip(0).cumsum(0).flip(0)[1:].double() for e in (exceeded, exceeded[gt.flatten()]))
        precision = torch.where(found > 0, right / found.clamp(min=1), 1.0)
        recall = right / gt.sum() if gt.any() else torch.ones_like(right)
        curves.append(((1 + beta2) * precision * recall / (beta2 * precision + recall)).nan_to_num(0.0))
    return dict(max_f=torch.stack(curves).mean(0).max().item(), iou=torch.stack(iou).double().mean().item(), acc=torch.stack(acc).mean().item())


# ------------------------------------------------------------------------------------------------ label propagation (DINO's protocol)

AT_ONCE = 2**24  # affinities held at a time: 64 MB


@torch.no_grad()
def propagate(features, first, h, w, n_last=7, radius=12, topk=5, temperature=0.1):
    """features (T, h*w, dim) of the frames' patches, first (C, h, w) the first frame's labels -> (T-1, C, h, w), the others' soft labels.

    A patch takes the mean label of the topk patches most like it, weighted by exp(cosine / temperature), among those at most `radius` rows and
    columns away in the first frame and the n_last frames before it. Rows of patches are done a few at a time against the rows in their
    reach, so memory does not grow with the frames and the far affinities are not computed."""
    unit = F.normalize(features.float(), dim=-1).unflatten(1, (h, w))         # (T, h, w, dim)
    labels, C = [first.float()], first.shape[0]
    column = torch.arange(w, device=features.device)
    near = (column[:, None] - column).abs() <= radius                         # (w, w)
    for t in range(1, len(unit)):
        sources = [0, *range(max(1, t - n_last), t)]
        rows = max(1, AT_ONCE // (len(sources) * min(h, 2 * radius + 1) * w * w))
        out = torch.empty(C, h, w, device=features.device)
        for top in range(0, h, rows):
            bottom = min(h, top + rows)
            low, high = max(0, top - radius), min(h, bottom + radius)
            target, source = unit[t, top:bottom], unit[sources, low:high]     # (r, w, dim), (S, s, w, dim)
            cosine = torch.einsum("iwd,sjvd->iwsjv", target, source)          # (r, w, S, s, w)
            close = (torch.arange(top, bottom, device=features.device)[:, None] - torch.arange(low, high, device=features.device)).abs() <= radius
            reach = close[:, None, None, :, None] & near[:, None, None, :]    # (r, w, 1, s, w)
            affinity = (cosine / temperature).exp().masked_fill(~reach, 0).flatten(2).flatten(0, 1)  # (r*w, S*s*w)
            kth = affinity.topk(min(topk, affinity.shape[1]), dim=1).values[:, -1:]
            affinity = affinity.masked_fill(affinity < kth, 0)
            known = torch.stack([labels[s][:, low:high] for s in sources], 1).flatten(1)             # (C, S*s*w)
            out[:, top:bottom] = (known @ (affinity / affinity.sum(1, keepdim=True)).T).unflatten(1, (bottom - top, w))
        labels.append(out)
    return torch.stack(labels[1:]) if len(labels) > 1 else first.new_empty(0, C, h, w, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------ J and F (DAVIS-2017)

TOLERANCE = 0.008  # of the image's diagonal: how far a boundary pixel may lie from the other boundary


def davis_jf(pred, gt):
    """pred, gt (T, H, W) bool, one object -> J (T,), F (T,) in [0, 1], as davis2017-evaluation defines them.

    J: intersection over union, 1 where both are empty. F: harmonic mean of how much of each boundary lies within the tolerance of the other."""
    union = (pred | gt).sum((1, 2))
    J = torch.where(union > 0, (pred & gt).sum((1, 2)) / union.clamp(min=1), 1.0)
    radius = math.ceil(TOLERANCE * math.hypot(*pred.shape[1:]))
    offset = torch.arange(-radius, radius + 1, device=pred.device)
    disk = (offset[:, None].square() + offset.square() <= radius**2).float()[None, None]
    scores = []
    for p, g in zip(pred, gt):
        p, g = boundary(p), boundary(g)
        p_wide, g_wide = (F.conv2d(x.float()[None, None], disk, padding=radius)[0, 0] > 0.5 for x in (p, g))
        n_p, n_g = p.sum(), g.sum()
        precision = (p & g_wide).sum() / n_p if n_p else torch.tensor(1.0)
        recall = (g & p_wide).sum() / n_g if n_g else torch.tensor(1.0)
        scores.append(2 * precision * recall / (precision + recall) if precision + recall > 0 else torch.tensor(0.0))
    return J, torch.stack([score.cpu() for score in scores]).to(J)


def boundary(mask):
    """mask (H, W) bool -> its boundary, one pixel wide: where a pixel differs from the one to the right, below, or diagonally below right."""
    right, below, diagonal = mask.clone(), mask.clone(), mask.clone()
    right[:, :-1], below[:-1], diagonal[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    diagonal[-1, :-1], diagonal[:-1, -1] = mask[-1, 1:], mask[1:, -1]
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


def mean_recall_decay(values):
    """values (T,) of a sequence -> their mean, the share above 0.5, and how much the last quarter lies below the first (davis2017-evaluation)."""
    n = len(values)
    edges = [int(math.floor(1 + i * (n - 1) / 4 + 0.5 + 1e-10)) - 1 for i in range(5)]
    quarter = [values[a:b + 1].mean().item() for a, b in zip(edges, edges[1:])]
    return values.mean().item(), (values > 0.5).double().mean().item(), quarter[0] - quarter[3]
