"""Which of the paper's claims our runs reproduce: differences between runs, with intervals.

    python tools/evidence.py --runs=results/nano_shapes                     the table
    python tools/evidence.py --runs=results/nano_shapes --views=views.png   what parts hold

--runs has a folder for each seed, seed0, seed1, ..., or for each setting, SETTING/seed0, ... In it
lies the results.json that the evaluations of that seed wrote (eval_linear.py and
eval_downstream.py with --save_correct=True; eval_seg.py).

Both sides saw the same images, perturbed alike, in the same order, so a difference is taken image
by image and seed by seed. Its intervals, of Student's t, 95 % each:
over seeds: of the seeds' differences; what other runs would give on these images.
over images: of the images' differences, averaged over seeds; what these runs would give on other
  images.
over both, 95 % or more: its half width is the root of the sum of squares of the two. Measures
  with one number per seed (view shares, R2, eval_seg.py) have the interval over seeds only.
The headline claims, M of them, are corrected for their number: over both, of 1 - 5 % / M
(Bonferroni). If all M true differences are 0, one or more miss 0 in at most 5 % of cases.

The verdict goes by the interval over both:
reproduced              it is above 0; "smaller" if it is also below the paper's effect
contradicted            it is below 0
no difference above D   it is within -D .. D, points (two one-sided tests; D = SMALLEST)
paper's size excluded   it holds 0 and is below the paper's effect
undecided               none of these, or a single seed
"""

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib.config import UsageError, configure, option
from lib.machine import run_main
from lib.results import read_results, unpack_correct

LINEAR = ("linear", "linear, chosen lr")  # task and classifier
RIDGE = ("probe", "ridge")
KNN = ("probe", "kNN")
LEVEL = 0.95  # of an interval
SMALLEST = 1.0  # points: a smaller difference does not matter
SEG_METHODS = {"davis": "propagated", "saliency": "TokenCut"}  # tasks of eval_seg.py


class Claim(NamedTuple):
    """That the side `better` beats the side `worse`; a side is "setting/row/part".

    measure: (task, classifier, test) as in results.json; of ridge probes and kNN the metric is the
    test, of view shares and R2 the classifier. beyond: two more sides, whose own difference the
    gain must exceed. effect: the paper's, in points; nan: it has none. is_headline: opens
    docs/results.md.
    """

    name: str
    measure: tuple
    better: str
    worse: str
    beyond: tuple = ()
    effect: float = np.nan
    is_headline: bool = False

    def sides(self):
        return self.better, self.worse, *self.beyond

    def in_words(self):
        """Return what stands on each side; for gains: 'caug+ clever full - dino full'."""
        words = [side.replace("/", " ").strip() for side in self.sides()]
        if self.beyond:
            words = [f"{a} - {b.split(' ', 1)[1]}" for a, b in zip(words[::2], words[1::2])]
        return words


# fmt: off
# The paper's effects: IN-100, CAug, linear top-1 of ViT-S, CLeVER less DINO, clean and cj+ro.
CLEAN, ROTATED = 2.5, 2.6
PAIR_CLAIMS = [  # of a CLeVER run and the DINO run beside it: name, measure, better, worse, effect
    # C0 is ours, not the paper's: DINO has learnt something; if not, the others say nothing
    ("C0", (*LINEAR, "orig"), "dino/full", "untrained/full", np.nan),
    ("C0", (*RIDGE, "class"), "dino/full", "untrained/full", np.nan),
    ("C1", (*LINEAR, "orig"), "clever/full", "dino/full", CLEAN),
    ("C2", (*LINEAR, "cj+ro"), "clever/full", "dino/full", ROTATED),
    ("C2", (*LINEAR, "cj+ro+et"), "clever/full", "dino/full", ROTATED),
    ("C1", (*RIDGE, "class"), "clever/full", "dino/full", CLEAN),
    ("C2", (*RIDGE, "class, rotated"), "clever/full", "dino/full", ROTATED),
    ("C1", (*KNN, "kNN"), "clever/full", "dino/full", CLEAN),
    ("C2", (*KNN, "kNN, rotated"), "clever/full", "dino/full", ROTATED),
    ("C3", (*LINEAR, "ro"), "clever/full", "clever/ir", np.nan),
    ("C3", (*LINEAR, "cj+ro"), "clever/full", "clever/ir", np.nan),
    ("C3", (*RIDGE, "class, rotated"), "clever/full", "clever/ir", np.nan),
    ("C4", (*RIDGE, "which of 4 rotations"), "clever/ef", "clever/ir[:d_ef]", np.nan),
    ("C7", ("semi10", "fine-tuned", "orig"), "clever/full", "dino/full", np.nan),
    ("C7", ("folder", "fine-tuned", "orig"), "clever/full", "dino/full", np.nan),  # other classes
    ("C8", ("davis", "propagated", "J&F, shapes"), "clever/full", "dino/full", np.nan),
    ("C8", ("saliency", "TokenCut", "IoU, solver, shapes"), "clever/full", "dino/full", np.nan),
]
VIEW = ("probe", "view share", "all")
WHITE = ("probe", "view share, whitened", "all")
OWN_VIEWS = ("own_views", "own_views_beta0.3", "own_views_beta0.1")
CONTROLS = ("split", "preg", "dot", "cosine", "dot_beta256", *OWN_VIEWS)  # folders, each a run
PARTS = ("clever/ef", "clever/ir[:d_ef]")


def control_claims():
    """Return the claims about runs that differ in their losses alone (docs/results.md)."""
    dino = "dino/dino/full"
    claims = [Claim("C0", (*RIDGE, "class"), dino, "dino/untrained/full", is_headline=True)]
    for name in ("cosine", "dot", "own_views", "own_views_beta0.1"):
        first = dict(is_headline=name == "cosine")  # the default
        full, ir = f"{name}/clever/full", f"{name}/clever/ir"
        parts = [f"{name}/{part}" for part in PARTS]
        claims += [
            Claim("C1", (*RIDGE, "class"), full, dino, effect=CLEAN, **first),
            Claim("C2", (*RIDGE, "class, rotated"), full, dino, effect=ROTATED, **first),
            Claim("C3", (*RIDGE, "class, rotated"), full, ir, **first),
            Claim("C4", (*RIDGE, "which of 4 rotations"), *parts, **first),
            Claim("C4", VIEW, *parts, **first),
            Claim("C4", WHITE, *parts),
            Claim("C1", (*KNN, "kNN"), full, dino, effect=CLEAN),
            Claim("C2", (*KNN, "kNN, rotated"), full, dino, effect=ROTATED),
        ]
    split = tuple(f"split/{part}" for part in PARTS)  # the division that no term of the loss makes
    measures = ((*RIDGE, "which of 4 rotations"), VIEW, WHITE)
    claims += [Claim("C4", measure, *split) for measure in measures]
    for name in CONTROLS[1:]:
        parts = [f"{name}/{part}" for part in PARTS]
        claims += [Claim("beyond the split", VIEW, *parts, beyond=split)]
    return claims


CLAIMS = [
    *control_claims(),
    *(Claim(name, measure, f"{setting}/{better}", f"{setting}/{worse}", effect=effect)
      for setting in ("", "long", "resnet18", "vmamba_micro", "vit_micro", "vit_tiny", "caug+")
      for name, measure, better, worse, effect in PAIR_CLAIMS),
]
# fmt: on
SETTINGS = {side.split("/")[0] for claim in CLAIMS for side in claim.sides()}


def scores_of(path):
    """Read a results.json -> {(task, classifier, test, row, part): scores (n,) in 0 .. 1}.

    A score is the share of an image's predictions that are right; for view shares, R2, videos and
    saliency the table's one number. Other rows are passed over. UsageError where two rows say the
    same thing.
    """
    found = {}
    for result in read_results(path):
        task = result["task"]
        for row in result["rows"]:
            metric, test = row["metric"], row["test"]
            if task in SEG_METHODS and test == result["rows"][-1]["test"]:  # of all objects
                measure = (SEG_METHODS[task], f"{metric}, {test}")
                scores = np.array([row["value"] / 100])
            elif "interval" in row:  # of equivariance.py
                measure = (metric, test)
                scores = np.array([row["value"] / 100])
            elif "right" in row:
                ridge_or_knn = ("kNN" if metric.startswith("kNN") else "ridge", metric)
                measure = (row["classifier"], test) if "classifier" in row else ridge_or_knn
                turns = 4 if metric == "which of 4 rotations" else 1  # are one image's
                scores = unpack_correct(row["right"], row["n"]).reshape(turns, -1).mean(0)
            else:
                continue
            name = (task, *measure, row["row"], row["part"])
            if name in found:
                raise UsageError(
                    f"{path}: holds two rows of {', '.join(name)}; run each evaluation of a seed "
                    "once, with --seeds=1, or with another --out"
                )
            found[name] = scores
    return found


def seeds_of(folder):
    """Read [SETTING/]seedS/results.json of all seeds -> a dict for each seed.

    A dict's keys are (setting, task, classifier, test, row, part), its values as in scores_of.
    """
    folder = Path(folder)
    seeds = {}
    for path in [*folder.glob("seed*/results.json"), *folder.glob("*/seed*/results.json")]:
        *parents, seed, _ = path.relative_to(folder).parts
        setting = "".join(parents)
        if setting not in SETTINGS:
            raise UsageError(
                f"{path}: unknown setting {setting!r}; rename the folder to one of "
                f"{', '.join(sorted(SETTINGS - {''}))}"
            )
        scores = {(setting, *name): values for name, values in scores_of(path).items()}
        seeds.setdefault(seed, {}).update(scores)
    return [seeds[seed] for seed in sorted(seeds)]


@functools.cache
def student_t(level, freedom):
    """Return x with P(|t| < x) = level, of Student's t; x = sqrt(freedom) tan(angle).

    By this substitution the density is cos(angle) ** (freedom - 1), on 0 .. pi / 2.
    """
    angles = np.linspace(0, np.pi / 2, 1_000_001)
    middles = (angles[1:] + angles[:-1]) / 2
    mass = np.concatenate([[0], np.cumsum(np.cos(middles) ** (freedom - 1))])
    return np.sqrt(freedom) * np.tan(np.interp(level, mass / mass[-1], angles))


def half_width(differences, level=LEVEL):
    """Return half the interval of the mean of differences (n,); nan for a single one."""
    n = len(differences)
    if n == 1:
        return np.nan
    return student_t(level, n - 1) * differences.std(ddof=1) / np.sqrt(n)


def compare(claim, seeds, n_claims=1):
    """Compare a claim's sides over the seeds that have all of them (seeds_of); None if none has.

    n_claims: that are made together; the interval over both is corrected for them. Returns a dict:
    claim, better and worse (% by seed), difference, half its intervals, verdict.
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
            "different numbers of images; evaluate all sides and seeds on the same images"
        )
    better, worse, *beyond = np.array(found).transpose(1, 0, 2)  # (S, n) each
    if beyond:  # a gain against a gain
        better = better - worse
        worse = beyond[0] - beyond[1]
    by_seed = (better - worse).mean(1)
    by_image = (better - worse).mean(0)
    difference = by_seed.mean()
    level = 1 - (1 - LEVEL) / n_claims
    over_both = half_width(by_seed, level)
    if len(by_image) > 1:
        over_both = np.hypot(over_both, half_width(by_image, level))
    return dict(
        claim=claim,
        better=better.mean(1),
        worse=worse.mean(1),
        difference=difference,
        over_seeds=half_width(by_seed),
        over_images=half_width(by_image),
        over_both=over_both,
        verdict=verdict(difference - over_both, difference + over_both, claim.effect),
    )


def verdict(low, high, effect):
    """Return the words for the interval over both; effect: the paper's. Either may be nan."""
    if np.isnan(low):
        return "undecided, one seed"
    if low > 0:
        return "reproduced, smaller" if high < effect else "reproduced"
    if high < 0:
        return "contradicted"
    if low > -SMALLEST and high < SMALLEST:
        return f"no difference above {SMALLEST:g}"
    return "paper's size excluded" if high < effect else "undecided"


def table_lines(compared):
    """Yield the lines of the table in docs/results.md."""
    head = "claim | task, classifier, test | better: by seed | worse: by seed | paper | difference"
    yield f"| {head} | over seeds | over images | over both | verdict |"
    yield "|---|---|---|---|--:|--:|--:|--:|--:|---|"
    for c in compared:
        cells = [c["claim"].name, ", ".join(c["claim"].measure)]
        for side, words in zip(("better", "worse"), c["claim"].in_words()):
            cells.append(f"{words}: {', '.join(f'{value:.1f}' for value in c[side])}")
        effect = c["claim"].effect
        cells += ["" if np.isnan(effect) else f"{effect:+.1f}", f"{c['difference']:+.1f}"]
        for half in (c["over_seeds"], c["over_images"], c["over_both"]):
            low, high = c["difference"] - half, c["difference"] + half
            cells.append("-" if np.isnan(half) else f"{low:+.1f} .. {high:+.1f}")
        yield f"| {' | '.join((*cells, c['verdict']))} |"


# --- what the parts hold --------------------------------------------------------------------------

# fmt: off
HELD = {  # column -> measure
    "share": VIEW, "white": WHITE,
    **{name: ("probe", "view share", name) for name in ("rotation", "jitter", "crop", "flip")},
    "angle": ("probe", "R2", "angle"), "relative": ("probe", "R2", "relative angle"),
    "brightness": ("probe", "R2", "brightness"), "hue": ("probe", "R2", "hue"),
    "scale": ("probe", "R2", "crop scale"), "class": (*RIDGE, "class"),
}
# fmt: on
HELD_PARTS = ("full", "ir", "ir[:d_ef]", "ef", "[:13]", "[-13:]")


def held_rows(seeds):
    """Yield (setting, part, {column: values by seed, in %}), of runs with view shares."""
    settings = {name[0] for scores in seeds for name in scores}
    order = [("dino", "untrained"), ("dino", "dino"), *((name, "clever") for name in CONTROLS)]
    for setting, row in order:
        for part in HELD_PARTS if setting in settings else ():
            values = {}
            for column, measure in HELD.items():
                name = (setting, *measure, row, part)
                found = [100 * scores[name].mean() for scores in seeds if name in scores]
                if found:
                    values[column] = np.array(found)
            if "share" in values:
                yield setting if row == "clever" else row, part, values


def held_lines(rows):
    """Yield the lines of a table: means over seeds ± half the 95 % interval over seeds."""
    yield f"| control | part | {' | '.join(HELD)} |"
    yield f"|---|---|{'--:|' * len(HELD)}"
    for control, part, values in rows:
        cells = []
        for column in HELD:
            cell = ""
            if column in values:
                mean, half = values[column].mean(), half_width(values[column])
                cell = f"{mean:.1f} ± {half:.1f}".removesuffix(" ± nan")
            cells.append(cell)
        yield f"| {control} | {part} | {' | '.join(cells)} |"


def draw_held(rows, path):
    """Draw view shares, raw and whitened, of ef and as many dimensions of ir, by control."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    pairs = {"as many dimensions of ir": ("ir[:d_ef]", "[:13]"), "ef": ("ef", "[-13:]")}
    columns = {"share": "view share, raw", "white": "view share, whitened", "angle": "R2, angle"}
    for axes, (column, title) in zip(figure.subplots(1, len(columns)), columns.items()):
        for i, (label, parts) in enumerate(pairs.items()):
            found = {name: values[column] for name, part, values in rows if part in parts}
            places = np.arange(len(found)) + 0.4 * i - 0.2
            means = [x.mean() for x in found.values()]
            halves = [half_width(x) for x in found.values()]
            axes.bar(places, means, 0.38, yerr=halves, label=label)
            axes.set_xticks(range(len(found)), found, rotation=60, ha="right", fontsize=8)
        axes.set_title(f"{title}, in %", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        cause = getattr(error, "strerror", None) or error
        raise UsageError(f"views={path}: {cause}; give a .png in a folder that exists") from None


@dataclass
class EvidenceConfig:
    """Options of evidence.py: the paper's claims as differences between runs, with intervals."""

    runs: str = option("", "folder with [SETTING/]seed0/results.json, [SETTING/]seed1/...")
    views: str = option("", "print what each part holds of the view, and draw it to this PNG")


def main(argv):
    config = configure(EvidenceConfig, argv)
    seeds = seeds_of(config.runs)
    if not seeds:
        raise UsageError(
            f"runs={config.runs}: no seed*/results.json or SETTING/seed*/results.json in it; "
            "to make one, run eval_linear.py with --save_correct=True --out=.../seed0"
        )
    if config.views:
        rows = list(held_rows(seeds))
        print("\n".join(held_lines(rows)))
        draw_held(rows, config.views)
        return
    compared = [c for claim in CLAIMS if (c := compare(claim, seeds))]
    if not compared:
        raise UsageError(
            f"runs={config.runs}: no claim has both its sides with per-image correctness; evaluate "
            "a CLeVER run with --compare=DINO_CKPT --save_correct=True"
        )
    n = sum(c["claim"].is_headline for c in compared)
    compared = [compare(c["claim"], seeds, n) if c["claim"].is_headline else c for c in compared]
    print("\n".join(table_lines(compared)))


if __name__ == "__main__":
    run_main(main)
