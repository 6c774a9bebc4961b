"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): ε = ε_null + s (ε_class − ε_null)."""

from collections.abc import Callable

import torch
from torch import Tensor

from svdit.diffusion.samplers import Denoise


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null_class: int,
    scale: float,
    channels: int | None = 3,
    interval: tuple[int, int] | None = None,
) -> Denoise:
    """A denoiser for labels `y` (N,): one model call on 2N images, or on N where the scale is 1.

    As published, guidance acts on the first `channels` = 3 channels of ε and the rest are the conditional
    output's; None guides all of ε. The variance channels are never guided. Outside of `interval` (first and last
    timestep with guidance, inclusive; Kynkäänniemi et al., arXiv 2404.07724) the model is called on N images.
    """
    if scale == 1:
        return lambda x, t: model(x, t, y)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if interval and not interval[0] <= int(t[0]) <= interval[1]:  # a batch walks together
            return model(x, t, y)
        null = torch.full_like(y, null_class)
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        k = min(channels or x.shape[1], x.shape[1])
        eps = uncond[:, :k] + scale * (cond[:, :k] - uncond[:, :k])
        return torch.cat([eps, cond[:, k:]], dim=1)

    return denoise
