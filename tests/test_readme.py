"""The README keeps its word: quoted lines stand in the code, tables are those of results/."""
import json
import re
import subprocess
import sys

import pytest

import bench
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
    assert tests.replace("pip install -r", "pip install -q -r") in (ROOT / ".ci" / "run").read_text()
    assert "configs/demo.py" in README


def test_every_module_and_config_is_named():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README, path.name


def test_the_sweeps_lines_print_the_collapse_table():
    """The README's own lines, run on the kept logs, print the README's table."""
    script = re.search(r"^python - out/ratio/\* <<'EOF'\n(.*?)^EOF$", README, re.M | re.S).group(1)
    folders = [f"results/collapse/{name}" for name in ("ddcl", "ddcl_preg", "clever_lam0", "clever")]
    done = subprocess.run([sys.executable, "-", *folders], input=script, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 2 * len(folders) and len(script.splitlines()) <= 10
    for line in lines:
        assert line in README, line
