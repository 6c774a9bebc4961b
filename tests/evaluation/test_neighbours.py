"""Against torch-fidelity, against NumPy with full matrices, and with tiles that do not divide the sizes."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from svdit.evaluation.jackknife import assign_blocks
from svdit.evaluation.neighbours import neighbour_metrics, radii


def rows(n: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy((np.random.RandomState(seed).randn(n, 6) * scale).astype(np.float32))


def by_full_matrices(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Kynkäänniemi et al. and Naeem et al. from (N, N) matrices in float64; squared distances, as ADM's evaluator."""

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)

    real_balls, fake_balls = (np.sort(squared(x, x), 1) for x in (real, fake))
    apart = squared(fake, real)
    return {
        "precision": (apart <= real_balls[:, 3]).any(1).mean(),
        "recall": (apart <= fake_balls[:, 3, None]).any(0).mean(),
        "density": (apart <= real_balls[:, 5]).sum(1).mean() / 5,
        "coverage": (apart <= real_balls[:, 5]).any(0).mean(),
    }


@pytest.mark.parametrize(("tile_rows", "tile_columns"), [(1024, 4096), (7, 5), (1, 1), (50, 3)])
def test_equals_numpy_for_every_tiling(tile_rows: int, tile_columns: int):
    real, fake = rows(40), rows(33, 1, 1.3)
    estimates = neighbour_metrics(real, fake, None, tile_rows, tile_columns)
    assert {name: estimate.value for name, estimate in estimates.items()} == pytest.approx(
        by_full_matrices(real.numpy(), fake.numpy())
    )


@pytest.mark.parametrize("save_ram", [False, True])
def test_precision_and_recall_are_exactly_torch_fidelitys(save_ram: bool):
    real, fake = rows(700), rows(500, 1, 1.2)
    estimates = neighbour_metrics(real, fake)
    options = {"prc_neighborhood": 3, "prc_batch_size": 10000, "save_cpu_ram": save_ram, "verbose": False}
    expected = prc_features_to_metric(fake, real, **options)
    for name, n in (("precision", 500), ("recall", 700)):  # counts, as torch-fidelity averages in float32
        assert estimates[name].value * n == pytest.approx(expected[name] * n, abs=1e-3)
    assert 0 < expected["precision"] < 1


def test_a_tight_cluster_has_high_precision_and_low_recall():
    estimates = neighbour_metrics(rows(200), rows(200, 1, 0.1))
    assert estimates["precision"].value > 0.95
    assert estimates["recall"].value < 0.2


def test_a_set_with_itself_is_perfect():
    estimates = neighbour_metrics(rows(50), rows(50))
    assert (estimates["precision"].value, estimates["recall"].value, estimates["coverage"].value) == (1, 1, 1)


def test_leave_out_values_equal_those_without_the_rows():
    real, fake, blocks = rows(40), rows(36, 1, 1.3), assign_blocks(36, blocks=5)
    estimates = neighbour_metrics(real, fake, blocks)
    for k in range(5):
        expected = by_full_matrices(real.numpy(), fake.numpy()[blocks != k])
        for name in ("precision", "density", "coverage"):
            assert estimates[name].leave_out[k] == pytest.approx(expected[name], abs=1e-9)
    assert estimates["recall"].leave_out == ()
    assert estimates["precision"].se > 0


def test_radii_are_sorted_distances_to_others():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    first, third = radii(x, (1, 3))
    assert first.tolist() == [1, 1, 2, 4]
    assert third.tolist() == [7, 6, 4, 7]


@pytest.mark.parametrize(("n_real", "n_fake"), [(5, 50), (50, 5)])
def test_too_few_images_are_refused(n_real: int, n_fake: int):
    with pytest.raises(ValueError, match=f"more than 5 images on both sides, found {n_real} and {n_fake}"):
        neighbour_metrics(rows(n_real), rows(n_fake))
