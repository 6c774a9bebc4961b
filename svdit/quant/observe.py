"""What calibration must know of a layer's inputs: their mean, second moment, extremes, and a sample.

One Gram matrix and one mean serve smoothing, centring, rotation, GPTQ and the refit: those of ((x − μ)/λ)H follow
from those of x.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdit.errors import UserError

ForwardLoop = Callable[[nn.Module], None]
SAMPLE = 1024  # rows kept: half to choose by, half to report on
BLOCK = 512  # rows of the Gram matrix that are computed together


@dataclass
class Statistics:
    """Of all rows x (I,) that entered one layer."""

    count: int
    total: Tensor  # (I,) float64
    gram: list[Tensor]  # Σ x xᵀ in float64: rows of BLOCK, each from its diagonal block on; the rest mirrors them
    low: Tensor  # (I,)
    high: Tensor  # (I,)
    room: Tensor  # (SAMPLE, I), allocated once: what comes and goes a thousand times leaves holes of gigabytes
    keys: Tensor  # the sample's random keys, ascending

    @classmethod
    def empty(cls, features: int, device: torch.device) -> "Statistics":
        zeros = torch.zeros(features, dtype=torch.float64, device=device)
        infinity = torch.full((features,), torch.inf, device=device)
        starts = range(0, features, BLOCK)
        gram = [zeros.new_zeros(min(BLOCK, features - i), features - i) for i in starts]
        return cls(0, zeros, gram, infinity, -infinity, infinity.new_empty(SAMPLE, features), torch.empty(0))

    @staticmethod
    def nbytes(features: int) -> int:
        """What the statistics of so many features take, but for some rows: little more than half a matrix."""
        return 4 * features * (features + BLOCK) + 4 * SAMPLE * features

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Take in rows x (M, I)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.count += len(x)
        self.total += x.sum(0, dtype=torch.float64)
        for i, block in zip(range(0, x.shape[1], BLOCK), self.gram, strict=True):
            block += x[:, i : i + BLOCK].T @ x[:, i:]
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        keys, order = torch.cat([self.keys, torch.rand(len(x), generator=generator)]).sort(stable=True)
        both = torch.cat([self.sample, x])
        self.keys = keys[:SAMPLE].clone()
        torch.index_select(both, 0, order[:SAMPLE].to(x.device), out=self.sample)

    @property
    def sample(self) -> Tensor:
        """(up to SAMPLE, I), uniformly drawn"""
        return self.room[: len(self.keys)]

    @property
    def mean(self) -> Tensor:
        return (self.total / self.count).float()

    def second_moment(self, shift: Tensor | None) -> Tensor:
        """E[(x − shift)(x − shift)ᵀ], (I, I) float64."""
        moment = self.total.new_empty(len(self.total), len(self.total))
        for i, block in zip(range(0, len(moment), BLOCK), self.gram, strict=True):
            moment[i : i + BLOCK, i:] = block / self.count
            moment[i + BLOCK :, i : i + BLOCK] = moment[i : i + BLOCK, i + BLOCK :].T
        if shift is None:
            return moment
        mean, s = self.total / self.count, shift.double()
        return moment.addr_(mean, s, alpha=-1).addr_(s, mean, alpha=-1).addr_(s, s)

    def largest(self, shift: Tensor | None) -> Tensor:
        """max |x − shift| a channel, (I,)."""
        s = 0 if shift is None else shift
        return torch.maximum((self.high - s).abs(), (self.low - s).abs())

    @property
    def choosing(self) -> Tensor:
        """The half of the sample that choices are made on."""
        return self.sample[::2]

    @property
    def reporting(self) -> Tensor:
        """The half that choices never see."""
        return self.sample[1::2]


@torch.no_grad()
def observe(model: nn.Module, names: Iterable[str], loop: ForwardLoop, seed: int = 0) -> dict[str, Statistics]:
    """Run `loop(model)` once and return the statistics of the named linears' inputs. Hooks never outlive the call."""
    statistics: dict[str, Statistics] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        generator = torch.Generator().manual_seed(seed)  # one a layer: a sample must not depend on the others

        def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            if not torch.isfinite(x).all():
                raise UserError(
                    f"calibration met NaN or Inf in the input of {name}; check the checkpoint and its dtype"
                )
            if name not in statistics:
                statistics[name] = Statistics.empty(x.shape[-1], x.device)
            statistics[name].add(x, generator)

        return take

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook(name)))
        loop(model)
    if missing := [name for name in names if name not in statistics]:
        raise UserError(f"calibration never reached {missing[0]}; skip it, or give a forward loop that uses it")
    return statistics
