"""eval_linear.py and eval_downstream.py: the classifiers against the textbook's one at a time, the protocol's promises, the command lines."""

import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

import augment
import data
import eval_downstream
import eval_linear
import probe
from configurator import UsageError
from conftest import arguments, run_script
from draws import key, uniforms
from model import build_backbone, save_atomically, split
from probe import Model

CPU = torch.device("cpu")
QUICK = ["--epochs=4", "--batch_size=32", "--workers=0", "--precision=fp32", "--device=cpu"]


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
    return [Model("clever", build_backbone(name, 32, 8).eval(), ratio, dict(arch=name))]


# ------------------------------------------------------------------------------------------------ what a classifier sees


def test_a_representation_is_the_concatenated_blocks_and_its_parts_are_columns():
    x = torch.randn(3, 3, 32, 32)
    two = models() + [models(1)[0]._replace(row="dino")]
    z = eval_linear.Representation(two)
    features = z(x)
    blocks = [t[:, 0] for t in two[0].backbone.tokens(x, 4)]
    torch.testing.assert_close(features[:, :512], torch.cat(blocks, 1))
    published_ir = torch.cat(
        [*blocks[:3], split(blocks[3])[0]], 1
    )  # the scripts cut ef off the last block only
    torch.testing.assert_close(features[:, z.columns["clever", "ir"]], published_ir)
    torch.testing.assert_close(features[:, z.columns["clever", "ef"]], split(blocks[3])[1])
    torch.testing.assert_close(
        features[:, z.z_columns["clever", "ir"]], split(two[0].backbone(x))[0]
    )
    assert set(z.columns) == {
        ("clever", "full"),
        ("clever", "ir"),
        ("clever", "ef"),
        ("dino", "full"),
    } and features.shape == (3, z.dim) == (3, 1024)
    every = eval_linear.Representation(two[:1], cut="every").columns
    torch.testing.assert_close(
        features[:, every["clever", "ir"]], torch.cat([split(block)[0] for block in blocks], 1)
    )
    torch.testing.assert_close(
        features[:, every["clever", "ef"]], torch.cat([split(block)[1] for block in blocks], 1)
    )


def test_vit_base_gives_cls_and_mean_patch_and_resnet_its_pooled_z():
    torch.manual_seed(0)
    backbone, x = build_backbone("vit_micro", 32, 8).eval(), torch.randn(2, 3, 32, 32)
    base = eval_linear.Representation([Model("clever", backbone, 0.8, dict(arch="vit_base"))])
    [tokens] = backbone.tokens(x)
    torch.testing.assert_close(base(x), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
    torch.testing.assert_close(base(x)[:, base.z_columns["clever", "full"]], backbone(x))
    both = [
        torch.cat(halves, 1) for halves in zip(split(tokens[:, 0]), split(tokens[:, 1:].mean(1)))
    ]  # both rows are of the last block
    torch.testing.assert_close(base(x)[:, base.columns["clever", "ir"]], both[0])
    torch.testing.assert_close(base(x)[:, base.columns["clever", "ef"]], both[1])
    resnet = eval_linear.Representation(models(name="resnet18"))
    assert resnet(x).shape == (2, 512) and len(resnet.columns["clever", "ir"]) == 409
    with pytest.raises(UsageError, match="no blocks"):
        eval_linear.Representation(models(name="resnet18"), blocks=4)


def test_classifiers_that_train_together_are_those_trained_one_at_a_time():
    """Oracle: the published loop, an nn.Linear and an SGD for each part and learning rate, on the same batches."""
    generator = torch.Generator().manual_seed(0)
    z, y = (
        torch.randn(5, 32, 12, generator=generator),
        torch.randint(0, 3, (5, 32), generator=generator),
    )
    columns, lrs = [torch.arange(12), torch.tensor([0, 3, 11])], [0.01, 0.5, 40.0]
    together = eval_linear.Classifiers(columns, 3, len(lrs), seed=1)
    alone = {}
    for i, c in enumerate(columns):
        for j, lr in enumerate(lrs):
            linear = nn.Linear(len(c), 3)
            linear.load_state_dict(
                dict(
                    weight=together.weights[i][j].detach().clone(),
                    bias=together.biases[i][j].detach().clone(),
                )
            )
            optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9)
            for x, labels in zip(z, y):
                optimizer.zero_grad()
                F.cross_entropy(linear(x[:, c]), labels).backward()
                optimizer.step()
            alone[i, j] = linear
    optimizer = torch.optim.SGD(together.groups(lrs), momentum=0.9)
    for x, labels in zip(z, y):
        optimizer.zero_grad()
        eval_linear.sum_of_losses(together(x), labels).backward()
        optimizer.step()
    for (i, j), linear in alone.items():
        torch.testing.assert_close(together.weights[i][j], linear.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.biases[i][j], linear.bias, rtol=1e-4, atol=1e-5)
    found = eval_linear.accuracies(together, z.flatten(0, 1), y.flatten())
    for (i, j), linear in alone.items():
        expected = (
            100 * (linear(z.flatten(0, 1)[:, columns[i]]).argmax(1) == y.flatten()).double().mean()
        )
        assert found[i][j].item() == pytest.approx(expected.item())


def test_the_probe_reaches_the_minimum_of_logistic_regression():
    """Oracle: Newton's method on the same convex problem."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 3, generator=generator).double()
    y = (z[:, 0] - z[:, 1] + 0.8 * torch.randn(200, generator=generator) > 0.2).long()
    x, w = torch.cat([z, torch.ones(200, 1).double()], 1), torch.zeros(4).double()
    for _ in range(20):
        p = torch.sigmoid(x @ w)
        w -= torch.linalg.solve(x.T * (p * (1 - p)) @ x, x.T @ (p - y))
    optimum = F.binary_cross_entropy_with_logits(x @ w, y.double()).item()
    classifiers = eval_linear.Classifiers([torch.arange(3)], 2, 1)
    optimizer = torch.optim.SGD(classifiers.groups([1.0]), momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        loss = eval_linear.sum_of_losses(classifiers(z.float()), y)
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(optimum, abs=1e-4)


# ------------------------------------------------------------------------------------------------ the protocol's promises


@pytest.mark.parametrize("protocol", ["paper", "fast"])
def test_held_out_images_choose_and_never_train(tmp_path, protocol):
    """Each image's pixels tell its index; what the classifiers' batches are made of is watched."""

    def numbered(n, first):
        pixels = (
            torch.arange(first, first + n).view(n, 1, 1, 1).expand(n, 3, 32, 32).to(torch.uint8)
        )
        return data.Images(pixels.__getitem__, torch.arange(n) % 4, list("abcd"), str)

    train, test, trained_on, judged_on = numbered(100, 0), numbered(20, 200), set(), set()

    def view(crops, keys):
        trained_on.update(crops[:, 0, 0, 0].tolist())
        return eval_linear.flipped(crops, keys)

    def clean(images, keys):
        judged_on.update(images[:, 0, 0, 0].tolist())
        return probe.perturbed("orig")(images, keys)

    config = eval_linear.LinearConfig(
        ckpt="x", epochs=3, batch_size=16, workers=0, held_out=0.1, protocol=protocol
    )
    task = eval_linear.Task(
        "linear",
        train,
        test,
        4,
        view,
        eval_linear.own_label,
        *[lambda seed: [("orig", clean, None)]] * 2,
    )
    rows = eval_linear.linear_probe(
        models(),
        task,
        config,
        32,
        CPU,
        probe.choose_precision("fp32", CPU)[1],
        eval_linear.Partial(str(tmp_path), dict(task="linear")),
    )
    fit, held = data.hold_out(train.labels, 0.1, 0)
    assert (
        len(held) == 10
        and trained_on == set(fit.tolist())
        and judged_on == set(held.tolist()) | set(range(200, 220))
    )
    assert {row["lr"] for row in rows if row["judge"] == "linear, chosen lr"} <= {
        0.001,
        *config.lrs,
    } and all(row["n"] == 20 for row in rows)


def test_the_chosen_learning_rate_is_the_held_out_slices_best(monkeypatch, tmp_path, folder):
    seen, real = [], eval_linear.answers
    monkeypatch.setattr(eval_linear, "answers", lambda *a: seen.append(real(*a)) or seen[-1])
    train, test = data.open_splits(str(folder))
    config = eval_linear.LinearConfig(
        ckpt="x", epochs=2, batch_size=32, workers=0, held_out=0.3, lrs=(0.1, 1.0), answers=True
    )
    task = eval_linear.Task(
        "linear",
        train,
        test,
        10,
        eval_linear.flipped,
        eval_linear.own_label,
        eval_linear.perturbations("ro,orig"),
        eval_linear.perturbations("orig"),
    )
    rows = eval_linear.linear_probe(
        models(),
        task,
        config,
        32,
        CPU,
        probe.choose_precision("fp32", CPU)[1],
        eval_linear.Partial(str(tmp_path), dict(task="linear")),
    )
    held, turned, orig = ([100 * right.double().mean(1) for right in answers] for answers in seen)
    for i, part in enumerate(("full", "ir", "ef")):
        best = int(held[i].argmax())
        for test, found in (("orig", orig), ("ro", turned)):
            [chosen] = [
                row
                for row in rows
                if (row["part"], row["test"], row["judge"]) == (part, test, "linear, chosen lr")
            ]
            [fixed] = [
                row
                for row in rows
                if (row["part"], row["test"], row["judge"]) == (part, test, "linear, lr 0.001")
            ]
            assert (
                chosen["lr"] == (0.001, 0.1, 1.0)[best]
                and chosen["value"] == round(found[i][best].item(), 2)
                and fixed["value"] == round(found[i][0].item(), 2)
            )
            assert (
                probe.unpacked(chosen["right"], chosen["n"])
                == seen[1 + (test == "orig")][i][best].numpy()
            ).all()


def test_held_out_slices_are_stratified_and_repeat():
    labels = torch.arange(1000) % 10
    fit, held = data.hold_out(labels, 0.05, 3)
    assert (
        sorted([*fit, *held]) == list(range(1000))
        and torch.bincount(labels[held], minlength=10).tolist() == [5] * 10
    )
    assert (data.hold_out(labels, 0.05, 3)[1] == held).all() and (
        data.hold_out(labels, 0.05, 4)[1] != held
    ).any()


@pytest.mark.parametrize("name", ["cj", "cj+flip", "cj+ro", "cj+ro180"])
def test_perturbations_are_torchvisions_functions_of_the_same_parameters(name):
    images, keys = data.shapes("val", 32, 6).read(torch.arange(6)), key(0, torch.arange(6))
    recipe = augment.PERTURBATIONS[name]
    params, expected = augment.parameters(recipe, keys), []
    assert params["angle"].abs().max() <= recipe.rotate
    for i, image in enumerate(images.float() / 255):
        image = TF.hflip(image) if params["flip"][i] else image
        image = TF.rotate(image, params["angle"][i].item(), InterpolationMode.BILINEAR)
        for operation in params["order"][i].tolist():
            factor = params["factors"][i, min(operation, 2)].item()
            image = (
                TF.adjust_brightness(image, factor)
                if operation == 0
                else TF.adjust_contrast(image, factor)
                if operation == 1
                else TF.adjust_saturation(image, factor)
                if operation == 2
                else TF.adjust_hue(image, (params["hue"][i].item() + 0.5) % 1 - 0.5)
            )
        expected.append(TF.normalize(image, augment.MEAN, augment.STD))
    torch.testing.assert_close(
        augment.augment(images, recipe, keys), torch.stack(expected), atol=2e-3, rtol=0
    )


def test_perturbed_images_repeat_with_the_seed_and_differ_with_another():
    images, keys = data.shapes("val", 32, 4).read(torch.arange(4)), key(0, torch.arange(4))
    a, b, c = (probe.perturbed("cj+ro+et", seed)(images, keys) for seed in (0, 0, 1))
    assert (
        torch.equal(a, b)
        and not torch.allclose(a, c)
        and torch.equal(a[2:], probe.perturbed("cj+ro+et", 0)(images[2:], keys[2:]))
    )


def test_quarter_turns_turn_after_the_flip_and_tell_how_often():
    crops, keys = data.shapes("val", 32, 64).read(torch.arange(64)), key(0, torch.arange(64))
    turns, views = eval_downstream.quarter_turns(keys), eval_downstream.quarter_turned(crops, keys)
    flips = uniforms(key(keys, 2), 16)[:, 0] < 0.5
    for crop, turn, flip, view in zip(crops, turns.tolist(), flips, views):
        upright = TF.normalize((crop.flip(-1) if flip else crop) / 255, augment.MEAN, augment.STD)
        torch.testing.assert_close(view, torch.rot90(upright, turn, (1, 2)), atol=1e-5, rtol=0)
    assert torch.bincount(turns, minlength=4).min() > 5


# ------------------------------------------------------------------------------------------------ subsets and published data sets


def test_a_share_of_the_labels_is_stratified_and_a_list_is_kept_to(folder, tmp_path):
    labels = torch.arange(300) % 3
    chosen = data.some_of_each(labels, 0.1, 0)
    assert (
        torch.bincount(labels[chosen]).tolist() == [10, 10, 10]
        and (chosen == data.some_of_each(labels, 0.1, 0)).all()
    )
    assert len(data.some_of_each(labels, 0.001, 0)) == 3  # one of each at least
    images = data.Images(
        None, torch.zeros(3, dtype=torch.int64), ["n01", "n02"], "/x/n01/n01_{}.JPEG".format
    )
    listing = tmp_path / "list.txt"
    listing.write_text("n01_2.JPEG\nn01_0.JPEG\nn99_5.JPEG\n")
    assert data.listed(images, listing).tolist() == [0, 2]
    for text, message in (
        ("n01_7.JPEG\n", "not in the data"),
        ("n99_5.JPEG\n", "none of its lines"),
    ):
        listing.write_text(text)
        with pytest.raises(UsageError, match=message):
            data.listed(images, listing)
    with pytest.raises(UsageError, match="No such file"):
        data.listed(images, tmp_path / "nowhere.txt")


def write_cub(root, n=24, classes=("001.Auk", "002.Wren")):
    (root / "images").mkdir(parents=True)
    images, tables = data.shapes("train", 32, n), ([], [], [])
    from torchvision.io import write_jpeg

    for i in range(n):
        name = f"{classes[i % 2]}/{i}.jpg"
        (root / "images" / name).parent.mkdir(exist_ok=True)
        write_jpeg(images.read(i), str(root / "images" / name))
        for table, value in zip(tables, (name, i % 2 + 1, int(i % 3 > 0))):
            table.append(f"{i + 1} {value}")
    for name, table in zip(
        ("images.txt", "image_class_labels.txt", "train_test_split.txt"), tables
    ):
        (root / name).write_text("\n".join(table) + "\n")
    return root


def test_cub200s_archive_is_read(tmp_path):
    root = write_cub(tmp_path / "CUB_200_2011")
    train, test = data.open_splits(str(root))
    assert (len(train), len(test)) == (16, 8) and train.classes == ["001.Auk", "002.Wren"]
    assert all(
        f"/{train.classes[label]}/" in train.name(i) for i, label in enumerate(train.labels)
    ) and train.read(0).shape == (3, 32, 32)
    (root / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(UsageError, match="do not fit together"):
        data.open_splits(str(root))
    (root / "train_test_split.txt").unlink()
    with pytest.raises(UsageError, match="unpack the archive again"):
        data.open_splits(str(root))


def write_images(folder, names):
    from torchvision.io import write_jpeg

    images = data.shapes("train", 32, len(names))
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(images.read(i), str(folder / name))


def test_pets_and_food_are_read_in_their_true_formats(tmp_path):
    pets = [f"Abyssinian_{i}" for i in range(4)] + [f"beagle_{i}" for i in range(4)]
    write_images(tmp_path / "oxford-iiit-pet" / "images", [f"{name}.jpg" for name in pets])
    annotations = tmp_path / "oxford-iiit-pet" / "annotations"
    annotations.mkdir()
    for name, some in (("trainval", slice(0, None, 2)), ("test", slice(1, None, 2))):
        (annotations / f"{name}.txt").write_text(
            "".join(
                f"{pet} {1 if pet[0] == 'A' else 2} {1 if pet[0] == 'A' else 2} 1\n"
                for pet in pets[some]
            )
        )
    train, test = data.open_splits("pets", root=str(tmp_path))
    assert (
        train.labels.tolist() == [0, 0, 1, 1]
        and train.classes == ["Abyssinian", "Beagle"]
        and test.name(3).endswith("beagle_3.jpg")
        and test.read(3).shape == (3, 32, 32)
    )
    write_images(
        tmp_path / "food-101" / "images",
        [f"{food}/{i}.jpg" for food in ("pie", "ramen") for i in range(3)],
    )
    (tmp_path / "food-101" / "meta").mkdir()
    for name, numbers in (("train", (0, 1)), ("test", (2,))):
        (tmp_path / "food-101" / "meta" / f"{name}.json").write_text(
            json.dumps({food: [f"{food}/{i}" for i in numbers] for food in ("pie", "ramen")})
        )
    train, test = data.open_splits("food101", root=str(tmp_path))
    assert (
        train.labels.tolist() == [0, 0, 1, 1]
        and test.labels.tolist() == [0, 1]
        and test.read(0).shape == (3, 32, 32)
    )
    (tmp_path / "food-101" / "meta" / "test.json").write_text('{"pie": [], "ramen": []}')
    with pytest.raises(UsageError, match="val split holds no images"):
        data.open_splits("food101", root=str(tmp_path))
    (tmp_path / "food-101" / "meta" / "test.json").write_text('{"pie": ["pie/77"], "ramen": []}')
    with pytest.raises(UsageError, match="1 of 1 images are missing"):
        data.open_splits("food101", root=str(tmp_path))
    (tmp_path / "food-101" / "meta" / "train.json").write_text("[]")
    for damaged, message in (("food101", "damaged"), ("flowers102", "--download=True fetches it")):
        with pytest.raises(UsageError, match=message):
            data.open_splits(damaged, root=str(tmp_path))


def test_flowers_are_read_with_scipy_and_say_so_without(tmp_path, monkeypatch):
    from torchvision.datasets import Flowers102

    write_images(tmp_path / "flowers-102" / "jpg", [f"image_{i:05d}.jpg" for i in range(1, 7)])
    monkeypatch.setattr(
        Flowers102, "_check_integrity", lambda self: True
    )  # its checksums are those of the true archive
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(UsageError, match="pip install scipy"):
        data.open_splits("flowers102", root=str(tmp_path))
    monkeypatch.undo()
    io = pytest.importorskip(
        "scipy.io", reason="scipy, which torchvision reads Flowers102 with, is not installed"
    )
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    io.savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": [[1, 2, 1, 2, 1, 102]]})
    io.savemat(
        tmp_path / "flowers-102" / "setid.mat",
        {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]},
    )
    train, test = data.open_splits("flowers102", root=str(tmp_path))
    assert (
        train.labels.tolist() == [0, 1, 0, 1]
        and test.labels.tolist() == [0, 101]
        and train.read(0).shape == (3, 32, 32)
    )


def test_published_numbers_stand_beside_in100_alone():
    in100 = data.read_classes("configs/in100_classes.txt")
    known = [
        Model(method, None, 1, dict(method=method, arch="vit_small", recipe="caug"))
        for method in ("clever", "dino")
    ]
    rows = eval_linear.published_rows(known, in100, {"orig", "cj"})
    assert [(row["row"], row["test"], row["value"]) for row in rows] == [
        ("clever, published", "orig", 75.7),
        ("dino, published", "orig", 73.2),
    ]
    assert not eval_linear.published_rows(
        known, in100[:99], {"orig"}
    ) and not eval_linear.published_rows(
        [known[0]._replace(trained=dict(arch="vit_base"))], in100, {"orig"}
    )


# ------------------------------------------------------------------------------------------------ the command lines


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
    assert first == again and all(line in done.stdout for line in probe.table_lines(first))
    tests = "orig,cj,cj+flip,cj+ro,cj+ro+et,ro,cj+ro180,cj+ro+et50,cj+ro+et150".split(",")
    assert (
        {row["test"] for row in first} == set(tests)
        and {row["seed"] for row in first} == {0, 1}
        and {row["n"] for row in first} == {40}
    )
    assert {(row["row"], row["part"]) for row in first} == {
        ("untrained", "full"),
        ("clever", "full"),
        ("clever", "ir"),
        ("clever", "ef"),
        ("dino", "full"),
    }
    by_seed = [
        [row["value"] for row in first if row["seed"] == seed and row["judge"] != "kNN"]
        for seed in (0, 1)
    ]
    assert by_seed[0] != by_seed[1] and " ± " in done.stdout
    [protocol, _] = [
        result["protocol"] for result in json.loads((tmp_path / "results.json").read_text())
    ]
    assert (
        protocol["train_n"] == 80
        and protocol["test_n"] == 40
        and len(protocol["weights"]) == 3
        and protocol["img_size"] == 32
    )
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    "script, knobs",
    [
        ("eval_linear.py", ["--protocol=paper", "--tests=orig,cj+ro"]),
        ("eval_linear.py", ["--protocol=fast", "--tests=orig,cj+ro", "--views=2"]),
        ("eval_downstream.py", ["--task=semi10", "--part=ir"]),
        ("eval_downstream.py", ["--task=rotation_sensitivity"]),
    ],
)
def test_two_processes_are_one(run_folder, folder, tmp_path, script, knobs):
    command = [
        script,
        f"--ckpt={run_folder / 'clever' / 'ckpt.pt'}",
        f"--data={folder}",
        f"--out={tmp_path}",
        *QUICK,
        *knobs,
    ]
    for processes in (1, 2):
        run_script(*command, processes=processes)
    one, two = rows_of(tmp_path)
    assert [{k: v for k, v in row.items() if k != "value"} for row in one] == [
        {k: v for k, v in row.items() if k != "value"} for row in two
    ]
    for a, b in zip(one, two):
        assert a["value"] == pytest.approx(b["value"], abs=100 / a["n"] + 0.01), (
            a,
            b,
        )  # one image may lie on the fence


@pytest.mark.parametrize(
    "module, knobs",
    [
        (eval_linear, ["--protocol=paper"]),
        (eval_linear, ["--protocol=fast"]),
        (eval_downstream, ["--task=folder", "--part=full", "--seeds=2"]),
    ],
)
def test_an_interrupted_evaluation_continues_to_the_same_numbers(
    run_folder, folder, tmp_path, monkeypatch, capsys, module, knobs
):
    def command(out):
        return [
            f"--ckpt={run_folder / 'clever' / 'ckpt.pt'}",
            f"--data={folder}",
            f"--out={out}",
            *QUICK,
            *knobs,
        ]

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    module.main(command(tmp_path / "whole"))
    real, writes = eval_linear.Partial.write, []

    def write(self, **state):
        real(self, **state)
        writes.append(state["epoch"])
        if len(writes) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(eval_linear.Partial, "write", write)
    with pytest.raises(KeyboardInterrupt):
        module.main(command(tmp_path / "cut"))
    assert (
        writes[-1] == 3
        and len(list((tmp_path / "cut").glob("*.partial.pt"))) == 1
        and not (tmp_path / "cut" / "results.json").exists()
    )
    monkeypatch.undo()
    losses, real_loss = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *a: losses.append(1) or real_loss(*a))
    module.main(command(tmp_path / "cut"))
    assert len(losses) == 2 * (
        3 if module is eval_linear else 1 + 4
    )  # 2 steps an epoch: one epoch of three parts; one, and the next seed's four
    assert (
        rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
        and "continuing" in capsys.readouterr().out
    )
    assert not list((tmp_path / "cut").glob("*.partial*"))


@pytest.mark.parametrize(
    "knobs, tests",
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
def test_downstream_tasks_run_end_to_end(run_folder, folder, tmp_path, knobs, tests, monkeypatch):
    cub = write_cub(tmp_path / "CUB_200_2011")
    knobs = [knob.format(dino=run_folder / "dino" / "ckpt.pt", cub=cub) for knob in knobs]
    if not any(knob.startswith("--data") for knob in knobs):
        knobs.append(f"--data={folder}")
    eval_downstream.main(
        [
            f"--ckpt={run_folder / 'clever' / 'ckpt.pt'}",
            f"--out={tmp_path}",
            *QUICK,
            "--epochs=1",
            *knobs,
        ]
    )
    [result] = json.loads((tmp_path / "results.json").read_text())
    assert {row["test"] for row in result["rows"]} == tests and result["task"] == knobs[
        0
    ].removeprefix("--task=")
    turned = 4 if "which of 4 rotations" in tests else 1
    assert {row["n"] for row in result["rows"]} == {turned * result["protocol"]["test_n"]}
    wanted = (
        {"ef"}
        if "--part=ef" in knobs
        else {"full"}
        if "--part=full" in knobs
        else {"full", "ir", "ef"}
    )
    assert {row["part"] for row in result["rows"]} == wanted


def test_a_backbone_with_batch_norm_stays_as_it_is_from_seed_to_seed(folder, tmp_path):
    save_atomically(build_backbone("resnet18").state_dict(), str(tmp_path / "resnet18.pth"))
    for seeds, seed in ((2, 0), (1, 1)):
        eval_linear.main(
            [
                f"--ckpt={tmp_path / 'resnet18.pth'}",
                f"--data={folder}",
                "--img_size=32",
                "--tests=orig",
                "--knn=False",
                *QUICK,
                f"--seeds={seeds}",
                f"--seed={seed}",
            ]
        )
    both, second = rows_of(tmp_path)
    assert [row for row in both if row["seed"] == 1] == second


def test_one_broken_file_in_a_small_slice_does_not_stop_an_evaluation(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "images")
    sorted((tmp_path / "images" / "val" / "key").iterdir())[0].write_bytes(b"broken")  # 1 of 40
    save_atomically(build_backbone("vit_micro", 32, 8).state_dict(), str(tmp_path / "weights.pt"))
    eval_linear.main(
        [
            f"--ckpt={tmp_path / 'weights.pt'}",
            f"--data={tmp_path / 'images'}",
            "--tests=orig",
            "--knn=False",
            *QUICK,
        ]
    )
    assert {row["n"] for row in rows_of(tmp_path)[0]} == {40}


def test_fine_tuning_that_diverges_says_so(folder, run_folder, tmp_path):
    with pytest.raises(UsageError, match="lower --lr"):
        eval_downstream.main(
            [
                f"--ckpt={run_folder / 'clever' / 'ckpt.pt'}",
                "--task=folder",
                f"--data={folder}",
                f"--out={tmp_path}",
                *QUICK,
                "--lr=100",
                "--part=full",
            ]
        )


def test_fine_tuning_moves_the_whole_network_and_leaves_the_model_alone(
    folder, tmp_path, monkeypatch
):
    [model], made = models(), []
    monkeypatch.setattr(
        eval_downstream,
        "Finetuned",
        lambda *a, real=eval_downstream.Finetuned: made.append(real(*a)) or made[-1],
    )
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    train, test = data.open_splits(str(folder))
    task = eval_linear.Task(
        "folder",
        train,
        test,
        10,
        eval_linear.flipped,
        eval_linear.own_label,
        *[eval_linear.perturbations("orig")] * 2,
    )
    config = eval_downstream.DownstreamConfig(
        ckpt="x", task="folder", epochs=2, batch_size=16, workers=0, part="ir", lr=0.05
    )
    eval_downstream.finetune(
        [model],
        task,
        config,
        32,
        CPU,
        probe.choose_precision("fp32", CPU)[1],
        eval_linear.Partial(str(tmp_path), dict(task="folder")),
    )
    after = made[0].representation.backbones[0].state_dict()
    assert all(
        torch.equal(before[name], value) for name, value in model.backbone.state_dict().items()
    )
    assert (
        all(not torch.equal(before[name], after[name]) for name in before)
        and made[0].classifier.in_features == 486
    )


@pytest.mark.parametrize(
    "script, knobs, message",
    [
        ("eval_linear.py", [], "no checkpoint given"),
        ("eval_linear.py", ["--ckpt=/nowhere.pt"], "No such file"),
        ("eval_linear.py", ["--ckpt=README.md"], "not a checkpoint; give"),
        ("eval_linear.py", ["--ckpt={dino}", "--part=ir"], "tells of no split"),
        ("eval_linear.py", ["--ckpt={foreign}", "--part=ef", "--data=shapes"], "tells of no split"),
        ("eval_linear.py", ["--ckpt={clever}", "--part=iR"], "choose from full, ir, ef"),
        ("eval_linear.py", ["--ckpt={foreign}"], "give --data"),
        (
            "eval_linear.py",
            ["--ckpt={foreign}", "--arch=vit_small", "--data=shapes"],
            "holds a vit_micro",
        ),
        ("eval_linear.py", ["--ckpt={clever}", "--tests=orig,blur"], "tests=blur"),
        ("eval_linear.py", ["--ckpt={clever}", "--data={folder}/train/key"], "needs labels"),
        (
            "eval_linear.py",
            ["--ckpt={clever}", "--data={folder}", "--classes=configs/in100_classes.txt"],
            "are not there",
        ),
        ("eval_linear.py", ["--ckpt={clever}", "--out=/nowhere"], "no such folder"),
        ("eval_linear.py", ["--ckpt={clever}", "--lrs=(0.1,-1)"], "must lie between"),
        (
            "eval_linear.py",
            ["--ckpt={clever}", "--img_size=30"],
            "img_size=30 is not a multiple of vit_micro's 8: take 32",
        ),
        ("eval_linear.py", ["--lrs=0.1"], "one: --lrs=0.1,"),
        ("eval_linear.py", ["--ckpt={clever}", "--blocks=9"], "blocks=9"),
        ("eval_downstream.py", ["--ckpt={clever}"], "choose from semi1"),
        (
            "eval_downstream.py",
            ["--ckpt={clever}", "--task=semi10", "--subset_list=/nowhere"],
            "No such file",
        ),
        ("eval_downstream.py", ["--ckpt={clever}", "--task=folder"], "give --data=FOLDER"),
        (
            "eval_downstream.py",
            ["--ckpt={clever}", "--task=pets", "--data_root=/nowhere"],
            "--download=True fetches it",
        ),
        ("eval_downstream.py", ["--ckpt={clever}", "--task=cub200"], "unpacked archive"),
        ("eval_linear.py", ["--ckpt={clever}", "--tests=orig,orig"], "names a test twice"),
        ("eval_linear.py", ["--ckpt={clever}", "--out={foreign_folder}"], "not a JSON list"),
        (
            "eval_downstream.py",
            ["--ckpt={clever}", "--task=pets", "--data={folder}"],
            "leave it away",
        ),
        (
            "eval_downstream.py",
            ["--ckpt={clever}", "--task=folder", "--subset_list=x"],
            "leave it away",
        ),
        (
            "eval_downstream.py",
            ["--ckpt={clever}", "--task=folder", "--data={folder}", "--protocol=fast"],
            "leave it away",
        ),
    ],
)
def test_mistakes_cost_one_line_and_write_nothing(
    run_folder, folder, tmp_path, script, knobs, message, capsys
):
    foreign = tmp_path / "weights.pt"
    save_atomically(build_backbone("vit_micro", 32, 8).state_dict(), str(foreign))
    before = sorted(run_folder.rglob("*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    values = dict(
        foreign_folder=tmp_path / "other",
        clever=run_folder / "clever" / "ckpt.pt",
        dino=run_folder / "dino" / "ckpt.pt",
        foreign=foreign,
        folder=folder,
    )
    module = eval_linear if script == "eval_linear.py" else eval_downstream
    with pytest.raises(UsageError, match=message.replace("(", r"\(")) as error:
        module.main([knob.format(**values) for knob in knobs] + ["--workers=0", "--device=cpu"])
    assert "\n" not in str(error.value) and sorted(run_folder.rglob("*")) == before


def test_usage_errors_exit_with_2(tmp_path):
    for script in ("eval_linear.py", "eval_downstream.py"):
        done = run_script(
            script,
            "--task=semi10" if "down" in script else "--part=ir",
            "--ckpt=/nowhere.pt",
            check=False,
        )
        assert (
            done.returncode == 2 and "No such file" in done.stderr and done.stderr.count("\n") == 1
        )
    assert (
        "--lrs" in run_script("eval_linear.py", "--help").stdout
        and "--degrees" in run_script("eval_downstream.py", "--help").stdout
    )


def test_foreign_weights_are_probed_whole(folder, tmp_path):
    save_atomically(build_backbone("resnet18").state_dict(), str(tmp_path / "resnet18.pth"))
    eval_linear.main(
        [
            f"--ckpt={tmp_path / 'resnet18.pth'}",
            "--arch=resnet18",
            f"--data={folder}",
            "--img_size=32",
            "--tests=orig",
            *QUICK,
            "--epochs=1",
        ]
    )
    [rows] = rows_of(tmp_path)
    assert {(row["row"], row["part"]) for row in rows} == {("resnet18", "full")}
