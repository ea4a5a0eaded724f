"""Ranks, device and precision, signals, and how a process ends."""

import os
import signal
import subprocess
import sys
import textwrap

from lib import machine, processor
from lib.config import UsageError

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, HERE, ROOT, run_script

START = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from lib import machine
from lib.config import UsageError
"""


def script(body):
    """Return a program that runs machine.run_main(main) with this body of main(argv)."""
    main = textwrap.indent(body.strip(), "    ")
    return f"{START}\ndef main(argv):\n{main}\n\nmachine.run_main(main, 'was stopped')\n"


def run_main(body, *options, stdout=subprocess.PIPE, **environment):
    """Run script(body) as one process with one argument; not a rank unless environment says so."""
    dropped = ("RANK", "ONEDNN_MAX_CPU_ISA", "PYTHONUNBUFFERED")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        [sys.executable, *options, "-c", script(body), "an argument"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env={**inherited, **environment},
    )


def run_ranks(body, ranks, folder, *options):
    """Run script(body) under torchrun."""
    path = folder / "script.py"
    path.write_text(script(body))
    return run_script(*options, path, processes=ranks, check=False, timeout=120)


ENDS = [
    ("pass", 0),
    ("raise UsageError('x')", 2),
    ("raise KeyboardInterrupt", 130),
    ("sys.exit(143)", 143),
    ("1 / 0", 1),
]


@pytest.mark.parametrize("end, code", ENDS)
@pytest.mark.slow
def test_a_rank_ends_though_a_thread_does_not(end, code):
    """The thread stands for one of communication; Python itself would wait for it for ever."""
    body = f"""
import atexit, threading
threading.Thread(target=threading.Event().wait).start()
atexit.register(print, "cleared up", end="")
print("worked", end=" ")
{end}
"""
    done = run_main(body, RANK="0")
    assert done.returncode == code
    assert done.stdout == "worked cleared up", done.stderr
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)


@pytest.mark.parametrize("end, code", ENDS)
@pytest.mark.slow
def test_without_torchrun_the_exit_codes_are_the_same(end, code):
    done = run_main(f"print(argv)\n{end}")
    assert done.returncode == code
    assert done.stdout == "['an argument']\n", done.stderr
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)
    expected = {2: "-c: x\n", 130: "was stopped\n"}
    assert done.stderr == expected.get(code, done.stderr if code == 1 else "")


@pytest.mark.slow
def test_the_error_of_a_loaders_worker_is_one_line():
    body = """
from torch.utils.data import DataLoader
class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, i):
        raise UsageError("data=x: is broken; fix it")
for _ in DataLoader(Broken(), num_workers=1):
    pass
"""
    done = run_main(body)
    assert done.returncode == 2
    assert done.stderr == "-c: data=x: is broken; fix it\n"


@pytest.mark.slow
def test_a_closed_pipe_does_not_keep_a_rank_alive():
    body = "import threading\nthreading.Thread(target=threading.Event().wait).start()\nprint(1)"
    read, write = os.pipe()
    os.close(read)
    done = run_main(body, stdout=write, RANK="0")
    os.close(write)
    assert done.returncode == 0, done.stderr


def test_the_process_group_outlives_the_script(tmp_path):
    """Destroyed before DistributedDataParallel, it could wait for ever (machine.wait_for_ranks)."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        machine.wait_for_ranks()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    files = [path for folder in ("", "lib", "tools") for path in (ROOT / folder).glob("*.py")]
    assert len(files) > 15
    assert not [path.name for path in files if "destroy_process_group" in path.read_text()]


def test_one_process_needs_no_group():
    assert machine.rank_and_world() == (0, 1)
    x = torch.randn(3)
    assert machine.mean_over_ranks(x) is x
    assert machine.broadcast("object") == "object"
    machine.wait_for_ranks()
    assert HERE.is_main
    assert not HERE._replace(rank=1).is_main


def test_ranks_share_what_they_know(tmp_path):
    body = """
here = machine.join("cpu", "fp32")
assert (here.rank, here.world) == machine.rank_and_world() == (int(os.environ["RANK"]), 3)
assert here.is_main == (here.rank == 0)
x = torch.tensor([1.0, float(here.rank)])
mean = machine.mean_over_ranks(x)
assert mean.tolist() == [1, 1] and x[1] == here.rank
told = machine.broadcast({"rank": here.rank, "z": torch.ones(2) * here.rank})
assert told["rank"] == 0 and told["z"].tolist() == [0, 0]
machine.wait_for_ranks()
"""
    done = run_ranks(body, 3, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_hosts_wait_longer_than_their_devices_would(tmp_path):
    """As for a download by one rank: the default group has given up by then, the hosts' has not."""
    body = """
import time
from datetime import timedelta
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
new_group, timeouts = dist.new_group, []
dist.new_group = lambda **o: timeouts.append(o["timeout"]) or new_group(**o)
here = machine.join("cpu", "fp32")
assert timeouts == [timedelta(days=1)]
machine.wait_for_ranks()
dist.barrier()
_set_pg_timeout(timedelta(seconds=1))
start = time.perf_counter()
time.sleep(3 * here.rank)
machine.wait_for_ranks()
assert time.perf_counter() - start > 2.5
time.sleep(3 * here.rank)
if here.rank == 0:
    try:
        dist.barrier()
    except RuntimeError as error:
        print("the other group gave up", flush=True)
os._exit(0)
"""
    done = run_ranks(body, 2, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the other group gave up\n"


def test_on_gpus_the_group_knows_its_device(monkeypatch):
    """And the hosts' group is made at once, by all ranks at the same place."""
    gpu, calls = torch.device("cuda", 1), []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(machine, "_hosts", None)
    monkeypatch.setattr(machine, "choose_device", lambda name: gpu)
    monkeypatch.setattr(machine, "choose_precision", lambda *_: ("bf16", None))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([("the store", 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **o: calls.append((a, o)))
    monkeypatch.setattr(dist, "new_group", lambda **o: calls.append(o["backend"]) or "hosts")
    machine.join("cuda", "bf16")
    group = dict(store="the store", rank=1, world_size=2, device_id=gpu)
    assert calls == [gpu, (("nccl",), group), "gloo"]
    assert machine._hosts == "hosts"


@pytest.mark.slow
def test_restarted_ranks_do_not_find_the_dead_ones_addresses(tmp_path):
    """torchrun keeps its store over a restart; the second attempt must start afresh in it."""
    body = """
machine.join("cpu", "fp32")
machine.broadcast("a collective, so that each rank has connected to the other")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os._exit(7)
machine.wait_for_ranks()
print("second attempt", flush=True)
"""
    done = run_ranks(body, 2, tmp_path, "--max_restarts=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("second attempt") == 2


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(name, code, tmp_path):
    body = f"""
here = machine.join("cpu", "fp32")
with machine.catch_signals() as pending:
    for step in range(1000):
        if here.rank == 1 and step == 5:
            os.kill(os.getpid(), signal.{name})
        number = pending()
        if number:
            assert number == signal.{name}
            print(f"rank {{here.rank}} left at {{step}}\\n", end="", flush=True)
            machine.leave(number, f"step {{step}}")
"""
    done = run_ranks(body, 2, tmp_path)
    assert sorted(filter(None, done.stdout.splitlines())) == [
        "rank 0 left at 5",
        "rank 1 left at 5",
    ], done.stderr
    assert f"exitcode  : {code}" in done.stderr
    assert done.stderr.count("after step 5; the same command continues") == 1


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once():
    body = """
with machine.catch_signals() as pending:
    os.kill(os.getpid(), signal.SIGTERM)
    print(pending(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
"""
    done = run_main(body)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "15\n"


def test_after_the_block_the_default_handlers_are_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with machine.catch_signals() as pending:
            assert pending() == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_a_signal_that_nobody_asks_for_ends_the_process_after_the_block(capsys):
    """Such as one during the evaluation after the last step."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as leaving, machine.catch_signals():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert leaving.value.code == 143
    assert "stopped by SIGTERM after the last step; the same" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UsageError, match="device=cuda: torch sees no GPU"):
        machine.choose_device("cuda")
    assert machine.choose_device("auto") == machine.choose_device("cpu") == CPU


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    assert machine.choose_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="3 processes but 2 GPUs here: lower --nproc_per_node"):
        machine.choose_device("auto")


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_is_that_of_autocast(name, dtype):
    chosen, autocast = machine.choose_precision(name, CPU)
    assert chosen == name
    x = torch.ones(4, 4)
    with autocast():
        assert torch.nn.functional.linear(x, x).dtype == dtype
    with autocast():  # again: each call gives a new context
        assert torch.is_autocast_enabled("cpu") == (name == "bf16")


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("amx_is_broken", [True, False])
def test_auto_precision_needs_a_fast_bf16(has_bf16, amx_is_broken, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(processor, "_amx_is_broken", lambda: amx_is_broken)
    name, _ = machine.choose_precision("auto", CPU)
    assert name == ("bf16" if has_bf16 and not amx_is_broken else "fp32")


@pytest.mark.parametrize("dies", [True, False])
@pytest.mark.slow
def test_amx_that_kills_is_found_by_a_child(dies):
    """The child stands on a processor that announces AMX; its matrix product dies, or works."""
    product = "os.kill(os.getpid(), signal.SIGILL)" if dies else "None"
    body = f"""
from lib import processor
torch.cpu._is_amx_tile_supported = lambda: True
torch.nn.functional.linear = lambda x, w: {product}
print(processor._amx_is_broken(), os.environ.get("ONEDNN_MAX_CPU_ISA"))
"""
    done = run_main(body, "-X", "faulthandler")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("True AVX512_CORE_BF16\n" if dies else "False None\n")
    assert done.stderr == ""  # no stack of the child on the screen
