"""Samplers that integrate the SDE of a flow, dx = (v + w s) dt + √(2w) dW with the score s, as in SiT (eqs. 5 to 7).

Every diffusion w(t) ≥ 0 has the same distributions; the schedule's `sde` chooses it, and a last step without noise.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from svdit.diffusion.flow import FlowSchedule
from svdit.diffusion.ode import EULER, HEUN, Field, step
from svdit.diffusion.paths import FLOW_PREDICTIONS, Point, score_weight
from svdit.diffusion.samplers import Callback, Denoise, Noise, silent

# w(t, point, norm) of the time t from noise (0) to data (1)
FORMS: dict[str, Callable[[Tensor, Point, float], Tensor]] = {
    "sigma": lambda t, p, norm: norm * p.sigma,
    "linear": lambda t, p, norm: norm * (1 - t),
    "SBDM": lambda t, p, norm: norm * score_weight(p).abs(),
    "constant": lambda t, p, norm: norm * torch.ones_like(t),
    "decreasing": lambda t, p, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t, p, norm: norm * torch.sin(math.pi * t) ** 2,
}

# The last step of size h from x with drift d, velocity v and score s; "none" adds noise there as everywhere.
LAST_STEPS: dict[str, Callable[..., Tensor] | None] = {
    "mean": lambda x, h, d, v, s, p: x + h * d,
    "euler": lambda x, h, d, v, s, p: x + h * v,
    "tweedie": lambda x, h, d, v, s, p: (x + p.sigma**2 * s) / p.alpha,
    "none": None,
}


Read = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # images, their time → drift, velocity, score
Advance = Callable[[Field, Tensor, Tensor, Tensor, Tensor], Tensor]


def diffusion(schedule: FlowSchedule, t: Tensor) -> Tensor:
    """w at one time, or at times (S,)."""
    assert schedule.sde
    return FORMS[schedule.sde.form](schedule.path.forward(t), schedule.path.at(t), schedule.sde.norm)


def sde(
    advance: Advance,
    denoise: Denoise,
    x: Tensor,
    schedule: FlowSchedule,
    *,
    noise: Noise,
    prediction: str = "velocity",
    callback: Callback = silent,
) -> Tensor:
    """Integrate images (N, C, H, W) over the times of the schedule; one draw a step, none for the last step."""
    assert schedule.sde
    x, last_step = x.to(schedule.times.dtype), LAST_STEPS[schedule.sde.last_step]
    for done, (t, following) in enumerate(pairwise(schedule.times), 1):
        read, h = reader(denoise, schedule, prediction, t), following - t
        if last_step and done == len(schedule):
            x = last_step(x, h, *read(x, t), schedule.path.at(t))
        else:
            jump = (2 * diffusion(schedule, t) * h.abs()).sqrt() * noise()
            x = advance(lambda x, t, read=read: read(x, t)[0], x, t, following, jump)  # type: ignore[misc]
        callback(done, x)
    return x


def reader(denoise: Denoise, schedule: FlowSchedule, prediction: str, start: Tensor) -> Read:
    """Drift, velocity and score of images (N, C, H, W), within the step from `start`."""
    converts = FLOW_PREDICTIONS[prediction]

    def read(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, point = denoise(x.float(), t, start), schedule.path.at(t)
        v, score = converts.velocity(output, x, point), converts.score(output, x, point)
        return v + schedule.path.direction * diffusion(schedule, t) * score, v, score

    return read


def euler_maruyama(drift: Field, x: Tensor, t: Tensor, following: Tensor, jump: Tensor) -> Tensor:
    """Drift from the images before the noise, (N, C, H, W)."""
    return step(EULER, drift, x, t, following) + jump


def heun(drift: Field, x: Tensor, t: Tensor, following: Tensor, jump: Tensor) -> Tensor:
    """The trapezoidal rule from the images with the noise, (N, C, H, W)."""
    return step(HEUN, drift, x + jump, t, following)
