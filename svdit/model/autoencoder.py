"""Pictures to the space a DiT works in and back: Stable Diffusion's VAE through diffusers, or plain pixels.

latents = 0.18215 · (a sample of the encoder's Gaussian), as for the published DiT. Large batches are cut into pieces
of bounded memory. Nothing is trained here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.shims import allow_cpu_torchvision

REPOSITORIES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
PIXELS_AT_ONCE = 8 * 256 * 256


@dataclass(frozen=True)
class Autoencoder:
    """`vae` is diffusers' AutoencoderKL, or None where the model works on pixels."""

    name: str
    vae: Any = None

    @property
    def factor(self) -> int:
        """Pixels for one latent, along each side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int | None:
        """Channels of the latents; None for pixels, which can have any number."""
        return None if self.vae is None else int(self.vae.config.latent_channels)

    @torch.no_grad()
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(N, 3, H, W) in [-1, 1] to sampled latents (N, channels, H / factor, W / factor)."""
        if self.vae is None:
            return x
        pieces = [self.vae.encode(piece).latent_dist.sample(generator) for piece in self._pieces(x, 1)]
        return torch.cat(pieces) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents to pictures (N, C, H, W), clamped to [-1, 1]."""
        if self.vae is None:
            return z.clamp(-1, 1)
        z = z / self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(piece).sample for piece in self._pieces(z, self.factor)]).clamp(-1, 1)

    def _pieces(self, x: Tensor, factor: int) -> tuple[Tensor, ...]:
        pixels = x.shape[-2] * x.shape[-1] * factor**2
        return torch.split(x.to(self.vae.device, self.vae.dtype), max(1, PIXELS_AT_ONCE // pixels))


def load_autoencoder(name: str, device: str | torch.device = "cpu") -> Autoencoder:
    """`name`: "ema" or "mse" (of Stable Diffusion, fetched from Hugging Face), a folder of diffusers', or "none"."""
    if name == "none":
        return Autoencoder(name)
    if name not in REPOSITORIES and not Path(name).is_dir():
        raise UserError(f"there is no autoencoder {name}; choose ema, mse, none or a folder that diffusers saved")
    source = REPOSITORIES.get(name, name)
    try:
        vae, missing = from_diffusers(source, fetch=name in REPOSITORIES)
    except (OSError, ValueError) as error:
        remedy = "save it again with diffusers"
        if name in REPOSITORIES:
            remedy = f"fetch it where there is a network, `hf download {source} --local-dir vae`, and give --vae ./vae"
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"cannot load the autoencoder {source} ({reason}); {remedy}") from None
    if missing:  # diffusers would go on with random weights
        raise UserError(f"the autoencoder {source} lacks {len(missing)} tensors, {missing[0]} first; get a whole one")
    return Autoencoder(name, vae.to(device).eval())


def from_diffusers(source: str, fetch: bool) -> tuple[Any, list[str]]:
    """diffusers' AutoencoderKL and the tensors it did not find; the network is asked only for what is not here."""
    allow_cpu_torchvision()
    from diffusers import AutoencoderKL

    load: Any = AutoencoderKL.from_pretrained
    options = {"low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        vae, info = load(source, local_files_only=True, **options)
    except OSError:
        if not fetch:
            raise
        vae, info = load(source, **options)
    return vae, info["missing_keys"]
