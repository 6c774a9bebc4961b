"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): output = null + s (conditional − null)."""

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
    """A denoiser for labels `y` (N,): one model call on 2N images, or on N if the scale is 1.

    As published, guidance acts on the first `channels` = 3 channels of the prediction; the others are conditional.
    None guides the whole prediction. The variance channels are never guided. Outside of `interval` (first and last
    guided timestep, inclusive; Kynkäänniemi et al., arXiv 2404.07724) the model is called on N images.
    """
    null = torch.full_like(y, null_class)

    def denoise(x: Tensor, t: int) -> Tensor:
        times = torch.full(y.shape, t, device=y.device)
        if scale == 1 or (interval and not interval[0] <= t <= interval[1]):
            return model(x, times, y)
        both = model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null]))
        conditional, unconditional = both.chunk(2)
        k = min(channels or x.shape[1], x.shape[1])
        mixed = unconditional[:, :k] + scale * (conditional[:, :k] - unconditional[:, :k])
        return torch.cat([mixed, conditional[:, k:]], dim=1)

    return denoise
