"""The times at which a flow is sampled, and the settings of its SDE.

A `FlowSchedule` is to flow samplers what a `Schedule` is to those of DDPM. Times are the model's own and run from noise
to data; images have their dtype while they are sampled: float64 as REPA's sampler has it, else float32.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from svdit.diffusion.paths import Path

EPS = 1e-3  # distance from the ends of a path at which a model's output determines no velocity


@dataclass(frozen=True)
class SDE:
    """The form of w(t) in dx = (v + w s) dt + √(2w) dW and a factor of it; the last step. Keys of FORMS, LAST_STEPS."""

    form: str = "sigma"
    norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04


@dataclass(frozen=True)
class FlowSchedule:
    """S steps between S + 1 times."""

    times: Tensor  # (S + 1,), on the CPU: they decide where guidance applies
    path: Path = field(default_factory=Path)
    sde: SDE | None = None
    last_euler: bool = False  # of an ODE: the last step, whatever the method

    def __len__(self) -> int:
        return len(self.times) - 1


def flow_times(
    points: int,
    path: Path,
    prediction: str = "velocity",
    *,
    sde: SDE | None = None,
    shift: float = 1.0,
    dtype: torch.dtype = torch.float32,
    eps: float = EPS,
) -> Tensor:
    """`points` evenly spaced times; an SDE's last step adds one. (S + 1,)

    `shift` a makes t' = a t/(1 + (a − 1) t) of a time t from noise (0) to data (1), as LightningDiT does.
    """
    near_noise, near_data = margins(path.name, prediction, sde, eps)
    if path.direction > 0:
        times = torch.linspace(near_noise, 1 - near_data, points, dtype=dtype, device="cpu")
    else:
        times = torch.linspace(1 - near_noise, near_data, points, dtype=dtype, device="cpu")
    if shift != 1:
        t = path.forward(times)
        times = path.forward(shift * t / (1 + (shift - 1) * t))
    if sde and sde.last_step != "none":
        times = torch.cat([times, path.forward(torch.ones(1, dtype=dtype, device="cpu"))])
    return times


def margins(path: str, prediction: str, sde: SDE | None, eps: float) -> tuple[float, float]:
    """How far the first time is from noise, and the last evenly spaced one from data, as in SiT."""
    if path != "vp" and prediction in ("velocity", "x0"):
        eps = 0.0
    with_last_step = sde is not None and sde.last_step != "none"
    return (0.0 if path == "vp" else eps), (sde.last_step_size if sde and with_last_step else eps)
