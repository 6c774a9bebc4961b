"""Respaced schedules against the published ones."""

import numpy as np
import pytest
from conftest import Golden
from hypothesis import given
from hypothesis import strategies as st

from svdit.diffusion.schedule import TIMESTEPS, make_schedule, spaced_timesteps
from svdit.errors import UserError


@pytest.mark.parametrize("spacing", ["4", "10", "20", "50", "100", "250", "ddim50"])
def test_timesteps_equal_published(golden: Golden, spacing: str) -> None:
    assert spaced_timesteps(spacing) == golden[f"timestep_map_{spacing}"].tolist()


@pytest.mark.parametrize("spacing", ["20", "50", "100", "250", "ddim50"])
def test_posterior_equals_published(golden: Golden, spacing: str) -> None:
    schedule = make_schedule(spacing)
    for ours, key in (
        (schedule.alphas_cumprod, "alphas_cumprod"),
        (schedule.posterior_variance, "posterior_variance"),
        (schedule.posterior_log_variance, "posterior_log_variance_clipped"),
    ):
        np.testing.assert_allclose(ours, golden.arrays[f"{key}_{spacing}"], rtol=1e-9)


@pytest.mark.parametrize("spacing", ["4", "10"])
def test_betas_equal_published(golden: Golden, spacing: str) -> None:
    np.testing.assert_allclose(make_schedule(spacing).betas, golden.arrays[f"betas_{spacing}"], rtol=1e-9)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=5))
def test_sections_are_ascending_and_counted(counts: list[int]) -> None:
    timesteps = spaced_timesteps(",".join(map(str, counts)))
    assert len(timesteps) == sum(counts)
    assert timesteps == sorted(set(timesteps))
    assert 0 <= timesteps[0] <= timesteps[-1] < TIMESTEPS


@pytest.mark.parametrize(
    "bad", ["0", "-3", "ten", "", "1001", "ddim7,", "ddim999", "ddim1", "3,,4", "2.5", "ddim10,20", "ddim", "9" * 5000]
)
def test_impossible_spacings_are_sentences(bad: str) -> None:
    with pytest.raises(UserError, match=r"use|choose"):
        make_schedule(bad)


def test_ddim_spacings_are_the_published_ones() -> None:
    """guided-diffusion's rule: the first stride below 1000 that selects as many timesteps as asked for."""
    for count in range(1, TIMESTEPS + 1):
        strides = [n for n in range(1, TIMESTEPS) if len(range(0, TIMESTEPS, n)) == count]
        if strides:
            assert spaced_timesteps(f"ddim{count}") == list(range(0, TIMESTEPS, strides[0]))
        else:
            with pytest.raises(UserError, match="no stride selects"):
                spaced_timesteps(f"ddim{count}")
