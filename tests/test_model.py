"""Backbones, split, heads, network, and the files they are read from and written to."""

import argparse
import importlib.util
import types

from lib import checkpoint, rng, weights
from lib.config import UsageError
from lib.run import Run

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import tiny_config

import model


def dino_vit_shapes(dim, depth, img_size, patch_size):
    """Keys and shapes of DINO's and timm's ViT, written down from their published files."""
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + (img_size // patch_size) ** 2, dim),
        "patch_embed.proj.weight": (dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            shapes |= {
                f"blocks.{i}.{name}.weight": (rows, columns),
                f"blocks.{i}.{name}.bias": (rows,),
            }
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (dim,), f"blocks.{i}.{name}.bias": (dim,)}
    return shapes


@pytest.mark.parametrize(
    "arch, dim, depth, patch, millions",
    [
        ("vit_tiny", 192, 12, 16, 5.5),
        ("vit_small", 384, 12, 16, 21.7),
        ("vit_base", 768, 12, 16, 85.8),
        ("vit_small", 384, 12, 8, 21.7),
        ("vit_micro", 128, 6, 8, 1.3),
    ],
)
def test_vit_keys_shapes_and_size_are_dinos(arch, dim, depth, patch, millions):
    with torch.device("meta"):
        backbone = model.build_backbone(arch, 224, patch)
    assert {k: tuple(v.shape) for k, v in backbone.state_dict().items()} == dino_vit_shapes(
        dim, depth, 224, patch
    )
    assert (
        sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
        and backbone.dim == dim
    )


@pytest.mark.parametrize(
    "arch, dim", [("resnet18", 512), ("resnet50", 2048), ("resnext50_32x4d", 2048)]
)
@pytest.mark.slow
def test_resnet_is_torchvisions_without_fc(arch, dim):
    backbone = model.build_backbone(arch)
    reference = torchvision.models.get_model(arch)
    expected = {k: v.shape for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    assert {
        k: v.shape for k, v in backbone.state_dict().items()
    } == expected and backbone.dim == dim
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(backbone.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone.eval()(x), reference.eval()(x), atol=1e-4, rtol=1e-4)
    assert backbone(x).shape == (2, dim)


def test_small_stem_is_torchvisions_but_for_the_stem(tmp_path):
    """ResNet-18 as on CIFAR: 3x3, stride 1, no pooling. 32 px end as 4 x 4; files load as such."""
    backbone = model.build_backbone("resnet18", stem="small")
    reference = torchvision.models.resnet18()
    reference.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = torch.nn.Identity()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(backbone.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone.eval()(x), reference.eval()(x), atol=1e-4, rtol=1e-4)
    sizes = []
    reference.layer4.register_forward_hook(lambda *args: sizes.append(args[-1].shape[-2:]))
    reference(x)
    assert sizes == [(4, 4)]
    torch.save(backbone.state_dict(), tmp_path / "a.pt")
    loaded, facts = weights.load_backbone(tmp_path / "a.pt")
    assert facts["arch"] == "resnet18" and facts["stem"] == "small"
    torch.testing.assert_close(loaded(x), backbone(x))


@pytest.mark.parametrize(
    "arch, img_size, stem",
    [("resnet18", 32, "small"), ("resnet18", 96, "imagenet"), ("vit_micro", 32, "imagenet")],
)
def test_stem_is_small_for_small_images_unless_given(arch, img_size, stem):
    config = tiny_config(arch=arch, img_size=img_size, stem="auto")
    network = model.build_network(config)
    assert config.stem == stem
    if arch == "resnet18":
        assert network.backbone.conv1.kernel_size == ((3, 3) if stem == "small" else (7, 7))
        given = model.build_network(tiny_config(arch=arch, img_size=img_size, stem="imagenet"))
        assert given.backbone.conv1.kernel_size == (7, 7)
    with pytest.raises(UsageError, match="only for a ResNet"):
        model.build_backbone("vit_micro", stem="small")


@pytest.mark.parametrize(
    "wrong, hint", [("vit_smal", "vit_small"), ("resnet5", "resnet5"), ("", "vit_tiny")]
)
def test_unknown_backbone_lists_the_known_and_the_nearest(wrong, hint):
    with pytest.raises(UsageError, match=hint) as error:
        model.build_backbone(wrong)
    assert (
        "vit_micro" in str(error.value)
        and "resnet50" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_vit_computes_what_its_formulas_say():
    """Attention, MLP and residuals written out with loops over heads, in float64."""
    torch.manual_seed(0)
    vit = model.build_backbone("vit_micro", 32, 8).double()
    x = torch.randn(2, 3, 32, 32).double()
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    tokens = patches @ vit.patch_embed.proj.weight.flatten(1).T + vit.patch_embed.proj.bias
    tokens = torch.cat([vit.cls_token.expand(2, -1, -1), tokens], 1) + vit.pos_embed
    for block in vit.blocks:
        h = block.norm1(tokens)
        q, k, v = (h @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
        heads = []
        for i in range(4):
            at = slice(32 * i, 32 * (i + 1))
            weights = torch.softmax(q[..., at] @ k[..., at].transpose(1, 2) / 32**0.5, -1)
            heads.append(weights @ v[..., at])
        tokens = tokens + block.attn.proj(torch.cat(heads, -1))
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens))))
    expected = vit.norm(tokens)
    torch.testing.assert_close(vit(x), expected[:, 0])
    torch.testing.assert_close(vit.tokens(x, 1)[0], expected)
    assert len(vit.tokens(x, 3)) == 3 and vit.tokens(x, 3)[0].shape == (2, 17, 128)
    torch.testing.assert_close(vit.last_keys(x), k)
    torch.testing.assert_close(vit.last_attention(x)[:, 3], weights)
    torch.testing.assert_close(vit.last_attention(x).sum(-1), torch.ones(2, 4, 17).double())


@pytest.mark.parametrize("h, w", [(32, 32), (96, 96), (32, 64), (8, 40)])
def test_vit_takes_any_grid(h, w):
    vit = model.build_backbone("vit_micro", 64, 8)
    x = torch.randn(2, 3, h, w)
    assert vit(x).shape == (2, 128) and vit.tokens(x)[0].shape == (2, 1 + h * w // 64, 128)
    assert vit.positions(8, 8) is vit.pos_embed


def test_a_patch_that_does_not_divide_is_refused():
    with pytest.raises(UsageError, match="multiple of patch_size=16: take 96"):
        model.build_backbone("vit_tiny", 100, 16)
    with pytest.raises(UsageError, match=r"height=30.*patch_size=8"):
        model.build_backbone("vit_micro", 32, 8)(torch.zeros(1, 3, 30, 32))


def drop_path_scales(backbone, seeds, views):
    run = types.SimpleNamespace(network=types.SimpleNamespace(backbone=backbone))
    return Run.drop_path_scales(run, seeds, views)


def scales_of(monkeypatch, backbone, u):
    """Return drop_path_scales of one view for the uniforms u (B, depth, 2)."""
    monkeypatch.setattr(rng, "uniforms", lambda seeds, n: u.flatten(1)[None])
    [scale] = drop_path_scales(backbone, torch.arange(len(u)), [torch.zeros(1, len(u))])
    return scale[0]


def test_drop_path_drops_by_its_uniforms_and_keeps_the_expectation(monkeypatch):
    torch.manual_seed(0)
    block = model.Block(16, 2)
    x = torch.randn(4, 5, 16)
    u = torch.tensor([[0.1, 0.1], [0.9, 0.9], [0.1, 0.9], [0.25, 0.24]])
    two_blocks = types.SimpleNamespace(drop_path=0.25, blocks=[block, block])
    first, last = scales_of(monkeypatch, two_blocks, u[:, None].expand(-1, 2, -1)).unbind(1)
    assert torch.equal(first, torch.ones(4, 2))
    out = block(x, last)
    assert torch.equal(out[0], x[0])
    middle = x + block.attn(block.norm1(x), 5) / 0.75
    torch.testing.assert_close(out[3], middle[3])
    torch.testing.assert_close(out[1], (middle + block.mlp(block.norm2(middle)) / 0.75)[1])
    torch.testing.assert_close(out[2], (x + block.mlp(block.norm2(x)) / 0.75)[2])
    torch.testing.assert_close(block(x), block(x, first))
    vit = model.build_backbone("vit_micro", 32, 8, drop_path=0.5)
    scale = scales_of(monkeypatch, vit, torch.full((1, 6, 2), 0.15))
    for i in (2, 5):  # rates of 0.2 and 0.5
        torch.testing.assert_close(scale[:, i], torch.zeros(1, 2))
    images = torch.randn(4, 3, 32, 32)
    scale = scales_of(monkeypatch, vit, torch.zeros(4, 6, 2) + 0.6)
    torch.testing.assert_close(vit(images, scale), with_every_branch_scaled(vit, images))


def test_drop_path_is_a_function_of_sample_and_view():
    vit = model.build_backbone("vit_micro", 32, 8, drop_path=0.5)
    views = [torch.zeros(2, 3, 1), torch.zeros(4, 3, 1)]
    seeds = torch.tensor([5, 6, 7])
    scales = drop_path_scales(vit, seeds, views)
    assert [scale.shape for scale in scales] == [(2, 3, 6, 2), (4, 3, 6, 2)]
    flat = torch.cat(scales).flatten(2)
    assert len(flat.flatten(0, 1).unique(dim=0)) == 18
    alone = drop_path_scales(vit, seeds[1:2], views)
    assert torch.equal(torch.cat(alone), torch.cat(scales)[:, 1:2])
    vit.drop_path = 0.0
    assert drop_path_scales(vit, seeds, views) is None


def with_every_branch_scaled(vit, images):
    """Every branch kept: the expectation, block by block, by the formula."""
    x = vit.embed(images)
    for i, block in enumerate(vit.blocks):
        x = x + block.attn(block.norm1(x), x.shape[1]) / (1 - 0.5 * i / 5)
        x = x + block.mlp(block.norm2(x)) / (1 - 0.5 * i / 5)
    return vit.norm(x)[:, 0]


@pytest.mark.parametrize(
    "dim, ratio, d_ir",
    [(384, 0.8, 307), (128, 0.8, 102), (192, 0.5, 96), (10, 1.0, 10), (2048, 0.95, 1945)],
)
def test_split(dim, ratio, d_ir):
    z = torch.randn(3, dim)
    z_ir, z_ef = model.split(z, ratio)
    assert z_ir.shape == (3, d_ir) and torch.equal(torch.cat([z_ir, z_ef], -1), z)


def test_head_has_dinos_keys_and_unit_prototypes():
    torch.manual_seed(0)
    head = model.ProjectionHead(20, 50, hidden=32, bottleneck=8)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
        "mlp.0.weight": (32, 20),
        "mlp.0.bias": (32,),
        "mlp.2.weight": (32, 32),
        "mlp.2.bias": (32,),
        "mlp.4.weight": (8, 32),
        "mlp.4.bias": (8,),
        "last_layer.weight_g": (50, 1),
        "last_layer.weight_v": (50, 8),
    }
    assert not head.last_layer.weight_g.requires_grad
    z = torch.randn(7, 20)
    cosines = F.cosine_similarity(head.mlp(z)[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(z), cosines, atol=1e-6, rtol=1e-5)
    reference = torch.nn.utils.weight_norm(torch.nn.Linear(8, 50, bias=False))
    reference.load_state_dict(head.last_layer.state_dict(), strict=True)
    torch.testing.assert_close(
        head(z), reference(F.normalize(head.mlp(z), dim=-1)), atol=1e-6, rtol=1e-5
    )


def test_logits_are_float32_under_autocast():
    head = model.ProjectionHead(20, 50, hidden=32, bottleneck=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(7, 20)).dtype == torch.float32


def test_network_over_views_is_the_network_view_by_view():
    torch.manual_seed(0)
    net = model.build_network(
        tiny_config(out_dim=24, out_dim_ef=12, head_hidden=16, head_bottleneck=8)
    ).eval()
    views = [torch.randn(2, 3, 3, 32, 32), torch.randn(4, 3, 3, 16, 16)]
    out = net(views)
    assert out.ir.shape == out.ef.shape == (6, 3, 8)  # unit vectors in front of the prototypes
    assert out.z_ir.shape == (6, 3, 102) and out.z_ef.shape == (6, 3, 26)
    ir = net.head_ir.last_layer(out.ir)
    ef = net.head_ef.last_layer(out.ef)
    assert ir.shape == (6, 3, 24) and ef.shape == (6, 3, 12)
    for v, image in enumerate([*views[0], *views[1]]):
        z_ir, z_ef = model.split(net.backbone(image), 0.8)
        torch.testing.assert_close(ir[v], net.head_ir(z_ir), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ef[v], net.head_ef(z_ef), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.z_ir[v], z_ir, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.z_ef[v], z_ef, atol=1e-5, rtol=1e-4)
    dino = model.build_network(tiny_config(ratio=1.0))
    assert dino(views).ef is None and dino.head_ir.mlp[0].in_features == 128


def convnext_tiny(img_size, patch_size, drop_path, stochastic_depth=0.0):
    backbone = torchvision.models.convnext_tiny(stochastic_depth_prob=stochastic_depth)
    backbone.classifier[2] = torch.nn.Identity()
    backbone.dim, backbone.stride = 768, 32
    return backbone


class SeededDropout(torch.nn.Module):
    """Random in evaluation mode, without torch's global generator."""

    dim, stride = 4, 1

    def __init__(self, *_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 4))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x.mean((2, 3)) @ self.weight * self.calls


def test_a_backbone_is_one_entry_and_a_stochastic_one_is_refused(monkeypatch):
    monkeypatch.setitem(model.BACKBONES, "convnext_tiny", convnext_tiny)
    backbone = model.build_backbone("convnext_tiny").eval()
    assert backbone(torch.zeros(2, 3, 64, 32)).shape == (2, 768)

    def stochastic(**sizes):
        return convnext_tiny(**sizes, stochastic_depth=0.1)

    for name, build in (("stochastic", stochastic), ("dropout", lambda **sizes: SeededDropout())):
        monkeypatch.setitem(model.BACKBONES, name, build)
        with pytest.raises(UsageError, match=f"backbone {name} uses random numbers of its own"):
            model.build_backbone(name)


@pytest.mark.parametrize("name", ["vit_micro", "resnet18", "vmamba_micro"])
def test_building_a_backbone_leaves_its_buffers_and_the_generator_alone(name):
    torch.manual_seed(1)
    backbone = model.BACKBONES[name](img_size=32, patch_size=8, drop_path=0.1)
    after = torch.rand(3)
    torch.manual_seed(1)
    checked = model.build_backbone(name, 32, 8, 0.1)
    assert torch.equal(torch.rand(3), after)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, checked.state_dict()[key]), key


# --- files


@pytest.mark.slow
def test_third_party_files_load_strictly(tmp_path):
    torch.manual_seed(0)
    vit, resnet = model.build_backbone("vit_tiny", 64, 8), torchvision.models.resnet18()
    head = {f"head.{k}": v for k, v in model.ProjectionHead(192, 8, 4, 4).state_dict().items()}
    files = {
        "dino backbone": vit.state_dict(),
        "timm": {
            **vit.state_dict(),
            "head.weight": torch.zeros(1000, 192),
            "head.bias": torch.zeros(1000),
        },
        "dino full": {
            "teacher": {f"backbone.{k}": v for k, v in vit.state_dict().items()} | head,
            "student": {f"module.backbone.{k}": v + 1 for k, v in vit.state_dict().items()}
            | {f"module.{k}": v for k, v in head.items()},
            "args": argparse.Namespace(arch="vit_tiny"),
            "epoch": 3,
        },
        "torchvision": resnet.state_dict(),
        "torchvision of 2017": {
            k: v for k, v in resnet.state_dict().items() if "num_batches_tracked" not in k
        },
        "wrapped": {"state_dict": {f"module.{k}": v for k, v in resnet.state_dict().items()}},
    }
    x = torch.randn(2, 3, 64, 64)
    for name, content in files.items():
        torch.save(content, tmp_path / "file.pt")
        backbone, config = weights.load_backbone(str(tmp_path / "file.pt"))
        assert not backbone.training
        if "arch" in config and config["arch"] == "vit_tiny":
            assert (config["img_size"], config["patch_size"]) == (64, 8), name
            assert torch.equal(backbone(x), vit(x)), name
        else:
            resnet.fc = torch.nn.Identity()
            torch.testing.assert_close(
                backbone(x), resnet.eval()(x), msg=name, atol=1e-4, rtol=1e-4
            )
    torch.save(files["dino full"], tmp_path / "file.pt")
    student, _ = weights.load_backbone(str(tmp_path / "file.pt"), part="student")
    assert torch.equal(student.cls_token, vit.cls_token + 1)


@pytest.mark.slow
def test_what_is_not_a_backbone_is_refused_in_one_line(tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return (print, ("code ran",))

    vit = model.build_backbone("vit_micro", 32, 8).state_dict()
    cases = {
        "payload": (Payload(), "refused"),
        "missing key": (
            {k: v for k, v in vit.items() if k != "norm.bias"},
            "nearest is vit_micro, where 1 entries differ, such as norm.bias",
        ),
        "extra key": (vit | {"extra": torch.zeros(1)}, "extra"),
        "positions without a grid": (vit | {"pos_embed": torch.zeros(1, 0, 128)}, "pos_embed"),
        "positions of one dimension": (vit | {"pos_embed": torch.zeros(5)}, "pos_embed"),
        "a patch of no size": (
            vit | {"patch_embed.proj.weight": torch.zeros(128, 3, 0, 0)},
            "patch_embed",
        ),
        "a patch of no dimension": (
            vit | {"patch_embed.proj.weight": torch.tensor(1.0)},
            "patch_embed",
        ),
        "wrong shape": (vit | {"norm.bias": torch.zeros(7)}, "norm.bias"),
        "numbered": ({0: torch.zeros(1)}, "not weights by name"),
        "part without names": ({"teacher": torch.zeros(1)}, "not weights by name"),
        "not weights": ([1, 2], "holds a list"),
        "empty": ({}, "not the weights"),
        "no such part": ({"teacher": vit}, "no part 'student'; give part='teacher'"),
        "other arch": (
            {"config": {"arch": "vit_tiny"}, "teacher": vit},
            "its config says vit_tiny",
        ),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(UsageError, match=message) as error:
            weights.load_backbone(
                str(tmp_path / "file.pt"), part="student" if name == "no such part" else "teacher"
            )
        assert "\n" not in str(error.value) and "file.pt" in str(error.value), name
        if name == "missing key":  # found among all backbones; for the others a few are enough
            for arch in set(model.BACKBONES) - {"vit_micro", "vit_tiny", "resnet18"}:
                monkeypatch.delitem(model.BACKBONES, arch)
    for name, content in {
        "garbage.pt": b"not a checkpoint at all",
        "empty.pt": b"",
        "cut.pt": (tmp_path / "file.pt").read_bytes()[:1000],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError) as error:
            weights.load_backbone(str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="No such file"):
        weights.load_backbone(str(tmp_path / "nowhere.pt"))


@pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed; it is no dependency"
)
def test_backbone_is_timms(tmp_path):
    import timm

    ours = model.build_backbone("vit_tiny", 224, 16).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-4, rtol=1e-4)


def test_a_backbone_without_its_width_is_refused(monkeypatch):
    monkeypatch.setitem(model.BACKBONES, "mine", lambda **_: torch.nn.Linear(3, 4))
    with pytest.raises(UsageError, match=r"backbone mine: has no \.dim; set it in model\.py"):
        model.build_backbone("mine")


def test_save_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    checkpoint.save_atomically({"a": torch.ones(2)}, str(path))
    monkeypatch.setattr(torch, "save", lambda obj, file: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        checkpoint.save_atomically({"a": torch.zeros(2)}, str(path))
    assert torch.equal(checkpoint.read_checkpoint(str(path))["a"], torch.ones(2))
