"""Parsing: usage errors on one line, numbers in range, choices as the library defines them, fast `--help`."""

import argparse
import importlib
import subprocess
import sys

import pytest
from pixels import ROOT

from svdit.cli import COMMANDS, MODULES, command, main
from svdit.cli.arguments import Parser, decibels, integer, keys, ratio
from svdit.quant.config import ADALN, RECIPES


def parser_of(name: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(f"svdit.cli.{MODULES.get(name, name)}").parser()
    return parser


# The choices of an option, and the dict that defines them: a new sampler, backend or preset is added in one file.
CHOICES = [
    ("generate", "--sampler", "svdit.diffusion.flow_samplers", "FLOW_SAMPLERS", ["ddpm", "ddim", "dpm++"]),
    ("generate", "--sde-form", "svdit.diffusion.sde", "FORMS", []),
    ("generate", "--last-step", "svdit.diffusion.sde", "LAST_STEPS", []),
    ("generate", "--protocol", "svdit.sampling.protocols", "PROTOCOLS", []),
    ("generate", "--label-policy", "svdit.sampling.dataset", "LABEL_POLICIES", []),
    ("sample", "--backend", "svdit.kernels.ops", "BACKENDS", ["auto"]),
    ("train", "--augment", "svdit.training.data", "AUGMENTATIONS", []),
    ("quantize", "--preset", "svdit.quant.config", "RECIPES", ["auto"]),
    ("quantize", "--adaln", "svdit.quant.config", "ADALN", []),
]


@pytest.mark.parametrize(("name", "option", "module", "table", "extra"), CHOICES)
def test_choices_are_those_of_the_library(name: str, option: str, module: str, table: str, extra: list[str]) -> None:
    choices = next(action.choices for action in parser_of(name)._actions if option in action.option_strings)
    assert list(choices or []) == [*extra, *getattr(importlib.import_module(module), table)]


def test_missing_dict_literal_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"samplers.py has no dict literal SAMPLER"):
        keys("diffusion/samplers.py", "SAMPLER")


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5", "", "1e3", "²", "٣", "9" * 5000, str(2**63)])
def test_integers_out_of_range(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not an integer from 1 to"):
        integer(1)(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x", "", "1_0", "١", " 1", "0x10"])
def test_numbers_are_finite(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number"):
        decibels(text)


def test_bounds_are_inclusive_or_not_as_described() -> None:
    assert integer(0, 999)("999") == 999
    assert integer(0)(str(2**63 - 1)) == 2**63 - 1
    assert ratio("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="'0' is not a number above 0 and at most 1"):
        ratio("0")


# Every numeric or closed option of every command with values it must reject; each was once a traceback or accepted.
BAD = {
    "sample": ["--seed -1", "--seed 1.5", "--cfg-scale nan", "--cfg-scale -1",
               "--cfg-interval 0 1000", "--cfg-interval -1 5", "--image-size 0", "--num-classes x", "--backend fast",
               "--sampler eular", "--cfg-channels two"],
    "generate": ["--global-seed -1", "--num-fid-samples 0", "--per-proc-batch-size 0", "--rank-ratio nan",
                 "--rank-ratio 0", "--label-policy all", "--cfg-scale inf"],
    "quantize": ["--preset w2a2", "--rank-ratio nan", "--rank-ratio 1.5", "--num-bits 9", "--num-bits 1",
                 "--act-bits 6", "--group-size -1", "--rank -1", "--target-size 0", "--target-size -1",
                 "--target-size nan", "--target-size inf", "--target-sqnr nan", "--calib-images 0", "--calib-steps 0",
                 "--calib-steps 1001", "--cfg-scale nan", "--seed -1", "--max-memory -1", "--max-memory 0",
                 "--max-memory nan", "--factors int4", "--adaln int2"],
    "train": ["--lr nan", "--lr inf", "--lr -1", "--ema-decay 1.1", "--label-dropout nan", "--epochs 0", "--steps -5",
              "--seed -1", "--num-workers -1", "--global-batch-size 0", "--augment crop", "--epochs 1 --steps 1"],
    "evaluate": ["--num_images x", "--feature-extractor clip", "--seed 1.5"],
    "verify": ["--against"],
    "inspect": ["--layers 3"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "argv"), [(name, line) for name, lines in BAD.items() for line in lines])
def test_usage_errors_are_one_line(name: str, argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = {"train": ["--data", "digits"], "evaluate": ["--fake_dir", "x"], "verify": ["file"], "inspect": ["file"]}
    with pytest.raises(SystemExit) as stop:
        command(name, [*required.get(name, []), *argv.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"svdit {name}: ")
    assert error.endswith(f"see `svdit {name} --help`\n")
    assert error.count("\n") == 1


def test_parsers_report_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert {name for name in BAD if not isinstance(parser_of(name), Parser)} == set()
    with pytest.raises(SystemExit):
        Parser("svdit x").parse_args(["--no"])
    assert capsys.readouterr().err == "svdit x: unrecognized arguments: --no; see `svdit x --help`\n"


HELP = """
import sys, io
from contextlib import redirect_stdout
from svdit.cli import command
for name in sys.argv[1:]:
    with redirect_stdout(io.StringIO()) as out:
        try: command(name, ["--help"])
        except SystemExit as end: assert end.code == 0
    assert f"usage: svdit {name}" in out.getvalue(), name
    assert "torch" not in sys.modules, name
"""


def test_svdit_alone_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_help_of_no_command_imports_torch() -> None:
    subprocess.run([sys.executable, "-c", HELP, *COMMANDS], cwd=ROOT, check=True, timeout=60)


def test_every_preset_and_adaln_format_is_in_the_help() -> None:
    text = " ".join(parser_of("quantize").format_help().split())
    assert all(name in text for name in (*RECIPES, *ADALN))
