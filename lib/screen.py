"""What you see before a run trains: the first screen and views.png."""

from dataclasses import asdict
from importlib.util import find_spec

from lib import data
from lib.results import revision

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import augment


def first_screen(run, step, train_set):
    """Return the first screen: what will be trained, on which data, and how."""
    config, here = run.config, run.here
    lines = [f"revision {revision() or 'unknown'}; options other than the defaults:", ""]
    for option in changed_options(config):
        if len(lines[-1]) + len(option) > 98:
            lines.append("")
        lines[-1] += option + "  "
    backbone, network = (
        sum(p.numel() for p in net.parameters()) / 1e6
        for net in (run.network.backbone, run.network)
    )
    device = f"CPU with {torch.get_num_threads()} threads"
    if here.device.type == "cuda":
        device = torch.cuda.get_device_name(here.device)
    share = config.batch_size // here.world
    size = data.part_size(share, config.max_batch_per_gpu)
    classes = f", {len(train_set.classes)} classes" if train_set.classes else ", no labels"
    where = f"read by {data.loading_workers(config.workers)} processes per rank"
    if train_set.pixels is not None:
        where = "in memory"
    lines += [
        "",
        f"{config.method} {config.arch}: backbone {backbone:.2f} M parameters, with heads "
        f"{network:.2f} M",
        f"{len(train_set)} images of {config.data}{classes}, {where}",
        f"{here.world} x {device}, {here.precision}; batch {config.batch_size} = {here.world} x "
        f"{share // size} x {size} (ranks x accumulated x at once); peak lr "
        f"{config.lr * config.batch_size / 256:.3g}",
    ]
    if hasattr(run.network.backbone, "scan_backend"):
        lines.append(f"selective scan: {run.network.backbone.scan_backend(here.device)}")
    lines += filter(None, run.notes)
    if step:
        lines.append(f"continuing {config.out_dir} at step {step} of {run.total}")
    elif config.init_from:
        lines.append(f"a new schedule from the weights of {config.init_from}")
    if run.total < config.epochs * run.steps_per_epoch:
        lines.append(f"max_steps: ends after {run.total} steps, schedules scaled to them")
    later = "log.jsonl and curves.png later"
    if not find_spec("matplotlib"):
        later = "log.jsonl later; curves.png needs matplotlib: pip install matplotlib"
    lines.append(f"look at {config.out_dir}/: views.png now, {later}")
    return "\n".join([*lines, ""])


def changed_options(config):
    """Return ["name=value"] of the options that differ from the defaults; config.json has all."""
    default = type(config)()
    elsewhere = {"device", "precision", "compile"}  # on other lines
    elsewhere |= set() if "resne" in config.arch else {"stem"}
    elsewhere |= {"out_dim_ef"} if config.out_dim_ef == config.out_dim else set()
    names = [name for name in asdict(config) if name not in elsewhere]
    return [f"{n}={getattr(config, n)}" for n in names if getattr(config, n) != getattr(default, n)]


@torch.compiler.set_stance("force_eager")  # six images would be two graphs of their own
def views_picture(run, whole, batch):
    """Draw a row for each image: whole uint8 (n, 3, G, G), then its views as the network sees them.

    batch: the data.Batch of the same images. Returns a PIL image with a name above each column.
    """
    size = run.config.img_size
    pictures = [whole[None] / 255]  # each (V, n, 3, size, size)
    for view in run.views(batch):
        border = size - view.shape[-1]
        pad = (border // 2, border - border // 2) * 2
        pictures.append(F.pad(augment.denormalize(view).cpu(), pad, value=1.0))
    rows = torch.cat(pictures).transpose(0, 1)  # (n, 1 + V, 3, size, size)
    shape = dict(nrow=rows.shape[1], padding=max(2, size // 32), pad_value=1)
    grid = make_grid(rows.flatten(0, 1), **shape)
    zoom = max(1, 96 // size)  # small images are shown enlarged, pixel by pixel
    grid = to_pil_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))
    names = ["image", "global 1", "global 2", *(f"local {i}" for i in range(1, len(rows[0]) - 2))]
    column = grid.width / len(names)
    font = ImageFont.load_default(size=column / 7)
    picture = Image.new("RGB", (grid.width, grid.height + round(column / 4)), "white")
    picture.paste(grid, (0, picture.height - grid.height))
    for i, name in enumerate(names):
        ImageDraw.Draw(picture).text(((i + 0.5) * column, column / 8), name, "black", font, "mm")
    return picture
