"""What the tests share: a small folder of images, tiny runs, where the optional real data lie."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lib import machine  # noqa: E402

import forkserver  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402

torch.set_num_threads(min(2, os.cpu_count()))

CPU = torch.device("cpu")
# before the first operation: it limits processors that announce what they cannot do
machine.choose_precision("auto", CPU)
HERE = machine.Here(0, 1, CPU, "fp32", nullcontext)
SHARED = ROOT.parent / "shared" / "data"

TINY = dict(
    arch="vit_micro",
    patch_size=8,
    stem="imagenet",
    img_size=32,
    local_size=16,
    local_crops=2,
    out_dim=64,
    head_hidden=32,
    head_bottleneck=16,
    batch_size=16,
    epochs=2,
    warmup_epochs=1,
    workers=0,
    log_every=1,
    eval_every=0,
    device="cpu",
    precision="fp32",
    lr=2e-3,
    teacher_momentum=0.9,
)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "gpu: needs a CUDA device; skipped, loudly, where there is none"
    )
    config.addinivalue_line("markers", "faults: what can spoil a run, injected")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Write the built-in shapes as train/CLASS/*.png (10 classes x 8) and val (10 x 4), 32 px."""
    from lib.shapes import shapes

    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 80), ("val", 40)):
        images = shapes(split, 32, count)
        for i in range(count):
            path = root / split / images.classes[images.labels[i]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            torchvision.io.write_png(images.read(i), str(path))
    return root


@pytest.fixture
def scans_put_back(monkeypatch):
    """Undo after the test that compiling takes vmamba's scans out of every graph for good."""
    import vmamba

    monkeypatch.setattr(vmamba, "SCANS", dict(vmamba.SCANS))


@pytest.fixture
def one_thread():
    """Compute with one thread: a small network gains nothing from two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(**options):
    return [f"--{name}={value}" for name, value in {**TINY, **options}.items()]


def tiny_config(**options):
    from lib.config import Config

    return Config(**{**TINY, **options})


def default_signals():
    """Undo what a shell does to what it starts in the background: it ignores Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(
    *command,
    processes=1,
    restarts=0,
    within=(),
    fresh=False,
    stderr=subprocess.PIPE,
    **environment,
):
    """Start a script of the project in a session of its own -> what Popen returns, or its like.

    processes: more than one run under torchrun; restarts: how often it starts them again.
    within: the command that starts the script, such as unshare.
    It is forked (forkserver.py), unless it is to be fresh or has another environment.
    """
    script = [str(word) for word in command]
    if processes > 1:
        torchrun = [*forkserver.TORCHRUN, f"--nproc_per_node={processes}", "--master_port=0"]
        rendezvous = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
        script = [*torchrun, *rendezvous, f"--max_restarts={restarts}", *script]
    command = [*within, sys.executable, *script]
    usual = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    if sys.platform == "linux" and not (within or fresh or environment):
        return forkserver.Forked(command, usual, stderr)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**usual, **environment},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,
    )


def run_script(*command, check=True, timeout=300, **how):
    """Run a script of the project, as start does -> a CompletedProcess with its text output."""
    process = start(*command, **how)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # say where each process stands: faulthandler prints the stacks of one that is aborted
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            process.send_signal(signal.SIGSTOP)  # torchrun would end the other ranks
        for pid in map(int, children or [process.pid]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
            time.sleep(1)  # one after the other
        process.kill()
        out, err = process.communicate(timeout=30)
        pytest.fail(f"no end after {timeout} s: {' '.join(process.args)}\n{out}\n{err}")
    finally:
        process.send_signal(signal.SIGTERM)  # after Ctrl-C; nothing if it has ended
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
