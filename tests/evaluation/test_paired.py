"""Against scikit-image and by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svdit.evaluation.inputs import open_counterparts, open_set
from svdit.evaluation.jackknife import assign_blocks
from svdit.evaluation.options import Options
from svdit.evaluation.paired import pair_scores, paired_metrics, psnr, relative_l2, ssim
from svdit.evaluation.sources import ImageSet

from .conftest import make_images, write_folder

DISTANCES = {"psnr": psnr, "ssim": ssim, "relative_l2": relative_l2}


def noisy(image: np.ndarray, amount: float) -> np.ndarray:
    return np.clip(image + np.random.RandomState(1).randn(*image.shape) * amount, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(11, 11, 3), (24, 40, 3)])
@pytest.mark.parametrize("amount", [1, 20, 100])
def test_psnr_and_ssim_are_scikit_images(shape: tuple[int, int, int], amount: float):
    a = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    b = noisy(a, amount)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-12)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert ssim(a, b) == pytest.approx(structural_similarity(a, b, channel_axis=2, **options), abs=1e-10)
    assert ssim(a, b) < 1


def test_identical_images():
    a = make_images(1)[0]
    assert (psnr(a, a), relative_l2(a, a)) == (100, 0)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_relative_l2_by_hand():
    a, b = (np.full((2, 2, 3), level, np.uint8) for level in (255, 0))
    assert relative_l2(a, b) == 2  # 1 against -1
    assert relative_l2(b, b) == 0


def test_ssim_is_nan_for_images_smaller_than_the_window():
    a = np.zeros((10, 64, 3), np.uint8)
    assert np.isnan(ssim(a, a))


def sets(tmp_path: Path, size: int = 12) -> tuple[ImageSet, ImageSet]:
    images = make_images(8, size)
    other = images.copy()
    other[2] = noisy(other[2], 30)
    other[5] = noisy(other[5], 60)
    fakes = open_set(write_folder(tmp_path / "fake", images), Options())
    return fakes, open_counterparts(write_folder(tmp_path / "full", other), fakes, Options())


def test_averages_over_pairs_and_counts_the_identical(tmp_path: Path):
    fakes, others = sets(tmp_path)
    scores = pair_scores(fakes, others, DISTANCES)
    estimates, psnrs = paired_metrics(scores, assign_blocks(8)), scores["psnr"]
    assert psnrs.argsort()[:2].tolist() == [5, 2]
    assert (psnrs == 100).sum() == estimates["identical_pairs"].value == 6
    assert estimates["psnr"].value == pytest.approx(psnrs.mean())
    assert estimates["psnr"].se == pytest.approx(psnrs.std(ddof=1) / np.sqrt(8))
    assert 0 < estimates["ssim"].value < 1


def test_pooled_psnr_is_that_of_all_pixels(tmp_path: Path):
    fakes, others = sets(tmp_path)
    blocks = assign_blocks(8)
    estimate = paired_metrics(pair_scores(fakes, others, DISTANCES), blocks)["psnr_pooled"]
    a, b = (np.stack([images.read(n) for n in range(8)]).astype(np.float64) for images in (fakes, others))
    by_hand = [10 * np.log10(255**2 / np.square(a - b)[blocks != k].mean()) for k in (-1, *range(8))]
    assert [estimate.value, *estimate.leave_out] == pytest.approx(by_hand, abs=1e-5)  # float32 decibels
    assert paired_metrics(pair_scores(fakes, fakes, DISTANCES), blocks)["psnr_pooled"].value == 100


def test_distances_can_be_added_and_small_images_have_no_ssim(tmp_path: Path):
    fakes, others = sets(tmp_path, size=8)
    distance = lambda a, b: float((a != b).any())  # noqa: E731
    estimates = paired_metrics(pair_scores(fakes, others, DISTANCES | {"lpips": distance}), assign_blocks(8))
    assert estimates["lpips"].value == 2 / 8
    assert estimates["ssim"].value is None
    assert "at least 11×11" in (estimates["ssim"].reason or "")
    scores = {"psnr": np.ones(2), "ssim": np.ones(2), "relative_l2": np.ones(2), "lpips": np.full(2, np.nan)}
    lpips = paired_metrics(scores, assign_blocks(2))["lpips"]
    assert lpips.value is None and lpips.reason == "images must be at least 16×16"


def test_distances_do_not_use_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """LPIPS is a network of convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed = pair_scores(*sets(tmp_path), {"tf32": lambda a, b: float(torch.backends.cudnn.allow_tf32)})
    assert allowed["tf32"].tolist() == [0] * 8
