"""A synthetic DiT block with hard inputs, executed end to end: LayerNorm, adaLN, attention, MLP.

Weights have a power-law spectrum and heavy tails; inputs have outlier channels, per-channel scales and a heavy-tailed
shift. The profile "moderate" has four massive channels, "plain" has none and a small shift. Everything is seeded, and
draws follow the order of the original study, so its numbers can be compared.
"""

import math

import torch
from torch import Tensor

PROFILES = {"plain": (0.0, 0, 0.05), "moderate": (0.15, 4, 0.25)}  # gain of massive channels, how many, shift


def heavy_tailed(shape: tuple[int, ...], freedom: float, generator: torch.Generator) -> Tensor:
    """Student's t samples; the χ² part uses torch's global generator, which the block seeds."""
    chi = torch.distributions.Chi2(torch.tensor(freedom)).sample(shape)
    return torch.randn(*shape, generator=generator) / torch.sqrt(chi / freedom)


def power_law(rows: int, columns: int, exponent: float, tail: float, generator: torch.Generator) -> Tensor:
    """A (rows, columns) matrix with singular values (1 + i/20)^−exponent plus heavy-tailed entries."""
    k = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, k, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(columns, k, generator=generator))[0]
    W = (U * (1 + torch.arange(k) / 20.0) ** -exponent) @ V.T
    noise = torch.randn(rows, columns, generator=generator)
    chi = torch.distributions.Chi2(torch.tensor(5.0)).sample((rows, columns))
    return W / W.std() + tail * noise / torch.sqrt(chi / 5.0)


class Block:
    """`weights[name]` (O, I) and `inputs(images, tokens, seed)[name]` (images·tokens, I) for qkv, proj, fc1, fc2."""

    def __init__(self, width: int = 576, heads: int = 8, profile: str = "moderate", seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.width, self.heads = width, heads
        self.gain, massive, shift = PROFILES[profile]
        self.massive = torch.randperm(width, generator=g)[:massive]
        self.massive_values = (40 + 40 * torch.rand(massive, generator=g)) * torch.randn(massive, generator=g).sign()
        self.channel = torch.exp(0.5 * torch.randn(width, generator=g))
        self.mix = power_law(width, width, 0.7, 0.3, g) / math.sqrt(width)
        self.of_t = torch.randn(6, width, 16, generator=g) * 0.15
        self.of_y = torch.randn(6, width, 24, generator=g) * 0.05
        self.bias = torch.zeros(6, width)
        for i in (0, 3):
            self.bias[i] = shift * heavy_tailed((width,), 3.0, g)
        for i in (1, 4):
            self.bias[i] = torch.exp(0.5 * torch.randn(width, generator=g)) - 1
            self.bias[i, self.massive] = self.gain * (0.5 + torch.rand(massive, generator=g)) - 1
        self.weights = {}
        shapes = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
        for name, (o, i) in shapes.items():
            W = power_law(o * width, i * width, 0.4, 0.6, g) * torch.exp(0.35 * torch.randn(i * width, generator=g))
            if i == 1 and name != "proj":
                W[:, self.massive] *= 0.3
            self.weights[name] = W / math.sqrt(i * width)
        self.fc1_bias = -0.6 + 0.7 * torch.randn(4 * width, generator=g)
        self.scaled = False
        self.inputs(8, 96, 999)  # normalizes the outputs of qkv and fc1 to unit scale
        self.scaled = True

    def inputs(self, images: int, tokens: int, seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        t = torch.rand(images, generator=g)
        frequencies = torch.arange(1, 9) * math.pi
        waves = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], 1)
        y = torch.randn(images, 24, generator=g)
        by_t = torch.einsum("kdf,nf->nkd", self.of_t, waves) * 0.35
        modulation = self.bias[None] + by_t + torch.einsum("kdf,nf->nkd", self.of_y, y) * 0.5
        for i in (1, 4):
            modulation[:, i, self.massive] = self.bias[i, self.massive] + 0.05 * modulation[:, i, self.massive]
        level = (0.6 + 0.8 * t)[:, None, None]
        h = torch.randn(images, tokens, self.width, generator=g) @ self.mix.T * self.channel * level
        h = h + torch.randn(images, 1, self.width, generator=g) * 0.5 * self.channel
        if len(self.massive):
            wobble = 1 + 0.08 * torch.randn(images, tokens, len(self.massive), generator=g)
            h[:, :, self.massive] += self.massive_values * level * wobble
        qkv = self.modulated(h, modulation, 0)
        attended = self.attention(self.output("qkv", qkv))
        h = h + 0.3 * self.channel * (attended @ self.weights["proj"].T)
        fc1 = self.modulated(h, modulation, 3)
        hidden = 1.3 * self.output("fc1", fc1) + self.fc1_bias
        fc2 = torch.nn.functional.gelu(hidden, approximate="tanh")
        every = {"qkv": qkv, "proj": attended, "fc1": fc1, "fc2": fc2}
        return {name: x.reshape(-1, x.shape[-1]).contiguous() for name, x in every.items()}

    def modulated(self, h: Tensor, modulation: Tensor, at: int) -> Tensor:
        normal = (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True)
        return normal * (1 + modulation[:, at + 1])[:, None] + modulation[:, at][:, None]

    def output(self, name: str, x: Tensor) -> Tensor:
        if not self.scaled:
            self.weights[name] = self.weights[name] / (x.reshape(-1, self.width) @ self.weights[name].T).std()
        return x @ self.weights[name].T

    def attention(self, qkv: Tensor) -> Tensor:
        images, tokens, _ = qkv.shape
        q, k, v = qkv.reshape(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.width // self.heads) * 2.0
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(images, tokens, self.width)
