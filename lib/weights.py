"""Weight files in and out: ours, DINO's, timm's, torchvision's and VMamba's."""

import math
from pathlib import Path

from lib import machine
from lib.checkpoint import read_checkpoint
from lib.config import UsageError
from lib.log import read_config

import torch

from model import BACKBONES, RESNETS, build_backbone, ir_dims

HEADS = ("head.", "fc.", "classifier.head.")  # published classifiers, DINO's projection head
# some versions of VMamba save these as 1 x 1 convolutions
LINEAR = (".in_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight")
COUNTER = "num_batches_tracked"  # of batch norm; PyTorch before 0.4.1 did not save it


def load_backbone(path, part="teacher", ratio=None):
    """Load a backbone from a run's ckpt.pt or backbone.pt, or published weights; print its name.

    part: 'teacher' or 'student', if the file holds both. Strict: names and shapes are those of one
    of BACKBONES; only classifiers and projection heads are left out.
    Returns the backbone in eval mode and its run's config (of backbone.pt: config.json beside it).
    The config of third-party weights has arch, img_size, patch_size and, if it is small, stem.
    ratio: ir's share, for a file that does not know it; the config has it then.
    """
    checkpoint = read_checkpoint(path)
    state = _backbone_weights(checkpoint, part, path)
    config = checkpoint.get("config")
    beside = read_config(Path(path).parent) if Path(path).name == "backbone.pt" else {}
    if not isinstance(config, dict) or str(config.get("arch")) not in BACKBONES:
        config = beside
    arch, facts = _recognize(state, path, config.get("arch"))
    if config.get("arch") != arch and config is not beside:
        cause = f"its config says {config['arch']}, but its weights are of {arch}"
        raise UsageError(f"{path}: {cause}; give another file")
    config = config if config.get("arch") == arch else dict(arch=arch, **facts)
    if config.get("method") in ("dino", "simsiam"):
        config["ratio"] = 1.0  # they have no split, but older files may say 0.8
    if ratio is not None and config.setdefault("ratio", ratio) != ratio:
        raise UsageError(f"ratio={ratio}: {path} has ratio={config['ratio']}; remove it")
    backbone = build_backbone(arch, **facts)
    ir_dims(backbone.dim, config.get("ratio", 1.0))
    counters = {name: x for name, x in backbone.state_dict().items() if name.endswith(COUNTER)}
    backbone.load_state_dict({**counters, **state}, strict=True)
    if machine.rank_and_world()[0] == 0:
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        source = config.get("method", "third-party")
        print(f"loaded {path}: {source} {arch}, {millions:.1f} M parameters")
    return backbone.eval(), config


def _backbone_weights(checkpoint, part, path):
    """Find the backbone's weights in a file's content, under the names of build_backbone."""
    state = checkpoint
    if isinstance(checkpoint, dict):
        parts = [name for name in ("student", "teacher") if name in checkpoint]
        if parts and part not in parts:
            raise UsageError(f"{path}: no part {part!r}; give part={parts[0]!r}")
        wrapped = [n for n in ("state_dict", "model") if isinstance(checkpoint.get(n), dict)]
        names = [part] if parts else wrapped
        state = checkpoint[names[0]] if names else checkpoint
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        kind = type(state).__name__
        raise UsageError(f"{path}: holds a {kind}, not weights by name; give a state dict")
    state = {name.removeprefix("module."): x for name, x in state.items()}
    ours = [name for name in state if name.startswith("backbone.")] or state
    state = {name.removeprefix("backbone."): state[name] for name in ours}
    for name, x in state.items():
        if name.endswith(LINEAR) and getattr(x, "ndim", 0) == 4:
            state[name] = x.flatten(1)
    return {name: x for name, x in state.items() if not name.startswith(HEADS)}


def _recognize(state, path, first):
    """Return the arch with these names and shapes, and build_backbone's options for it.

    first: the arch to try first, because two may have the same shapes.
    """
    shapes = {name: tuple(getattr(x, "shape", "-")) for name, x in state.items()}
    patch = shapes.get("patch_embed.proj.weight", ())  # (D, 3, P, P)
    positions = shapes.get("pos_embed", ())  # (1, 1 + N, D)
    sizes = dict(img_size=224, patch_size=16)
    if len(patch) == 4 and patch[-1] > 0 and len(positions) == 3 and positions[1] > 1:
        sizes = dict(img_size=math.isqrt(positions[1] - 1) * patch[-1], patch_size=patch[-1])
    is_small = shapes.get("conv1.weight", ())[-1:] == (3,)  # of a ResNet; ImageNet's is (7, 7)
    differing = {}
    for arch in sorted(BACKBONES, key=lambda arch: arch != first):
        with torch.device("meta"):
            facts = dict(sizes, stem="small") if is_small and arch in RESNETS else sizes
            expected = build_backbone(arch, **facts).state_dict()
        wanted = {name: tuple(x.shape) for name, x in expected.items()}
        wrong = {n for n, _ in wanted.items() ^ shapes.items()}
        differing[arch] = sorted(n for n in wrong if n in shapes or not n.endswith(COUNTER))
        if not differing[arch]:
            return arch, facts
    nearest, wrong = min(differing.items(), key=lambda item: len(item[1]))
    cause = f"not the weights of a known backbone; nearest is {nearest}, where "
    cause += f"{len(wrong)} entries differ, such as {', '.join(wrong[:3])}"
    raise UsageError(f"{path}: {cause}")
