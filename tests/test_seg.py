"""eval_seg.py's parts against naive definitions."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_seg


def naive_propagate(features, first, h, w, n_last, radius, topk, temperature):
    """DINO's dense form: all affinities, the far ones set to zero, those below the topk-th of each column too."""
    f, labels = F.normalize(features.double(), dim=-1), [first.double()]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    for t in range(1, len(f)):
        sources = [0, *range(max(1, t - n_last), t)]
        affinity = torch.cat([torch.exp(f[s] @ f[t].T / temperature) * near for s in sources])  # (S*h*w, h*w), a column a target
        kth = affinity.topk(min(topk, len(affinity)), dim=0).values[-1]
        affinity[affinity < kth] = 0
        affinity /= affinity.sum(0)
        labels.append((torch.cat([labels[s].flatten(1) for s in sources], 1) @ affinity).view(-1, h, w))
    return torch.stack(labels[1:])


@pytest.mark.parametrize("at_once", [2**24, 1000])
@pytest.mark.parametrize("radius, topk", [(2, 5), (12, 3), (1, 1)])
def test_propagation_is_the_dense_form(monkeypatch, radius, topk, at_once):
    monkeypatch.setattr(eval_seg, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    h, w = 6, 9
    features = torch.randn(12, h * w, 8, generator=generator)
    first = F.one_hot(torch.randint(0, 3, (h, w), generator=generator), 3).permute(2, 0, 1).float()
    got = eval_seg.propagate(features, first, h, w, 7, radius, topk)
    torch.testing.assert_close(got.double(), naive_propagate(features, first, h, w, 7, radius, topk, 0.1), atol=1e-4, rtol=1e-4)
    assert got.shape == (11, 3, h, w)
    torch.testing.assert_close(got.sum(1), torch.ones(11, h, w))


def test_tokencut_finds_two_clusters_exactly_and_its_vector_solves_the_problem():
    h, w = 10, 12
    truth = torch.zeros(h, w, dtype=torch.bool)
    truth[3:7, 4:8] = True
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, generator=generator)
    features = torch.where(truth, a[:, None, None], b[:, None, None]) + 0.02 * torch.randn(16, h, w, generator=generator)
    mask, v = eval_seg.tokencut(features)
    assert torch.equal(mask, truth) and mask.dtype == torch.bool and v.shape == (h, w) and v[truth].min() > v[~truth].max()
    unit = F.normalize(features.flatten(1).double(), dim=0)
    W = torch.where(unit.T @ unit > 0.2, 1.0, 1e-5).double()
    D = W.sum(1).diag()
    v = v.flatten()
    value = (v @ (D - W) @ v) / (v @ D @ v)
    assert ((D - W) @ v - value * (D @ v)).abs().max() < 1e-5 and v @ D @ v == pytest.approx(1)
    # the second smallest: nothing that is D-orthogonal to the constant vector does better
    for _ in range(20):
        x = torch.randn(h * w, generator=generator).double()
        x -= (x @ D.sum(1)) / D.sum()
        assert (x @ (D - W) @ x) / (x @ D @ x) >= value - 1e-9


def test_tokencut_keeps_the_seeds_component_and_the_small_side_is_foreground():
    h, w = 9, 14
    truth = torch.zeros(h, w, dtype=torch.bool)
    truth[2:6, 2:6] = True
    other = torch.zeros_like(truth)
    other[7, 11] = True
    features = torch.zeros(2, h, w)
    features[0], features[1] = (truth | other).float(), (~(truth | other)).float()
    mask, v = eval_seg.tokencut(features)
    assert torch.equal(mask, truth) or torch.equal(mask, other)  # the two are alike: one component, never both
    assert (v > v.mean()).sum() == (truth | other).sum()


def test_components_are_four_connected():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(eval_seg.component(mask, 0, 3), torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool))
    assert torch.equal(eval_seg.component(mask, 0, 0), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool))


def test_saliency_metrics_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(13, 17, generator=generator), (torch.rand(8, 8, generator=generator) > 0.5).float(), torch.zeros(5, 5), torch.rand(6, 4, generator=generator)]
    gts = [torch.rand(13, 17, generator=generator) > 0.6, torch.rand(8, 8, generator=generator) > 0.5, torch.rand(5, 5, generator=generator) > 0.5, torch.zeros(6, 4, dtype=torch.bool)]
    iou, acc, curves = [], [], []
    for m, g in zip(maps, gts):
        m, g = m.double().numpy(), g.numpy()
        iou.append(((m > 0.5) & g).sum() / ((m > 0.5) | g).sum())
        acc.append(((m > 0.5) == g).mean())
        curve = []
        for split in [i / 255 for i in range(255)]:
            found = m > split
            p = (found & g).sum() / found.sum() if found.sum() else 1.0
            r = (found & g).sum() / g.sum() if g.sum() else 1.0
            curve.append(1.3 * p * r / (0.3 * p + r) if 0.3 * p + r else 0.0)
        curves.append(curve)
    got = eval_seg.saliency_metrics(maps, gts)
    assert got["iou"] == pytest.approx(np.mean(iou)) and got["acc"] == pytest.approx(np.mean(acc)) and got["max_f"] == pytest.approx(np.mean(curves, 0).max())
    assert eval_seg.saliency_metrics([gts[0].float()], [gts[0]]) == dict(max_f=1.0, iou=1.0, acc=1.0)


def test_j_and_f_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    T, H, W = 5, 40, 60
    pred, gt = (F.avg_pool2d(torch.rand(T, 1, H + 6, W + 6, generator=generator), 7, 1)[:, 0] > 0.5 for _ in range(2))
    pred[1], gt[2] = False, False
    pred[3] = gt[3]
    pred[4], gt[4] = False, False
    J, F_ = eval_seg.davis_jf(pred, gt)
    radius = math.ceil(0.008 * math.hypot(H, W))

    def edges(mask):
        found = []
        for y in range(H):
            for x in range(W):
                neighbours = [(y, x + 1)] * (x + 1 < W) + [(y + 1, x)] * (y + 1 < H) + [(y + 1, x + 1)] * (x + 1 < W and y + 1 < H)
                if any(mask[y, x] != mask[n] for n in neighbours):
                    found.append((y, x))
        return found

    for t in range(T):
        union = (pred[t] | gt[t]).sum().item()
        assert J[t].item() == pytest.approx((pred[t] & gt[t]).sum().item() / union if union else 1.0)
        a, b = edges(pred[t].numpy()), edges(gt[t].numpy())

        def share(these, those):
            return sum(any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in those) for y, x in these) / len(these) if these else 1.0
        p, r = share(a, b), share(b, a)
        assert F_[t].item() == pytest.approx(2 * p * r / (p + r) if p + r else 0.0, abs=1e-6)


def test_recall_and_decay():
    values = torch.tensor([1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0])
    mean, recall, decay = eval_seg.mean_recall_decay(values)
    ids = np.round(np.linspace(1, 8, 5) + 1e-10).astype(int) - 1
    v = values.numpy()
    assert mean == pytest.approx(0.5) and recall == 0.5 and decay == pytest.approx(v[ids[0]:ids[1] + 1].mean() - v[ids[3]:ids[4] + 1].mean())
