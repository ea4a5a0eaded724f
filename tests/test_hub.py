"""torch.hub loads a backbone of ours or of others, and cuts z as its run did."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, tiny_config

from model import build_backbone, build_network


def load(path, **options):
    return torch.hub.load(str(ROOT), "backbone", str(path), source="local", **options)


@pytest.mark.parametrize("method, ratio, d_ir", [("clever", 0.5, 64), ("dino", 0.8, 128)])
def test_a_run_is_cut_by_its_own_ratio(tmp_path, method, ratio, d_ir):
    config = tiny_config(method=method, ratio=ratio)
    student = build_network(config).state_dict()
    teacher = {name: x + 1 if x.is_floating_point() else x for name, x in student.items()}
    run = dict(config=asdict(config), student=student, teacher=teacher)
    torch.save(run, tmp_path / "ckpt.pt")
    backbone = load(tmp_path / "ckpt.pt")
    assert not backbone.training
    config.ratio = ratio if method == "clever" else 1.0  # dino does not split
    assert backbone.config == asdict(config)
    assert torch.equal(backbone.pos_embed, teacher["backbone.pos_embed"])
    assert torch.equal(
        load(tmp_path / "ckpt.pt", part="student").pos_embed, student["backbone.pos_embed"]
    )
    with torch.no_grad():
        z = backbone(torch.randn(2, 3, 32, 32))
    z_ir, z_ef = backbone.split(z)
    assert z_ir.shape[1] == d_ir
    assert torch.equal(torch.cat([z_ir, z_ef], 1), z)


def widths(backbone):
    return [part.shape[1] for part in backbone.split(torch.zeros(2, 128))]


def test_weights_without_a_split_need_the_ratio(tmp_path):
    torch.save(build_backbone("vit_micro", 32, 8).state_dict(), tmp_path / "x.pt")
    backbone = load(tmp_path / "x.pt")
    assert backbone.config == dict(arch="vit_micro", img_size=32, patch_size=8)
    with pytest.raises(ValueError, match=r"the ratio of its split is unknown; give ratio=0\.8"):
        backbone.split(torch.zeros(2, 128))
    assert widths(load(tmp_path / "x.pt", ratio=0.5)) == [64, 64]


def test_a_ratio_that_cuts_nothing_is_refused(tmp_path):
    path = str(tmp_path / "vit.pt")
    torch.save(build_backbone("vit_nano", 16, 4).state_dict(), path)
    for ratio in (80, 2.0, 0, -3):
        with pytest.raises(ValueError, match="leaves one part"):
            load(path, ratio=ratio)


def test_another_programs_config_is_passed_over(tmp_path):
    path = str(tmp_path / "vit.pt")
    state = build_backbone("vit_nano", 16, 4).state_dict()
    for theirs in (dict(arch="vit_nano_patch4"), dict(arch=None), dict(arch=["a"]), "text"):
        torch.save(dict(state_dict=state, config=theirs), path)
        assert load(path, ratio=0.8).config["arch"] == "vit_nano"


def test_a_runs_backbone_finds_its_ratio_beside_it(tmp_path):
    torch.save(build_backbone("vit_micro", 32, 8).state_dict(), tmp_path / "backbone.pt")
    config = asdict(tiny_config(method="clever", ratio=0.25, img_size=32))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert widths(load(tmp_path / "backbone.pt")) == [32, 96]
    with pytest.raises(ValueError, match=r"ratio=0\.5: .* has ratio=0\.25; remove it"):
        load(tmp_path / "backbone.pt", ratio=0.5)
