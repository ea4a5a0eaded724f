"""Options: a typed dataclass of defaults <- a config file <- --key=value.

A config file is ordinary Python that assigns options. It is code: run only files you trust. It may
also be the config.json that a run wrote. A value on the command line is parsed as a literal of the
option's type, never evaluated.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import math
import runpy
import textwrap
from dataclasses import dataclass
from pathlib import Path


class UsageError(ValueError):
    """The user's input cannot be used. The message is one line: the cause, then the fix."""


def option(default, help, low=-math.inf, high=math.inf, choices=None, group=None):
    """Declare an option: a dataclass field with bounds (included), choices and help.

    A default may lie outside of the bounds: it then means "automatic".
    group: the heading in --help, for this option and the ones after it.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, group=group)
    return dataclasses.field(default=default, metadata=metadata)


# fmt: off
SYNONYMS = {"lam": "lambda_preg", "ema": "teacher_momentum", "momentum_teacher": "teacher_momentum",
            "model": "arch", "data_path": "data", "batch_size_per_gpu": "batch_size",
            "lr_base": "lr", "base_lr": "lr", "learning_rate": "lr", "use_fp16": "precision",
            "amp": "precision", "resume": "out_dir", "checkpoint": "ckpt", "weights": "ckpt",
            "clip": "clip_grad", "loss_images": "loss_chunk", "answers": "save_correct"}
NOT_OPTIONS = {"revision", "device", "workers", "compile"}  # config.json: about that run's machine
MUST_BE = {bool: "True or False", int: "of type int", float: "of type float and finite",
           str: "of type str", tuple: "a list of numbers, as 0.1,0.2; a list of one number: 0.1,"}


@dataclass
class Config:
    """Options of pre-training. Defaults: the authors' scripts, for ImageNet."""

    method: str = option("clever", "dino: no split; ddcl, simsiam: no teacher", group="network")
    arch: str = option("vit_small", "backbone")
    patch_size: int = option(16, "side of a patch in pixels, ViT only", 1, 1024)
    stem: str = option("auto", "of a ResNet; small: 3x3, stride 1, no pooling; auto: small up to "
                       "64 px", choices=("auto", "imagenet", "small"))
    ratio: float = option(0.8, "ir's share of the dimensions, ef has the rest", 0.001, 0.999)
    out_dim: int = option(65536, "prototypes K of the head (clever, dino)", 2, 2**24)
    out_dim_ef: int = option(0, "K of the ef head; 0: same as out_dim", 2, 2**24)
    head_hidden: int = option(2048, "width of the head's MLP", 1, 2**20)
    head_bottleneck: int = option(256, "width before the prototypes, or of a predictor", 1, 2**20)
    drop_path: float = option(0.1, "stochastic depth of the student; ViT and VMamba only", 0, 0.99)
    init_from: str = option("", "weight file to start a NEW schedule from: ours or third-party")
    alpha: float = option(1.0, "weight of L_CL", group="loss")
    beta: float = option(1.0, "weight of L_Orth")
    lambda_preg: float = option(0.001, "weight of L_PReg (paper's best: 0.001)", 0)
    orth: str = option("cosine", "L_Orth; cosine: the published tables; dot: the paper's text")
    orth_views: str = option("teacher", "L_Orth compares the student's views with the teacher's; "
                             "student: with its own", choices=("teacher", "student"))
    student_temp: float = option(0.1, "temperature of the student's softmax", 1e-6, 100)
    teacher_temp: float = option(0.04, "the same of the teacher, after its warm-up", 1e-6, 100)
    teacher_temp_start: float = option(0.04, "its linear warm-up starts here ...", 1e-6, 100)
    teacher_temp_epochs: int = option(0, "... and takes this many epochs; 0: none", 0, 10**6)
    center_momentum: float = option(0.9, "EMA of the teacher's mean logits", 0, 1)
    teacher_momentum: float = option(0.996, "EMA; a cosine raises it to 1; small data: 0.99", 0, 1)
    recipe: str = option("caug", "baug: DINO's; caug: + rotation; caug+: + elastic", group="views")
    img_size: int = option(224, "side of a global crop", 8, 4096)
    local_size: int = option(96, "side of a local crop", 8, 4096)
    local_crops: int = option(8, "local crops per image", 0, 80)
    global_scale: tuple = option((0.4, 1.0), "low,high: a crop's share of the image's area")
    local_scale: tuple = option((0.05, 0.4), "the same for local crops")
    blur: bool = option(True, "False: no blur (images of 64 px and less have no detail to lose)")
    solarize: bool = option(True, "False: no solarization")
    data: str = option("shapes", "'shapes' (built in), cifar10 cifar100 stl10 flowers102 food101 "
                       "pets, or a folder: train/CLASS/*, or any tree of images", group="data")
    data_root: str = option("data", "folder of torchvision's data sets")
    download: bool = option(False, "download a torchvision data set that is missing")
    classes: str = option("", "file with one class (folder) name per line: use only these")
    workers: int = option(None, "loading processes a rank; None: its cores - 1, at most 16", 0, 512)
    cache: str = option("auto", "auto: keep small images of one size (CIFAR) on the device; "
                        "ram: keep all decoded images in memory", choices=("auto", "ram", "off"))
    epochs: int = option(200, "passes over the training images", 1, 10**6, group="optimization")
    max_steps: int = option(0, "stop after so many, with all schedules scaled; 0: off", 0, 10**9)
    optimizer: str = option("adamw", "sgd: the paper's, with lr=1e-3", choices=("adamw", "sgd"))
    batch_size: int = option(512, "GLOBAL: all ranks and accumulation steps together", 1, 2**24)
    max_batch_per_gpu: int = option(128, "a rank with more images accumulates gradients", 1, 2**24)
    lr: float = option(5e-4, "peak, per 256 images of batch_size (linear scaling)", 0, 100)
    min_lr: float = option(1e-6, "learning rate at the last step; not scaled", 0, 100)
    warmup_epochs: float = option(10, "linear warm-up of the learning rate", 0, 10**6)
    weight_decay: float = option(0.04, "at the first step; a cosine changes it ...", 0, 100)
    weight_decay_end: float = option(0.4, "... to this; not applied to biases and norms", 0, 100)
    clip_grad: float = option(3.0, "largest norm of each parameter's own gradient; 0: off", 0)
    freeze_last_layer: float = option(1, "epochs without an update of the prototypes", 0, 10**6)
    seed: int = option(0, "of every random number", 0, 2**31, group="machine")
    device: str = option("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    precision: str = option("auto", "auto: bf16 if it is fast", choices=("auto", "bf16", "fp32"))
    fused: bool = option(True, "False: run the plain formulas of losses.py, to check them")
    loss_chunk: int = option(0, "images with logits in memory at a time; 0: automatic", 0, 2**24)
    compile: bool = option(None, "torch.compile the backbone's blocks; None: only ViTs on a GPU")
    scan: str = option("auto", "VMamba's scan", choices=("auto", "triton", "torch", "loop"))
    out_dir: str = option("out/run", "folder of the run", group="output")
    log_every: int = option(10, "steps between lines of log.jsonl", 1, 10**9)
    eval_every: int = option(10, "epochs between evaluations; 0: only at the end", 0, 10**6)
    probe_at_end: bool = option(False, "finish with the table of kNN and ridge probes")
    save_every: int = option(0, "also save every so many steps; 0: off", 0, 10**9)
    save_every_epochs: int = option(1, "epochs between checkpoints; the end saves too", 1, 10**6)
    tensorboard: bool = option(False, "also log to TensorBoard, in out_dir")
    wandb: str = option("", "also log to this project of Weights & Biases")

    def __post_init__(self):
        self.out_dim_ef = self.out_dim_ef or self.out_dim
        for name, scale in (("global_scale", self.global_scale), ("local_scale", self.local_scale)):
            are_numbers = [type(x) in (int, float) for x in scale]
            if are_numbers != [True, True] or not 0 < scale[0] <= scale[1] <= 1:
                raise UsageError(f"{name}={scale!r:.60}: must be low,high; 0 < low <= high <= 1")
# fmt: on


def configure(cls, argv, **choices):
    """Build a checked cls from argv: [config.py | --config=FILE] [--key=value | --key value ...].

    choices: option -> names of the table that it chooses from.
    """
    if "-h" in argv or "--help" in argv:
        files = [a.removeprefix("--config=") for a in argv if a.endswith((".py", ".json"))]
        print(help_text(cls, _read_file(cls, files[0]) if files else {}, **choices))
        raise SystemExit(0)
    given, files = {}, []
    rest = iter(argv)
    for arg in rest:
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--"):
            files.append(arg)
            continue
        field = None if name == "config" else _field(cls, name)
        text = text if equals else next(rest, "--")
        if not equals and text.startswith("--"):
            raise UsageError(f"{arg}: has no value; write --{name}=value")
        if field:
            given[name] = _parse(field, text)
        else:
            files.append(text)
    if len(files) > 1:
        raise UsageError(f"{', '.join(files[:2])}: give one config file, the rest as --key=value")
    config = cls(**{**(_read_file(cls, files[0]) if files else {}), **given})
    check(config, **choices)
    return config


def check(config, **choices):
    """Raise UsageError for an option outside its bounds or choices. Defaults are not checked."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        names = choices.get(name) or field.metadata["choices"]
        low, high = field.metadata["low"], field.metadata["high"]
        if value == field.default:
            continue
        if names and value not in names:
            hint = did_you_mean(value, names)
            raise UsageError(f"{name}={value!r:.60}: choose from {', '.join(names)}{hint}")
        each = value if field.type is tuple else (value,)
        bad = [v for v in each if type(v) not in (int, float) or not low <= v <= high]
        if bad and field.type in (int, float, tuple):
            raise UsageError(f"{name}={value!r:.60}: must be between {low} and {high}")


def did_you_mean(name, names):
    """Return " (did you mean 'x'?)" for a mistyped name, or ""."""
    close = difflib.get_close_matches(str(name), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def help_text(cls, from_file=(), **choices):
    """Return what --help prints: each option with its default, help and choices, by groups.

    from_file: {option: value} of a config file; its values are shown, with a star.
    """
    from_file = dict(from_file)
    groups, group = {}, ""
    for field in dataclasses.fields(cls):
        group = field.metadata["group"] or group
        names = choices.get(field.name) or field.metadata["choices"]
        about = field.metadata["help"] + (f" ({', '.join(names)})" if names else "")
        value = from_file.get(field.name, field.default)
        star = "" if value == field.default else " *"
        head = f"  --{field.name}={value}{star}".ljust(33) + " "
        line = textwrap.fill(about, 100, initial_indent=head, subsequent_indent=" " * 34)
        groups[group] = groups.get(group, f"\n{group}") + f"\n{line}"
    usage = "Usage: [FILE.py | --config=FILE.json] [--key=value | --key value ...]"
    about = [inspect.cleandoc(cls.__doc__), usage]
    about += ["* set by the config file, not the default"] if from_file else []
    return "\n".join([*about, *groups.values()])


def _field(cls, name):
    fields = cls.__dataclass_fields__
    if name not in fields:
        new = SYNONYMS.get(name.replace("-", "_").lower())
        hint = f" (did you mean {new!r}?)" if new in fields else did_you_mean(name, fields)
        raise UsageError(f"unknown option {name!r:.60}{hint}; --help lists all options")
    return fields[name]


def _parse(field, text):
    """Parse the command line's text as a value of the option's type. Strings need no quotes."""
    try:
        value = text if field.type is str else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return _typed(field, value)


def _typed(field, value):
    """Return value as the option's type. Converts int to float and list to tuple, nothing else."""
    kind = field.type
    if value is None and field.default is None:  # "automatic"
        return None
    if type(value) is int and abs(value) >= 2**63:  # torch has no such number
        value = math.inf
    if (kind, type(value)) in ((float, int), (tuple, list)):
        value = kind(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UsageError(f"{field.name}={value!r:.60}: must be {MUST_BE[kind]}")
    return value


def _read_file(cls, path):
    """Execute a config file, or read a config.json -> {option: value}.

    Modules and _names are the file's own.
    """
    if not path.endswith((".py", ".json")):
        raise UsageError(f"{path}: neither a config file (.py, .json) nor --key=value")
    if not Path(path).is_file():
        raise UsageError(f"{path}: No such file; ready config files are in configs/")
    try:
        if path.endswith(".py"):
            names = runpy.run_path(path)
        else:
            names = dict(json.loads(Path(path).read_text()))
            without = NOT_OPTIONS | ({"ratio"} if names.get("ratio") == 1.0 else set())  # no ef
            names = {name: value for name, value in names.items() if name not in without}
    except Exception as error:
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from None
    own = {n: v for n, v in names.items() if not n.startswith("_") and not inspect.ismodule(v)}
    return {name: _typed(_field(cls, name), value) for name, value in own.items()}
