"""plot.py draws the logs of runs."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from lib import curves
from lib.config import UsageError

import plot

RUNS = [str(ROOT / "results" / "collapse" / name) for name in ("clever", "ddcl")]


def test_a_panel_shows_the_parts_of_one_quantity():
    assert curves.panel_and_part("knn_rotated_ef") == ("knn_rotated", "ef")
    assert curves.panel_and_part("rank_proj_ir") == ("rank_proj", "ir")
    assert curves.panel_and_part("data_wait") == ("data_wait", "full")
    assert curves.panel_and_part("L_CL") == ("L_CL", "full")


def test_curves_are_drawn_into_the_first_runs_folder(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib draws the curves, and is not here")
    from PIL import Image

    lines = (ROOT / "results" / "collapse" / "ddcl" / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(lines + '{"step": 2, "lo')  # a crash cut it short
    plot.main([str(tmp_path), *RUNS])
    assert capsys.readouterr().out.strip() == str(tmp_path / "compared.png")
    assert min(Image.open(tmp_path / "compared.png").size) > 500


def test_what_is_missing_is_told_in_a_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="OUT_DIR"):
        plot.main([])
    with pytest.raises(UsageError, match=r"log\.jsonl: No such file.*; give the out_dir"):
        plot.main([str(tmp_path)])
    (tmp_path / "log.jsonl").write_text("text\n")
    with pytest.raises(UsageError, match="not a log"):
        plot.main([str(tmp_path)])
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(step=0, epoch=0.0, lr=0.1)) + "\n")
    with pytest.raises(UsageError, match="nothing to draw"):
        plot.main([str(tmp_path)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        plot.main(RUNS)
