"""Samplers of flows against solutions in closed form, SciPy's Runge–Kutta and the published sampler's batch."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import relative
from families import FOLDER, MODELS, Published
from gaussian import exact
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import RK45
from torch import Tensor

from svdit.diffusion import dopri5 as adaptive
from svdit.diffusion.flow import SDE, FlowSchedule, flow_times
from svdit.diffusion.flow_samplers import FLOW_SAMPLERS, SDE_SAMPLERS
from svdit.diffusion.guidance import Interval, guided
from svdit.diffusion.ode import METHODS, slopes, step, velocity
from svdit.diffusion.paths import DIRECTIONS, FLOW_PREDICTIONS, PATHS, Path
from svdit.diffusion.samplers import Denoise
from svdit.diffusion.sde import FORMS, LAST_STEPS

MEAN, STD = 0.3, 0.5
DOUBLE = torch.float64


def no_noise() -> Tensor:
    raise AssertionError("an ODE sampler drew noise")


def gaussian(path: Path, prediction: str = "velocity") -> Denoise:
    """The best output for data N(MEAN, STD²), in the dtype of t."""

    def denoise(x: Tensor, t: Tensor, start: Tensor | None = None) -> Tensor:
        t = t.reshape(-1, 1, 1, 1) if t.ndim else t
        return exact(prediction, x.to(t.dtype), path, t, MEAN, STD)[0]

    return denoise


def solution(z: Tensor) -> Tensor:
    """Where the ODE of `gaussian` ends: on the linear path x_t = t·MEAN + √(t²·STD² + (1 − t)²)·z."""
    return MEAN + STD * z


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("heun3", 3), ("rk4", 4)])
@settings(max_examples=5)
@given(x=st.floats(1.5, 2.5))  # the leading error vanishes near x = 1
def test_methods_converge_with_their_order(name: str, order: int, x: float) -> None:
    errors = []
    for points in (21, 41):
        y = torch.full((1, 1, 1, 1), x, dtype=DOUBLE)
        for t, following in pairwise(torch.linspace(0, 1, points, dtype=DOUBLE)):
            y = step(METHODS[name], lambda y, t: -t.exp() * y**2, y, t, following)
        errors.append(abs(float(y) - 1 / (1 / x + math.e - 1)))
    assert order - 0.4 < math.log2(errors[0] / errors[1]) < order + 0.4


def test_adaptive_coefficients_are_scipys() -> None:
    np.testing.assert_allclose(adaptive.METHOD.nodes[:6], RK45.C)
    np.testing.assert_allclose(adaptive.METHOD.weights[:6], RK45.B)
    for row, expected in zip(adaptive.METHOD.rows[:6], RK45.A, strict=True):
        np.testing.assert_allclose([*row, *[0] * (5 - len(row))], expected)
    np.testing.assert_allclose(adaptive.ERROR, -2 / 3 * RK45.E)
    np.testing.assert_allclose(adaptive.MIDDLE, RK45.P @ 0.5 ** np.arange(1, 5), rtol=1e-5)


@given(share=st.floats(0.01, 1.0))
def test_the_end_within_a_step_is_scipys(share: float) -> None:
    x, k = torch.randn(8, 1, 1, 2, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)).split([1, 7])
    h = torch.tensor([0.3], dtype=DOUBLE)
    k[6] = k[0]  # any
    reached = x[0] + 0.3 * adaptive.combine(adaptive.METHOD.weights, list(k))
    ours = adaptive.within(torch.tensor([share], dtype=DOUBLE), x[0], reached, h, list(k))
    weights = torch.from_numpy(RK45.P @ share ** np.arange(1, 5))
    torch.testing.assert_close(ours, x[0] + 0.3 * adaptive.combine(weights.tolist(), list(k)), rtol=1e-5, atol=1e-5)


ADAPTIVE = [
    (name, key, scale)
    for name in MODELS
    for key, scale in (("ode_dopri5", 2.5), ("ode_dopri5_nocfg", 1.0))
    if key in np.load(FOLDER / f"{name}.npz")
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "key", "scale"), ADAPTIVE)
def test_a_batch_that_decides_together_equals_published(name: str, key: str, scale: float) -> None:
    published, times = Published(name), list[float]()
    denoise = guided(published.model, published["y_sample"], published.model.null_class, scale)

    def counted(x: Tensor, t: Tensor, start: Tensor | None = None) -> Tensor:
        times.append(float(t[0]))
        return denoise(x, t, start)

    schedule = FlowSchedule(flow_times(250, Path()))
    x = adaptive.dopri5(counted, published["z"], schedule, noise=no_noise, together=True)
    assert relative(x, published[key]) < 5e-4
    if f"t_calls_{key}" in published:
        # As many calls. Steps are as long as the error to the power of −1/5; that of the first ones, a thousandth long,
        # is mostly rounding, and a factor of 1.6 in it makes 10 %.
        np.testing.assert_allclose(times, published[f"t_calls_{key}"], rtol=0.1)


@pytest.mark.parametrize("time", DIRECTIONS)
@pytest.mark.parametrize("prediction", FLOW_PREDICTIONS)
def test_adaptive_steps_keep_their_tolerance(time: str, prediction: str) -> None:
    path, done = Path("linear", time), list[int]()
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = FlowSchedule(flow_times(11, path, prediction), path)
    x = FLOW_SAMPLERS["dopri5"](
        gaussian(path, prediction), z, schedule, noise=no_noise, prediction=prediction,
        callback=lambda count, _: done.append(count),
    )  # fmt: skip
    assert 0 < relative(x, solution(z)) < (0.05 if prediction == "x0" else 5e-3)  # its velocity is bounded at the end
    assert done == sorted(set(done)) and done[-1] == 10


def test_adaptive_sampling_of_nan_ends() -> None:
    x = FLOW_SAMPLERS["dopri5"](
        lambda x, t, start: x / (t < 0.5).float().reshape(-1, 1, 1, 1), torch.ones(2, 1, 2, 2),
        FlowSchedule(flow_times(2, Path())), noise=no_noise,
    )  # fmt: skip
    assert not x.isfinite().any()


@pytest.mark.parametrize("name", SDE_SAMPLERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("time", DIRECTIONS)
def test_every_diffusion_reaches_the_data_distribution(name: str, form: str, time: str) -> None:
    generator, path = torch.Generator().manual_seed(1), Path("gvp", time)
    z = torch.randn(64, 1, 8, 8, generator=generator)
    options = SDE(form, 0.5, "euler")
    schedule = FlowSchedule(flow_times(100, path, "epsilon", sde=options, eps=0.02), path, options)
    steps: list[int] = []
    x = FLOW_SAMPLERS[name](
        gaussian(path, "epsilon"), z, schedule, noise=lambda: torch.randn(z.shape, generator=generator),
        prediction="epsilon", callback=lambda done, _: steps.append(done),
    )  # fmt: skip
    assert steps == list(range(1, 101))
    assert abs(float(x.mean()) - MEAN) < 0.03
    assert abs(float(x.std()) - STD) < 0.04


@pytest.mark.parametrize("last", LAST_STEPS)
def test_the_last_step_draws_no_noise(last: str) -> None:
    path, options, z = Path(), SDE(last_step=last), torch.zeros(1, 1, 2, 2)
    draws = iter([torch.ones(1, 1, 2, 2)] * 9)
    schedule = FlowSchedule(flow_times(10, path, sde=options), path, options)
    FLOW_SAMPLERS["sde"](gaussian(path), z, schedule, noise=lambda: next(draws))
    assert next(draws, None) is None
    assert len(schedule) == (9 if last == "none" else 10)
    assert abs(float(schedule.times[-1]) - 1) < 1e-6


@given(points=st.integers(2, 300), shift=st.floats(0.1, 5))
def test_times_are_mirrored_in_the_other_direction(points: int, shift: float) -> None:
    for name in PATHS:
        times = flow_times(points, Path(name), shift=shift, dtype=DOUBLE)
        other = flow_times(points, Path(name, "data_to_noise"), shift=shift, dtype=DOUBLE)
        torch.testing.assert_close(times, 1 - other)
        assert all(a < b for a, b in pairwise(times.tolist()))


def test_intervals() -> None:
    t = torch.tensor([0.0, 0.1, 0.5, 1.0])
    assert Interval(0.1, 1).contains(t).tolist() == [False, True, True, True]  # type: ignore[union-attr]
    assert Interval(0.1, 1, strict=True).contains(t).tolist() == [False, False, True, False]  # type: ignore[union-attr]
    assert Interval(0, 1, strict=True).contains(t).tolist() == [True, True, True, False]  # type: ignore[union-attr]
    assert Interval(0.1, 0.5, by_step=True).contains(t[3], t[2])
    assert not Interval(0.1, 0.5).contains(t[3], t[2])


def test_every_image_is_guided_at_its_own_time() -> None:
    model = lambda x, t, y: x + y.reshape(-1, 1, 1, 1)  # noqa: E731
    x, y = torch.zeros(3, 1, 1, 1), torch.tensor([1, 1, 1])
    output = guided(model, y, 0, 3, None, Interval(0.2, 0.6))(x, torch.tensor([0.1, 0.4, 0.7], dtype=DOUBLE))
    assert output.flatten().tolist() == [1, 3, 1]


def test_slopes_reuse_the_first() -> None:
    calls: list[float] = []

    def f(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return x

    x, t = torch.ones(1, 1, 1, 1), torch.tensor(0.0)
    slopes(METHODS["heun"], f, x, t, t + 1, first=x)
    assert calls == [1.0]


GUIDED = re.compile(r"forward_cfg(4|15|67)(_all)?(?:_(start0125|nointerval)_(below|at|above))?")
SCALES = {"4": 4.0, "15": 1.5, "67": 6.7}
FORWARDS = [
    (name, *match.group(0, 1, 2, 3, 4))
    for name in MODELS
    if not name.startswith("dit")
    for key in np.load(FOLDER / f"{name}.npz")
    if (match := GUIDED.fullmatch(key))
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "key", "scale", "every", "interval", "where"), FORWARDS)
def test_guided_velocities_equal_published(
    name: str, key: str, scale: str, every: str | None, interval: str | None, where: str | None
) -> None:
    published = Published(name)
    bounds = Interval(0.125, 1) if interval == "start0125" else None
    times = published[f"cfg_t_{where}" if where else "cfg_t"]
    for i, t in enumerate(times):
        y = published["cfg_y"][i : i + 1]
        denoise = guided(published.model, y, published.model.null_class, SCALES[scale], None if every else 3, bounds)
        assert relative(denoise(published["cfg_x"][i : i + 1], t), published[key][i : i + 1]) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("jit")])
def test_guided_velocities_of_clean_images_equal_published(name: str) -> None:
    published, schedule = Published(name), FlowSchedule(torch.linspace(0, 1, 2))
    for i, t in enumerate(published["v_t"]):
        y = published["v_y"][i : i + 1]
        denoise = guided(published.model, y, published.model.null_class, 3.0, None, Interval(0.1, 1, strict=True))
        v = velocity(denoise, schedule, "x0", t)(published["v_z"][i : i + 1], t)
        assert relative(v, published["v_guided_cfg3"][i : i + 1]) < 2e-5


@torch.no_grad()
def test_sbdm_of_a_velocity_model_equals_published() -> None:
    """Published with a first time set by hand, since the diffusion is infinite at 0."""
    published, options = Published("sit/sit_learn_sigma"), SDE("SBDM")
    times = torch.cat([published["t_sde_sbdm_eps01_10"], torch.ones(1)])
    denoise = guided(published.model, published["y_sample"], published.model.null_class, 2.5)
    draws = iter(published["noise_10"])
    x = FLOW_SAMPLERS["sde"](denoise, published["z"], FlowSchedule(times, sde=options), noise=draws.__next__)
    assert relative(x, published["sde_sbdm_mean_eps01_10"]) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_every_step_equals_published(kind: str) -> None:
    published, path = Published("sit/sit_learn_sigma"), Path()
    options = SDE() if kind == "sde" else None
    denoise = guided(published.model, published["y_sample"], published.model.null_class, 2.5)
    schedule, draws, steps = FlowSchedule(flow_times(10, path, sde=options), path, options), published["noise_10"], []
    FLOW_SAMPLERS["sde" if options else "euler"](
        denoise, published["z"], schedule, noise=iter(draws).__next__, callback=lambda _, x: steps.append(x[:1])
    )
    expected = published["sde_sigma_mean_10_path" if options else "ode_euler_10_path"]
    assert relative(torch.stack(steps), expected[-len(steps) :]) < 2e-5
