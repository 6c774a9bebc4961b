"""The training loop: every example has its own time and noise; AdamW and a moving average of the weights.

Time, noise, the VAE encoder's noise and label dropout are functions of (seed, n), as is the order of the examples:
an interrupted run resumes from `last.pt` bit for bit, and the world size changes only rounding.
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
from svdit.diffusion.noise import image_noise, stream
from svdit.errors import UserError
from svdit.extras import require
from svdit.model.autoencoder import PIXELS, Autoencoder
from svdit.model.dit import DiT, DiTConfig
from svdit.pictures import subject
from svdit.training import ema
from svdit.training.data import Examples, LabelledImages, batches, share
from svdit.training.monitor import Curve, plot_curve, sample_grid
from svdit.training.objective import draw_times, losses
from svdit.training.state import State, fresh, restore_, save

# Purposes of random streams; 0 to 3 are those of sampling and of the data.
DRAWS, ENCODER, HELD_OUT, HELD_OUT_ENCODER = 4, 5, 6, 7


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training run; only the last four may change on resume."""

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
        """Raises UserError for values out of range and for a batch that the processes cannot share."""
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr is {self.lr}; choose a finite value above 0")
        for name, most in (("ema_decay", 1), ("label_dropout", 1), ("workers", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{name} is {getattr(self, name)}; choose a value from 0 to {most}")
        if self.global_batch_size % distributed.world_size():
            raise UserError(
                f"the global batch size is {self.global_batch_size}; "
                f"choose a multiple of the {distributed.world_size()} processes"
            )

    def binding(self) -> dict[str, Any]:
        """The options that must match on resume."""
        free = ("steps", "log_every", "checkpoint_every", "workers")
        return {key: value for key, value in asdict(self).items() if key not in free}


def train(
    model: DiT,
    images: LabelledImages,
    options: TrainOptions,
    folder: Path,
    *,
    name: str = "",
    autoencoder: Autoencoder = PIXELS,
    held_out: LabelledImages | None = None,
    export: Callable[[State], None] = lambda state: None,
    report: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> State:
    """Train `model`, on its device, into `folder`; resumes from `folder/last.pt` if it exists.

    The model learns the latents of `autoencoder`. Every `checkpoint_every` steps and at the end, rank 0 measures the
    error on `held_out`, writes `loss.png`, which shows `name`, and a grid of samples, calls `export` and writes
    `last.pt`.
    `report` gets a line every `log_every` steps; `progress(done, total)` counts steps.
    Raises UserError if the loss is not finite, the options differ from those of `last.pt`, or not all hosts see it; and
    without the statistics of latents that need them.
    """
    config = model.config
    if not config.has_null_class:
        raise UserError("the model has no null class for label dropout; train one with has_null_class=True")
    autoencoder = autoencoder.for_model(model.config)
    require("matplotlib")  # for loss.png: fail now, not at the first checkpoint
    state = fresh(model, options.lr)
    binding = {"family": config.family, **asdict(config), **options.binding(), "images": len(images)}
    if images.fingerprint:
        binding["data"] = f"{images.summary()} ({images.fingerprint[:16]})"
    if autoencoder.fingerprint:
        binding["vae"] = autoencoder.fingerprint
    if (folder / "last.pt").exists():
        restore_(state, folder / "last.pt", binding)
    if len(set(distributed.gather(state.step))) > 1:
        raise UserError(f"{folder / 'last.pt'} is not the same on all hosts; choose a folder that they share")
    chief = distributed.rank() == 0
    curve = Curve(folder / "loss.csv", state.step, config.family) if chief else None
    take_step = stepper(state, options, autoencoder)
    taken: list[Tensor] = []
    start = time.perf_counter() - state.seconds
    examples, steps = Examples(images, options.seed, options.augment), range(state.step, options.steps)
    for pixels, labels in batches(examples, steps, options.global_batch_size, options.workers):
        taken.append(take_step(pixels, labels))
        progress(state.step, options.steps)
        saving = state.step % options.checkpoint_every == 0 or state.step == options.steps
        if not saving and state.step % options.log_every:
            continue
        state.seconds = time.perf_counter() - start
        means = distributed.all_sum(torch.stack(taken).mean(0)) / distributed.world_size()
        taken.clear()
        if not means.isfinite().all():
            raise UserError(f"the loss is {means[0]:g} at training step {state.step}; start again with a smaller --lr")
        if curve:
            error = held_out_error(state.ema, held_out, autoencoder) if saving and held_out else None
            report(curve.add(state.step, means.tolist(), error, state.seconds))
        if saving and chief:
            about = subject(name or config.family, f"{len(images)} images of {images.num_classes} classes")
            plot_curve(folder / "loss.csv", folder / "loss.png", about, config.family)
            sample_grid(state.ema, autoencoder, folder / "samples" / f"{state.step:07d}.png", options.seed)
            export(state)
            save(state, folder / "last.pt", binding)  # last: a run stopped before it repeats this checkpoint
        distributed.barrier()
    return state


def stepper(state: State, options: TrainOptions, autoencoder: Autoencoder) -> Callable[[Tensor, Tensor], Tensor]:
    """One training step: a function of this process's images (N, C, H, W) and labels (N,) to the loss and its parts."""
    device, config = state.model.pos_embed.device, state.model.config
    network: nn.Module = state.model.train()
    if distributed.world_size() > 1:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    def take_step(pixels: Tensor, labels: Tensor) -> Tensor:
        numbers = share(state.step, options.global_batch_size)
        x0 = encoded(autoencoder, pixels, state.model, options.seed, numbers, ENCODER)
        eps, t, chance = draws(config, options.seed, numbers, DRAWS, device)
        y = torch.where(chance < options.label_dropout, state.model.null_class, labels.to(device))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                return network(x, t, y).float()

        parts = losses(config, denoise, x0, eps, t)
        means = torch.stack([sum(parts[1:], parts[0]), *parts]).mean(1)
        torch.autograd.backward(means[0])
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        ema.update_(state.ema, state.model, options.ema_decay, state.step)
        return means.detach()

    return take_step


def encoded(
    autoencoder: Autoencoder, pixels: Tensor, model: DiT, seed: int, numbers: Sequence[int], purpose: int
) -> Tensor:
    """Images (N, C, H, W) as the model's inputs; the encoder's noise is drawn from each example's own stream."""
    device = model.pos_embed.device
    if autoencoder.vae is None:
        return pixels.to(device)
    return autoencoder.encode(pixels.to(device), image_noise(seed, numbers, model.input_shape, device, purpose)())


def draws(
    config: DiTConfig, seed: int, numbers: Sequence[int], purpose: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (N, C, H, W), times (N,) and uniform numbers (N,) in [0, 1), each from its example's own stream."""
    streams = [stream(seed, n, purpose) for n in numbers]
    t = draw_times(config, streams)
    chance = torch.tensor([s.random() for s in streams], device="cpu")
    shape = config.in_channels, config.input_size, config.input_size
    eps = torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams]))
    return eps.to(device), t.to(device), chance.to(device)


@torch.no_grad()
def held_out_error(
    model: DiT, images: LabelledImages, autoencoder: Autoencoder = PIXELS, repeats: int = 4, batch_size: int = 256
) -> float:
    """Mean squared error of the prediction on held-out images, at the same times with the same noise every time."""
    device, config = model.pos_embed.device, model.config
    total, count = 0.0, repeats * len(images)
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        indices = [n % len(images) for n in numbers]
        pixels = torch.stack([images.read(i) for i in indices])
        x0 = encoded(autoencoder, pixels, model, 0, numbers, HELD_OUT_ENCODER)
        eps, t, _ = draws(config, 0, numbers, HELD_OUT, device)
        y = torch.from_numpy(images.labels[indices]).to(device)
        mse, *_ = losses(config, partial(model, y=y), x0, eps, t)
        total += float(mse.sum())
    return total / count
