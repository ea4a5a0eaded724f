"""View share and view parameters against values computed by hand; rows, verdicts, the picture."""

from types import SimpleNamespace

from lib import equivariance, results, rng
from lib.equivariance import CHANGES, VIEWS
from lib.images import subset
from lib.shapes import shapes

import pytest
import torch
from conftest import HERE

from augment import MEAN, STD
from model import build_backbone

SIZE = 16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- view share


def test_view_share_by_hand():
    """Two images x two views x two dimensions, in fractions."""
    z = torch.tensor([[[0.0, 0], [2, 0]], [[4.0, 1], [4, 3]]])
    # within: (2 + 2) / 2, of each image 2, as 1 / (M - 1) of 1 + 1. Centers (1, 0), (4, 2): their
    # variance 4.5 + 2 has 2 / M of the views in it.
    assert equivariance.view_share(z).item() == pytest.approx(2 / (2 + 6.5 - 1))


@pytest.mark.parametrize("views", [2, 4, 16])
def test_view_share_of_what_is_known(views):
    image, view = normal(4000, 1, 6), normal(4000, views, 6, seed=1)
    share = equivariance.view_share
    assert share(image.expand(-1, views, -1)).item() == 0
    assert share(view).item() == pytest.approx(1, abs=0.02)
    assert share(2 * image + view).item() == pytest.approx(0.2, abs=0.01)
    assert share(100 + 2 * image + view).item() == pytest.approx(0.2, abs=0.01)


def test_whitening_counts_each_direction_alike():
    """Of 4 directions one holds the view alone, at a tenth of the scale or ten times."""
    image, view = normal(3000, 1, 3), normal(3000, VIEWS, 1, seed=1)
    for scale in (0.1, 1, 10):
        z = torch.cat([image.expand(-1, VIEWS, -1), scale * view], -1) @ normal(4, 4, seed=2)
        white = equivariance.whitened(z)
        assert equivariance.view_share(white).item() == pytest.approx(1 / 4, abs=0.01)
        flat = white.flatten(0, 1)
        torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(4).double())


def test_a_repeated_column_changes_no_whitened_share_and_no_r2():
    z = normal(400, VIEWS, 5) @ normal(5, 5, seed=1) + normal(400, 1, 5, seed=2)
    twice = torch.cat([z, z[..., 1:2]], -1)
    one, other = (equivariance.whitened(x) for x in (z, twice))
    assert one.shape == other.shape
    share = equivariance.view_share
    assert share(one).item() == pytest.approx(share(other).item(), abs=1e-9)
    y = z[..., :2] + normal(400, VIEWS, 2, seed=3)
    r2 = [equivariance.r_squared(x[:200], y[:200], x[200:], y[200:])[0] for x in (z, twice)]
    assert r2[0] == pytest.approx(r2[1], abs=0.01)


def test_weights_are_repeated_images():
    z = normal(5, VIEWS, 3) + 2 * normal(5, 1, 3, seed=1)
    counts = torch.tensor([2, 0, 1, 3, 0])
    drawn = z.repeat_interleave(counts, 0)
    weighted = equivariance.view_share(z, counts.double()).item()
    # the number of images is that of the set, in both
    n, m = len(z), len(drawn)
    center = drawn.mean(1)
    within = drawn.var(1).sum(-1).mean()
    between = center.var(0).sum() * (m - 1) / m * n / (n - 1) - within / VIEWS
    assert m == 6 and weighted == pytest.approx((within / (within + between)).item())


def test_the_interval_covers_what_it_should():
    """Of 100 samples of 200 images, 95 % intervals hold the truth in about 95."""
    held = 0
    for seed in range(100):
        z = 2 * normal(200, 1, 4, seed=seed) + normal(200, VIEWS, 4, seed=1000 + seed)
        low, high = equivariance.interval(equivariance.share_and_bootstrap(z)[1])
        held += low <= 20 <= high
    assert 85 <= held <= 100


# --- view parameters


def views_of(name, images, seed=3):
    """Make all views of a change as view_features does: (N, VIEWS, 3, S, S)."""
    seeds = rng.sample_seeds(0, 0, torch.arange(len(images)))
    pixels = torch.stack([images.read(i) for i in range(len(images))])
    made = [equivariance.change_views(name, v, seed, pixels, seeds) for v in range(VIEWS)]
    return torch.stack(made, 1)


def test_parameters_are_those_of_the_views():
    """Without a change nothing differs; with one, the views follow the parameters it has."""
    images = shapes("val", SIZE, 40)
    original = torch.stack([images.read(i) for i in range(40)]).float() / 255
    found = equivariance.view_parameters("flip", 40, SIZE, 3)["flip"].bool()[..., 0]
    flipped = views_of("flip", images)
    plain = views_of("rotation", images)  # only for the shape
    assert flipped.shape == plain.shape == (40, VIEWS, 3, SIZE, SIZE)
    assert 0.3 < found.double().mean() < 0.7
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    normalized = (original - mean) / std
    for i in range(40):
        for view in range(VIEWS):
            expected = normalized[i].flip(-1) if found[i, view] else normalized[i]
            torch.testing.assert_close(flipped[i, view], expected, rtol=0, atol=1e-5)


def test_brightness_and_angle_change_pixels_as_told():
    images = shapes("val", SIZE, 200)
    p = equivariance.view_parameters("jitter", 200, SIZE, 3)
    mean = views_of("jitter", images).mean((2, 3, 4))
    together = torch.stack([mean.flatten(), p["brightness"].flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.5
    angle = equivariance.view_parameters("rotation", 200, SIZE, 3)["angle"]
    torch.testing.assert_close(angle.square().sum(-1), torch.ones(200, VIEWS))
    # what turns in from outside is black: most of it at 45 degrees
    corners = views_of("rotation", images)[..., ::15, ::15].mean((2, 3, 4))
    turned = angle.prod(-1).abs()  # |sin of twice the angle| / 2
    assert torch.corrcoef(torch.stack([corners.flatten(), turned.flatten()]))[0, 1] < -0.5


@pytest.mark.parametrize("name", CHANGES)
def test_features_that_are_the_parameters_tell_them(name):
    """R^2 and accuracy 1, with noise beside them; of noise alone 0, and 1/2."""
    sets = []
    for n in (300, 200):
        p = equivariance.view_parameters(name, n, SIZE, n)
        own = [p[one] for one in CHANGES[name].parameters if one != "relative angle"]
        if "angle" in CHANGES[name].parameters:
            own.append(p["relative angle"])
        noise = normal(n, VIEWS, 4, seed=n)
        sets.append((torch.cat([*own, noise], -1), noise, n))
    # view_parameters of both sets by the seed they were made with
    for parameter in CHANGES[name].parameters:
        y = [equivariance.view_parameters(name, n, SIZE, n)[parameter] for *_, n in sets]
        for which, expected in ((0, 1.0), (1, None)):
            (z, target), (test_z, test_target) = (
                (one[which], of_one) for one, of_one in zip(sets, y)
            )
            if parameter == "relative angle":
                z, target = equivariance.pairs_of_views(z, target)
                test_z, test_target = equivariance.pairs_of_views(test_z, test_target)
            is_binary = parameter in equivariance.BINARY
            measure = equivariance.accuracy if is_binary else equivariance.r_squared
            value, bootstrap = measure(z, target, test_z, test_target)
            assert len(bootstrap) == equivariance.BOOTSTRAPS
            chance = 0.5 if is_binary else 0.0
            assert value == pytest.approx(expected or chance, abs=0.08 if which else 0.01)


# --- rows, verdicts, the picture


@pytest.fixture(scope="module")
def measured():
    """The rows of an untrained and a split model."""
    torch.manual_seed(0)
    backbone = build_backbone("vit_nano", SIZE, 4).eval()
    models = [
        SimpleNamespace(row="untrained", backbone=backbone, d_ir=64),
        SimpleNamespace(row="clever", backbone=backbone, d_ir=51),
    ]
    train, val = shapes("train", SIZE, 120), shapes("val", SIZE, 100)
    return equivariance.equivariance_rows(models, train, val, SIZE, HERE)


def test_rows_compare_parts_of_one_width(measured):
    rows, shares = measured
    parts = {(row["row"], row["part"]): row["dims"] for row in rows}
    assert parts == {
        ("untrained", "full"): 64,
        ("untrained", "[-13:]"): 13,
        ("untrained", "[:13]"): 13,
        ("clever", "full"): 64,
        ("clever", "ir"): 51,
        ("clever", "ir[:d_ef]"): 13,
        ("clever", "ef"): 13,
    }
    by = {(row["row"], row["part"], row["metric"], row["test"]): row for row in rows}
    for metric in ("view share", "view share, whitened"):
        for change in CHANGES:
            same = [by[name, "full", metric, change]["value"] for name in ("untrained", "clever")]
            assert same[0] == same[1]
    told = {row["test"] for row in rows if row["metric"] in ("R2", "accuracy")}
    assert told == {one for change in CHANGES.values() for one in change.parameters}
    assert all(row["interval"][0] <= row["value"] <= row["interval"][1] + 0.5 for row in rows)
    assert set(shares) == set(parts)
    text = "\n".join(results.table_lines(rows))
    assert "view share, whitened" in text and "elastic" in text and "hue" in text


def test_the_verdict_names_the_part_that_keeps_more():
    high, low = ((share, share + 0.01 * normal(500, seed=1)) for share in (0.6, 0.2))
    shares = {("m", "ef"): [high, low], ("m", "ir[:d_ef]"): [low, low], ("m", "full"): [low, low]}
    [line] = equivariance.verdict(shares)
    assert "more than ir[:d_ef] (60.0 and 20.0 %); whitened, about" in line
    assert "about as much as ir[:d_ef] (20.0 and 20.0 %)" in line
    assert equivariance.verdict({("dino", "full"): [low, low]}) == []


def test_the_picture_is_drawn(measured, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "view_share.png"
    assert equivariance.draw(measured[0], path)
    assert path.stat().st_size > 10_000


def test_the_same_views_whatever_is_asked_beside_them():
    """A change alone, or fewer images: the features are the same."""
    torch.manual_seed(0)
    backbone = build_backbone("vit_nano", SIZE, 4).eval()
    images = shapes("val", SIZE, 40)
    given = dict(size=SIZE, here=HERE, workers=0, seed=0)
    everything = equivariance.view_features(backbone, images, changes=tuple(CHANGES), **given)
    alone = equivariance.view_features(backbone, images, changes=["crop"], **given)["crop"]
    torch.testing.assert_close(alone, everything["crop"], rtol=1e-4, atol=1e-5)
    fewer = subset(images, torch.arange(20))
    some = equivariance.view_features(backbone, fewer, changes=["crop"], **given)["crop"]
    torch.testing.assert_close(some, alone[:20], rtol=1e-4, atol=1e-5)
