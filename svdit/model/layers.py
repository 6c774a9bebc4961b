"""The transformer block of DiT: attention and an MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.num_heads, -1)             # (N, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # each (N, heads, T, D/heads)
        x = attend(q, k, v)                                             # (N, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))            # (N, T, D)
    # fmt: on


class Mlp(nn.Module):
    """D → ratio·D → tanh-GELU → D."""

    def __init__(self, hidden_size: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = nn.Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def layer_norm(hidden_size: int) -> nn.LayerNorm:
    """LayerNorm without weights over (N, T, D); shift and scale come from the conditioning."""
    return nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)


class Block(nn.Module):
    """x + gate·attention(modulated x), then the same with the MLP; adaLN computes the six modulations."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    # fmt: off
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # (N, D) each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))    # (N, T, D)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, D)
    # fmt: on


class FinalLayer(nn.Module):
    """Modulated tokens (N, T, D) to patches (N, T, P·P·channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
