"""docs/fork.md keeps its word: each recipe is applied to a copy of the tree, trained and checked.

What a recipe claims is checked in the copy, by fork_checks.py.
python tests/test_fork.py "A pair term" applies a recipe to this tree.
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

PAGE = (ROOT / "docs" / "fork.md").read_text()
DIFF = re.compile(r"^```diff\n--- (\S+)\n(.*?)^```$", re.M | re.S)
RECIPES = {  # heading -> its text, for those that have a diff
    title: text
    for title, text in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    if DIFF.search(text)
}
ON_TOP_OF = {"Drop path for the backbone": "A backbone"}
recipes = pytest.mark.parametrize("title", RECIPES)


def check_of(title):
    return title.lower().replace(" ", "_")


def apply(diff, text):
    """Return the text with the diff applied: what it keeps or removes stands there once."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def copy_tree(tree):
    """Copy what a run needs, compiled modules too: they are valid as long as a file is as old."""
    for pattern in ("*.py", "configs/*.py", "pyproject.toml"):
        for path in ROOT.glob(pattern):
            (tree / path.relative_to(ROOT)).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy2(path, tree / path.relative_to(ROOT))
    for folder in ("lib", "__pycache__"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tree / folder)
    shutil.copy2(ROOT / "tests" / "fork_checks.py", tree)


def apply_recipe(title, tree):
    """Apply a recipe's diffs -> the changed files."""
    diffs = DIFF.findall(RECIPES[title])
    for file, diff in diffs:
        path = tree / file
        path.write_text(apply(diff, path.read_text()))
    return [file for file, _ in diffs]


def fork(title, tree):
    """Copy the tree, apply a recipe and before it the one that it needs -> the changed files."""
    copy_tree(tree)
    if title in ON_TOP_OF:
        apply_recipe(ON_TOP_OF[title], tree)
    return apply_recipe(title, tree)


def test_every_recipe_has_a_check_and_a_command():
    checks = ast.parse((ROOT / "tests" / "fork_checks.py").read_text()).body
    names = {node.name for node in checks if isinstance(node, ast.FunctionDef)}
    assert len(RECIPES) >= 12 and set(ON_TOP_OF) < set(RECIPES)
    for title, text in RECIPES.items():
        assert check_of(title) in names, title
        assert f"(#{title.lower().replace(' ', '-')})" in PAGE, f"{title}: not in the page's table"
        assert "Check: " in text and len(re.findall(r"^python ", text, re.M)) == 1, title


@recipes
def test_a_recipe_is_short(title):
    diffs = DIFF.findall(RECIPES[title])
    assert 1 <= len(diffs) <= 2
    for file, diff in diffs:
        changed = [line for line in diff.splitlines() if line.startswith(("+", "-"))]
        assert len(changed) <= 10, f"{file}: {len(changed)} changed lines"


@recipes
def test_a_recipe_applies_and_is_clean(title, tmp_path):
    """What comes out is Python, and ruff has nothing to say."""
    files = fork(title, tmp_path)
    for file in files:
        ast.parse((tmp_path / file).read_text())
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *command, *files], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def plain_run(folder, tmp_path_factory):
    """Train the unchanged tree, as fork_checks.py trains the others."""
    tree = tmp_path_factory.mktemp("plain") / "tree"
    copy_tree(tree)
    run_script(
        tree / "fork_checks.py", "unchanged", folder, tree.parent, "train.py configs/demo.py"
    )
    return tree.parent / "run"


@pytest.mark.slow
@recipes
def test_a_recipe_does_what_the_page_says(title, folder, plain_run, tmp_path):
    """Its command, shortened to a few steps, and its check, in a process of its own."""
    tree = tmp_path / "tree"
    fork(title, tree)
    [command] = re.findall(r"^python (.*)$", RECIPES[title], re.M)
    name = check_of(title)
    done = run_script(tree / "fork_checks.py", name, folder, tmp_path, command, plain_run)
    assert f"{name}: checked" in done.stdout
    shutil.rmtree(tmp_path)  # a checkpoint of ConvNeXt has half a gigabyte


if __name__ == "__main__":
    for heading in sys.argv[1:]:
        print(heading, "changed", *apply_recipe(heading, ROOT))
