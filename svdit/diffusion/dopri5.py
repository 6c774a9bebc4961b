"""Dormand & Prince's adaptive method of order 5, as torchdiffeq has it: tolerances, first step, control, last step.

There the batch decides on a step together, so an image of SiT's published sampler depends on its batch. Here every
image has steps of its own, as in a batch of one; `together` is the published rule.
"""

import math

import torch
from torch import Tensor

from svdit.diffusion.flow import FlowSchedule
from svdit.diffusion.ode import Field, RungeKutta, column, combine, slopes, velocity
from svdit.diffusion.samplers import Callback, Denoise, Noise, silent

ATOL, RTOL = 1e-6, 1e-3
LEAST_STEP = 1e-5  # accepted whatever its error, so that sampling ends
METHOD = RungeKutta(
    (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
)
ERROR = tuple(  # order 5 less order 4; torchdiffeq has 2/3 of the usual estimate
    2 / 3 * weight for weight in (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
)
MIDDLE = (  # of a step (Shampine, Math. Comp. 46, 1986)
    *(6025192743 / 60171106304, 0, 51252292925 / 130801643616, -2691868925 / 90257204736),
    *(187940372067 / 3189069020672, -1776094331 / 39487288512, 11237099 / 470086768),
)


def dopri5(
    denoise: Denoise,
    x: Tensor,
    schedule: FlowSchedule,
    *,
    noise: Noise,
    prediction: str = "velocity",
    callback: Callback = silent,
    together: bool = False,
) -> Tensor:
    """Integrate images (N, C, H, W) from the first to the last time; `callback` counts the times that all passed."""
    x, done = x.to(schedule.times.dtype), 0
    f = velocity(denoise, schedule, prediction, None)
    begin, end = schedule.times[[0, -1]].double().tolist()
    direction = math.copysign(1, end - begin)
    t = torch.full((len(x),), begin, dtype=torch.float64, device=x.device)
    k = f(x, t)
    h = direction * first_step(f, x, t, k, direction, together)
    while done < len(schedule):
        if prediction != "velocity":  # others determine no velocity behind the last time
            h = torch.where(h.abs() > (end - t).abs(), end - t, h)
        stages = slopes(METHOD, f, x, t, t + h, k)
        reached = x + column(h, x) * combine(METHOD.weights, stages)
        error = rms(column(h, x) * combine(ERROR, stages), torch.maximum(x.abs(), reached.abs()), together)
        accepted = (direction * (end - t) > 0) & (~(error > 1) | (h.abs() <= LEAST_STEP))
        share = ((end - t) / h).clamp(max=1)  # the last step ends behind the last time
        advanced = torch.where(column(share, x) < 1, within(share, x, reached, h, stages), reached)
        chosen = column(accepted, x) > 0
        x, k = torch.where(chosen, advanced, x), torch.where(chosen, stages[-1], k)
        t, h = torch.where(accepted, t + h, t), h * growth(error)
        passed = int(len(schedule) * min(1.0, float(((t - begin) / (end - begin)).nan_to_num(1).min())))
        if passed > done:
            done = passed
            callback(done, x)
    return x


def within(share: Tensor, x: Tensor, reached: Tensor, h: Tensor, k: list[Tensor]) -> Tensor:
    """Images (N, C, H, W) after a share (N,) of a step: the quartic through both ends, their slopes and the middle."""
    s, h = column(share, x), column(h, x)
    middle = x + h * combine(MIDDLE, k)
    first, last = h * k[0], h * k[-1]
    quartic = 2 * (last - first) - 8 * (reached + x) + 16 * middle
    cubic = 5 * first - 3 * last + 18 * x + 14 * reached - 32 * middle
    square = last - 4 * first - 11 * x - 5 * reached + 16 * middle
    return x + s * (first + s * (square + s * (cubic + s * quartic)))


def first_step(f: Field, x: Tensor, t: Tensor, k: Tensor, direction: float, together: bool) -> Tensor:
    """The size (N,) of the first step for images (N, C, H, W) with slope k: Hairer, Solving ODEs I, II.4."""
    d0, d1 = rms(x, x.abs(), together), rms(k, x.abs(), together)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    following = t + direction * h0
    d2 = rms(f(x + column(following - t, x) * k, following) - k, x.abs(), together) / h0
    largest = torch.maximum(d1, d2)
    h1 = torch.where(largest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / largest) ** (1 / 5))
    return torch.minimum(100 * h0, h1)


def rms(error: Tensor, size: Tensor, together: bool) -> Tensor:
    """The root mean square (N,) of errors over what images of this size (N, C, H, W) tolerate."""
    squares = (error / (ATOL + RTOL * size)).double().square().flatten(1).mean(1)
    return (squares.mean().expand_as(squares) if together else squares).sqrt()


def growth(error: Tensor) -> Tensor:
    """The factor of the next step, 0.2 to 10, and at least 1 after an accepted one; (N,)."""
    return torch.maximum(0.9 * error ** (-1 / 5), torch.where(error < 1, 1.0, 0.2)).clamp(max=10)
