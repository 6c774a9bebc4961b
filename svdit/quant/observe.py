"""Calibration statistics of a layer's inputs: mean, second moment, extremes, and a sample of rows.

All later steps need only these: mean and second moment of ((x − μ)/λ)H follow from those of x.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdit.errors import UserError

ForwardLoop = Callable[[nn.Module], Any]
SAMPLE = 1024  # rows kept: half to select by, half held out
BLOCK = 512  # rows of the Gram matrix that are computed together


@dataclass
class Statistics:
    """Of all rows x (I,) that entered one layer."""

    count: int
    total: Tensor  # (I,) float64
    gram: list[Tensor]  # Σ x xᵀ in float64: BLOCK rows each, from the diagonal block on; the rest follows by symmetry
    minimum: Tensor  # (I,)
    maximum: Tensor  # (I,)
    buffer: Tensor  # (SAMPLE, I), preallocated to avoid heap fragmentation
    keys: Tensor  # the sample's random keys, ascending; on the CPU, as their generator is

    @classmethod
    def empty(cls, features: int, device: torch.device) -> "Statistics":
        """Statistics of no rows."""
        zeros = torch.zeros(features, dtype=torch.float64, device=device)
        infinity = torch.full((features,), torch.inf, device=device)
        starts = range(0, features, BLOCK)
        gram = [zeros.new_zeros(min(BLOCK, features - i), features - i) for i in starts]
        keys = torch.empty(0, device="cpu")
        return cls(0, zeros, gram, infinity, -infinity, infinity.new_empty(SAMPLE, features), keys)

    @staticmethod
    def nbytes(features: int) -> int:
        """Bytes of the statistics of an input of that width, within a few rows."""
        return 4 * features * (features + BLOCK) + 4 * SAMPLE * features

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Include the rows of x (M, I)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.count += len(x)
        self.total += x.sum(0, dtype=torch.float64)
        for i, block in zip(range(0, x.shape[1], BLOCK), self.gram, strict=True):
            block += x[:, i : i + BLOCK].T @ x[:, i:]
        self.minimum, self.maximum = torch.minimum(self.minimum, x.amin(0)), torch.maximum(self.maximum, x.amax(0))
        # The rows with the smallest of uniform random keys are a uniform sample.
        new = torch.rand(len(x), generator=generator, device="cpu")
        keys, order = torch.cat([self.keys, new]).sort(stable=True)
        rows = torch.cat([self.sample, x])
        self.keys = keys[:SAMPLE].clone()
        torch.index_select(rows, 0, order[:SAMPLE].to(x.device), out=self.sample)

    @property
    def sample(self) -> Tensor:
        """Up to SAMPLE rows (M, I), uniformly drawn."""
        return self.buffer[: len(self.keys)]

    @property
    def mean(self) -> Tensor:
        """E[x], (I,) fp32"""
        return (self.total / self.count).float()

    def second_moment(self, shift: Tensor | None) -> Tensor:
        """E[(x − shift)(x − shift)ᵀ], (I, I) float64, for a shift (I,)."""
        moment = self.total.new_empty(len(self.total), len(self.total))
        for i, block in zip(range(0, len(moment), BLOCK), self.gram, strict=True):
            moment[i : i + BLOCK, i:] = block / self.count
            moment[i + BLOCK :, i : i + BLOCK] = moment[i : i + BLOCK, i + BLOCK :].T
        if shift is None:
            return moment
        mean, s = self.total / self.count, shift.double()
        return moment.addr_(mean, s, alpha=-1).addr_(s, mean, alpha=-1).addr_(s, s)

    def vary(self, centre: bool) -> bool:
        """Whether the inputs, centred or not, are more than zeros and rounding errors: above 0.1 % of their RMS."""
        square = torch.cat([block.diagonal() for block in self.gram]) / self.count
        power = square - (self.total / self.count).square() if centre else square
        return bool(power.sum() > 1e-6 * square.sum())

    def absmax(self, shift: Tensor | None) -> Tensor:
        """max |x − shift| per channel, (I,)."""
        s = 0 if shift is None else shift
        return torch.maximum((self.maximum - s).abs(), (self.minimum - s).abs())

    @property
    def selection_rows(self) -> Tensor:
        """The half of the sample (M, I) that choices are based on."""
        return self.sample[::2]

    @property
    def holdout_rows(self) -> Tensor:
        """The other half (M, I), for reported errors."""
        return self.sample[1::2]


@torch.no_grad()
def observe(model: nn.Module, names: Iterable[str], loop: ForwardLoop, seed: int = 0) -> dict[str, Statistics]:
    """Run `loop(model)` once, in eval mode, and return the statistics of the named linears' inputs.

    Raises UserError for inputs with NaN or Inf and for layers that the loop does not reach.
    """
    statistics: dict[str, Statistics] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        # One generator per layer: its sample must not depend on which other layers are observed.
        generator = torch.Generator().manual_seed(seed)

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            if not x.numel():
                return
            if not x.isfinite().all():
                raise UserError(f"the input of {name} contains NaN or Inf; check the checkpoint and its dtype")
            with full_precision(x.device):
                if name not in statistics:
                    statistics[name] = Statistics.empty(x.shape[-1], x.device)
                statistics[name].add(x, generator)

        return add

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True))
        stack.enter_context(evaluating(model))
        loop(model)
    if missing := [name for name in names if name not in statistics]:
        raise UserError(f"the forward loop never reached {missing[0]}; skip this layer, or pass a loop that uses it")
    return statistics


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Leave the caller's autocast and inference mode: statistics are fp32 and outlive both."""
    with torch.inference_mode(False), torch.no_grad():
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def chunks(sizes: dict[str, int], max_memory: float) -> list[list[str]]:
    """Names in order, cut so that the bytes of each chunk stay within `max_memory`, or are of one layer.

    Raises UserError where `max_memory` is not positive.
    """
    if not max_memory > 0:
        raise UserError(f"max_memory is {max_memory}; pass a positive number of bytes")
    pieces: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not pieces or held + size > max_memory:
            pieces.append([])
            held = 0
        pieces[-1].append(name)
        held += size
    return pieces
