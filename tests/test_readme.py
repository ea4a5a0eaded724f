"""The README keeps its word: quoted lines stand in the code, tables are those of results/."""

import ast
import json
import re
import shutil
import subprocess
import sys

from lib import config, sources
from lib.results import table_lines

import pytest
import torch
import torchvision
from conftest import ROOT

import eval_downstream
import eval_linear
import eval_seg

sys.path.insert(0, str(ROOT / "tools"))

import bench
import evidence
import gradients

README = (ROOT / "README.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
PAGES = {path.name: path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}


def test_quoted_lines_stand_in_the_code():
    quoted = re.findall(r"^\|.*\| `([\w/]+\.py)` \| `(.+)` \|$", README, re.M)
    assert len(quoted) >= 10
    for file, line in quoted:
        assert line in (ROOT / file).read_text(), (file, line)


SPEEDS = sorted((ROOT / "results").glob("bench*.json"))
PROBES = sorted(set((ROOT / "results").glob("*.json")) - set(SPEEDS))


@pytest.mark.parametrize("path", SPEEDS, ids=lambda path: path.stem)
def test_speed_tables_are_benchs(path):
    assert f"results/{path.name}" in PERFORMANCE
    for row in json.loads(path.read_text())["rows"]:
        assert bench.table_line(row) in PERFORMANCE, row["row"]


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_tables_are_the_results(path):
    assert f"results/{path.name}" in README
    for result in json.loads(path.read_text()):
        for line in table_lines(result["rows"]):
            assert line in README, line


def test_the_commands_are_those_of_ci():
    tests = re.search(r"^python3 -m venv .*pytest -q$", README, re.M).group()
    assert (
        tests.replace("pip install -r", "pip install -q -r") in (ROOT / ".ci" / "run").read_text()
    )
    assert "configs/demo.py" in README


def test_every_module_and_config_is_named():
    modules = [path for folder in (".", "lib", "tools") for path in (ROOT / folder).glob("*.py")]
    for path in modules:
        if path.name != "__init__.py":
            assert f"`{path.relative_to(ROOT)}`" in README, path.name


@pytest.mark.parametrize("page", PAGES)
def test_every_script_that_a_page_names_is_there(page):
    for name in re.findall(r"(?<![\w/$])[\w/]+\.py\b", PAGES[page]):
        assert (ROOT / name).exists() or (ROOT / "configs" / name).exists(), name


OPTIONS = {  # script -> its options
    "train.py": config.Config,
    "eval_linear.py": eval_linear.LinearConfig,
    "eval_downstream.py": eval_downstream.DownstreamConfig,
    "eval_seg.py": eval_seg.SegConfig,
    "tools/bench.py": bench.BenchConfig,
    "tools/evidence.py": evidence.EvidenceConfig,
    "tools/gradients.py": gradients.GradientsConfig,
}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_a_command_exists(page):
    text = PAGES[page].replace("\\\n", " ")
    new = set(re.findall(r"^\+    (\w+): \w+ = option\(", text, re.M))  # of the page's diffs
    commands = re.findall(r"(?:python|torchrun .*?) (\S+\.py)([^`\n;]*)", text)
    assert commands
    for file, options in commands:
        for name in re.findall(r"--(\w+)", options):
            assert name in {"help", *new, *OPTIONS[file].__dataclass_fields__}, (file, name)
    known = {name for cls in OPTIONS.values() for name in cls.__dataclass_fields__}
    # --key=value, torchrun's --max-restarts, docker's --ipc
    known |= {"help", "key", "nproc_per_node", "max", "ipc"}
    known |= new
    assert set(re.findall(r"[ `(\"]--([a-z_]+)\b", text)) <= known


DIFFS = re.findall(r"^```diff\n--- (\S+)\n(.*?)^```$", README, re.M | re.S)


def test_there_are_five_forks():
    files = {"losses.py", "train.py", "augment.py", "model.py", "lib/rundir.py"}
    assert {file for file, _ in DIFFS} == files and len(DIFFS) == 5


@pytest.mark.parametrize("file, diff", DIFFS, ids=[file for file, _ in DIFFS])
def test_the_forks_apply_and_are_short(file, diff):
    """What a diff keeps or removes stands in the file, once; what comes out is Python."""
    text = (ROOT / file).read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    ast.parse(text)
    assert sum(line.startswith(("+", "-")) for line in diff.splitlines()) <= 10


def test_the_sweeps_lines_print_the_collapse_table():
    """The README's own lines, run on the recorded logs, print the README's table."""
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
        images = sources.open_images(str(tmp_path / "TINYIN40"), split, "configs/tinyin40_seen.txt")
        assert len(images) == len(images.classes) == 30
        assert len(list((tmp_path / "TINYIN40" / split).iterdir())) == 40
