"""Training on a GPU: the loss, the backward pass, the optimizer, the moving average, resuming."""

from pathlib import Path

import numpy as np
import torch
from devices.fake_cuda import FakeCuda, state_of
from torch import Tensor

from svdit.model.dit import DiT, DiTConfig
from svdit.training.data import LabelledImages
from svdit.training.loop import TrainOptions, train
from svdit.training.monitor import read_curve
from svdit.training.state import State

CONFIG = DiTConfig(4, 2, 1, hidden_size=64, depth=1, num_heads=2, num_classes=3)
LR = 1e-3
PIXELS = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (10, 1, 4, 4)).astype(np.float32))
IMAGES = LabelledImages(PIXELS.__getitem__, np.arange(10) % 3, 3, 1)


def run(folder: Path, device: str, steps: int) -> State:
    torch.manual_seed(0)
    options = TrainOptions(
        global_batch_size=4, lr=LR, ema_decay=0.9, steps=steps, log_every=1, checkpoint_every=2, workers=0
    )
    return train(DiT(CONFIG).to(device), IMAGES, options, folder, held_out=IMAGES)


def losses(folder: Path) -> list[list[str]]:
    return [[row[key] for key in ("loss", "mse", "vb", "held_out_mse")] for row in read_curve(folder / "loss.csv")]


def test_a_resumed_run_trains_as_on_the_cpu(tmp_path: Path) -> None:
    """Two steps, a checkpoint, two more from it, with a grid of images: the same losses and, but for rounding, weights.

    The optimizer updates fake tensors one by one, and lists of real ones together.
    """
    states = []
    for steps in (2, 4):
        expected = run(tmp_path / "cpu", "cpu", steps)
        with FakeCuda(grad=True):
            state = run(tmp_path / "gpu", "cuda", steps)
            states = [state_of(state.model), state_of(state.ema)]
            moments: list[Tensor] = [x for each in state.optimizer.state.values() for x in each.values() if x.ndim]
            assert moments and all(x.is_cuda for x in moments)
    assert losses(tmp_path / "gpu") == losses(tmp_path / "cpu") != []
    for found, model in zip(states, (expected.model, expected.ema), strict=True):
        for name, x in model.state_dict().items():
            assert torch.allclose(found[name], x, atol=1e-2 * LR), name  # Adam changes a weight by about LR a step
    samples = [(tmp_path / device / "samples" / "0000004.png").read_bytes() for device in ("cpu", "gpu")]
    assert samples[0] == samples[1]
