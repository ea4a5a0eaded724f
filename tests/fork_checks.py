"""Check in a changed copy of the tree what docs/fork.md says of the change.

python fork_checks.py RECIPE DATA OUT "SCRIPT --options" [RUN of the unchanged tree]
"""

import contextlib
import io
import json
import shutil
import sqlite3
import struct
import sys
from pathlib import Path
from typing import NamedTuple

from lib import data, equivariance, evaluation, fused, machine, sources, weights
from lib.config import Config

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import augment
import eval_linear
import losses
import model
import train

HERE = machine.Here(0, 1, torch.device("cpu"), "fp32", contextlib.nullcontext)
TINY = dict(
    arch="vit_nano",
    img_size=16,
    local_size=8,
    local_crops=1,
    out_dim=64,
    head_hidden=32,
    head_bottleneck=16,
    epochs=1,
    warmup_epochs=0,
    freeze_last_layer=0,
    batch_size=16,
    log_every=1,
    eval_every=0,
    probe_at_end=False,
    workers=0,
    device="cpu",
    precision="fp32",
)


class Given(NamedTuple):
    """The arguments of this script."""

    data: str  # folder with train/CLASS and val/CLASS
    out: Path
    command: str  # of the page: SCRIPT --options
    plain: Path | None = None  # a run of the unchanged tree

    def options(self, **more):
        """Return the command's options, tiny where the command says nothing: {name: value}."""
        words = [word[2:].split("=") for word in self.command.split() if word.startswith("--")]
        named = dict(words) if self.command.startswith("train.py") else {}
        return TINY | dict(data=self.data) | named | more


def train_run(given, name="run", **more):
    """Train by the command, shortened -> folder of the run."""
    options = given.options(**more, out_dir=given.out / name)
    demo = Path(__file__).parent / "configs" / "demo.py"
    train.main([str(demo), *(f"--{key}={value}" for key, value in options.items())])
    return given.out / name


def config_of(given, **more):
    """Return the Config of the command, without demo.py's options."""
    types = {name: field.type for name, field in Config.__dataclass_fields__.items()}
    options = given.options(**more)
    return Config(**{n: v if types[n] is bool else types[n](v) for n, v in options.items()})


def weights_of(run):
    return torch.load(run / "backbone.pt", weights_only=True)


def are_same(a, b):
    """Tell whether two state dicts are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(run, name):
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return torch.tensor([line[name] for line in lines if name in line])


def ridge_rows(run):
    """Evaluate a run by ridge probes -> rows of results.json, what was printed."""
    for name in list(equivariance.CHANGES)[2:]:  # two are enough here
        del equivariance.CHANGES[name]
    equivariance.draw = lambda *_: False
    options = ["--protocol=ridge", "--device=cpu", "--precision=fp32", "--workers=0"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        eval_linear.main([f"--ckpt={run}/ckpt.pt", *options])
    return json.loads((run / "results.json").read_text())[-1]["rows"], printed.getvalue()


def unchanged(given):
    ridge_rows(train_run(given))


# --- losses


def a_pair_term(given):
    run = train_run(given)
    plain = train_run(given, "plain", fused=False)
    values = logged(run, "L_Orth")
    assert len(values) == 5 and values.isfinite().all()
    torch.testing.assert_close(values, logged(plain, "L_Orth"), rtol=1e-3, atol=1e-4)
    assert not torch.equal(values, logged(given.plain, "L_Orth"))

    torch.manual_seed(0)
    student, teacher = (F.normalize(torch.randn(v, 6, 16), dim=-1) for v in (4, 2))
    student.requires_grad_()
    layers = [model.WeightNormLinear(16, 64) for _ in range(2)]
    rest = (teacher, layers[1], torch.zeros(64), (0.1, 0.04), 2)
    found = []
    for compute in (fused.prototype_loss, fused.plain_loss):
        loss, *_ = compute(losses.PAIR_TERMS["overlap"], student, layers[0], *rest)
        found.append([loss, *torch.autograd.grad(loss, (student, layers[0].weight_v))])
    assert 0 < found[0][0] < 1
    torch.testing.assert_close(*found)


def a_loss_term(given):
    run = train_run(given)
    values = logged(run, "L_Cov")
    assert len(values) == 5 and values.isfinite().all() and (values > 0).all()
    off = train_run(given, "off", lambda_cov=0)
    assert are_same(weights_of(off), weights_of(given.plain))
    assert not are_same(weights_of(run), weights_of(given.plain))


def a_method(given):
    run = train_run(given, epochs=4, lr=0.02)
    values = logged(run, "L_CL")
    assert len(values) == 20 and values.isfinite().all()
    assert values[-5:].mean() < 0.9 * values[:5].mean(), values
    state = torch.load(run / "ckpt.pt", weights_only=True)
    assert state["config"]["ratio"] == 1.0 and not state["centers"]


# --- views


def crops_of(given, start, stop, **more):
    config = config_of(given, **more)
    images, _ = data.open_for_training(config, HERE)
    return [batch[:2] for batch in data.train_loader(images, config, start, stop, HERE)]


def changes_crops(given):
    """The transform changes crops; they, and so the weights, are a function of the step."""
    found = crops_of(given, 0, 5)
    plain = crops_of(given, 0, 5, recipe="caug")
    for new, old in zip(found[3], plain[3]):
        is_changed = (new != old).flatten(2).any(-1)
        assert new.dtype == torch.uint8 and is_changed.float().mean() > 0.2
    for more in (dict(), dict(cache="off"), dict(cache="off", workers=1)):
        torch.rand(7)
        [again] = crops_of(given, 3, 4, **more)
        assert all(torch.equal(a, b) for a, b in zip(again, found[3]))
    runs = [weights_of(train_run(given, name)) for name in ("run", "again")]
    assert are_same(*runs) and not are_same(runs[0], weights_of(given.plain))
    assert (given.out / "run" / "views.png").exists()
    recipe = augment.RECIPES[given.options()["recipe"]]
    augment.PERTURBATIONS["new"] = augment.Recipe(crop_transform=recipe.crop_transform)
    images, seeds = found[0][0][:, 0], torch.arange(16)
    tested = augment.perturbation("new")(images, seeds)
    assert tested.shape == images.shape
    assert not torch.equal(tested, augment.perturbation("orig")(images, seeds))


def a_transform_of_torchvision(given):
    changes_crops(given)


def a_transform_of_your_own(given):
    changes_crops(given)


def an_operation_on_the_device(given):
    runs = [weights_of(train_run(given, name)) for name in ("run", "again")]
    assert are_same(*runs) and not are_same(runs[0], weights_of(given.plain))

    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    seeds = torch.arange(64)
    caug = augment.RECIPES["caug"]
    plain = augment.augment(images, caug, seeds)
    always = augment.augment(images, caug._replace(negative=1.0), seeds)
    torch.testing.assert_close(augment.denormalize(always), 1 - augment.denormalize(plain))
    some = augment.RECIPES["caug+negative"]
    by_rows = augment.augment(images, some, seeds)
    share = (by_rows != plain).flatten(1).any(1).float().mean()
    assert 0.1 < share < 0.5
    params = augment._in_use(augment.parameters(some, seeds), some)
    by_masks = augment.transform(images, params, masked=True)
    torch.testing.assert_close(by_masks, by_rows, rtol=0, atol=1e-5)
    # without it, nothing has changed
    assert are_same(weights_of(train_run(given, "caug", recipe="caug")), weights_of(given.plain))


# --- backbones


def few_images(given):
    """Make a folder of 8 training and 4 test images: ConvNeXt takes its time."""
    for split, n in (("train", 8), ("val", 4)):
        for path in sorted(Path(given.data, split, "key").iterdir())[:n]:
            target = given.out / "few" / split / "key" / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return given.out / "few"


def a_backbone(given):
    run = train_run(given, data=few_images(given), batch_size=4, img_size=32)
    assert logged(run, "loss").isfinite().all()
    theirs = torchvision.models.convnext_tiny()
    theirs.classifier[2] = nn.Identity()
    theirs.load_state_dict(weights_of(run), strict=True)
    ours, config = weights.load_backbone(run / "backbone.pt")
    assert config["arch"] == "convnext_tiny"
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()(x))


def drop_path_for_the_backbone(given):
    """Factors of 1 change nothing, a factor of 0 its own sample; a step takes factors."""
    net = model.build_backbone("convnext_tiny", drop_path=0.5)
    nn.init.ones_(net.features[1][0].layer_scale)
    x = torch.rand(2, 3, 32, 32)
    scale = torch.ones(2, 18, 2)
    with torch.no_grad():
        plain = net(x)
        torch.testing.assert_close(net(x, scale), plain)
        scale[0, 0] = 0
        dropped = net(x, scale)
        torch.testing.assert_close(net(x), plain)
    torch.testing.assert_close(dropped[1], plain[1])
    assert (dropped[0] - plain[0]).abs().max() > 1e-3

    config = config_of(given, data=few_images(given), batch_size=4)
    images, _ = data.open_for_training(config, HERE)
    batch = next(iter(data.train_loader(images, config, 0, 1, HERE)))
    run = train.make_run(config, 2, HERE)
    scales = run.drop_path_scales(batch.seeds, run.views(batch))
    assert [scale.shape for scale in scales] == [(2, 4, 18, 2), (1, 4, 18, 2)]
    assert train.train_step(run, 0, batch)["loss"].isfinite()


# --- data sets


def write_idx(path, array):
    """Write a tensor uint8 in MNIST's format."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.numpy().tobytes())


def a_data_set_of_torchvision(given):
    raw = given.out / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = {}
    for split, name, n in (("train", "train", 80), ("val", "t10k", 40)):
        pixels[split] = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte", pixels[split])
        write_idx(raw / f"{name}-labels-idx1-ubyte", (torch.arange(n) % 10).byte())
    root = given.out / "data"
    run = train_run(given, data_root=root)
    assert logged(run, "loss").isfinite().all() and len(logged(run, "knn_full")) == 1
    for split, expected in pixels.items():
        images = sources.open_images("fashion", split, root=str(root))
        assert torch.equal(images.pixels, expected[:, None].expand(-1, 3, -1, -1))
        assert images.labels.tolist() == [i % 10 for i in range(len(expected))]
        assert images.classes[:2] == ["T-shirt/top", "Trouser"]


def a_data_set_of_your_own(given):
    run = train_run(given, batch_size=128)
    assert logged(run, "loss").isfinite().all() and len(logged(run, "knn_full")) == 1
    trained = json.loads((run / "config.json").read_text())
    found = evaluation.data_of(eval_linear.LinearConfig(), trained)
    assert found == ("own", "")
    splits = data.labeled_splits(*found)  # as an evaluation does
    assert all(images.pixels.shape == (500, 3, 32, 32) for images in splits)
    assert all(len(images.classes) == 10 for images in splits)
    assert not torch.equal(splits[0].pixels, splits[1].pixels)


# --- evaluations and the log


def a_column(given, name="kNN, k 1"):
    rows, printed = ridge_rows(train_run(given))
    assert f" | {name} |" in printed
    new = [row for row in rows if row["metric"] == name]
    assert {row["part"] for row in new} == {"full", "ir", "ir[:d_ef]", "ef", ""}
    [plain] = json.loads((given.plain / "results.json").read_text())
    assert [row for row in rows if row["metric"] != name] == plain["rows"]


def a_column_with_features_of_its_own(given):
    a_column(given, "class, jittered")


def a_logger(given):
    run = train_run(given)
    expected = {}
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        expected |= {(line["step"], name): value for name, value in line.items()}
    with sqlite3.connect(run / "log.db") as db:
        found = {(step, name): value for step, name, value in db.execute("select * from log")}
    assert found.keys() == expected.keys() and (5, "L_Orth") in found and (5, "knn_full") in found
    assert all(float(f"{value:.7g}") == expected[key] for key, value in found.items())


if __name__ == "__main__":
    name, folder, out, command, *plain = sys.argv[1:]
    globals()[name](Given(folder, Path(out), command, *map(Path, plain)))
    print(f"{name}: checked")
