"""Pre-train CLeVER, DINO, DDCL or SimSiam. lib/rundir.py lists the files of out_dir.

python train.py configs/demo.py                                one process: CPU or one GPU
torchrun --nproc_per_node=4 train.py configs/in100_clever.py   one process for each GPU
python train.py configs/demo.py --epochs=5 --out_dir=out/try   any option; --help lists them
"""

import math
from collections import defaultdict
from contextlib import nullcontext

from lib import data, fused, machine
from lib.config import Config, configure
from lib.monitor import Monitor
from lib.run import Run
from lib.rundir import RunDir

import torch

import losses
import vmamba
from augment import RECIPES
from model import BACKBONES, build_network


def cosine(step, start, end, total):
    """Go from `start` at step 0 to `end` at the last step, total - 1, along half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(total - 1, 1)))


def learning_rate(step, config, steps_per_epoch):
    """Warm up linearly from 0 to lr * batch_size / 256, then follow a cosine to min_lr."""
    peak = config.lr * config.batch_size / 256
    warmup = int(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * step / warmup
    return cosine(step - warmup, peak, config.min_lr, config.epochs * steps_per_epoch - warmup)


def teacher_temperature(step, config, steps_per_epoch):
    """Go linearly from teacher_temp_start to teacher_temp over teacher_temp_epochs."""
    start, end = config.teacher_temp_start, config.teacher_temp
    warmup = config.teacher_temp_epochs * steps_per_epoch
    return start + min(1.0, step / warmup) * (end - start) if warmup else end


def distil(run, views, scale):
    """DINO and CLeVER: student against teacher; views [(2, B, 3, G, G), (L, B, 3, l, l)]."""
    config = run.config
    terms, means = {}, {}
    with torch.no_grad():
        teacher = run.teacher(views[:1])  # z_ir, z_ef; ir, ef: unit vectors (2, B, bottleneck)
    student = run.student(views, scale)  # the same of all V views

    def head_loss(kind, name):
        ours = getattr(student, name), run.network.heads[name].last_layer
        targets = getattr(teacher, name), run.teacher.heads[name].last_layer
        center, temp = run.centers[name], run.teacher_temp
        if name == "ef" and config.orth_views == "student":  # of its own, without a center
            targets = ours[0][:2], ours[1]
            center, temp = torch.zeros_like(center), config.student_temp
        compute = fused.prototype_loss if config.fused else fused.plain_loss
        given = *ours, *targets, center, (config.student_temp, temp), config.loss_chunk
        return compute(losses.PAIR_TERMS[kind], *given)  # -> loss, targets' mean logits, entropy

    # L_CL: ir agrees between the views of an image
    terms["L_CL"], means["ir"], entropy = head_loss("cross-entropy", "ir")
    logged = {"H_ir": entropy, "KL": terms["L_CL"].detach() - entropy}  # KL: still to learn
    # L_Orth: ef differs between them; L_PReg: and not because its head shrinks to nothing
    if student.ef is not None:
        terms["L_Orth"], means["ef"], logged["H_ef"] = head_loss(config.orth, "ef")
        terms["L_PReg"] = losses.projection_regularization(*run.network.heads.values())
    return terms, means, logged


def siamese(run, views, scale):
    """SimSiam and DDCL: two views [(2, B, 3, G, G)] predict each other; there is no teacher."""
    student = run.student(views[0].split(1), scale and scale[0].split(1))  # batch norm by view
    z, p = student.ir  # projections and predictions, (2, B, hidden) each
    terms = {"L_CL": losses.simsiam_loss(p, z)}
    if student.ef is not None:
        z, p = student.ef
        terms["L_Orth"] = losses.ddcl_orthogonality(p, z, run.config.orth, machine.mean_over_ranks)
        ir, ef = run.network.head_ir, run.network.head_ef
        pairs = (ir.projector, ef.projector), (ir.predictor, ef.predictor)
        terms["L_PReg"] = sum(losses.projection_regularization(*pair) for pair in pairs) / 2
    return terms, {}, {}


METHODS = {  # name: (f, z is split into ir and ef, kind of head; only "prototypes" has a teacher)
    # f(run, views, drop path's scale) -> loss terms, the teacher's mean logits, what else to log
    "clever": (distil, True, "prototypes"),
    "dino": (distil, False, "prototypes"),
    "ddcl": (siamese, True, "siamese"),
    "simsiam": (siamese, False, "siamese"),
}
WEIGHTS = {"L_CL": "alpha", "L_Orth": "beta", "L_PReg": "lambda_preg"}  # loss term: its option


def backward(run, batch):
    """Add up the gradients of a rank's share, in parts if it is too large.

    Returns the means over the share: what to log (0-dim), the targets' logits of each head (K,).
    """
    config = run.config
    logged, teacher_means = defaultdict(float), defaultdict(float)
    parts = data.split_batch(batch, config.max_batch_per_gpu)
    for i, part in enumerate(parts):
        # crops -> augmented, normalized views; which paths the student drops
        views = run.views(part)
        scale = run.drop_path_scales(part.seeds, views)

        # L = alpha L_CL + beta L_Orth + lambda L_PReg + any other term, which weighs 1 unless
        # WEIGHTS names its option; ranks exchange gradients once
        with run.student.no_sync() if run.here.world > 1 and i + 1 < len(parts) else nullcontext():
            with run.here.autocast():
                terms, means, more = METHODS[config.method][0](run, views, scale)
            weight = {n: getattr(config, WEIGHTS[n]) if n in WEIGHTS else 1.0 for n in terms}
            loss = sum(weight[name] * term for name, term in terms.items())
            (loss / len(parts)).backward()
        for head, mean in means.items():
            teacher_means[head] += mean / len(parts)
        for name, value in {"loss": loss, **terms, **more}.items():
            logged[name] += value.detach() / len(parts)
    return logged, teacher_means


def train_step(run, step, batch):
    """Do one step on this rank's share, a data.Batch -> {name: 0-dim mean} to log. Never waits."""
    config = run.config
    # schedules
    lr = learning_rate(step, config, run.schedule_epoch)
    decay = cosine(step, config.weight_decay, config.weight_decay_end, run.total)
    momentum = cosine(step, config.teacher_momentum, 1.0, run.total)
    run.teacher_temp = teacher_temperature(step, config, run.schedule_epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = decay if group["decays"] else 0.0

    # gradients, each clipped by itself; the prototypes are frozen at first
    logged, teacher_means = backward(run, batch)
    is_finite = run.clip_gradients()
    if run.has_teacher and step < config.freeze_last_layer * run.schedule_epoch:
        for head in run.network.heads.values():
            head.last_layer.weight_v.grad = None

    # student: AdamW or SGD; if a gradient is not finite, the device skips the update
    run.step_optimizer(is_finite)

    # teacher <- m teacher + (1 - m) student; centers <- an EMA of its logits (not if skipped)
    if run.has_teacher:
        pair = list(run.teacher.parameters()), list(run.network.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(*pair, 1 - momentum)
    for head, mean in teacher_means.items():
        whole_mean = torch.where(is_finite, machine.mean_over_ranks(mean), torch.nan)
        losses.update_center(run.centers[head], whole_mean, config.center_momentum)
    return logged


def make_run(config, steps_per_epoch, here):
    """Build a run from config.seed: student, teacher, optimizer, centers."""
    _, has_split, head = METHODS[config.method]
    config.ratio = config.ratio if has_split else 1.0
    torch.manual_seed(config.seed)
    network = build_network(config, head)
    run = Run(network, head == "prototypes", config, steps_per_epoch, here)
    run.teacher_temp = teacher_temperature(0, config, run.schedule_epoch)
    return run


def main(argv):
    tables = dict(method=METHODS, orth=losses.PAIR_TERMS, recipe=RECIPES, arch=BACKBONES)
    config = configure(Config, argv, **tables)
    here = machine.join(config.device, config.precision)
    vmamba.set_backend(config.scan, here.device)

    # errors in the options or the data are found before anything is written
    train_set, val_set = data.open_for_training(config, here)
    run = make_run(config, len(train_set) // config.batch_size, here)
    monitor = Monitor(run, train_set, val_set)
    folder = RunDir.open(run, len(train_set))
    monitor.begin(folder)

    with machine.catch_signals() as pending:
        batches = data.train_loader(train_set, config, folder.step, run.total, here)
        for step, batch in enumerate(monitor.watch(batches), folder.step):
            logged = train_step(run, step, batch)
            signal = pending()
            monitor.step(step + 1, logged, signal)
            folder.save_if_due(step + 1, signal)
            if signal:
                machine.leave(signal, f"step {step + 1}")
            monitor.epoch_end(step + 1)
    monitor.finish()
    machine.wait_for_ranks()


if __name__ == "__main__":
    machine.run_main(main, "stopped; the same command continues from the last checkpoint", __doc__)
