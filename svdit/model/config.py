"""The configuration of a model: its shape, its blocks, and what family it belongs to.

A family is a set of conventions: what the model predicts, how its time runs, how its images are sampled and stored. It
is part of the configuration because a checkpoint's tensors do not show it: a SiT has the names and shapes of a DiT.
"""

from dataclasses import dataclass
from typing import Any, Literal

from svdit.errors import UserError
from svdit.fields import check_types

Prediction = Literal["epsilon", "velocity", "x0", "score"]

# Each family's defaults. Sources: DiT 2212.09748, SiT 2401.08740, REPA 2410.06940 and REPA-E 2504.10483, LightningDiT
# 2501.01423, JiT 2511.13720.
FLOW = {"prediction": "velocity", "time": "noise_to_data", "path": "linear"}
SWIGLU = {"norm": "rms", "mlp": "swiglu", "rope": True, "learn_sigma": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "dit": {},
    "sit": FLOW,
    "repa": {**FLOW, "time": "data_to_noise", "learn_sigma": False, "uint8": "truncate"},
    "lightningdit": {**FLOW, **SWIGLU},
    "jit": {**FLOW, **SWIGLU, "prediction": "x0", "qk_norm": "rms", "uint8": "half_even"},
}


@dataclass(frozen=True)
class DiTConfig:
    """All fields have the defaults of DiT-XL/2; `FAMILIES` has those of the others."""

    input_size: int = 32  # side of the square input, in latents or pixels
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True  # the output has twice the channels; DiT learns its variance there, others ignore it
    prediction: Prediction = "epsilon"  # svdit.diffusion defines them
    has_null_class: bool = True  # false after training without label dropout: such a model cannot be guided
    family: Literal["dit", "sit", "repa", "lightningdit", "jit"] = "dit"
    time: Literal["timesteps", "noise_to_data", "data_to_noise"] = "timesteps"  # 0 … 999 of DDPM, or 0 to 1
    path: Literal["ddpm", "linear", "gvp", "vp"] = "ddpm"
    noise_scale: float = 1.0  # standard deviation of the noise
    uint8: Literal["half_up", "truncate", "half_even"] = "half_up"  # how images become grey levels
    latent_mean: tuple[float, ...] = ()  # of each channel: the autoencoder's latent is std · x + mean
    latent_std: tuple[float, ...] = ()  # empty: the autoencoder's own scaling factor
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_hidden: int = 0  # hidden width of the MLP, for example padded; 0: from `mlp_ratio`
    qk_norm: Literal["none", "layer", "rms"] = "none"
    rope: bool = False  # queries and keys are rotated by their positions
    shift: bool = True  # false: the blocks are modulated by scales alone
    bottleneck: int = 0  # channels between the two layers of the patch embedding; 0: one layer
    context_tokens: int = 0  # of the class, in front of the patches from block `context_start` on
    context_start: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for fields of other types, sizes that do not divide, and conventions that do not fit."""
        check_types(self)
        for value, by, what in (
            (self.input_size, self.patch_size, "input_size {} by patch_size {}"),
            (self.hidden_size, self.num_heads, "hidden_size {} by num_heads {}"),
            (self.hidden_size, 4, "hidden_size {} by {} (sines and cosines of two axes)"),
        ):
            if by < 1 or value < by or value % by:
                raise UserError(f"cannot divide {what.format(value, by)}; choose a multiple")
        if min(self.depth, self.in_channels, self.num_classes, self.mlp_width) < 1:
            raise UserError(f"{self} has a size below 1; choose larger depth, in_channels, num_classes and mlp_ratio")
        self._check_parts()
        self._check_conventions()

    def _check_parts(self) -> None:
        head = self.hidden_size // self.num_heads
        if self.rope and head % 4:
            raise UserError(
                f"rope rotates pairs along two axes, but a head has {head} channels; choose a multiple of 4"
            )
        if min(self.bottleneck, self.context_tokens, self.mlp_hidden) < 0:
            raise UserError(
                f"bottleneck is {self.bottleneck}, context_tokens {self.context_tokens} and mlp_hidden "
                f"{self.mlp_hidden}; choose 0 or more"
            )
        if not 0 <= self.context_start < self.depth:
            raise UserError(f"context_start is {self.context_start}; choose a block from 0 to {self.depth - 1}")

    def _check_conventions(self) -> None:
        time = FAMILIES[self.family].get("time", "timesteps")
        if self.time != time:
            raise UserError(f"time is {self.time!r}, but family {self.family!r} has {time!r}; choose that")
        if self.is_flow == (self.path == "ddpm") or (self.prediction == "score" and not self.is_flow):
            raise UserError(
                f"a {self.family} with path {self.path!r} and prediction {self.prediction!r} does not exist; choose "
                f"{'linear, gvp or vp' if self.is_flow else 'ddpm with epsilon, velocity or x0'}"
            )
        if len(self.latent_mean) != len(self.latent_std) or len(self.latent_std) not in (0, self.in_channels):
            raise UserError(
                f"latent_mean has {len(self.latent_mean)} values and latent_std {len(self.latent_std)}; pass one for "
                f"each of the {self.in_channels} channels, or none"
            )
        if min((self.noise_scale, *self.latent_std)) <= 0:
            raise UserError("noise_scale and latent_std are standard deviations; choose numbers above 0")

    @property
    def is_flow(self) -> bool:
        """Whether time runs from 0 to 1 along a flow, and not over the timesteps of DDPM."""
        return self.time != "timesteps"

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP; without `mlp_hidden` SwiGLU has 2/3 of the other's, so as many parameters."""
        width = int(self.hidden_size * self.mlp_ratio)
        return self.mlp_hidden or (width * 2 // 3 if self.mlp == "swiglu" else width)
