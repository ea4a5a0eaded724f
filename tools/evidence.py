"""Which of the paper's claims our runs reproduce: differences between runs, with intervals.

    python tools/evidence.py --runs=results/tinyin40_seen                              the table
    python tools/evidence.py --runs=results/tinyin40_seen --picture=docs/evidence.png  its picture

--runs has a folder for each seed, seed0, seed1, ..., or for each setting, SETTING/seed0, ... In it
lies the results.json that the evaluations of a CLeVER and a DINO run of that seed wrote
(eval_linear.py and eval_downstream.py with --save_correct=True; eval_seg.py).

Both sides saw the same images, perturbed alike, in the same order, so a difference is taken image
by image and seed by seed. Its three intervals, of 95 % each:
over seeds: Student's t of the seeds' differences; what other runs would give on these images.
over images: a bootstrap of the images' differences, averaged over seeds; what these runs would give
  on other images.
over both, 95 % or more: its half width is the root of the sum of squares of the two. It decides
  whether a claim is reproduced, contradicted or undecided.
A single seed tells only which side is ahead on its images. Of eval_seg.py, which gives one number a
seed, the seeds alone decide: they cover both sources of chance where each seed has its own
images, as the built-in shapes do. No correction is made for the number of claims.
"""

import glob
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib.config import UsageError, configure, option
from lib.machine import run_main
from lib.results import read_results, unpack_correct

LINEAR = ("linear", "linear, chosen lr")  # task and classifier
RIDGE = ("probe", "ridge")
KNN = ("probe", "kNN")
# Student's t, two-sided, 95 %, by degrees of freedom
T_95 = (np.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
BOOTSTRAPS = 10_000
SEG_METHODS = {"davis": "propagated", "saliency": "TokenCut"}  # tasks of eval_seg.py


class Claim(NamedTuple):
    """That the side `better` beats the side `worse`; a side is "setting/row/part".

    measure: (task, classifier, test) as in results.json; of ridge probes and kNN the metric is the
    test. beyond: two more sides, whose own difference the gain must exceed.
    """

    name: str
    measure: tuple
    better: str
    worse: str
    beyond: tuple = ()

    def sides(self):
        return self.better, self.worse, *self.beyond

    def in_words(self):
        """Return what stands on each side; for gains: 'caug+ clever full - dino full'."""
        words = [side.replace("/", " ").strip() for side in self.sides()]
        if self.beyond:
            words = [f"{a} - {b.split(' ', 1)[1]}" for a, b in zip(words[::2], words[1::2])]
        return words


# fmt: off
PAIR_CLAIMS = [  # of a CLeVER run and the DINO run beside it: name, measure, better, worse
    # C0 is ours, not the paper's: DINO has learnt something; if not, the others say nothing
    ("C0", (*LINEAR, "orig"), "dino/full", "untrained/full"),
    ("C0", (*RIDGE, "class"), "dino/full", "untrained/full"),
    ("C1", (*LINEAR, "orig"), "clever/full", "dino/full"),
    ("C2", (*LINEAR, "cj+ro"), "clever/full", "dino/full"),
    ("C2", (*LINEAR, "cj+ro+et"), "clever/full", "dino/full"),
    ("C1", (*RIDGE, "class"), "clever/full", "dino/full"),
    ("C2", (*RIDGE, "class, rotated"), "clever/full", "dino/full"),
    ("C1", (*KNN, "kNN"), "clever/full", "dino/full"),
    ("C2", (*KNN, "kNN, rotated"), "clever/full", "dino/full"),
    ("C3", (*LINEAR, "ro"), "clever/full", "clever/ir"),
    ("C3", (*LINEAR, "cj+ro"), "clever/full", "clever/ir"),
    ("C3", (*RIDGE, "class, rotated"), "clever/full", "clever/ir"),
    ("C4", (*RIDGE, "which of 4 rotations"), "clever/ef", "clever/ir[:d_ef]"),
    ("C7", ("semi10", "fine-tuned", "orig"), "clever/full", "dino/full"),
    ("C7", ("folder", "fine-tuned", "orig"), "clever/full", "dino/full"),  # classes not seen before
    ("C8", ("davis", "propagated", "J&F, shapes"), "clever/full", "dino/full"),
    ("C8", ("saliency", "TokenCut", "IoU, solver, shapes"), "clever/full", "dino/full"),
]
PAIRS = {name: (f"{name}/clever/full", f"{name}/dino/full")
         for name in ("vit_micro", "vit_tiny", "caug+")}
CLAIMS = [
    *(Claim(name, measure, f"{setting}/{better}", f"{setting}/{worse}")
      for setting in ("", "long", "resnet18", "vmamba_micro")
      for name, measure, better, worse in PAIR_CLAIMS),
    # views and options, and a gain held against another
    Claim("C1", (*RIDGE, "class"), "cosine/clever/full", "vit_micro/dino/full"),  # --orth=cosine
    Claim("C2", (*RIDGE, "class, rotated"), "cosine/clever/full", "vit_micro/dino/full"),
    *(Claim("C4", (*RIDGE, "which of 4 rotations"), f"{setting}/clever/ef",
            f"{setting}/clever/ir[:d_ef]") for setting in ("vit_micro", "cosine", "lam0")),
    Claim("C2", (*LINEAR, "cj+ro+et"), *PAIRS["caug+"]),
    Claim("C2", (*LINEAR, "cj+ro+et"), *PAIRS["caug+"], beyond=PAIRS["vit_micro"]),
    Claim("C6", (*LINEAR, "orig"), *PAIRS["vit_micro"], beyond=PAIRS["vit_tiny"]),
    *(Claim("C9", (*LINEAR, "orig"), "vit_micro/clever/full", f"{other}/clever/full")
      for other in ("ratio0.5", "ratio0.95", "lam0", "lam0.01")),
]
# fmt: on
SETTINGS = {side.split("/")[0] for claim in CLAIMS for side in claim.sides()}


def scores_of(path):
    """Read a results.json -> {(task, classifier, test, row, part): scores (n,) in 0 .. 1}.

    A score is the share of an image's answers that are right; for videos and saliency the table's
    one number. Other rows are passed over. UsageError where two rows say the same thing.
    """
    found = {}
    for result in read_results(path):
        task = result["task"]
        for row in result["rows"]:
            metric, test = row["metric"], row["test"]
            if task in SEG_METHODS and test == result["rows"][-1]["test"]:  # of all objects
                measure = (SEG_METHODS[task], f"{metric}, {test}")
                scores = np.array([row["value"] / 100])
            elif "right" in row:
                ridge_or_knn = ("kNN" if metric.startswith("kNN") else "ridge", metric)
                measure = (row["classifier"], test) if "classifier" in row else ridge_or_knn
                turns = (
                    4 if metric == "which of 4 rotations" else 1
                )  # an image's are no four images
                scores = unpack_correct(row["right"], row["n"]).reshape(turns, -1).mean(0)
            else:
                continue
            name = (task, *measure, row["row"], row["part"])
            if name in found:
                raise UsageError(
                    f"{path}: holds two rows of {', '.join(name)}; give each evaluation of a seed "
                    "once, another a folder of its own (--out)"
                )
            found[name] = scores
    return found


def seeds_of(folder):
    """Read [SETTING/]seedS/results.json of all seeds -> a dict for each seed.

    A dict's keys are (setting, task, classifier, test, row, part), its values as in scores_of.
    """
    seeds = {}
    for setting in ("", *sorted(os.listdir(folder) if os.path.isdir(folder) else ())):
        for path in glob.glob(os.path.join(folder, setting, "seed*", "results.json")):
            if setting not in SETTINGS:
                raise UsageError(
                    f"{path}: no claim is about a setting {setting!r}; "
                    f"CLAIMS knows {', '.join(sorted(SETTINGS - {''}))}"
                )
            scores = {(setting, *name): values for name, values in scores_of(path).items()}
            seeds.setdefault(os.path.basename(os.path.dirname(path)), {}).update(scores)
    return [seeds[seed] for seed in sorted(seeds)]


def interval_over_seeds(differences):
    """Return low and high of the seeds' differences (S,); nan for a single seed."""
    S = len(differences)
    if S == 1:
        return np.nan, np.nan
    if len(T_95) < S:
        raise UsageError(f"{S} seeds: T_95 ends at {len(T_95)}; add the next value of Student's t")
    half = T_95[S - 1] * differences.std(ddof=1) / np.sqrt(S)
    return differences.mean() - half, differences.mean() + half


def interval_over_images(differences, seed=0):
    """Return low and high of the images' differences (n,) by a bootstrap; nan for one number."""
    n = len(differences)
    if n == 1:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(0, n, n)].mean() for _ in range(BOOTSTRAPS)]
    return tuple(np.quantile(means, [0.025, 0.975]))


def compare(claim, seeds):
    """Compare a claim's sides over the seeds that have all of them (seeds_of); None if none has.

    Returns a dict: claim, better and worse (% by seed), difference, its intervals, verdict.
    """
    sides = [side.split("/") for side in claim.sides()]
    names = [(setting, *claim.measure, row, part) for setting, row, part in sides]
    having_all = [scores for scores in seeds if scores.keys() >= set(names)]
    found = [[100.0 * scores[name] for name in names] for scores in having_all]
    if not found:
        return None
    if len({len(side) for sides in found for side in sides}) > 1:
        raise UsageError(
            f"{', '.join(claim.measure)}: {' and '.join(claim.in_words())} were tested on "
            "different numbers of images, or their seeds were; evaluate all on the same"
        )
    better, worse, *beyond = np.array(found).transpose(1, 0, 2)  # (S, n) each
    if beyond:  # a gain against a gain
        better = better - worse
        worse = beyond[0] - beyond[1]
    by_seed = (better - worse).mean(1)
    over_seeds = interval_over_seeds(by_seed)
    over_images = interval_over_images((better - worse).mean(0))
    over_both = over_seeds
    if better.shape[1] > 1:
        half = np.hypot(*((high - low) / 2 for low, high in (over_seeds, over_images)))
        over_both = by_seed.mean() - half, by_seed.mean() + half
    low, high = over_images if len(found) == 1 else over_both
    words = ("ahead", "behind") if len(found) == 1 else ("reproduced", "contradicted")
    verdict = words[0] if low > 0 else words[1] if high < 0 else "undecided"
    return dict(
        claim=claim,
        better=better.mean(1),
        worse=worse.mean(1),
        difference=by_seed.mean(),
        over_seeds=over_seeds,
        over_images=over_images,
        over_both=over_both,
        verdict=verdict + (", one seed" if len(found) == 1 else ""),
    )


def table_lines(compared):
    """Yield the lines of RESULTS.md's table."""
    head = "claim | task, classifier, test | better: by seed | worse: by seed | difference"
    yield f"| {head} | over seeds | over images | over both | verdict |"
    yield "|---|---|---|---|--:|--:|--:|--:|---|"
    for c in compared:
        cells = [c["claim"].name, ", ".join(c["claim"].measure)]
        for side, words in zip(("better", "worse"), c["claim"].in_words()):
            cells.append(f"{words}: {', '.join(f'{value:.1f}' for value in c[side])}")
        cells.append(f"{c['difference']:+.1f}")
        for low, high in (c["over_seeds"], c["over_images"], c["over_both"]):
            cells.append("-" if np.isnan(low) else f"{low:+.1f} .. {high:+.1f}")
        yield f"| {' | '.join((*cells, c['verdict']))} |"


def draw(compared, path):
    """Draw the table: a difference is a dot, its interval over images thick, over both thin."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--picture needs matplotlib: pip install matplotlib") from None
    colors = {"reproduced": "tab:green", "contradicted": "tab:red"}
    figure = Figure(figsize=(9, 0.8 + 0.26 * len(compared)), layout="constrained")
    axes = figure.subplots()
    labels = []
    for y, c in enumerate(compared):
        color = colors.get(c["verdict"], "tab:gray")
        axes.plot(c["over_both"], (y, y), color=color, linewidth=1)
        axes.fill_between(c["over_images"], y - 0.15, y + 0.15, color=color, alpha=0.4)
        axes.plot(c["difference"], y, "o", color=color)
        task, classifier, test = c["claim"].measure
        if classifier != "kNN":  # its metric says so
            test = f"{classifier if task == 'probe' else task}, {test}"
        labels.append(f"{c['claim'].name}  {test}: {' against '.join(c['claim'].in_words())}")
    axes.set_yticks(range(len(compared)), labels, fontsize=8)
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=0.8)
    words = "over images thick, over both thin; gray: undecided, or one seed"
    axes.set_xlabel(f"difference in points, 95 %\n{words}", fontsize=8)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        cause = getattr(error, "strerror", None) or error
        raise UsageError(f"picture={path}: {cause}; give a .png in a folder that exists") from None


@dataclass
class EvidenceConfig:
    """Options of evidence.py: the paper's claims as differences between runs, with intervals."""

    runs: str = option("", "folder with [SETTING/]seed0/results.json, [SETTING/]seed1/...")
    picture: str = option("", "also draw the table to this PNG")


def main(argv):
    config = configure(EvidenceConfig, argv)
    seeds = seeds_of(config.runs)
    if not seeds:
        raise UsageError(
            f"runs={config.runs}: holds no seed*/results.json, nor SETTING/seed*/results.json; "
            "eval_linear.py writes one with --save_correct=True --out=.../seed0"
        )
    compared = [c for claim in CLAIMS if (c := compare(claim, seeds))]
    if not compared:
        raise UsageError(
            f"runs={config.runs}: no claim has both its sides there, image by image; evaluate a "
            "CLeVER run with --compare=the DINO run's ckpt.pt --save_correct=True"
        )
    print("\n".join(table_lines(compared)))
    if config.picture:
        draw(compared, config.picture)


if __name__ == "__main__":
    run_main(main)
