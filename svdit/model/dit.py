"""The class-conditional diffusion transformer: DiT (Peebles & Xie, arXiv 2212.09748) and the families built on it.

Predicts what its configuration names. DiT predicts the noise in x_t, and with `learn_sigma` also where the log variance
lies between the smallest and the largest posterior variance; SiT, REPA and LightningDiT the velocity of a flow; JiT the
clean image. Parameter names are those of the published checkpoints. Guidance, schedules, flows and label dropout are in
`svdit.diffusion` and `svdit.training`.
"""

from functools import partial

import torch
from torch import Tensor, nn

from svdit.model.caching import Blocks, CachePlan
from svdit.model.config import DiTConfig as DiTConfig
from svdit.model.embeddings import (
    BottleneckPatchEmbed,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    position_embedding,
    rotation,
    sinusoids,
)
from svdit.model.layers import Block, FinalLayer


class DiT(nn.Module):
    """(N, C, H, W) noisy images, (N,) times and (N,) labels to (N, C or 2C, H, W)."""

    rotation: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.class_names: tuple[str, ...] = ()  # of all classes, or none
        self.cache_plan: CachePlan | None = None  # of `svdit cache`, followed where the sampling settings are its own
        D, side = config.hidden_size, config.input_size // config.patch_size
        self.x_embedder = BottleneckPatchEmbed(config) if config.bottleneck else PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D, config.has_null_class)
        self.pos_embed = nn.Parameter(position_embedding(D, side), requires_grad=False)
        if config.context_tokens:
            self.in_context_posemb = nn.Parameter(torch.zeros(1, config.context_tokens, D))  # device: the default
        if config.rope:
            table = rotation(D // config.num_heads, side, config.context_tokens)
            self.register_buffer("rotation", table, persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, self.out_channels)
        initialize(self)

    @property
    def out_channels(self) -> int:
        """Channels of the last layer: the prediction's, with `learn_sigma` as many again."""
        return self.config.in_channels * (2 if self.config.learn_sigma else 1)

    @property
    def used_channels(self) -> int:
        """Channels of the output: a flow has no variance to learn."""
        return self.config.in_channels if self.config.is_flow else self.out_channels

    @property
    def null_class(self) -> int:
        """The label of unconditional generation; no row of the table without `config.has_null_class`."""
        return self.config.num_classes

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        return self.config.in_channels, self.config.input_size, self.config.input_size

    # fmt: off
    def forward(self, x: Tensor, t: Tensor, y: Tensor, cache: Blocks | None = None) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed                               # (N, T, D)
        label = self.y_embedder(y)                                            # (N, D)
        c = self.t_embedder(sinusoids(t).to(x.dtype)) + label                 # (N, D)
        for i, block in enumerate(self.blocks):
            if i == self.config.context_start:
                x = self.with_context(x, label)                               # (N, L + T, D)
            run = partial(block, c=c, rotation=self.rotation_of(x))
            x = cache.block(i, x, run) if cache else run(x)                   # (N, L + T, D)
        x = self.final_layer(x[:, self.config.context_tokens:], c)            # (N, T, P·P·C or 2C)
        return self.unpatchify(x)[:, :self.used_channels]                     # (N, C or 2C, H, W)

    def with_context(self, x: Tensor, label: Tensor) -> Tensor:
        """Tokens (N, T, D) behind those of the label (N, D), if any: (N, L + T, D)."""
        if not self.config.context_tokens:
            return x
        return torch.cat([label[:, None] + self.in_context_posemb, x], dim=1)

    def rotation_of(self, x: Tensor) -> Tensor | None:
        """The rotations (2, …, D/heads) of the tokens x (N, …, D); None without RoPE."""
        return self.rotation[:, -x.shape[1]:] if self.config.rope else None

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
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if (name.startswith(("t_embedder", "y_embedder")) and name.endswith("weight")) or name == "in_context_posemb":
            nn.init.normal_(parameter, std=0.02)
        elif "adaLN" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)
