"""What a run writes beside its steps: checkpoints by a thread, log lines one window late.

Both are for GPUs alone; here a CPU is forced to do so. And what a damaged checkpoint costs.
"""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib import checkpoint, machine, monitor, rundir, sources
from lib.config import UsageError
from lib.rundir import RunDir

import pytest
import torch
from conftest import HERE, arguments, run_script, start, tiny_config
from test_train import assert_same, batch_of, logged, state

import train

FORCED = Path(__file__).parent / "as_on_gpu.py"


@pytest.fixture(scope="module")
def images(folder):
    return sources.open_images(str(folder), "train")


@pytest.fixture
def steps(images, tmp_path):
    """-> (run, its folder, do): do(n) makes the n-th training step; the folder has a thread."""
    run = train.make_run(tiny_config(out_dir=str(tmp_path), warmup_epochs=0), 5, HERE)
    folder = RunDir(run, 80)
    folder.in_thread = True
    yield run, folder, lambda n: train.train_step(run, n, batch_of(images, run.config, n))
    folder.writer.shutdown()


# --- when


def test_when_a_checkpoint_is_due(tmp_path):
    def due(**options):
        run = train.make_run(tiny_config(epochs=5), 4, HERE)
        for name, value in options.items():
            setattr(run.config, name, value)
        return [done for done in range(1, 21) if RunDir(run, 80).is_due(done) is True]

    assert due() == [4, 8, 12, 16, 20]
    assert due(save_every_epochs=2) == [8, 16, 20]  # the last step always has one
    assert due(save_every_epochs=100) == [20]
    assert due(save_every_epochs=2, save_every=6) == [6, 8, 12, 16, 18, 20]


# --- the thread


class Gate:
    """Holds save_atomically back until it is opened; notes what begins and ends."""

    def __init__(self, monkeypatch):
        self.seen = []
        self.opened = threading.Event()
        for name in ("save_atomically", "to_host"):
            monkeypatch.setattr(rundir, name, self.noting(name, getattr(rundir, name)))

    def noting(self, name, function):
        def call(obj, *more, **named):
            what = f"{name} {os.path.basename(more[0])}" if more else name
            self.seen.append(what)
            assert name == "to_host" or self.opened.wait(60)
            result = function(obj, *more, **named)
            self.seen.append(f"end of {what}")
            return result

        return call


def test_a_thread_writes_the_state_of_its_step_while_training_goes_on(steps, tmp_path, monkeypatch):
    run, folder, do = steps
    do(0)
    RunDir(run, 80).save(1)  # as on a CPU
    at_once = state(tmp_path)
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    for name in ("ckpt.pt", "backbone.pt"):
        (tmp_path / name).unlink()
    gate = Gate(monkeypatch)
    folder.save(1)
    do(1)
    assert not (tmp_path / "ckpt.pt").exists()
    gate.opened.set()
    folder.wait()
    assert_same(at_once, state(tmp_path))
    assert_same(backbone, torch.load(tmp_path / "backbone.pt", weights_only=True))
    now = run.network.state_dict()["head_ir.mlp.0.weight"]
    assert not torch.equal(at_once["student"]["head_ir.mlp.0.weight"], now)


def tensors_of(obj):
    if torch.is_tensor(obj):
        yield obj
    elif isinstance(obj, (dict, list, tuple)):
        for value in obj.values() if isinstance(obj, dict) else obj:
            yield from tensors_of(value)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_copy_shares_no_memory_with_the_run(steps, monkeypatch, optimizer):
    _, folder, _ = steps
    folder.run.optimizer = train.make_run(tiny_config(optimizer=optimizer), 5, HERE).optimizer
    given = []
    monkeypatch.setattr(folder, "_write", lambda done, files, *more: given.append(files))
    folder.save(1)
    folder.wait()
    folder.in_thread = False
    folder.save(1)
    copied, own = ({x.data_ptr() for x in tensors_of(files)} for files in given)
    assert len(own) > 100 and len(copied) > 100 and not own & copied
    assert len(list(tensors_of(given[0]))) == len(list(tensors_of(given[1])))


def test_a_checkpoint_waits_for_the_one_before(steps, tmp_path, monkeypatch):
    _, folder, _ = steps
    gate = Gate(monkeypatch)
    threading.Timer(0.3, gate.opened.set).start()
    folder.save(1)
    folder.save(2)
    first = gate.seen[: gate.seen.index("to_host", 1)]
    files = ["save_atomically backbone.pt", "save_atomically ckpt.pt"]
    files = [what for file in files for what in (file, f"end of {file}")]
    assert set(first) == {"to_host", "end of to_host", *files} and len(first) == 6, gate.seen
    folder.save(3, is_last=True)
    assert state(tmp_path)["step"] == 3  # on the disk when it returns
    assert gate.seen[-4:] == files and not folder.writing


def test_a_full_disk_is_told_and_costs_nothing_but_the_checkpoint(steps, tmp_path, capsys):
    run, folder, _ = steps
    folder.save_if_due(5)
    folder.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        folder.save(6)
        folder.wait()
        printed = capsys.readouterr().out
        assert "no checkpoint after step 6" in printed
        assert "File too large; the last good one stands" in printed
        assert state(tmp_path)["step"] == 5
        for done, signal_number in ((7, signal.SIGTERM), (run.total, 0)):
            with pytest.raises(UsageError, match=f"after step {done}: .*make room"):
                folder.save_if_due(done, signal_number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder.save_if_due(run.total)
    assert state(tmp_path)["step"] == run.total
    assert not list(tmp_path.glob("*.partial"))


def test_another_error_of_the_thread_ends_the_run(steps, monkeypatch):
    _, folder, _ = steps

    def fail(*_):
        raise MemoryError("no memory to write")

    for save in (lambda: folder.save(2), lambda: folder.save(2, is_last=True), folder.wait):
        with monkeypatch.context() as patch:
            patch.setattr(rundir, "save_atomically", fail)
            folder.save(1)
            with pytest.raises(MemoryError, match="no memory to write"):
                save()


def test_weights_that_are_not_finite_leave_the_one_in_hand_alone(steps, tmp_path, monkeypatch):
    run, folder, _ = steps
    gate = Gate(monkeypatch)
    folder.save(3)
    with torch.no_grad():
        run.network.head_ir.mlp[0].weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match="not finite at step 4"):
        folder.save(4)
    gate.opened.set()
    folder.wait()
    assert state(tmp_path)["step"] == 3


# --- late lines


class Log:
    """Does training without training: made-up losses and a clock that only the steps move."""

    def __init__(self, images, folder, monkeypatch, is_late, **options):
        config = tiny_config(out_dir=str(folder), log_every=3, epochs=4)
        for name, value in options.items():
            setattr(config, name, value)
        self.now = 0.0
        monkeypatch.setattr(monitor.time, "perf_counter", lambda: self.now)
        self.run = train.make_run(config, 5, HERE)
        self.monitor = monitor.Monitor(self.run, images, None)
        self.monitor.folder = RunDir(self.run, 80)
        self.monitor.bar = monitor.tqdm(disable=True)
        self.monitor.is_late = is_late
        self.monitor.evaluate = self.evaluate

    def step(self, done, signal=0):
        self.now += done**2  # each window has a speed of its own
        self.monitor.waited += 0.1 * done
        self.run.optimizer.param_groups[0]["lr"] = 0.1 / done
        loss = float("nan") if done == 7 else 1 / (done + 2)
        self.monitor.step(done, {"loss": torch.tensor(loss), "KL": torch.tensor(done / 7)}, signal)
        if self.monitor.folder.is_due(done) or signal:
            self.now += 1000
        self.monitor.epoch_end(done)

    def evaluate(self, is_last):
        self.now += 500
        return {"std_full": self.now}

    def lines(self):
        return self.monitor.folder.records()


OPTIONS = {
    "each epoch": {},
    "and every 7 steps": dict(save_every=7),
    "every 3 epochs, evaluated each": dict(save_every_epochs=3, eval_every=1),
    "every 3 epochs": dict(save_every_epochs=3, log_every=2),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("told_at", [0, 12])
def test_late_lines_are_the_same_lines(images, tmp_path, monkeypatch, options, told_at):
    logs = []
    for is_late in (False, True):
        log = Log(images, tmp_path / str(is_late), monkeypatch, is_late, **options)
        for done in range(1, told_at or 21):
            log.step(done)
        if told_at:
            log.step(told_at, signal.SIGTERM)
        logs.append(log)
    once, late = (log.lines() for log in logs)
    assert once == late and [line["step"] for line in late][-1] == (told_at or 20)
    assert not logs[1].monitor.unwritten and logs[0].monitor.numbers == logs[1].monitor.numbers
    before = 0
    for line in once:
        if "loss" not in line:
            continue
        steps = range(before + 1, line["step"] + 1)
        seconds = sum(n**2 for n in steps)  # a checkpoint or an evaluation does not count
        assert line["img_per_s"] == pytest.approx(len(steps) * 16 / seconds, rel=1e-6)
        assert line["data_wait"] == pytest.approx(sum(steps) * 0.1 / seconds, rel=1e-6)
        assert line["KL"] == pytest.approx(sum(steps) / len(steps) / 7, abs=1e-6)
        assert (
            line["lr"] == pytest.approx(0.1 / line["step"], rel=1e-6)
            and line["epoch"] == line["step"] / 5
        )
        before = line["step"]


def test_a_late_line_waits_for_the_next_or_for_a_stop(images, tmp_path, monkeypatch):
    waits = []
    begin = monitor.start_copy

    def start_copy(x):
        host, _ = begin(x)
        of_step = done

        def wait():
            if of_step == 10 and (10, 10) not in waits:
                log.now += 50  # the device has yet to do some of the work
            waits.append((of_step, done))

        return host, wait

    monkeypatch.setattr(monitor, "start_copy", start_copy)
    log = Log(images, tmp_path, monkeypatch, True, save_every_epochs=2, eval_every=0)
    seen = {}
    for done in range(1, 16):
        log.step(done)
        seen[done] = [line["step"] for line in log.lines()]
    # lines are due at 1, 4, 7, 10 (a checkpoint) and 13
    assert [seen[n] for n in (3, 4, 6, 7, 9)] == [[], [1], [1], [1, 4], [1, 4]]
    assert [seen[n] for n in (10, 12, 13, 15)] == [[1, 4, 7, 10]] * 4
    assert set(waits) == {(1, 4), (4, 7), (7, 10), (10, 10)}  # nothing waits in between
    seconds = 8**2 + 9**2 + 10**2 + 50
    assert log.lines()[-1]["img_per_s"] == pytest.approx(3 * 16 / seconds, rel=1e-6)


def test_too_many_skipped_steps_are_seen_a_window_late(images, tmp_path, monkeypatch):
    for is_late, noticed_at in ((False, 4), (True, 7)):  # lines are due at 1, 4, 7
        log = Log(images, tmp_path, monkeypatch, is_late, save_every_epochs=4)
        for done in range(1, noticed_at):
            log.run.skipped.fill_(3 if done == 4 else 0)
            log.step(done)
        log.run.skipped.fill_(0 if is_late else 3)
        with pytest.raises(UsageError, match="steps 1 to 3: no gradient was finite"):
            log.step(noticed_at)


def test_other_code_is_told_when_a_run_continues(steps, tmp_path, monkeypatch, capsys):
    run, *_ = steps
    monkeypatch.setattr(rundir, "revision", lambda: "abc-dirty.1")
    RunDir.open(run, 80).save(1)
    assert RunDir.open(run, 80).step == 1 and not capsys.readouterr().out
    monkeypatch.setattr(rundir, "revision", lambda: "abc-dirty.2")
    RunDir.open(run, 80)
    told = capsys.readouterr().out
    assert f"revision abc-dirty.1 wrote {tmp_path}, this is abc-dirty.2" in told
    (tmp_path / "config.json").write_text("[1, 2]")  # what a checkpoint has is enough
    assert RunDir.open(run, 80).step == 1


# --- a damaged checkpoint


def checkpoint_of(run):
    """-> the run's ckpt.pt, with its bytes."""
    path = Path(run.config.out_dir) / "ckpt.pt"
    return path, path.read_bytes()


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.slow
def test_a_flipped_bit_or_a_cut_is_refused_or_changes_nothing(steps, tmp_path):
    """Bits anywhere, bits of the archive's table of members, and lengths."""
    run, _, do = steps
    do(0)
    RunDir(run, 80).save(1)
    path, content = checkpoint_of(run)
    whole = state(tmp_path)
    rng = random.Random(0)
    table = content.rindex(b"PK\1\2")
    bits = [rng.randrange(8 * len(content)) for _ in range(60)]
    bits += [8 * rng.randrange(table - 4000, len(content)) + 3 for _ in range(60)]
    spoiled = [flipped(content, bit) for bit in bits]
    spoiled += [content[: rng.randrange(len(content))] for _ in range(20)]
    refused = 0
    for changed in spoiled:
        path.write_bytes(changed)
        try:
            assert_same(whole, checkpoint.read_checkpoint(path))
        except UsageError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{path}: ")
            refused += 1
    assert refused >= 60 + 20


def test_damage_in_the_first_bytes_is_damage(steps):
    run, *_ = steps
    RunDir(run, 80).save(1)
    path, content = checkpoint_of(run)
    for changed in [flipped(content, bit) for bit in range(32)] + [content[:n] for n in range(4)]:
        path.write_bytes(changed)
        with pytest.raises(checkpoint.Damaged):
            checkpoint.read_checkpoint(path)


def test_of_sixty_flipped_bits_in_the_weights_all_are_found(steps, tmp_path):
    run, *_ = steps
    RunDir(run, 80).save(1)
    path, content = checkpoint_of(run)
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if "/data/" in info.filename]
    members.sort(key=lambda info: -info.file_size)
    rng = random.Random(1)
    for info in members[:60]:
        at = info.header_offset
        lengths = [content[i : i + 2] for i in (at + 26, at + 28)]  # of name and extra field
        start = at + 30 + sum(int.from_bytes(x, "little") for x in lengths)
        bit = 8 * start + rng.randrange(8 * info.file_size)
        path.write_bytes(flipped(content, bit))
        with pytest.raises(checkpoint.Damaged, match="checksum; copy it again"):
            checkpoint.read_checkpoint(path)


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), r"Input/output error; .*try again"),
        (MemoryError(), "does not fit into memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not fit into"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_damaged(steps, monkeypatch, error, message):
    """The last checkpoint must not give way to the one before because a disk has failed once."""
    run, *_ = steps
    RunDir(run, 80).save(1)
    path, _ = checkpoint_of(run)

    def fail(*given, **options):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UsageError, match=message) as refusal:
        checkpoint.read_checkpoint(path)
    assert not isinstance(refusal.value, checkpoint.Damaged)


def test_a_damaged_line_of_the_log_is_named(steps, tmp_path):
    run, *_ = steps
    folder = RunDir.open(run, 80)
    for step in (1, 2):
        folder.log(step=step, epoch=0.2, loss=3.1e-7)
    path = tmp_path / "log.jsonl"
    assert [line["loss"] for line in folder.records()] == [3.1e-7] * 2
    path.write_bytes(path.read_bytes().replace(b'{"step": 2', b'\xff"step": 2'))
    with pytest.raises(UsageError, match=r"log\.jsonl: not a log, or line 2 is damaged; remove"):
        folder.records()


def test_only_a_runs_own_entry_in_results_ends_its_wish_for_a_table(steps, tmp_path):
    run, folder, _ = steps
    images = sources.open_images(run.config.data, "train")
    watch = monitor.Monitor(run, images, images)
    watch.folder = folder
    path = tmp_path / "results.json"
    path.write_text("{}")  # not even read without --probe_at_end
    run.config.probe_at_end = False
    assert not watch.needs_table()
    run.config.probe_at_end = True
    for options, needed in ((dict(task="linear"), True), (dict(max_steps=0), False)):
        path.write_text(json.dumps([dict(task="probe", protocol=options)]))
        assert watch.needs_table() == needed


def test_the_teachers_entropy_is_known_to_the_warnings_after_a_restart(steps, monkeypatch):
    run, folder, _ = steps
    seen = []
    monkeypatch.setattr(monitor.Monitor, "_was_evaluated", lambda self, step: False)
    monkeypatch.setattr(monitor.Monitor, "epoch_end", lambda self, done: seen.append(self.numbers))
    monkeypatch.setattr(monitor, "first_screen", lambda *_: "")
    folder.log(step=1, epoch=0.2, loss=3.0, H_ir=2.5)
    folder.step = 1
    images = sources.open_images(run.config.data, "train")
    monitor.Monitor(run, images, None).begin(folder)
    assert seen[0]["H_ir"] == 2.5


def test_a_damaged_checkpoint_costs_one_interval(images, steps, tmp_path, capsys):
    run, _, do = steps
    kept = {}
    for n in range(3):
        do(n)
        RunDir(run, 80).save(n + 1)
        kept[n + 1] = state(tmp_path)
        assert (tmp_path / "ckpt.prev.pt").exists() == (n > 0)
    assert_same(kept[2], torch.load(tmp_path / "ckpt.prev.pt", weights_only=True))
    path, content = checkpoint_of(run)
    path.write_bytes(flipped(content, 4 * len(content)))
    with pytest.raises(UsageError, match=r"copy it again, or use .*ckpt\.prev\.pt"):
        checkpoint.read_checkpoint(path)

    again = train.make_run(run.config, 5, HERE)
    opened = RunDir.open(again, 80)
    told = capsys.readouterr().out
    assert opened.step == 2 and told.count("\n") == 1
    assert "ckpt.pt: damaged, " in told and "continuing from" in told
    assert_same(kept[2], state(tmp_path))  # it takes the damaged one's place
    assert not (tmp_path / "ckpt.prev.pt").exists()
    train.train_step(again, 2, batch_of(images, again.config, 2))
    opened.save(3)
    assert_same(kept[3], state(tmp_path))
    assert_same(kept[2], torch.load(tmp_path / "ckpt.prev.pt", weights_only=True))


def test_without_a_previous_one_a_damaged_checkpoint_is_an_error(steps, tmp_path):
    run, _, _ = steps
    RunDir(run, 80).save(1)
    path, content = checkpoint_of(run)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"ckpt\.pt: damaged, .*; remove it to start again"):
        RunDir(run, 80).restore()


def test_where_no_links_can_be_the_old_file_is_copied(tmp_path, monkeypatch):
    path, previous = str(tmp_path / "ckpt.pt"), str(tmp_path / "ckpt.prev.pt")

    def refuse(*_):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(checkpoint.os, "link", refuse)
    real = os.replace
    present = []

    def replace(source, target):
        real(source, target)
        present.append(os.path.exists(path))

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    for n in range(3):
        checkpoint.save_atomically(n, path, previous)
    assert (torch.load(path), torch.load(previous)) == (2, 1)
    assert len(present) == 5 and all(present)  # a kill at any moment leaves a ckpt.pt
    assert sorted(os.listdir(tmp_path)) == ["ckpt.prev.pt", "ckpt.pt"]


# --- a whole run, as on a GPU, and what may happen to it


RUN = dict(epochs=4, save_every=2, log_every=3, drop_path=0.2, eval_every=2, workers=1)  # 20 steps


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """-> out_dir of the run on a CPU that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    run_script("train.py", *arguments(data=folder, out_dir=out, **RUN))
    return out


def as_on_gpu(*command, code=0, **how):
    process = start(FORCED, *command, stderr=subprocess.STDOUT, **how)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == code, printed
    return printed


def same_lines(a, b):
    """Logs are equal but for speeds."""
    one, other = (
        [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        for out in (a, b)
    )
    for line in one + other:
        line.pop("img_per_s", 0)
        line.pop("data_wait", 0)
    assert one == other


@pytest.mark.slow
@pytest.mark.faults
def test_stopped_while_a_thread_writes_it_is_the_same_run(folder, tmp_path, whole):
    codes = {"die:replace:6": -9, "die:fsync:7": -9, "term:7": 143}

    def stop_and_continue(fault):
        out = tmp_path / fault
        options = arguments(data=folder, out_dir=out, **RUN)
        printed = as_on_gpu("tests/inject.py", fault, *options, code=codes[fault])
        step = state(out)["step"]  # there is a whole one
        if fault == "term:7":
            assert step == 8 and "stopped by SIGTERM after step 8" in printed
        as_on_gpu("train.py", *options)

    with ThreadPoolExecutor() as pool:
        list(pool.map(stop_and_continue, codes))
    for fault in codes:
        assert_same(state(whole), state(tmp_path / fault))
        same_lines(whole, tmp_path / fault)


@pytest.mark.slow
@pytest.mark.faults
def test_an_end_by_mistake_waits_for_the_file_in_hand(folder, tmp_path):
    """Two ranks, the way out is os._exit; the disk takes 0.3 seconds for each file."""
    options = arguments(data=folder, out_dir=tmp_path, **{**RUN, "log_every": 1})
    printed = as_on_gpu("--slowly", "tests/inject.py", "nan:6:100:1", *options, processes=2, code=1)
    assert "steps 6 to 8: no gradient was finite" in printed
    assert state(tmp_path)["step"] == 8 and not list(tmp_path.glob("*.partial"))
    assert max(logged(tmp_path)) == 8


# --- on a GPU


@pytest.mark.gpu
def test_on_a_gpu_neither_lines_nor_files_make_it_wait(images, tmp_path, monkeypatch):
    config = tiny_config(device="cuda", out_dir=str(tmp_path), log_every=2, epochs=4, compile=False)
    run = train.make_run(config, 5, machine.join("cuda", "fp32"))
    watched = monitor.Monitor(run, images, None)
    watched.folder = folder = RunDir(run, 80)
    watched.bar = monitor.tqdm(disable=True)
    assert watched.is_late and folder.in_thread
    for done in range(1, 5):
        values = torch.full((), float(done), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            watched.step(done, {"loss": values}, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    watched.step(5, {"loss": torch.full((), 5.0, device="cuda")}, 0)
    assert {line["step"]: line["loss"] for line in folder.records()} == {1: 1.0, 3: 2.5, 5: 4.5}
    expected = {name: x.cpu().clone() for name, x in run.network.state_dict().items()}
    folder.save(5)
    with torch.no_grad():
        for p in run.network.parameters():
            p.add_(1)
    folder.wait()
    assert_same(expected, state(tmp_path)["student"])
