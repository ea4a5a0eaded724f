"""The knobs: a typed dataclass of defaults <- a Python config file <- --key=value.

`configure(Config, argv)` returns a checked Config. A config file is ordinary Python that assigns knobs (it is code: run only files you
trust); a command-line value is parsed as a literal of the knob's type and never evaluated. Whatever is wrong with what the user gave is a
UsageError: one line that names the cause and the mend; `exit_on_usage_error` turns it into exit code 2.
"""

import ast
import atexit
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import sys
from dataclasses import dataclass


class UsageError(ValueError):
    """The user's input cannot be used; the message is one line with the cause and the mend."""


@dataclass
class Config:
    """Every knob of pre-training. Defaults: the authors' scripts (which follow DINO's) on ImageNet-sized images."""

    # what is learnt
    method: str = "clever"  # 'clever', or 'dino': the same without the split; 'ddcl', or 'simsiam': two views, no teacher, a predictor
    arch: str = "vit_small"  # backbone; an unknown name lists them
    patch_size: int = 16  # pixels a side, ViT only
    ratio: float = 0.8  # share of the representation's dimensions that is ir; the rest is ef (paper's best: 0.8)
    out_dim: int = 65536  # prototypes K of the head (dino, clever)
    out_dim_ef: int = 0  # K of the ef head; 0: as out_dim
    head_hidden: int = 2048  # width of the head's MLP
    head_bottleneck: int = 256  # dimension in front of the prototypes; hidden one of SimSiam's and DDCL's predictor (SimSiam: a quarter of head_hidden)
    drop_path: float = 0.1  # stochastic depth of the student's ViT or VMamba; the teacher has none
    init_from: str = (
        ""  # weights to start a NEW schedule from: any backbone file that model.load_backbone reads
    )
    # the loss: alpha L_CL + beta L_Orth + lam L_PReg
    alpha: float = 1.0
    beta: float = 1.0
    lam: float = 0.001  # lambda (paper's best: 0.001)
    orth: str = "dot"  # L_Orth: 'dot' is the paper's, 'cosine' the published scripts' (of CLeVER and of DDCL)
    student_temp: float = 0.1
    teacher_temp: float = 0.04
    teacher_temp_start: float = 0.04  # linear warm-up of the teacher's temperature from here ...
    teacher_temp_epochs: int = 0  # ... over so many epochs
    center_momentum: float = 0.9
    ema: float = (
        0.996  # teacher momentum at the first step, by a cosine to 1 at the last; small data: 0.99
    )
    # the views
    recipe: str = "caug"  # 'baug' (DINO's), 'caug' (+ rotation), 'caug+' (+ elastic)
    img_size: int = 224  # global crop
    local_size: int = 96  # local crop
    local_crops: int = 8
    global_scale: tuple = (0.4, 1.0)  # share of the image's area that a crop covers
    local_scale: tuple = (0.05, 0.4)
    blur: bool = (
        True  # False: recipe without blur (images of 64 px and less have no detail to lose)
    )
    solarize: bool = True  # False: recipe without solarisation
    # the data
    data: str = "shapes"  # 'shapes' (built in), 'cifar10' 'cifar100' 'stl10' 'flowers102' 'food101' 'pets', or a folder: train/CLASS/*, or any tree of images
    data_root: str = "data"  # where torchvision keeps its data sets
    download: bool = False  # fetch a torchvision data set that is not there
    classes: str = ""  # file with a class (folder) name a line: use these only
    workers: int = 8  # loading processes per rank
    cache: str = (
        "off"  # 'ram': decode every image once and keep it (each rank does); for data sets that fit
    )
    # the optimisation
    optimizer: str = "adamw"  # 'adamw' (scripts) or 'sgd' with momentum 0.9 (the paper's text; set lr=1e-3 with it)
    epochs: int = 200
    batch_size: int = (
        512  # GLOBAL: all ranks, all accumulation steps; what the learning rate scales with
    )
    max_batch_per_gpu: int = 128  # beyond this a rank accumulates gradients
    lr: float = 5e-4  # per 256 images of batch_size (linear scaling)
    min_lr: float = 1e-6  # not scaled
    warmup_epochs: float = 10
    weight_decay: float = 0.04  # by a cosine ...
    weight_decay_end: float = 0.4  # ... to this; never on biases and norms
    clip: float = 3.0  # norm of each parameter's own gradient; 0: off
    freeze_last_layer: float = 1  # epochs during which the prototypes stand still
    # the machine
    seed: int = 0
    device: str = "auto"  # 'auto', 'cpu', 'cuda'
    precision: str = "auto"  # 'auto': 'bf16' autocast where the processor has it, else 'fp32'
    loss_images: int = 0  # images whose logits (views x K) are held at a time; 0: as many as fit 256 MB on a GPU, 32 MB on a CPU
    compile: bool = (
        None  # torch.compile of the backbone's blocks; None: a ViT's on a GPU, nothing else
    )
    scan: str = "auto"  # VMamba's selective scan: 'triton' (the default on a GPU that has it), 'torch' (elsewhere), 'loop' (for comparison)
    # what is written
    out_dir: str = "out/run"
    log_every: int = 10  # steps
    eval_every: int = 10  # epochs between kNN and collapse watch; 0: only at the end
    probe_at_end: bool = False  # finish with the table of probe.py
    save_every: int = (
        0  # steps between checkpoints within an epoch; each epoch's end is always saved
    )

    def __post_init__(self):
        self.out_dim_ef = self.out_dim_ef or self.out_dim
        check(self)
        for name in ("global_scale", "local_scale"):
            scale = getattr(self, name)
            if (
                len(scale) != 2
                or any(type(x) not in (int, float) for x in scale)
                or not 0 < scale[0] <= scale[1] <= 1
            ):
                raise UsageError(
                    f"{name}={scale}: two shares of the image's area, 0 < low <= high <= 1"
                )
        if self.method in ("simsiam", "ddcl") and self.local_crops:
            raise UsageError(
                f"local_crops={self.local_crops}: {self.method} knows two views only; take --local_crops=0"
            )
        if self.warmup_epochs >= self.epochs:
            raise UsageError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}: lower it"
            )


CHOICES = dict(
    cache=("off", "ram"),
    cut=("last", "every"),
    protocol=("paper", "fast"),
    scan=("auto", "triton", "torch", "loop"),
    mode=("finetune", "linear"),
    method=("clever", "dino", "ddcl", "simsiam"),
    orth=("dot", "cosine"),
    recipe=("baug", "caug", "caug+"),
    optimizer=("adamw", "sgd"),
    device=("auto", "cpu", "cuda"),
    precision=("auto", "bf16", "fp32"),
)
_inf = float("inf")
RANGES = dict(
    patch_size=(1, 1024),
    ratio=(0.001, 0.999),
    out_dim=(2, 2**24),
    out_dim_ef=(2, 2**24),
    head_hidden=(1, 2**20),
    head_bottleneck=(1, 2**20),
    drop_path=(0, 0.99),
    student_temp=(1e-6, 100),
    teacher_temp=(1e-6, 100),
    teacher_temp_start=(1e-6, 100),
    teacher_temp_epochs=(0, _inf),
    center_momentum=(0, 1),
    ema=(0, 1),
    img_size=(8, 4096),
    local_size=(8, 4096),
    local_crops=(0, 100),
    workers=(0, 512),
    epochs=(1, _inf),
    batch_size=(1, _inf),
    max_batch_per_gpu=(1, _inf),
    lr=(0, 100),
    min_lr=(0, 100),
    warmup_epochs=(0, _inf),
    weight_decay=(0, 100),
    weight_decay_end=(0, 100),
    clip=(0, _inf),
    freeze_last_layer=(0, _inf),
    log_every=(1, _inf),
    eval_every=(0, _inf),
    save_every=(0, _inf),
    loss_images=(0, _inf),
    seed=(0, 2**31),
    repeats=(1, 1000),
    alpha=(-_inf, _inf),
    beta=(-_inf, _inf),
    lam=(0, _inf),
    held_out=(0.001, 0.9),
    views=(1, 1000),
    seeds=(1, 1000),
    blocks=(0, 1000),
    lrs=(1e-9, 100),
    degrees=(0, 180),
    size=(16, 4096),
    n_last=(0, 1000),
    radius=(0, 1000),
    topk=(1, 1000),
    temperature=(1e-6, 100),
    tau=(-1, 1),
    pictures=(0, 10**6),
)


def check(config):
    """UsageError for a knob outside CHOICES or RANGES, of any script's dataclass: a name means the same in all of them. A default is always
    right, for it may mean that the value is to be found out."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in CHOICES and value not in CHOICES[name]:
            raise UsageError(
                f"{name}={value!r}: choose from {', '.join(CHOICES[name])}"
                + nearest(value, CHOICES[name])
            )
        each = value if isinstance(value, tuple) else (value,)
        if (
            name in RANGES
            and value != field.default
            and any(
                type(v) not in (int, float) or not RANGES[name][0] <= v <= RANGES[name][1]
                for v in each
            )
        ):
            raise UsageError(
                f"{name}={value}: must lie between {RANGES[name][0]} and {RANGES[name][1]}"
            )


def configure(cls, argv):
    """argv: [config.py] [--key=value ...] -> an instance of the dataclass `cls`. Raises UsageError; '--help' prints the knobs and exits."""
    values, file = {}, ""
    for arg in argv:
        if arg in ("-h", "--help"):
            print(knobs(cls))
            raise SystemExit(0)
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            if not equals:
                raise UsageError(f"{arg}: write it --{name}=value")
            values[name] = _parse(cls, name, text)
        elif arg.endswith(".py"):
            if file:
                raise UsageError(
                    f"{file} and {arg}: one config file a run; the rest by --key=value"
                )
            values, file = {**_read_file(cls, arg), **values}, arg
        else:
            raise UsageError(f"{arg}: neither a config file (.py) nor --key=value")
    config = cls(**values)
    check(config)
    return config


def nearest(name, names):
    """' (did you mean ...?)' for a mistyped name, or ''."""
    close = difflib.get_close_matches(str(name), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def knobs(cls):
    """The table that --help prints: name, default and the comment that stands beside the knob in the source."""
    lines = [inspect.cleandoc(cls.__doc__), "Usage: [config.py] [--key=value ...]", ""]
    for line in inspect.getsource(cls).split("def __post_init__")[0].splitlines():
        if knob := re.match(r"    (\w+): (\w+) = (.+?)(?:\s+# (.*))?$", line):
            name, kind, default, comment = knob.groups()
            lines.append(f"  --{name}={default}".ljust(34) + (comment or ""))
        elif line.startswith("    # "):
            lines.append("\n" + line[6:])
    return "\n".join(lines)


@contextlib.contextmanager
def exit_on_usage_error(when_interrupted="stopped"):
    """For `if __name__ == '__main__'`, ends the process: a UsageError is one line on stderr and exit code 2, Ctrl-C exit code 130.

    A rank of torchrun leaves without Python's own clearing up: threads of communication and of autograd that still hold tensors can make that
    wait for ever (PyTorch's issue 190489, probe.wait_for_ranks), and with one rank the whole job."""
    code = 0
    try:
        yield
    except UsageError as error:
        last_line = (
            str(error).strip().splitlines()[-1].removeprefix("configurator.UsageError: ")
        )  # what a loader's worker raised comes with its traceback
        print(f"{os.path.basename(sys.argv[0])}: {last_line}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr, flush=True)
        code = 130
    except SystemExit as leaving:
        code = leaving.code or 0
    except Exception:
        if "RANK" not in os.environ:
            raise
        sys.excepthook(*sys.exc_info())  # torch's puts the rank before each line
        code = 1
    if "RANK" in os.environ:
        try:
            atexit._run_exitfuncs(), sys.stdout.flush(), sys.stderr.flush()
        finally:  # whatever a closed pipe may say
            os._exit(code)
    sys.exit(code)


def _field(cls, name):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if name not in fields:
        raise UsageError(
            f"unknown knob {name!r}" + nearest(name, list(fields)) + "; --help lists them all"
        )
    return fields[name]


def _parse(cls, name, text):
    """The command line's text as a value of the knob's type; strings need no quotes."""
    kind = _field(cls, name).type
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return _typed(cls, name, value)


def _typed(cls, name, value):
    """`value` as the knob's type, or a UsageError; an int serves as a float, a list as a tuple, nothing else is converted."""
    kind = _field(cls, name).type
    if value is None and _field(cls, name).default is None:  # to be found out
        return None
    if kind is float and type(value) is int or kind is tuple and type(value) is list:
        value = kind(value)
    if type(value) is not kind or value != value:
        what = {
            bool: "True or False",
            tuple: f"several, as --{name}={value},{value}; one: --{name}={value},",
        }.get(kind, f"of type {kind.__name__}")
        raise UsageError(f"{name}={value!r}: must be {what}")
    return value


def _read_file(cls, path):
    try:
        with open(path) as file:
            source = file.read()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; configs/ holds the ready ones") from None
    names = {}
    try:
        exec(compile(source, path, "exec"), names)
    except Exception as error:
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from None
    return {
        name: _typed(cls, name, value)
        for name, value in names.items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
