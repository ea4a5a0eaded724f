"""The README keeps its word: quoted lines stand in the code, tables are those of results/."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision

import bench
import data
import probe
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_quoted_lines_stand_in_the_code():
    quoted = re.findall(r"^\|.*\| `(\w+\.py)` \| `(.+)` \|$", README, re.M)
    assert len(quoted) >= 10
    for file, line in quoted:
        assert line in (ROOT / file).read_text(), (file, line)


SPEEDS = sorted((ROOT / "results").glob("bench*.json"))
PROBES = sorted(set((ROOT / "results").glob("*.json")) - set(SPEEDS))


@pytest.mark.parametrize("path", SPEEDS, ids=lambda path: path.stem)
def test_speed_tables_are_benchs(path):
    assert f"results/{path.name}" in README
    for row in json.loads(path.read_text())["rows"]:
        assert bench.table_line(row) in README, row["row"]


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_tables_are_the_results(path):
    assert f"results/{path.name}" in README
    for result in json.loads(path.read_text()):
        for line in probe.table_lines(result["rows"]):
            assert line in README, line


def test_the_commands_are_those_of_ci():
    tests = re.search(r"^python3 -m venv .*pytest -q$", README, re.M).group()
    assert (
        tests.replace("pip install -r", "pip install -q -r") in (ROOT / ".ci" / "run").read_text()
    )
    assert "configs/demo.py" in README


def test_every_module_and_config_is_named():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README, path.name


def test_the_sweeps_lines_print_the_collapse_table():
    """The README's own lines, run on the kept logs, print the README's table."""
    script = re.search(r"^python - out/ratio/\* <<'EOF'\n(.*?)^EOF$", README, re.M | re.S).group(1)
    folders = [
        f"results/collapse/{name}" for name in ("ddcl", "ddcl_preg", "clever_lam0", "clever")
    ]
    done = subprocess.run(
        [sys.executable, "-", *folders],
        input=script,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 2 * len(folders) and len(script.splitlines()) <= 10
    for line in lines:
        assert line in README, line


def test_the_lines_that_sort_tiny_imagenet_make_the_folder_that_the_commands_read(tmp_path):
    source = tmp_path / "tiny-imagenet-200"
    classes = [
        line.split()[0] for line in (ROOT / "configs/tinyin40_classes.txt").read_text().splitlines()
    ]
    (source / "val/images").mkdir(parents=True)
    notes = []
    for i, name in enumerate([*classes, "n99999999"]):
        folder = source / "train" / name / "images"
        folder.mkdir(parents=True)
        torchvision.io.write_jpeg(
            torch.zeros(3, 8, 8, dtype=torch.uint8), str(folder / f"{name}_0.JPEG")
        )
        shutil.copy(folder / f"{name}_0.JPEG", source / f"val/images/val_{i}.JPEG")
        notes.append(f"val_{i}.JPEG\t{name}\t0\t0\t7\t7\n")
    (source / "val/val_annotations.txt").write_text("".join(notes))
    [script] = re.findall(r"python - tiny-imagenet-200 TINYIN40 <<'EOF'\n(.*?)EOF\n", README, re.S)
    subprocess.run(
        [sys.executable, "-", source, tmp_path / "TINYIN40"],
        input=script,
        text=True,
        cwd=ROOT,
        check=True,
    )
    for split in ("train", "val"):
        images = data.open_images(str(tmp_path / "TINYIN40"), split, "configs/tinyin40_seen.txt")
        assert len(images) == len(images.classes) == 30
        assert len(list((tmp_path / "TINYIN40" / split).iterdir())) == 40
