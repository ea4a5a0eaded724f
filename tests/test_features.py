"""The judges against textbook forms, and the probe's command line."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import probe
from augment import PERTURBATIONS
from conftest import ROOT, arguments, run_script
from model import build_backbone

CPU = torch.device("cpu")


def test_knn_is_the_weighted_vote():
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = (torch.randn(n, 6, generator=generator) for n in (60, 40))
    train_y, test_y = (torch.randint(0, 4, (n,), generator=generator) for n in (60, 40))
    right = 0
    for x, y in zip(test_x, test_y):
        similarity = F.cosine_similarity(train_x, x[None])
        nearest = similarity.argsort(descending=True)[:20]
        votes = [
            sum(torch.exp(similarity[n] / 0.07).item() for n in nearest if train_y[n] == c)
            for c in range(4)
        ]
        right += votes.index(max(votes)) == y.item()
    assert probe.knn_accuracy(train_x, train_y, test_x, test_y) == pytest.approx(100 * right / 40)


def test_ridge_separates_what_is_linear_and_only_that():
    generator = torch.Generator().manual_seed(0)
    x, noise = (
        torch.randn(2000, 12, generator=generator),
        torch.randn(2000, 12, generator=generator),
    )
    y = (x @ torch.randn(12, 3, generator=generator)).argmax(1)
    [linear, shifted] = probe.ridge_accuracies(
        x[:1500] * 50 + 7,
        y[:1500],
        [(x[1500:] * 50 + 7, y[1500:]), (x[1500:] * 50 + 107, y[1500:])],
    )
    [chance] = probe.ridge_accuracies(noise[:1500], y[:1500], [(noise[1500:], y[1500:])])
    assert linear > 85 and shifted < linear and chance < 50


def test_ridge_weights_solve_the_normal_equations():
    """One penalty only is possible when the held-out slice is told apart by each equally; compare the prediction with the closed form."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 5, generator=generator).double()
    y = (x[:, 0] > 0).long()
    z = torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-6), torch.ones(300, 1).double()], 1)
    closed = torch.linalg.solve(
        z.T @ z / 300 + 1e-6 * torch.eye(6).double(), z.T @ F.one_hot(y).double() / 300
    )
    expected = 100 * ((z @ closed).argmax(1) == y).double().mean().item()
    [got] = probe.ridge_accuracies(x, y, [(x, y)])
    assert got == pytest.approx(expected, abs=1.0)


def test_spread_knows_collapse_from_health():
    generator = torch.Generator().manual_seed(0)
    std, rank = probe.spread(torch.randn(5000, 16, generator=generator))
    assert std == pytest.approx(1, abs=0.02) and rank == pytest.approx(16, abs=0.2)
    std, rank = probe.spread(torch.ones(100, 16) + 1e-4 * torch.randn(100, 16, generator=generator))
    assert std < 1e-3
    line = torch.randn(1000, 1, generator=generator) * torch.randn(1, 16, generator=generator)
    assert probe.spread(line)[1] == pytest.approx(1, abs=1e-3)
    assert probe.spread(torch.randn(100, 1))[1] == pytest.approx(1)


def test_features_are_the_backbones_in_order_and_fp32_outside_autocast(folder):
    images = data.open_images(str(folder), "val")
    backbone = build_backbone("vit_micro", 32, 8).train()
    seen = []

    def watch(batch, keys):
        seen.append(torch.is_autocast_enabled("cpu"))
        return probe.perturbed("ro")(batch, keys)

    _, autocast = probe.choose_precision("bf16", CPU)
    (z, turned, rotated), labels = probe.features(
        backbone,
        images,
        [probe.perturbed("orig"), probe.quarter_turn(1), watch],
        32,
        CPU,
        autocast,
        batch_size=7,
    )
    assert not any(seen) and backbone.training and torch.equal(labels, images.labels)
    pixels = torch.stack([images.read(i) for i in range(len(images))])
    exact = backbone.eval()(
        probe.perturbed("orig")(pixels, torch.zeros(len(images), dtype=torch.int64))
    )
    torch.testing.assert_close(z, exact, rtol=0.05, atol=0.05)
    assert not torch.allclose(turned, z, atol=0.1)
    (again,), _ = probe.features(
        backbone, images, [probe.perturbed("ro")], 32, CPU, autocast, batch_size=11
    )
    torch.testing.assert_close(
        again, rotated, rtol=0.05, atol=0.05
    )  # drawn per image, whatever the batch


def test_parts_are_the_split():
    z = torch.randn(4, 10)
    named = probe.parts(z, 0.8)
    assert (
        list(named) == ["full", "ir", "ef"]
        and torch.equal(torch.cat([named["ir"], named["ef"]], 1), z)
        and list(probe.parts(z, 1)) == ["full"]
    )


def test_perturbations_are_what_method_md_says():
    assert (
        PERTURBATIONS["cj"].jitter == 1
        and PERTURBATIONS["cj"].jitter_strength == (0.4, 0.4, 0.4, 0.1)
        and PERTURBATIONS["cj"].rotate == 0
    )
    assert (
        PERTURBATIONS["cj+ro"].rotate == 90
        and PERTURBATIONS["cj+ro+et"].elastic == 1
        and PERTURBATIONS["cj+flip"].flip == 1
    )
    assert PERTURBATIONS["orig"] == type(PERTURBATIONS["orig"])()


def test_command_line_compares_two_runs(folder, tmp_path):
    for method in ("clever", "dino"):
        run_script(
            "train.py",
            *arguments(
                data=folder, out_dir=tmp_path / method, method=method, epochs=1, warmup_epochs=0
            ),
        )
    clever, dino = (tmp_path / name / "ckpt.pt" for name in ("clever", "dino"))
    done = run_script(
        "probe.py", f"--ckpt={clever}", f"--compare={dino}", "--workers=0", "--precision=fp32"
    )  # on what it was trained on
    [result] = json.loads((tmp_path / "clever" / "results.json").read_text())
    assert {row["row"] for row in result["rows"]} == {"untrained", "clever", "dino", "chance"}
    assert {(row["part"], row["dims"]) for row in result["rows"] if row["row"] == "clever"} == {
        ("full", 128),
        ("ir", 102),
        ("ir", 26),
        ("ef", 26),
    }
    assert (
        all(line in done.stdout for line in probe.table_lines(result["rows"]))
        and result["task"] == "probe"
    )
    run_script(
        "probe.py",
        f"--ckpt={clever}",
        f"--compare={tmp_path / 'clever' / 'backbone.pt'}",
        f"--data={folder}",
        "--workers=0",
    )
    assert (
        len(json.loads((tmp_path / "clever" / "results.json").read_text())) == 2
    )  # appended, and a bare backbone has only 'full'
    for wrong, message in (
        (["--ckpt=/nowhere.pt"], "No such file"),
        ([f"--ckpt={clever}", f"--data={folder / 'train' / 'key'}"], "needs labels"),
        ([f"--ckpt={clever}", "--out=/nowhere"], "no such folder"),
        ([f"--ckpt={clever}", "--precision=half"], "choose from"),
        ([], "no checkpoint given"),
    ):
        done = run_script("probe.py", *wrong, check=False)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_process_group_outlives_the_script(tmp_path):
    """Destroyed before DistributedDataParallel is gone, it could wait for ever for a thread that waits for Python's lock (probe.wait_for_ranks)."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        probe.wait_for_ranks()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    assert not [
        path.name for path in ROOT.glob("*.py") if "destroy_process_group" in path.read_text()
    ]
