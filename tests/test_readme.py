"""The README and the pages of docs/ keep their word: tables, quoted lines, commands, links."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict
from xml.etree import ElementTree

from lib import config, sources
from lib.results import table_lines

import pytest
import torch
import torchvision
from conftest import ROOT
from test_fork import apply

import eval_downstream
import eval_linear
import eval_seg
from model import build_network

sys.path.insert(0, str(ROOT / "tools"))

import bench
import evidence
import gradients

PAGES = {path.name: path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
README, USAGE, CODE = (PAGES[name] for name in ("README.md", "usage.md", "code.md"))
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S))  # the last of each kind


# --- what is easy to read


DEMO = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt "
    "&& .venv/bin/python train.py configs/demo.py"
)
TESTS = DEMO.replace("train.py configs/demo.py", "-m pytest -q")


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert len(README.encode()) <= 14 * 1024
    assert len(re.findall(r"^\|---", README, re.M)) <= 3  # tables
    for line in lines:
        is_free = line.startswith("|") or "](http" in line or line == DEMO
        assert is_free or len(line) <= 100, line


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_its_title_and_says_what_it_is_for(page):
    title, blank, first, *_ = PAGES[page].splitlines()
    assert title.startswith("# ") and not blank
    assert re.match(r"[A-Z`\[]", first), first


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = PAGES[page]
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (folder / link).exists(), link
    for name in re.findall(r"`(docs/[\w.]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_picture_of_the_method_is_well_formed():
    """It is edited by hand, and a browser shows nothing of a broken one."""
    assert ElementTree.parse(ROOT / "docs" / "method.svg").getroot().tag.endswith("}svg")


# --- tables and quoted lines


@pytest.mark.parametrize("page, least", [("README.md", 10), ("code.md", 17)])
def test_quoted_lines_stand_in_the_code(page, least):
    quoted = re.findall(r"^\|.*\| `([\w/]+\.py)` \| `(.+)` \|$", PAGES[page], re.M)
    assert len(quoted) >= least
    for file, line in quoted:
        assert line in (ROOT / file).read_text(), (file, line)


SPEEDS = sorted((ROOT / "results").glob("bench*.json"))
PROBES = sorted(set((ROOT / "results").glob("*.json")) - set(SPEEDS))


@pytest.mark.parametrize("path", SPEEDS, ids=lambda path: path.stem)
def test_speed_tables_are_benchs(path):
    assert f"results/{path.name}" in PAGES["performance.md"]
    for row in json.loads(path.read_text())["rows"]:
        assert bench.table_line(row) in PAGES["performance.md"], row["row"]


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_tables_are_the_results(path):
    """A page names the file and has all of its tables."""
    pages = [text for text in PAGES.values() if has_tables_of(path, text)]
    assert any(f"results/{path.name}" in page for page in pages)


def has_tables_of(path, text):
    lines = [
        line for result in json.loads(path.read_text()) for line in table_lines(result["rows"])
    ]
    return all(line in text.splitlines() for line in lines)


def test_the_readmes_table_is_the_demos():
    [result] = json.loads((ROOT / "results" / "demo.json").read_text())
    generated = list(table_lines(result["rows"]))
    table = re.search(r"^\| in % .*?\n\n", README, re.M | re.S).group().splitlines()[:-1]
    assert table[0] == generated[0] and len(table) >= 6
    for line in table:
        assert line in generated, line


def test_every_module_is_named():
    modules = [path for folder in (".", "lib", "tools") for path in (ROOT / folder).glob("*.py")]
    for path in modules:
        if path.name != "__init__.py":
            assert f"| `{path.relative_to(ROOT)}` |" in CODE, path.name


@pytest.mark.parametrize("page", PAGES)
def test_every_script_that_a_page_names_is_there(page):
    for name in re.findall(r"(?<![\w/$])[\w/]+\.py\b", PAGES[page]):
        assert (ROOT / name).exists() or (ROOT / "configs" / name).exists(), name


# --- commands

# a command of the README -> the test that runs its script on the same task, on small data
DOWNSTREAM = "test_eval.py::test_downstream_tasks_run_end_to_end"
EVAL = "python eval_linear.py --ckpt=CKPT --compare=DINO_CKPT --data=DATA"
TASK = "python eval_downstream.py --ckpt=CKPT --task="
DAVIS = "test_seg.py::test_davis_from_its_folders"
SEG = "python eval_seg.py --ckpt=CKPT"
DDCL = "python train.py configs/demo.py --method=ddcl --local_crops=0 --lambda_preg=0"
ROBUSTNESS = "test_one_command_prints_the_robustness_table_and_repeats_exactly"
TESTED = {
    DEMO: "test_train.py::test_it_learns",
    TESTS: "test_readme.py::test_the_commands_are_those_of_ci",
    f"{EVAL} --seeds=5": f"test_eval.py::{ROBUSTNESS}",
    f"{EVAL} --protocol=fast": "test_eval.py::test_two_processes_are_one",
    f"{EVAL} --protocol=ridge": "test_features.py::test_command_line_compares_two_runs",
    f"{TASK}semi1 --data=DATA": DOWNSTREAM,
    f"{TASK}cub200 --data=CUB_200_2011": DOWNSTREAM,
    f"{TASK}folder --data=DATA --mode=linear": DOWNSTREAM,
    f"{TASK}rotation_invariance --data=DATA": DOWNSTREAM,
    f"{TASK}rotation_sensitivity --data=DATA": "test_eval.py::test_two_processes_are_one",
    f"{SEG} --compare=DINO_CKPT --task=davis --data=DAVIS": DAVIS,
    f"{SEG} --task=saliency --data=ECSSD": "test_seg.py::test_saliency_from_folders",
    f"{SEG} --image=photo.jpg --size=480": "test_seg.py::test_one_picture_and_the_built_in_ones",
    f"{DDCL} --out_dir=out/ddcl": "test_train.py::test_two_processes_are_one",
}
# those that no test can run -> (the reason, what is tested instead)
UNTESTED = {
    command: (reason, instead)
    for command, reason, instead in re.findall(
        r"^\| `(.+?)` \| (.+?) \| (.+) \|$", USAGE.split("## What CI cannot run")[1], re.M
    )
}


def commands_of(text):
    """Return the commands of the sh blocks of a page, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def unaccounted(text):
    return [command for command in commands_of(text) if command not in {*TESTED, *UNTESTED}]


def test_every_command_is_run_by_a_test_or_says_why_not():
    commands = commands_of(README)
    assert not unaccounted(README)
    assert not {*TESTED, *UNTESTED} - set(commands)  # no entry outlives its command
    assert not TESTED.keys() & UNTESTED.keys()
    new = "python train.py configs/demo.py --ratio=0.5"
    assert unaccounted(f"{README}\n```sh\n# new\n{new}\n```\n") == [new]


def names_of_tests(file):
    return re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.M)


@pytest.mark.parametrize("command", TESTED)
def test_the_test_of_a_command_exists(command):
    file, name = TESTED[command].split("::")
    assert name in names_of_tests(file)
    script = re.search(r"(\w+)\.py|pytest", command).group(1) or "pytest"
    assert script in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("command", UNTESTED)
def test_what_is_tested_instead_exists(command):
    known = {name for path in ROOT.glob("tests/test_*.py") for name in names_of_tests(path.name)}
    named = re.findall(r"`(test_\w+)`", UNTESTED[command][1])
    assert named and set(named) <= known


def test_the_commands_are_those_of_ci():
    in_ci = TESTS.replace("pip install -r", "pip install -q -r")
    ci = (ROOT / ".ci" / "run").read_text()
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert in_ci in ci
    [ruff] = set(re.findall(r"ruff==[\d.]+", ci))
    for command in (ruff, "ruff check .", "ruff format --check .", "-m pytest -q"):
        assert command in ci and command in workflow, command


def test_the_five_lines_of_the_hub_run(tmp_path, monkeypatch, capsys):
    """With weights of the demo's config instead of a trained run's."""
    monkeypatch.chdir(ROOT)
    demo = config.configure(config.Config, ["configs/demo.py"])
    student = build_network(demo).state_dict()
    run = dict(config=asdict(demo), student=student, teacher=student)
    torch.save(run, tmp_path / "ckpt.pt")
    assert len(BLOCKS["python"].split("\n\n")[1].splitlines()) <= 4
    found = {}
    exec(BLOCKS["python"].replace("out/demo", str(tmp_path)), found)
    shapes = [tuple(found[name].shape) for name in ("z_ir", "z_ef")]
    assert f"# {shapes[0]}, {shapes[1]}\n" in BLOCKS["python"]


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
    assert commands or page != "README.md"
    for file, options in commands:
        for name in re.findall(r"--(\w+)", options):
            assert name in {"help", *new, *OPTIONS[file].__dataclass_fields__}, (file, name)
    known = {name for cls in OPTIONS.values() for name in cls.__dataclass_fields__}
    # --key=value, torchrun's --max-restarts, docker's --ipc
    known |= {"help", "key", "nproc_per_node", "max", "ipc"}
    known |= {"config", *new}  # --config=FILE
    assert set(re.findall(r"[ `(\"]--([a-z_]+)\b", text)) <= known


# --- forks


DIFFS = re.findall(r"^```diff\n--- (\S+)\n(.*?)^```$", README, re.M | re.S)


def test_there_are_four_forks():
    files = {"losses.py", "train.py", "augment.py", "model.py"}
    assert {file for file, _ in DIFFS} == files and len(DIFFS) == 4


@pytest.mark.parametrize("file, diff", DIFFS, ids=[file for file, _ in DIFFS])
def test_the_forks_stand_in_their_page(file, diff):
    """A test applies and trains what docs/fork.md shows; the README shows its first places."""
    assert f"```diff\n--- {file}\n{diff}" in (ROOT / "docs" / "fork.md").read_text()


@pytest.mark.parametrize("file, diff", DIFFS, ids=[file for file, _ in DIFFS])
def test_the_forks_apply_and_are_short(file, diff):
    """What a diff keeps or removes stands in the file, once; what comes out is Python."""
    text = apply(diff, (ROOT / file).read_text())
    ast.parse(text)
    assert sum(line.startswith(("+", "-")) for line in diff.splitlines()) <= 10


# --- scripts within a page


def test_the_sweeps_lines_print_the_collapse_table():
    """The page's own lines, run on the recorded logs, print the page's table."""
    page = PAGES["ablations.md"]
    script = re.search(r"^python - out/ratio/\* <<'EOF'\n(.*?)^EOF$", page, re.M | re.S).group(1)
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
        assert line in page, line


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
    lines = r"python - tiny-imagenet-200 TINYIN40 <<'EOF'\n(.*?)EOF\n"
    [script] = re.findall(lines, PAGES["data.md"], re.S)
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


# --- what other programs read


def test_the_citation_is_the_papers():
    cff = (ROOT / "CITATION.cff").read_text()
    keys = re.findall(r"^([\w-]+):", cff, re.M)
    assert {"cff-version", "message", "title", "authors", "license", "preferred-citation"} <= {
        *keys
    }
    license_name = re.search(r"^license: (\w+)$", cff, re.M).group(1)
    assert (ROOT / "LICENSE").read_text().startswith(f"{license_name} License")
    bibtex = re.sub(r"\s+", " ", BLOCKS["bibtex"])
    authors = re.search(r"author = \{(.*?)\}", bibtex).group(1).split(" and ")
    family, given = (re.findall(rf"{key}-names: (.+)", cff) for key in ("family", "given"))
    assert [f"{a}, {b}" for a, b in zip(family, given)] == authors
    for words in (re.search(r"title = \{(.*?)\}", bibtex).group(1), "arXiv:2406.00262"):
        assert words in cff and words in bibtex


def test_pyproject_names_the_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert project["requires-python"] == ">=3.11"
