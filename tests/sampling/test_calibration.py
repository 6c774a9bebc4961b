"""Calibration along the trajectories of every family."""

import pytest
import torch
from families import small
from torch import Tensor, nn

from svdit.diffusion.flow_samplers import FLOW_SAMPLERS
from svdit.diffusion.guidance import guided
from svdit.diffusion.paths import DIRECTIONS
from svdit.diffusion.samplers import SAMPLERS
from svdit.errors import UserError
from svdit.model.config import FAMILIES
from svdit.model.zoo import DiT_models, config_for
from svdit.sampling.batch import default_sampling
from svdit.sampling.calibration import calibration_loop, calibration_sampling, calibration_size, show_conditions


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_shown_its_own_times_and_both_halves(family: str) -> None:
    model = small(family, depth=2)
    times, classes, ticks = set[float](), set[int](), list[tuple[int, int]]()

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        times.update(inputs[1].tolist())
        classes.update(inputs[2].tolist())

    model.register_forward_hook(record)
    calibration_loop(images=8, steps=6, cfg_scale=2.0, progress=lambda *tick: ticks.append(tick))(model)
    assert model.null_class in classes and len(classes) > 2
    schedule = calibration_sampling(model.config, 6, 2.0).schedule(model.config)
    visited = getattr(schedule, "times", torch.empty(0))[:-1].float() if model.config.is_flow else schedule.timesteps  # type: ignore[union-attr]
    assert times == set(visited.tolist())
    assert ticks[-1] == (2 * len(schedule), 2 * len(schedule))
    assert [done for done, _ in ticks] == list(range(1, 2 * len(schedule) + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_cover_the_times_of_the_model(family: str) -> None:
    model, seen = small(family, depth=2), list[Tensor]()
    model.t_embedder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    show_conditions(model, 0, 200)
    slowest = seen[0][:, 127]  # cosine of t/10000: falls with t
    assert (slowest > 0.9999).all() == model.config.is_flow
    if model.config.is_flow:
        t = seen[0][:, 0].acos()  # cosine of t
        assert t.min() < 0.05 and t.max() > 0.95 and abs(float(t.mean()) - 0.5) < 0.1


def test_settings() -> None:
    jit, dit = small("jit").config, small("dit").config
    assert calibration_sampling(dit, 1, 1.5).sampler == "ddim"
    published = {"cfg_scale": 3.0, "cfg_interval": (0.1, 1.0)}
    assert calibration_sampling(jit, 9, 3.0) == default_sampling(jit, steps="9", **published)
    for family in FAMILIES:
        config = small(family).config
        assert len(calibration_sampling(config, 1, 1.5).schedule(config)) in (2, 3)
        assert (config.time in DIRECTIONS) == config.is_flow


@pytest.mark.parametrize(
    ("name", "scale"),
    [("DiT-XL/2", 1.5), ("SiT-B/2", 1.5), ("REPA-XL/2", 1.8), ("LightningDiT-XL/1", 6.7), ("JiT-L/16", 2.4),
     ("JiT-L/32", 2.5), ("SiT-digits", 1.5)],
)  # fmt: skip
def test_guidance_is_that_of_the_familys_protocol(name: str, scale: float) -> None:
    sampling = calibration_sampling(config_for(name), 10)
    assert sampling.cfg_scale == scale
    intervals = {"REPA": (0.0, 0.7), "LightningDiT": (0.125, 1.0), "JiT": (0.1, 1.0)}
    assert sampling.cfg_interval == intervals.get(name.split("-")[0])


@pytest.mark.parametrize(
    ("name", "tokens"), [("DiT-XL/2", 8), ("SiT-XL/2", 8), ("REPA-XL/2", 6.5), ("LightningDiT-XL/1", 5.333)]
)
def test_tokens_a_feature_are_those_that_are_documented(name: str, tokens: float) -> None:
    """Of a guided batch, by a model that costs nothing."""
    with torch.device("meta"):
        model = DiT_models[name]()
    (images, steps), config, rows = calibration_size(model), model.config, list[int]()

    def evaluate(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows.append(len(x))
        return x if config.is_flow else torch.cat([x, x], 1)

    sampling = calibration_sampling(config, steps)
    denoise = guided(
        evaluate, torch.tensor([1]), config.num_classes, sampling.scale(config), sampling.cfg_channels,
        sampling.interval(config),
    )  # fmt: skip
    x = torch.ones(1, config.in_channels, config.input_size, config.input_size)
    sampler = (SAMPLERS | FLOW_SAMPLERS)[sampling.sampler]
    sampler(denoise, x, sampling.schedule(config), noise=lambda: x, prediction=config.prediction)
    each = (config.input_size // config.patch_size) ** 2
    assert images * sum(rows) * each / config.mlp_width == pytest.approx(tokens, abs=1e-3)


def test_the_widest_layer_decides_the_size() -> None:
    narrow, wide = (small("jit", mlp_hidden=width) for width in (192, 1 << 14))
    assert calibration_size(narrow)[0] < calibration_size(wide)[0]


def test_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="samples from a DiT, not a Linear"):
        calibration_loop(images=1, steps=1)(nn.Linear(1, 1))
