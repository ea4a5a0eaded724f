"""What must be settled before torch is loaded: how OpenMP's threads wait."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ["train.py", "eval_linear.py", "eval_downstream.py", "eval_seg.py"]


@pytest.mark.parametrize("file", [*SCRIPTS, "hubconf.py", "model.py", "augment.py", "vmamba.py"])
def test_lib_is_imported_before_torch(file):
    imports = []
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            imports.append(node.module)
    packages = [name.split(".")[0] for name in imports]
    first = next(name for name in packages if name not in sys.stdlib_module_names)
    assert first == "lib"


@pytest.mark.parametrize(
    "given, spins",
    [
        ({}, "2000"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
        ({"GOMP_SPINCOUNT": "70"}, "70"),
    ],
)
@pytest.mark.slow
def test_threads_soon_sleep_at_the_end_of_an_operation_unless_the_user_says_otherwise(given, spins):
    """OpenMP itself says how often a waiting thread looks before it sleeps."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: x for name, x in os.environ.items() if name not in names}
    started = subprocess.run(
        [sys.executable, "-c", "import lib; import torch"],
        cwd=ROOT,
        env={**environment, "OMP_DISPLAY_ENV": "verbose", **given},
        capture_output=True,
        text=True,
    )
    if "GOMP_SPINCOUNT" not in started.stderr:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{spins}'" in started.stderr, started.stderr
