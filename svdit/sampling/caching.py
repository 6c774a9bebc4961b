"""Cache plans by measurement on the model's own trajectories, checked on other images.

The effect of a group's error on the final images is measured by skipping the group in one evaluation and interpolated
between such PROBES. Plans of one, two and three groups of blocks are made, and the one with the least measured error is
kept: more groups have more freedom, but each then runs on what the others predict.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from svdit.diffusion.noise import image_labels, image_noise
from svdit.errors import UserError
from svdit.model.caching import Cache, CachePlan, Evaluate, cached
from svdit.model.dit import DiT, DiTConfig
from svdit.sampling.batch import SamplingConfig, generate
from svdit.sampling.cache_solver import Array, Measurement, Solver
from svdit.sampling.config import recorded
from svdit.sampling.numbers import CACHING

GROUPS = (1, 2, 3)
VALUES = 4096  # of each δ and image that enter the inner products
PROBES = (0.0, 0.25, 0.5, 0.75, 1.0)  # along the trajectory
ENDS = 2  # more evaluations that are probed before the last one, where effects fall


class Recorder:
    """Stands in for a `Cache`: keeps a trajectory's outputs and the δ of every group."""

    def __init__(self, model: DiT, groups: Sequence[int], scale: float, images: int) -> None:
        self.model, self.groups, self.ends = model, groups, (*groups[1:], model.config.depth)
        self.scale, self.images = scale, images
        self.outputs: list[Tensor] = []
        self.deltas: list[list[list[Tensor]]] = [[[] for _ in groups] for _ in range(2)]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model, (N, C, H, W) to (N, C or 2C, H, W)."""
        self.outputs.append(self.model(x, t, y, self))
        return self.outputs[-1]

    def runs(self, i: int) -> bool:
        """Every block."""
        return True

    def block(self, i: int, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """The tokens (N, L + T, D) behind block i."""
        if i in self.groups:
            self.start = x.clone()
        x = run(x)
        if i + 1 in self.ends:
            delta, g = some(x - self.start), self.ends.index(i + 1)
            conditional, other = delta[: self.images], delta[-self.images :]
            self.deltas[0][g].append(conditional)
            self.deltas[1][g].append(other + self.scale * (conditional - other))
        return x

    def products(self) -> Array:
        """The inner products (2, G, E, E) of the conditional and the guided δ."""
        kinds = [[torch.stack(group).flatten(1).double() for group in kind] for kind in self.deltas]
        return np.stack([np.stack([(m @ m.T).cpu().numpy() for m in kind]) for kind in kinds])


def some(delta: Tensor) -> Tensor:
    """At most VALUES values of each row (N, L + T, D), the same of all rows, (N, VALUES)."""
    flat = delta.flatten(1).float()
    if flat.shape[1] <= VALUES:
        return flat
    chosen = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")[:VALUES]
    return flat[:, chosen.to(flat.device)] * (flat.shape[1] / VALUES) ** 0.5


def groups_of(config: DiTConfig, count: int) -> tuple[int, ...]:
    """The first blocks of about `count` groups, of which one starts where context tokens are added."""
    size, middle = -(-config.depth // count), config.context_start if config.context_tokens else 0
    return (*range(0, middle, size), *range(middle, config.depth, size))


def sizes_of(config: DiTConfig, groups: Sequence[int]) -> tuple[int, ...]:
    """The cost of each group for one row: its blocks, each times its tokens."""
    tokens = (config.input_size // config.patch_size) ** 2
    blocks = [tokens + config.context_tokens * (i >= config.context_start) for i in range(config.depth)]
    return tuple(sum(blocks[a:b]) for a, b in zip(groups, (*groups[1:], config.depth), strict=True))


class Trajectories:
    """Those of some images of one model; `tick` counts them."""

    def __init__(self, model: DiT, config: SamplingConfig, seed: int, indices: range, tick: Callable[[], None]) -> None:
        self.model, self.config, self.seed, self.indices, self.tick = model, config, seed, indices, tick
        self.rows: list[int] = []  # of each evaluation, for one image: 2 with guidance

        def counted(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.rows.append(len(x) // len(indices))
            return cast(Tensor, model(x, t, y))

        self.images = self.sample(counted)
        self.period = -(-len(self.rows) // len(config.schedule(model.config)))  # evaluations per step
        self.places = [self._places(phase) for phase in range(self.period)]

    def _places(self, phase: int) -> list[int]:
        """The evaluations of one stage of the steps whose effect is measured."""
        rows = self.rows
        return probes([i for i in range(1, len(rows)) if i % self.period == phase and rows[i - 1] >= rows[i]])

    def sample(self, evaluate: Evaluate) -> Tensor:
        """The final images (N, C, H, W) with `evaluate` in place of the model."""
        noise = image_noise(self.seed, self.indices, self.model.input_shape, self.model.pos_embed.device)
        labels = image_labels(self.seed, self.indices, self.model.config.num_classes)
        images = generate(self.model, labels, self.config, noise=noise, evaluate=evaluate)
        self.tick()
        return images

    def error(self, evaluate: Evaluate) -> float:
        """‖error‖² of the final images."""
        return float((self.sample(evaluate) - self.images).double().square().sum())

    def snr(self, error: float) -> float:
        """10 log10 of ‖images‖² to a ‖error‖², in dB."""
        return 10 * float(np.log10(float(self.images.double().square().sum()) / max(error, 1e-30)))

    def measure(self, groups: tuple[int, ...]) -> Measurement:
        """The inner products of δ and the effects of their errors."""
        config, rows = self.model.config, self.rows
        recorder = Recorder(self.model, groups, self.config.scale(config), len(self.indices))
        self.sample(recorder)
        products, effects = recorder.products(), np.ones((len(groups), len(rows)))
        for phase, places in enumerate(self.places):  # the stages of a step differ in their effects
            stages = np.arange(phase, len(rows), self.period)
            for g in range(len(groups) if places else 0):
                found = [self.effect(recorder, products[rows[i] - 1, g], g, i) for i in places]
                effects[g, stages] = np.exp(np.interp(stages, places, np.log(found)))
        return Measurement(products, effects, tuple(rows), sizes_of(config, groups))

    def effect(self, recorder: Recorder, products: Array, g: int, i: int) -> float:
        """‖error‖² of the images per squared error of δ, where evaluation i reuses an earlier δ of group g.

        It is that of two evaluations before, if it can be: of the stage before in a Runge–Kutta step it may be all but
        equal, and the images of a quantized model then differ only because every change moves some of its roundings.
        """
        E, rows = len(self.rows), self.rows
        j, pair = (i - 2, (0.0, 1.0)) if i > 1 and rows[i - 2] >= rows[i] else (i - 1, (1.0, 0.0))
        runs = [f"{'1' * i}0{'1' * (E - i - 1)}" if n == g else "1" * E for n in range(len(recorder.groups))]
        pairs = [(pair,) if n == g else () for n in range(len(recorder.groups))]
        cache = Cache(CachePlan(tuple(recorder.groups), tuple(runs), tuple(pairs)), self.model.config.depth)

        def evaluate(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            cache.advance()
            return self.model(x, t, y, cache) if cache.evaluation >= i - 2 else recorder.outputs[cache.evaluation]

        error = float(products[i, i] + products[j, j] - 2 * products[i, j])
        return max(self.error(evaluate), 1e-30) / max(error, 1e-30)


def probes(evaluations: Sequence[int]) -> list[int]:
    """The evaluations among these whose effect is measured."""
    last = len(evaluations) - 1
    places = {round(share * last) for share in PROBES} | {max(last - n, 0) for n in range(ENDS + 1)}
    return [evaluations[n] for n in sorted(places)] if evaluations else []


class Planner:
    """A model measured once on `images` images, from which plans for any speed-up follow.

    `progress(done, total)` counts trajectories, those of one plan included.
    """

    def __init__(
        self,
        model: DiT,
        config: SamplingConfig,
        *,
        images: int = 8,
        seed: int = 0,
        progress: Callable[[int, int | None], None] = lambda done, total: None,
    ) -> None:
        """Raises UserError for a sampler without fixed steps."""
        if config.sampler == "dopri5":
            raise UserError("dopri5 chooses its steps for each image, so no plan fits; choose another sampler")
        self.model, self.config, self.progress = model, config, progress
        self.done = 0
        self.total: int | None = None
        self.settings = {"images": images, "seed": seed}
        self.own, self.others = (
            Trajectories(model, config, seed, range(first, first + images), self._tick)
            for first in (CACHING, CACHING + images)
        )
        groupings = dict.fromkeys(groups_of(model.config, count) for count in GROUPS)
        places = sum(map(len, self.own.places))
        self.total = self.done + sum(2 + places * len(groups) for groups in groupings) + 1
        self.solvers = {groups: Solver(self.own.measure(groups)) for groups in groupings}

    def _tick(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def plan(self, speedup: float) -> CachePlan:
        """The plan of at most 1/`speedup` of the block evaluations with the least measured error of all groupings.

        Its record has the SNR of the final images to those without caching, in dB, and that of as many other images.
        Raises UserError for a speed-up that is too high.
        """
        candidates: list[tuple[float, CachePlan]] = []
        for groups, solver in self.solvers.items():
            choice = solver.solve(speedup)
            record = {"speedup": solver.total / choice.cost}
            plan = CachePlan(groups, choice.runs, choice.coefficients, recorded(self.config), record)
            candidates.append((self.own.error(self._follow(plan)), plan))
        error, plan = min(candidates, key=lambda candidate: candidate[0])
        held_out = self.others.snr(self.others.error(self._follow(plan)))
        measured = {"snr": self.own.snr(error), "held_out_snr": held_out, **self.settings}
        return replace(plan, record=plan.record | measured)

    def _follow(self, plan: CachePlan) -> Evaluate:
        return cached(self.model, plan, self.model.config.depth)
