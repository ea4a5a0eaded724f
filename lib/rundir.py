"""The folder of a run: lock, config, checkpoint, log.

out_dir/ holds ckpt.pt (all that the next step depends on), backbone.pt (the teacher's backbone, for
timm, torchvision or VMamba), config.json (resolved), log.jsonl (a line has "loss" if it is of
training, "std_full" if it is of an evaluation), views.png (what the network sees).
"""

import errno
import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict

import torch
from tqdm import tqdm

from lib import machine
from lib.checkpoint import read_checkpoint, save_atomically
from lib.config import RENAMED, Config, UsageError

KEYS = {"config", "step", "images", "student", "teacher", "optimizer", "centers"}  # of ckpt.pt
RESUME_OVERRIDABLE = {  # options that a continued run may change: results differ by rounding only
    *("out_dir", "workers", "cache", "max_batch_per_gpu", "loss_chunk", "device", "compile"),
    *("scan", "log_every", "eval_every", "save_every", "probe_at_end", "data_root", "download"),
}


class RunDir:
    """The folder out_dir of a run. .step: the step to do next, 0 in a fresh one."""

    def __init__(self, run, n_images):
        self.run = run
        self.n_images = n_images
        self.step = 0

    def path(self, name):
        return os.path.join(self.run.config.out_dir, name)

    @classmethod
    def open(cls, run, n_images):
        """Load the checkpoint, if there is one, then lock the folder and write config.json.

        UsageError, and nothing written, if another run lives or works there.
        """
        folder = cls(run, n_images)
        folder.restore()
        step = torch.tensor(float(folder.step), device=run.here.device)
        if machine.mean_over_ranks(step) != folder.step:
            raise UsageError(
                f"out_dir={run.config.out_dir}: the machines do not see the same checkpoint there; "
                "give a folder that all of them share"
            )
        if run.here.is_main:
            folder._claim()
            folder.cut_log()
        return folder

    def _claim(self):
        """Lock the folder and write config.json; UsageError if it is another run's."""
        config = self.run.config
        path = self.path("config.json")
        if os.path.exists(path) and self.step == 0:
            there = None
            with open(path) as file, suppress(ValueError):
                there = json.load(file)
            if not isinstance(there, dict):
                raise UsageError(f"{path} is not a run's: choose another --out_dir")
            self._refuse_other(there)
        try:
            os.makedirs(config.out_dir, exist_ok=True)
            self._lock = os.open(self.path(".lock"), os.O_WRONLY | os.O_CREAT, 0o644)
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            with open(path + ".partial", "w") as file:
                json.dump(asdict(config), file, indent=1)
            os.replace(path + ".partial", path)
        except BlockingIOError:
            cause = "another run is at work there; wait for its end, or choose another"
            raise UsageError(f"out_dir={config.out_dir}: {cause}") from None
        except OSError as error:
            raise UsageError(
                f"out_dir={config.out_dir}: {error.strerror}; choose another"
            ) from None

    def _refuse_other(self, there):
        """UsageError if the folder's run has other options than this one, where they matter."""
        here = json.loads(json.dumps(asdict(self.run.config)))
        defaults = {name: field.default for name, field in Config.__dataclass_fields__.items()}
        there = defaults | {RENAMED.get(name, name): there[name] for name in there}
        there = json.loads(json.dumps(there))
        if here["ratio"] == 1.0:  # no split; older runs kept the default
            there["ratio"] = 1.0
        differ = []
        for name in here | there:
            if name not in RESUME_OVERRIDABLE and there.get(name) != here.get(name):
                differ.append(f"{name}={there.get(name)!r} there, {here.get(name)!r} here")
        if differ:
            raise UsageError(
                f"out_dir={self.run.config.out_dir} holds another run ({'; '.join(differ)}): "
                "choose another --out_dir or remove it"
            )

    # --- the checkpoint

    def is_due(self, done):
        """Tell whether a checkpoint follows step `done` - 1: every save_every, and each epoch."""
        every = self.run.config.save_every
        return done % self.run.steps_per_epoch == 0 or bool(every and done % every == 0)

    def save_if_due(self, done, signal=0):
        """Save after `done` steps if that is due, or because a signal ends the run.

        If the disk refuses, the last checkpoint stands and the run goes on: there may be room at
        the next one. UsageError if there is no next one, or the weights are not finite.
        """
        if not self.run.here.is_main or not (self.is_due(done) or signal):
            return
        try:
            self.save(done)
        except OSError as error:
            cause = error.strerror or error
            problem = f"no checkpoint after step {done}: {self.run.config.out_dir}: {cause}"
            if signal or done == self.run.total:
                fix = "make room, then the same command continues from the last one"
                raise UsageError(f"{problem}; {fix}") from None
            tqdm.write(
                f"WARNING: {problem}; the last good one stands, the next is tried in its turn"
            )

    def save(self, done):
        """Write ckpt.pt and backbone.pt, each whole or not at all. OSError if the disk refuses."""
        run = self.run
        tensors = [*run.network.state_dict().values(), *run.teacher.state_dict().values()]
        norms = torch._foreach_norm([x for x in tensors if x.is_floating_point()])
        if not torch.stack(norms).isfinite().all():
            raise UsageError(
                f"the weights are not finite at step {done}: {self.path('ckpt.pt')} holds the last "
                "good state; lower lr, or try precision=fp32"
            )
        os.makedirs(run.config.out_dir, exist_ok=True)  # someone may have removed it
        checkpoint = dict(
            config=asdict(run.config),
            step=done,
            images=self.n_images,
            student=run.network.state_dict(),
            teacher=run.teacher.state_dict(),
            optimizer=run.optimizer.state_dict(),
            centers=run.centers,
            skipped=run.skipped,
            teacher_temp=run.teacher_temp,
        )
        save_atomically(checkpoint, self.path("ckpt.pt"))
        backbone = {name: x.cpu() for name, x in run.teacher.backbone.state_dict().items()}
        save_atomically(backbone, self.path("backbone.pt"))

    def restore(self):
        """Load ckpt.pt into the run, if there is one, and set .step."""
        run = self.run
        path = self.path("ckpt.pt")
        if not os.path.exists(path):
            return
        checkpoint = read_checkpoint(path)
        if not isinstance(checkpoint, dict) or not checkpoint.keys() >= KEYS:
            raise UsageError(
                f"{path}: not a checkpoint that train.py can continue; move it away, or start from "
                "its weights with --init_from in another --out_dir"
            )
        self._refuse_other(checkpoint["config"])
        if checkpoint["images"] != self.n_images:
            raise UsageError(
                f"{run.config.data} has {self.n_images} images, and had {checkpoint['images']} "
                f"when {path} was written: put them back, or choose another --out_dir"
            )
        run.network.load_state_dict(checkpoint["student"])
        run.teacher.load_state_dict(checkpoint["teacher"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        for name, center in run.centers.items():
            center.copy_(checkpoint["centers"][name])
        run.skipped.copy_(checkpoint.get("skipped", run.skipped))
        run.teacher_temp = checkpoint.get(
            "teacher_temp", run.config.teacher_temp
        )  # absent in older files
        self.step = checkpoint["step"]

    # --- the log

    def log(self, **numbers):
        """Append a line to log.jsonl, whole or not at all; if the disk refuses, go on without."""
        if not self.run.here.is_main:
            return
        rounded = {k: round(x, 6) if isinstance(x, float) else x for k, x in numbers.items()}
        line = json.dumps(rounded).encode() + b"\n"
        try:
            os.makedirs(self.run.config.out_dir, exist_ok=True)  # someone may have removed it
            with open(self.path("log.jsonl"), "ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)  # half a line would spoil the next one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            path = self.path("log.jsonl")
            tqdm.write(f"WARNING: step {numbers['step']} is not in {path}: {error.strerror}")

    def records(self):
        """Return the lines of log.jsonl as dicts, on the main rank; [] if there is none."""
        if not self.run.here.is_main or not os.path.exists(self.path("log.jsonl")):
            return []
        with open(self.path("log.jsonl")) as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def cut_log(self):
        """Drop the lines of steps that will be done again, all of them in a fresh run."""
        path = self.path("log.jsonl")
        if os.path.exists(path):
            records = [r for r in self.records() if r["step"] <= self.step and self.step]
            with open(path + ".partial", "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            os.replace(path + ".partial", path)
