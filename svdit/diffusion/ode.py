"""Samplers that integrate a flow's ODE, dx/dt = v(x, t): Runge–Kutta methods on a fixed grid of times.

They have the signature of `svdit.diffusion.samplers` with a `FlowSchedule`, and draw no noise. `denoise(x, t, start)`
also receives the first time of the step, by which some families decide where guidance applies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from svdit.diffusion.flow import FlowSchedule
from svdit.diffusion.paths import FLOW_PREDICTIONS
from svdit.diffusion.samplers import Callback, Denoise, Noise, silent

Field = Callable[[Tensor, Tensor], Tensor]  # images (N, C, H, W) and their time, or times (N,), to a slope


@dataclass(frozen=True)
class RungeKutta:
    """Slope k_i is taken at t + nodes_i h and x + h Σ_j rows_ij k_j; the step ends at x + h Σ_i weights_i k_i."""

    nodes: Sequence[float]
    rows: Sequence[Sequence[float]]
    weights: Sequence[float]


EULER = RungeKutta((0,), ((),), (1,))
HEUN = RungeKutta((0, 1), ((), (1,)), (1 / 2, 1 / 2))  # the trapezoidal rule, torchdiffeq's heun2
METHODS: dict[str, RungeKutta] = {
    "euler": EULER,
    "midpoint": RungeKutta((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": HEUN,
    "heun3": RungeKutta((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "rk4": RungeKutta(  # the 3/8 rule, as torchdiffeq's
        (0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
    ),
}


def ode(
    method: RungeKutta,
    denoise: Denoise,
    x: Tensor,
    schedule: FlowSchedule,
    *,
    noise: Noise,
    prediction: str = "velocity",
    callback: Callback = silent,
) -> Tensor:
    """Integrate images (N, C, H, W) over the times of the schedule."""
    x = x.to(schedule.times.dtype)
    for done, (t, following) in enumerate(pairwise(schedule.times), 1):
        last = schedule.last_euler and done == len(schedule)
        v = velocity(denoise, schedule, prediction, t)
        x = step(EULER if last else method, v, x, t, following)
        callback(done, x)
    return x


def velocity(denoise: Denoise, schedule: FlowSchedule, prediction: str, start: Tensor | None) -> Field:
    """v(x, t) of images (N, C, H, W) within the step from `start`."""
    read = FLOW_PREDICTIONS[prediction].velocity
    return lambda x, t: read(denoise(x.float(), t, start), x, schedule.path.at(column(t, x)))


def step(method: RungeKutta, f: Field, x: Tensor, t: Tensor, following: Tensor) -> Tensor:
    """Images (N, C, H, W) at the following time."""
    return x + column(following - t, x) * combine(method.weights, slopes(method, f, x, t, following))


def slopes(
    method: RungeKutta, f: Field, x: Tensor, t: Tensor, following: Tensor, first: Tensor | None = None
) -> list[Tensor]:
    """The k_i, (N, C, H, W) each; `first` is k_0 where it is known."""
    h, k = following - t, [f(x, t) if first is None else first]
    for node, row in zip(method.nodes[1:], method.rows[1:], strict=True):
        k.append(f(x + column(h, x) * combine(row, k), t + node * h))
    return k


def combine(weights: Sequence[float], k: Sequence[Tensor]) -> Tensor:
    """Σ_i weights_i k_i, (N, C, H, W)."""
    terms = [weight * slope for weight, slope in zip(weights, k, strict=True) if weight]
    return sum(terms[1:], terms[0])


def column(t: Tensor, x: Tensor) -> Tensor:
    """Times (N,) as (N, 1, 1, 1) with the dtype of images x; one time as it is."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t
