"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): output = null + s (conditional − null)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdit.diffusion.samplers import Denoise

Time = int | Tensor  # of all images, or (N,)


@dataclass(frozen=True)
class Interval:
    """The times with guidance (Kynkäänniemi et al., arXiv 2404.07724), compared in the type of the sampler's times.

    `strict` excludes both ends, but not a low of 0 (JiT). `by_step`: the first time of a step decides for all calls in
    it (REPA), where other samplers decide at every call.
    """

    low: float
    high: float
    strict: bool = False
    by_step: bool = False

    def contains(self, t: Time, start: Time | None = None) -> bool | Tensor:
        """Whether guidance applies at t, in the step from `start`; for times (N,) each."""
        if self.by_step and start is not None:
            t = start
        if self.strict:
            return (t < self.high) & ((t > self.low) | (self.low == 0))
        return (t >= self.low) & (t <= self.high)


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null_class: int,
    scale: float,
    channels: int | None = 3,
    interval: Interval | None = None,
) -> Denoise:
    """A denoiser for labels `y` (N,): one model call on 2N images, or on N where guidance does not apply.

    As published, guidance acts on the first `channels` = 3 channels of the prediction; the others are conditional.
    None guides the whole prediction. The variance channels are never guided. The denoiser is called with images, their
    time or times (N,), and optionally the first time of the sampling step.
    """
    null = torch.full_like(y, null_class)

    def denoise(x: Tensor, t: Time, start: Time | None = None) -> Tensor:
        times, inside = spread(t, y), interval.contains(t, start) if interval else True
        if scale == 1 or not _any(inside):
            return model(x, times, y)
        both = model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null]))
        conditional, unconditional = both.chunk(2)
        k = min(channels or x.shape[1], x.shape[1])
        mixed = unconditional[:, :k] + scale * (conditional[:, :k] - unconditional[:, :k])
        if isinstance(inside, Tensor) and inside.ndim:
            mixed = torch.where(inside.reshape(-1, 1, 1, 1), mixed, conditional[:, :k])
        return torch.cat([mixed, conditional[:, k:]], dim=1)

    return denoise


def spread(t: Time, y: Tensor) -> Tensor:
    """The model's times (N,) for labels y (N,): integers as they are, others in float32."""
    if isinstance(t, Tensor):
        return t.to(y.device, torch.float32).expand(y.shape)
    return torch.full(y.shape, t, dtype=torch.float32, device=y.device)


def _any(inside: bool | Tensor) -> bool:
    return bool(inside.any()) if isinstance(inside, Tensor) else inside
