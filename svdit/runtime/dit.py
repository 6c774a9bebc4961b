"""DiT with fused steps: qkv, attention, proj with its residual, fc1 with its GELU, fc2 with its residual.

The residual stream is fp32 and updated in place. The conditioning is computed once per distinct (t, y) of a batch,
not once per image. Blocks compute what `svdit.model.layers.Block` computes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from svdit.kernels import ops
from svdit.kernels.fused import silu
from svdit.kernels.layer import Modulation, Residual
from svdit.model.dit import DiT
from svdit.model.embeddings import PatchEmbed, sinusoids
from svdit.model.layers import Block, FinalLayer, Mlp
from svdit.runtime import linear
from svdit.runtime.graph import Replayed
from svdit.runtime.linear import check_move, packed, packed_floats

HIDDEN_BYTES = 2**25  # of fc1's output at once on a CPU: the allocator maps and clears larger buffers at every call


class FastBlock(nn.Module):
    """`model.layers.Block`; c holds each distinct conditioning once, `place` the index of each image in it."""

    def __init__(self, block: Block, name: str, backend: str, debug: bool) -> None:
        super().__init__()
        self.backend, self.heads = backend, block.attn.num_heads
        self.qkv = packed(block.attn.qkv, f"{name}.attn.qkv", backend, debug, inner=True)
        self.proj = packed(block.attn.proj, f"{name}.attn.proj", backend, debug)
        assert isinstance(block.mlp, Mlp)
        self.fc1 = packed(block.mlp.fc1, f"{name}.mlp.fc1", backend, debug, inner=True)
        self.fc2 = packed(block.mlp.fc2, f"{name}.mlp.fc2", backend, debug)
        self.tokens = HIDDEN_BYTES // (self.fc1.dtype.itemsize * self.fc1.outputs)  # at once, in whole images
        self.modulations = packed(block.adaLN_modulation[1], f"{name}.adaLN_modulation.1", backend, debug)

    def attention(self, qkv: Tensor) -> Tensor:
        """(N, T, 3D) to (N, T, D)"""
        if self.backend == "cpu" and torch.compiler.is_compiling():
            return linear.attention(qkv, self.heads, None, None, None, None)
        return ops.attention(qkv, self.heads, self.backend)

    def parts(self, x: Tensor) -> list[slice]:
        """Images of x (N, T, D) that go through the block together, which changes no result; all of them on a GPU."""
        N, T, _ = x.shape
        count = 1 if x.is_cuda else -(-N // max(1, self.tokens // T))
        return [slice(N * i // count, N * (i + 1) // count) for i in range(count)]

    # fmt: off
    def forward(self, x: Tensor, c: Tensor, place: Tensor | slice) -> Tensor:
        modulations = self.modulations.fused(c)[place, 0]                                   # (N, 6D)
        for part in self.parts(x):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulations[part].chunk(6, dim=1)    # (n, D) each
            qkv = self.qkv.fused(x[part], modulation=Modulation(shift1, scale1))            # (n, T, 3D)
            self.proj.fused(self.attention(qkv), residual=Residual(x[part], gate1))         # (n, T, D)
            del qkv
            hidden = self.fc1.fused(x[part], modulation=Modulation(shift2, scale2), gelu=True)  # (n, T, 4D)
            self.fc2.fused(hidden, residual=Residual(x[part], gate2))                       # (n, T, D)
        return x
    # fmt: on


class FastDiT(DiT):
    """`model.dit.DiT` for inference; it cannot be saved, copied or moved."""

    def __init__(self, model: DiT, backend: str, debug: bool = False) -> None:
        nn.Module.__init__(self)
        self.config, self.backend = model.config, backend
        assert isinstance(model.x_embedder, PatchEmbed)
        embedding, (first, _, second) = model.x_embedder.proj, model.t_embedder.mlp
        self.patch_embedding = packed_floats(
            embedding.weight.flatten(1), embedding.bias, "x_embedder.proj", backend, debug
        )
        self.t_first = packed(first, "t_embedder.mlp.0", backend, debug)
        self.t_second = packed(second, "t_embedder.mlp.2", backend, debug)
        self.y_embedder, self.pos_embed = model.y_embedder, model.pos_embed
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.blocks = nn.ModuleList(FastBlock(block, f"blocks.{i}", backend, debug) for i, block in enumerate(blocks))
        final: FinalLayer = model.final_layer
        adaln = "final_layer.adaLN_modulation.1"
        self.last_modulations = packed(final.adaLN_modulation[1], adaln, backend, debug)
        self.last = packed(final.linear, "final_layer.linear", backend, debug)
        self.step = Replayed(self.compute)
        self.graphs = not debug  # the checks of debug mode cannot be recorded
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        recorded = x.is_cuda and self.graphs and not torch.compiler.is_compiling()
        with torch.autocast(x.device.type, enabled=False):
            return self.step(x, t, y) if recorded else self.compute(x, t, y)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FastDiT":
        check_move(self, fn)  # of all layers, before any tensor is moved
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    # fmt: off
    def compute(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """One denoising step (N, C, H, W) to (N, C or 2C, H, W), without a CUDA graph."""
        x = patches(x, self.config.patch_size)                                    # (N, T, C·P·P)
        x = (self.patch_embedding.fused(x) + self.pos_embed).contiguous()         # (N, T, D)
        t, y, place = distinct(t, y)
        hidden = silu(self.t_first.fused(sinusoids(t)[:, None]))                  # (different (t, y), 1, D)
        c = silu(self.t_second.fused(hidden) + self.y_embedder(y)[:, None])       # (different (t, y), 1, D)
        for block in self.blocks:
            x = block(x, c, place)                                                # (N, T, D)
        shift, scale = self.last_modulations.fused(c)[place, 0].chunk(2, dim=1)   # (N, D) each
        return self.unpatchify(self.last.fused(x, modulation=Modulation(shift, scale))) # (N, C or 2C, H, W)
    # fmt: on


def patches(x: Tensor, P: int) -> Tensor:
    """Images (N, C, H, W) to patches (N, T, C·P·P), the inputs of `model.embeddings.PatchEmbed` as a matrix product."""
    N, C, H, W = x.shape
    return x.reshape(N, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(N, -1, C * P * P)


def distinct(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | slice]:
    """The distinct pairs of (t, y), (N,) each, and the index of every image among them.

    On a GPU and under torch.compile all pairs as they are: a few more rows cost little, and counting the distinct ones
    would synchronize.
    """
    if t.is_cuda or torch.compiler.is_compiling():
        return t, y, slice(None)
    pairs, place = torch.unique(torch.stack([t.double(), y.double()]), dim=1, return_inverse=True)
    return pairs[0].to(t.dtype), pairs[1].to(y.dtype), place
