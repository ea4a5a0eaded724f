"""eval_linear.py and eval_downstream.py: classifiers, protocols, tasks, command lines."""

import json
import re
import shutil
import sys

from lib import data, evalstate, evaluation, linear, results, sources
from lib.checkpoint import save_atomically
from lib.config import UsageError
from lib.evaluation import Model
from lib.images import Images
from lib.rng import fork, sample_seeds, uniforms
from lib.shapes import shapes

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from conftest import HERE, arguments, run_script
from torchvision.datasets import Flowers102
from torchvision.io import write_jpeg
from torchvision.transforms import InterpolationMode

import augment
import eval_downstream
import eval_linear
from model import build_backbone, ir_dims, split

ON_CPU = ["--workers=0", "--precision=fp32", "--device=cpu"]
QUICK = ["--epochs=4", "--batch_size=32", *ON_CPU]


@pytest.fixture(scope="module")
def run_folder(folder, tmp_path_factory):
    """A CLeVER and a DINO checkpoint of a few steps."""
    out = tmp_path_factory.mktemp("runs")
    for method in ("clever", "dino"):
        run_script(
            "train.py",
            *arguments(data=folder, out_dir=out / method, method=method, epochs=1, warmup_epochs=0),
        )
    return out


def rows_of(path):
    return [result["rows"] for result in json.loads((path / "results.json").read_text())]


def models(ratio=0.8, name="vit_micro"):
    torch.manual_seed(0)
    backbone = build_backbone(name, 32, 8).eval()
    return [Model("clever", backbone, ir_dims(backbone.dim, ratio), dict(arch=name))]


def plain_task(name, train, test, tests, chosen_on):
    """Which of the folder's 10 classes is it? Training crops are flipped."""
    view, label = linear.flipped, linear.own_label
    return linear.Task(name, train, test, 10, view, label, tests, chosen_on)


# --- what a classifier sees -----------------------------------------------------------------------


def test_a_representation_is_the_concatenated_blocks_and_its_parts_are_columns():
    x = torch.randn(3, 3, 32, 32)
    two = [*models(), models(1)[0]._replace(row="dino")]
    representation = linear.Representation(two)
    z = representation(x)
    blocks = [t[:, 0] for t in two[0].backbone.tokens(x, 4)]
    torch.testing.assert_close(z[:, :512], torch.cat(blocks, 1))
    last_ir, last_ef = split(blocks[3])
    columns = representation.columns
    # the scripts cut ef off the last block only
    torch.testing.assert_close(z[:, columns["clever", "ir"]], torch.cat([*blocks[:3], last_ir], 1))
    torch.testing.assert_close(z[:, columns["clever", "ef"]], last_ef)
    own_ir = z[:, representation.z_columns["clever", "ir"]]
    torch.testing.assert_close(own_ir, split(two[0].backbone(x))[0])
    parts = {("clever", "full"), ("clever", "ir"), ("clever", "ef"), ("dino", "full")}
    assert set(columns) == parts
    assert z.shape == (3, representation.dim) == (3, 1024)
    every = linear.Representation(two[:1], cut="every").columns
    every_ir = torch.cat([split(block)[0] for block in blocks], 1)
    every_ef = torch.cat([split(block)[1] for block in blocks], 1)
    torch.testing.assert_close(z[:, every["clever", "ir"]], every_ir)
    torch.testing.assert_close(z[:, every["clever", "ef"]], every_ef)


def test_vit_base_gives_cls_and_mean_patch_and_resnet_its_pooled_z():
    torch.manual_seed(0)
    backbone = build_backbone("vit_micro", 32, 8).eval()
    x = torch.randn(2, 3, 32, 32)
    base = linear.Representation([Model("clever", backbone, 102, dict(arch="vit_base"))])
    z = base(x)
    [tokens] = backbone.tokens(x)
    rows = tokens[:, 0], tokens[:, 1:].mean(1)  # of the last block
    torch.testing.assert_close(z, torch.cat(rows, 1))
    torch.testing.assert_close(z[:, base.z_columns["clever", "full"]], backbone(x))
    ir, ef = (torch.cat(halves, 1) for halves in zip(*map(split, rows)))
    torch.testing.assert_close(z[:, base.columns["clever", "ir"]], ir)
    torch.testing.assert_close(z[:, base.columns["clever", "ef"]], ef)
    resnet = linear.Representation(models(name="resnet18"))
    assert resnet(x).shape == (2, 512)
    assert len(resnet.columns["clever", "ir"]) == 409


def test_classifiers_that_train_together_are_those_trained_one_at_a_time():
    """Oracle: the published loop, an nn.Linear and an SGD for each part and learning rate."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 32, 12, generator=generator)
    y = torch.randint(0, 3, (5, 32), generator=generator)
    columns = [torch.arange(12), torch.tensor([0, 3, 11])]
    lrs = [0.01, 0.5, 40.0]
    together = linear.Classifiers(columns, 3, len(lrs), seed=1)
    alone = {}
    for i, c in enumerate(columns):
        for j, lr in enumerate(lrs):
            layer = nn.Linear(len(c), 3)
            weight = together.weights[i][j].detach().clone()
            layer.load_state_dict(dict(weight=weight, bias=together.biases[i][j].detach().clone()))
            optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
            for x, labels in zip(z, y):
                optimizer.zero_grad()
                F.cross_entropy(layer(x[:, c]), labels).backward()
                optimizer.step()
            alone[i, j] = layer
    optimizer = torch.optim.SGD(together.groups(lrs), momentum=0.9)
    for x, labels in zip(z, y):
        optimizer.zero_grad()
        linear.sum_of_losses(together, x, labels).backward()
        optimizer.step()
    for (i, j), layer in alone.items():
        torch.testing.assert_close(together.weights[i][j], layer.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.biases[i][j], layer.bias, rtol=1e-4, atol=1e-5)
    z = z.flatten(0, 1)
    y = y.flatten()
    found = linear.linear_correct(together, z, y)
    for (i, j), layer in alone.items():
        expected = layer(z[:, columns[i]]).argmax(1) == y
        assert results.percent(found[i][j]) == pytest.approx(results.percent(expected))


def test_the_probe_reaches_the_minimum_of_logistic_regression():
    """Oracle: Newton's method on the same convex problem."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 3, generator=generator).double()
    y = (z[:, 0] - z[:, 1] + 0.8 * torch.randn(200, generator=generator) > 0.2).long()
    x = torch.cat([z, torch.ones(200, 1).double()], 1)
    w = torch.zeros(4).double()
    for _ in range(20):
        p = torch.sigmoid(x @ w)
        w -= torch.linalg.solve(x.T * (p * (1 - p)) @ x, x.T @ (p - y))
    optimum = F.binary_cross_entropy_with_logits(x @ w, y.double()).item()
    classifiers = linear.Classifiers([torch.arange(3)], 2, 1)
    optimizer = torch.optim.SGD(classifiers.groups([1.0]), momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        loss = linear.sum_of_losses(classifiers, z.float(), y)
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(optimum, abs=1e-4)


# --- the protocol's promises ----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["paper", "fast"])
def test_held_out_images_choose_and_never_train(tmp_path, protocol):
    """Each image's pixels tell its index; what the classifiers' batches are made of is watched."""

    def numbered(n, first):
        pixels = torch.arange(first, first + n).view(n, 1, 1, 1).expand(n, 3, 32, 32)
        read = pixels.to(torch.uint8).__getitem__
        return Images(read, torch.arange(n) % 4, list("abcd"), str)

    train = numbered(100, 0)
    test = numbered(20, 200)
    trained_on = set()
    evaluated_on = set()

    def view(crops, seeds):
        trained_on.update(crops[:, 0, 0, 0].tolist())
        return linear.flipped(crops, seeds)

    def clean(images, seeds):
        evaluated_on.update(images[:, 0, 0, 0].tolist())
        return augment.perturbation("orig")(images, seeds)

    def tests(seed):
        return [("orig", clean, None)]

    config = eval_linear.LinearConfig(
        ckpt="x", epochs=3, batch_size=16, workers=0, held_out=0.1, protocol=protocol
    )
    task = linear.Task("linear", train, test, 4, view, linear.own_label, tests, tests)
    state = evalstate.EvalState(str(tmp_path), dict(task="linear"))
    rows = linear.linear_probe(models(), task, config, 32, HERE, state)
    fit, held = sources.hold_out(train.labels, 0.1, 0)
    assert len(held) == 10
    assert trained_on == set(fit.tolist())
    assert evaluated_on == set(held.tolist()) | set(range(200, 220))
    chosen = {row["lr"] for row in rows if row["classifier"] == "linear, chosen lr"}
    assert chosen <= {0.001, *config.lrs}
    assert all(row["n"] == 20 for row in rows)


def test_the_chosen_learning_rate_is_the_held_out_slices_best(monkeypatch, tmp_path, folder):
    seen = []
    real = linear.linear_correct
    monkeypatch.setattr(linear, "linear_correct", lambda *a: seen.append(real(*a)) or seen[-1])
    train, test = data.open_splits(str(folder))
    config = eval_linear.LinearConfig(
        ckpt="x",
        epochs=2,
        batch_size=32,
        workers=0,
        held_out=0.3,
        lrs=(0.1, 1.0),
        save_correct=True,
    )
    tests = linear.perturbation_tests("ro,orig")
    chosen_on = linear.perturbation_tests("orig")
    task = plain_task("linear", train, test, tests, chosen_on)
    state = evalstate.EvalState(str(tmp_path), dict(task="linear"))
    rows = linear.linear_probe(models(), task, config, 32, HERE, state)
    held, rotated, orig = seen
    by_name = {(row["part"], row["test"], row["classifier"]): row for row in rows}
    assert len(by_name) == len(rows)
    for i, part in enumerate(("full", "ir", "ef")):
        best = int(held[i].double().mean(1).argmax())
        for test, found in (("orig", orig), ("ro", rotated)):
            chosen = by_name[part, test, "linear, chosen lr"]
            fixed = by_name[part, test, "linear, lr 0.001"]
            assert chosen["lr"] == (0.001, 0.1, 1.0)[best]
            assert chosen["value"] == round(results.percent(found[i][best]), 2)
            assert fixed["value"] == round(results.percent(found[i][0]), 2)
            right = results.unpack_correct(chosen["right"], chosen["n"])
            assert (right == found[i][best].numpy()).all()


def test_held_out_slices_are_stratified_and_repeat():
    labels = torch.arange(1000) % 10
    fit, held = sources.hold_out(labels, 0.05, 3)
    assert sorted([*fit, *held]) == list(range(1000))
    assert torch.bincount(labels[held], minlength=10).tolist() == [5] * 10
    assert (sources.hold_out(labels, 0.05, 3)[1] == held).all()
    assert (sources.hold_out(labels, 0.05, 4)[1] != held).any()


@pytest.mark.parametrize("name", ["cj", "cj+flip", "cj+ro", "cj+ro180"])
def test_perturbations_are_torchvisions_functions_of_the_same_parameters(name):
    images = shapes("val", 32, 6).read(torch.arange(6))
    seeds = sample_seeds(0, torch.arange(6))
    recipe = augment.PERTURBATIONS[name]
    params = augment.parameters(recipe, seeds)
    expected = []
    assert params["angle"].abs().max() <= recipe.rotate
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for i, image in enumerate(images.float() / 255):
        x = TF.hflip(image) if params["flip"][i] else image
        x = TF.rotate(x, params["angle"][i].item(), InterpolationMode.BILINEAR)
        for operation in params["order"][i].tolist():
            if operation < 3:
                x = adjust[operation](x, params["factors"][i, operation].item())
            else:
                x = TF.adjust_hue(x, (params["hue"][i].item() + 0.5) % 1 - 0.5)
        expected.append(TF.normalize(x, augment.MEAN, augment.STD))
    torch.testing.assert_close(
        augment.augment(images, recipe, seeds), torch.stack(expected), atol=2e-3, rtol=0
    )


def test_perturbed_images_repeat_with_the_seed_and_differ_with_another():
    images = shapes("val", 32, 4).read(torch.arange(4))
    seeds = sample_seeds(0, torch.arange(4))
    a, b, c = (augment.perturbation("cj+ro+et", seed)(images, seeds) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    assert torch.equal(a[2:], augment.perturbation("cj+ro+et", 0)(images[2:], seeds[2:]))


def test_quarter_turns_turn_after_the_flip_and_tell_how_often():
    crops = shapes("val", 32, 64).read(torch.arange(64))
    seeds = sample_seeds(0, torch.arange(64))
    turns = eval_downstream.quarter_turns(seeds)
    views = eval_downstream.flip_and_turn(crops, seeds)
    flips = uniforms(fork(seeds, "augment"), 16)[:, 0] < 0.5
    for crop, turn, flip, view in zip(crops, turns.tolist(), flips, views):
        upright = TF.normalize((crop.flip(-1) if flip else crop) / 255, augment.MEAN, augment.STD)
        torch.testing.assert_close(view, torch.rot90(upright, turn, (1, 2)), atol=1e-5, rtol=0)
    assert torch.bincount(turns, minlength=4).min() > 5


# --- subsets and published data sets --------------------------------------------------------------


def test_a_share_of_the_labels_is_stratified_and_a_list_is_kept_to(folder, tmp_path):
    labels = torch.arange(300) % 3
    chosen = sources.stratified_share(labels, 0.1, 0)
    assert torch.bincount(labels[chosen]).tolist() == [10, 10, 10]
    assert (chosen == sources.stratified_share(labels, 0.1, 0)).all()
    assert len(sources.stratified_share(labels, 0.001, 0)) == 3  # one of each at least
    name = "/x/n01/n01_{}.JPEG".format
    images = Images(None, torch.zeros(3, dtype=torch.int64), ["n01", "n02"], name)
    listing = tmp_path / "list.txt"
    listing.write_text("n01_2.JPEG\nn01_0.JPEG\nn99_5.JPEG\n")
    assert sources.indices_in_list(images, listing).tolist() == [0, 2]
    for text, message in (
        ("n01_7.JPEG\n", "not in the data"),
        ("n99_5.JPEG\n", "names no image of"),
    ):
        listing.write_text(text)
        with pytest.raises(UsageError, match=message):
            sources.indices_in_list(images, listing)
    with pytest.raises(UsageError, match="No such file"):
        sources.indices_in_list(images, tmp_path / "nowhere.txt")


def write_images(folder, names):
    images = shapes("train", 32, len(names))
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(images.read(i), str(folder / name))


def write_cub(root, n=24, classes=("001.Auk", "002.Wren")):
    names = [f"{classes[i % 2]}/{i}.jpg" for i in range(n)]
    write_images(root / "images", names)
    tables = {
        "images.txt": names,
        "image_class_labels.txt": [i % 2 + 1 for i in range(n)],
        "train_test_split.txt": [int(i % 3 > 0) for i in range(n)],
    }
    for table, values in tables.items():
        lines = (f"{i} {value}\n" for i, value in enumerate(values, 1))
        (root / table).write_text("".join(lines))
    return root


def test_cub200s_archive_is_read(tmp_path):
    root = write_cub(tmp_path / "CUB_200_2011")
    train, test = data.open_splits(str(root))
    assert (len(train), len(test)) == (16, 8)
    assert train.classes == ["001.Auk", "002.Wren"]
    for i, label in enumerate(train.labels):
        assert f"/{train.classes[label]}/" in train.name(i)
    assert train.read(0).shape == (3, 32, 32)
    (root / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(UsageError, match="do not match"):
        data.open_splits(str(root))
    (root / "train_test_split.txt").unlink()
    with pytest.raises(UsageError, match="unpack the archive again"):
        data.open_splits(str(root))


def test_pets_and_food_are_read_in_their_true_formats(tmp_path):
    pets = [f"Abyssinian_{i}" for i in range(4)] + [f"beagle_{i}" for i in range(4)]
    write_images(tmp_path / "oxford-iiit-pet" / "images", [f"{name}.jpg" for name in pets])
    annotations = tmp_path / "oxford-iiit-pet" / "annotations"
    annotations.mkdir()
    for name, some in (("trainval", pets[::2]), ("test", pets[1::2])):
        labels = [1 if pet[0] == "A" else 2 for pet in some]
        lines = [f"{pet} {label} {label} 1\n" for pet, label in zip(some, labels)]
        (annotations / f"{name}.txt").write_text("".join(lines))
    train, test = data.open_splits("pets", root=str(tmp_path))
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.classes == ["Abyssinian", "Beagle"]
    assert test.name(3).endswith("beagle_3.jpg")
    assert test.read(3).shape == (3, 32, 32)
    (annotations / "trainval.txt").write_text("Abyssinian_0 1 1 1\nbeagle_0 40 40 1\n")
    with pytest.raises(UsageError, match="labels without a class"):
        data.open_splits("pets", root=str(tmp_path))
    foods = ("pie", "ramen")
    names = [f"{food}/{i}.jpg" for food in foods for i in range(3)]
    write_images(tmp_path / "food-101" / "images", names)
    (tmp_path / "food-101" / "meta").mkdir()
    for name, numbers in (("train", (0, 1)), ("test", (2,))):
        listed = {food: [f"{food}/{i}" for i in numbers] for food in foods}
        (tmp_path / "food-101" / "meta" / f"{name}.json").write_text(json.dumps(listed))
    train, test = data.open_splits("food101", root=str(tmp_path))
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert test.labels.tolist() == [0, 1]
    assert test.read(0).shape == (3, 32, 32)
    (tmp_path / "food-101" / "meta" / "test.json").write_text('{"pie": [], "ramen": []}')
    with pytest.raises(UsageError, match="val split holds 0 images"):
        data.open_splits("food101", root=str(tmp_path))
    (tmp_path / "food-101" / "meta" / "test.json").write_text('{"pie": ["pie/77"], "ramen": []}')
    with pytest.raises(UsageError, match="1 of 1 images are missing"):
        data.open_splits("food101", root=str(tmp_path))
    (tmp_path / "food-101" / "meta" / "train.json").write_text("[]")
    for damaged, message in (("food101", "damaged"), ("flowers102", "use --download=True")):
        with pytest.raises(UsageError, match=message):
            data.open_splits(damaged, root=str(tmp_path))


def test_flowers_are_read_with_scipy_and_say_so_without(tmp_path, monkeypatch):
    write_images(tmp_path / "flowers-102" / "jpg", [f"image_{i:05d}.jpg" for i in range(1, 7)])
    # its checksums are those of the true archive
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match="pip install scipy"):
        data.open_splits("flowers102", root=str(tmp_path))
    monkeypatch.undo()
    io = pytest.importorskip(
        "scipy.io", reason="scipy, which torchvision reads Flowers102 with, is not installed"
    )
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    io.savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": [[1, 2, 1, 2, 1, 102]]})
    splits = {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]}
    io.savemat(tmp_path / "flowers-102" / "setid.mat", splits)
    train, test = data.open_splits("flowers102", root=str(tmp_path))
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert test.labels.tolist() == [0, 101]
    assert train.read(0).shape == (3, 32, 32)


def test_published_numbers_stand_beside_in100_alone(monkeypatch, tmp_path):
    in100 = sources.read_classes("configs/in100_classes.txt")
    monkeypatch.chdir(tmp_path)  # the list is found from everywhere
    known = [
        Model(method, None, 384, dict(method=method, arch="vit_small", recipe="caug"))
        for method in ("clever", "dino")
    ]
    rows = eval_linear.published_rows(known, in100, {"orig", "cj"})
    assert [(row["row"], row["test"], row["value"]) for row in rows] == [
        ("clever, published", "orig", 75.7),
        ("dino, published", "orig", 73.2),
    ]
    assert not eval_linear.published_rows(known, in100[:99], {"orig"})
    unknown = known[0]._replace(trained=dict(arch="vit_base"))
    assert not eval_linear.published_rows([unknown], in100, {"orig"})


# --- the command lines ----------------------------------------------------------------------------


@pytest.mark.slow
def test_one_command_prints_the_robustness_table_and_repeats_exactly(run_folder, folder, tmp_path):
    command = [
        "eval_linear.py",
        f"--ckpt={run_folder / 'clever' / 'ckpt.pt'}",
        f"--compare={run_folder / 'dino' / 'ckpt.pt'}",
        "--untrained=True",
        "--seeds=2",
        f"--out={tmp_path}",
        *QUICK,
    ]  # the data are those the checkpoint was trained on
    done = run_script(*command)
    run_script(*command)
    first, again = rows_of(tmp_path)
    assert first == again
    assert all(line in done.stdout for line in results.table_lines(first))
    tests = {"orig", "cj", "cj+flip", "cj+ro", "cj+ro+et", "ro"}
    tests |= {"cj+ro180", "cj+ro+et50", "cj+ro+et150"}
    assert {row["test"] for row in first} == tests
    assert {row["seed"] for row in first} == {0, 1}
    assert {row["n"] for row in first} == {40}
    assert {(row["row"], row["part"]) for row in first} == {
        ("untrained", "full"),
        ("clever", "full"),
        ("clever", "ir"),
        ("clever", "ef"),
        ("dino", "full"),
    }
    linear = [row for row in first if row["classifier"] != "kNN"]
    by_seed = [[row["value"] for row in linear if row["seed"] == seed] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]
    assert " ± " in done.stdout
    evaluations = json.loads((tmp_path / "results.json").read_text())
    [protocol, _] = [evaluation["protocol"] for evaluation in evaluations]
    assert protocol["train_n"] == 80
    assert protocol["test_n"] == 40
    assert len(protocol["weights"]) == 3
    assert protocol["img_size"] == 32
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, options",
    [
        ("eval_linear.py", ["--protocol=paper", "--tests=orig,cj+ro"]),
        ("eval_linear.py", ["--protocol=fast", "--tests=orig,cj+ro", "--views=2"]),
        ("eval_linear.py", ["--protocol=ridge"]),
        ("eval_downstream.py", ["--task=semi10", "--part=ir"]),
        ("eval_downstream.py", ["--task=rotation_sensitivity"]),
    ],
)
def test_two_processes_are_one(run_folder, folder, tmp_path, script, options):
    ckpt = run_folder / "clever" / "ckpt.pt"
    command = [script, f"--ckpt={ckpt}", f"--data={folder}", f"--out={tmp_path}", *options]
    command += ON_CPU if "--protocol=ridge" in options else QUICK
    for processes in (1, 2):
        run_script(*command, processes=processes)
    one, two = rows_of(tmp_path)
    for a, b in zip(one, two, strict=True):
        assert a | dict(value=0) == b | dict(value=0)
        # one image may lie on the fence
        assert a["value"] == pytest.approx(b["value"], abs=100 / a["n"] + 0.01), (a, b)


@pytest.mark.slow
@pytest.mark.parametrize(  # one write an epoch, the fifth after the tests
    "module, options, cut",  # cut: after how many writes, with how many epochs left
    [
        (eval_linear, ["--protocol=paper"], (3, 1)),
        (eval_linear, ["--protocol=fast"], (3, 1)),
        (eval_linear, ["--protocol=fast", "--seeds=2"], (5, 4)),
        (eval_downstream, ["--task=folder", "--part=full", "--seeds=2"], (3, 1 + 4)),
        (eval_downstream, ["--task=folder", "--part=full", "--seeds=2"], (5, 4)),
    ],
)
def test_an_interrupted_evaluation_continues_to_the_same_numbers(
    run_folder, folder, tmp_path, monkeypatch, capsys, module, options, cut
):
    cut_after, epochs_left = cut

    def evaluate(out):
        ckpt = run_folder / "clever" / "ckpt.pt"
        module.main([f"--ckpt={ckpt}", f"--data={folder}", f"--out={out}", *QUICK, *options])

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    evaluate(tmp_path / "whole")
    real = evalstate.EvalState.write
    writes = []

    def write(self, **state):
        real(self, **state)
        writes.append(state.get("epoch"))
        if len(writes) == cut_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(evalstate.EvalState, "write", write)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "cut")
    assert writes == [1, 2, 3, 4, None][:cut_after]
    assert len(list((tmp_path / "cut").glob("*.partial.pt"))) == 1
    assert not (tmp_path / "cut" / "results.json").exists()
    monkeypatch.undo()
    losses, extracted = [], []
    real_loss, real_extract = F.cross_entropy, linear.extract_tests
    monkeypatch.setattr(F, "cross_entropy", lambda *a: losses.append(1) or real_loss(*a))
    monkeypatch.setattr(
        linear, "extract_tests", lambda *a, **k: extracted.append(1) or real_extract(*a, **k)
    )
    evaluate(tmp_path / "cut")
    parts, sets = (3, 2) if module is eval_linear else (1, 1)  # sets: held-out slice and test
    assert len(losses) == 2 * epochs_left * parts  # 2 steps an epoch
    networks_left = 1 if cut_after == 5 or "--seeds=2" not in options else 2
    assert len(extracted) == sets * networks_left
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert "continuing" in capsys.readouterr().out
    assert not list((tmp_path / "cut").glob("*.partial*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, tests",
    [
        (["--task=semi1", "--compare={dino}", "--untrained=True"], {"orig"}),
        (["--task=folder", "--mode=linear"], {"orig"}),
        (["--task=rotation_invariance", "--degrees=30"], {"turned by up to 30"}),
        (["--task=rotation_invariance", "--mode=finetune", "--part=ef"], {"turned by up to 180"}),
        (
            ["--task=rotation_sensitivity", "--mode=finetune", "--part=full"],
            {"which of 4 rotations"},
        ),
        (["--task=cub200", "--data={cub}"], {"orig"}),
    ],
)
def test_downstream_tasks_run_end_to_end(run_folder, folder, tmp_path, options, tests):
    cub = write_cub(tmp_path / "CUB_200_2011")
    options = [option.format(dino=run_folder / "dino" / "ckpt.pt", cub=cub) for option in options]
    if not any(option.startswith("--data") for option in options):
        options.append(f"--data={folder}")
    ckpt = run_folder / "clever" / "ckpt.pt"
    eval_downstream.main([f"--ckpt={ckpt}", f"--out={tmp_path}", *QUICK, "--epochs=1", *options])
    [result] = json.loads((tmp_path / "results.json").read_text())
    assert {row["test"] for row in result["rows"]} == tests
    assert result["task"] == options[0].removeprefix("--task=")
    turns = 4 if "which of 4 rotations" in tests else 1
    assert {row["n"] for row in result["rows"]} == {turns * result["protocol"]["test_n"]}
    chosen = {option.removeprefix("--part=") for option in options if "--part" in option}
    assert {row["part"] for row in result["rows"]} == (chosen or {"full", "ir", "ef"})


@pytest.mark.slow
def test_a_backbone_with_batch_norm_stays_as_it_is_from_seed_to_seed(folder, tmp_path):
    ckpt = tmp_path / "resnet18.pth"
    save_atomically(build_backbone("resnet18").state_dict(), str(ckpt))
    command = [f"--ckpt={ckpt}", f"--data={folder}", "--img_size=32", "--tests=orig"]
    for seeds, seed in ((2, 0), (1, 1)):
        seeded = [f"--seeds={seeds}", f"--seed={seed}"]
        eval_linear.main([*command, "--knn=False", *QUICK, *seeded])
    both, second = rows_of(tmp_path)
    assert [row for row in both if row["seed"] == 1] == second


def test_one_broken_file_in_a_small_slice_does_not_stop_an_evaluation(folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    sorted((images / "val" / "key").iterdir())[0].write_bytes(b"broken")  # 1 of 40
    ckpt = tmp_path / "weights.pt"
    save_atomically(build_backbone("vit_micro", 32, 8).state_dict(), str(ckpt))
    command = [f"--ckpt={ckpt}", f"--data={images}", "--tests=orig", "--knn=False", *QUICK]
    eval_linear.main(command)
    assert {row["n"] for row in rows_of(tmp_path)[0]} == {40}


@pytest.mark.slow
def test_fine_tuning_that_diverges_says_so(folder, run_folder, tmp_path):
    ckpt = run_folder / "clever" / "ckpt.pt"
    command = [f"--ckpt={ckpt}", "--task=folder", f"--data={folder}", f"--out={tmp_path}", *QUICK]
    with pytest.raises(UsageError, match="lower --lr"):
        eval_downstream.main([*command, "--lr=100", "--part=full"])


def test_fine_tuning_moves_the_whole_network_and_leaves_the_model_alone(
    folder, tmp_path, monkeypatch
):
    [model] = models()
    made = []
    real = eval_downstream.Finetuned
    monkeypatch.setattr(eval_downstream, "Finetuned", lambda *a: made.append(real(*a)) or made[-1])
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    train, test = data.open_splits(str(folder))
    clean = linear.perturbation_tests("orig")
    task = plain_task("folder", train, test, clean, clean)
    config = eval_downstream.DownstreamConfig(
        ckpt="x", task="folder", epochs=2, batch_size=16, workers=0, part="ir", lr=0.05
    )
    state = evalstate.EvalState(str(tmp_path), dict(task="folder"))
    eval_downstream.finetune([model], task, config, 32, HERE, state)
    after = made[0].representation.backbones[0].state_dict()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(before[name], value)
        assert not torch.equal(before[name], after[name])
    assert made[0].classifier.in_features == 486


def test_a_network_that_diverged_in_the_last_step_gives_no_row(
    run_folder, folder, tmp_path, monkeypatch
):
    def train_network(network, *_):
        with torch.no_grad():
            network.classifier.bias.fill_(torch.nan)
        yield {}

    monkeypatch.setattr(eval_downstream, "train_network", train_network)
    given = [f"--ckpt={run_folder}/clever/ckpt.pt", f"--data={folder}", f"--out={tmp_path}"]
    with pytest.raises(UsageError, match="not finite"):
        eval_downstream.main([*given, "--task=folder", "--part=full", *QUICK])
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    "given, n, world, batch", [(16, 100, 1, 16), (98, 100, 1, 98), (98, 50, 1, 48), (98, 7, 1, 7)]
)
def test_the_batch_is_as_asked_if_there_are_so_many_images(given, n, world, batch):
    assert evaluation.batch_size_of(given, n, world) == batch


def test_the_advice_for_a_batch_that_does_not_divide_works():
    with pytest.raises(UsageError, match="use --batch_size=15 or fewer ranks"):
        evaluation.batch_size_of(16, 22, 3)
    assert evaluation.batch_size_of(15, 22, 3) == 15
    with pytest.raises(UsageError, match="too few images"):
        evaluation.batch_size_of(16, 0, 1)


LINEAR_MISTAKES = [  # options, the one line's text
    ("", "no checkpoint given"),
    ("--ckpt=/nowhere.pt", "No such file"),
    ("--ckpt=README.md", "not a checkpoint; give"),
    ("--ckpt={dino} --part=ir", "has no split into ir and ef"),
    ("--ckpt={third_party} --part=ef --data=shapes", "has no split into ir and ef"),
    ("--ckpt={clever} --part=iR", "choose from full, ir, ef"),
    ("--ckpt={third_party}", "give --data"),
    ("--ckpt={third_party} --arch=vit_small --data=shapes", "holds a vit_micro"),
    ("--ckpt={clever} --tests=orig,blur", "tests=blur"),
    ("--ckpt={clever} --tests=orig,orig", "names a test twice"),
    ("--ckpt={clever} --data={folder}/train/key", "needs labels"),
    ("--ckpt={clever} --data={folder} --classes=configs/in100_classes.txt", "are not there"),
    ("--ckpt={clever} --out=/nowhere", "no such folder"),
    ("--ckpt={clever} --out={other_folder}", "not a JSON list"),
    ("--ckpt={clever} --lrs=(0.1,-1)", "must be between"),
    ("--ckpt={clever} --img_size=30", "img_size=30 is not a multiple of vit_micro's 8: take 32"),
    ("--lrs=0.1", "a list of one number: 0.1,"),
    ("--ckpt={clever} --protocol=ridge --epochs=3", "epochs=3: not for --protocol=ridge; remove"),
    ("--ckpt={clever} --answers=True", "did you mean 'save_correct'?"),
    ("--ckpt={clever} --views=9", "views=9: not for --protocol=paper; remove it"),
]
DOWNSTREAM_MISTAKES = [
    ("--ckpt={clever}", "choose from semi1"),
    ("--ckpt={clever} --task=semi100", "did you mean 'semi10'?"),
    ("--ckpt={clever} --task=semi10 --subset_list=/nowhere", "No such file"),
    ("--ckpt={clever} --task=folder", "give --data=FOLDER"),
    ("--ckpt={clever} --task=semi10 --held_out=0.2", "held_out=0.2: not for --mode=finetune"),
    ("--ckpt={clever} --task=semi10 --views=9", "views=9: not for --mode=finetune; remove it"),
    ("--ckpt={clever} --task=semi10 --mode=linear --weight_decay=1", "not for --mode=linear"),
    ("--ckpt={clever} --task=pets --data_root=/nowhere", "use --download=True"),
    ("--ckpt={clever} --task=cub200", "unpacked archive"),
    ("--ckpt={clever} --task=cub200 --data={folder}", "no images.txt in it"),
    ("--ckpt={clever} --task=pets --data={folder}", "remove it"),
    ("--ckpt={clever} --task=folder --subset_list=x", "remove it"),
    ("--ckpt={clever} --task=folder --degrees=30 --data={folder}", "degrees=30.0: not for"),
    ("--ckpt={clever} --task=folder --data={folder} --protocol=fast", "remove it"),
]
MISTAKES = [(eval_linear, *mistake) for mistake in LINEAR_MISTAKES]
MISTAKES += [(eval_downstream, *mistake) for mistake in DOWNSTREAM_MISTAKES]


@pytest.mark.parametrize("module, options, message", MISTAKES)
def test_mistakes_cost_one_line_and_write_nothing(
    run_folder, folder, tmp_path, module, options, message
):
    third_party = tmp_path / "weights.pt"
    save_atomically(build_backbone("vit_micro", 32, 8).state_dict(), str(third_party))
    before = sorted(run_folder.rglob("*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    values = dict(
        other_folder=tmp_path / "other",
        clever=run_folder / "clever" / "ckpt.pt",
        dino=run_folder / "dino" / "ckpt.pt",
        third_party=third_party,
        folder=folder,
    )
    command = [option.format(**values) for option in options.split()]
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        module.main([*command, "--workers=0", "--device=cpu"])
    assert "\n" not in str(error.value)
    assert sorted(run_folder.rglob("*")) == before


def test_usage_errors_exit_with_2(tmp_path):
    for command in (["eval_linear.py", "--part=ir"], ["eval_downstream.py", "--task=semi10"]):
        done = run_script(*command, "--ckpt=/nowhere.pt", check=False)
        assert done.returncode == 2
        assert "No such file" in done.stderr
        assert done.stderr.count("\n") == 1
    assert "--lrs" in run_script("eval_linear.py", "--help").stdout
    assert "--degrees" in run_script("eval_downstream.py", "--help").stdout


def test_third_party_weights_are_probed_whole(folder, tmp_path):
    ckpt = tmp_path / "resnet18.pth"
    save_atomically(build_backbone("resnet18").state_dict(), str(ckpt))
    command = [f"--ckpt={ckpt}", "--arch=resnet18", f"--data={folder}", "--img_size=32"]
    eval_linear.main([*command, "--tests=orig", *QUICK, "--epochs=1"])
    [rows] = rows_of(tmp_path)
    assert {(row["row"], row["part"]) for row in rows} == {("resnet18", "full")}
