"""Paths from noise to data, x_t = α x + σ ε, and what a flow model's output means at a point of one.

The paths are those of SiT (Ma et al., arXiv 2401.08740). Models trained with REPA count time the other way, from data
to noise; the formulas below hold in both directions, because α′, σ′ and v change sign together.
A model's `config.prediction` is a key of FLOW_PREDICTIONS, its `config.path` one of PATHS.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DIRECTIONS = {"noise_to_data": 1, "data_to_noise": -1}  # of a model's time
BETA_MIN, BETA_MAX = 0.1, 20.0  # of the VP path
LEAST_SIGMA = 0.05  # a clean image is divided by at least this (JiT, arXiv 2511.13720)


class Point(NamedTuple):
    """α, σ and their derivatives by t; each as t, or (N, 1, 1, 1)."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def linear(t: Tensor) -> Point:
    """α = t, σ = 1 − t; t of any shape, as (N, 1, 1, 1)."""
    one = torch.ones_like(t)
    return Point(t, 1 - t, one, -one)


def gvp(t: Tensor) -> Point:
    """α = sin πt/2, σ = cos πt/2; t of any shape, as (N, 1, 1, 1)."""
    alpha, sigma = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
    return Point(alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha)


def vp(t: Tensor) -> Point:
    """α = exp ℓ with ℓ = −¼(1−t)²(β₁−β₀) − ½(1−t)β₀, σ = √(1 − α²); t of any shape, as (N, 1, 1, 1)."""
    log_alpha = -0.25 * (1 - t) ** 2 * (BETA_MAX - BETA_MIN) - 0.5 * (1 - t) * BETA_MIN
    d_log_alpha = 0.5 * ((1 - t) * (BETA_MAX - BETA_MIN) + BETA_MIN)
    alpha, variance = log_alpha.exp(), (2 * log_alpha).exp()
    sigma = (1 - variance).sqrt()  # 1 − α·α rounds otherwise than the published code: 4e-5 near t = 1
    return Point(alpha, sigma, alpha * d_log_alpha, -variance * d_log_alpha / sigma)


PATHS: dict[str, Callable[[Tensor], Point]] = {"linear": linear, "gvp": gvp, "vp": vp}


@dataclass(frozen=True)
class Path:
    """A path in a model's own time: `name` is a key of PATHS, `time` one of DIRECTIONS."""

    name: str = "linear"
    time: str = "noise_to_data"

    @property
    def direction(self) -> int:
        """1 where time runs from noise to data, −1 where it runs from data to noise."""
        return DIRECTIONS[self.time]

    def forward(self, t: Tensor) -> Tensor:
        """The time from noise (0) to data (1) for a model's time, and the reverse; t of any shape, as (N,)."""
        return t if self.direction > 0 else 1 - t

    def at(self, t: Tensor) -> Point:
        """The coefficients at times t, a number or (N, 1, 1, 1)."""
        point = PATHS[self.name](self.forward(t))
        return point._replace(d_alpha=self.direction * point.d_alpha, d_sigma=self.direction * point.d_sigma)


def interpolate(x0: Tensor, eps: Tensor, p: Point) -> Tensor:
    """x_t = α x + σ ε, (N, C, H, W)."""
    return p.alpha * x0 + p.sigma * eps


def velocity(x0: Tensor, eps: Tensor, p: Point) -> Tensor:
    """dx_t/dt = α′ x + σ′ ε, (N, C, H, W)."""
    return p.d_alpha * x0 + p.d_sigma * eps


def velocity_from_x0(x0: Tensor, x: Tensor, p: Point) -> Tensor:
    """α′ x + σ′ ε with ε = (x_t − α x)/σ, σ at least LEAST_SIGMA; on the linear path (x − x_t)/(1 − t). (N, C, H, W)"""
    return ((p.d_alpha * p.sigma - p.alpha * p.d_sigma) * x0 + p.d_sigma * x) / p.sigma.clamp(min=LEAST_SIGMA)


def velocity_from_score(score: Tensor, x: Tensor, p: Point) -> Tensor:
    """(α′/α) x_t + g s with `score_weight` g, (N, C, H, W)."""
    return p.d_alpha / p.alpha * x + score_weight(p) * score


def score_weight(p: Point) -> Tensor:
    """g = (α′/α)σ² − σσ′, as p.alpha: a number or (N, 1, 1, 1)."""
    return p.d_alpha / p.alpha * p.sigma**2 - p.sigma * p.d_sigma


def score_from_velocity(v: Tensor, x: Tensor, p: Point) -> Tensor:
    """s = ∇ log p_t(x_t) = (r v − x_t)/(σ² − r σ′σ) with r = α/α′, (N, C, H, W)."""
    ratio = p.alpha / p.d_alpha
    return (ratio * v - x) / (p.sigma**2 - ratio * p.d_sigma * p.sigma)


Convert = Callable[[Tensor, Tensor, Point], Tensor]


@dataclass(frozen=True)
class FlowPrediction:
    """`velocity` and `score` read an output at x_t: f(output, x_t, point); `target`(x_0, ε, point) is learned."""

    velocity: Convert
    score: Convert
    target: Convert


FLOW_PREDICTIONS: dict[str, FlowPrediction] = {
    "velocity": FlowPrediction(lambda v, x, p: v, score_from_velocity, target=velocity),
    "epsilon": FlowPrediction(
        lambda eps, x, p: velocity_from_score(-eps / p.sigma, x, p),
        lambda eps, x, p: -eps / p.sigma,
        target=lambda x0, eps, p: eps,
    ),
    "score": FlowPrediction(velocity_from_score, lambda s, x, p: s, target=lambda x0, eps, p: -eps / p.sigma),
    "x0": FlowPrediction(
        velocity_from_x0,
        lambda x0, x, p: (p.alpha * x0 - x) / p.sigma**2,
        target=lambda x0, eps, p: x0,
    ),
}
