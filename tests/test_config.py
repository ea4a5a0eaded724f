"""Options: typed, checked, parsed as literals; every mistake is one line with its cause and fix."""

import dataclasses
import json
import runpy
import subprocess
import sys

from lib.config import SYNONYMS, Config, UsageError, check, configure, help_text, option
from lib.evaluation import EvalConfig

import pytest
from conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
CHOICES = dict(
    method=("clever", "dino", "ddcl", "simsiam"),
    orth={"dot": None, "cosine": None},
    recipe=("baug", "caug", "caug+"),
)
DIGITS = "9" * 400


def refusal(cls, *argv, **choices):
    """Return the one line with which configure refuses argv."""
    with pytest.raises(UsageError) as error:
        configure(cls, list(map(str, argv)), **choices)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_file_and_command_line_override_in_this_order(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "import math\n_private = 3\nlr = 1e-3\nepochs = 10 * 2\nglobal_scale = [0.3, 1]\n"
    )
    argv = ["--epochs=30", "--method=dino", "--blur=False", "--local_scale=(0.1, 0.3)", "--alpha=2"]
    config = configure(Config, [str(path), *argv])
    assert (config.lr, config.epochs, config.method) == (1e-3, 30, "dino")
    assert config.blur is False
    assert config.alpha == 2.0
    assert type(config.alpha) is float
    assert config.global_scale == (0.3, 1)
    assert config.local_scale == (0.1, 0.3)
    assert config.out_dim_ef == config.out_dim
    # the command line wins wherever it stands
    assert configure(Config, ["--epochs=30", str(path)]).epochs == 30
    # None, as --help shows it
    assert configure(Config, ["--compile=True"]).compile is True
    assert configure(Config, ["--compile=None"]).compile is None


def test_a_value_may_stand_behind_a_space(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("epochs = 20\n")
    config = configure(
        Config, ["--alpha", "-2", str(path), "--data", "a b", "--blur", "False", "--lr=1e-3"]
    )
    assert (config.alpha, config.epochs, config.data, config.lr) == (-2.0, 20, "a b", 1e-3)
    assert config.blur is False
    assert configure(Config, ["--data="]).data == ""
    assert configure(Config, ["--out_dir=--odd"]).out_dir == "--odd"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--metod=dino", "unknown option 'metod' (did you mean 'method'?)"),
        ("--lambda_preg", "--lambda_preg=value"),
        ("epochs=3", "neither a config file"),
        ("--epochs=three", "must be of type int"),
        ("--epochs=3.5", "must be of type int"),
        ("--epochs=True", "must be of type int"),
        ("--blur=1", "True or False"),
        ("--lr=nan", "must be of type float"),
        ("--lr=__import__('os').system('true')", "must be of type float"),
        ("--method=dinno", "choose from clever, dino, ddcl, simsiam (did you mean 'dino'?)"),
        ("--orth=dott", "choose from dot, cosine (did you mean 'dot'?)"),
        ("--cache=disk", "choose from auto, ram, off"),
        ("--recipe=caug++", "did you mean 'caug+'?"),
        ("--ratio=1.5", "ratio=1.5: must be between 0.001 and 0.999"),
        ("--batch_size=0", "must be between"),
        ("--epochs=0", "epochs=0: must be between"),
        ("--local_crops=81", "local_crops=81: must be between 0 and 80"),
        ("--local_scale=(0.5,)", "must be low,high"),
        ("--local_scale=(0.5, None)", "must be low,high"),
        ("--local_scale=0.5", "a list of numbers"),
        ("--global_scale=(0.9, 0.1)", "0 < low <= high"),
        ("nowhere.py", "No such file"),
        ("--config=nowhere.json", "No such file"),
        ("nowhere", "neither a config file (.py, .json)"),
        ("--data_path=x", "unknown option 'data_path' (did you mean 'data'?)"),
        ("--lr_base=1", "did you mean 'lr'?"),
        ("--output-dir=x", "did you mean 'out_dir'?"),
        ("--num_workers=2", "did you mean 'workers'?"),
    ],
)
def test_mistakes_are_one_line(argument, message):
    assert message in refusal(Config, argument, **CHOICES)


@pytest.mark.parametrize("name", ["lr", "alpha", "lambda_preg", "clip_grad", "freeze_last_layer"])
@pytest.mark.parametrize(
    "value", ["1e309", "-1e309", DIGITS, "-" + DIGITS, "nan", "1" + DIGITS * 9]
)
def test_no_float_beyond_its_range(name, value, tmp_path):
    line = refusal(Config, f"--{name}={value}")
    assert line.startswith(f"{name}=")
    assert len(line) < 200
    (tmp_path / "c.py").write_text(f"{name} = {value if value != 'nan' else '1e309 - 1e309'}\n")
    if len(value) < 4000:  # Python itself refuses more digits in a source file
        assert refusal(Config, tmp_path / "c.py").startswith(f"{name}=")


@pytest.mark.parametrize(
    "field", [field for field in dataclasses.fields(Config) if field.type is int]
)
def test_no_integer_beyond_64_bits(field, tmp_path):
    for value in (DIGITS, str(2**63), "-1"):
        assert refusal(Config, f"--{field.name}={value}").startswith(f"{field.name}=")
    (tmp_path / "c.py").write_text(f"{field.name} = 10**5000\n")
    assert refusal(Config, tmp_path / "c.py").startswith(f"{field.name}=")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lr"], "--lr: has no value; write --lr=value"),
        (["--blur", "--epochs=3"], "--blur: has no value; write --blur=value"),
        (["--lam"], "did you mean 'lambda_preg'?"),
        (["a.py", "b.py"], "give one config file"),
    ],
)
def test_a_missing_value_is_one_line(argv, message):
    assert message in refusal(Config, *argv)


def test_every_synonym_names_an_option():
    options = {field.name for cls in (Config, EvalConfig) for field in dataclasses.fields(cls)}
    assert set(SYNONYMS.values()) <= options and not set(SYNONYMS) & options


def test_a_config_json_gives_its_options_but_for_facts_of_its_machine(tmp_path):
    path = tmp_path / "config.json"
    there = dataclasses.asdict(Config(method="dino", seed=3, global_scale=(0.5, 1.0)))
    path.write_text(json.dumps(there | dict(device="cuda", workers=7, ratio=1.0, revision="abc")))
    assert configure(Config, [str(path)]) == Config(method="dino", seed=3, global_scale=(0.5, 1.0))
    assert configure(Config, ["--config", str(path), "--seed", "4"]).seed == 4
    for text, message in (("{", "JSONDecodeError"), ("[1]", "TypeError"), ('{"x": 1}', "'x'")):
        path.write_text(text)
        assert message in refusal(Config, path)
    assert "one config file" in refusal(Config, path, "--config=b.json")


def test_one_config_file_per_run(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("lr = 1e-3\n")
    assert "give one config file" in refusal(Config, tmp_path / "a.py", tmp_path / "b.py")


@pytest.mark.parametrize("other, ours", SYNONYMS.items())
def test_a_name_of_another_program_is_refused_with_ours(other, ours, tmp_path):
    for cls in (Config, EvalConfig):
        message = f"unknown option {other!r} (did you mean {ours!r}?)"
        (tmp_path / "c.py").write_text(f"{other} = 0\n")
        is_told = ours in cls.__dataclass_fields__
        assert (message in refusal(cls, f"--{other}=0")) == is_told
        assert (message in refusal(cls, tmp_path / "c.py")) == is_told


@pytest.mark.parametrize(
    "source, message",
    [
        ("lr = ", "SyntaxError"),
        ("lr = 1 / 0", "ZeroDivisionError"),
        ("open('nowhere')", "FileNotFoundError"),
        ("learning_rate = 1", "unknown option"),
        ("lr = '1e-3'", "must be of type float"),
        ("ratio = 1.5", "must be between"),
    ],
)
def test_a_config_file_with_a_mistake_is_one_line(tmp_path, source, message):
    (tmp_path / "c.py").write_text(source)
    assert message in refusal(Config, tmp_path / "c.py")


def test_help_shows_every_option_with_its_text(capsys):
    with pytest.raises(SystemExit) as done:
        configure(Config, ["--lr=1", "--help"], **CHOICES)
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert text.strip() == help_text(Config, **CHOICES).strip()
    for field in dataclasses.fields(Config):
        assert f"--{field.name}=" in text
        assert field.metadata["help"]
    assert "linear scaling" in text
    assert "(clever, dino, ddcl, simsiam)" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    headings = [line for line in text.splitlines()[2:] if line and not line.startswith(" ")]
    assert headings == ["network", "loss", "views", "data", "optimization", "machine", "output"]


def test_help_marks_what_the_config_file_sets(tmp_path, capsys):
    (tmp_path / "c.py").write_text("lr, seed, blur = 0.1, 0, False\n")
    with pytest.raises(SystemExit):
        configure(Config, [str(tmp_path / "c.py"), "--help"], **CHOICES)
    text = capsys.readouterr().out
    assert "\n* set by the config file, not the default\n" in text
    assert "  --lr=0.1 * " in text and "  --blur=False * " in text
    assert "  --seed=0  " in text and text.count(" * ") == 2  # 0 is the default


def test_an_evaluation_extends_the_shared_options():
    @dataclasses.dataclass
    class Extended(EvalConfig):
        """Options of a test."""

        workers: int = option(2, "fewer", 0, 4)
        size: int = option(0, "0: find out", 16, 64, group="data")
        lrs: tuple = option((0.1, 1.0), "rates", 1e-9, 100, group="how")

    config = configure(Extended, ["--ckpt=x", "--lrs=0.5,", "--size", "32"])
    assert (config.ckpt, config.workers, config.lrs, config.size) == ("x", 2, (0.5,), 32)
    assert Config().workers is EvalConfig().workers is None
    assert "workers=5: must be between 0 and 4" in refusal(Extended, "--workers=5")
    assert "must be between" in refusal(Extended, "--size=8")
    assert "must be between" in refusal(Extended, "--lrs=0.5,1e309")
    assert "must be between" in refusal(Extended, "--lrs=0.5,'a'")
    assert configure(Extended, ["--size=0"]).size == 0  # a default is always right
    text = help_text(Extended)
    assert text.index("--data_root=") < text.index("--size=") < text.index("machine\n")
    assert text.index("\nhow\n") > text.index("\noutput\n")


def test_check_refuses_a_config_made_by_hand():
    check(Config(), **CHOICES)
    for wrong in (dict(ratio=2.0), dict(method="dinno"), dict(cache="disk"), dict(lr=-1.0)):
        with pytest.raises(UsageError):
            check(Config(**wrong), **CHOICES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_are_valid_and_tell_how_to_run_them(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = configure(Config, [str(path)], **CHOICES)
    assert config.out_dir == f"out/{path.stem}"
    doc = runpy.run_path(str(path))["__doc__"]
    assert f"configs/{path.name}" in doc


def test_config_imports_no_project_module_and_no_torch():
    code = "import sys; import lib.config; print(any(m == 'torch' for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
