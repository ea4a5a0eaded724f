"""What you see while a run trains: first screen, progress bar, log lines, kNN, warnings.

A line of log.jsonl from an evaluation has, for the parts full, ir, ef of the teacher's z:
std_*, rank_* (features.std_and_rank), knn_*, knn_rotated_* (top-1 in %), view_share_* and
view_share_white_* (equivariance.view_share); for the heads the numbers of collapse.metrics.
"""

import functools
import math
import sys
import time
from collections import defaultdict
from dataclasses import asdict

from lib import collapse, curves, data, equivariance, evaluation, features, machine, results
from lib.run import refuse_to_skip_more
from lib.screen import first_screen, views_picture

import torch
from tqdm import tqdm

from augment import perturbation

MAX_CONSECUTIVE_SKIPS = 3  # last steps without a finite gradient at which a run stops


class Monitor:
    """Watch a run. Call begin; for each step watch, step and epoch_end; at the end finish."""

    def __init__(self, run, train_set, val_set):
        self.run = run
        self.train_set = train_set
        self.val_set = val_set
        if run.here.is_main:  # decoded now: if that fails, nothing is written
            self.whole, self.shown = data.first_batch(train_set, run.config, 6, run.here)
        self.broken = data.BrokenFiles(len(train_set))
        self.history = defaultdict(list)  # name -> values of the steps since the last line
        self.numbers = {}  # what was last logged
        self.is_late = run.here.device.type == "cuda"  # lines come one window late
        self.unwritten = []  # what _write needs for the next line, or nothing
        self.waited = 0.0  # seconds, for batches, since the last line
        self.since = time.perf_counter()
        self.has_labels = val_set is not None and train_set.labels.min() >= 0
        self.model = None  # with features for the table at the end

    @functools.cached_property
    def first_batch(self):
        n = min(self.run.config.batch_size, 256)
        return data.first_batch(self.train_set, self.run.config, n, self.run.here)[1]

    def begin(self, folder):
        """Print the first screen, write views.png, evaluate if that is due; start the bar."""
        run = self.run
        self.folder = folder
        step = folder.step
        if run.here.is_main:
            print(first_screen(run, step, self.train_set), flush=True)
        if step == 0:
            if run.here.is_main:
                picture = views_picture(run, self.whole, self.shown)
                picture.save(folder.path("views.png"))
            folder.log(step=0, epoch=0.0, **collapse.metrics(run, self.first_batch))
        elif not self._was_evaluated(step):  # the run was stopped after the checkpoint, before this
            self.numbers = next((r for r in reversed(folder.records()) if "loss" in r), {})
            self.epoch_end(step)
        if step == run.total and run.here.is_main:
            curves.draw_if_possible(run.config.out_dir)
            print(
                f"{run.config.out_dir} is finished: nothing to train. To train longer, set "
                "--epochs and another --out_dir: --epochs changes the whole schedule"
            )
        seconds = 0.5 if sys.stderr.isatty() else 30
        look = dict(unit="step", smoothing=0.1, dynamic_ncols=True, mininterval=seconds)
        is_off = not run.here.is_main or step == run.total
        self.bar = tqdm(total=run.total, initial=step, disable=is_off, **look)
        self.since = time.perf_counter()

    def watch(self, batches):
        """Yield the batches; measure the wait for them and report broken files."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.broken.report(batch.broken, tqdm.write)
            yield batch

    def step(self, done, logged, signal):
        """Store what step `done` returned; log every log_every steps, or at a signal.

        Log also before each checkpoint, so that a continued run logs the same averages, and before
        each evaluation. On a GPU a line is written when the next one is due, or before such a stop:
        nothing else waits for the device. Too many skipped steps are noticed only then, too.
        """
        for name, value in logged.items():
            self.history[name].append(value)
        stops = signal or self.folder.is_due(done) or self.is_evaluated(done)
        if stops or (done - 1) % self.run.config.log_every == 0:
            self._write()
            self._average(done, stops)
            if stops or not self.is_late:
                self._write()
        self.bar.update()
        if signal:
            self.bar.close()

    def _average(self, done, stops):
        """Average the history over steps and ranks for a line; stops: wait for the device."""
        run, n = self.run, len(self.history["loss"])
        stacked = [torch.stack(values) for values in self.history.values()]
        means = [x.nan_to_num(math.nan, math.nan, math.nan).nanmean() for x in stacked]
        means += [x[-1] for x in stacked]  # of the last step
        means = machine.mean_over_ranks(torch.stack(means))
        means, wait = start_copy(torch.cat([means.double(), run.skipped.double()]))
        if stops:
            wait()  # so that the speed counts all the work of these steps
        seconds = time.perf_counter() - self.since
        speed = {"lr": run.optimizer.param_groups[0]["lr"]}
        speed["img_per_s"] = n * run.config.batch_size / seconds
        speed["data_wait"] = self.waited / seconds
        self.unwritten.append((done, list(self.history), means, wait, speed))
        self.history.clear()
        self.waited = 0.0
        self.since = time.perf_counter()

    def _write(self):
        """Write the waiting line, if any; stop a run that skips too many steps in a row."""
        while self.unwritten:
            done, names, means, wait, speed = self.unwritten.pop()
            wait()
            *means, skipped, in_a_row = means.tolist()
            if in_a_row >= MAX_CONSECUTIVE_SKIPS:
                last = dict(zip(names, means[len(names) :]))
                terms = [n for n in last if n.startswith("L_") and not math.isfinite(last[n])]
                steps = done - int(in_a_row), done - 1
                refuse_to_skip_more(self.run, *steps, len(self.train_set), terms)
            counts = {"skipped": int(skipped)} if skipped else {}
            self.numbers = dict(zip(names, means)) | counts | speed
            self.folder.log(step=done, epoch=done / self.run.steps_per_epoch, **self.numbers)
            shown = [f"{k} {v:.4g}" for k, v in self.numbers.items() if k[0] in "lL"]
            shown.append("{img_per_s:.0f} img/s  data {data_wait:.0%}".format(**speed))
            self.bar.set_postfix_str("  ".join(shown), refresh=False)

    def is_evaluated(self, done):
        """Tell whether an evaluation follows: every eval_every epochs and at the end of the run."""
        every = self.run.config.eval_every * self.run.steps_per_epoch
        return done == self.run.total or bool(every and done % every == 0)

    def epoch_end(self, done):
        """Evaluate after `done` steps, if that is due."""
        run = self.run
        if self.folder.is_due(done):
            self.since = time.perf_counter()  # a checkpoint was written
        if not self.is_evaluated(done):
            return
        epoch = done / run.steps_per_epoch
        numbers = self.evaluate(is_last=done == run.total)
        records = self.folder.records()
        warms_up = run.config.teacher_temp_epochs > 0  # then probabilities shrink by themselves
        if records and not warms_up:
            numbers |= collapse.share_of_lengths(records[0], numbers)
        self.folder.log(step=done, epoch=epoch, **numbers)
        if run.here.is_main:
            names = [n for n in numbers if n.startswith(("knn", "rank_", "view_share_", "norm"))]
            tqdm.write(f"epoch {epoch:.4g}: " + "  ".join(f"{n} {numbers[n]:.3g}" for n in names))
            for warning in collapse.warnings(self.numbers | numbers, run.config):
                tqdm.write(f"WARNING: {warning}")
            curves.draw_if_possible(run.config.out_dir)
        self.since = time.perf_counter()

    def _was_evaluated(self, step):
        """Tell all ranks whether the log holds the evaluation after `step`."""
        found = any(r["step"] == step and "std_full" in r for r in self.folder.records())
        return machine.broadcast(found)

    @torch.compiler.set_stance("force_eager")  # else compiled once for each batch size
    def evaluate(self, is_last=False):
        """Return {name: number}: kNN of each part on clean and rotated images, collapse metrics."""
        run = self.run
        config = run.config
        model = evaluation.model_of(run)
        common = dict(size=config.img_size, here=run.here, workers=config.workers)
        numbers = collapse.metrics(run, self.first_batch)
        val_z = ()
        if is_last and self.needs_table():  # more of the same features
            sets = (self.train_set, self.val_set)
            of_train, of_val = features.ridge_features(model, *sets, seed=config.seed, **common)
            self.model = model._replace(ridge_features=(of_train, of_val))
            (z, *_), y = of_train
            (clean, *_, rotated), val_y = of_val
            val_z = (clean, rotated)
        else:
            views = [perturbation("orig"), perturbation("ro", config.seed)]
            extract = functools.partial(features.extract, model.backbone, **common)
            [z], y = extract(self.train_set, views[:1], progress="kNN: features of train")
            if self.has_labels:
                val_z, val_y = extract(self.val_set, views, progress="kNN: features of val")
        for part, columns in features.part_slices(model.backbone.dim, model.d_ir).items():
            std, rank = features.std_and_rank(z[:, columns])
            numbers |= {f"std_{part}": std, f"rank_{part}": rank}
            for name, x in zip(("knn", "knn_rotated"), val_z):
                right = features.knn_correct(z[:, columns], y, x[:, columns], val_y)
                numbers[f"{name}_{part}"] = results.percent(right)
        shown = self.val_set if self.has_labels else self.train_set
        return numbers | equivariance.shares_to_log(model, shown, config, run.here)

    def needs_table(self):
        """Tell whether the run ends with a table: probe_at_end, labels, and no table yet."""
        wanted = self.run.config.probe_at_end and self.has_labels
        path = self.folder.path("results.json")  # evaluations write it too, with other options
        return wanted and not any("max_steps" in e["protocol"] for e in results.read_results(path))

    @torch.compiler.set_stance("force_eager")
    def finish(self):
        """With probe_at_end: print the table of this run beside the same backbone untrained."""
        self.bar.close()
        config, here = self.run.config, self.run.here
        if not self.needs_table():
            if config.probe_at_end and not self.has_labels and here.is_main:
                print("no table: a probe needs labels, that is folders train/CLASS and val/CLASS")
            return
        start = time.perf_counter()
        untrained = evaluation.untrained_model(vars(config), config.seed, here)
        models = [untrained, self.model or evaluation.model_of(self.run)]
        given = (self.train_set, self.val_set, config.img_size, here, config.workers, config.seed)
        rows, verdict = equivariance.ridge_protocol(models, *given, parameters=False)
        if here.is_main:
            print("", *results.table_lines(rows), "", sep="\n")
            equivariance.tell(rows, verdict, self.folder.path("view_share.png"))
            seconds = time.perf_counter() - start
            path = self.folder.path("results.json")
            results.append_results(path, "probe", asdict(config), seconds, rows)


def start_copy(x):
    """Start to copy x to the host -> the copy, and wait(): after it the copy is complete."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
    if not x.is_cuda:
        return host, lambda: None
    return host, torch.cuda.current_stream().record_event().synchronize
