"""Measurements of quantized layers on inputs of the original layers.

    error of a group = ‖y' − y‖ / ‖y‖ over its rows,   y = x Wᵀ,   y' the quantized layer's output without its bias

The caller assigns each row of the model's batch to a group, an integer: its time for example.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdit.quant.linear import SVDLinear
from svdit.quant.observe import ForwardLoop
from svdit.quant.transforms import Transform

Group = Callable[..., Tensor]  # arguments of a forward call to the groups of its batch, (N,) integers
Inputs = dict[int, Tensor]  # per group, rows (M, I) in fp32
BINS = 101
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@torch.no_grad()
def layer_inputs(
    model: nn.Module, names: Iterable[str], loop: ForwardLoop, group: Group, rows: int, seed: int = 0
) -> dict[str, Inputs]:
    """Up to `rows` random input rows (M, I) per group for each named layer of `model`, recorded while `loop` runs.

    Hooks are removed in any case.
    """
    kept: dict[str, Inputs] = {name: {} for name in names}
    current: list[Tensor] = []  # groups of the running forward call; layer calls outside of one are not recorded

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        current[:] = [group(*inputs)]

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        current.clear()

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        generator = torch.Generator().manual_seed(seed)

        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2)  # (N·T, I)
            for keys in current:
                of_rows = keys.cpu().repeat_interleave(len(x) // len(keys))
                for key in sorted(set(keys.tolist())):
                    previous = kept[name].get(key, x[:0].float())
                    places = (of_rows == key).nonzero()[:, 0]
                    places = places[
                        torch.randperm(len(places), generator=generator, device="cpu")[: rows - len(previous)]
                    ]
                    kept[name][key] = torch.cat([previous, x[places.to(x.device)].float()])

        return record

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(enter))
        hooks.enter_context(model.register_forward_hook(leave))
        for name in kept:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(recorder(name)))
        loop(model)
    return kept


@torch.no_grad()
def relative_errors(linear: nn.Linear, layer: SVDLinear, inputs: Inputs) -> dict[int, float]:
    """The error of each group of rows (M, I); 0 if both layers output zeros."""
    sizes = [len(x) for x in inputs.values()]
    x = torch.cat(list(inputs.values()))
    y = linear(x.to(linear.weight.dtype)).float()
    noise = (layer(x) - y).square().sum(1)
    signal = (y if linear.bias is None else y - linear.bias.float()).square().sum(1)
    sums = zip(inputs, noise.split(sizes), signal.split(sizes), strict=True)
    return {key: float((n.sum() / s.sum().clamp(min=1e-30)).sqrt()) for key, n, s in sums}


@dataclass(frozen=True)
class Spectrum:
    """Singular values in descending order, over the Frobenius norm of W, or of Ŵ for the latter two."""

    rank: int
    original: list[float]  # of W
    transformed: list[float]  # of Ŵ = (W Λ) H
    remaining: list[float]  # of the residual Ŵ − L1 L2


@torch.no_grad()
def spectrum(linear: nn.Linear, layer: SVDLinear) -> Spectrum:
    """Singular values of a weight, after the transform, and without the low-rank branch."""
    W = linear.weight.float()
    What = transform_of(layer).weight(W)
    l1, l2 = layer.low_rank()
    original, transformed = singular_values(W), singular_values(What)
    remaining = singular_values(What - l1.to(W.device) @ l2.to(W.device))
    return Spectrum(
        layer.spec.rank,
        (original / above_zero(original.norm())).tolist(),
        (transformed / above_zero(transformed.norm())).tolist(),
        (remaining / above_zero(transformed.norm())).tolist(),
    )


def above_zero(norm: Tensor) -> Tensor:
    """A norm () to divide by: 0/0 is 0."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)


def singular_values(W: Tensor) -> Tensor:
    """Singular values (min(O, I),) in float64, descending, from the smaller Gram matrix: exact to 1e-8 σ₁."""
    W = W.double()
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def transform_of(layer: SVDLinear) -> Transform:
    """The transform of a layer's input."""
    return Transform(layer.in_shift, layer.in_scale, layer.spec.hadamard)


def scale_quantiles(layer: SVDLinear) -> list[float] | None:
    """Minimum, 10 %, 50 %, 90 % quantiles and maximum of λ; None for a layer without smoothing."""
    if layer.in_scale is None:
        return None
    return torch.quantile(layer.in_scale.float(), torch.tensor(QUANTILES, device=layer.in_scale.device)).tolist()


@dataclass(frozen=True)
class Histogram:
    """Fractions of values, over their RMS, in BINS equal bins from −limit to limit.

    `peak` is the mean over rows of absmax / RMS: the dynamic range that a scale per row must cover.
    """

    limit: float
    shares: list[float]
    peak: float


@torch.no_grad()
def histograms(layer: SVDLinear, x: Tensor) -> tuple[Histogram, Histogram]:
    """Histograms of inputs x (M, I) before and after the layer's transform, on the same bins."""
    rows = x.float(), transform_of(layer).inputs(x.float())
    both = [each / above_zero(each.square().mean().sqrt()) for each in rows]
    limit = max(float(each.abs().max()) for each in both) or 1.0  # of zeros
    before, after = (histogram(rows, limit) for rows in both)
    return before, after


def histogram(x: Tensor, limit: float) -> Histogram:
    """The histogram of rows x (M, I) of RMS 1."""
    shares = torch.histc(x, BINS, -limit, limit) / x.numel()
    peak = (x.abs().amax(1) / x.square().mean(1).sqrt().clamp(min=1e-30)).mean()
    return Histogram(limit, shares.tolist(), float(peak))
