"""DiT with fused steps: qkv, attention, proj with its residual, the MLP with its activation and residual.

The residual stream is fp32 and updated in place. The conditioning is computed once per distinct (t, y) of a batch,
not once per image. Blocks compute what `svdit.model.layers.Block` computes.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdit.kernels import ops
from svdit.kernels.fused import silu
from svdit.kernels.layer import HeadNorms, Modulation, Residual, Rotation
from svdit.model.caching import Blocks
from svdit.model.dit import DiT
from svdit.model.embeddings import sinusoids
from svdit.model.layers import Attention, Block, FinalLayer, SwiGLU
from svdit.runtime import linear
from svdit.runtime.graph import Replayed
from svdit.runtime.linear import FastLinear, check_move, packed, packed_floats, refuse_loading

HIDDEN_BYTES = 2**25  # of fc1's output at once on a CPU: the allocator maps and clears larger buffers at every call


class FastBlock(nn.Module):
    """`model.layers.Block` of given modulations, each twice shift, scale and gate."""

    def __init__(self, block: Block, name: str, backend: str, debug: bool) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.backend, self.heads, self.norms = backend, attn.num_heads, head_norms(attn)
        self.qkv = packed(attn.qkv, f"{name}.attn.qkv", backend, debug, inner=True)
        self.proj = packed(attn.proj, f"{name}.attn.proj", backend, debug)
        self.glu = isinstance(mlp, SwiGLU)
        first, second = ("w12", "w3") if self.glu else ("fc1", "fc2")
        self.first = packed(getattr(mlp, first), f"{name}.mlp.{first}", backend, debug, inner=True)
        self.second = packed(getattr(mlp, second), f"{name}.mlp.{second}", backend, debug)
        self.tokens = HIDDEN_BYTES // (self.first.dtype.itemsize * self.first.outputs)  # at once, in whole images
        self.modulations = packed(block.adaLN_modulation[1], f"{name}.adaLN_modulation.1", backend, debug)
        self.rms = isinstance(block.norm1, nn.RMSNorm)
        self.chain = [layer.linear for layer in (self.qkv, self.proj, self.first, self.second)]
        self.together = ops.together("" if debug else backend, self.chain)  # debug mode reads what the layers read

    def attention(self, qkv: Tensor, rotation: Rotation | None) -> Tensor:
        """(N, T, 3D) to (N, T, D)"""
        if self.backend in ("cpu", "triton") and torch.compiler.is_compiling():
            tables = *(self.norms or (None, None)), *(rotation or (None, None))
            return linear.attention(qkv, self.heads, self.backend, *tables)
        return ops.attention(qkv, self.heads, self.backend, norms=self.norms, rotation=rotation)

    def parts(self, x: Tensor) -> list[slice]:
        """Images of x (N, T, D) that go through the block together, which changes no result; all of them on a GPU."""
        N, T, _ = x.shape
        count = 1 if x.is_cuda else -(-N // max(1, self.tokens // T))
        return [slice(N * i // count, N * (i + 1) // count) for i in range(count)]

    # fmt: off
    def forward(self, x: Tensor, modulations: Tensor, rotation: Rotation | None) -> Tensor:  # modulations (6, N, D)
        for part in self.parts(x):
            with nullcontext() if torch.compiler.is_compiling() else self.together():
                self.update(x[part], modulations[:, part], rotation)
        return x

    def update(self, x: Tensor, modulations: Tensor, rotation: Rotation | None) -> None:
        """x (N, T, D) in place, by modulations (6, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations.unbind()             # (N, D) each
        first, second = Modulation(shift1, scale1, self.rms), Modulation(shift2, scale2, self.rms)
        qkv = self.qkv.fused(x, modulation=first)                                       # (N, T, 3D)
        self.proj.fused(self.attention(qkv, rotation), residual=Residual(x, gate1))     # (N, T, D)
        del qkv
        hidden = self.first.fused(x, modulation=second, gelu=not self.glu)              # (N, T, 4D or 2 hidden)
        self.second.fused(hidden, residual=Residual(x, gate2), glu=self.glu)            # (N, T, D)
    # fmt: on


def head_norms(attention: Attention) -> HeadNorms | None:
    """The norms of queries and keys; None without."""
    pairs = zip(attention.q_norm.parameters(), attention.k_norm.parameters(), strict=True)  # weights, then biases
    stacked = [torch.stack(pair).detach().float() for pair in pairs]
    return HeadNorms(*stacked) if stacked else None


def in_fp32(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of any float type; the same tensor where it is fp32."""
    return nn.Parameter(parameter.detach().float(), requires_grad=False)


class FastDiT(DiT):
    """`model.dit.DiT` for inference; it cannot be saved, copied or moved."""

    def __init__(self, model: DiT, backend: str, debug: bool = False) -> None:
        nn.Module.__init__(self)
        self.config, self.backend = model.config, backend
        self.class_names, self.cache_plan = model.class_names, model.cache_plan
        pack = partial(packed, backend=backend, debug=debug)
        self.patch_embedding = nn.ModuleList(
            packed_floats(layer.weight.flatten(1), layer.bias, f"x_embedder.{name}", backend, debug)
            for name, layer in model.x_embedder.named_children()
            if isinstance(layer, nn.Conv2d)
        )
        first, _, second = model.t_embedder.mlp
        self.t_first, self.t_second = pack(first, "t_embedder.mlp.0"), pack(second, "t_embedder.mlp.2")
        self.y_embedder, self.pos_embed = model.y_embedder, in_fp32(model.pos_embed)
        if self.config.context_tokens:
            self.in_context_posemb = in_fp32(model.in_context_posemb)
        if self.config.rope:
            self.register_buffer("rotation", model.rotation.float(), persistent=False)
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.blocks = nn.ModuleList(FastBlock(block, f"blocks.{i}", backend, debug) for i, block in enumerate(blocks))
        chain = [layer for block in self.blocks for layer in cast(FastBlock, block).chain]
        self.together = ops.together("" if debug else backend, chain)
        self.spans = list(pairwise(sorted({0, self.config.context_start, len(blocks)})))  # of blocks between contexts
        weights = [w for b in blocks if (w := weights_around_scales(b.norm1, b.norm2)) is not None]
        self.norm_weights = [w[None] for w in weights]  # (1, 6D) each; none for LayerNorm
        final: FinalLayer = model.final_layer
        self.last_modulations = pack(final.adaLN_modulation[1], "final_layer.adaLN_modulation.1")
        self.last_weight = weights_around_scales(final.norm_final, gates=0)  # (2D)
        self.last = pack(final.linear, "final_layer.linear")
        self.step = Replayed(self.compute)
        self.graphs = not debug  # the checks of debug mode cannot be recorded
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor, cache: Blocks | None = None) -> Tensor:
        N = max(len(x), t.numel(), y.numel())  # one of them may serve all others
        x, t, y = x.expand(N, -1, -1, -1), t.expand(N), y.expand(N)
        recorded = cache is None and x.is_cuda and self.graphs and not torch.compiler.is_compiling()
        with torch.autocast(x.device.type, enabled=False):
            return self.step(x, t, y) if recorded else self.compute(x, t, y, cache)

    def hooked(self) -> bool:
        """Whether forward hooks of the caller read the inputs or outputs of blocks."""
        everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
        return bool(everywhere) or any(block._forward_hooks or block._forward_pre_hooks for block in self.blocks)

    def _load_from_state_dict(self, *args: object) -> None:
        refuse_loading()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FastDiT":
        check_move(self, fn)  # of all layers, before any tensor is moved
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    # fmt: off
    def compute(self, x: Tensor, t: Tensor, y: Tensor, cache: Blocks | None = None) -> Tensor:
        """One denoising step (N, C, H, W) to (N, C or 2C, H, W), without a CUDA graph."""
        x = patches(x, self.config.patch_size)                                    # (N, T, C·P·P)
        for layer in self.patch_embedding:
            x = cast(FastLinear, layer).fused(x)
        x = (x + self.pos_embed).contiguous()                                     # (N, T, D)
        t, y, place = distinct(t, y)
        label = self.y_embedder(y).float()                                        # (different (t, y), D)
        hidden = silu(self.t_first.fused(sinusoids(t)[:, None]))                  # (different (t, y), 1, D)
        c = silu(self.t_second.fused(hidden) + label[:, None])                    # (different (t, y), 1, D)
        running = [i for i in range(self.config.depth) if not cache or cache.runs(i)]
        modulations = self.modulations(c, place, running)                         # (6, N, D) each
        for first, last in self.spans:
            if first == self.config.context_start:
                x = self.with_context(x, label[place])                            # (N, L + T, D)
            rotation = self.rotations(x)
            alone = cache or torch.compiler.is_compiling() or self.hooked()
            with nullcontext() if alone else self.together():
                for i in range(first, last):
                    run = partial(self.blocks[i], modulations=modulations.get(i), rotation=rotation)
                    x = cache.block(i, x, run) if cache else run(x)               # (N, L + T, D)
        shift, scale = folded(self.last_modulations.fused(c)[:, 0], self.last_weight)[place].chunk(2, dim=1)
        modulation = Modulation(shift, scale, self.config.norm == "rms")          # (N, D) each
        x = self.last.fused(x[:, self.config.context_tokens:], modulation=modulation)   # (N, T, P·P·C or 2C)
        return self.unpatchify(x)[:, :self.used_channels]                         # (N, C or 2C, H, W)

    def modulations(self, c: Tensor, place: Tensor | slice, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Those of `blocks`, (6, N, D) each, of each distinct conditioning c (n, 1, D) in the place of its images.

        Together, because each of torch's operations is slow right after kernels that swept its code out of cache."""
        if not blocks:
            return {}
        rows = [cast(FastBlock, self.blocks[i]).modulations.fused(c) for i in blocks]   # (n, 1, 4D or 6D) each
        B, D = len(rows), c.shape[-1]
        pairs = torch.stack(rows).view(B, len(c), 2, -1, D)                       # (B, n, 2, 2 or 3, D)
        if not self.config.shift:
            pairs = F.pad(pairs, (0, 0, 1, 0))                                    # (B, n, 2, 3, D)
        weights = torch.stack([self.norm_weights[i] for i in blocks]) if self.norm_weights else None  # (B, 1, 6D)
        six = folded(pairs.flatten(2), weights)[:, place]                         # (B, N, 6D)
        return dict(zip(blocks, six.reshape(B, -1, 6, D).transpose(1, 2), strict=True))
    # fmt: on

    def rotations(self, x: Tensor) -> Rotation | None:
        """The cosines and sines of the tokens x (N, T, D); None without RoPE."""
        rotation = self.rotation_of(x)
        return None if rotation is None else Rotation(*rotation)


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


def weights_around_scales(*norms: nn.Module, gates: int = 1) -> Tensor | None:
    """RMSNorm's weights in the places of their scales among modulations, (6D) or (2D), else 1; None for LayerNorm."""
    weights = [norm.weight.detach().float() for norm in norms if isinstance(norm, nn.RMSNorm)]
    parts = [part for w in weights for part in (torch.ones_like(w), w, *[torch.ones_like(w)] * gates)]
    return torch.cat(parts) if parts else None


def folded(modulations: Tensor, weight: Tensor | None) -> Tensor:
    """Modulations (N, …) with (1 + scale) w − 1 for each scale, and w from `weights_around_scales`."""
    return modulations if weight is None else modulations * weight + (weight - 1)
