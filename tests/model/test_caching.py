"""Cache plans applied: against a plain reimplementation, for every family, quantized or not; plans that are refused."""

from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from conftest import relative
from families import VARIANTS, small
from torch import Tensor

from svdit.diffusion.noise import image_noise
from svdit.errors import UserError
from svdit.fields import from_json
from svdit.model.caching import CachePlan, cached
from svdit.model.dit import DiT
from svdit.model.embeddings import sinusoids
from svdit.quant.config import RECIPES, dit_config
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.runtime.linear import FastLinear
from svdit.sampling.batch import default_sampling, generate
from svdit.sampling.calibration import calibration_loop
from svdit.sampling.config import recorded

PLAN = CachePlan(
    (0, 1), ("110010", "101100"), (((1.5, -0.5), (0.5, 0.25), (2.0, -1.0)), ((0.75, 0.0), (1.25, 0.5), (1.0, 0.0)))
)
EVERYTHING = CachePlan((0, 1), ("111111",) * 2, ((), ()))
Call = tuple[Tensor, Tensor, Tensor]


def config_of(model: DiT) -> Any:
    """Six evaluations of the model, some of them guided."""
    options: dict[str, Any] = {"sampler": "euler" if model.config.is_flow else "ddim", "steps": "6", "cfg_scale": 2.0}
    if model.config.family in ("sit", "lightningdit"):
        options["steps"] = "7"  # times
    if model.config.family == "lightningdit":
        options["cfg_interval"] = (0.0, 0.1)
    return default_sampling(model.config, **options)


def plain(model: DiT, plan: CachePlan, calls: list[Call]) -> list[Tensor]:
    """The outputs (N, C or 2C, H, W) of consecutive evaluations, written without classes."""
    outputs, seen = [], [dict[int, Tensor](), dict[int, Tensor]()]
    for n, (x, t, y) in enumerate(calls):
        x, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(sinusoids(t)) + model.y_embedder(y)
        for g, blocks in enumerate((model.blocks[:1], model.blocks[1:])):
            if g == model.config.context_start:
                x = model.with_context(x, model.y_embedder(y))
            if plan.runs[g][n] == "1":
                start = x
                for block in blocks:
                    x = block(x, c, model.rotation_of(x))
                seen[g][n] = x - start
            else:
                a, b = plan.coefficients[g][plan.runs[g][:n].count("0")]
                *_, older, newest = (0, *seen[g].values())
                x = x + a * newest[: len(x)] + (b * older[: len(x)] if b else 0)
        outputs.append(
            model.unpatchify(model.final_layer(x[:, model.config.context_tokens :], c))[:, : model.used_channels]
        )
    return outputs


def trajectory(model: DiT, plan: CachePlan) -> tuple[Tensor, list[Call], list[Tensor]]:
    """The images (N, C, H, W), and the inputs and outputs of all evaluations."""
    calls, outputs, follow = list[Call](), list[Tensor](), cached(model, plan, model.config.depth)

    def evaluate(*call: Tensor) -> Tensor:
        calls.append(call)  # type: ignore[arg-type]
        outputs.append(follow(*call))
        return outputs[-1]

    images = generate(model, [1, 2], config_of(model), evaluate=evaluate)
    return images, calls, outputs


@pytest.mark.parametrize("family", VARIANTS)
@torch.no_grad()
def test_a_plan_is_followed_as_written(family: str) -> None:
    model = small(family)
    _, calls, outputs = trajectory(model, PLAN)
    assert len(calls) == 6 and (family != "lightningdit" or [len(x) for x, _, _ in calls] == [4, 4, 2, 2, 2, 2])
    expected, uncached = plain(model, PLAN, calls), [model(*call) for call in calls]
    for n, (output, right, whole) in enumerate(zip(outputs, expected, uncached, strict=True)):
        assert relative(output, right) < 1e-6
        assert n == 0 or relative(output, whole) > 1e-4


@pytest.mark.parametrize("family", ["dit", "jit"])
def test_a_plan_that_runs_everything_changes_no_bit(family: str) -> None:
    model = small(family)
    expected = generate(model, [1, 2], config_of(model))
    assert torch.equal(trajectory(model, EVERYTHING)[0], expected)


@pytest.mark.parametrize("family", ["dit", "jit"])
@torch.no_grad()
def test_quantized_models_follow_a_plan_image_by_image(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(family)
    quantize_(model, dit_config(RECIPES["w8a8"]), calibration_loop(images=4, steps=4))
    config, slow = config_of(model), deepcopy(model)
    model.cache_plan = replace(PLAN, sampling=recorded(config))
    fast = accelerate(model)
    uncached = generate(fast, [1, 2], config, evaluate=fast)
    assert torch.equal(trajectory(fast, EVERYTHING)[0], uncached)
    images, calls, outputs = trajectory(fast, PLAN)
    follow = cached(slow, PLAN, 3)
    for n, (call, output) in enumerate(zip(calls, outputs, strict=True)):
        error, change = relative(output, follow(*call)), relative(output, fast(*call))
        assert error < 3e-3 and (n == 0 or 2 * error < change)
    assert torch.equal(generate(fast, [1, 2], config), images) and not torch.equal(images, uncached)
    for i, label in enumerate([1, 2]):
        noise = image_noise(0, [i], fast.input_shape, fast.pos_embed.device)
        assert torch.equal(generate(fast, [label], config, noise=noise)[0], images[i])
    layers, fused = set[str](), FastLinear.fused
    monkeypatch.setattr(
        FastLinear, "fused", lambda self, *args, **kw: layers.add(self.name) or fused(self, *args, **kw)
    )
    follow = cached(fast, PLAN, 3)
    for n, call in enumerate(calls):
        layers.clear()
        follow(*call)
        blocks = {int(name.split(".")[1]) for name in layers if name.startswith("blocks.")}
        assert blocks == {i for i, g in enumerate((0, 1, 1)) if PLAN.runs[g][n] == "1"}  # their modulations too


def test_a_plan_is_followed_with_its_own_settings_only() -> None:
    model = small("dit")
    config = config_of(model)
    model.cache_plan = replace(PLAN, sampling=recorded(config))
    assert torch.equal(generate(model, [1, 2], config), trajectory(model, PLAN)[0])
    other = replace(config, cfg_scale=1.5)
    assert torch.equal(generate(model, [1, 2], other), generate(model, [1, 2], other, evaluate=model))


def test_sampling_past_a_plan_is_refused() -> None:
    model = small("dit")
    short = CachePlan((0,), ("10",), (((1.0, 0.0),),))
    with pytest.raises(UserError, match="is for 2 evaluations of the model, and sampling needs more"):
        trajectory(model, short)


def test_nothing_is_skipped_where_guidance_begins() -> None:
    model, x = small("dit"), torch.randn(4, 4, 4, 4)
    follow = cached(model, CachePlan((0,), ("10",), (((1.0, 0.0),),)), 3)
    t, y = torch.full((4,), 5), torch.tensor([1, 2, 5, 5])
    follow(x[:2], t[:2], y[:2])
    with pytest.raises(UserError, match="where guidance begins"):
        follow(x, t, y)


GOOD = {"groups": [0, 1], "runs": ["110", "101"], "coefficients": [[[2.0, -1.0]], [[1.0, 0.0]]]}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"groups": []}, "each group of a cache plan needs runs"),
        ({"groups": [0]}, "each group of a cache plan needs runs"),
        ({"groups": [1, 2]}, "not at ascending blocks from 0 on"),
        ({"groups": [0, True]}, "not at ascending blocks from 0 on"),
        ({"runs": ["110", "001"]}, "runs first"),
        ({"runs": ["110", "10"]}, "as many evaluations"),
        ({"runs": ["110", "1x1"]}, "runs first"),
        ({"coefficients": [[[2.0, -1.0]], []]}, "two finite coefficients"),
        ({"coefficients": [[[2.0, float("nan")]], [[1.0, 0.0]]]}, "two finite coefficients"),
        ({"coefficients": [[["2", -1.0]], [[1.0, 0.0]]]}, "two finite coefficients"),
        ({"coefficients": [[[2.0, -1.0]], [[1.0, 0.5]]]}, "extrapolates a group that ran only once"),
        ({"other": 1}, "has no field 'other'"),
    ],
)
def test_impossible_plans_are_refused(wrong: dict[str, Any], reason: str) -> None:
    plan = from_json(CachePlan, GOOD)
    assert from_json(CachePlan, asdict(plan)) == plan
    with pytest.raises(UserError, match=reason):
        from_json(CachePlan, GOOD | wrong)


def test_plans_of_other_models_are_refused() -> None:
    plan = from_json(CachePlan, GOOD)
    plan.check(small("jit").config)
    with pytest.raises(UserError, match="starts at block 1 of 1"):
        plan.check(small("dit", depth=1).config)
    with pytest.raises(UserError, match="starts at block 2, which adds tokens"):
        plan.check(small("jit", context_start=2).config)
