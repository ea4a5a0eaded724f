"""torch.hub's entry: a trained backbone, without the rest of the project in one's way.

backbone = torch.hub.load("path/to/this/folder", "backbone", "out/demo/ckpt.pt", source="local")
z_ir, z_ef = backbone.split(backbone(images))  # images: normalized (B, 3, H, W), see augment.py
"""

from functools import partial

from lib.weights import load_backbone

import torch

dependencies = ["torch", "torchvision"]


def backbone(path, part="teacher"):
    """Load the backbone of a weight file of ours or of others, in eval mode.

    part: 'teacher' or 'student'. The module maps (B, 3, H, W) to z (B, .dim). Its .split(z) cuts z
    into z_ir, z_ef by the run's own ratio; without a split z_ef has no columns. Its .config is the
    run's, a dict.
    """
    model, config = load_backbone(path, part)
    d_ir = int(model.dim * config.get("ratio", 1.0))
    model.split = partial(torch.tensor_split, indices=[d_ir], dim=-1)
    model.config = config
    return model
