"""Calibration statistics of a layer's inputs: mean, second moment, extremes, and a sample of rows.

All later steps need only these: mean and second moment of ((x − μ)/λ)H follow from those of x. Errors are reported on
rows that enter none of them: what the loop shows within `held_out`, else one of every GROUP examples. Whole examples
are held out, since the tokens of one image resemble each other.
"""

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.holdout import is_held_out
from svdit.quant.report import FEW

ForwardLoop = Callable[[nn.Module], Any]
SAMPLE = 512  # rows kept to base choices on, and as many held out
GROUP, TOKENS = 8, 64  # one of 8 examples is held out, of fewer none; and at most 64 rows of each are kept
BLOCK = 512  # rows of the Gram matrix that are computed together


class Example(NamedTuple):
    """An example that is held out, perhaps for a time."""

    key: float  # random
    rows: Tensor  # (M, I)
    keys: Tensor  # (M,), random


@dataclass
class Statistics:
    """Of all rows x (I,) that entered one layer, except for those held out."""

    count: int
    total: Tensor  # (I,) float64
    gram: list[Tensor]  # Σ x xᵀ in float64: BLOCK rows each, from the diagonal block on; the rest follows by symmetry
    minimum: Tensor  # (I,)
    maximum: Tensor  # (I,)
    buffer: Tensor  # (SAMPLE, I), preallocated to avoid heap fragmentation
    keys: Tensor  # the sample's random keys, ascending; on the CPU, as their generator is
    held: list[Example] = field(default_factory=list)  # those with the smallest keys, ascending; at most SAMPLE rows
    examples: int = 0
    marked: bool = False  # whether the loop marks what is held out

    @classmethod
    def empty(cls, features: int, device: torch.device) -> "Statistics":
        """Statistics of no rows."""
        zeros = torch.zeros(features, dtype=torch.float64, device=device)
        infinity = torch.full((features,), torch.inf, dtype=torch.float32, device=device)
        starts = range(0, features, BLOCK)
        gram = [zeros.new_zeros(min(BLOCK, features - i), features - i) for i in starts]
        keys = torch.empty(0, dtype=torch.float32, device="cpu")
        return cls(0, zeros, gram, infinity, -infinity, infinity.new_empty(SAMPLE, features), keys)

    @staticmethod
    def nbytes(features: int) -> int:
        """Bytes of the statistics of an input of that width, within a few rows."""
        return 4 * features * (features + BLOCK) + 4 * 2 * SAMPLE * features

    def add(self, x: Tensor, generator: torch.Generator, held_out: bool = False) -> None:
        """Include x (N, …, I) of N examples, or (M, I) of M. Which are held out does not depend on the batch size."""
        x = x.detach().float()
        x = x.flatten(1, -2) if x.ndim > 2 else x.reshape(-1, 1, x.shape[-1])  # (N, T, I)
        keys = torch.rand(len(x), 1 + x.shape[1], generator=generator, dtype=torch.float32, device="cpu")
        out: list[Example] = []
        if held_out and not self.marked:
            self.marked, self.held, out = True, [], self.held
        chosen = torch.full((len(x),), held_out, dtype=torch.bool, device="cpu") if self.marked else self._turns(len(x))
        for i in chosen.nonzero().flatten().tolist():
            left = self._hold(Example(float(keys[i, 0]), x[i], keys[i, 1:]))
            out += [] if held_out else left
        rest = (x[~chosen.to(x.device)], keys[~chosen, 1:]) if chosen.any() else (x, keys[:, 1:])
        rows, keys = rest[0].flatten(0, 1), rest[1].flatten()
        if out:
            rows = torch.cat([rows, *(example.rows for example in out)])
            keys = torch.cat([keys, *(example.keys for example in out)])
        if len(rows):
            self._include(rows, keys)

    def _turns(self, count: int) -> Tensor:
        """Whether each of the next examples is held out (count,): one of GROUP, at changing places: loops repeat."""
        numbers = torch.arange(self.examples, self.examples + count, device="cpu")
        self.examples += count
        return numbers % GROUP == (3 * (numbers // GROUP) + GROUP - 1) % GROUP

    def _hold(self, example: Example) -> list[Example]:
        """Hold out an example; returns those that must leave for it, or itself."""
        order = example.keys.argsort()[:TOKENS]
        kept = Example(example.key, example.rows[order.to(example.rows.device)], example.keys[order])
        insort(self.held, kept, key=lambda each: each.key)
        left: list[Example] = []
        while len(self.held) > 1 and sum(len(each.rows) for each in self.held) > SAMPLE:
            left.append(self.held.pop())
        return [example if each is kept else each for each in left]

    def _include(self, x: Tensor, keys: Tensor) -> None:
        """Include the rows of x (M, I), with their random keys (M,), in every statistic."""
        self.count += len(x)
        self.total += x.sum(0, dtype=torch.float64)
        for i, block in zip(range(0, x.shape[1], BLOCK), self.gram, strict=True):
            block += x[:, i : i + BLOCK].T @ x[:, i:]
        self.minimum, self.maximum = torch.minimum(self.minimum, x.amin(0)), torch.maximum(self.maximum, x.amax(0))
        # The rows with the smallest of uniform random keys are a uniform sample.
        keys, order = torch.cat([self.keys, keys]).sort(stable=True)
        rows = torch.cat([self.sample, x])
        self.keys = keys[:SAMPLE].clone()
        torch.index_select(rows, 0, order[:SAMPLE].to(x.device), out=self.sample)

    @property
    def sample(self) -> Tensor:
        """Up to SAMPLE rows (M, I), uniformly drawn, that choices are based on."""
        return self.buffer[: len(self.keys)]

    @property
    def mean(self) -> Tensor:
        """E[x], (I,) fp32"""
        return (self.total / self.count).float()

    def mean_square(self, shift: Tensor | None) -> Tensor:
        """E[(x − shift)²], (I,) fp32, for a shift (I,)."""
        squares = torch.cat([block.diagonal() for block in self.gram]) / self.count
        if shift is None:
            return squares.float()
        mean, s = self.total / self.count, shift.double()
        return (squares + s * (s - 2 * mean)).clamp(min=0).float()

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

    def expected_moment(self, shift: Tensor | None) -> Tensor:
        """`second_moment` for unseen rows: few rows correlate by chance, so covariances are shrunk towards zero.

        The weight has the least expected squared error for normal rows (Schäfer and Strimmer, 2005, target D):
        Σ Var(s_ij) / Σ s_ij² over i ≠ j, with Var(s_ij) = (s_ii s_jj + s_ij²) / rows. From FEW rows per feature on
        nothing is shrunk.
        """
        if self.count >= FEW * len(self.total):
            return self.second_moment(shift)
        mean = self.total / self.count
        S = self.second_moment(mean)
        variances = S.diagonal().clone()
        square = variances.square().sum()
        off = S.square().sum() - square
        weight = ((variances.sum().square() - square + off) / (self.count * off)).clamp(0, 1).nan_to_num(1.0)
        S.mul_(1 - weight).diagonal().copy_(variances)
        offset = mean if shift is None else mean - shift.double()
        return S.addr_(offset, offset)

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
    def holdout_rows(self) -> Tensor:
        """Rows (M, I) for reported errors, in no statistic; none where fewer than GROUP examples were seen."""
        return torch.cat([self.buffer[:0], *(example.rows for example in self.held)])


@torch.no_grad()
def observe(model: nn.Module, names: Iterable[str], loop: ForwardLoop, seed: int = 0) -> dict[str, Statistics]:
    """Run `loop(model)` once, in eval mode, and return the statistics of the named linears' inputs.

    Raises UserError for a loop that is no function, for inputs with NaN or Inf, and for layers that it does not reach.
    """
    statistics: dict[str, Statistics] = {}
    if not callable(loop):
        raise UserError(
            f"the forward loop is a {type(loop).__name__}; pass a function of the model, for example "
            "lambda model: [model(x) for x in batches]"
        )

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
                statistics[name].add(x, generator, is_held_out())

        return add

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True))
        stack.enter_context(evaluating(model))
        loop(model)
    if missing := [name for name in names if name not in statistics or not statistics[name].count]:
        raise UserError(
            f"the forward loop never reached {missing[0]}; skip this layer, or pass a loop that uses it at every run "
            "(over a list, for example, not over a generator)"
        )
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
    if not isinstance(max_memory, int | float) or not max_memory > 0:
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
