"""Knobs: typed, checked, parsed as literals; every mistake is one line with the cause and the mend."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT
from configurator import Config, UsageError, configure, knobs


def test_defaults_file_and_command_line_override_in_this_order(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "import math\n_private = 3\nlr = 1e-3\nepochs = 10 * 2\nglobal_scale = [0.3, 1]\n"
    )
    config = configure(
        Config,
        [
            str(path),
            "--epochs=30",
            "--method=dino",
            "--blur=False",
            "--local_scale=(0.1, 0.3)",
            "--alpha=2",
        ],
    )
    assert (config.lr, config.epochs, config.method, config.blur, config.alpha) == (
        1e-3,
        30,
        "dino",
        False,
        2.0,
    )
    assert (
        config.global_scale == (0.3, 1)
        and config.local_scale == (0.1, 0.3)
        and config.out_dim_ef == config.out_dim
    )
    assert (
        configure(Config, ["--epochs=30", str(path)]).epochs == 30
    )  # the command line wins wherever it stands
    assert (
        configure(Config, ["--compile=True"]).compile is True
        and configure(Config, ["--compile=None"]).compile is None
    )  # as --help shows it


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--metod=dino", "unknown knob 'metod' (did you mean 'method'?)"),
        ("--lam", "--lam=value"),
        ("epochs=3", "neither a config file"),
        ("--epochs=three", "must be of type int"),
        ("--epochs=3.5", "must be of type int"),
        ("--epochs=True", "must be of type int"),
        ("--blur=1", "True or False"),
        ("--lr=nan", "must be of type float"),
        ("--lr=__import__('os').system('true')", "must be of type float"),
        ("--method=dinno", "choose from clever, dino, ddcl, simsiam (did you mean 'dino'?)"),
        ("--recipe=caug++", "did you mean 'caug+'?"),
        ("--ratio=1.5", "must lie between"),
        ("--batch_size=0", "must lie between"),
        ("--local_scale=(0.5,)", "two shares"),
        ("--local_scale=(0.5, None)", "two shares"),
        ("--global_scale=(0.9, 0.1)", "0 < low <= high"),
        ("--epochs=5", "warmup_epochs"),
        ("nowhere.py", "No such file"),
    ],
)
def test_mistakes_are_one_line(argument, message):
    with pytest.raises(UsageError) as error:
        configure(Config, [argument])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("lr = ", "SyntaxError"),
        ("lr = 1 / 0", "ZeroDivisionError"),
        ("learning_rate = 1", "unknown knob"),
        ("lr = '1e-3'", "must be of type float"),
    ],
)
def test_a_config_file_with_a_mistake_is_one_line(tmp_path, source, message):
    (tmp_path / "c.py").write_text(source)
    with pytest.raises(UsageError) as error:
        configure(Config, [str(tmp_path / "c.py")])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_help_shows_every_knob_with_its_comment(capsys):
    with pytest.raises(SystemExit) as done:
        configure(Config, ["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and text.strip() == knobs(Config).strip()
    import dataclasses

    for field in dataclasses.fields(Config):
        assert f"--{field.name}=" in text
    assert "linear scaling" in text


@pytest.mark.parametrize(
    "end, code",
    [
        ("pass", 0),
        ("raise UsageError('x')", 2),
        ("raise KeyboardInterrupt", 130),
        ("sys.exit(143)", 143),
        ("1 / 0", 1),
    ],
)
def test_a_rank_ends_though_a_thread_does_not(end, code):
    """As a thread of communication that outlives its process group; Python itself would wait for this one for ever."""
    program = f"""
import atexit, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from configurator import UsageError, exit_on_usage_error
threading.Thread(target=threading.Event().wait).start()
atexit.register(print, "cleared up", end="")
with exit_on_usage_error():
    print("worked", end=" ")
    {end}
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "RANK": "0"},
    )
    assert done.returncode == code and done.stdout == "worked cleared up", done.stderr
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)
