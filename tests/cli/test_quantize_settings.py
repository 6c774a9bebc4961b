"""Options of `svdit quantize`: each changes what it names and nothing else; contradictions are errors."""

import json
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from svdit.cli.quantize import parser
from svdit.cli.quantize_settings import QuantizeSettings
from svdit.errors import UserError
from svdit.kernels.formats import Format
from svdit.quant.config import GELU_SHIFT, RECIPES, dit_config, recipe_for


def settings(*argv: str) -> QuantizeSettings:
    return QuantizeSettings.of(parser().parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", RECIPES["w8a8"]),
        ("--preset w4a8 --num-bits 8", replace(RECIPES["w4a8"], weight=RECIPES["w8a8"].weight)),
        ("--num-bits 4", RECIPES["w4a8"]),
        ("--num-bits 4 --group-size 0", RECIPES["w4a8-channel"]),
        ("--num-bits 4 --act-bits 4", RECIPES["w4a4"]),
        ("--preset w8a16 --num-bits 4", RECIPES["w4a16"]),
        ("--preset w4a8 --act-bits 16", RECIPES["w4a16"]),
        ("--preset w4a8-channel --num-bits 4", RECIPES["w4a8-channel"]),
        ("--preset w4a8-channel --num-bits 3", recipe_for("w4a8-channel", weight=Format(3, span="full"))),
        ("--preset svdquant-w4a4 --num-bits 4 --act-bits 4", RECIPES["svdquant-w4a4"]),
        ("--preset svdquant --num-bits 4 --act-bits 4", RECIPES["svdquant-w4a4"]),
        ("--preset svdquant-w4a4 --num-bits 3", recipe_for("svdquant-w4a4", weight=Format(3, 64, "bf16"))),
        ("--num-bits 6", recipe_for("w8a8", weight=Format(6, 64, "bf16", "full"))),
        ("--preset w4a8 --num-bits 6", recipe_for("w4a8", weight=Format(6, 64, "bf16", "full"))),
        ("--group-size 32", recipe_for("w8a8", weight=Format(8, 32, "bf16"))),
        ("--preset fp8 --act-bits 16", recipe_for("fp8", act=None)),
    ],
)
def test_options_change_only_what_they_name(argv: str, expected: object) -> None:
    assert settings(*argv.split()).recipe == expected


@pytest.mark.parametrize("preset", RECIPES)
def test_bits_the_preset_has_already_change_nothing(preset: str) -> None:
    recipe = RECIPES[preset]
    argv = ["--preset", preset]
    if recipe.weight and recipe.weight.element == "int":
        argv += ["--num-bits", str(recipe.weight.bits), "--group-size", str(recipe.weight.group)]
    if recipe.act is None or recipe.act.element == "int":
        argv += ["--act-bits", str(recipe.act.bits if recipe.act else 16)]
    assert settings(*argv).config == dit_config(recipe)


def test_published_w4a4_keeps_its_shift_before_fc2() -> None:
    for argv in ("--act-bits 4", "--num-bits 4", "--rank 8"):
        fc2 = settings("--preset", "svdquant-w4a4", *argv.split()).config.recipe("blocks.0.mlp.fc2")
        assert fc2 is not None and fc2.act is not None
        assert (fc2.shift, fc2.act.span) == (GELU_SHIFT, "unsigned"), argv


def test_the_documented_command() -> None:
    documented = settings("--rank-ratio", "0.95", "--num-bits", "8")
    recipe = documented.config.recipe("any.linear")
    assert recipe is not None
    assert (recipe.rank_ratio, recipe.factors, recipe.weight, recipe.act) == (0.95, Format(8), None, None)
    assert not documented.calibrates


# One value of each option, none of them a default.
VALUES = {
    "--preset": "w4a4", "--rank-ratio": "0.5", "--num-bits": "3", "--act-bits": "16", "--group-size": "32",
    "--rank": "5", "--factors": "int8", "--adaln": "int4", "--target-size": "1.5",
    "--target-sqnr": "20", "--target-psnr": "40", "--skip": "*.proj", "--no-figures": "",
    "--calib-images": "3", "--calib-steps": "7", "--cfg-scale": "2", "--seed": "1", "--max-memory": "1",
}  # fmt: skip
EXCLUDED = {  # pairs of VALUES that contradict each other
    "--rank-ratio": "--preset --act-bits --group-size --rank --factors --adaln "
                    "--target-size --target-sqnr --target-psnr",
    "--target-size": "--target-sqnr --target-psnr --num-bits --group-size --rank --adaln",
    "--target-sqnr": "--target-psnr --num-bits --group-size --rank --adaln",
    "--target-psnr": "--num-bits --group-size --rank --adaln",
}  # fmt: skip
PAIRS = {frozenset((a, b)) for a, others in EXCLUDED.items() for b in others.split()}


def words(*options: str) -> list[str]:
    return [word for option in options for word in (option, VALUES[option]) if word]


def effect(asked: QuantizeSettings) -> dict[str, Any]:
    """Everything the settings decide."""
    calibration = (asked.calib_images, asked.calib_steps, asked.max_memory) if asked.calibrates else None
    guided = (asked.cfg_scale, asked.seed) if asked.calibrates or asked.figures else None
    targets = asked.target_size, asked.target_sqnr, asked.target_psnr
    return {"config": asked.config, "inputs": (calibration, guided), "targets": targets, "figures": asked.figures}


def test_every_option_is_covered() -> None:
    options = {o for action in parser()._actions for o in action.option_strings if o.startswith("--")}
    assert options - set(VALUES) == {
        "--whiten", "--help", "--ckpt", "--model", "--image-size", "--num-classes", "--num-heads", "--device",
        "--output", "--overwrite", "--family", "--context-start", "--latent-stats",
    }  # fmt: skip


@pytest.mark.parametrize("pair", list(combinations(VALUES, 2)), ids=" ".join)
def test_every_pair_of_options_has_the_effect_of_both_or_is_reported(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if frozenset(pair) in PAIRS:
        with pytest.raises(UserError) as error:
            settings(*words(*pair))
        assert all(option in str(error.value) for option in pair)
        return
    try:
        reported = {sentence.split()[0] for sentence in settings(*words(*pair)).unused()}
    except UserError as error:
        reported = {str(error).split()[0]}
    monkeypatch.setattr(QuantizeSettings, "branch_problems", lambda self: iter(()))
    both = effect(settings(*words(*pair)))
    for option, other in (pair, pair[::-1]):
        without = effect(settings(*words(other)))
        assert (both == without) == (option in reported), f"{option} has no effect, or is reported"


@pytest.mark.parametrize("option", VALUES)
def test_whiten_calibrates_the_rank_ratio_mode(option: str) -> None:
    whitened = ["--rank-ratio", "0.95", "--whiten"]
    if option in EXCLUDED["--rank-ratio"].split():
        with pytest.raises(UserError, match=f"{option} excludes --rank-ratio"):
            settings(*whitened, *words(option))
    else:
        assert effect(settings(*whitened, *words(option))) != effect(settings(*whitened))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--whiten", "--whiten requires --rank-ratio"),
        ("--preset auto", "--preset auto requires --target-size or --target-psnr"),
        ("--preset auto --target-sqnr 30", "--preset auto requires --target-size or --target-psnr"),
        ("--rank-ratio 0.5 --preset w8a8", "--preset excludes --rank-ratio"),  # also with its default
        ("--rank-ratio 0.5 --adaln int8", "--adaln excludes --rank-ratio"),
        ("--preset fp8 --num-bits 8", "--num-bits requires integer weights, --preset fp8 has FP8 E4M3"),
        ("--preset nvfp4 --group-size 16", "--group-size requires integer weights"),
        ("--preset mxfp4 --target-size 1", "--target-size requires integer weights"),
        ("--preset nvfp4 --act-bits 4", "--preset nvfp4 has FP4 E2M1 g16 activations; choose 16"),
        ("--preset w4a8-channel --target-sqnr 30", "has a scale per row, but --target-sqnr chooses groups"),
    ],
)
def test_options_that_contradict_the_preset(argv: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        settings(*argv.split())
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--preset rtn --rank 8", "--rank has no effect: there is no low-rank branch with --preset rtn"),
        ("--preset gptq --factors bf16", "--factors has no effect: there is no low-rank branch with --preset gptq"),
        ("--rank 0 --factors int8", "--factors has no effect: there is no low-rank branch with --rank 0"),
    ],
)
def test_options_of_a_missing_branch_are_errors(argv: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        settings(*argv.split())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--preset rtn --calib-images 4", "--calib-images has no effect: nothing is calibrated"),
        ("--preset rtn --max-memory 4", "--max-memory has no effect"),
        ("--preset rtn --no-figures --seed 4", "--seed has no effect"),
        ("--rank-ratio 0.5 --no-figures --cfg-scale 2", "--cfg-scale has no effect"),
    ],
)
def test_options_without_effect_are_reported(argv: str, sentence: str) -> None:
    assert any(sentence in unused for unused in settings(*argv.split()).unused())


@pytest.mark.parametrize(
    "argv",
    [
        "--preset rtn --seed 4",  # of the figures' measurements
        "--preset rtn --rank 0",
        "--preset rtn --adaln int4 --calib-images 4",  # adaLN by GPTQ
        "--target-size 1 --rank 0",
        "--target-size 1 --adaln fp16",
        "--preset w4a8 --target-size 1 --skip *.proj",
        "--rank-ratio 0.5 --whiten --calib-images 4 --seed 1 --no-figures",
    ],
)
def test_combinations_that_are_meaningful(argv: str) -> None:
    assert list(settings(*argv.split()).unused()) == []


def test_the_record_is_json_and_names_every_choice() -> None:
    record = settings("--preset", "w4a8", "--skip", "*.proj", "--rank", "4").record()
    assert (record["mode"], record["preset"], record["adaln"], record["skip"]) == ("preset", "w4a8", "int8", ["*.proj"])
    assert record["recipe"]["rank"] == 4
    assert json.loads(json.dumps(record)) == record
    assert settings("--rank-ratio", "0.5", "--skip", "a*").record() == {
        "mode": "rank_ratio", "rank_ratio": 0.5, "num_bits": 8, "whiten": False, "skip": ["a*"]
    }  # fmt: skip


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        settings().rank = 4  # type: ignore[misc]
