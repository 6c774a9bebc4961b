"""DiT in few launches: qkv, attention, proj with its residual, fc1 with its GELU, fc2 with its residual.

The residual stream is fp32 and updated in place. The conditioning is computed once for each (t, y) of a batch, not
once an image. Tokens to tokens, what `svdit.model.layers.Block` computes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels.layer import Modulation, Residual
from svdit.model.dit import DiT
from svdit.model.embeddings import sinusoids
from svdit.model.layers import Block, FinalLayer
from svdit.runtime import opaque
from svdit.runtime.graph import Replayed
from svdit.runtime.linear import Packer

HIDDEN_BYTES = 2**25  # of fc1's output at once, on a CPU, where larger memory is mapped and cleared at every call


class FastBlock(nn.Module):
    """`model.layers.Block`; the conditioning comes once for each different one, with the images' places in it."""

    def __init__(self, block: Block, name: str, pack: Packer) -> None:
        super().__init__()
        self.backend, self.heads = pack.backend, block.attn.num_heads
        self.qkv = pack(block.attn.qkv, f"{name}.attn.qkv", inner=True)
        self.proj = pack(block.attn.proj, f"{name}.attn.proj")
        self.fc1 = pack(block.mlp.fc1, f"{name}.mlp.fc1", inner=True)
        self.fc2 = pack(block.mlp.fc2, f"{name}.mlp.fc2")
        size = getattr(self.fc1, "dtype", torch.float32).itemsize
        self.tokens = HIDDEN_BYTES // (size * block.mlp.fc1.out_features)  # at once, in whole images
        self.modulations = pack(block.adaLN_modulation[1], f"{name}.adaLN_modulation.1")

    def attention(self, qkv: Tensor) -> Tensor:
        """(N, T, 3D) to (N, T, D)"""
        if self.backend == "cpu" and torch.compiler.is_compiling():
            return opaque.attention(qkv, self.heads)
        return ops.attention(qkv, self.heads, self.backend)

    def parts(self, x: Tensor) -> list[slice]:
        """Images that go through the block together, which is the same for all of them: on a GPU all."""
        N, T, _ = x.shape
        count = 1 if x.is_cuda else -(-N // max(1, self.tokens // T))
        return [slice(N * i // count, N * (i + 1) // count) for i in range(count)]

    # fmt: off
    def forward(self, x: Tensor, c: Tensor, place: Tensor | slice) -> Tensor:
        modulations = self.modulations(c)[0, place]                                         # (N, 6D)
        for part in self.parts(x):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulations[part].chunk(6, dim=1)    # (n, D) each
            qkv = self.qkv(x[part], modulation=Modulation(shift1, scale1))                  # (n, T, 3D)
            self.proj(self.attention(qkv), residual=Residual(x[part], gate1))               # (n, T, D)
            del qkv
            hidden = self.fc1(x[part], modulation=Modulation(shift2, scale2), gelu=True)    # (n, T, 4D)
            self.fc2(hidden, residual=Residual(x[part], gate2))                             # (n, T, D)
        return x
    # fmt: on


class FastDiT(DiT):
    """`model.dit.DiT` for inference; it cannot be saved."""

    def __init__(self, model: DiT, pack: Packer) -> None:
        nn.Module.__init__(self)
        self.config, self.backend = model.config, pack.backend
        self.x_embedder, self.t_embedder, self.y_embedder = model.x_embedder, model.t_embedder, model.y_embedder
        self.pos_embed = model.pos_embed
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.blocks = nn.ModuleList(FastBlock(block, f"blocks.{i}", pack) for i, block in enumerate(blocks))
        final: FinalLayer = model.final_layer
        self.last_modulations = pack(final.adaLN_modulation[1], "final_layer.adaLN_modulation.1")
        self.last = pack(final.linear, "final_layer.linear")
        self.step = Replayed(self.compute)
        self.graphs = not pack.debug  # whose tests of every layer cannot be recorded
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        recorded = x.is_cuda and self.graphs and not torch.compiler.is_compiling()
        return self.step(x, t, y) if recorded else self.compute(x, t, y)

    # fmt: off
    def compute(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """One denoising step, operation by operation."""
        x = (self.x_embedder(x) + self.pos_embed).contiguous()                    # (N, T, D)
        t, y, place = distinct(t, y)
        c = self.t_embedder(sinusoids(t).to(x.dtype)) + self.y_embedder(y)
        c = F.silu(c)[None]                                                       # (1, different (t, y), D)
        for block in self.blocks:
            x = block(x, c, place)                                                # (N, T, D)
        shift, scale = self.last_modulations(c)[0, place].chunk(2, dim=1)         # (N, D) each
        return self.unpatchify(self.last(x, modulation=Modulation(shift, scale))) # (N, C or 2C, H, W)
    # fmt: on

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError("an accelerated model cannot be saved; save the quantized model before accelerating it")


def distinct(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | slice]:
    """The different pairs of (t, y) and every image's place among them.

    On a GPU and under torch.compile all pairs as they are: a few rows more cost little, and their number would have to
    be waited for.
    """
    if t.is_cuda or torch.compiler.is_compiling():
        return t, y, slice(None)
    each, place = torch.unique(torch.stack([t.double(), y.double()]), dim=1, return_inverse=True)
    return each[0].to(t.dtype), each[1].to(y.dtype), place
