"""Recipes, rules and presets: what is valid, and which recipe a layer gets."""

from dataclasses import replace

import pytest

from svdit.errors import UserError
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS
from svdit.quant.config import (
    ADALN,
    CLOSED_SETS,
    RECIPES,
    QuantConfig,
    Recipe,
    Rule,
    dit_config,
    rank_ratio_config,
    recipe_for,
)

FACTORS = {"low_rank": "factors", "weight": None, "act": None}


def test_shifted_inputs_of_fc2_use_unsigned_codes() -> None:
    config = dit_config(RECIPES["svdquant-w4a4"])
    assert config.recipe("blocks.3.mlp.fc2").act.span == "unsigned"
    assert config.recipe("blocks.3.mlp.fc1").act.span == "symmetric"
    assert config.recipe("blocks.3.adaLN_modulation.1").act is None
    assert config.recipe("x_embedder.proj") is None
    assert dit_config(RECIPES["w4a4"]).recipe("blocks.3.mlp.fc2") == RECIPES["w4a4"]


@pytest.mark.parametrize(
    ("bad", "value"),
    [
        ({"low_rank": "iterate"}, "'iterate'"),
        ({"low_rank": None}, "None"),
        ({"rounding": "GPTQ"}, "'GPTQ'"),
        ({"smoothing": 10}, "10"),
        ({"smoothing": False}, "False"),
        ({"factor_dtype": "fp16"}, "'fp16'"),
        ({"weight": "int4"}, "'int4'"),
        ({"act": 8}, "8"),
        ({"factors": 8}, "8"),
        ({"rank": -1}, "-1"),
        ({"rank": 2.5}, "2.5"),
        ({"rank": True}, "True"),
        ({"iterations": 0}, "0"),
        ({"iterations": 1.0}, "1.0"),
        ({"hadamard": 48}, "48"),
        ({"hadamard": -64}, "-64"),
        ({"rank_ratio": 0.0}, "0.0"),
        ({"rank_ratio": 1.5}, "1.5"),
        ({"rank_ratio": "half"}, "'half'"),
        ({"rank_ratio": float("nan")}, "nan"),
        ({"shift": float("inf")}, "inf"),
        ({"shift": "0"}, "'0'"),
    ],
)
def test_values_that_mean_nothing_are_sentences(bad: dict[str, object], value: str) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(bad))} is {value}; (supported|pass)"):
        Recipe(**{"centre": False, **bad})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"low_rank": "factors"}, "leaves no residual, but weight is INT8 and act INT8"),
        ({**FACTORS, "rank": 0}, "rank 0"),
        ({"weight": None}, "'alternated' needs a weight format"),
        ({"shift": -0.1}, "centre and shift=-0.1 exclude each other"),
        ({"whiten": True}, "low_rank is 'alternated'"),
    ],
)
def test_combinations_that_exclude_each_other_are_sentences(bad: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**bad)


@pytest.mark.parametrize("field", CLOSED_SETS)
def test_every_value_of_a_closed_set_is_accepted(field: str) -> None:
    for value in CLOSED_SETS[field]:
        extra = FACTORS if value == "factors" else {}
        assert getattr(Recipe(**{**extra, field: value}), field) == value


@pytest.mark.parametrize("low_rank", CLOSED_SETS["low_rank"])
def test_what_is_weighted_by_the_inputs_needs_them(low_rank: str) -> None:
    plain = replace(RECIPES["rtn"], **(FACTORS if low_rank == "factors" else {"low_rank": low_rank}), rank=4)
    assert plain.needs_inputs == (low_rank in ("correction", "alternated"))
    changes = [{"centre": True}, {"smoothing": 7}, {"rounding": "gptq"}, {"search_scales": True}]
    assert all(replace(plain, **change).needs_inputs for change in changes)


def test_rules_and_their_order_are_checked() -> None:
    with pytest.raises(UserError, match="pass a pattern and a Recipe"):
        Rule("*", "w8a8")
    with pytest.raises(UserError, match="pass a tuple of Rules"):
        QuantConfig([Rule("*", None)])
    with pytest.raises(UserError, match="pass a tuple of Rules"):
        QuantConfig((("*", None),))
    config = QuantConfig((Rule("head", None), Rule("*", RECIPES["rtn"])))
    assert config.recipe("head") is None
    assert config.recipe("head.0") == RECIPES["rtn"]


@pytest.mark.parametrize("adaln", ADALN)
def test_every_adaln_format_has_its_rule(adaln: str) -> None:
    assert dit_config(RECIPES["w8a8"], adaln).recipe("blocks.3.adaLN_modulation.1") == ADALN[adaln]
    with pytest.raises(UserError, match="there is no format of adaLN 'fp8'; choose one of int8, int4, fp16"):
        dit_config(RECIPES["w8a8"], "fp8")


@pytest.mark.parametrize("preset", ["w4a8", "w4a8-channel", "w4a4", "w4a16"])
def test_the_last_block_before_pixels_has_whole_bytes(preset: str) -> None:
    recipe = recipe_for(preset, rank=8)
    config = dit_config(recipe, skip=("*.fc1",), last_block=5)
    last = config.recipe("blocks.5.mlp.w3")
    assert (last.weight, last.act) == (WEIGHT_FORMATS["int8"], ACT_FORMATS["int8"] if recipe.act else None)
    assert (last.rank, last.hadamard) == (8, recipe.hadamard)
    assert config.recipe("blocks.4.mlp.w3") == config.recipe("blocks.15.attn.qkv") == recipe
    assert config.recipe("blocks.5.mlp.fc1") is None
    assert config.recipe("blocks.5.adaLN_modulation.1") == ADALN["int8"]


@pytest.mark.parametrize("preset", ["w8a8", "w8a16", "svdquant", "svdquant-w4a4", "rtn", "nvfp4", "fp8"])
def test_the_last_block_of_other_recipes_is_like_the_others(preset: str) -> None:
    assert dit_config(RECIPES[preset], last_block=5) == dit_config(RECIPES[preset])


def test_skipped_layers_come_first() -> None:
    for config in (dit_config(RECIPES["w8a8"], skip=("*.fc1",)), rank_ratio_config(0.5, 8, skip=("*.fc1",))):
        assert config.recipe("blocks.3.mlp.fc1") is None
        assert config.recipe("blocks.3.mlp.fc2") is not None


def test_unknown_presets_name_the_known() -> None:
    with pytest.raises(UserError, match="there is no preset 'w2a2'; choose one of w8a8"):
        recipe_for("w2a2")
    assert recipe_for("w4a8", rank=4).rank == 4
    assert recipe_for("w4a8").weight == WEIGHT_FORMATS["int4"]
