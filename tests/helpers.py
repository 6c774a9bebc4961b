"""Test data that several files share."""

import torch
from torch import Tensor


def hard_inputs(rows: int = 1024, features: int = 128, seed: int = 1) -> Tensor:
    """(rows, features) with a mean, correlations, and three channels thirty times the others."""
    fixed = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=fixed) / features**0.5
    mean = torch.randn(features, generator=fixed)
    scale = torch.randn(features, generator=fixed).mul(0.5).exp()
    scale[[3, 50, 100]] *= 30
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    return (x @ mix + 0.5 * x + mean) * scale


class Means:
    """A tiny network: a function of the means of 4 × 4 patches for each layer."""

    name, digest, comparable = "random", "means", False
    widths = {"pool": 48, "spatial": 48, "logits": 48}  # noqa: RUF012

    def to(self, device: torch.device) -> "Means":
        return self

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        means = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 4).flatten(1)
        return {"pool": means, "spatial": means**2, "logits": 5 * means}
