"""bench.py refuses to time two sides that do not compute the same."""
import pytest
import torch

import bench
from configurator import UsageError


def test_sides_that_differ_are_refused():
    bench.must_agree("x", 1.0005, 1.0, 1e-3)
    with pytest.raises(UsageError, match="would mean nothing"):
        bench.must_agree("x", 1.01, 1.0, 1e-3)
    with pytest.raises(UsageError):
        bench.must_agree("x", float("nan"), 1.0, 1e-3)


def test_a_rows_two_sides_run_and_agree():
    for make, images in ((lambda: bench.loss_row(torch.device("cpu"), batch=2, K=128), 2), (lambda: bench.photo_row(1000, 1200), 1),
                         (lambda: bench.step_row(torch.device("cpu"), "vit_micro", 8, 32, 16, 4, 64), 4)):
        row = make()
        row.check()
        row.ours(), row.textbook()
        assert row.images == images and (images == 1 or bench.count_flops(row.ours) > 1e5)
