"""What is matched: calls of the full-precision model on its own trajectories, and how much each of them counts.

The weight of an output's squared error is measured. Where the quantized model computes one tenth of a trajectory and
full precision all else, it is the error of those images over the sum of the squared errors of the outputs. Unlike the
sampler's coefficients it includes what later steps correct, what clipping to the range of pixels removes, and how the
errors of neighbouring steps add up.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from svdit.model.config import DiTConfig
from svdit.model.dit import DiT
from svdit.sampling.batch import SamplingConfig
from svdit.sampling.calibration import calibration_sampling
from svdit.sampling.config import SCRIPTS
from svdit.sampling.fidelity import Fidelity, images

TENTHS = 10  # parts of a trajectory with one weight each
DRAWS = 8  # purpose of random streams; 0 to 7 are those of sampling and of training


@dataclass(frozen=True)
class Walk:
    """How the images of a run are sampled: with the guidance of the calibration, by DDIM or Euler's method.

    Image i is a function of (seed, i). `cfg_scale` None: that of the family's protocol.
    """

    cfg_scale: float | None = None
    seed: int = 0
    batch_size: int = 32
    steps: int = 50

    def sampling(self, config: DiTConfig) -> SamplingConfig:
        """The settings for a model."""
        sampling = calibration_sampling(config, self.steps, self.cfg_scale)
        if not config.is_flow:
            return sampling
        return replace(sampling, sampler="euler", steps=str(self.steps + SCRIPTS[config.family].counts_times))

    def batches(self, indices: range) -> list[range]:
        """The numbers of images, at most `batch_size` at once."""
        return [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]

    def images(self, model: DiT, indices: range, evaluate: Callable[..., Tensor] | None = None) -> Tensor:
        """Images (N, C, H, W), of pixels in their range; `evaluate` is called in place of the model."""
        return images(model, self.sampling(model.config), indices, seed=self.seed, evaluate=evaluate)

    def fidelity(self, model: DiT, first: int, count: int) -> Fidelity:
        """Measures others by the model's images `first` to `first + count - 1`."""
        sampling = self.sampling(model.config)
        return Fidelity(model, sampling, first, images=count, batch_size=self.batch_size, seed=self.seed)


class Calls(NamedTuple):
    """Calls of a model, in the order of the sampler: inputs, times, labels and predictions of M rows.

    `factor` is the guidance's for the errors of a row's channels, `place` the row's tenth, plus TENTHS for the null
    class.
    """

    x: Tensor  # (M, C, H, W)
    t: Tensor  # (M,)
    y: Tensor  # (M,)
    target: Tensor  # (M, C, H, W)
    factor: Tensor  # (M, C)
    place: Tensor  # (M,)


class Recorder:
    """Stands in for a model and keeps its calls."""

    def __init__(self, model: DiT, walk: Walk, images: int) -> None:
        self.model, self.images = model, images
        sampling = walk.sampling(model.config)
        self.scale, self.channels = sampling.scale(model.config), sampling.cfg_channels  # guided ones; None: all
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @property
    def tenths(self) -> list[int]:
        """The tenth of each call."""
        return [number * TENTHS // len(self.calls) for number in range(len(self.calls))]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model, (N, C, H, W) to (N, C or 2C, H, W)."""
        output: Tensor = self.model(x, t, y)
        self.calls.append((x, t, y, output))
        return output

    def factors(self, rows: int, channels: int) -> Tensor:
        """What guidance does to the squared errors of a call (N, C): s² and (s − 1)²; 1 and 0 where it does not act."""
        factors = torch.ones(rows, channels, device="cpu")
        if rows > self.images:
            factors[self.images :] = 0
            factors[: self.images, : self.channels] = self.scale**2
            factors[self.images :, : self.channels] = (self.scale - 1) ** 2
        return factors

    def flat(self) -> Calls:
        """All calls as rows, those of an image together: the order does not depend on the images at once."""
        x, t, y, outputs = (torch.cat(column) for column in zip(*self.calls, strict=True))
        rows = [len(call[0]) for call in self.calls]
        number = torch.cat([torch.arange(count, device="cpu") for count in rows])  # in its call
        factor = torch.cat([self.factors(count, x.shape[1]) for count in rows])
        tenths = torch.tensor(self.tenths, device="cpu").repeat_interleave(torch.tensor(rows, device="cpu"))
        place = tenths + TENTHS * (number >= self.images)
        order = (number % self.images).argsort(stable=True)
        calls = Calls(x, t, y, outputs[:, : x.shape[1]], factor.to(x), place)
        return Calls(*(column[order.to(column.device)] for column in calls))


def record(model: DiT, walk: Walk, indices: range) -> Calls:
    """The calls that sample images with `model`."""
    parts = []
    for part in walk.batches(indices):
        recorder = Recorder(model, walk, len(part))
        walk.images(model, part, recorder)
        parts.append(recorder.flat())
    return Calls(*(torch.cat(column) for column in zip(*parts, strict=True)))


class Weights(NamedTuple):
    """Of each tenth and half (2 TENTHS,): the weight of a squared error, and the share of the images' error."""

    weight: Tensor
    share: Tensor


def measure(student: DiT, teacher: DiT, walk: Walk, indices: range) -> Weights:
    """The weights, by images of their own."""
    images, outputs = torch.zeros(TENTHS, device="cpu"), torch.zeros(2, TENTHS, device="cpu")  # squared errors
    for batch in walk.batches(indices):
        recorder = Recorder(teacher, walk, len(batch))
        exact = walk.images(teacher, batch, recorder)
        for tenth in set(recorder.tenths):
            mixed = Mixed(student, recorder, tenth)
            error = (walk.images(teacher, batch, mixed) - exact).square().mean()
            images[tenth] += error.cpu() * len(batch)
            outputs[:, tenth] += mixed.errors * len(batch)
    weight = images / outputs.sum(0).clamp(min=1e-30)
    return Weights(weight.repeat(2), (weight * outputs / len(indices)).flatten())


class Mixed:
    """A trajectory of which the student makes the calls of one tenth."""

    def __init__(self, student: DiT, recorder: Recorder, tenth: int) -> None:
        self.student, self.recorder, self.tenth = student, recorder, tenth
        self.number, self.errors = 0, torch.zeros(2, device="cpu")  # of calls; sums of the halves' squared errors

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C or 2C, H, W)"""
        place, (*_, known) = self.recorder.tenths[self.number], self.recorder.calls[self.number]
        self.number += 1
        if place < self.tenth:
            return known
        exact: Tensor = self.recorder.model(x, t, y)
        if place > self.tenth:
            return exact
        output: Tensor = self.student(x, t, y)
        squares = (output - exact)[:, : x.shape[1]].square().mean((2, 3)).cpu() * self.recorder.factors(*x.shape[:2])
        for half, errors in enumerate(torch.split(squares, self.recorder.images)):
            self.errors[half] += errors.mean()
        return output
