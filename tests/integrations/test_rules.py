"""The default rules on nine transformers of diffusers: what is quantized, what is left alone, and why."""

import re

import pytest
import torch
from tiny_diffusers import MODELS
from torch import nn

from svdit.errors import UserError
from svdit.integrations.rules import is_modulation, plan_for, rules_for
from svdit.quant.config import ADALN, recipe_for

BLOCKS = {"transformer_blocks", "single_transformer_blocks", "blocks", "layers", "noise_refiner", "context_refiner"}
INSIDE = re.compile(r"\.(attn\d?|attention|ff|ff_context|ffn|feed_forward|\w+_mlp|proj_mlp|proj_out)(\.|$)")
MODULATION = re.compile(r"\.(norm\w*\.linear|\w+_mod\.1|adaLN_modulation\.0)$")


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_feed_forward_of_all_blocks_are_quantized(name: str) -> None:
    model = MODELS[name].model()
    plan = plan_for(model, "w8a8")
    linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = {rule.pattern: rule.recipe for rule in plan.config.rules}
    blocks = [n for n in linears if n.split(".")[0] in BLOCKS and ".emb." not in n]
    assert sorted(chosen) == sorted(blocks)
    for layer, recipe in chosen.items():
        assert bool(INSIDE.search(layer)) != bool(MODULATION.search(layer)), layer
        assert recipe == (ADALN["int8"] if MODULATION.search(layer) else recipe_for("w8a8")), layer
    with_weights = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d)}
    assert plan.kept.keys() | {n for n, m in model.named_modules() if isinstance(m, nn.Conv3d)} == (
        with_weights | plan.kept.keys()
    ) - chosen.keys() and all(plan.kept.values())


def test_reasons() -> None:
    z_image, sana = MODELS["Z-Image"].model(), MODELS["Sana"].model()
    kept = plan_for(z_image, "w4a4").kept
    assert kept["layers.0.feed_forward.w2"] == "341 inputs, not a multiple of 64"
    assert kept["t_embedder.mlp.0"] == kept["all_final_layer.2-1.linear"] == "outside of the blocks"
    reached = [n for n, _ in z_image.named_modules() if not n.startswith("layers.1.")]
    kept = plan_for(z_image, "w8a8", reached=reached, adaln="fp16", skip=["*.to_q"]).kept
    assert kept["layers.1.feed_forward.w1"] == "never reached" and kept["layers.0.attention.to_q"] == "skipped"
    assert kept["layers.0.adaLN_modulation.0"] == "modulation"
    assert plan_for(sana, "w8a8").kept["transformer_blocks.0.ff.conv_depth"] == "convolution"
    dit = plan_for(MODELS["DiT"].model(), "w8a8").kept
    assert dit["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"] == "embedder"
    assert dit["transformer_blocks.0.norm1.emb.class_embedder.embedding_table"] == "embedding"


def test_attention_of_torch_and_other_linears_are_named() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    block = nn.ModuleDict({"attn": nn.MultiheadAttention(64, 1), "mlp": nn.Linear(64, 64), "own": Own(64, 64)})
    plan = plan_for(nn.ModuleDict({"blocks": nn.ModuleList([block])}), "w8a8")
    assert [rule.pattern for rule in plan.config.rules] == ["blocks.0.mlp"]
    assert "in_proj" in plan.kept["blocks.0.attn"]
    assert "own forward" in plan.kept["blocks.0.own"]


def test_mistakes_are_sentences() -> None:
    model = MODELS["DiT"].model()
    with pytest.raises(UserError, match="there is no preset 'w3a3'; choose one of w8a8"):
        rules_for(model, "w3a3")
    with pytest.raises(UserError, match="'fp8' is not a format of adaLN; choose"):
        rules_for(model, adaln="fp8")
    with pytest.raises(UserError, match=r"'\*\.to_z' matches no linear layer"):
        rules_for(model, skip=["*.to_z"])
    with pytest.raises(UserError, match="a Sequential has no blocks"):
        rules_for(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("name", ["img_mod.1", "norm1.linear", "adaLN_modulation.0", "scale_shift_mod", "adaln_single"])
def test_modulation(name: str) -> None:
    assert is_modulation(name) and not is_modulation("blocks.0.model.to_q")
