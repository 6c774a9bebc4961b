"""The training loop of DiT: the loss of every example at its own timestep with its own noise, AdamW, moving average.

Timestep, noise and whether the label is hidden are functions of (seed, n), as the order of the examples is: a killed
run goes on from `last.pt` as if nothing had happened, and the number of processes changes only rounding.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from svdit import distributed
from svdit.diffusion.losses import training_loss
from svdit.diffusion.noise import stream
from svdit.diffusion.schedule import TIMESTEPS, make_schedule
from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.training import ema
from svdit.training.data import Examples, Pictures, batches, share
from svdit.training.monitor import Curve, plot_curve, sample_grid
from svdit.training.state import State, fresh, restore, save

DRAWS, ENCODER, HELD_OUT = 4, 5, 6  # purposes of streams; 0 to 3 are the samplers' and the data's
Codec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainOptions:
    """How to train; only the last four may change when a run goes on."""

    seed: int = 0
    global_batch_size: int = 256
    lr: float = 1e-4
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    augment: str = "flip"
    bf16: bool = False

    steps: int = 400_000
    log_every: int = 100
    checkpoint_every: int = 10_000
    workers: int = 4

    def __post_init__(self) -> None:
        for name, most in (("lr", math.inf), ("ema_decay", 1), ("label_dropout", 1), ("workers", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{name} cannot be {getattr(self, name)}; it lies between 0 and {most}")
        if self.global_batch_size % distributed.world_size():
            raise UserError(
                f"a global batch of {self.global_batch_size} cannot be shared by {distributed.world_size()} processes; "
                "choose a multiple"
            )

    def binding(self) -> dict[str, Any]:
        """The options that decide what a step computes."""
        free = ("steps", "log_every", "checkpoint_every", "workers")
        return {key: value for key, value in asdict(self).items() if key not in free}


def unchanged(x: Tensor) -> Tensor:
    return x


def train(
    model: DiT,
    pictures: Pictures,
    options: TrainOptions,
    folder: Path,
    *,
    encode: Codec = unchanged,
    decode: Codec = unchanged,
    held_out: Pictures | None = None,
    export: Callable[[State], None] = lambda state: None,
    report: Callable[[str], None] = print,
) -> State:
    """Train `model`, on its device, into `folder`; go on from `folder/last.pt` where there is one.

    `encode` takes pictures in [−1, 1] to what the model learns, `decode` back. Every `checkpoint_every` steps and at
    the end the first process measures the error on `held_out`, draws `loss.png` and a grid of samples, calls `export`
    and writes `last.pt`.
    """
    state = fresh(model, options.lr)
    binding = {**asdict(model.config), **options.binding(), "pictures": len(pictures)}
    if (folder / "last.pt").exists():
        restore(state, folder / "last.pt", binding)
    chief = distributed.rank() == 0
    curve = Curve(folder / "loss.csv", state.step) if chief else None
    take_step = stepper(state, options, encode)
    losses: list[Tensor] = []
    began = time.perf_counter() - state.seconds
    for images, labels in batches(
        Examples(pictures, options.seed, options.augment),
        range(state.step, options.steps),
        options.global_batch_size,
        options.workers,
    ):
        losses.append(take_step(images, labels))
        saving = state.step % options.checkpoint_every == 0 or state.step == options.steps
        if not saving and state.step % options.log_every:
            continue
        state.seconds = time.perf_counter() - began
        means = distributed.all_sum(torch.stack(losses).mean(0)) / distributed.world_size()
        losses.clear()
        if not means.isfinite().all():
            raise UserError(f"the loss is {means[0]:g} at step {state.step}; start again with a smaller --lr")
        if curve:
            error = held_out_error(state.ema, held_out, encode) if saving and held_out else None
            report(curve.add(state.step, means.tolist(), error, state.seconds))
        if saving and chief:
            plot_curve(folder / "loss.csv", folder / "loss.png")
            sample_grid(state.ema, decode, folder / "samples" / f"{state.step:07d}.png", options.seed)
            export(state)
            save(state, folder / "last.pt", binding)  # last: what is saved is never done again
        distributed.barrier()
    return state


def stepper(state: State, options: TrainOptions, encode: Codec) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that takes one step with this process's pictures and labels and returns its mean losses, (3,)."""
    device, schedule = state.model.pos_embed.device, make_schedule()
    network: nn.Module = state.model.train()
    if distributed.world_size() > 1:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    def take_step(images: Tensor, labels: Tensor) -> Tensor:
        numbers = share(state.step, options.global_batch_size)
        torch.manual_seed(int(stream(options.seed, numbers[0], ENCODER).integers(2**63)))  # a VAE's encoder samples
        x0 = encode(images.to(device))
        eps, t, chance = draws(options.seed, numbers, DRAWS, x0.shape[1:], device)
        y = torch.where(chance < options.label_dropout, state.model.null_class, labels.to(device))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                return network(x, t, y).float()

        losses = torch.stack(training_loss(denoise, x0, eps, schedule, t)).mean(1)
        torch.autograd.backward(losses[0])
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        ema.update(state.ema, state.model, options.ema_decay, state.step)
        return losses.detach()

    return take_step


def draws(
    seed: int, numbers: Sequence[int], purpose: int, shape: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (N, C, H, W), steps (N,) and uniform numbers (N,) in [0, 1), each from its example's own stream."""
    streams = [stream(seed, n, purpose) for n in numbers]
    t = torch.tensor([int(s.integers(TIMESTEPS)) for s in streams])
    chance = torch.tensor([s.random() for s in streams])
    eps = torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams]))
    return eps.to(device), t.to(device), chance.to(device)


@torch.no_grad()
def held_out_error(model: DiT, pictures: Pictures, encode: Codec, repeats: int = 4, batch_size: int = 256) -> float:
    """Mean squared error of ε on pictures never trained on, at the same timesteps with the same noise every time."""
    device, schedule = model.pos_embed.device, make_schedule()
    total, count = 0.0, repeats * len(pictures)
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        which = [n % len(pictures) for n in numbers]
        torch.manual_seed(start)
        x0 = encode(torch.stack([pictures.read(i) for i in which]).to(device))
        eps, t, _ = draws(0, numbers, HELD_OUT, x0.shape[1:], device)
        y = torch.from_numpy(pictures.labels[which]).to(device)
        total += float(training_loss(partial(model, y=y), x0, eps, schedule, t).mse.sum())
    return total / count
