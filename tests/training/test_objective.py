"""Every family trains: its times, its loss, and runs that resume bit for bit and fit a few images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SMALL, VARIANTS, small
from scipy.stats import kstest, norm
from torch import Tensor

from svdit.diffusion.noise import stream
from svdit.errors import UserError
from svdit.model.config import FAMILIES, DiTConfig
from svdit.model.dit import DiT
from svdit.training.data import LabelledImages
from svdit.training.loop import TrainOptions, held_out_error, train
from svdit.training.monitor import read_curve
from svdit.training.objective import LOGNORMAL, PARTS, draw_times, losses
from svdit.training.state import State

FLOWS = [family for family in FAMILIES if family != "dit"]
PIXELS = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (4, 3, 4, 4)).astype(np.float32))
OPTIONS = {"global_batch_size": 4, "lr": 1e-3, "ema_decay": 0.9, "log_every": 2, "checkpoint_every": 4, "workers": 0}
STREAMS = [stream(0, n, 4) for n in range(2000)]


def config_of(family: str, **fields: Any) -> DiTConfig:
    shape = {**SMALL, "in_channels": 3, "depth": 2}
    return DiTConfig(**{**shape, "family": family, **FAMILIES[family], **VARIANTS[family], **fields})


def run(family: str, folder: Path, read: Any = PIXELS.__getitem__, **options: Any) -> State:
    torch.manual_seed(0)
    images = LabelledImages(read, np.arange(4), 5, 3)
    return train(DiT(config_of(family)), images, TrainOptions(**{**OPTIONS, "steps": 8, **options}), folder)


def test_every_family_has_a_loss() -> None:
    assert set(PARTS) == set(FAMILIES)


@pytest.fixture
def no_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling takes longer than these few steps."""
    monkeypatch.setattr("svdit.training.loop.sample_grid", lambda *arguments: None)


@pytest.mark.usefixtures("no_grids")
@pytest.mark.parametrize("family", ["lightningdit", "jit"])
def test_an_interrupted_run_resumes_bit_for_bit(family: str, tmp_path: Path) -> None:
    reads = iter(range(7 * 4))

    def dies_in_step_seven(i: int) -> Tensor:
        if next(reads) == 6 * 4:
            raise KeyboardInterrupt
        return PIXELS[i]

    whole = run(family, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(family, tmp_path / "killed", dies_in_step_seven)
    resumed = run(family, tmp_path / "killed")
    for kind in ("model", "ema"):
        expected, found = (getattr(state, kind).state_dict() for state in (whole, resumed))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    rows = read_curve(tmp_path / "killed" / "loss.csv", family)
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert all(float(row["loss"]) == pytest.approx(sum(float(row[part]) for part in PARTS[family])) for row in rows)


@pytest.mark.usefixtures("no_grids")
def test_a_run_keeps_its_family(tmp_path: Path) -> None:
    run("sit", tmp_path, steps=1)
    with pytest.raises(UserError, match="trained with family sit, not repa"):
        run("repa", tmp_path, steps=2)


@pytest.mark.usefixtures("no_grids")
@pytest.mark.parametrize("family", FLOWS)
def test_one_image_is_learned(family: str, tmp_path: Path) -> None:
    images = LabelledImages(PIXELS.__getitem__, np.zeros(1, dtype=np.int64), 5, 3)
    torch.manual_seed(0)
    untrained = held_out_error(DiT(config_of(family)), images, repeats=64)
    state = run(family, tmp_path, lambda i: PIXELS[0], steps=60, log_every=60, checkpoint_every=60, lr=5e-3)
    assert held_out_error(state.ema, images, repeats=64) < 0.75 * untrained


@pytest.mark.parametrize("family", FLOWS)
def test_every_parameter_has_a_finite_gradient(family: str) -> None:
    model = small(family, in_channels=3).train()
    t, y = draw_times(model.config, STREAMS[:4]), torch.tensor([0, 1, 2, model.null_class])
    parts = losses(model.config, lambda x, t: model(x, t, y), PIXELS, torch.randn_like(PIXELS), t)
    torch.stack(parts).sum().backward()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("family", FLOWS)
def test_times_have_the_familys_distribution(family: str) -> None:
    t = draw_times(config_of(family), STREAMS)
    mean, std = LOGNORMAL.get(family, (0.0, 1.0))
    uniform = norm.cdf(torch.logit(t.double()).numpy(), mean, std) if family in LOGNORMAL else t.numpy()
    assert t.dtype == torch.float32
    assert kstest(uniform, "uniform").pvalue > 1e-3


def test_the_noise_of_jit_is_scaled() -> None:
    seen = list[Tensor]()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    eps = torch.randn_like(PIXELS)
    for scale in (1.0, 2.0):
        losses(config_of("jit", noise_scale=scale), model, PIXELS, eps, torch.full((4,), 0.25))
    torch.testing.assert_close(seen[0], 0.25 * PIXELS + 0.75 * eps)
    torch.testing.assert_close(seen[1], 0.25 * PIXELS + 1.5 * eps)


def test_lognormal_times_need_a_path_that_has_them() -> None:
    with pytest.raises(UserError, match="path 'vp' are not supported"):
        draw_times(config_of("lightningdit", path="vp"), STREAMS[:1])
