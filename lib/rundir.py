"""The folder of a run: lock, config, checkpoint, log.

out_dir/ holds ckpt.pt (all that the next step depends on), ckpt.prev.pt (the checkpoint before it,
if ckpt.pt is damaged), backbone.pt (the teacher's backbone, for timm, torchvision or VMamba),
config.json (all options), log.jsonl (a line of training has "loss", one of an evaluation
"std_full", that of step 0 collapse metrics alone), views.png (what the network sees), curves.png.
"""

import atexit
import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from lib import boards, log, machine
from lib.checkpoint import CHECKPOINT, PREVIOUS, Damaged, read_checkpoint, save_atomically, to_host
from lib.config import Config, UsageError
from lib.results import revision

import torch
from tqdm import tqdm

RESUME_OVERRIDABLE = {  # options that a continued run may change (docs/fault_tolerance.md)
    *("out_dir", "workers", "cache", "max_batch_per_gpu", "loss_chunk", "device", "compile"),
    *("scan", "log_every", "eval_every", "save_every", "save_every_epochs", "probe_at_end"),
    *("data_root", "download", "tensorboard", "wandb", "revision"),
}


class RunDir:
    """The folder out_dir of a run. .step: the step to do next, 0 in a fresh one."""

    def __init__(self, run, n_images):
        self.run = run
        self.n_images = n_images
        self.step = 0
        self.in_thread = run.here.device.type == "cuda"  # on a CPU it would compete for the cores
        self.writer = ThreadPoolExecutor(1)
        self.writing = []  # the checkpoint that the thread writes: a future, or none
        now = revision() if run.here.is_main else None  # it asks git
        self.config_json = json.dumps(asdict(run.config) | dict(revision=now), indent=1)
        self.open_boards = boards.import_boards(run.config)
        self.boards = []  # functions that log the numbers to other places
        self.damaged = ""  # the damaged checkpoint that ckpt.prev.pt replaces

    def path(self, name):
        return os.path.join(self.run.config.out_dir, name)

    @classmethod
    def open(cls, run, n_images):
        """Load the checkpoint, if there is one, then lock the folder and write config.json.

        UsageError if another run is there; then nothing is written.
        """
        folder = cls(run, n_images)
        folder.restore()
        step = torch.tensor(float(folder.step), device=run.here.device)
        if machine.mean_over_ranks(step) != folder.step:
            cause = f"out_dir={run.config.out_dir}: the machines see different checkpoints in it"
            raise UsageError(f"{cause}; give a folder that all machines share")
        if run.here.is_main:
            folder._claim()
            folder.boards = [open_(run.config, folder.step) for open_ in folder.open_boards]
            if folder.in_thread:
                atexit.register(folder.wait)  # however the run ends
        return folder

    def _claim(self):
        """Lock the folder and write config.json; UsageError if it is another run's."""
        config = self.run.config
        path = self.path("config.json")
        now = revision()
        there = log.read_config(config.out_dir)
        if self.step == 0 and os.path.exists(path):
            if not there:
                raise UsageError(f"{path}: not the config.json of a run; choose another --out_dir")
            self._refuse_other(there)
        elif there.get("revision", now) != now:
            tqdm.write(f"NOTE: revision {there['revision']} wrote {config.out_dir}, this is {now}")
        try:
            os.makedirs(config.out_dir, exist_ok=True)
            self._lock = os.open(self.path(".lock"), os.O_WRONLY | os.O_CREAT, 0o644)
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            if self.damaged:
                os.replace(self.path(PREVIOUS), self.damaged)
            log.replace(path, self.config_json)
            log.cut(self.path("log.jsonl"), self.step)
        except OSError as error:
            cause = f"{error.strerror}; choose another"
            if isinstance(error, BlockingIOError):
                cause = "another run is writing to it; wait until it ends, or choose another"
            raise UsageError(f"out_dir={config.out_dir}: {cause}") from None

    def _refuse_other(self, there):
        """UsageError if the run in the folder has other options, except RESUME_OVERRIDABLE."""
        here = json.loads(json.dumps(asdict(self.run.config)))
        there = json.loads(json.dumps(asdict(Config()) | there))  # a new option: its default
        differ = []
        for name in here | there:
            if name not in RESUME_OVERRIDABLE and there.get(name) != here.get(name):
                differ.append(f"{name}={there.get(name)!r} there, {here.get(name)!r} here")
        if differ:
            raise UsageError(
                f"out_dir={self.run.config.out_dir}: holds another run ({'; '.join(differ)}); "
                "choose another --out_dir, or remove the folder"
            )

    # --- the checkpoint

    def is_due(self, done):
        """Tell whether a checkpoint follows step `done` - 1: by epochs, by steps, at the end."""
        config = self.run.config
        steps = self.run.steps_per_epoch * config.save_every_epochs
        return any(done % n == 0 for n in (self.run.total, steps, config.save_every or steps))

    def save_if_due(self, done, signal=0):
        """Save after `done` steps if that is due, or because a signal ends the run."""
        if self.run.here.is_main and (self.is_due(done) or signal):
            self.save(done, is_last=bool(signal) or done == self.run.total)

    def save(self, done, is_last=False):
        """Wait for the last checkpoint, copy the run to the host and write: on a GPU in a thread.

        is_last: return when it is on the disk. UsageError if the weights are not finite.
        """
        run = self.run
        tensors = [*run.network.state_dict().values(), *run.teacher.state_dict().values()]
        norms = torch._foreach_norm([x for x in tensors if x.is_floating_point()])
        if not torch.stack(norms).isfinite().all():
            cause = f"the weights are not finite at step {done}"
            raise UsageError(f"{cause}; {run.after_infinity()}")
        self.wait()
        checkpoint = dict(config=asdict(run.config), step=done, images=self.n_images) | run.state()
        # ckpt.pt last: when it is there, all is
        files = {"backbone.pt": run.teacher.backbone.state_dict(), CHECKPOINT: checkpoint}
        if self.in_thread:
            files = to_host(files)  # the next step changes them in place
        if self.in_thread and not is_last:
            self.writing.append(self.writer.submit(self._write, done, files))
        else:
            self._write(done, files, is_last)

    def wait(self):
        """Wait until the thread has written its checkpoint; raise its error, if any."""
        while self.writing:
            self.writing.pop().result()

    def _write(self, done, files, is_last=False):
        """Write {name: content}, each file whole or not at all.

        If that fails, the last checkpoint stays and the run continues: the next one may succeed.
        UsageError if there is no next one.
        """
        try:
            os.makedirs(self.run.config.out_dir, exist_ok=True)  # someone may have removed it
            log.replace(self.path("config.json"), self.config_json)
            for name, content in files.items():
                previous = self.path(PREVIOUS) if name == CHECKPOINT else ""
                save_atomically(content, self.path(name), previous)
        except OSError as error:
            cause = error.strerror or error
            problem = f"no checkpoint after step {done}: {self.run.config.out_dir}: {cause}"
            if is_last:
                fix = "make room; the same command continues from the last checkpoint"
                raise UsageError(f"{problem}; {fix}") from None
            fix = "the last good one stands; the run continues and saves again later"
            tqdm.write(f"WARNING: {problem}; {fix}")

    def restore(self):
        """Load ckpt.pt into the run, if there is one, and set .step.

        If it is damaged, load ckpt.prev.pt instead, and say so.
        """
        run = self.run
        path = self.path(CHECKPOINT)
        if not os.path.exists(path):
            return
        try:
            checkpoint = read_checkpoint(path)
        except Damaged as error:
            self.damaged, path = path, self.path(PREVIOUS)
            if not os.path.exists(path):
                fix = "remove it to start again, or choose another --out_dir"
                raise Damaged(error.cause, fix) from None
            checkpoint = read_checkpoint(path)
            if run.here.is_main:
                tqdm.write(f"WARNING: {error.cause}; continuing from {path}, one earlier")
        needed = run.state().keys() | {"config", "step", "images"}
        if not isinstance(checkpoint, dict) or not checkpoint.keys() >= needed:
            raise UsageError(
                f"{path}: not a checkpoint that train.py can continue; move it away, or start from "
                "its weights with --init_from in another --out_dir"
            )
        self._refuse_other(checkpoint["config"])
        if checkpoint["images"] != self.n_images:
            raise UsageError(
                f"data={run.config.data}: has {self.n_images} images, not {checkpoint['images']} "
                f"as when {path} was written; restore them, or choose another --out_dir"
            )
        run.load(checkpoint)
        self.step = checkpoint["step"]

    # --- the log

    def log(self, **numbers):
        """Append a line to log.jsonl, whole or not at all; if that fails, warn and continue."""
        if not self.run.here.is_main:
            return
        path = self.path("log.jsonl")
        try:
            log.append(path, numbers)
            for board in self.boards:
                board(numbers)
        except OSError as error:
            tqdm.write(f"WARNING: step {numbers['step']} is not in {path}: {error.strerror}")

    def records(self):
        """Return the lines of log.jsonl as dicts, on the main rank; [] if there is none."""
        return log.records(self.path("log.jsonl")) if self.run.here.is_main else []
