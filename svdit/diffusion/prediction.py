"""What a model's output means: the noise ε, the velocity v or the clean image x_0.

Each determines the others, because x_t = √ᾱ x_0 + √(1 − ᾱ) ε, DDPM (arXiv 2006.11239) eq. (4), and
v = √ᾱ ε − √(1 − ᾱ) x_0 (Salimans & Ho, arXiv 2202.00512, appendix D). Guidance is linear, so it acts on any of them.
Time is a timestep of the DDPM schedule. A model's `config.prediction` is a key of PREDICTIONS.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from svdit.diffusion.schedule import Schedule, at

Step = int | Tensor  # one sampling step for all images, or (N,)
Convert = Callable[[Tensor, Tensor, Schedule, Step], Tensor]


def q_sample(x0: Tensor, eps: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """x_t = √ᾱ x_0 + √(1 − ᾱ) ε, (N, C, H, W)."""
    signal, noise = coefficients(schedule, i, x0)
    return signal * x0 + noise * eps


def coefficients(schedule: Schedule, i: Step, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """√ᾱ and √(1 − ᾱ); floats, or (N, 1, 1, 1)."""
    return at(schedule.alphas_cumprod**0.5, i, like), at((1 - schedule.alphas_cumprod) ** 0.5, i, like)


def x0_from_eps(eps: Tensor, x: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """x_t/√ᾱ − √(1/ᾱ − 1) ε, (N, C, H, W)."""
    abar = schedule.alphas_cumprod
    return at((1 / abar) ** 0.5, i, x) * x - at((1 / abar - 1) ** 0.5, i, x) * eps


def eps_from_x0(x0: Tensor, x: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """(x_t − √ᾱ x_0)/√(1 − ᾱ), (N, C, H, W)."""
    signal, noise = coefficients(schedule, i, x)
    return (x - signal * x0) / noise


def x0_from_velocity(v: Tensor, x: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """√ᾱ x_t − √(1 − ᾱ) v, (N, C, H, W)."""
    signal, noise = coefficients(schedule, i, x)
    return signal * x - noise * v


def eps_from_velocity(v: Tensor, x: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """√(1 − ᾱ) x_t + √ᾱ v, (N, C, H, W)."""
    signal, noise = coefficients(schedule, i, x)
    return noise * x + signal * v


def velocity(x0: Tensor, eps: Tensor, schedule: Schedule, i: Step) -> Tensor:
    """v = √ᾱ ε − √(1 − ᾱ) x_0, (N, C, H, W)."""
    signal, noise = coefficients(schedule, i, x0)
    return signal * eps - noise * x0


@dataclass(frozen=True)
class Prediction:
    """`x0` and `eps` read an output at x_t: f(output, x_t, schedule, i); `target`(x_0, ε, schedule, i) is learned."""

    x0: Convert
    eps: Convert
    target: Convert


def first(value: Tensor, *_: object) -> Tensor:
    """The first argument, (N, C, H, W)."""
    return value


def second(_: Tensor, value: Tensor, *__: object) -> Tensor:
    """The second argument, (N, C, H, W)."""
    return value


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(x0_from_eps, first, target=second),
    "velocity": Prediction(x0_from_velocity, eps_from_velocity, target=velocity),
    "x0": Prediction(first, eps_from_x0, target=first),
}


def split_output(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A model's output (N, C or 2C, H, W): the prediction and the variance channels, None if it has none."""
    channels = x.shape[1]
    return output[:, :channels], (output[:, channels:] if output.shape[1] == 2 * channels else None)
