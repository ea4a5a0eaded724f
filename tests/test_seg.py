"""eval_seg.py: its parts against naive definitions, its commands on small folders."""

import json
import math
import zipfile
from dataclasses import asdict
from pathlib import Path

from lib import shapes
from lib.config import UsageError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import SHARED, tiny_config
from PIL import Image

import eval_seg
from model import build_backbone, build_network


def naive_propagate(features, first, h, w, n_last, radius, topk, temperature):
    """DINO's dense form: of all affinities the far ones and those below the topk-th become zero."""
    f = F.normalize(features.double(), dim=-1)
    labels = [first.double()]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    for t in range(1, len(f)):
        sources = [0, *range(max(1, t - n_last), t)]
        affinity = torch.cat(
            [torch.exp(f[s] @ f[t].T / temperature) * near for s in sources]
        )  # (S*h*w, h*w), a column a target
        kth = affinity.topk(min(topk, len(affinity)), dim=0).values[-1]
        affinity[affinity < kth] = 0
        affinity /= affinity.sum(0)
        labels.append(
            (torch.cat([labels[s].flatten(1) for s in sources], 1) @ affinity).view(-1, h, w)
        )
    return torch.stack(labels[1:])


@pytest.mark.parametrize("tile", [12, 4])
@pytest.mark.parametrize("radius, topk", [(2, 5), (12, 3), (1, 1)])
def test_propagation_is_the_dense_form(monkeypatch, radius, topk, tile):
    monkeypatch.setattr(eval_seg, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    h, w = 6, 9
    features = torch.randn(12, h * w, 8, generator=generator)
    first = F.one_hot(torch.randint(0, 3, (h, w), generator=generator), 3).permute(2, 0, 1).float()
    got = eval_seg.propagate(features, first, h, w, 7, radius, topk)
    torch.testing.assert_close(
        got.double(),
        naive_propagate(features, first, h, w, 7, radius, topk, 0.1),
        atol=1e-4,
        rtol=1e-4,
    )
    assert got.shape == (11, 3, h, w)
    torch.testing.assert_close(got.sum(1), torch.ones(11, h, w))


def test_tokencut_finds_two_clusters_exactly_and_its_vector_solves_the_problem():
    h, w = 10, 12
    truth = torch.zeros(h, w, dtype=torch.bool)
    truth[3:7, 4:8] = True
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, generator=generator)
    features = torch.where(truth, a[:, None, None], b[:, None, None]) + 0.02 * torch.randn(
        16, h, w, generator=generator
    )
    mask, v = eval_seg.tokencut(features)
    assert (
        torch.equal(mask, truth)
        and mask.dtype == torch.bool
        and v.shape == (h, w)
        and v[truth].min() > v[~truth].max()
    )
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
    assert torch.equal(mask, truth) or torch.equal(
        mask, other
    )  # the two are alike: one component, never both
    assert (v > v.mean()).sum() == (truth | other).sum()


def test_components_are_four_connected():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(
        eval_seg.component(mask, 0, 3),
        torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool),
    )
    assert torch.equal(
        eval_seg.component(mask, 0, 0),
        torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool),
    )


def test_saliency_metrics_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.rand(13, 17, generator=generator),
        (torch.rand(8, 8, generator=generator) > 0.5).float(),
        torch.zeros(5, 5),
        torch.rand(6, 4, generator=generator),
    ]
    gts = [
        torch.rand(13, 17, generator=generator) > 0.6,
        torch.rand(8, 8, generator=generator) > 0.5,
        torch.rand(5, 5, generator=generator) > 0.5,
        torch.zeros(6, 4, dtype=torch.bool),
    ]
    iou, acc = [], []
    curves = []
    for map_, gt in zip(maps, gts):
        m = map_.double().numpy()
        g = gt.numpy()
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
    assert (
        got["iou"] == pytest.approx(np.mean(iou))
        and got["acc"] == pytest.approx(np.mean(acc))
        and got["max_f"] == pytest.approx(np.mean(curves, 0).max())
    )
    arrays = eval_seg.saliency_metrics([m.numpy() for m in maps], [g.numpy() for g in gts])
    assert arrays == got
    assert eval_seg.saliency_metrics([gts[0].float()], [gts[0]]) == dict(
        max_f=1.0, iou=1.0, acc=1.0
    )


def test_j_and_f_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    T, H, W = 5, 40, 60
    pred, gt = (
        F.avg_pool2d(torch.rand(T, 1, H + 6, W + 6, generator=generator), 7, 1)[:, 0] > 0.5
        for _ in range(2)
    )
    pred[1], gt[2] = False, False
    pred[3] = gt[3]
    pred[4], gt[4] = False, False
    J, F_ = eval_seg.davis_jf(pred, gt)
    radius = math.ceil(0.008 * math.hypot(H, W))

    def edges(mask):
        found = []
        for y in range(H):
            for x in range(W):
                neighbours = (
                    [(y, x + 1)] * (x + 1 < W)
                    + [(y + 1, x)] * (y + 1 < H)
                    + [(y + 1, x + 1)] * (x + 1 < W and y + 1 < H)
                )
                if any(mask[y, x] != mask[n] for n in neighbours):
                    found.append((y, x))
        return found

    for t in range(T):
        union = (pred[t] | gt[t]).sum().item()
        assert J[t].item() == pytest.approx(
            (pred[t] & gt[t]).sum().item() / union if union else 1.0
        )
        a, b = edges(pred[t].numpy()), edges(gt[t].numpy())

        def share(these, those):
            return (
                sum(
                    any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in those)
                    for y, x in these
                )
                / len(these)
                if these
                else 1.0
            )

        p, r = share(a, b), share(b, a)
        assert F_[t].item() == pytest.approx(2 * p * r / (p + r) if p + r else 0.0, abs=1e-6)


def test_recall_and_decay():
    J = torch.tensor([1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0])
    [(name, n, values)] = eval_seg.object_measures("judo", torch.stack([J, 1 - J])[None])
    assert (name, n) == ("judo_1", 8)
    values = dict(zip(eval_seg.MEASURES, values.tolist()))
    ids = np.round(np.linspace(1, 8, 5) + 1e-10).astype(int) - 1
    v = J.numpy()
    assert values["J mean"] == pytest.approx(0.5)
    assert values["J recall"] == 0.5
    decay = v[ids[0] : ids[1] + 1].mean() - v[ids[3] : ids[4] + 1].mean()
    assert values["J decay"] == pytest.approx(decay)
    assert values["F decay"] == pytest.approx(-decay)
    assert values["J&F"] == pytest.approx((values["J mean"] + values["F mean"]) / 2)


# --- the bilateral solver -------------------------------------------------------------------------


def test_the_bilateral_solver_solves_its_dense_system():
    generator = torch.Generator().manual_seed(0)
    image = (
        F.interpolate(torch.rand(1, 3, 5, 6, generator=generator), size=(24, 30))[0].mul(255).byte()
    )
    target = (torch.rand(24, 30, generator=generator) > 0.5).float()
    yuv = np.einsum(
        "ij,jhw->ihw",
        np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]),
        image.numpy().astype(float),
    )
    of_cell = {}
    for y in range(24):
        for x in range(30):
            of_cell.setdefault(
                (
                    x // 4,
                    y // 4,
                    int(yuv[0, y, x] // 16),
                    int((yuv[1, y, x] + 128) // 8),
                    int((yuv[2, y, x] + 128) // 8),
                ),
                [],
            ).append((y, x))
    cells = list(of_cell)
    splat = np.zeros((len(cells), 24 * 30))
    blur = np.zeros((len(cells), len(cells)))
    for i, a in enumerate(cells):
        splat[i, [y * 30 + x for y, x in of_cell[a]]] = 1
        for j, b in enumerate(cells):
            difference = np.abs(np.subtract(a, b))
            blur[i, j] = 10 if i == j else float(difference.sum() == 1)
    m, n = splat.sum(1), np.ones(len(cells))
    for _ in range(10):
        n = np.sqrt(n * m / (blur @ n))
    m = n * (blur @ n)
    A = 256 * (np.diag(m) - n[:, None] * blur * n) + np.diag(0.999 * splat.sum(1))
    exact = np.linalg.solve(A, 0.999 * splat @ target.numpy().flatten()) @ splat
    got = eval_seg.bilateral_solver(image, target, spatial=4, steps=500, tolerance=1e-12)
    np.testing.assert_allclose(got.flatten().numpy(), exact, atol=1e-8)


def test_the_bilateral_solver_snaps_a_rough_mask_to_the_edge():
    truth = torch.zeros(96, 128, dtype=torch.bool)
    truth[21:70, 33:90] = True
    image = torch.where(
        truth,
        torch.tensor([200, 60, 40])[:, None, None],
        torch.tensor([40, 60, 200])[:, None, None],
    ).byte()
    rough = torch.zeros(96, 128)
    rough[16:80, 32:96] = 1
    assert torch.equal(eval_seg.bilateral_solver(image, rough) > 0.5, truth)
    assert eval_seg.bilateral_solver(image, torch.zeros(96, 128)).abs().max() == 0


# --- hard inputs of the functions -----------------------------------------------------------------


def test_tokencut_where_there_is_nothing_to_cut():
    for features in (
        torch.ones(4, 3, 5),
        torch.randn(4, 1, 1),
        torch.eye(6)[:, :, None],
    ):  # all alike, one patch, none like another
        mask, v = eval_seg.tokencut(features)
        assert not mask.any() and mask.shape == v.shape == features.shape[1:] and v.isfinite().all()


def test_propagation_at_a_small_temperature_and_without_memory():
    generator = torch.Generator().manual_seed(0)
    features, first = (
        torch.randn(4, 12, 8, generator=generator),
        F.one_hot(torch.arange(12) % 2).T.view(2, 3, 4),
    )
    got = eval_seg.propagate(features, first, 3, 4, n_last=0, temperature=1e-4)
    best = (F.normalize(features[3], dim=-1) @ F.normalize(features[0], dim=-1).T).argmax(1)
    assert torch.equal(got[2].argmax(0).flatten(), best % 2) and got.isfinite().all()
    assert eval_seg.propagate(features[:1], first, 3, 4).shape == (0, 2, 3, 4)


def test_a_propagation_keeps_the_first_frame_and_the_latest():
    propagation = eval_seg.Propagation(torch.ones(1, 1, 1), 2, 12, 5, 0.1)
    frames = F.normalize(torch.randn(6, 1, 1, 4, generator=torch.Generator().manual_seed(0)), dim=3)
    for frame in frames:
        propagation.step(frame)
    held = torch.stack([unit for unit, _ in propagation.frames])
    torch.testing.assert_close(held, frames[[0, 4, 5]])


@pytest.mark.parametrize("name", ["vit_micro", "resnet18", "vmamba_micro"])
def test_feature_maps_are_what_forward_pools(name):
    backbone = build_backbone(name, 64, 8).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        grid = eval_seg.feature_map(backbone, x)
        side = getattr(backbone, "patch_size", 32)
        assert grid.shape == (64 // side, 96 // side, backbone.dim)
        pooled = backbone.tokens(x)[0][:, 1:].mean(1) if name == "vit_micro" else backbone(x)
    torch.testing.assert_close(grid.mean((0, 1)), pooled[0], atol=1e-5, rtol=1e-4)


def test_a_colored_picture_is_no_mask_and_a_gray_one_saved_in_color_is(tmp_path):
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(gray).convert("RGBA").save(tmp_path / "gray.png")
    assert np.array_equal(eval_seg.read_mask(tmp_path / "gray.png"), gray)
    Image.fromarray(np.stack([gray, gray, 0 * gray], 2)).save(tmp_path / "color.png")
    with pytest.raises(UsageError, match="save it as an indexed"):
        eval_seg.read_mask(tmp_path / "color.png")


def test_the_palette_is_daviss():
    assert eval_seg.PALETTE[:5].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
    ]
    assert eval_seg.PALETTE[[38, 255]].tolist() == [[0, 128, 192], [224, 224, 192]]


def test_sides_are_rounded_as_the_protocols_say():
    assert (
        eval_seg.frame_sides(480, 854, 480, 16)
        == eval_seg.frame_sides(480, 853, 480, 8)
        == eval_seg.frame_sides(480, 853, 480, 32)
        == (480, 832)
    )
    assert (
        eval_seg.frame_sides(854, 480, 480, 16) == (832, 480)
        and eval_seg.frame_sides(100, 100, 100, 16) == (96, 64)
        and eval_seg.frame_sides(9, 90, 16, 32) == (32, 320)
    )
    assert (
        eval_seg.photo_sides(300, 400, 0, 16) == (304, 400)
        and eval_seg.photo_sides(5, 40, 0, 16) == (16, 32)
        and eval_seg.photo_sides(300, 400, 96, 8) == (96, 128)
    )


def test_moving_shapes_move_and_are_where_the_ids_say():
    frames, ids = shapes.moving_shapes(3, 64, frames=5)
    again, _ = shapes.moving_shapes(3, 64, frames=5)
    assert (
        torch.equal(frames, again)
        and frames.shape == (5, 3, 64, 64)
        and ids.unique().tolist() == [0, 1, 2]
        and not torch.equal(ids[0], ids[-1])
    )
    shade = frames.float().mean(1)
    for t in range(5):
        background = shade[t][ids[t] == 0].mean()
        assert all((shade[t][ids[t] == i].mean() - background).abs() > 50 for i in (1, 2))
    images, masks = shapes.shape_masks("val", 32, 12)
    assert (
        torch.equal(images[7], shapes.shapes("val", 32, 12).read(7))
        and 0.05 < masks.float().mean() < 0.5
    )


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A CLeVER network as the seed gives it: for these tests it need not have learnt."""
    torch.manual_seed(0)
    config = tiny_config(head_bottleneck=8)
    path = tmp_path_factory.mktemp("ckpt") / "ckpt.pt"
    torch.save({"teacher": build_network(config).state_dict(), "config": asdict(config)}, path)
    return path


def run(capsys, *arguments):
    """eval_seg.main -> the rows it appended, the text it printed."""
    eval_seg.main(["--precision=fp32", *arguments])
    out = next(a for a in arguments if a.startswith("--out=")).removeprefix("--out=")
    return json.loads(Path(out, "results.json").read_text())[-1], capsys.readouterr().out


def write_davis(root, name, frames, ids):
    for kind, images in (("JPEGImages", frames), ("Annotations", ids)):
        folder = root / kind / "480p" / name
        folder.mkdir(parents=True)
        for t, image in enumerate(images):
            if kind == "Annotations":
                eval_seg.write_ids(folder / f"{t:05}.png", image)
            else:
                torchvision.io.write_jpeg(image, str(folder / f"{t:05}.jpg"), quality=95)


def test_davis_from_its_folders(ckpt, tmp_path, capsys):
    root = tmp_path / "DAVIS"
    frames, ids = shapes.moving_shapes(0, 128, frames=9)
    ids[3, :20] = 255  # nobody's
    ids[5, 60:70, 60:70] = 7  # an object that was not there at first
    narrow = [
        F.interpolate(frame[None].float(), size=(128, 127)).byte()[0] if t % 2 else frame
        for t, frame in enumerate(frames)
    ]
    narrow_ids = [eval_seg.enlarge(i, 128, 127).byte() if t % 2 else i for t, i in enumerate(ids)]
    write_davis(root, "moves", narrow, narrow_ids)
    write_davis(root, "unmarked", frames[:3], ids[1:1])
    write_davis(root, "empty", frames[:3], ids[:3] * 0)
    write_davis(root, "broken", frames[:3], ids[:3])
    (root / "JPEGImages/480p/broken/00001.jpg").write_text("not a picture")
    write_davis(root, "short", frames[:2], ids[:2])
    (root / "Annotations/480p/unlisted").mkdir()
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("moves\nunmarked\nempty\nbroken\nshort\nlost\n")
    result, said = run(
        capsys,
        f"--ckpt={ckpt}",
        "--task=davis",
        f"--data={root}",
        f"--out={tmp_path}",
        "--size=128",
        "--pictures=1",
    )

    assert (
        "unmarked: skipped, frame 00000 has no annotation" in said
        and "empty: skipped, the annotation of frame 00000 marks no object" in said
    )
    assert (
        "broken: skipped" in said
        and "lost: skipped, has no frames" in said
        and "object 7 not in the first annotation" in said
    )
    assert "| clever, ef " in said and "J&F" in said
    for part in ("full", "ir", "ef"):
        written = sorted((tmp_path / f"masks/clever_{part}/moves").iterdir())
        assert [path.name for path in written] == [f"{t:05}.png" for t in range(9)]
        found = [torch.from_numpy(np.array(Image.open(path))) for path in written]
        assert all(
            Image.open(path).mode == "P" and mask.shape == truth.shape
            for path, mask, truth in zip(written, found, narrow_ids)
        )
        assert torch.equal(found[0] * (ids[0] != 255), ids[0]) and Image.open(
            written[0]
        ).getpalette()[3:6] == [128, 0, 0]
        by_object = {}
        for number in (1, 2):  # J again, from the files
            pairs = [
                ((mask == number) & (truth != 255), truth == number)
                for mask, truth in zip(found[1:-1], narrow_ids[1:-1])
            ]
            by_object[number] = np.mean(
                [((p & g).sum() / (p | g).sum()).item() if (p | g).any() else 1.0 for p, g in pairs]
            )
            [row] = [
                row
                for row in result["rows"]
                if row["part"] == part
                and row["test"] == f"moves_{number}"
                and row["metric"] == "J mean"
            ]
            assert (
                row["value"] == pytest.approx(100 * by_object[number], abs=0.01) and row["n"] == 7
            )
        [total] = [
            row
            for row in result["rows"]
            if row["part"] == part and row["test"] == "DAVIS" and row["metric"] == "J mean"
        ]
        assert total["value"] == pytest.approx(50 * sum(by_object.values()), abs=0.02)
        assert total["value"] > 40  # even at random weights: patches of one colour are alike
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["davis_moves.png"]
    assert result["task"] == "davis" and result["protocol"]["n_last"] == 7


@pytest.mark.skipif(
    not (SHARED / "davis_judo.zip").exists(), reason="the real DAVIS frames are not here"
)
def test_real_frames(ckpt, tmp_path, capsys):
    with zipfile.ZipFile(SHARED / "davis_judo.zip") as archive:
        archive.extractall(tmp_path)
    result, said = run(
        capsys,
        f"--ckpt={ckpt}",
        "--task=davis",
        f"--data={tmp_path}/davis_judo",
        f"--out={tmp_path}",
        "--size=64",
        "--part=full",
    )
    assert "1 of 1 have no ground truth: segmented, not scored" in said and result["rows"] == []
    masks = sorted((tmp_path / "masks/clever_full/judo").iterdir())
    assert len(masks) == 16 and all(np.asarray(Image.open(path)).max() > 0 for path in masks)


def test_saliency_from_folders(ckpt, tmp_path, capsys):
    root = tmp_path / "ECSSD"
    (root / "Images").mkdir(parents=True)
    (root / "ground_truth_mask").mkdir()
    images, masks = shapes.shape_masks("val", 64, 6)
    for i in range(6):
        torchvision.io.write_jpeg(images[i], str(root / f"Images/{i}.jpg"), quality=95)
        Image.fromarray(masks[i].numpy().astype(np.uint8) * (1 if i % 2 else 255)).save(
            root / f"ground_truth_mask/{i}.png"
        )
    (root / "ground_truth_mask/5.png").unlink()
    Image.fromarray(images[4, 0].numpy()).save(root / "Images/4.jpg")  # gray
    too_small = Image.fromarray(masks[3].numpy()).resize((32, 32))
    too_small.save(root / "ground_truth_mask/3.png")
    torchvision.io.write_jpeg(
        images[0][:, :5, :5], str(root / "Images/tiny.jpg")
    )  # smaller than a patch
    (root / "Images/torn.jpg").write_bytes((root / "Images/1.jpg").read_bytes()[:200])
    result, said = run(
        capsys, f"--ckpt={ckpt}", f"--data={root}", f"--out={tmp_path}", "--pictures=2"
    )
    assert (
        "torn: skipped" in said
        and "tiny: clever finds no foreground: all patches are alike, or no two are" in said
        and "3: mask of 32x32 resized" in said
    )
    assert (
        "2 of 7 have no ground truth: segmented, not scored" in said and "no foreground: " in said
    )
    written = {
        path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "masks/clever").iterdir()
    }
    assert (
        set(written) == {*"012345", "tiny"}
        and set(np.unique(written["0"])) == {0, 255}
        and written["0"].shape == (64, 64)
        and written["tiny"].shape == (5, 5)
    )
    iou = [
        ((written[str(i)] > 0) & masks[i].numpy()).sum()
        / ((written[str(i)] > 0) | masks[i].numpy()).sum()
        for i in (0, 1, 2, 4)
    ]
    three = eval_seg.enlarge(torch.from_numpy(np.array(too_small, np.uint8)), 64, 64).numpy() > 0
    iou.append(((written["3"] > 0) & three).sum() / ((written["3"] > 0) | three).sum())
    [row] = [row for row in result["rows"] if row["metric"] == "IoU"]
    assert (
        row["value"] == pytest.approx(100 * np.mean(iou), abs=0.01)
        and row["n"] == 5
        and row["test"] == "ECSSD"
    )
    assert {row["metric"] for row in result["rows"]} == {
        "max F",
        "IoU",
        "accuracy",
        "max F, solver",
        "IoU, solver",
        "accuracy, solver",
    }
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"{what}_{i}.png" for what in ("saliency", "attention") for i in (0, 1)
    }


@pytest.mark.slow
def test_one_picture_and_the_built_in_ones(ckpt, tmp_path, capsys):
    torchvision.io.write_png(shapes.shapes("val", 96, 1).read(0), str(tmp_path / "photo.png"))
    result, said = run(
        capsys,
        f"--ckpt={ckpt}",
        f"--image={tmp_path}/photo.png",
        f"--out={tmp_path}",
        "--solver=False",
    )
    assert (
        (tmp_path / "masks/clever/photo.png").exists()
        and (tmp_path / "pictures/attention_photo.png").exists()
        and result["rows"] == []
    )
    assert not (tmp_path / "masks/clever_solver").exists()
    result, said = run(
        capsys,
        f"--ckpt={ckpt}",
        f"--compare={ckpt}",
        f"--out={tmp_path}",
        "--untrained=True",
        "--size=48",
        "--pictures=1",
    )
    assert len(result["rows"]) == 3 * 6 and "untrained" in said


@pytest.mark.parametrize("task", ["saliency", "davis"])
def test_only_what_cannot_be_read_is_skipped(ckpt, tmp_path, task):
    checkpoint = torch.load(ckpt)
    checkpoint["teacher"]["backbone.norm.weight"] += math.nan
    checkpoint["teacher"]["backbone.blocks.5.norm1.weight"] += math.nan
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(UsageError, match="features that are not finite"):
        eval_seg.main([f"--ckpt={tmp_path}/ckpt.pt", f"--task={task}"])


def test_a_photo_with_too_many_patches_is_refused(ckpt, tmp_path):
    torchvision.io.write_png(torch.zeros(3, 1000, 1000, dtype=torch.uint8), f"{tmp_path}/a.png")
    with pytest.raises(UsageError, match="patches take too much memory; use --size=480"):
        eval_seg.main([f"--ckpt={ckpt}", f"--image={tmp_path}/a.png", f"--out={tmp_path}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, stem", [("resnet18", "imagenet"), ("resnet18", "small"), ("vmamba_micro", "imagenet")]
)
def test_maps_of_other_backbones(name, stem, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(build_backbone(name, stem=stem).state_dict(), tmp_path / "weights.pt")
    frames, ids = shapes.moving_shapes(0, 192, frames=4)
    write_davis(tmp_path / "DAVIS", "moves", frames, ids)
    result, _ = run(
        capsys,
        f"--ckpt={tmp_path}/weights.pt",
        "--task=davis",
        f"--data={tmp_path}/DAVIS",
        f"--out={tmp_path}",
        "--size=192",
    )
    assert {row["test"] for row in result["rows"]} == {"DAVIS", "moves_1", "moves_2"}
    torchvision.io.write_png(frames[0], str(tmp_path / "photo.png"))
    run(
        capsys,
        f"--ckpt={tmp_path}/weights.pt",
        f"--image={tmp_path}/photo.png",
        f"--out={tmp_path}",
        "--size=224",
    )
    assert (tmp_path / f"masks/{name}/photo.png").exists() and not (
        tmp_path / "pictures/attention_photo.png"
    ).exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no checkpoint given"),
        (["--task=davsi"], "did you mean 'davis'"),
        (["--task=davis", "--image=x.jpg"], "not for --task=davis; remove it"),
        (["--part=ir"], "TokenCut compares keys"),
        (
            ["CKPT", "--task=davis", "--data=nowhere"],
            "give the folder of DAVIS",
        ),
        (["CKPT", "--data=nowhere"], "name them img/ and gt/"),
        (["CKPT", "--image=nowhere.jpg"], "none of 1 could be read"),
        (["CKPT", "--task=davis", "--topk=0"], "must be between"),
        (["CKPT", "--task=davis", "--tau=0.5"], "tau=0.5: not for --task=davis"),
        (["CKPT", "--save_correct=True"], "save_correct=True: not for segmentation"),
        (["CKPT", "--out=nowhere"], "no such folder"),
    ],
)
def test_wrong_commands(ckpt, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        eval_seg.main(
            [f"--ckpt={ckpt}" if a == "CKPT" else a for a in arguments]
            + ([] if "--out=nowhere" in arguments else [f"--out={tmp_path}"])
        )
