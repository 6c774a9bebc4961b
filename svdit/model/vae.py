"""The autoencoder of Stable Diffusion (Rombach et al., arXiv 2112.10752) under diffusers' parameter names.

It is diffusers' AutoencoderKL with the blocks that the published autoencoders of DiT, SiT and REPA-E have; `read`
returns None for others. Importing diffusers takes longer than decoding an image. On a CPU, 3×3 convolutions run as
Winograd products (Lavin and Gray, arXiv 1509.09308) of NNPACK, which is part of torch: 2 to 3× faster than direct
ones, with a relative error of 5e-6, and independent of the number of threads.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.fields import from_json
from svdit.shims import WithoutNormal
from svdit.storage.filetype import check_regular

EPS = 1e-6  # of all norms
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


@dataclass(frozen=True)
class VAEConfig:
    """The fields of diffusers' config.json that change what is computed, with its defaults."""

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True


class Gaussian(NamedTuple):
    """What the encoder predicts for raw latents, (N, C, h, w) each."""

    mean: Tensor
    std: Tensor


class Encoded(NamedTuple):
    """The result of `VAE.encode`, as of diffusers."""

    latent_dist: Gaussian


class Decoded(NamedTuple):
    """The result of `VAE.decode`, as of diffusers."""

    sample: Tensor


class Conv3(nn.Conv2d):
    """A 3×3 convolution that keeps the size, (N, I, h, w) to (N, O, h, w)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Conv2d has
        if winograd(input):
            return torch._nnpack_spatial_convolution(input, self.weight, self.bias, (1, 1))
        return super().forward(input)


def winograd(x: Tensor) -> bool:
    """Whether NNPACK can convolve x (N, C, h, w): N > 0 floats on a CPU it has kernels for, without gradients."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and len(x) > 0 and not torch.is_grad_enabled()
    has = hasattr(torch, "_nnpack_available") and hasattr(torch, "_nnpack_spatial_convolution")  # neither is documented
    return plain and has and bool(torch._nnpack_available())  # which initializes it


def start_threads() -> None:
    """Create NNPACK's threads, as many as torch has now: images share them, on whose number no result depends."""
    x = torch.zeros(1, 1, 8, 8, device="cpu")
    if winograd(x):
        torch._nnpack_spatial_convolution(x, x[:, :, :3, :3].contiguous(), None, (1, 1))


class Resnet(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (N, I, h, w) to (N, O, h, w)."""

    def __init__(self, channels: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels, EPS), Conv3(channels, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, EPS), Conv3(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(channels, outputs, 1) if channels != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))  # new buffers are mapped and cleared by the system
        return self.conv2(F.silu(self.norm2(h), inplace=True)).add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention with one head over all positions of x (N, C, h, w), added to x."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)                             # (N, h·w, C)
        q, k, v = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))  # (N, 1, h·w, C) each
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])                  # (N, h·w, C)
        return x + y.transpose(1, 2).view(x.shape)                                         # (N, C, h, w)
    # fmt: on


class Middle(nn.Module):
    """The blocks at the lowest resolution, (N, C, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))
        attentions = [Attention(channels, groups)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """(N, C, h, w) to (N, C, h/2, w/2), with padding at the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(N, C, h, w) to (N, C, 2h, 2w)"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The blocks of one resolution, (N, I, h, w) to (N, O, h, w), then `samplers`, if any, under the name `kind`."""

    def __init__(self, channels: int, outputs: int, count: int, groups: int, kind: str, samplers: list[nn.Module]):
        super().__init__()
        inputs = [channels, *[outputs] * (count - 1)]
        self.resnets = nn.ModuleList(Resnet(size, outputs, groups) for size in inputs)
        if samplers:
            self.add_module(kind, nn.ModuleList(samplers))

    def forward(self, x: Tensor) -> Tensor:
        for layers in self.children():
            for layer in layers.children():
                x = layer(x)
        return x


class Encoder(nn.Module):
    """Images (N, 3, H, W) to mean and log variance of latents, (N, 2C, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        sizes, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv3(config.in_channels, sizes[0])
        self.down_blocks = nn.ModuleList()
        for i, (size, outputs) in enumerate(zip((sizes[0], *sizes), sizes, strict=False)):
            samplers: list[nn.Module] = [Downsample(outputs)] if i < len(sizes) - 1 else []
            self.down_blocks.append(Stage(size, outputs, config.layers_per_block, groups, "downsamplers", samplers))
        self.mid_block = Middle(config)
        self.conv_norm_out = nn.GroupNorm(groups, sizes[-1], EPS)
        self.conv_out = Conv3(sizes[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (N, C, h, w) to images (N, 3, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        sizes, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv3(config.latent_channels, sizes[0])
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList()
        for i, (size, outputs) in enumerate(zip((sizes[0], *sizes), sizes, strict=False)):
            samplers: list[nn.Module] = [Upsample(outputs)] if i < len(sizes) - 1 else []
            self.up_blocks.append(Stage(size, outputs, config.layers_per_block + 1, groups, "upsamplers", samplers))
        self.conv_norm_out = nn.GroupNorm(groups, sizes[-1], EPS)
        self.conv_out = Conv3(sizes[-1], config.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Images in [-1, 1] to raw latents and back, with the interface of diffusers' AutoencoderKL."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        C = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if config.use_post_quant_conv else nn.Identity()

    @property
    def device(self) -> torch.device:
        """Of all parameters."""
        return self.decoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of all parameters."""
        return self.decoder.conv_in.weight.dtype

    def encode(self, x: Tensor) -> Encoded:
        """(N, 3, H, W) to the distribution of the latents (N, C, h, w)."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Encoded(Gaussian(mean, torch.exp(0.5 * log_variance.clamp(-30, 20))))

    def decode(self, z: Tensor) -> Decoded:
        """Latents (N, C, h, w) to images (N, 3, H, W)."""
        return Decoded(self.decoder(self.post_quant_conv(z)))


@torch.no_grad()
def read(folder: Path) -> tuple[VAE, list[str]] | None:
    """The autoencoder in a folder of diffusers, its tensors mapped from the file, and the names of missing tensors.

    None for other files and other blocks. Raises OSError and ValueError for what cannot be read.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return None
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not supported(content):
        return None
    try:
        config = from_json(VAEConfig, {f.name: content[f.name] for f in fields(VAEConfig) if f.name in content})
        with torch.device("meta"), WithoutNormal():
            vae = VAE(config)
        tensors = weights(folder / WEIGHTS)
        missing = [name for name in vae.state_dict() if name not in tensors]
        vae.load_state_dict(tensors, strict=False, assign=True)
        start_threads()
    except (ArithmeticError, RuntimeError, SafetensorError, TypeError, UserError) as error:
        raise ValueError(shorten(str(error), 300)) from None
    return vae.requires_grad_(False), missing


def supported(content: Mapping[str, Any]) -> bool:
    """Whether the blocks in a config.json are those of this module."""
    sizes = content.get("block_out_channels", (64,))
    plain = content.get("_class_name") == "AutoencoderKL" and content.get("act_fn", "silu") == "silu"
    return plain and all(list(content.get(key, [block])) == [block] * len(sizes) for key, block in BLOCKS.items())


def weights(path: Path) -> dict[str, Tensor]:
    """The tensors (…) of a .safetensors file in float32, mapped where they are stored so, under their present names."""
    check_regular(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    return {".".join(OLD_NAMES.get(part, part) for part in name.split(".")): x for name, x in tensors.items()}
