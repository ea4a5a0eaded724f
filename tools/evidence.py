"""Which of the paper's claims our runs bear out: the differences behind RESULTS.md, with intervals over seeds and over test images.

    python evidence.py --runs=results/tinyin40_seen                               the table
    python evidence.py --runs=results/tinyin40_seen --picture=docs/evidence.png   and its picture, which takes matplotlib

--runs has a folder for each seed, seed0, seed1, ..., or for each setting that has them, SETTING/seed0, ...: in it the results.json that the
evaluations wrote (eval_linear.py, probe.py and eval_downstream.py with --answers=True) for a CLeVER and a DINO run of that seed.

A difference is taken image by image and seed by seed, for both sides saw the same images, perturbed alike, and their runs the same order of
images and draws. Its interval over seeds is Student's t of the seeds' differences: what other runs would give on these images. That over images
is a bootstrap of the test images, whose differences are first averaged over seeds: what these runs would give on other images. Both are of
95 %, and so is, or wider, the interval over both, whose half width is the root of their sum of squares: by it a claim is reproduced, contradicted or
undecided. A single seed tells only which side is ahead on its images. eval_seg.py's tables give one number a seed: then seeds alone judge, which
covers both sources of chance where each seed draws its own images, as the built-in shapes do. No correction is made for the number of claims."""

import glob
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import probe
from configurator import UsageError, configure, exit_on_usage_error

T_95 = (
    np.nan,
    12.71,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # Student's t, two-sided, for that many degrees of freedom
BOOTSTRAPS = 10_000


class Claim(NamedTuple):
    """That `better` beats `worse`, each (setting, row, part), at one test: task, judge and test as in results.json (of probe.py its metric).

    beyond: two sides more, whose own difference is taken off: that the gain is larger than theirs."""

    name: str
    task: str
    judge: str
    test: str
    better: tuple
    worse: tuple
    beyond: tuple = ()


CHOSEN = "linear, chosen lr"


def claims_about_a_pair(setting):
    """Of a CLeVER run and the DINO run beside it. C0 is ours, not the paper's: that DINO has learnt at all; where it has not, the others say nothing."""
    full, ir, ef, ir_as_wide = (
        (setting, "clever", part) for part in ("full", "ir", "ef", "ir as wide")
    )
    dino, untrained = (setting, "dino", "full"), (setting, "untrained", "full")
    return [
        *[
            Claim("C0", *judged, dino, untrained)
            for judged in (("linear", CHOSEN, "orig"), ("probe", "ridge", "class"))
        ],
        *[
            Claim(name, "linear", CHOSEN, test, full, dino)
            for name, test in (("C1", "orig"), ("C2", "cj+ro"), ("C2", "cj+ro+et"))
        ],
        *[
            Claim(name, "probe", "ridge", test, full, dino)
            for name, test in (("C1", "class"), ("C2", "class, rotated"))
        ],
        *[
            Claim(name, "probe", "kNN", test, full, dino)
            for name, test in (("C1", "kNN"), ("C2", "kNN, rotated"))
        ],
        *[Claim("C3", "linear", CHOSEN, test, full, ir) for test in ("ro", "cj+ro")],
        Claim("C3", "probe", "ridge", "class, rotated", full, ir),
        Claim("C4", "probe", "ridge", "which of 4 rotations", ef, ir_as_wide),
        *[
            Claim("C7", task, "fine-tuned", "orig", full, dino) for task in ("semi10", "folder")
        ],  # folder: of classes not seen before
        Claim("C8", "davis", "propagated", "J&F, shapes", full, dino),
        Claim("C8", "saliency", "TokenCut", "IoU, solver, shapes", full, dino),
    ]


def clever_and_dino(setting):
    return (setting, "clever", "full"), (setting, "dino", "full")


CLAIMS = [
    *[
        claim
        for setting in ("", "long", "resnet18", "vmamba_micro")
        for claim in claims_about_a_pair(setting)
    ],
    # views and knobs, and a gain held against another
    *[
        Claim(
            name,
            "probe",
            "ridge",
            test,
            ("cosine", "clever", "full"),
            ("vit_micro", "dino", "full"),
        )
        for name, test in (("C1", "class"), ("C2", "class, rotated"))
    ],  # --orth=cosine
    *[
        Claim(
            "C4",
            "probe",
            "ridge",
            "which of 4 rotations",
            (setting, "clever", "ef"),
            (setting, "clever", "ir as wide"),
        )
        for setting in ("vit_micro", "cosine", "lam0")
    ],
    Claim("C2", "linear", CHOSEN, "cj+ro+et", *clever_and_dino("caug+")),
    Claim(
        "C2",
        "linear",
        CHOSEN,
        "cj+ro+et",
        *clever_and_dino("caug+"),
        beyond=clever_and_dino("vit_micro"),
    ),
    Claim(
        "C6",
        "linear",
        CHOSEN,
        "orig",
        *clever_and_dino("vit_micro"),
        beyond=clever_and_dino("vit_tiny"),
    ),
    *[
        Claim(
            "C9",
            "linear",
            CHOSEN,
            "orig",
            ("vit_micro", "clever", "full"),
            (other, "clever", "full"),
        )
        for other in ("ratio0.5", "ratio0.95", "lam0", "lam0.01")
    ],
]
SETTINGS = {side[0] for claim in CLAIMS for side in (claim.better, claim.worse, *claim.beyond)}
SEG_JUDGES = dict(davis="propagated", saliency="TokenCut")  # tasks of eval_seg.py


def answers_of(path):
    """A results.json -> {(task, judge, test, row, part): score of each test image, (n,) in 0 .. 1}: the share of its answers that are right, or for
    videos and saliency the table's one number. Other rows are passed over.

    UsageError where two rows say the same thing. 'ir as wide': probe.py's second ir, of as many dimensions as ef."""
    found = {}

    def keep(name, scores):
        if name in found:
            raise UsageError(
                f"{path}: holds two rows of {', '.join(name)}; give each evaluation of a seed once, another a folder of its own (--out)"
            )
        found[name] = np.array(scores)

    for result in probe.read_results(path):
        task = result["task"]
        for row in result["rows"]:
            if (
                task in SEG_JUDGES and row["test"] == result["rows"][-1]["test"]
            ):  # others are of single objects
                keep(
                    (
                        task,
                        SEG_JUDGES[task],
                        f"{row['metric']}, {row['test']}",
                        row["row"],
                        row["part"],
                    ),
                    [row["value"] / 100],
                )
            elif "right" in row:
                judge, test, part = row.get("judge"), row["test"], row["part"]
                if judge is None:  # probe.py's
                    judge, test = (
                        "kNN" if row["metric"].startswith("kNN") else "ridge",
                        row["metric"],
                    )
                    part = (
                        "ir as wide"
                        if part == "ir" and (task, judge, test, row["row"], part) in found
                        else part
                    )
                right = probe.unpacked(row["right"], row["n"])
                keep(
                    (task, judge, test, row["row"], part),
                    right.reshape(4 if test == "which of 4 rotations" else 1, -1).mean(0),
                )  # an image's turns are no four images
    return found


def seeds_of(folder):
    """folder/seedS/results.json and folder/SETTING/seedS/results.json -> a dict for each seed, {(setting, task, judge, test, row, part): as answers_of}."""
    seeds = {}
    for setting in ("", *sorted(os.listdir(folder) if os.path.isdir(folder) else ())):
        for path in glob.glob(os.path.join(folder, setting, "seed*", "results.json")):
            if setting not in SETTINGS:
                raise UsageError(
                    f"{path}: no claim is about a setting {setting!r}; CLAIMS knows {', '.join(sorted(SETTINGS - {''}))}"
                )
            seeds.setdefault(os.path.basename(os.path.dirname(path)), {}).update(
                {(setting, *name): scores for name, scores in answers_of(path).items()}
            )
    return [seeds[seed] for seed in sorted(seeds)]


def interval_over_seeds(differences):
    """Of each seed's difference, an array (S,) -> low, high; nan for a single seed."""
    S = len(differences)
    if S == 1:
        return np.nan, np.nan
    if S > len(T_95):
        raise UsageError(
            f"{S} seeds: T_95 knows Student's t for up to {len(T_95)}; add the next value there"
        )
    half = T_95[S - 1] * differences.std(ddof=1) / np.sqrt(S)
    return differences.mean() - half, differences.mean() + half


def interval_over_images(differences, seed=0):
    """Of each image's difference, an array (n,) -> low, high, the 2.5 and 97.5 % of the means of BOOTSTRAPS samples with replacement; nan for one number."""
    if len(differences) == 1:
        return np.nan, np.nan
    rng, n = np.random.default_rng(seed), len(differences)
    means = [differences[rng.integers(0, n, n)].mean() for _ in range(BOOTSTRAPS)]
    return tuple(np.quantile(means, [0.025, 0.975]))


def weigh(claim, seeds):
    """seeds: of seeds_of -> {claim, better and worse in % by seed, difference, its intervals, verdict}; None where no seed has been measured."""
    sides = [
        (setting, claim.task, claim.judge, claim.test, row, part)
        for setting, row, part in (claim.better, claim.worse, *claim.beyond)
    ]
    pairs = [
        [100.0 * answers[side] for side in sides]
        for answers in seeds
        if all(side in answers for side in sides)
    ]
    if not pairs:
        return None
    if len({len(side) for pair in pairs for side in pair}) > 1:
        raise UsageError(
            f"{', '.join(sides[0][1:4])}: {' and '.join(sides_in_words(claim))} were tested on different numbers of images, or their seeds were; evaluate all on the same"
        )
    better, worse, *beyond = np.array(pairs).transpose(1, 0, 2)  # (S, n) each
    if beyond:  # a gain against a gain
        better, worse = better - worse, beyond[0] - beyond[1]
    by_seed, by_image = (better - worse).mean(1), (better - worse).mean(0)
    over_seeds, over_images = interval_over_seeds(by_seed), interval_over_images(by_image)
    half = np.hypot(
        *((high - low) / 2 for low, high in (over_seeds, over_images))
    )  # nan: of one seed
    over_both = (
        (by_seed.mean() - half, by_seed.mean() + half) if better.shape[1] > 1 else over_seeds
    )
    (low, high), words = (
        (over_images, ("ahead, one seed", "behind, one seed", "undecided, one seed"))
        if len(pairs) == 1
        else (over_both, ("reproduced", "contradicted", "undecided"))
    )
    verdict = words[0] if low > 0 else words[1] if high < 0 else words[2]
    return dict(
        claim=claim,
        better=better.mean(1),
        worse=worse.mean(1),
        difference=by_seed.mean(),
        over_seeds=over_seeds,
        over_images=over_images,
        over_both=over_both,
        verdict=verdict,
    )


def table_lines(weighed):
    """The table of RESULTS.md."""
    yield "| claim | task, judge, test | better: by seed | worse: by seed | difference | over seeds | over images | over both | verdict |"
    yield "|---|---|---|---|--:|--:|--:|--:|---|"
    for w in weighed:
        claim = w["claim"]
        sides = (
            f"{what}: {', '.join(f'{value:.1f}' for value in w[name])}"
            for name, what in zip(("better", "worse"), sides_in_words(claim))
        )
        intervals = (
            f"{low:+.1f} .. {high:+.1f}" if low == low else "-"
            for low, high in (w["over_seeds"], w["over_images"], w["over_both"])
        )
        yield f"| {claim.name} | {claim.task}, {claim.judge}, {claim.test} | {' | '.join(sides)} | {w['difference']:+.1f} | {' | '.join(intervals)} | {w['verdict']} |"


def sides_in_words(claim):
    """-> what stands on each side: 'clever full', 'ratio0.5 clever full', or of a gain against a gain 'caug+ clever full - dino full'."""
    if claim.beyond:
        return [
            f"{' '.join(first)} - {' '.join(second[1:])}"
            for first, second in ((claim.better, claim.worse), claim.beyond)
        ]
    return [" ".join(side).strip() for side in (claim.better, claim.worse)]


def draw(weighed, path):
    """The table as a picture: each difference a dot, its interval over images thick, over images and seeds thin."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--picture draws with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"reproduced": "tab:green", "contradicted": "tab:red"}
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.26 * len(weighed)), layout="constrained")
    for y, w in enumerate(weighed):
        color = colors.get(w["verdict"], "tab:gray")
        axes.plot(w["over_both"], (y, y), color=color, linewidth=1)
        axes.plot(
            w["over_images"], (y, y), color=color, linewidth=5, alpha=0.4, solid_capstyle="butt"
        )
        axes.plot(w["difference"], y, "o", color=color)
    labels = []
    for claim in (w["claim"] for w in weighed):
        test = (
            claim.test
            if claim.test.startswith("kNN")
            else f"{claim.judge if claim.task == 'probe' else claim.task}, {claim.test}"
        )
        labels.append(f"{claim.name}  {test}: {' against '.join(sides_in_words(claim))}")
    axes.set_yticks(range(len(weighed)), labels, fontsize=8)
    axes.set_ylim(len(weighed) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(
        "difference in points, 95 %: thick over test images,\nthin over seeds as well; grey: undecided, or one seed",
        fontsize=8,
    )
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise UsageError(
            f"picture={path}: {getattr(error, 'strerror', None) or error}; give a .png in a folder that exists"
        ) from None


@dataclass
class EvidenceConfig:
    """Knobs of evidence.py: the paper's claims as differences between runs, with intervals."""

    runs: str = ""  # folder with seed0/results.json, seed1/results.json, ..., or with settings that have them
    picture: str = ""  # also draw the table to this PNG


def main(argv):
    config = configure(EvidenceConfig, argv)
    seeds = seeds_of(config.runs)
    if not seeds:
        raise UsageError(
            f"runs={config.runs}: holds no seed*/results.json, nor SETTING/seed*/results.json; eval_linear.py and probe.py write one with --answers=True --out=.../seed0"
        )
    weighed = [w for w in (weigh(claim, seeds) for claim in CLAIMS) if w]
    if not weighed:
        raise UsageError(
            f"runs={config.runs}: no claim has both its sides there, with answers; evaluate a CLeVER run with --compare=the DINO run's ckpt.pt --answers=True"
        )
    print("\n".join(table_lines(weighed)))
    if config.picture:
        draw(weighed, config.picture)


if __name__ == "__main__":
    with exit_on_usage_error():
        main(sys.argv[1:])
