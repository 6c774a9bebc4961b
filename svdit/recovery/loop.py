"""The training loop: calls of the quantized model match those of full precision on the same inputs.

    minimize Σ weight · |student(x, t, y) − teacher(x, t, y)|²           over both halves of guidance and all steps

The inputs are on the teacher's trajectories, so no data is needed, and always new ones, so none is learned by heart.
`states.measure` has the weights, by which an error counts as much as it changes the final images. Calls are drawn in
proportion to the root of their share of that. All draws are functions of the seed and of the step, so an interrupted
run resumes bit for bit.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdit.diffusion.noise import stream
from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.recovery.layers import TrainableLinear, check_trainable, observe, trainable_
from svdit.recovery.state import State, fresh, restore_, save
from svdit.recovery.states import DRAWS, Calls, Walk, Weights, measure, record
from svdit.sampling.numbers import RECOVERY, RECOVERY_HELD_OUT, RECOVERY_WEIGHTS

IMAGES, WALKS = 32, 16  # of a measurement; trajectories at once to train on and to measure weights
STEPS, REUSE = (8, 9, 10, 11, 12), 4  # sampling steps of the trajectories, in turn; training steps that share some
ROWS = 64  # calls of a training step
WARMUP, EVERY, PATIENCE = 20, 100, 4  # training steps; between measurements; measurements without progress
UNIFORM = 0.1  # share of the calls that are drawn whatever their error


@dataclass(frozen=True)
class RecoverOptions:
    """Training steps, and the learning rate in units of each layer's rounding error."""

    steps: int = 1000
    lr: float = 0.01


class Sampler:
    """Draws calls: those of one tenth and half in proportion to the root of their share of the error."""

    def __init__(self, calls: Calls, weights: Weights) -> None:
        counts = calls.place.bincount(minlength=len(weights.share))
        share = weights.share.sqrt() * (counts > 0)
        chance = (1 - UNIFORM) * share / share.sum().clamp(min=1e-30) + UNIFORM * counts / counts.sum()
        self.chance = (chance / counts.clamp(min=1))[calls.place].double()  # (M,), of each row
        mean = weights.weight[calls.place] / (self.chance * len(self.chance))
        self.calls, self.ends = calls, self.chance.cumsum(0)
        self.weight = calls.factor * mean.to(calls.factor)[:, None]  # (M, C)

    def draw(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Rows (ROWS,) of a step, and the weights of their channels (ROWS, C)."""
        uniform = torch.from_numpy(stream(seed, step, DRAWS).random(ROWS)) * self.ends[-1]
        rows = torch.searchsorted(self.ends, uniform).clamp(max=len(self.ends) - 1)
        return rows, self.weight[rows.to(self.weight.device)]


class Source:
    """The calls to match at each training step."""

    def __init__(self, student: DiT, teacher: DiT, walk: Walk) -> None:
        self.teacher, self.walk = teacher, walk
        self.weights = measure(student, teacher, walk, range(RECOVERY_WEIGHTS, RECOVERY_WEIGHTS + WALKS))
        self.samplers: dict[int, Sampler] = {}  # the last one, by its number

    @torch.no_grad()
    def at(self, step: int) -> Sampler:
        """Those of a training step."""
        number = step // REUSE
        if number not in self.samplers:
            self.samplers = {number: Sampler(calls_of(self.teacher, self.walk, number), self.weights)}
        return self.samplers[number]


def calls_of(teacher: DiT, walk: Walk, number: int) -> Calls:
    """The teacher's calls on trajectories of their own for each number."""
    first = RECOVERY + number * WALKS
    return record(teacher, replace(walk, steps=STEPS[number % len(STEPS)]), range(first, first + WALKS))


@torch.no_grad()
def prepare(student: DiT, teacher: DiT, walk: Walk) -> dict[str, TrainableLinear]:
    """Make the layers of the student trainable, in place. Raises UserError for one without a low-rank branch."""
    check_trainable(student)
    calls = calls_of(teacher, walk, 0)
    parts = torch.split(torch.arange(len(calls.t), device="cpu"), 2 * walk.batch_size)
    return trainable_(student, observe(student, teacher, lambda: [student(*(x[i] for x in calls[:3])) for i in parts]))


def recover(
    student: DiT,
    teacher: DiT,
    walk: Walk,
    options: RecoverOptions,
    path: Path,
    binding: dict[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[State, dict[str, TrainableLinear]]:
    """Train the student's layers; resumes from `path` if it exists. They end with the best parameters.

    `binding`: what must match on resume. `progress(done, total)` counts training steps. Raises UserError for a student
    without a low-rank branch, for a loss that is not finite, and for a state of another run.
    """
    progress(0, options.steps)  # what comes first takes minutes
    layers = prepare(student, teacher.requires_grad_(False), walk)
    source, state = Source(student, teacher, walk), fresh(layers, options.lr)
    held_out = walk.fidelity(teacher, RECOVERY_HELD_OUT, IMAGES)
    if path.exists():
        restore_(state, path, binding)
    start = time.perf_counter() - state.seconds
    if not state.curve:
        state.add(None, held_out(student))
    losses: list[float] = []
    while state.step < options.steps and state.idle < PATIENCE:
        losses.append(training_step(state, student, source, options))
        progress(state.step, options.steps)
        if state.step % EVERY == 0 or state.step == options.steps:
            with state.averaged():
                measured = held_out(student)
            state.add(math.fsum(losses) / len(losses), measured)
            losses.clear()
            state.seconds = time.perf_counter() - start
            save(state, path, binding)
    state.load(state.best)
    return state, layers


def training_step(state: State, student: DiT, source: Source, options: RecoverOptions) -> float:
    """One update of the parameters; returns the loss. Raises UserError where it is not finite."""
    sampler, size, total = source.at(state.step), 2 * source.walk.batch_size, 0.0
    rows, weights = sampler.draw(source.walk.seed, state.step)
    calls = sampler.calls
    for i, weight in zip(torch.split(rows, size), torch.split(weights, size), strict=True):
        output = student(calls.x[i], calls.t[i], calls.y[i])[:, : calls.x.shape[1]]
        loss = (weight * (output - calls.target[i]).square().mean((2, 3))).mean(1).sum() / ROWS
        torch.autograd.backward(loss)
        total += float(loss.detach())
    if not math.isfinite(total):
        raise UserError(f"the loss is {total:g} at training step {state.step}; quantize with more bits")
    for group in state.optimizer.param_groups:
        group["lr"] = options.lr * rate(state.step, options.steps)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.advance()
    return total


def rate(step: int, steps: int) -> float:
    """The share of the learning rate: a linear rise, and a cosine to 0."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
