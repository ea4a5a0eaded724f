"""TensorBoard and Weights & Biases get what log.jsonl gets; stand-ins take their place here."""

import errno
import os
import sys
from types import ModuleType

from lib import boards
from lib.config import UsageError
from lib.rundir import RunDir

import pytest
from conftest import HERE, tiny_config

import train


class Writer:
    """Stands for torch.utils.tensorboard.SummaryWriter and for a run of wandb."""

    def __init__(self, folder="", purge_step=None, **about):
        self.about = dict(folder=folder, purge_step=purge_step, **about)
        self.seen = []

    def add_scalar(self, name, number, step):
        self.seen.append((name, number, step))

    def flush(self):
        self.seen.append("flush")

    def define_metric(self, *names, **how):
        self.about["metric"] = names, how

    def log(self, numbers):
        self.seen.append(numbers)


@pytest.fixture
def writers(monkeypatch):
    """-> the writers that were opened."""
    opened = []

    def open_(*args, **about):
        opened.append(Writer(*args, **about))
        return opened[-1]

    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter, wandb.init = open_, open_
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return opened


def folder_of(tmp_path, step=0, **options):
    run = train.make_run(tiny_config(out_dir=str(tmp_path / "x"), **options), 5, HERE)
    if step:
        RunDir(run, 80).save(step)
    return RunDir.open(run, 80)


def test_each_gets_every_number(tmp_path, writers):
    folder = folder_of(tmp_path, tensorboard=True, wandb="clever")
    folder.log(step=1, epoch=0.2, loss=3.0)
    board, wandb = writers
    assert board.about == dict(folder=str(tmp_path / "x"), purge_step=1)
    assert board.seen == [("step", 1, 1), ("epoch", 0.2, 1), ("loss", 3.0, 1), "flush"]
    assert wandb.seen == [dict(step=1, epoch=0.2, loss=3.0)]
    assert wandb.about["project"] == "clever" and wandb.about["name"] == "x"
    assert wandb.about["metric"] == (("*",), dict(step_metric="step"))
    assert folder.records() == wandb.seen


def test_a_continued_run_goes_on_in_the_same_boards(tmp_path, writers):
    del folder_of(tmp_path, tensorboard=True, wandb="clever")._lock
    folder_of(tmp_path, step=4, tensorboard=True, wandb="clever")
    assert [w.about["purge_step"] for w in writers[::2]] == [1, 5]
    assert writers[1].about["id"] == writers[3].about["id"]
    folder_of(tmp_path / "other", wandb="clever")
    assert writers[4].about["id"] != writers[3].about["id"]


def test_off_by_default(tmp_path, writers):
    assert folder_of(tmp_path).boards == [] == writers


@pytest.mark.parametrize("options", [dict(tensorboard=True), dict(wandb="clever")])
def test_what_is_missing_is_told_before_anything_is_written(tmp_path, monkeypatch, options):
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"pip install {next(iter(options))}"):
        folder_of(tmp_path, **options)
    assert not (tmp_path / "x").exists()
    assert boards.import_boards(tiny_config()) == []


def test_a_board_on_a_full_disk_costs_its_line_only(tmp_path, capsys):
    def board(numbers):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = folder_of(tmp_path)
    folder.boards.append(board)
    folder.log(step=1, epoch=0.2, loss=3.0)
    assert folder.records() == [dict(step=1, epoch=0.2, loss=3.0)]
    assert "WARNING: step 1 is not in" in capsys.readouterr().out


def test_the_real_tensorboard_writes_a_file(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    folder_of(tmp_path, tensorboard=True).log(step=1, epoch=0.2, loss=3.0)
    assert list((tmp_path / "x").glob("events.out.tfevents.*"))
