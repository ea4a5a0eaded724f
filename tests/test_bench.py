"""bench.py refuses to time two sides that do not compute the same."""

import json

import pytest
import torch

import bench
from configurator import UsageError
from conftest import ROOT


def test_sides_that_differ_are_refused():
    bench.must_agree("x", 1.0005, 1.0, 1e-3)
    with pytest.raises(UsageError, match="would mean nothing"):
        bench.must_agree("x", 1.01, 1.0, 1e-3)
    with pytest.raises(UsageError):
        bench.must_agree("x", float("nan"), 1.0, 1e-3)


def test_a_rows_two_sides_run_and_agree():
    for make, images in (
        (lambda: bench.loss_row(torch.device("cpu"), batch=2, K=128), 2),
        (lambda: bench.photo_row(1000, 1200), 1),
        (lambda: bench.step_row(torch.device("cpu"), "vit_micro", 8, 32, 16, 4, 64), 4),
    ):
        row = make()
        row.check()
        row.ours(), row.textbook()
        assert row.images == images and (images == 1 or bench.count_flops(row.ours) > 1e5)


def test_a_profile_shares_out_a_rows_time(capsys):
    bench.main(["--profile=True", "--rows=label propagation", "--device=cpu"])
    title, *lines = capsys.readouterr().out.splitlines()
    shares = [float(line.split("%")[0]) for line in lines]
    assert (
        title.startswith("label propagation")
        and shares == sorted(shares, reverse=True)
        and 50 < sum(shares) <= 100.5
    )


def test_recorded_rows_are_rows():
    """A row of the README's tables that has been renamed or removed could not be repeated."""
    on_a_gpu = bench.rows(torch.device("cuda"), "")  # nothing is built yet
    known = bench.rows(torch.device("cpu"), "").keys() | on_a_gpu.keys()
    for path in (ROOT / "results").glob("bench*.json"):
        for row in json.loads(path.read_text())["rows"]:
            assert (
                row["row"] in known
                or path.name == "bench.json"
                and row["row"].startswith("loss over 10 views")
            ), row["row"]  # an earlier version's
    assert {
        "JPEG to weights, vit_small/16, CAug, batch 128",
        "step vit_small/16, CAug+, compiled blocks or not",
    } <= on_a_gpu.keys()


@pytest.mark.parametrize(
    "knob, message",
    [
        ("--rows=nothing", "there is no such row"),
        ("--data=/nowhere", "no such folder"),
        ("--json=/nowhere/x.json", "does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_is_timed(knob, message):
    with pytest.raises(UsageError, match=message):
        bench.main([knob, "--device=cpu"])
