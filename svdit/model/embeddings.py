"""The inputs of the blocks: embeddings of patches, positions, timesteps and classes."""

import math

import torch
from torch import Tensor, nn

from svdit.model.config import DiTConfig


class PatchEmbed(nn.Module):
    """(N, C, H, W) images to (N, T, D) tokens in the weights' type, one for each P × P patch, row by row."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class BottleneckPatchEmbed(nn.Module):
    """The same through a few channels (JiT): raw patches are high-dimensional, natural images are not."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        P = config.patch_size
        self.proj1 = nn.Conv2d(config.in_channels, config.bottleneck, P, P, bias=False)
        self.proj2 = nn.Conv2d(config.bottleneck, config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x.to(self.proj1.weight.dtype))).flatten(2).transpose(1, 2)


def sinusoids(t: Tensor, frequencies: int = 128) -> Tensor:
    """(N,) timesteps to (N, 2·frequencies): cosines, then sines, with frequencies from 1 down to 1e-4."""
    exponents = torch.arange(frequencies, dtype=torch.float32, device=t.device) / frequencies
    angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """Sinusoids (N, 256) of the timesteps to (N, D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, waves: Tensor) -> Tensor:
        return self.mlp(waves)


class LabelEmbedder(nn.Module):
    """(N,) class labels to (N, D); row `num_classes`, if any, is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int, has_null_class: bool = True) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + has_null_class, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def position_embedding(hidden_size: int, side: int) -> Tensor:
    """Fixed sine-cosine embedding of a side × side grid, (1, T, D): a quarter each of sin x, cos x, sin y, cos y."""
    if torch.get_default_device().type == "meta":  # while a file is loaded; torch would import its compiler to compute
        return torch.empty(1, side * side, hidden_size, device="meta")
    quarter = torch.arange(hidden_size // 4, dtype=torch.float64)  # device: the default
    frequencies = 10000.0 ** -(quarter / (hidden_size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # device: the same
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns = axis.repeat(side, 1)
    rows = axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]


def rotation(head: int, side: int, others: int = 0) -> Tensor:
    """Cosines and sines, (2, others + T, head), that turn the channels of a head by a token's place (RoPE, 2104.09864).

    The first half turns with the row of a side × side grid, the second with the column, in pairs of neighbours with
    frequencies from 1 down to almost 1e-4. The `others`, tokens in front of the grid, are not turned.
    """
    steps = torch.arange(0, head // 2, 2, device="cpu").float() / (head // 2)  # no buffer of a file: never on meta
    angles = torch.arange(side, device="cpu").float()[:, None] / 10000**steps
    axis = angles.repeat_interleave(2, dim=1)  # (side, head/2)
    grid = torch.cat([axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)], dim=1)
    angles = torch.cat([torch.zeros(others, head, device="cpu"), grid])
    return torch.stack([angles.cos(), angles.sin()])
