"""What can spoil a run, done to it; and what a user may get wrong.

Killed, told to end, out of disk, out of numbers, restarted otherwise.

    pytest -m faults
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from lib import data, log, sources
from lib.config import UsageError
from lib.images import UNREADABLE, Images, decode, reason
from lib.run import Run
from lib.rundir import RunDir

import numpy as np
import pytest
import torch
from conftest import HERE, arguments, run_script, start, tiny_config
from PIL import Image
from test_train import assert_same, logged, state

import eval_downstream
import eval_linear
import eval_seg
import train
from augment import center_crop

pytestmark = pytest.mark.faults
RUN = dict(epochs=4, save_every=2, log_every=1, drop_path=0.2, eval_every=2)  # 20 steps
RUN |= dict(img_size=16, local_size=8)
RUN |= dict(workers=1, cache="off")  # a loading process, or the images would live on the device


def launched(*command, **how):
    return start(*command, stderr=subprocess.STDOUT, **how)


def ended(process, timeout=240):
    """-> exit code and what it printed."""
    printed, _ = process.communicate(timeout=timeout)
    return process.returncode, printed


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """-> out_dir of the run that nothing happened to, by (processes, precision)."""
    done = {}

    def run(processes=1, precision="fp32"):
        if (processes, precision) not in done:
            out = done[processes, precision] = tmp_path_factory.mktemp("whole")
            run_script(
                "train.py",
                *arguments(data=folder, out_dir=out, precision=precision, **RUN),
                processes=processes,
            )
        return done[processes, precision]

    return run


def assert_the_same_run(expected, got, log=True):
    assert_same(state(expected), state(got))
    for name in ("loss", "L_Orth", "knn_full", "rank_ef") if log else ():
        assert logged(expected, name) == logged(got, name), name


# --- killed


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_it_is_the_same_run(folder, tmp_path, whole):
    """SIGKILL at 20 random moments in all, to the process or one of two ranks: bit for bit.

    Three runs at a time. Every other process that is killed has a loading process, the others have
    their images on the device.
    """
    cases = (1, "fp32", 12), (1, "bf16", 3), (2, "fp32", 5)  # processes, precision, kills
    expected = [whole(processes, precision) for processes, precision, _ in cases]
    outs = [tmp_path / f"{processes}{precision}" for processes, precision, _ in cases]
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run_and_kill, folder, *each) for each in zip(outs, cases)]
        for run in runs:
            run.result()
    for one, other in zip(expected, outs):
        assert_the_same_run(one, other)


def run_and_kill(folder, out, case):
    """Run and kill a number of times at random moments, then run to the end."""
    processes, precision, kills = case
    rng = random.Random(processes)
    options = RUN | dict(data=folder, out_dir=out, precision=precision)
    killed = []
    for _ in range(40):
        options["cache"] = ("off", "auto")[len(killed) % 2]
        process = launched("train.py", *arguments(**options), processes=processes)
        if len(killed) < kills:
            before, begun = reached(out), time.time()
            while (
                process.poll() is None
                and time.time() - begun < 120
                and reached(out) <= min(before, 17)
            ):
                time.sleep(0.002)
            time.sleep(rng.random() * 0.1)  # some steps on, or in the middle of a checkpoint
            victims = [process.pid] if processes == 1 else ranks_of(process)
            if process.poll() is None and victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                killed.append(process)
                process.wait(60)  # the other rank leaves too, within a minute
                if (out / "ckpt.pt").exists():
                    state(out)  # loads
                continue
        code, errors = ended(process)
        assert code == 0, errors
        if len(killed) == kills:
            break
        shutil.rmtree(out)  # it was too fast: once more from the start
    assert len(killed) == kills
    for process in killed:
        ended(process, 60)  # so have the loading workers of the dead


def reached(out):
    try:
        return max(logged(out), default=0)
    except (FileNotFoundError, ValueError):
        return 0


def ranks_of(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_checkpoint(folder, tmp_path, whole):
    faults = ("save:3", "fsync:5", "replace:5")
    given = [arguments(data=folder, out_dir=tmp_path / fault, **RUN) for fault in faults]
    pairs = zip(faults, given)
    killed = [launched("tests/inject.py", f"die:{fault}", *options) for fault, options in pairs]
    for fault, process in zip(faults, killed):
        assert process.wait(60) == -signal.SIGKILL
        assert 2 <= state(tmp_path / fault)["step"] < 12  # there is a whole one
    again = [launched("train.py", *options) for options in given]
    for fault, process in zip(faults, again):
        code, errors = ended(process)
        assert code == 0, errors
        assert_the_same_run(whole(), tmp_path / fault)
    for process in killed:
        ended(process, 60)  # its loading worker has left, too


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_the_run_goes_on_by_itself(folder, tmp_path, whole):
    """With nothing forked: torchrun itself and fresh ranks, which end as the forked ones."""
    begun = time.time()
    code, errors = ended(
        launched(
            "tests/inject.py",
            "kill:9:1",
            *arguments(data=folder, out_dir=tmp_path, **RUN),
            processes=2,
            restarts=1,
            fresh=True,
        )
    )
    assert code == 0, errors
    assert time.time() - begun < 120
    assert_the_same_run(whole(2), tmp_path)


# --- told to end


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, processes", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)]
)
def test_told_to_end_it_saves_within_a_step_and_continues(
    folder, tmp_path, whole, number, processes
):
    """The whole process group is told, loading workers too, as Slurm and a terminal do it."""
    options = arguments(data=folder, out_dir=tmp_path, **{**RUN, "save_every": 0})
    process = launched("train.py", *options, processes=processes)
    while process.poll() is None and reached(tmp_path) < 2:
        time.sleep(0.01)
    told_at = reached(tmp_path)
    os.killpg(process.pid, number)
    code, errors = ended(process, 60)
    name = signal.Signals(number).name
    assert f"stopped by {name} after step" in errors and "the same command continues" in errors, (
        errors
    )
    assert code != 0 if processes > 1 else code == 128 + number
    if processes == 1:
        assert "Traceback" not in errors, errors
    assert (
        told_at <= state(tmp_path)["step"] <= told_at + 3
    )  # a step may have ended while we looked
    assert ended(launched("train.py", *options, processes=processes))[0] == 0
    assert_the_same_run(whole(processes), tmp_path)


# --- disk


@pytest.mark.slow
def test_a_full_disk_costs_no_step(folder, tmp_path, whole):
    code, errors = ended(
        launched("tests/inject.py", "full:4:9", *arguments(data=folder, out_dir=tmp_path, **RUN))
    )
    assert (
        code == 0 and "no checkpoint after step 6" in errors and "last good one stands" in errors
    ), errors
    assert_the_same_run(whole(), tmp_path, log=False)
    assert set(logged(tmp_path)) == {
        1,
        2,
        3,
        4,
        *range(10, 21),
    }  # what could not be written is missing, no line is broken


@pytest.mark.slow
def test_a_disk_that_stays_full_keeps_the_last_good_checkpoint(folder, tmp_path, whole):
    options = arguments(data=folder, out_dir=tmp_path, **RUN)
    code, errors = ended(launched("tests/inject.py", "full:17:1000", *options))
    assert code == 2 and "make room" in errors and "Traceback" not in errors, errors
    assert state(tmp_path)["step"] == 16
    assert ended(launched("train.py", *options))[0] == 0
    assert_the_same_run(whole(), tmp_path)


OWN_MOUNTS = [
    "unshare",
    "--map-root-user",
    "--mount",
]  # what is mounted in there is gone with the process
can_mount = (
    shutil.which("unshare")
    and subprocess.run(
        [*OWN_MOUNTS, "mount", "--bind", "/tmp", "/tmp"], capture_output=True
    ).returncode
    == 0
)


@pytest.mark.slow
@pytest.mark.skipif(
    not can_mount,
    reason="this system lets no user mount a folder read-only (unshare --map-root-user --mount)",
)
def test_a_folder_that_becomes_read_only_costs_no_step(folder, tmp_path, whole):
    code, errors = ended(
        launched(
            "tests/inject.py",
            "readonly:4:9",
            *arguments(data=folder, out_dir=tmp_path, **RUN),
            within=OWN_MOUNTS,
        )
    )
    assert (
        code == 0
        and "no checkpoint after step 6" in errors
        and "Read-only file system; the last good one stands" in errors
    ), errors
    assert_the_same_run(whole(), tmp_path, log=False)
    assert set(logged(tmp_path)) == {1, 2, 3, 4, *range(10, 21)}


@pytest.mark.slow
@pytest.mark.skipif(
    not can_mount,
    reason="this system lets no user mount a folder read-only (unshare --map-root-user --mount)",
)
def test_a_run_is_not_begun_in_a_read_only_folder(folder, tmp_path):
    readonly = [
        *OWN_MOUNTS,
        "sh",
        "-c",
        'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"',
        str(tmp_path),
    ]
    for out in (tmp_path, tmp_path / "run"):
        code, errors = ended(
            launched("train.py", *arguments(data=folder, out_dir=out, **RUN), within=readonly)
        )
        assert (
            code == 2
            and f"train.py: out_dir={out}: Read-only file system; choose another" in errors
            and "Traceback" not in errors
        ), errors
    assert not list(tmp_path.iterdir())


def test_a_line_cut_short_by_a_full_disk_is_taken_back(tmp_path, capsys):
    """The limit falls into the second line: half of it is written before the system refuses."""
    path = tmp_path / "log.jsonl"
    folder = RunDir(train.make_run(tiny_config(out_dir=str(tmp_path)), 5, HERE), 80)
    folder.log(step=1, loss=2.0)
    whole, limits = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, limits[1]))
    try:
        folder.log(step=2, loss=2.0)
        assert path.read_text() == whole and "step 2 is not in" in capsys.readouterr().out
        path.unlink()
        folder.log(step=0, words="far too long" * 20)
        assert folder.records() == []
        path.write_text(whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder.log(step=3, loss=2.0)
    folder.log(step=4, loss=2.0)
    log.cut(str(path), 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        1,
        3,
    ] and folder.records()[0]["step"] == 1


@pytest.mark.slow
def test_a_folder_removed_during_the_run_is_made_again(folder, tmp_path, whole):
    code, errors = ended(
        launched(
            "tests/inject.py", "gone:7", *arguments(data=folder, out_dir=tmp_path / "run", **RUN)
        )
    )
    assert code == 0, errors
    assert_the_same_run(whole(), tmp_path / "run", log=False)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["ratio"] == 0.8  # for who reads backbone.pt


# --- numbers


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("arch", ["vit_micro", "resnet18"])
def test_a_step_that_is_not_finite_moves_nothing(folder, monkeypatch, optimizer, arch):
    config, images = (
        tiny_config(
            optimizer=optimizer,
            arch=arch,
            freeze_last_layer=0,
            warmup_epochs=0,
            teacher_momentum=1.0,
        ),
        sources.open_images(str(folder), "train"),
    )
    run = train.make_run(config, 5, HERE)
    batch = next(iter(data.train_loader(images, config, 0, 1, HERE)))
    views_of = Run.views
    for step, bad in enumerate((True, False, True, True)):
        before = {name: p.detach().clone() for name, p in run.network.named_parameters()}
        moments = [
            s["exp_avg" if optimizer == "adamw" else "momentum_buffer"].clone()
            for s in run.optimizer.state.values()
        ]
        centers = {name: center.clone() for name, center in run.centers.items()}
        scale = float("nan") if bad else 1.0
        monkeypatch.setattr(Run, "views", lambda *a, x=scale: [v * x for v in views_of(*a)])
        train.train_step(run, step, batch)
        assert (
            all(
                torch.equal(p, before[name])
                for name, p in run.network.named_parameters()
                if p.requires_grad
            )
            == bad
        )
        assert all(torch.equal(run.centers[name], centers[name]) for name in centers) == bad
        after = [
            s["exp_avg" if optimizer == "adamw" else "momentum_buffer"]
            for s in run.optimizer.state.values()
        ]
        if moments:
            assert all(map(torch.equal, moments, after)) == bad
    assert run.skipped.tolist() == [3, 2]


def test_a_gradient_that_overflows_leaves_centres_alone_too_and_a_resumed_run_counts_on(
    folder, tmp_path
):
    """The teacher's outputs are finite here, unlike above: only the student's way back fails."""
    config, images = (
        tiny_config(freeze_last_layer=0, warmup_epochs=0, out_dir=str(tmp_path)),
        sources.open_images(str(folder), "train"),
    )
    run = train.make_run(config, 5, HERE)
    batch = next(iter(data.train_loader(images, config, 0, 1, HERE)))
    handle = run.network.backbone.norm.weight.register_hook(
        lambda gradient: gradient * float("inf")
    )
    train.train_step(run, 0, batch)
    assert run.skipped.tolist() == [1, 1] and not any(
        center.any() for center in run.centers.values()
    )
    RunDir(run, 80).save(1)
    again = train.make_run(config, 5, HERE)
    restored = RunDir(again, 80)
    restored.restore()
    assert restored.step == 1 and again.skipped.tolist() == [1, 1]
    handle.remove()
    train.train_step(run, 1, batch)
    assert run.skipped.tolist() == [1, 0] and all(center.any() for center in run.centers.values())


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both_and_counted(folder, tmp_path):
    code, errors = ended(
        launched(
            "tests/inject.py",
            "nan:6:7:1",
            *arguments(data=folder, out_dir=tmp_path, **RUN),
            processes=2,
        )
    )
    assert code == 0, errors
    assert (
        logged(tmp_path, "skipped") == dict.fromkeys(range(7, 21), 1)
        and state(tmp_path)["step"] == 20
    )
    assert all(np.isfinite(loss) for step, loss in logged(tmp_path).items() if step != 7)


@pytest.mark.slow
def test_many_in_a_row_stop_the_run_and_name_step_and_samples(folder, tmp_path):
    code, errors = ended(
        launched(
            "tests/inject.py",
            "nan:6:100:1",
            *arguments(data=folder, out_dir=tmp_path, **RUN),
            processes=2,
        )
    )
    [schedule] = data.Schedule(80, 16, 0, 6, 7)
    first = f"{schedule[0][1]}, {schedule[1][1]}"
    assert code != 0
    assert "steps 6 to 8: no gradient was finite (L_CL, L_Orth not finite either), " in errors
    assert f"; step 6 saw samples {first}" in errors
    assert state(tmp_path)["step"] == 8 and all(
        p.isfinite().all() for p in state(tmp_path)["student"].values()
    )


# --- started otherwise


@pytest.mark.slow
def test_other_ranks_workers_and_accumulation_after_a_restart_are_the_same_run(folder, tmp_path):
    options = dict(RUN, optimizer="sgd", lr=0.02, freeze_last_layer=0)
    run_script("train.py", *arguments(data=folder, out_dir=tmp_path / "a", **options))
    code, errors = ended(
        launched(
            "tests/inject.py", "term:6", *arguments(data=folder, out_dir=tmp_path / "b", **options)
        )
    )
    assert code == 143, errors
    run_script(
        "tests/inject.py",
        "term:13",
        *arguments(data=folder, out_dir=tmp_path / "b", **dict(options, workers=2)),
        processes=2,
        check=False,
    )
    assert 14 <= state(tmp_path / "b")["step"] < 20
    run_script(
        "train.py",
        *arguments(
            data=folder, out_dir=tmp_path / "b", **dict(options, workers=0, max_batch_per_gpu=4)
        ),
    )
    assert logged(tmp_path / "a") == pytest.approx(logged(tmp_path / "b"), rel=1e-4)
    assert_same(
        state(tmp_path / "a")["student"], state(tmp_path / "b")["student"], rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_a_finished_one_says_so(folder, tmp_path):
    options = arguments(data=folder, out_dir=tmp_path, **RUN)
    first = launched("train.py", *options)
    while first.poll() is None and reached(tmp_path) < 1:
        time.sleep(0.01)
    second = run_script("train.py", *options, check=False)
    if first.poll() is None:
        assert (
            second.returncode == 2
            and "another run is writing to it" in second.stderr
            and second.stderr.count("\n") == 1
        )
    assert ended(first)[0] == 0
    assert "is finished: nothing to train" in run_script("train.py", *options).stdout


# --- what a user may get wrong


def jpeg(path, size=(24, 20), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    ).save(path, **how)
    return path


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def written(path, content):
    path.write_bytes(content)
    return path


def saved(path, mode, value=None, size=(9, 7), **how):
    Image.new(mode, size, value).save(path, **how)
    return path


def image16(path):
    Image.fromarray(np.full((7, 9), 65535, dtype=np.uint16)).save(path)
    return path


IMAGES = {  # a file -> the shape it is read as, or None where it is to be named and skipped
    "truncated": (
        lambda t: written(t / "a.jpg", jpeg(t / "b.jpg", (200, 200)).read_bytes()[:300]),
        None,
    ),
    "zero bytes": (lambda t: written(t / "a.jpg", b""), None),
    "text": (lambda t: written(t / "a.jpg", b"not a picture\n"), None),
    "a web page": (lambda t: written(t / "a.png", b"<!DOCTYPE html><html>404</html>"), None),
    "a png's head alone": (lambda t: written(t / "a.png", b"\x89PNG\r\n\x1a\n" + bytes(50)), None),
    "a folder": (lambda t: (t / "a.jpg").mkdir() or t / "a.jpg", None),
    "a dangling link": (lambda t: (t / "a.jpg").symlink_to(t / "nowhere") or t / "a.jpg", None),
    "spaces and non-ASCII": (lambda t: jpeg(t / "ein schönes Bild ☺.jpg"), (3, 20, 24)),
    "20,000 x 20": (lambda t: jpeg(t / "a.jpg", (20000, 20)), (3, 20, 20000)),
    "1 x 1": (lambda t: jpeg(t / "a.png", (1, 1)), (3, 1, 1)),
    "turned by EXIF": (lambda t: jpeg(t / "a.jpg", exif=exif(6)), (3, 24, 20)),
    "CMYK": (lambda t: saved(t / "a.jpg", "CMYK"), (3, 7, 9)),
    "16 bit": (lambda t: image16(t / "a.png"), (3, 7, 9)),
    "palette with transparency": (lambda t: saved(t / "a.png", "P", 1, transparency=1), (3, 7, 9)),
    "grey with alpha": (lambda t: saved(t / "a.png", "LA"), (3, 7, 9)),
    "one bit": (lambda t: saved(t / "a.png", "1", 1), (3, 7, 9)),
    "animated": (
        lambda t: saved(
            t / "a.gif", "RGB", save_all=True, append_images=[Image.new("RGB", (9, 7), 9)]
        ),
        (3, 7, 9),
    ),
    "another format by its name": (
        lambda t: saved(t / "b.png", "RGB").rename(t / "a.jpg"),
        (3, 7, 9),
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_as_they_are_found(tmp_path, name):
    make, shape = IMAGES[name]
    path = make(tmp_path)
    if shape:
        image = decode(path)
        assert tuple(image.shape) == shape and image.dtype == torch.uint8
        config = tiny_config(batch_size=1)
        images = Images(lambda i: image, torch.tensor([0]), ["a"], lambda i: name)
        crops = next(iter(data.train_loader(images, config, 0, 1, HERE)))
        assert crops[0].shape == (1, 2, 3, 32, 32) and crops[4] == []
        assert center_crop(image, 32).shape == (3, 32, 32)
    else:
        with pytest.raises(UNREADABLE) as error:
            decode(path)
        assert "\n" not in reason(error.value)


class Payload:
    """What, unpickled by someone careless, leaves a file."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "payload_was_run"),)


def stored(path, content):
    torch.save(content, path)
    return path


def config_file(t, text):
    return written(t / "config.py", text.encode())


def PROBE(argv):
    eval_linear.main(["--protocol=ridge", *argv])


def DOWN(argv):
    eval_downstream.main(["--task=semi10", *argv])


TRAIN = train.main
LINEAR = eval_linear.main
SEG = eval_seg.main
MISTAKES = {  # (script, its arguments, what the one line says)
    "a mistyped option": (TRAIN, lambda t: ["--ratoi=0.7"], "did you mean 'ratio'"),
    "no value": (TRAIN, lambda t: ["--ratio"], "write --ratio=value"),
    "a word for a number": (TRAIN, lambda t: ["--epochs=many"], "must be of type int"),
    "not a number": (TRAIN, lambda t: ["--lr=nan"], "must be of type float"),
    "code for a number": (
        TRAIN,
        lambda t: [f"--lr=__import__('os').mkdir('{t}/payload_was_run')"],
        "must be of type float",
    ),
    "a number too deep": (TRAIN, lambda t: ["--lr=" + "(" * 500], "must be of type float"),
    "out of range": (TRAIN, lambda t: ["--ratio=1.5"], "must be between"),
    "an unknown method": (TRAIN, lambda t: ["--method=byol"], "choose from clever, dino"),
    "a mistyped backbone": (TRAIN, lambda t: ["--arch=resnet81"], "did you mean 'resnet"),
    "local crops for two views": (TRAIN, lambda t: ["--method=simsiam"], "--local_crops=0"),
    "no config": (TRAIN, lambda t: ["configs/nowhere.py"], "No such file"),
    "two configs": (
        TRAIN,
        lambda t: ["configs/demo.py", "configs/demo.py"],
        "give one config file",
    ),
    "a config that breaks": (
        TRAIN,
        lambda t: [str(config_file(t, "lr = 1 / 0"))],
        "ZeroDivisionError",
    ),
    "a config of another project": (
        TRAIN,
        lambda t: [str(config_file(t, "learning_rate = 1"))],
        "unknown option 'learning_rate'",
    ),
    "no such folder": (TRAIN, lambda t: [f"--data={t / 'nowhere'}"], "no such folder"),
    "an empty folder": (TRAIN, lambda t: [f"--data={t}"], "holds no images"),
    "a file for a folder": (TRAIN, lambda t: [f"--data={jpeg(t / 'a.jpg')}"], "no such folder"),
    "classes without images": (
        TRAIN,
        lambda t: (t / "train" / "cat").mkdir(parents=True) or [f"--data={t}"],
        "holds no images",
    ),
    "one image": (
        TRAIN,
        lambda t: [f"--data={jpeg(t / 'a.jpg').parent}"],
        "holds 1 images, two are",
    ),
    "a class list of other classes": (
        TRAIN,
        lambda t: [f"--classes={written(t / 'c.txt', b'unicorn')}"],
        "such as unicorn",
    ),
    "a class list that is not there": (
        TRAIN,
        lambda t: [f"--classes={t / 'c.txt'}"],
        "No such file",
    ),
    "a data set that is not there": (
        TRAIN,
        lambda t: ["--data=cifar10", f"--data_root={t}"],
        "--download=True",
    ),
    "crops that the patch does not divide": (
        TRAIN,
        lambda t: ["--img_size=36"],
        "not a multiple of patch_size=8",
    ),
    "an out_dir that cannot be": (
        TRAIN,
        lambda t: [f"--out_dir={written(t / 'file', b'') / 'out'}"],
        "choose another",
    ),
    "weights that are not there": (
        TRAIN,
        lambda t: [f"--init_from={t / 'nowhere.pt'}"],
        "No such file",
    ),
    "weights with a payload": (
        TRAIN,
        lambda t: [f"--init_from={stored(t / 'a.pt', dict(teacher=Payload(t)))}"],
        "refused",
    ),
    "weights of another backbone": (
        TRAIN,
        lambda t: [f"--init_from={stored(t / 'a.pt', dict(x=torch.zeros(2)))}"],
        "not the weights of a known backbone",
    ),
    "a checkpoint with a payload": (
        TRAIN,
        lambda t: [f"--out_dir={stored(t / 'ckpt.pt', dict(config=Payload(t))).parent}"],
        "refused",
    ),
    "a damaged checkpoint": (
        TRAIN,
        lambda t: [f"--out_dir={written(t / 'ckpt.pt', b'PK0304 and no more').parent}"],
        "ckpt.pt: ",
    ),
    "a folder of another program": (
        TRAIN,
        lambda t: [f"--out_dir={written(t / 'config.json', b'[1, 2]').parent}"],
        "not the config.json of a run",
    ),
    "half a config.json": (
        TRAIN,
        lambda t: [f"--out_dir={written(t / 'config.json', b'{').parent}"],
        "not the config.json of a run",
    ),
    "a checkpoint of another program": (
        TRAIN,
        lambda t: [f"--out_dir={stored(t / 'ckpt.pt', dict(teacher={})).parent}"],
        "not a checkpoint that train.py can continue",
    ),
    **{
        f"a payload for {name}": (
            main,
            lambda t: [f"--ckpt={stored(t / 'a.pt', dict(teacher=Payload(t)))}"],
            "refused",
        )
        for name, main in (
            ("probe", PROBE),
            ("eval_linear", LINEAR),
            ("eval_downstream", DOWN),
            ("eval_seg", SEG),
        )
    },
    **{
        f"no checkpoint for {name}": (
            main,
            lambda t: [f"--ckpt={t / 'nowhere.pt'}"],
            "No such file",
        )
        for name, main in (
            ("probe", PROBE),
            ("eval_linear", LINEAR),
            ("eval_downstream", DOWN),
            ("eval_seg", SEG),
        )
    },
    "a picture as a checkpoint": (LINEAR, lambda t: [f"--ckpt={jpeg(t / 'a.jpg')}"], "a.jpg: "),
    "a text as a checkpoint": (
        SEG,
        lambda t: [f"--ckpt={written(t / 'a.pt', b'hello')}"],
        "not a checkpoint",
    ),
    "a list as a checkpoint": (
        PROBE,
        lambda t: [f"--ckpt={stored(t / 'a.pt', [1, 2])}"],
        "holds a list",
    ),
    "an empty checkpoint": (
        DOWN,
        lambda t: [f"--ckpt={written(t / 'a.pt', b'')}"],
        "not a checkpoint",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_runs_nothing(folder, tmp_path, name):
    main, make, message = MISTAKES[name]
    given = make(tmp_path)
    if main is TRAIN:
        defaults = arguments(data=folder, out_dir=tmp_path / "out")
        given = (
            [a for a in given if not a.startswith("--")]
            + [d for d in defaults if d.split("=")[0] not in {a.split("=")[0] for a in given}]
            + [a for a in given if a.startswith("--")]
        )
    with pytest.raises(UsageError) as error:
        main(given)
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert not (tmp_path / "payload_was_run").exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/secret", "a/../../secret"])
def test_no_list_of_an_archive_leads_out_of_its_folder(tmp_path, name):
    for file, line in (
        ("images.txt", f"1 {name}.jpg"),
        ("image_class_labels.txt", "1 1"),
        ("train_test_split.txt", "1 1"),
    ):
        (tmp_path / file).write_text(line)
    with pytest.raises(UsageError, match="leads out of its folder"):
        sources.open_images(str(tmp_path), "train")
    (tmp_path / "JPEGImages" / "480p").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text(f"judo\n{name}\n")
    with pytest.raises(UsageError, match="leads out of its folder"):
        eval_seg.davis_videos(str(tmp_path))


def test_the_payload_would_run_if_it_were_let_in(tmp_path):
    torch.load(stored(tmp_path / "a.pt", Payload(tmp_path)), weights_only=False)
    assert (tmp_path / "payload_was_run").exists()


def test_there_are_forty_bad_inputs():
    assert len(MISTAKES) + len(IMAGES) >= 58
