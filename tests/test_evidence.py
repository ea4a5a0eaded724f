"""evidence.py: its intervals cover what they should, the verdict follows from them.

The tables of docs/results.md are those of results/.
"""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, run_script

sys.path.insert(0, str(ROOT / "tools"))

from lib.config import UsageError
from lib.results import pack_correct, unpack_correct

import evidence
import gradients

T_2 = 4.302653  # Student's t, two degrees of freedom, 95 % two-sided


def test_correctness_survives_its_packing():
    right = torch.rand(1003) < 0.3
    assert (unpack_correct(pack_correct(right), 1003) == right.numpy()).all()


def test_intervals_of_known_cases():
    # standard error 1 / sqrt 3
    assert evidence.half_width(np.array([1.0, 2.0, 3.0])) == pytest.approx(T_2 / 3**0.5, rel=1e-6)
    assert np.isnan(evidence.half_width(np.array([1.0])))
    differences = np.random.default_rng(0).choice([-100.0, 0, 100], 2000, p=[0.1, 0.7, 0.2])
    half = 1.96 * differences.std() / 2000**0.5
    assert evidence.half_width(differences) == pytest.approx(half, abs=0.01)
    published = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622, 30: 2.0423, 9999: 1.9602}
    for freedom, t in published.items():
        assert evidence.student_t(0.95, freedom) == pytest.approx(t, abs=1e-4)
    assert evidence.student_t(0.995, 4) == pytest.approx(5.5976, abs=1e-4)


def test_intervals_cover_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    runs = 1 + rng.standard_normal((2000, 3))
    hits = [abs(seeds.mean() - 1) < evidence.half_width(seeds) for seeds in runs]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def write(folder, accuracies, seed, n=1500):
    """Write a results.json as eval_linear.py does; accuracies {(row, part): share}.

    One random number an image for all rows, so that they differ where they must.
    """
    rng = np.random.default_rng(seed)
    u = rng.random(n)
    rows = []
    for (row, part), share in accuracies.items():
        right = u < share + 0.02 * rng.standard_normal(n)
        rows.append(
            dict(
                row=row,
                part=part,
                dims=128,
                classifier="linear, chosen lr",
                lr=0.1,
                test="orig",
                metric="top1",
                value=round(100 * right.mean(), 2),
                seed=0,
                n=n,
                right=pack_correct(torch.from_numpy(right)),
            )
        )
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps([dict(task="linear", rows=rows)]))


@pytest.mark.parametrize(
    "ours, verdict", [(0.30, "reproduced"), (0.20, "paper's size excluded"), (0.10, "contradicted")]
)
def test_the_verdict_follows_from_both_intervals(tmp_path, capsys, ours, verdict):
    for seed in range(3):
        write(tmp_path / f"seed{seed}", {("clever", "full"): ours, ("dino", "full"): 0.2}, seed)
    evidence.main([f"--runs={tmp_path}"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| C1")]
    assert verdict in line
    assert "linear, linear, chosen lr, orig" in line
    assert line.count("|") == 11
    seeds = evidence.seeds_of(tmp_path)
    # the others have not been measured
    [compared] = [c for claim in evidence.CLAIMS if (c := evidence.compare(claim, seeds))]
    assert compared["difference"] == pytest.approx(100 * (ours - 0.2), abs=1)
    over_both = np.hypot(compared["over_seeds"], compared["over_images"])
    assert compared["over_both"] == pytest.approx(over_both)
    one_seed = evidence.compare(compared["claim"], seeds[:1])
    assert np.isnan(one_seed["over_both"]) and one_seed["over_images"] > 0
    assert one_seed["verdict"] == "undecided, one seed"


def test_what_is_missing_is_told_in_a_line(tmp_path):
    run = [f"--runs={tmp_path}"]
    with pytest.raises(UsageError, match="no seed"):
        evidence.main(run)
    write(tmp_path / "seed0", {("clever", "full"): 0.2}, 0)
    with pytest.raises(UsageError, match="no claim has both its sides"):
        evidence.main(run)
    path = tmp_path / "seed0" / "results.json"
    runs = json.loads(path.read_text())
    path.write_text(json.dumps([*runs, dict(task="folder", rows=runs[0]["rows"])]))
    assert len(evidence.scores_of(path)) == 2  # another task's row is another row
    path.write_text(json.dumps(runs * 2))
    with pytest.raises(
        UsageError, match="holds two rows of linear, linear, chosen lr, orig, clever, full"
    ):
        evidence.main(run)
    for seed, n in ((0, 1500), (1, 1400)):
        shutil.rmtree(tmp_path / f"seed{seed}", ignore_errors=True)
        write(tmp_path / f"seed{seed}", {("clever", "full"): 0.3, ("dino", "full"): 0.2}, seed, n)
    with pytest.raises(UsageError, match="different numbers of images"):
        evidence.main(run)


def test_the_four_turns_of_an_image_are_one_image(tmp_path):
    right = torch.arange(40) % 3 == 0
    row = dict(
        row="clever",
        test="orig",
        metric="which of 4 rotations",
        value=0,
        seed=0,
        n=40,
        right=pack_correct(right),
    )
    rows = [
        dict(row, part="ir", dims=102),
        dict(row, part="ir[:d_ef]", dims=26),
        dict(row, part="ef", dims=26),
        dict(row, part="full", dims=128),
    ]
    del rows[3]["right"]  # passed over
    (tmp_path / "results.json").write_text(json.dumps([dict(task="probe", rows=rows)]))
    found = evidence.scores_of(tmp_path / "results.json")
    assert [name[-1] for name in found] == ["ir", "ir[:d_ef]", "ef"]
    for share in found.values():
        assert share.tolist() == [
            (right[i] + 0.0 + right[10 + i] + right[20 + i] + right[30 + i]).item() / 4
            for i in range(10)
        ]


def test_a_gain_is_held_against_a_gain_of_another_setting(tmp_path, capsys, monkeypatch):
    for seed in range(3):
        for setting, clever in (("vit_micro", 0.5), ("vit_tiny", 0.35)):
            (tmp_path / setting).mkdir(exist_ok=True)
            write(
                tmp_path / setting / f"seed{seed}",
                {("clever", "full"): clever, ("dino", "full"): 0.3},
                seed,
            )
    micro, tiny = (
        (f"{name}/clever/full", f"{name}/dino/full") for name in ("vit_micro", "vit_tiny")
    )
    claim = evidence.Claim("C6", (*evidence.LINEAR, "orig"), *micro, beyond=tiny)
    monkeypatch.setattr(evidence, "CLAIMS", [claim])
    evidence.main([f"--runs={tmp_path}"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert "vit_micro clever full - dino full: 19.4, 20.6, 18.5" in line
    assert "vit_tiny clever full - dino full: " in line
    assert line.endswith("| reproduced |")
    gain = evidence.compare(claim, evidence.seeds_of(tmp_path))["difference"]
    assert gain == pytest.approx(15, abs=1.5)  # (50 - 30) - (35 - 30)
    shutil.rmtree(tmp_path / "vit_tiny" / "seed2")  # a seed that lacks a side does not count
    assert len(evidence.compare(claim, evidence.seeds_of(tmp_path))["better"]) == 2
    (tmp_path / "vit_tinny").mkdir()
    write(tmp_path / "vit_tinny" / "seed0", {("clever", "full"): 0.3}, 0)
    with pytest.raises(UsageError, match=r"unknown setting 'vit_tinny'; rename .*vit_tiny"):
        evidence.main([f"--runs={tmp_path}"])


def test_videos_and_saliency_are_compared_over_seeds_alone(tmp_path):
    def row(name, test, metric, value):
        return dict(
            row=name, part="full", dims=8, test=test, metric=metric, value=value, n=4, seed=0
        )

    for seed, gain in enumerate((4.0, 5.0, 6.0)):
        videos = [
            row(name, test, "J&F", value)
            for test, shift in (("shapes0_1", -30), ("shapes", 0))
            for name, value in (("clever", 60 + gain + shift), ("dino", 60))
        ]
        photos = [
            row(name, "shapes", "IoU, solver", value)
            for name, value in (("clever", 60 - gain), ("dino", 60))
        ]
        others = [row(name, "ECSSD", "IoU, solver", 50) for name in ("clever", "dino")]
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "results.json").write_text(
            json.dumps(
                [
                    dict(task="davis", rows=videos),
                    dict(task="saliency", rows=photos),
                    dict(task="saliency", rows=others),
                ]
            )
        )
    seeds = evidence.seeds_of(tmp_path)
    claims = [claim for claim in evidence.CLAIMS if claim.name == "C8"]
    davis, saliency = filter(None, (evidence.compare(claim, seeds) for claim in claims))
    assert davis["difference"] == pytest.approx(5)
    assert davis["over_both"] == davis["over_seeds"] == pytest.approx(T_2 / 3**0.5, rel=1e-6)
    assert np.isnan(davis["over_images"])
    assert davis["verdict"] == "reproduced"
    assert saliency["difference"] == pytest.approx(-5)
    assert saliency["verdict"] == "contradicted"
    assert evidence.compare(davis["claim"], seeds[:1])["verdict"] == "undecided, one seed"


def test_the_words_of_a_verdict():
    """By the interval over both; the paper's size is 2.5 points."""
    words = {
        (0.1, 9.0): "reproduced",
        (0.1, 2.0): "reproduced, smaller",
        (-3.0, -0.1): "contradicted",
        (-0.9, 0.9): "no difference above 1",
        (-1.5, 2.0): "paper's size excluded",
        (-1.5, 3.0): "undecided",
    }
    for interval, expected in words.items():
        assert evidence.verdict(*interval, 2.5) == expected
    # without an effect of the paper's nothing can be excluded
    assert evidence.verdict(-1.5, 2.0, np.nan) == "undecided"
    assert evidence.verdict(0.1, 2.0, np.nan) == "reproduced"


def test_headline_claims_are_corrected_for_their_number():
    """Of 11 true zeros none is off its interval in 19 of 20 cases; uncorrected in 11 of 20."""
    rng = np.random.default_rng(2)
    claim = evidence.Claim("C1", ("probe", "ridge", "class"), "/a/full", "/b/full")
    names = [("", *claim.measure, row, "full") for row in "ab"]
    off = {1: 0, 11: 0}
    for _ in range(200):
        for n_claims in off:
            is_off = False
            for _ in range(11):
                seeds = [dict(zip(names, 0.01 * rng.standard_normal((2, 1)))) for _ in range(5)]
                compared = evidence.compare(claim, seeds, n_claims)
                is_off |= abs(compared["difference"]) > compared["over_both"]
            off[n_claims] += is_off
    assert off[11] / 200 < 0.12 < 0.3 < off[1] / 200


def test_what_parts_hold_is_told_and_drawn(tmp_path, capsys):
    """A table of means over seeds with half their interval; a picture."""
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture, and is not here")
    for setting, row, parts in (("dino", "dino", ("[:13]", "[-13:]")), ("cosine", "clever", ())):
        for seed in range(3):
            rows = [
                dict(row=row, part=part, test=test, metric=metric, value=20 + seed + i, seed=seed)
                | dict(interval=[1, 2])
                for i, part in enumerate(parts or ("ir[:d_ef]", "ef"))
                for metric, test in (
                    ("view share", "all"),
                    ("view share, whitened", "all"),
                    ("R2", "angle"),
                )
            ]
            folder = tmp_path / setting / f"seed{seed}"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps([dict(task="probe", rows=rows)]))
    evidence.main([f"--runs={tmp_path}", f"--views={tmp_path / 'x.png'}"])
    lines = capsys.readouterr().out.splitlines()
    half = T_2 / 3**0.5
    assert f"| cosine | ef | 22.0 ± {half:.1f} | 22.0 ± {half:.1f} |" in "\n".join(lines)
    assert len(lines) == 6 and (tmp_path / "x.png").stat().st_size > 5000
    for path in (tmp_path / "nowhere" / "x.png", tmp_path / "x.unknown"):
        with pytest.raises(UsageError, match=r"give a \.png in a folder that exists"):
            evidence.main([f"--runs={tmp_path}", f"--views={path}"])


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["nano_shapes", "nano_tinyin40", "tinyin40_seen"])
def test_the_tables_of_results_are_those_of_the_kept_answers(capsys, runs):
    evidence.main([f"--runs={ROOT / 'results' / runs}"])
    lines = capsys.readouterr().out.splitlines()
    pages = ("results.md", "real_images.md", "ablations.md")
    text = "\n".join((ROOT / "docs" / page).read_text() for page in pages)
    assert len(lines) > 10
    for line in lines:
        assert line in text, line


def test_the_gradients_of_a_run_are_told(folder, tmp_path):
    """L_PReg pulls at both heads alike and at no backbone; without a weight nothing pulls."""
    how = arguments(data=folder, out_dir=tmp_path / "run", epochs=1, warmup_epochs=0, beta=0)
    run_script("train.py", *how)
    path = tmp_path / "lengths.json"
    done = run_script("tools/gradients.py", f"--runs={tmp_path}/r*", f"--json={path}")
    [(run, found)] = json.loads(path.read_text()).items()
    assert done.stdout.splitlines() == list(gradients.table_lines({run: found}))
    assert found["L_CL"]["backbone"] > 0 and found["L_CL"]["head_ef"] == 0
    assert [found["L_Orth"][part] for part in gradients.PARTS] == [0.0, 0.0, 0.0]
    preg = found["L_PReg"]
    assert preg["backbone"] == 0 and preg["head_ir"] > 0 and preg["head_ef"] > 0
    assert 0 < found["H_ef"] <= found["ln K"]


@pytest.mark.parametrize(
    "page, runs", [("results", "nano_shapes"), ("real_images", "nano_tinyin40")]
)
def test_the_gradients_of_docs_are_the_kept_ones(page, runs):
    lengths = json.loads((ROOT / "results" / runs / "gradients.json").read_text())
    lines = list(gradients.table_lines(lengths))
    text = (ROOT / "docs" / f"{page}.md").read_text().splitlines()
    assert len(lines) > 5
    for line in lines:
        assert line in text, line


@pytest.mark.slow
def test_what_a_page_quotes_of_single_seeds_is_what_their_answers_say(capsys):
    evidence.main([f"--runs={ROOT / 'results' / 'tinyin40_one_seed'}"])
    lines = capsys.readouterr().out.splitlines()
    for claim, side, numbers in (
        ("C0 | linear", "long dino full", "+4.3"),
        ("C1 | linear", "long clever full", "-1.3 .. +2.6"),
        ("C2 | linear, linear, chosen lr, cj+ro+et", "caug+ clever full: 13.1", "+0.3 .. +3.3"),
        ("C2 | linear, linear, chosen lr, cj+ro+et", "vit_tiny clever full", "+1.5 .. +4.6"),
        ("C1 | linear", "caug+ clever full", "-0.7"),
        ("C1 | linear", "vit_tiny clever full", "-1.2"),
        ("C0 | linear", "resnet18 dino full: 20.5", "21.7"),
    ):
        [line] = [x for x in lines if claim in x and f"| {side}" in x]
        assert numbers in line, line
