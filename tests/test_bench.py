"""bench.py refuses to time two sides that do not compute the same."""

import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from lib.config import UsageError

import bench

CPU = torch.device("cpu")


def test_sides_that_differ_are_refused():
    bench.must_agree(1.0005, 1.0, 1e-3)
    bench.must_agree((torch.ones(2, 3), 2), (torch.ones(2, 3), 2.0), 1e-3)
    with pytest.raises(UsageError, match="results must agree"):
        bench.must_agree(1.01, 1.0, 1e-3)
    with pytest.raises(UsageError, match="results must agree"):
        bench.must_agree(torch.tensor([1.0, 2]), torch.tensor([2.0, 1]), 1e-3)
    with pytest.raises(UsageError):
        bench.must_agree(float("nan"), 1.0, 1e-3)
    with pytest.raises(ValueError):
        bench.must_agree([1.0], [1.0, 2.0], 1e-3)


SMALL_ROWS = {
    "step": (lambda: bench.step_row(CPU, bench.Size("vit_micro", 8, 32, 16, 64), 4), 4),
    "loss": (lambda: bench.loss_row(CPU, n=2, K=128), 2),
    "photo": (lambda: bench.photo_row(1000, 1200), 1),
    "views": (lambda: bench.views_row("caug+", n=1), 1),
    "end to end": (lambda: bench.end_to_end_row(CPU, "", "vit_micro", "baug", 1), 8),
    "scan": (lambda: bench.scan_row(CPU, 1, 8, 64), 1),
    "features": (lambda: bench.features_row(CPU, n=16), 16),
    "labels": (lambda: bench.labels_row(CPU, 10, 12), 1),
    "linear": (lambda: bench.linear_row(CPU, n=64, n_test=4), 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("make, images", SMALL_ROWS.values(), ids=SMALL_ROWS)
def test_a_rows_two_sides_run_and_agree(make, images):
    row = make()
    row.check()
    assert row.images == images
    if row.flops:
        row.reference()
        assert bench.count_flops(row.ours) > 1e5


@pytest.mark.slow
def test_a_row_is_timed_on_both_sides():
    config = bench.BenchConfig(repeats=1)
    name = "label propagation, 30x52 patches of 8 frames"
    assert name in bench.rows(CPU, "")
    row = bench.measure(name, SMALL_ROWS["labels"][0], CPU, config, dict(flops=1e12, bytes=1e10))
    assert row["ratio"] == pytest.approx(row["ours"] / row["reference"])
    assert row["ours_quartiles"] == [row["ours"]] * 2
    assert bench.table_line(row).count("|") == 7


@pytest.mark.slow
def test_a_profile_shares_out_a_rows_time(capsys):
    bench.main(["--profile=True", "--rows=label propagation", "--device=cpu"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "label propagation, 30x52 patches of 8 frames: our side"
    head, line, *_ = [line for line in lines if "-----" not in line and line.strip()]
    assert "Self CPU %" in head and "aten::" in line


def test_recorded_rows_are_rows():
    """A row of docs/performance.md that has been renamed or removed could not be repeated."""
    on_a_gpu = bench.rows(torch.device("cuda"), "")  # nothing is built yet
    known = bench.rows(CPU, "").keys() | on_a_gpu.keys()
    for path in (ROOT / "results").glob("bench*.json"):
        for row in json.loads(path.read_text())["rows"]:
            is_earlier = row["row"].startswith("loss over 10 views")  # an earlier version's
            assert row["row"] in known or (path.name == "bench.json" and is_earlier), row["row"]
            assert bench.table_line(row).startswith(f"| {row['row']}")
    assert "JPEG to weights, vit_small/16, CAug, batch 128" in on_a_gpu
    assert "step vit_small/16, CAug+, compiled blocks or not" in on_a_gpu


@pytest.mark.parametrize(
    "option, message",
    [
        ("--rows=nothing", "no such row"),
        ("--data=/nowhere", "no such folder"),
        ("--json=/nowhere/x.json", "does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_is_timed(option, message):
    with pytest.raises(UsageError, match=message):
        bench.main([option, "--device=cpu"])
