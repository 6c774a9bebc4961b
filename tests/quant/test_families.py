"""Every preset and budget on every family: which layers are quantized, which are not, and how far outputs move."""

from dataclasses import replace

import pytest
import torch
from conftest import relative
from families import VARIANTS, small
from torch import Tensor, nn

from svdit.model.config import FAMILIES
from svdit.model.dit import DiT
from svdit.quant.budget import plan_
from svdit.quant.config import INT4_SYMMETRIC, RECIPES, dit_config, rank_ratio_config
from svdit.quant.linear import linears, quantized_layers
from svdit.quant.quantize import quantize_
from svdit.quant.select import select

MLPS = {"gelu": ("fc1", "fc2"), "swiglu": ("w12", "w3")}
KEPT = {"t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"}


def tiny_of(family: str) -> DiT:
    """One block, or two where context tokens enter the second; one family with four modulations."""
    return small(family, depth=1 + (family == "jit"), mlp_ratio=2.0, shift=family != "lightningdit")


def inputs(model: DiT, count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C, H, W), t (N,) over the model's whole range, y (N,) with the null class."""
    x = torch.randn(count, *model.input_shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, count)
    return x, t if model.config.is_flow else (999 * t).long(), torch.arange(count) % 6


def show(model: nn.Module) -> None:
    assert isinstance(model, DiT)
    model(*inputs(model))


def test_all_families_are_tried() -> None:
    assert VARIANTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", VARIANTS)
@torch.no_grad()
def test_every_preset_quantizes_the_linears_of_the_blocks_and_nothing_else(family: str) -> None:
    """Half of the presets, in turns: a preset knows nothing of families, and the CLI's tests try all."""
    for preset in list(RECIPES)[list(VARIANTS).index(family) % 2 :: 2]:
        model, recipe = tiny_of(family), RECIPES[preset]
        before, state = model(*inputs(model)), {key: value.clone() for key, value in model.state_dict().items()}
        cheap = replace(recipe, rank=4, smoothing=recipe.smoothing and "balanced", iterations=1)
        report = quantize_(model, dit_config(cheap), show)
        assert 1e-4 < relative(model(*inputs(model)), before) < (0.05 if "8a" in preset else 0.5), preset
        first, second = MLPS[model.config.mlp]
        kinds = ("attn.qkv", "attn.proj", f"mlp.{first}", f"mlp.{second}", "adaLN_modulation.1")
        names = {f"blocks.{i}.{kind}" for i in range(model.config.depth) for kind in kinds}
        names.add("final_layer.adaLN_modulation.1")
        assert {line.name for line in report.layers} == set(quantized_layers(model)) == names
        assert {name for name, _ in linears(model)} == KEPT
        for key, value in model.state_dict().items():  # norms, embeddings and context tokens too
            assert key.rpartition(".")[0] in names or torch.equal(value, state[key]), key


@pytest.mark.parametrize("family", VARIANTS)
def test_only_a_gelu_is_bounded_below(family: str) -> None:
    """silu(a) · b has both signs, so the input of w3 has the signed format, and no shift."""
    model = tiny_of(family)
    recipes = select(model, dit_config(RECIPES["svdquant-w4a4"])).recipes
    unsigned = {name for name, recipe in recipes.items() if recipe.act and recipe.act.span == "unsigned"}
    assert unsigned == {name for name, recipe in recipes.items() if recipe.shift}
    assert unsigned == ({"blocks.0.mlp.fc2"} if model.config.mlp == "gelu" else set())
    assert recipes[f"blocks.0.{'mlp.w3' if not unsigned else 'attn.proj'}"].act == INT4_SYMMETRIC


@pytest.mark.parametrize("family", VARIANTS)
@torch.no_grad()
def test_the_rank_ratio_mode_factors_every_linear(family: str) -> None:
    model = tiny_of(family)
    before, names = model(*inputs(model)), [name for name, _ in linears(model)]
    report = quantize_(model, rank_ratio_config(1.0, 8))
    assert [line.name for line in report.layers] == names
    assert 1e-4 < relative(model(*inputs(model)), before) < 0.05
    assert not any("proj1" in name or "proj2" in name for name in names)  # convolutions


@pytest.mark.parametrize("family", VARIANTS)
def test_budgets_are_met_by_every_family(family: str) -> None:
    model, config = tiny_of(family), dit_config(replace(RECIPES["w4a8"], rank=4, smoothing=0))
    plan = plan_(model, config, show, target_sqnr=35.0)
    assert plan.sqnr >= 35
    smaller = plan_(model, config, show, target_bytes=plan.nbytes - 1)
    assert smaller.nbytes < plan.nbytes and smaller.sqnr < plan.sqnr


@torch.no_grad()
def test_zeros_that_pad_a_swiglu_stay_without_effect() -> None:
    model = tiny_of("lightningdit")
    mlp = model.blocks[0].mlp
    for half in (*mlp.w12.weight.chunk(2), *mlp.w12.bias.chunk(2)):
        half[150:] = 0
    mlp.w3.weight[:, 150:] = 0
    before = model(*inputs(model))
    quantize_(model, dit_config(replace(RECIPES["w4a8"], rank=4)), show)
    assert 1e-4 < relative(model(*inputs(model)), before) < 0.05
    assert all(layer.spec.hadamard == 64 for name, layer in quantized_layers(model).items() if "adaLN" not in name)
    hidden = model.blocks[0].mlp.w12(torch.randn(9, 64, generator=torch.Generator().manual_seed(0)))
    assert float(hidden.chunk(2, dim=-1)[0][:, 150:].abs().max()) < 1e-5 * float(hidden.abs().max())
