"""`generate` for every family, against the published samplers from recorded noise; and images without their batch.

The names of the recorded arrays have the settings they were run with: families.md lists them.
"""

import re
from copy import deepcopy
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative
from families import FOLDER, MODELS, NAMES, Published, small
from torch import Tensor, nn

from svdit.diffusion.flow import FlowSchedule, flow_times
from svdit.diffusion.flow_samplers import FLOW_SAMPLERS
from svdit.diffusion.noise import image_noise
from svdit.diffusion.samplers import SAMPLERS
from svdit.errors import UserError
from svdit.model.config import FAMILIES, DiTConfig
from svdit.model.dit import DiT
from svdit.sampling.batch import SamplingConfig, default_sampling, generate
from svdit.sampling.config import SCRIPTS

Settings = tuple[dict[str, Any], dict[str, Any]]  # fields of DiTConfig that differ, and of SamplingConfig
LASTS = {"mean": {}, "none": {"last_step": "none"}, "tweedie": {"last_step": "tweedie"}}
LASTS |= {"eulerlast": {"last_step": "euler"}, "mean01": {"last_step_size": 0.1}, "norm05": {"sde_norm": 0.5}}
FORMS = {"incdec": "increasing-decreasing", "sbdm": "SBDM"}
DECIMALS = {"0": 0.0, "1": 1.0, "01": 0.1, "025": 0.25, "03": 0.3, "07": 0.7, "08": 0.8}


def sit(key: str) -> Settings | None:
    match = re.fullmatch(r"(gvp_|vp_|noise_|score_)?(ode|sde)_([a-z0-9]+)(?:_([a-z0-9]+))?_(\d+)(_all|_nocfg)?", key)
    if not match:
        return None
    kind, ode, first, second, steps, end = match.groups()
    if second and second.startswith("eps"):
        return None
    model = {"gvp_": {"path": "gvp"}, "vp_": {"path": "vp"}, "noise_": {"prediction": "epsilon"}}.get(kind or "", {})
    model |= {"prediction": "score"} if kind == "score_" else {}
    fields: dict[str, Any] = {"steps": steps, "cfg_scale": 1.0 if end == "_nocfg" else 2.5}
    fields["cfg_channels"] = None if end == "_all" else 3
    if ode == "ode":
        return model, fields | {"sampler": {"heun2": "heun"}.get(first, first)}
    fields |= {"sampler": "sde-heun" if second == "heun" else "sde", "sde_form": FORMS.get(first, first)}
    return model, fields | LASTS.get(second, {})


def repa(key: str) -> Settings | None:
    match = re.fullmatch(r"(ode_euler|ode_heun|sde)_(\d+)_cfg(\d+)(?:_(\d+)_(\d+))?(_cosine)?", key)
    if not match:
        return None
    kind, steps, scale, low, high, cosine = match.groups()
    fields = {"sampler": kind.removeprefix("ode_"), "steps": steps, "cfg_scale": {"1": 1.0, "18": 1.8}[scale]}
    fields["cfg_interval"] = (DECIMALS[low], DECIMALS[high]) if low else (0.0, 1.0)
    return ({"path": "gvp"} if cosine else {}), fields


def lightningdit(key: str) -> Settings | None:
    match = re.fullmatch(r"ode_(euler|heun2)_(\d+)(_noshift)?(_nointerval)?(_nocfg|_cfg\d+)?(_start01)?", key)
    if not match:
        return None
    method, steps, noshift, nointerval, cfg, start = match.groups()
    fields: dict[str, Any] = {"sampler": method.removesuffix("2"), "steps": steps}
    fields |= {"time_shift": 1.0} if noshift else {}
    fields |= {"cfg_interval": None} if nointerval else {}
    fields |= {"cfg_interval": (0.1, 1.0)} if start else {}
    fields |= {"cfg_scale": 1.0 if cfg == "_nocfg" else float(cfg.removeprefix("_cfg"))} if cfg else {}
    return {}, fields


def jit(key: str) -> Settings | None:
    match = re.fullmatch(r"(heun|euler)_(\d+)_cfg(\d+)(_low0|_\d+_\d+)?(_scale2)?", key)
    if not match:
        return None
    method, steps, scale, interval, doubled = match.groups()
    bounds = {None: (0.1, 1.0), "_low0": (0.0, 1.0)}
    low, high = bounds[interval] if interval in bounds else map(DECIMALS.__getitem__, (interval or "")[1:].split("_"))
    fields = {"sampler": method, "steps": steps, "cfg_scale": {"22": 2.2}.get(scale, float(scale))}
    return ({"noise_scale": 2.0} if doubled else {}), fields | {"cfg_interval": (low, high)}


READERS = {"sit": sit, "repa": repa, "lightningdit": lightningdit, "jit": jit}
RUNS = [
    (name, key)
    for name in MODELS
    for key in np.load(FOLDER / f"{name}.npz")
    if READERS[{"repae": "repa"}.get(folder := name.split("/")[0], folder)](key)
]
EPS = 0.1  # of the recorded runs of noise and score predictions


class Counted:
    """A model that records its times, and whether guidance doubled the batch."""

    def __init__(self, model: DiT, images: int) -> None:
        self.times, self.doubled, self.images = list[float](), list[bool](), images
        model.register_forward_hook(self.record)

    def record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.times.append(float(inputs[1][0]))
        self.doubled.append(len(inputs[0]) == 2 * self.images)


@pytest.mark.parametrize(("name", "key"), RUNS)
def test_images_equal_published(name: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(name)
    settings = READERS[published.config.family](key)
    assert settings
    model = published.model
    model.config = replace(model.config, **settings[0])
    if model.config.prediction in ("epsilon", "score"):
        monkeypatch.setitem(flow_times.__kwdefaults__, "eps", EPS)
    config = default_sampling(model.config, **settings[1])
    start, steps = published["noise" if "noise" in published else "z"], settings[1]["steps"]
    draws = iter(published[f"noise_{steps}"]) if config.sampler.startswith("sde") else iter(())
    calls, steps_of_first = Counted(model, len(start)), [start[:1]]
    x = generate(
        model,
        published["y_sample"],
        config,
        noise=chain([start], draws).__next__,
        callback=lambda _, x: steps_of_first.append(x[:1].clone()),
    )
    assert relative(x, published[key]) < 2e-5
    assert (x.dtype, next(draws, None)) == (torch.float32, None)
    assert len(steps_of_first) == len(config.schedule(model.config)) + 1
    if f"{key}_path" in published:
        path = published[f"{key}_path"]  # of an ODE's grid points, the start included, or of steps
        ours = steps_of_first if len(path) == len(steps_of_first) else steps_of_first[1:]
        assert relative(torch.cat(ours), path.reshape(-1, *start.shape[1:])) < 2e-5
    for kind, ours in (("t_calls", calls.times), ("guided", calls.doubled)):
        if f"{kind}_{key}" in published:
            np.testing.assert_allclose(np.array(ours, float), published[f"{kind}_{key}"].double(), rtol=1e-7)


def grids() -> list[tuple[str, str, str, dict[str, str], dict[str, str]]]:
    """Recorded times: file, array, family, fields of DiTConfig and of SamplingConfig."""
    found = list[tuple[str, str, str, dict[str, str], dict[str, str]]]()
    for name in NAMES:
        for key in np.load(FOLDER / f"{name}.npz"):
            match = re.fullmatch(r"t_(?:(vp_)?(ode|sde)_)?(\d+)", key)
            if match and (family := name.split("/")[0]) in ("sit", "lightningdit", "jit"):
                sampler = {"ode": "euler", "sde": "sde", None: "heun"}[match[2]]
                path = {"path": "vp"} if match[1] else {}
                found.append((name, key, family, path, {"sampler": sampler, "steps": match[3]}))
    return found


@pytest.mark.parametrize(("name", "key", "family", "path", "fields"), grids())
def test_times_equal_published(name: str, key: str, family: str, path: dict[str, str], fields: dict[str, str]) -> None:
    model = DiTConfig(family=family, **{**FAMILIES[family], **path})  # type: ignore[arg-type]
    schedule = default_sampling(model, **fields).schedule(model)
    assert isinstance(schedule, FlowSchedule)
    expected = np.load(FOLDER / f"{name}.npz")[key]
    np.testing.assert_array_equal(schedule.times.numpy()[: len(expected)], expected)
    assert len(schedule) == len(expected) - (fields["sampler"] != "sde")


def decisions() -> list[tuple[str, str, dict[str, Any]]]:
    """Recorded decisions about the published grids: file, array, and fields of SamplingConfig."""
    found = list[tuple[str, str, dict[str, Any]]]()
    for name in NAMES:
        for key in np.load(FOLDER / f"{name}.npz"):
            if match := re.fullmatch(r"guided_(sde|ode)_(\d+)", key):
                fields: dict[str, Any] = {"sampler": {"sde": "sde", "ode": "euler"}[match[1]], "steps": match[2]}
                found.append((name, key, fields | {"cfg_interval": (0.0, 0.7)}))
            elif match := re.fullmatch(r"guided_ode_(\d+)_start(\d+)", key):
                start = {"0125": 0.125, "01": 0.1}[match[2]]
                found.append((name, key, {"steps": match[1], "cfg_interval": (start, 1.0)}))
            elif match := re.fullmatch(r"guided_(\d+)_01_1", key):
                found.append((name, key, {"sampler": "euler", "steps": match[1], "cfg_interval": (0.1, 1.0)}))
    return found


@pytest.mark.parametrize(("name", "key", "fields"), decisions())
def test_guided_calls_equal_published(name: str, key: str, fields: dict[str, Any]) -> None:
    """Of REPA t = 0.7 is guided, of JiT t = 0.1 is not; both lie on a grid."""
    model = small(name.split("/")[0], depth=2)
    calls = Counted(model, 1)
    generate(model, [1], default_sampling(model.config, cfg_scale=1.8, **fields))
    recorded = np.load(FOLDER / f"{name}.npz")
    assert calls.doubled == recorded[key].astype(bool).tolist()
    if (times := key.replace("guided", "t_calls")) in recorded:
        np.testing.assert_allclose(calls.times, recorded[times], rtol=1e-7)


@pytest.mark.parametrize(
    ("family", "fields", "guided", "of"),
    [
        ("repa", {"sampler": "heun", "steps": "10", "cfg_interval": (0.0, 0.7), "cfg_scale": 1.0}, 0, 19),
        ("repa", {"sampler": "heun", "steps": "10", "cfg_scale": 0.5}, 0, 19),
        ("jit", {"cfg_interval": (0.1, 1.0)}, 88, 99),
        ("jit", {"cfg_interval": (0.0, 1.0)}, 99, 99),
    ],
)
def test_number_of_guided_calls(family: str, fields: dict[str, Any], guided: int, of: int) -> None:
    model = small(family, depth=2)
    calls = Counted(model, 1)
    generate(model, [1], default_sampling(model.config, **{"cfg_scale": 1.8, **fields}))
    assert (sum(calls.doubled), len(calls.doubled)) == (guided, of)


def test_second_calls_of_heun_are_at_the_next_time() -> None:
    """To the last bit: it decides whether guidance applies there."""
    model = small("lightningdit", depth=2)
    calls, config = Counted(model, 1), default_sampling(model.config, sampler="heun", steps="60", cfg_scale=1.0)
    generate(model, [1], config)
    times = config.schedule(model.config).times.tolist()  # type: ignore[union-attr]
    assert calls.times == [t for step in pairwise(times) for t in step]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampler", [*SAMPLERS, *FLOW_SAMPLERS])
def test_images_do_not_depend_on_their_batch(family: str, sampler: str) -> None:
    model = small(family, depth=2)
    if (sampler in SAMPLERS) != (family == "dit"):
        with pytest.raises(UserError, match=rf"the sampler .* is not for models of the family {family}; choose one of"):
            generate(model, [1], SamplingConfig(sampler))
        return
    interval = (200, 900) if family == "dit" else (0.2, 0.9)
    config = SamplingConfig(sampler, "6", 2.0, cfg_interval=interval)
    device = torch.device("cpu")
    alone, pair = (
        generate(model, [1 + i for i in indices], config, noise=image_noise(0, indices, model.input_shape, device))
        for indices in ([1], [0, 1])
    )
    # dopri5 measures errors that are close to float32's rounding: its first steps differ by percents
    assert relative(alone[0], pair[1]) < (2e-3 if sampler == "dopri5" else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_other_float_types_are_sampled(family: str) -> None:
    model = small(family, depth=2)
    config = default_sampling(model.config, steps="5", cfg_scale=1.5)
    expected = generate(model, [1, 2], config)
    for dtype, least, most in ((torch.bfloat16, 1e-4, 0.02), (torch.float64, 0, 1e-5)):
        images = generate(deepcopy(model).to(dtype), [1, 2], config)
        assert images.dtype == torch.float32
        assert least < relative(images, expected) < most


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "dit"])
def test_other_predictions_and_paths_are_sampled(family: str) -> None:
    for fields in ({"path": "vp"}, {"path": "gvp", "prediction": "score"}, {"prediction": "epsilon"}):
        model = small(family, depth=2, **fields)
        for sampler in ("heun", "dopri5", "sde"):
            assert generate(model, [1], SamplingConfig(sampler, "5", 1.5)).isfinite().all()


def test_defaults_are_those_of_the_scripts() -> None:
    model = small("jit", depth=2)
    default = default_sampling(model.config)
    assert (default.sampler, default.steps, default.cfg_scale) == ("heun", "50", 1.0)
    assert torch.equal(generate(model, [1], seed=1), generate(model, [1], default, seed=1))
    assert default_sampling(model.config, steps="7", cfg_scale=3.0) == replace(default, steps="7", cfg_scale=3.0)
    assert default_sampling(DiTConfig()) == SamplingConfig()
    assert set(SCRIPTS) == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "fields", "options", "message"),
    [
        ("sit", {}, {"sde_form": "SBDM"}, "the SDE form SBDM is infinite at the first time of this model; choose one"),
        ("repa", {}, {"sampler": "sde", "sde_form": "SBDM"}, "the SDE form SBDM is infinite"),
        ("jit", {"noise_scale": 2.0}, {"sampler": "sde"}, "standard deviation 1, but this model's is 2; choose an ODE"),
        ("repa", {"path": "gvp"}, {"sampler": "sde-heun", "last_step": "none"}, "at the data, where the score of this"),
        (
            "jit",
            {},
            {"sampler": "sde-heun", "last_step": "none"},
            "at the data, .* infinite; choose the sampler sde, or",
        ),
        ("lightningdit", {}, {"sampler": "ddpm"}, "the sampler ddpm is not for models of the family lightningdit"),
        ("dit", {}, {"sampler": "sde", "time_shift": 3.0}, "the sampler sde is not for models of the family dit"),
        ("sit", {}, {"sampler": "euler", "steps": "1"}, "euler needs more than 1 sampling step; choose at least 2"),
        ("repa", {}, {"sampler": "sde", "steps": "1"}, "sde needs more than 1 sampling step"),
        ("jit", {}, {"cfg_interval": (0.985, 0.99)}, "cfg_interval is 0.985 to 0.99, without a time of the 50 sampl"),
        ("jit", {}, {"sampler": "ddim"}, "the sampler ddim is not for models of the family jit; choose one of euler, "),
        ("dit", {}, {"sampler": "heun"}, "the sampler heun is not for models of the family dit; choose one of ddpm, "),
    ],
)
def test_what_cannot_be_sampled(family: str, fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model = small(family, depth=2, **fields)
    with pytest.raises(UserError, match=message):
        generate(model, [1], default_sampling(model.config, **options))
