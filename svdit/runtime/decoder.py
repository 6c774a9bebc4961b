"""The decoder of `model/vae.py` on the C kernels: the same layers, with pixels before channels.

A layer runs on all threads, one image after the other, and an image depends neither on their number nor on the batch.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from svdit.kernels.cpu import choice, ffi
from svdit.kernels.cpu.images import Affine, Workspace, convolve, group_norm, project
from svdit.model import autoencoder
from svdit.model.autoencoder import Autoencoder
from svdit.model.vae import VAE, Attention, Resnet

FASTER = ("amx", "avx512bf16", "avx512vnni", "avxvnni", "avx2")  # instruction sets measured against torch's NNPACK
QUERIES = 1024  # of attention at a time


def load_autoencoder(name: str, device: str | torch.device = "cpu") -> Autoencoder:
    """`name`: "ema" or "mse" (of Stable Diffusion, from Hugging Face), a folder saved by diffusers, a repository of
    Hugging Face, as "REPA-E/e2e-vavae-hf", or "none".

    Raises UserError for another name, an incomplete file, or without diffusers or a network.
    """
    return with_kernels(autoencoder.load_autoencoder(name, device))


def with_kernels(encoder: Autoencoder) -> Autoencoder:
    """The autoencoder with a decoder on the C kernels where they are faster, else as it is."""
    vae = encoder.vae
    plain = isinstance(vae, VAE) and vae.device.type == "cpu" and vae.dtype == torch.float32
    if not plain or ffi.missing() or choice.choice().linears not in FASTER:
        return encoder
    return replace(encoder, decoder=Decoder(vae, choice.kernels()))


class Decoder:
    """Latents (N, C, h, w) to images (N, 3, H, W), as `VAE.decode`."""

    def __init__(self, vae: VAE, kernels: ffi.Kernels) -> None:
        self.vae, self.kernels = vae, kernels

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        N, _, h, w = z.shape
        sizes, factor = self.vae.config.block_out_channels, 2 ** (len(self.vae.config.block_out_channels) - 1)
        images = torch.empty(N, self.vae.config.out_channels, h * factor, w * factor, dtype=z.dtype, device="cpu")
        # The largest image between layers: of a resolution, the channels of the next lower one before they are halved.
        floats = max(h * w * factor**2 * size >> 2 * max(0, i - 1) for i, size in enumerate(sizes))
        layers = Layers(Workspace(self.kernels, floats))
        for image, latents in zip(images, z.permute(0, 2, 3, 1).contiguous(), strict=True):
            image.copy_(layers.decoded(self.vae, latents).permute(2, 0, 1))
        return images


class Layers:
    """The layers, on one image x (H, W, C) after the other. It is in the buffer `now`, if in any; `next` is free."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.kernels = workspace, workspace.kernels
        self.now, self.next = "first", "second"

    def decoded(self, vae: VAE, z: Tensor) -> Tensor:
        """Latents (h, w, C) to an image (H, W, 3)."""
        decoder: Any = vae.decoder
        x = self.convolved(self.projected(z, vae.post_quant_conv), decoder.conv_in)
        x = self.resnet(x, decoder.mid_block.resnets[0])
        for attention in decoder.mid_block.attentions:
            x = self.attention(x, attention)
        x = self.resnet(x, decoder.mid_block.resnets[1])
        for stage in decoder.up_blocks:
            for block in stage.resnets:
                x = self.resnet(x, block)
            for sampler in getattr(stage, "upsamplers", ()):
                x = self.convolved(x, sampler.conv, enlarge=True)
        return self.convolved(x, decoder.conv_out, norm=self.norm(x, decoder.conv_norm_out))

    def norm(self, x: Tensor, norm: nn.GroupNorm) -> Affine:
        """That of x (H, W, C)."""
        return group_norm(x, norm.num_groups, norm.weight, norm.bias, self.kernels)

    def convolved(self, x: Tensor, conv: nn.Conv2d, norm: Affine | None = None, enlarge: bool = False) -> Tensor:
        """x (h, w, I) to (H, W, O), in the other buffer."""
        H, W = x.shape[0] << enlarge, x.shape[1] << enlarge
        out = self.workspace.take(self.next, H, W, conv.out_channels)
        self.now, self.next = self.next, self.now
        return convolve(x, conv.weight, conv.bias, self.workspace, out, norm=norm, enlarge=enlarge)

    def projected(self, x: Tensor, conv: Any, out: Tensor | None = None) -> Tensor:
        """A 1×1 convolution of x (H, W, I), or x where it is the identity."""
        if isinstance(conv, nn.Identity):
            return x
        return project(x, conv.weight.flatten(1), conv.bias, self.kernels, out)

    def resnet(self, x: Tensor, block: Resnet) -> Tensor:
        """x (H, W, I) to (H, W, O); in x's own memory where the block has no shortcut."""
        H, W, O = *x.shape[:2], block.conv1.out_channels
        out, conv = x, block.conv1
        if isinstance(block.conv_shortcut, nn.Conv2d):
            out = self.projected(x, block.conv_shortcut, self.workspace.take(self.next, H, W, O))
            self.now, self.next = self.next, self.now
        h = self.workspace.take("between", H, W, O)
        convolve(x, conv.weight, conv.bias, self.workspace, h, norm=self.norm(x, block.norm1))
        conv, norm = block.conv2, self.norm(h, block.norm2)
        return convolve(h, conv.weight, conv.bias, self.workspace, out, norm=norm, residual=out)

    def attention(self, x: Tensor, layer: Attention) -> Tensor:
        """Self-attention with one head over all pixels of x (H, W, C), added to x."""
        scale, shift = self.norm(x, layer.group_norm)
        tokens = (x * scale + shift).flatten(0, 1)  # (T, C)
        q, k, v = (
            project(tokens, part.weight, part.bias, self.kernels) for part in (layer.to_q, layer.to_k, layer.to_v)
        )
        q, v, y = q * q.shape[1] ** -0.5, v.t().contiguous(), torch.empty_like(tokens)
        for part, out in zip(torch.split(q, QUERIES), torch.split(y, QUERIES), strict=True):
            project(torch.softmax(project(part, k, None, self.kernels), -1), v, None, self.kernels, out)
        last: Any = layer.to_out[0]
        return x.add_(project(y, last.weight, last.bias, self.kernels).view(x.shape))
