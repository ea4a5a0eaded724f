"""Features, kNN and ridge classifiers against reference implementations; opening models; tables."""

import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

from lib import checkpoint, evalstate, evaluation, features, machine, results, sources, weights
from lib.config import UsageError

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, HERE, arguments, run_script, tiny_config

from augment import perturbation, quarter_turn
from model import build_backbone


def test_knn_is_the_weighted_vote():
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = (torch.randn(n, 6, generator=generator) for n in (60, 40))
    train_y, test_y = (torch.randint(0, 4, (n,), generator=generator) for n in (60, 40))
    right = 0
    for x, y in zip(test_x, test_y):
        similarity = F.cosine_similarity(train_x, x[None])
        nearest = similarity.argsort(descending=True)[:20]
        votes = [0.0] * 4
        for n in nearest:
            votes[train_y[n]] += torch.exp(similarity[n] / 0.07).item()
        right += votes.index(max(votes)) == y.item()
    found = features.knn_correct(train_x, train_y, test_x, test_y)
    assert results.percent(found) == pytest.approx(100 * right / 40)


def ridge_accuracies(train_x, train_y, tests):
    return [results.percent(right) for right in features.ridge_correct(train_x, train_y, tests)]


def test_ridge_separates_what_is_linear_and_only_that():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2000, 12, generator=generator) for _ in range(2))
    y = (x @ torch.randn(12, 3, generator=generator)).argmax(1)
    tests = [(x[1500:] * 50 + 7, y[1500:]), (x[1500:] * 50 + 107, y[1500:])]
    [linear, shifted] = ridge_accuracies(x[:1500] * 50 + 7, y[:1500], tests)
    [chance] = ridge_accuracies(noise[:1500], y[:1500], [(noise[1500:], y[1500:])])
    assert linear > 85
    assert shifted < linear
    assert chance < 50


def test_ridge_weights_solve_the_normal_equations():
    """The closed form, for the penalty that is chosen if each is as good on the held-out slice."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 5, generator=generator).double()
    y = (x[:, 0] > 0).long()
    z = torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-6), torch.ones(300, 1).double()], 1)
    gram = z.T @ z / 300 + 1e-6 * torch.eye(6).double()
    closed = torch.linalg.solve(gram, z.T @ F.one_hot(y).double() / 300)
    expected = 100 * ((z @ closed).argmax(1) == y).double().mean().item()
    [got] = ridge_accuracies(x, y, [(x, y)])
    assert got == pytest.approx(expected, abs=1.0)


def test_std_and_rank_tell_collapse_from_health():
    generator = torch.Generator().manual_seed(0)
    std, rank = features.std_and_rank(torch.randn(5000, 16, generator=generator))
    assert std == pytest.approx(1, abs=0.02)
    assert rank == pytest.approx(16, abs=0.2)
    point = torch.ones(100, 16) + 1e-4 * torch.randn(100, 16, generator=generator)
    assert features.std_and_rank(point)[0] < 1e-3
    line = torch.randn(1000, 1, generator=generator) * torch.randn(1, 16, generator=generator)
    assert features.std_and_rank(line)[1] == pytest.approx(1, abs=1e-3)
    assert features.std_and_rank(torch.randn(100, 1))[1] == pytest.approx(1)


def test_features_are_the_backbones_in_order_and_fp32_outside_autocast(folder):
    images = sources.open_images(str(folder), "val")
    backbone = build_backbone("vit_micro", 32, 8).train()
    seen = []

    def watch(batch, seeds):
        seen.append(torch.is_autocast_enabled("cpu"))
        return perturbation("ro")(batch, seeds)

    here = machine.Here(0, 1, CPU, *machine.choose_precision("bf16", CPU))
    transforms = [perturbation("orig"), quarter_turn(1), watch]
    (z, rotated, by_ro), labels = features.extract(
        backbone, images, transforms, 32, here, batch_size=7
    )
    assert seen and not any(seen)
    assert backbone.training
    assert torch.equal(labels, images.labels)
    pixels = torch.stack([images.read(i) for i in range(len(images))])
    view = perturbation("orig")(pixels, torch.zeros(len(images), dtype=torch.int64))
    torch.testing.assert_close(z, backbone.eval()(view), rtol=0.05, atol=0.05)
    assert not torch.allclose(rotated, z, atol=0.1)
    (again,), _ = features.extract(
        backbone, images, [perturbation("ro")], 32, here, batch_size=11
    )  # random numbers are each image's own, whatever the batch
    torch.testing.assert_close(again, by_ro, rtol=0.05, atol=0.05)


def test_a_mistyped_option_of_extract_is_an_error(folder):
    images = sources.open_images(str(folder), "val")
    backbone = build_backbone("vit_micro", 32, 8)
    with pytest.raises(TypeError, match="scales"):
        features.extract(backbone, images, [perturbation("orig")], 32, HERE, scales=(0.1, 1.0))


def test_part_slices_are_the_split():
    z = torch.randn(4, 10)
    parts = {name: z[:, columns] for name, columns in features.part_slices(10, 8).items()}
    assert list(parts) == ["full", "ir", "ef"]
    assert torch.equal(torch.cat([parts["ir"], parts["ef"]], 1), z)
    assert torch.equal(parts["full"], z)
    assert list(features.part_slices(10, 10)) == ["full"]


def test_dimension_matched_ir_is_as_many_columns_of_ir_as_ef_has():
    matched = features.part_slices(10, 8, matched=True)
    assert list(matched) == ["full", "ir", "ir[:d_ef]", "ef"]
    assert matched["ir[:d_ef]"] == slice(0, 2)
    # no column of ef where ef is the larger part
    assert features.part_slices(10, 3, matched=True)["ir[:d_ef]"] == slice(0, 3)
    assert list(features.part_slices(10, 10, matched=True)) == ["full"]


# --- opening models -------------------------------------------------------------------------------


def save(path, config, name="vit_micro"):
    """Write a run's ckpt.pt, and what it writes beside it: backbone.pt and config.json."""
    path.mkdir()
    state = build_backbone(name, 32, 8).state_dict()
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    checkpoint.save_atomically(dict(config=config, teacher=teacher), str(path / "ckpt.pt"))
    checkpoint.save_atomically(state, str(path / "backbone.pt"))
    (path / "config.json").write_text(json.dumps(config))


def run_config(**options):
    return dict(arch="vit_micro", img_size=32, patch_size=8, ratio=0.8) | options


def open_models(ckpt, compare="", untrained=False, ratio=None):
    given = dict(ckpt=str(ckpt), compare=str(compare), untrained=untrained, ratio=ratio)
    config = SimpleNamespace(**given, seed=0)
    return evaluation.open_models(config, HERE)[0]


def test_a_backbone_finds_its_runs_config_beside_it(tmp_path, capsys):
    config = run_config(method="clever", data="shapes", ratio=0.75)
    save(tmp_path / "run", config)
    backbone, found = weights.load_backbone(str(tmp_path / "run" / "backbone.pt"))
    assert found == config
    assert "clever vit_micro" in capsys.readouterr().out
    [model] = open_models(tmp_path / "run" / "backbone.pt")
    assert (model.row, model.d_ir) == ("clever", 96)
    whole, _ = weights.load_backbone(str(tmp_path / "run" / "ckpt.pt"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(x), whole(x))


@pytest.mark.parametrize(
    "text", [None, "", "{", "[1]", "{}", '{"arch": "vit_tiny"}', '{"arch": ["vit_micro"]}', "\xff"]
)
def test_a_config_that_is_not_the_backbones_is_not_taken(tmp_path, text, capsys):
    save(tmp_path / "run", run_config(method="clever"))
    (tmp_path / "run" / "config.json").unlink()
    if text is not None:
        (tmp_path / "run" / "config.json").write_bytes(text.encode("latin1"))
    [model] = open_models(tmp_path / "run" / "backbone.pt")
    assert (model.row, model.d_ir) == ("vit_micro", 128)
    assert model.trained == dict(arch="vit_micro", img_size=32, patch_size=8)
    assert "third-party vit_micro" in capsys.readouterr().out


def test_third_party_weights_in_a_runs_folder_are_not_the_runs(tmp_path):
    save(tmp_path / "run", run_config(method="clever"))
    (tmp_path / "run" / "backbone.pt").rename(tmp_path / "run" / "published.pth")
    [model] = open_models(tmp_path / "run" / "published.pth")
    assert (model.row, model.d_ir) == ("vit_micro", 128)


def test_an_entry_that_is_no_tensor_is_named(tmp_path):
    """The error of before said "0 entries differ" and named none."""
    checkpoint.save_atomically(
        build_backbone("vit_micro", 32, 8).state_dict() | dict(epoch=3), str(tmp_path / "x.pt")
    )
    with pytest.raises(UsageError, match="where 1 entries differ, such as epoch"):
        weights.load_backbone(str(tmp_path / "x.pt"))


SPLITS = {  # method, ratio of the config -> d_ir
    ("clever", 0.8): 102,
    ("ddcl", 0.5): 64,
    ("dino", 0.8): 128,
    ("dino", 1.0): 128,
    ("simsiam", 0.8): 128,
    ("a_new_method", 0.25): 32,
}


@pytest.mark.parametrize("method, ratio", SPLITS)
def test_the_method_tells_whether_there_is_a_split(tmp_path, method, ratio):
    """Runs of dino and simsiam kept a ratio that they did not use; now they keep 1."""
    save(tmp_path / "run", run_config(method=method, ratio=ratio, lam=0.001, ema=0.99))
    [model] = open_models(tmp_path / "run" / "ckpt.pt")
    assert (model.row, model.d_ir) == (method, SPLITS[method, ratio])


def test_two_models_of_a_method_and_an_untrained_one(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, run_config(method="clever"))
    paths = [str(tmp_path / name / "ckpt.pt") for name in ("a", "b")]
    models = open_models(*paths, untrained=True)
    assert [model.row for model in models] == ["untrained", "clever", paths[1]]
    assert [model.d_ir for model in models] == [128, 102, 102]
    torch.manual_seed(0)
    fresh = build_backbone("vit_micro", 32, 8)
    assert torch.equal(models[0].backbone.pos_embed, fresh.pos_embed)
    assert not models[0].backbone.training
    assert evaluation.chosen_parts(models, "ef", "x") == [
        *(("untrained", "full"), ("clever", "ef"), (paths[1], "ef"))
    ]
    save(tmp_path / "c", run_config(arch="resnet18", method="dino"), "resnet18")
    with pytest.raises(UsageError, match="must be equal; remove --compare"):
        open_models(paths[0], tmp_path / "c" / "ckpt.pt")


def test_a_part_that_no_model_has_is_an_error(tmp_path):
    save(tmp_path / "run", run_config(method="dino"))
    models = open_models(tmp_path / "run" / "ckpt.pt")
    assert evaluation.chosen_parts(models, "", "x") == [("dino", "full")]
    with pytest.raises(UsageError, match=r"x has no split.*--ratio"):
        evaluation.chosen_parts(models, "ef", "x")


def test_the_ratio_of_a_bare_backbone_is_an_option(tmp_path):
    """A file that knows its own ratio keeps it."""
    torch.save(build_backbone("vit_micro", 32, 8).state_dict(), tmp_path / "x.pt")
    [model] = open_models(tmp_path / "x.pt", ratio=0.25)
    assert evaluation.chosen_parts([model], "ef", "x") == [(model.row, "ef")] and model.d_ir == 32
    save(tmp_path / "run", run_config(ratio=0.5))
    with pytest.raises(UsageError, match=r"ratio=0\.25: .*has ratio=0\.5; remove it"):
        open_models(tmp_path / "run" / "ckpt.pt", ratio=0.25)


def test_a_runs_models_are_its_teacher_and_the_weights_it_began_with():
    config = tiny_config(method="clever", seed=3)
    teacher = build_backbone("vit_micro", 32, 8)
    run = SimpleNamespace(
        config=config,
        here=HERE,
        teacher=SimpleNamespace(backbone=teacher),
        network=SimpleNamespace(d_ir=102),
    )
    trained = evaluation.model_of(run)
    untrained = evaluation.untrained_model(vars(config), config.seed, HERE)
    assert (trained.row, trained.d_ir, trained.backbone) == ("clever", 102, teacher)
    torch.manual_seed(3)
    assert torch.equal(untrained.backbone.pos_embed, build_backbone("vit_micro", 32, 8).pos_embed)
    assert (untrained.row, untrained.d_ir) == ("untrained", 128)


# --- results --------------------------------------------------------------------------------------


def test_a_table_has_a_line_for_each_row_and_a_column_for_each_test():
    def row(part, test, value, **more):
        return dict(row="clever", part=part, dims=len(part), test=test, value=value, **more)

    rows = [row("ir", "orig", 50.04, classifier="kNN", seed=0)]
    rows += [row("ir", "orig", 52.04, classifier="kNN", seed=1)]
    rows += [row("ir[:d_ef]", "orig", 7, classifier="linear, lr 1", seed=0)]
    rows += [row("ir[:d_ef]", "ro", 8, classifier="linear, lr 1", seed=0)]
    assert list(results.table_lines(rows)) == [
        "| in %                        | dims | classifier   | orig | ro |",
        "|---|--:|---|--:|--:|",
        "| clever, ir                  |    2 | kNN          | 51.0 ± 1.4 |    |",
        "| clever, ir[:d_ef]           |    9 | linear, lr 1 |  7.0 | 8.0 |",
    ]
    rows = [row("", "orig", 1, metric="class"), row("", "ro", 2, metric="class, rotated")]
    assert list(results.table_lines(rows))[::2] == [
        "| in %                        | dims | class | class, rotated |",
        "| clever                      |    0 |   1.0 |            2.0 |",
    ]


def test_the_state_of_an_evaluation_is_found_again_by_its_protocol(tmp_path, monkeypatch):
    protocol = dict(task="linear", lr=0.1, lrs=(0.1, 0.2), workers=8, out="")
    state = evalstate.EvalState(str(tmp_path), protocol)
    assert state.read() == ([], {})
    written = dict(rows=[dict(row="a", value=1.0)], which=0, epoch=3)
    state.write(**written, module={}, optimizer={}, scheduler={})
    elsewhere = protocol | dict(workers=0, out=str(tmp_path))  # on another machine
    again = evalstate.EvalState(str(tmp_path), elsewhere)
    rows, begun = again.read()
    assert rows == [dict(row="a", value=1.0)] and begun["epoch"] == 3
    other = evalstate.EvalState(str(tmp_path), protocol | dict(lr=0.2))
    assert other.read() == ([], {})
    other.remove()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        again_there = pool.submit(evalstate.EvalState, str(tmp_path), protocol)
        with pytest.raises(UsageError, match="another evaluation writes it"):
            again_there.result()
    with monkeypatch.context() as patch:
        patch.setattr(evalstate, "revision", lambda: "newer")  # its rows would be of other code
        newer = evalstate.EvalState(str(tmp_path), protocol)
        assert newer.read() == ([], {})
        newer.remove()
    results.finish(again, protocol, 1.5, [dict(row="a", part="", dims=1, metric="top1", value=1.0)])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    [run] = results.read_results(str(tmp_path / "results.json"))
    assert (run["task"], run["seconds"], run["protocol"]["lrs"]) == ("linear", 1.5, [0.1, 0.2])


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.slow
def test_command_line_compares_two_runs(folder, tmp_path):
    for method in ("clever", "dino"):
        options = dict(data=folder, method=method, arch="vit_nano", out_dir=tmp_path / method)
        run_script("train.py", *arguments(epochs=1, warmup_epochs=0, **options))
    clever, dino = (tmp_path / name / "ckpt.pt" for name in ("clever", "dino"))
    ridge = ["eval_linear.py", "--protocol=ridge"]
    common = ["--workers=0", "--precision=fp32"]
    done = run_script(*ridge, f"--ckpt={clever}", f"--compare={dino}", *common)  # on its own data
    path = tmp_path / "clever" / "results.json"
    [result] = json.loads(path.read_text())
    assert {row["row"] for row in result["rows"]} == {"untrained", "clever", "dino", "chance"}
    parts = {(row["part"], row["dims"]) for row in result["rows"] if row["row"] == "clever"}
    assert parts == {("full", 64), ("ir", 51), ("ir[:d_ef]", 13), ("ef", 13)}
    assert all(line in done.stdout for line in results.table_lines(result["rows"]))
    assert result["protocol"]["protocol"] == "ridge"

    backbone = tmp_path / "clever" / "backbone.pt"
    run_script(*ridge, f"--ckpt={clever}", f"--compare={backbone}", f"--data={folder}", *common)
    [_, result] = json.loads(path.read_text())  # appended
    values = {}
    for row in result["rows"]:
        values.setdefault(row["row"], []).append((row["part"], row["value"]))
    assert values[str(backbone)] == values["clever"]  # it knows the ratio by config.json beside it

    for wrong, message in (
        (["--ckpt=/nowhere.pt"], "No such file"),
        ([f"--ckpt={clever}", f"--data={folder / 'train' / 'key'}"], "needs labels"),
        ([f"--ckpt={clever}", "--out=/nowhere"], "no such folder"),
        ([f"--ckpt={clever}", "--precision=half"], "choose from"),
        ([], "no checkpoint given"),
    ):
        done = run_script(*ridge, *wrong, check=False)
        assert done.returncode == 2
        assert re.fullmatch(f".*{message}.*\n", done.stderr)
