"""The transformer block: attention and an MLP, each modulated and gated by the conditioning (adaLN-Zero).

Its parts follow the configuration: LayerNorm or RMSNorm, GELU or SwiGLU, normalized and rotated queries and keys.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdit.model.config import DiTConfig


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) · (1 + scale) + shift, with one shift and scale (N, D) per image."""
    return x * (1 + scale)[:, None] + shift[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, each (N, heads, T, d).

    torch's fused attention, but plain matrix products for up to 512 bfloat16 tokens on a CPU: more than 2× faster at
    256 tokens, equal at 1024 (`benchmarks/bench_cpu.py`).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 512:
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x (…, T, d) with each pair of neighbouring channels (a, b) turned: cosines · (a, b) + sines · (−b, a).

    `rotation` (2, T, d) has the cosines and sines, equal for both of a pair.
    """
    cos, sin = rotation
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str = "none") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = (QK_NORMS[qk_norm](hidden_size // num_heads) for _ in range(2))
        self.proj = nn.Linear(hidden_size, hidden_size)

    # fmt: off
    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.num_heads, -1)             # (N, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # each (N, heads, T, D/heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        x = attend(q, k, v)                                             # (N, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))            # (N, T, D)
    # fmt: on


class RMSNorm(nn.RMSNorm):
    """With ε 1e-6, in the type of its weight; under bfloat16 autocast that is float32, and torch would warn."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


QK_NORMS: dict[str, Callable[[int], nn.Module]] = {  # of one head's channels
    "none": lambda head: nn.Identity(),
    "layer": lambda head: nn.LayerNorm(head, eps=1e-5),
    "rms": RMSNorm,
}


class Mlp(nn.Module):
    """D → hidden → tanh-GELU → D."""

    def __init__(self, hidden_size: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """D → 2 × hidden → silu(a) · b of the halves → D (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * hidden)
        self.w3 = nn.Linear(hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


MLPS: dict[str, type[Mlp | SwiGLU]] = {"gelu": Mlp, "swiglu": SwiGLU}
NORMS: dict[
    str, Callable[[int], nn.Module]
] = {  # over the tokens' channels; shift and scale come from the conditioning
    "layer": lambda hidden_size: nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False),
    "rms": RMSNorm,
}


class Block(nn.Module):
    """x + gate·attention(modulated x), then the same with the MLP; adaLN computes the six modulations.

    Without `config.shift` there are four: both shifts are 0.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.shift = config.shift
        self.norm1 = NORMS[config.norm](D)
        self.attn = Attention(D, config.num_heads, config.qk_norm)
        self.norm2 = NORMS[config.norm](D)
        self.mlp = MLPS[config.mlp](D, config.mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, (6 if config.shift else 4) * D))

    # fmt: off
    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.six(self.adaLN_modulation(c))  # (N, D) each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rotation)  # (N, T, D)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))      # (N, T, D)
    # fmt: on

    def six(self, modulations: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate, twice, (N, D) each, of (N, 6D or 4D)."""
        if self.shift:
            return modulations.chunk(6, dim=1)
        scale1, gate1, scale2, gate2 = modulations.chunk(4, dim=1)
        zero = torch.zeros_like(gate1)
        return zero, scale1, gate1, zero, scale2, gate2


class FinalLayer(nn.Module):
    """Modulated tokens (N, T, D) to patches (N, T, P·P·channels)."""

    def __init__(self, config: DiTConfig, channels: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.norm_final = NORMS[config.norm](D)
        self.linear = nn.Linear(D, config.patch_size * config.patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
