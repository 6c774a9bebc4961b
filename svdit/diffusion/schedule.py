"""The noise schedule of DiT, whole or respaced: q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I).

β rises linearly from 1e-4 to 0.02 over 1000 steps (Ho et al., arXiv 2006.11239). Sampling in S steps keeps ᾱ at S
of the 1000 timesteps and derives the betas between them (Nichol & Dhariwal, arXiv 2102.09672).
"""

import re
from dataclasses import dataclass
from itertools import accumulate, repeat

import torch
from torch import Tensor

from svdit.errors import UserError

TIMESTEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """S steps from least to most noise; every tensor (S,), float64 unless said otherwise."""

    timesteps: Tensor  # int64, what the model is told
    betas: Tensor
    alphas_cumprod: Tensor  # ᾱ

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def alphas_cumprod_prev(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @property
    def posterior_variance(self) -> Tensor:
        """β̃ of q(x_{t−1} | x_t, x_0), eq. (7) of DDPM; 0 at the first step."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance(self) -> Tensor:
        """log β̃, where the 0 of the first step is replaced by the second step's value."""
        variance = self.posterior_variance
        return torch.cat([variance[1:2], variance[1:]]).log() if len(self) > 1 else self.betas.log()


def linear_betas() -> Tensor:
    return torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)


def make_schedule(spacing: str | int = TIMESTEPS) -> Schedule:
    """`"250"`: 250 evenly spaced steps, both ends included; `"ddim50"`: every 20th; `"10,20"`: by sections."""
    timesteps = torch.tensor(spaced_timesteps(str(spacing)))
    alphas_cumprod = (1 - linear_betas()).cumprod(0)[timesteps]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return Schedule(timesteps, 1 - alphas_cumprod / previous, alphas_cumprod)


def spaced_timesteps(spacing: str) -> list[int]:
    """The timesteps of a spacing, ascending. Raises UserError for a spacing that 1000 timesteps do not have."""
    if match := re.fullmatch(r"ddim(\d{1,9})", spacing, re.ASCII):
        return _every_nth(int(match[1]))
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", spacing, re.ASCII):
        raise UserError(f"{spacing!r} is not a number of sampling steps; use 250, ddim50 or 10,20,30, for example")
    counts = [int(part) for part in spacing.split(",")]
    sizes = [TIMESTEPS // len(counts) + (i < TIMESTEPS % len(counts)) for i in range(len(counts))]
    timesteps: list[int] = []
    for count, size, start in zip(counts, sizes, accumulate([0, *sizes[:-1]]), strict=True):
        if count > size:
            raise UserError(f"{count} sampling steps do not fit into {size} timesteps; choose at most {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: rounding of exact halves must fall as in the published schedules.
        positions = accumulate(repeat(stride, count - 1), initial=0.0)
        timesteps += [start + round(position) for position in positions]
    return timesteps


def _every_nth(count: int) -> list[int]:
    """The first stride that yields `count` timesteps. Raises UserError if none does."""
    for stride in range(1, TIMESTEPS + 1):
        timesteps = list(range(0, TIMESTEPS, stride))
        if len(timesteps) == count:
            return timesteps
    raise UserError(
        f"no stride selects {count} of {TIMESTEPS} timesteps; choose a divisor of {TIMESTEPS}, or omit 'ddim'"
    )
