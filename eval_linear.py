"""Linear, kNN and ridge probes of frozen backbones: the paper's main tables (its section 4).

    python eval_linear.py --ckpt=out/in100_clever/ckpt.pt --data=/path/to/imagenet
    python eval_linear.py --ckpt=out/demo/ckpt.pt --protocol=fast       (one minute)
    python eval_linear.py --ckpt=out/demo/ckpt.pt --protocol=ridge      (two minutes)
    python eval_linear.py --ckpt=A/ckpt.pt --compare=B/ckpt.pt --untrained=True --seeds=5

paper: linear classifiers on new random crops in each epoch, tested on clean and perturbed images.
    One pass of the backbones over a batch serves all parts (full, ir, ef) and learning rates. A
    held-out slice of the training set chooses the learning rate after the last epoch. The fixed
    rate of the published scripts is reported as well.
fast: the same on cached features of a few random crops of each image.
ridge: kNN and ridge classifiers of class and rotation; view shares and the view's parameters
    (lib/equivariance.py). The untrained backbone is always evaluated too. A row "ir[:d_ef]" has as
    many dimensions as ef.

Every number is appended to results.json beside the checkpoint, with its protocol.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from lib import equivariance, evalstate, evaluation, linear, machine, results, sources
from lib.config import configure, option

PUBLISHED = {  # (method, arch, recipe) -> IN-100, 200 epochs, linear top-1 (authors' README)
    ("dino", "vit_tiny", "caug"): (66.2, 62.6),  # tests: orig, cj+ro
    ("clever", "vit_tiny", "caug"): (68.7, 66.0),
    ("dino", "vit_tiny", "baug"): (71.9, 46.0),
    ("clever", "vit_tiny", "baug"): (74.9, 48.3),
    ("dino", "vit_small", "caug"): (73.2, 71.0),
    ("clever", "vit_small", "caug"): (75.7, 73.6),
    ("dino", "vit_small", "baug"): (75.9, 50.7),
    ("clever", "vit_small", "baug"): (76.7, 50.4),
    ("dino", "resnet18", "caug"): (71.5, 68.7),
    ("clever", "resnet18", "caug"): (74.2, 71.3),
    ("dino", "resnet18", "baug"): (74.4, 46.8),
    ("clever", "resnet18", "baug"): (76.8, 46.5),
    ("dino", "resnet50", "caug"): (78.4, 76.4),
    ("clever", "resnet50", "caug"): (79.1, 77.7),
    ("dino", "resnet50", "baug"): (80.6, 53.8),
    ("clever", "resnet50", "baug"): (81.1, 53.9),
    ("dino", "vmamba_tiny", "caug"): (80.9, 79.5),
    ("clever", "vmamba_tiny", "caug"): (83.0, 81.1),
    ("dino", "vmamba_tiny", "baug"): (83.2, 53.4),
    ("clever", "vmamba_tiny", "baug"): (83.7, 54.4),
}
TESTS = "orig,cj,cj+flip,cj+ro,cj+ro+et,ro,cj+ro180,cj+ro+et50,cj+ro+et150"
LINEAR_ONLY = (  # options that --protocol=ridge does not read, beside views
    *("part", "cut", "tests", "epochs", "batch_size"),
    *("lr", "lrs", "held_out", "knn", "seeds"),
)


@dataclass
class LinearConfig(linear.ClassifierConfig):
    """Options of eval_linear.py: linear, kNN and ridge probes on clean and perturbed images."""

    # fmt: off
    protocol: str = option("paper", "paper: new crops in each epoch; fast: cached features; ridge: "
                           "kNN and ridge", choices=("paper", "fast", "ridge"), group="classifiers")
    tests: str = option(TESTS, "perturbations of the test images, from augment.PERTURBATIONS",
                        group="probe")
    epochs: int = option(100, "passes over the training images", 1, 10**6)
    batch_size: int = option(512, "GLOBAL; the paper's 128 per GPU x 4", 1, 2**24)
    knn: bool = option(True, "also weighted kNN (k 20, temperature 0.07) on the backbone's z")
    # fmt: on

    def __post_init__(self):
        super().__post_init__()
        if self.protocol == "ridge":
            self.untrained = True
            self.refuse(LINEAR_ONLY, "--protocol=ridge")


def published_rows(models, classes, tests):
    """Return the authors' numbers for models and tests of their table, if classes are IN-100's."""
    in100 = Path(__file__).parent / "configs" / "in100_classes.txt"
    if sorted(classes) != sorted(sources.read_classes(in100)):
        return []
    rows = []
    for model in models:
        cell = tuple(model.trained.get(name) for name in ("method", "arch", "recipe"))
        facts = dict(row=f"{model.row}, published", part="full", dims="")
        for test, value in zip(("orig", "cj+ro"), PUBLISHED.get(cell, ())):
            if test in tests:
                rows.append(dict(facts, classifier="linear, 200 epochs", test=test, value=value))
    return rows


def main(argv):
    since = time.perf_counter()
    config = configure(LinearConfig, argv)
    tests = linear.perturbation_tests(config.tests)
    here, models, trained, size, folder = evaluation.start(config)
    config.data, config.classes = evaluation.data_of(config, trained)
    is_ridge = config.protocol == "ridge"
    task = linear.class_task("probe" if is_ridge else "linear", config, size)
    task = task._replace(tests=tests)
    about = f"{config.protocol} protocol"
    if not is_ridge:
        fit, _ = sources.hold_out(task.train.labels, config.held_out, config.seed)
        config.batch_size = evaluation.batch_size_of(config.batch_size, len(fit), here.world)
        about += f", {config.held_out:.0%} held out, {config.epochs} epochs"
        about += f", batch {config.batch_size}"
    evaluation.announce(about, task, here)
    protocol = results.protocol_of(config, models, here, img_size=size, **task.facts())
    state = evalstate.EvalState(folder, protocol)
    if is_ridge:
        given = (models, task.train, task.test, size, here, config.workers, config.seed)
        rows, verdict = equivariance.ridge_protocol(*given, save_correct=config.save_correct)
        published = []
    else:
        rows = linear.linear_probe(models, task, config, size, here, state, config.knn)
        published = published_rows(models, task.train.classes, {row["test"] for row in rows})
    results.finish(state, protocol, time.perf_counter() - since, rows, published)
    if is_ridge and here.is_main:
        equivariance.tell(rows, verdict, Path(folder) / "view_share.png")


if __name__ == "__main__":
    machine.run_main(
        main, "stopped; the same command continues after the last finished epoch (ridge: anew)"
    )
