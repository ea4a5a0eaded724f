"""How classifiers train, and the state from which an interrupted evaluation continues."""

import fcntl
import json
import os
from pathlib import Path

from lib import data, features, machine
from lib.checkpoint import digest, read_checkpoint, save_atomically
from lib.config import UsageError
from lib.results import revision

import torch

MACHINE = ("workers", "device", "out", "data_root", "download")  # options that change no number


class EvalState:
    """The file beside results.json from which an interrupted evaluation continues.

    protocol: of protocol_of. Its digest, with the revision, in the file's name tells the evaluation
    from others. UsageError if another process does the same one.
    """

    def __init__(self, folder, protocol):
        differs = {name: value for name, value in protocol.items() if name not in MACHINE}
        self.is_main = machine.rank_and_world()[0] == 0
        differs["commit"] = revision() if self.is_main else None  # it asks git
        name = digest([json.dumps(differs, sort_keys=True).encode()])
        self.path = os.path.join(folder, f"{protocol['task']}-{name}.partial.pt")
        if self.is_main:
            self.lock = os.open(f"{self.path}.lock", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            except BlockingIOError:
                fix = "wait until it ends, or give another --out"
                raise UsageError(f"{self.path}: another evaluation writes it; {fix}") from None
            except OSError:  # a file system without locks
                pass

    def read(self):
        """Return the finished rows, and the state written last: the same on all ranks.

        [] and {} if nothing was written.
        """
        is_read = self.is_main and os.path.exists(self.path)
        state = machine.broadcast(read_checkpoint(self.path) if is_read else None)
        if state is None:
            return [], {}
        if self.is_main:
            print(f"continuing {self.path}", flush=True)
        return state["rows"], state

    def write(self, **state):
        """Write the finished rows, which module trains (None: none), and its CosineSGD's state."""
        if self.is_main:
            save_atomically(state, self.path)

    def remove(self):
        """Remove the file: the evaluation is finished."""
        if self.is_main:
            Path(self.path).unlink(missing_ok=True)
            Path(f"{self.path}.lock").unlink(missing_ok=True)


class CosineSGD:
    """SGD with momentum 0.9 and a cosine to 0 over config.epochs: how all classifiers train.

    groups: the optimizer's, with lr per 256 images. n: of training images. steps: a data.Schedule;
    begun: the state of an interrupted training of this module, {} if there is none.
    """

    def __init__(self, module, groups, n, seed, config, here, begun):
        self.here = here
        self.per_epoch = n // config.batch_size
        groups = [group | dict(lr=group["lr"] * config.batch_size / 256) for group in groups]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        self.learners = dict(module=module, optimizer=optimizer, scheduler=scheduler)
        if begun:
            for name, learner in self.learners.items():
                learner.load_state_dict(begun[name])
        limits = begun.get("epoch", 0) * self.per_epoch, config.epochs * self.per_epoch
        self.steps = data.Schedule(n, config.batch_size, seed, *limits, here.rank, here.world)
        self.module = module
        if here.world > 1:
            self.module = torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    def epochs(self, batches, loss_of, name):
        """Train on batches (x, labels); after each epoch yield its last loss and the state.

        loss_of(module, x, labels) -> loss.
        """
        optimizer, scheduler = self.learners["optimizer"], self.learners["scheduler"]
        start, stop = self.steps.start, self.steps.stop
        bar = features.progress_bar(batches, self.here, name, total=stop, initial=start)
        for step, batch in enumerate(bar, start + 1):
            loss = loss_of(self.module, *batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % self.per_epoch == 0:
                scheduler.step()
                state = {name: learner.state_dict() for name, learner in self.learners.items()}
                yield loss.detach(), dict(epoch=step // self.per_epoch, **state)
