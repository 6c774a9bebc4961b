"""DiT, the class-conditional diffusion transformer (Peebles & Xie, arXiv 2212.09748).

Predicts the noise in x_t (or what `prediction` names), and with `learn_sigma` also where the log variance lies
between the smallest and the largest posterior variance. Parameter names are those of the published checkpoints.
Guidance, schedules and label dropout are in `svdit.diffusion` and `svdit.training`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.fields import check_types
from svdit.model.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, position_embedding, sinusoids
from svdit.model.layers import Block, FinalLayer

PREDICTIONS = ("epsilon", "velocity", "x0")  # svdit.diffusion.prediction defines them


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT and what it predicts; `input_size` is the side of its square input, in latents or pixels."""

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    prediction: str = "epsilon"
    has_null_class: bool = True  # false after training without label dropout: such a model cannot be guided

    def __post_init__(self) -> None:
        """Raises UserError for fields of other types, sizes that do not divide, and an unknown prediction."""
        check_types(self)
        if self.prediction not in PREDICTIONS:
            raise UserError(f"prediction is {self.prediction!r}; choose one of {', '.join(PREDICTIONS)}")
        for value, by, what in (
            (self.input_size, self.patch_size, "input_size {} by patch_size {}"),
            (self.hidden_size, self.num_heads, "hidden_size {} by num_heads {}"),
            (self.hidden_size, 4, "hidden_size {} by {} (sines and cosines of two axes)"),
        ):
            if by < 1 or value < by or value % by:
                raise UserError(f"cannot divide {what.format(value, by)}; choose a multiple")
        if min(self.depth, self.in_channels, self.num_classes, int(self.hidden_size * self.mlp_ratio)) < 1:
            raise UserError(f"{self} has a size below 1; choose larger depth, in_channels, num_classes and mlp_ratio")


class DiT(nn.Module):
    """(N, C, H, W) noisy images, (N,) timesteps and (N,) labels to (N, C or 2C, H, W)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.class_names: tuple[str, ...] = ()  # of all classes, or none
        side = config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size, config.has_null_class)
        self.pos_embed = nn.Parameter(position_embedding(config.hidden_size, side), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(config.hidden_size, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size, self.out_channels)
        initialize(self)

    @property
    def out_channels(self) -> int:
        """Channels of the output: the prediction's, then as many for a learned variance."""
        return self.config.in_channels * (2 if self.config.learn_sigma else 1)

    @property
    def null_class(self) -> int:
        """The label of unconditional generation; no row of the table without `config.has_null_class`."""
        return self.config.num_classes

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        return self.config.in_channels, self.config.input_size, self.config.input_size

    # fmt: off
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed                               # (N, T, D)
        c = self.t_embedder(sinusoids(t).to(x.dtype)) + self.y_embedder(y)    # (N, D)
        for block in self.blocks:
            x = block(x, c)                                                   # (N, T, D)
        return self.unpatchify(self.final_layer(x, c))                        # (N, C or 2C, H, W)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches (N, T, P·P·C) to images (N, C, H, W)."""
        N, P, side = len(x), self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x.view(N, side, side, P, P, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(N, self.out_channels, side * P, side * P)
    # fmt: on


@torch.no_grad()
def initialize(model: DiT) -> None:
    """Xavier for linears, N(0, 0.02²) for the embedders, zero for adaLN and the last layer (the paper's adaLN-Zero)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = model.x_embedder.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
    for name, parameter in model.named_parameters():
        if name.startswith(("t_embedder", "y_embedder")) and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02)
        elif "adaLN" in name or name.startswith("final_layer") or name == "x_embedder.proj.bias":
            nn.init.zeros_(parameter)
