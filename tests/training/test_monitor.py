"""The learning curve resumes with the run; sample grids have the right size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import small
from PIL import Image
from torch import Tensor

from svdit.diffusion.noise import image_noise
from svdit.diffusion.paths import Path as FlowPath
from svdit.diffusion.paths import velocity
from svdit.images import grid, to_uint8
from svdit.model.autoencoder import PIXELS, Autoencoder
from svdit.model.dit import DiT
from svdit.training.monitor import Curve, plot_curve, read_curve, sample_grid


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    curve = Curve(path, 0)
    for step in (10, 20, 30):
        curve.add(step, [3.0 / step, 2.0 / step, 1.0 / step], 0.5 if step == 20 else None, step / 10)
    Curve(path, 20).add(25, [0.1, 0.2, 0.3], None, 9)
    rows = read_curve(path)
    assert [row["step"] for row in rows] == ["10", "20", "25"]
    assert rows[1] == {
        "step": "20",
        "loss": "0.150000",
        "mse": "0.100000",
        "vb": "0.050000",
        "held_out_mse": "0.500000",
        "seconds": "2.0",
    }
    assert rows[2]["held_out_mse"] == ""
    plot_curve(path, tmp_path / "loss.png", "DiT-digits, 2026-11-28")
    assert np.asarray(Image.open(tmp_path / "loss.png")).std() > 1


def test_damaged_rows_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loss.csv"
    good = "10,3,2,1,,1.0"
    path.write_bytes(f"stfp\n{good}\n2O,3,2,1,,1\n20,3\n30,x,2,1,,1\n40,nan,2,1,,1\n\0\n".encode() + b"\xff\n")
    Curve(path, 50)
    assert path.read_text() == f"step,loss,mse,vb,held_out_mse,seconds\n{good}\n"
    assert "6 damaged rows of" in capsys.readouterr().err


class FirstThree(Autoencoder):
    """Shows the first three of four channels."""

    def __init__(self) -> None:
        super().__init__("first three")

    def decode(self, z: Tensor) -> Tensor:
        return z[:, :3]


def test_sample_grid_has_a_column_for_each_class(tiny: DiT, tmp_path: Path) -> None:
    sample_grid(tiny, FirstThree(), tmp_path / "a.png", seed=0)
    sample_grid(tiny, FirstThree(), tmp_path / "b.png", seed=0)
    image = np.asarray(Image.open(tmp_path / "a.png"))
    assert image.shape == (4 * 66 + 2, 5 * 66 + 2, 3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    tiny.config = replace(tiny.config, uint8="truncate")
    sample_grid(tiny, FirstThree(), tmp_path / "c.png", seed=0)
    darker = image.astype(int) - np.asarray(Image.open(tmp_path / "c.png"))
    assert set(np.unique(darker)) == {0, 1}


class Gaussian(DiT):
    """The best model of data N(0.1, 0.3²), as each family predicts it."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        noise, p = self.config.noise_scale, FlowPath(self.config.path, self.config.time).at(t.reshape(-1, 1, 1, 1))
        deviation = (x - 0.1 * p.alpha) / (p.alpha**2 * 0.3**2 + p.sigma**2 * noise**2)
        x0, eps = 0.1 + p.alpha * 0.3**2 * deviation, p.sigma * noise**2 * deviation
        return x0 if self.config.prediction == "x0" else velocity(x0, eps, p)


@pytest.mark.parametrize(("family", "noise_scale"), [("sit", 1.0), ("repa", 1.0), ("lightningdit", 1.0), ("jit", 2.0)])
def test_sample_grids_of_flows_show_what_the_model_learned(family: str, noise_scale: float, tmp_path: Path) -> None:
    model = Gaussian(small(family, in_channels=3, noise_scale=noise_scale).config)
    sample_grid(model, PIXELS, tmp_path / "grid.png", seed=3)
    x = 0.1 + 0.3 * image_noise(3, range(20), (3, 4, 4), torch.device("cpu"))()  # the flow moves every quantile
    expected = grid(to_uint8(x.clamp(-1, 1)), 5, scale=16)
    found = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    assert np.abs(found - expected).max() <= 2
