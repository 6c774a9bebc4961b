"""One stream per image: independent of batch size, order and neighbours."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from svdit.diffusion.noise import batch_noise, image_labels, image_noise

CPU, SHAPE = torch.device("cpu"), (2, 3, 3)


@given(st.permutations(range(6)), st.integers(0, 2**63 - 1))
def test_an_images_noise_depends_on_seed_and_index_only(order: list[int], seed: int) -> None:
    together = image_noise(seed, range(6), SHAPE, CPU)
    first, second = together(), together()
    for i in order:
        alone = image_noise(seed, [i], SHAPE, CPU)
        assert torch.equal(alone()[0], first[i])
        assert torch.equal(alone()[0], second[i])
    labels = image_labels(seed, range(6), 10)
    assert image_labels(seed, order, 10) == [labels[i] for i in order]


def test_noise_is_normal_and_images_are_independent() -> None:
    draw = image_noise(3, range(2000), (1, 4, 4), CPU)
    z, later = draw(), draw()
    assert kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    flat = torch.cat([z.flatten(1), later.flatten(1)], dim=1)
    correlation = torch.corrcoef(flat.T) - torch.eye(32)
    assert correlation.abs().max() < 0.1
    neighbours = (z[1:] * z[:-1]).mean()
    assert abs(float(neighbours)) < 0.03


def test_labels_are_uniform() -> None:
    assert chisquare(np.bincount(image_labels(0, range(5000), 10), minlength=10)).pvalue > 1e-3


def test_batch_noise_keeps_the_published_draw_order() -> None:
    generator = torch.Generator().manual_seed(7)
    z, first, second = (torch.randn(rows, *SHAPE, generator=generator) for rows in (2, 4, 4))
    draw = batch_noise(7, (2, *SHAPE), CPU, doubled=True)
    assert torch.equal(draw(), z)
    assert torch.equal(draw(), first[:2])
    assert torch.equal(draw(), second[:2])
