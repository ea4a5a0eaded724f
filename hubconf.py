"""torch.hub's entry point: load a trained backbone without the rest of the project.

backbone = torch.hub.load("path/to/this/folder", "backbone", "out/demo/ckpt.pt", source="local")
z_ir, z_ef = backbone.split(backbone(images))  # images: normalized (B, 3, H, W), see augment.py
"""

from lib.config import UsageError
from lib.weights import load_backbone

dependencies = ["torch", "torchvision"]


def backbone(path, part="teacher", ratio=None):
    """Load the backbone of a weight file, ours or third-party, in eval mode: (B, 3, H, W) -> z.

    part: 'teacher' or 'student'. .split(z) cuts z (B, .dim) into z_ir, z_ef by the run's ratio,
    which a run's ckpt.pt knows, and backbone.pt beside its config.json; ratio: for other files.
    DINO's and SimSiam's z_ef has no columns. .config is the run's, a dict.
    UsageError for a file that cannot be read, and from .split if the ratio is not known.
    """
    model, config = load_backbone(path, part, ratio)

    def split(z):
        if "ratio" not in config:
            fix = "give ratio=0.8, or put its run's config.json beside it"
            raise UsageError(f"{path}: the ratio of its split is unknown; {fix}")
        return z.tensor_split([int(model.dim * config["ratio"])], dim=-1)

    model.split, model.config = split, config
    return model
