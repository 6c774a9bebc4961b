"""Images to latents and back: an AutoencoderKL in diffusers' format, or the identity for models of pixels.

raw = mean + std·ε of the encoder's Gaussian. latents = 0.18215 · raw (the VAE's scaling factor), as for DiT, SiT and
REPA; or (raw − μ)/σ by channel, for models with latent statistics (LightningDiT, REPA-E). REPA-E trains with
√(σ² + 1e-4) and decodes with σ. Large batches are split to bound memory.
"""

import re
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from svdit.download import redacted
from svdit.errors import UserError
from svdit.extras import require
from svdit.model.config import DiTConfig
from svdit.model.vae import CONFIG, read
from svdit.storage.checksum import digest

REPOSITORIES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner and name on Hugging Face
SD_CHANNELS, VA_VAE_CHANNELS = 4, 32
TIMEOUT = 5.0  # seconds for an answer of Hugging Face
MAX_PIXELS = 8 * 256 * 256  # per call of the VAE
WORKERS = 8  # images at the same time on a CPU; one of 256 px needs 0.5 GB


@dataclass(frozen=True)
class Autoencoder:
    """`vae`: of vae.py or of diffusers, or None if the model works on pixels; `mean` and `std` are of raw latents.

    `decoder`: instead of the vae's where that is in fp32 on the CPU, raw latents (N, C, h, w) to images on all threads,
    without regard to the batch.
    """

    name: str
    vae: Any = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    decoder: Callable[[Tensor], Tensor] | None = None

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int | None:
        """Channels of the latents; None for pixels."""
        return None if self.vae is None else int(self.vae.config.latent_channels)

    @property
    def fingerprint(self) -> str:
        """A hash of the VAE's weights; empty for pixels."""
        if not isinstance(self.vae, nn.Module):
            return ""
        return digest({}, {name: tensor.cpu() for name, tensor in self.vae.state_dict().items()})[:16]

    def for_model(self, config: DiTConfig) -> "Autoencoder":
        """With the latent statistics of a model, which replace the scaling factor.

        Raises UserError where the published models of a family have statistics and this one has none.
        """
        normalized = config.family in ("repa", "lightningdit") or config.in_channels == VA_VAE_CHANNELS
        if self.vae is not None and normalized and config.in_channels != SD_CHANNELS and not config.latent_std:
            raise UserError(
                f"the model has no statistics of its {config.in_channels} latent channels, so they cannot be decoded; "
                "pass --latent-stats, with latents_stats.pt for example"
            )
        return replace(self, mean=config.latent_mean, std=config.latent_std) if config.latent_std else self

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] and ε ~ N(0, 1), (N, channels, H / factor, W / factor), to latents of ε's shape.

        Pixels are returned unchanged.
        """
        if self.vae is None:
            return x
        parts = self._map(lambda part: self.vae.encode(part).latent_dist, x, 1)
        mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
        return self.normalized(mean + std * noise.to(mean))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, channels, h, w) to images (N, C, H, W), clamped to [-1, 1]."""
        if self.vae is None:
            return z.clamp(-1, 1)
        raw = self.denormalized(z)
        if self.decoder is not None and (self.vae.device.type, self.vae.dtype) == ("cpu", torch.float32):
            return self.decoder(raw.to(self.vae.device, self.vae.dtype)).clamp_(-1, 1)
        return torch.cat(self._map(lambda part: self.vae.decode(part).sample, raw, self.factor)).clamp(-1, 1)

    def normalized(self, raw: Tensor) -> Tensor:
        """Latents of the VAE to those of the model, (N, C, h, w)."""
        if not self.std:
            return raw * self.vae.config.scaling_factor
        return (raw - per_channel(self.mean, raw)) / per_channel(self.std, raw)

    def denormalized(self, z: Tensor) -> Tensor:
        """Latents of the model to those of the VAE, (N, C, h, w)."""
        if not self.std:
            return z / self.vae.config.scaling_factor
        return z * per_channel(self.std, z) + per_channel(self.mean, z)

    def _map(self, function: Callable[[Tensor], Any], x: Tensor, factor: int) -> list[Any]:
        """`function` of parts of x (N, …), each part's factor² times as many pixels.

        On a CPU every image is a part and one thread's work, except for NNPACK's convolutions, so that rounding depends
        on the number of neither.
        """
        x = x.to(self.vae.device, self.vae.dtype)
        if self.vae.device.type == "cpu":
            return in_single_threads(function, torch.split(x, 1))
        return [function(part) for part in torch.split(x, max(1, MAX_PIXELS // (x[0, 0].numel() * factor**2)))]


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as (1, C, 1, 1), for `like` (N, C, h, w)."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def in_single_threads(function: Callable[[Tensor], Any], parts: Sequence[Tensor]) -> list[Any]:
    """`function` of each part (…), several at the same time, each on one thread."""
    threads = torch.get_num_threads()

    def single(part: Tensor) -> Any:
        torch.set_num_threads(1)  # of this thread
        with torch.no_grad():
            return function(part)

    with ThreadPoolExecutor(min(threads, len(parts), WORKERS)) as pool:
        results = list(pool.map(single, parts))
    torch.set_num_threads(threads)  # of threads that start later
    return results


PIXELS = Autoencoder("none")


def load_autoencoder(name: str, device: str | torch.device = "cpu") -> Autoencoder:
    """`name`: "ema" or "mse" (of Stable Diffusion, from Hugging Face), a folder saved by diffusers, a repository of
    Hugging Face, as "REPA-E/e2e-vavae-hf", or "none".

    Raises UserError for another name, an incomplete file, or without diffusers or a network.
    """
    if name == "none":
        return PIXELS
    download = name in REPOSITORIES or (not Path(name).exists() and REPOSITORY.fullmatch(name) is not None)
    if not download and not Path(name).is_dir():
        raise UserError(
            f"there is no autoencoder {name}; choose ema, mse, none, a folder saved by diffusers, or a repository of "
            "Hugging Face, REPA-E/e2e-vavae-hf for example"
        )
    source = REPOSITORIES.get(name, name)
    if (Path(source) / "model_index.json").is_file():  # a pipeline
        source = str(Path(source) / "vae")
    try:
        vae, missing = load(source, download)
    except (OSError, ValueError) as error:
        remedy = "save it again with diffusers"
        if download:
            remedy = f"download it elsewhere, `hf download {source} --local-dir vae`, and pass --vae ./vae"
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"cannot load the autoencoder {source} ({reason}); {remedy}") from None
    if missing:  # diffusers would continue with random weights
        raise UserError(f"the autoencoder {source} lacks {len(missing)} tensors, first {missing[0]}; download it again")
    return Autoencoder(name, vae.to(device).eval())


def autoencoder_for(
    config: DiTConfig,
    name: str = "auto",
    device: str | torch.device = "cpu",
    *,
    default: str = "mse",
    own: Path | None = None,
) -> Autoencoder:
    """That of `load_autoencoder` for a model; of "auto" `own`, or none in pixel space (1 or 3 channels), or `default`.

    Raises UserError for one of another space than the model's, and for "auto" where the latents are not Stable
    Diffusion's.
    """
    channels, pixels = config.in_channels, config.in_channels in (1, 3)
    if name == "auto":
        if own is None and not pixels and (channels != SD_CHANNELS or config.latent_std):
            raise UserError(
                f"the model has {channels} channels, which are latents of an unknown autoencoder; pass as vae the "
                "folder of one saved by diffusers, or a repository of Hugging Face, REPA-E/e2e-vavae-hf for example"
            )
        name = "none" if pixels else str(own or default)
    if pixels != (name == "none"):
        space, fit = ("pixels", "none") if pixels else ("latents", "ema or mse")
        raise UserError(f"the vae is {name}, but the model has {channels} channels ({space}); choose {fit}")
    return load_autoencoder(name, device)


def load(source: str, download: bool) -> tuple[Any, list[str]]:
    """The autoencoder and the names of missing tensors; by diffusers only where it must be, which takes seconds."""
    folder = cached(source) if download else Path(source)
    loaded: tuple[Any, list[str]] | None = read(folder) if folder else None
    if loaded is None:
        loaded = from_diffusers(source, download)
        if download and (folder := cached(source)):  # the same implementation as in the next run
            loaded = read(folder) or loaded
    return loaded


def cached(repository: str) -> Path | None:
    """The folder of a repository of Hugging Face that was downloaded before; None where there is none."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(repository, CONFIG)
    return Path(found).parent if isinstance(found, str) else None


def from_diffusers(source: str, download: bool) -> tuple[Any, list[str]]:
    """diffusers' AutoencoderKL and the names of missing tensors; the network is used only for files not cached."""
    load = require("diffusers").AutoencoderKL.from_pretrained
    options = {"low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        vae, info = load(source, local_files_only=True, **options)
    except OSError:
        if not download:
            raise
        check_reachable()
        vae, info = load(source, **options)
    return vae, info["missing_keys"]


def check_reachable() -> None:
    """Raises OSError at once if Hugging Face cannot be reached; its own client retries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # the client refuses at once
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT).close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(error, HTTPError) or isinstance(reason, ssl.SSLError):  # it answers
            return
        raise OSError(
            f"it is not in {constants.HF_HUB_CACHE}, and {redacted(constants.ENDPOINT)} is unreachable: {reason}"
        ) from None
