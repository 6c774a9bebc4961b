"""Cache plans by measurement: their cost and record, and that image sets do not depend on the batch."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import small
from pixels import Squash, pixel_model
from torch import Tensor

from svdit.diffusion.noise import image_labels, image_noise
from svdit.errors import UserError
from svdit.model.caching import CachePlan, cached
from svdit.model.dit import DiT
from svdit.sampling.batch import SamplingConfig, default_sampling, generate
from svdit.sampling.caching import Planner, Trajectories, groups_of, probes, sizes_of
from svdit.sampling.config import recorded
from svdit.sampling.dataset import generate_dataset
from svdit.sampling.numbers import CACHING
from svdit.storage.manifest import read_manifest


def config_of(model: DiT, **options: Any) -> SamplingConfig:
    if model.config.is_flow:
        return default_sampling(model.config, **{"sampler": "heun", "steps": "4", "cfg_scale": 2.0, **options})
    return SamplingConfig("ddim", "6", 2.0, **options)


def images_of(model: DiT, config: SamplingConfig, indices: range, plan: CachePlan | None = None) -> Tensor:
    noise = image_noise(0, indices, model.input_shape, torch.device("cpu"))
    follow = cached(model, plan, model.config.depth) if plan else model
    return generate(model, image_labels(0, indices, 5), config, noise=noise, evaluate=follow)


@pytest.mark.parametrize("family", ["dit", "jit", "lightningdit"])
def test_a_plan_keeps_its_budget_and_records_its_error(family: str) -> None:
    model = small(family)
    options = {"cfg_interval": (0.1, 1.0)} if family == "lightningdit" else {}
    config, done = config_of(model, **options), list[tuple[int, int | None]]()
    plan = Planner(model, config, images=1, progress=lambda *done_of: done.append(done_of)).plan(1.5)
    plan.check(model.config)
    assert [n for n, _ in done] == list(range(1, len(done) + 1)) and done[-1][1] == len(done)
    assert plan.sampling == recorded(config)
    sizes = sizes_of(model.config, plan.groups)
    rows = Trajectories(model, config, 0, range(2), lambda: None).measure(plan.groups).rows
    total = sum(rows) * sum(sizes)
    cost = sum(
        s * sum(r for r, x in zip(rows, runs, strict=True) if x == "1")
        for s, runs in zip(sizes, plan.runs, strict=True)
    )
    assert plan.record["speedup"] == pytest.approx(total / cost) and total / cost >= 1.5
    assert len(rows) == {"dit": 6, "jit": 7, "lightningdit": 6}[family]
    assert (min(rows), max(rows)) == ((1, 2) if family == "lightningdit" else (2, 2))
    for first, key in ((CACHING, "snr"), (CACHING + 1, "held_out_snr")):
        whole = images_of(model, config, range(first, first + 1))
        error = images_of(model, config, range(first, first + 1), plan) - whole
        assert plan.record[key] == pytest.approx(
            10 * np.log10(float(whole.square().sum() / error.square().sum())), abs=0.1
        )


def test_effects_and_products_are_those_of_the_trajectory() -> None:
    model = small("dit")
    config = config_of(model)
    own = Trajectories(model, config, 0, range(3), lambda: None)
    measurement = own.measure((0, 1))
    inputs, outputs = list[Tensor](), list[Tensor]()
    with (
        model.blocks[1].register_forward_pre_hook(lambda block, args: inputs.append(args[0])),
        model.blocks[2].register_forward_hook(lambda block, args, output: outputs.append(output)),
    ):
        images = generate(model, image_labels(0, range(3), 5), config, seed=0)
    assert torch.equal(images, own.images)
    deltas = torch.stack([after - before for before, after in zip(inputs, outputs, strict=True)]).double()
    conditional, other = (half.flatten(1) for half in deltas.chunk(2, dim=1))
    guided = other + 2 * (conditional - other)
    for kind, each in enumerate((conditional, guided)):
        assert measurement.products[kind, 1] == pytest.approx((each @ each.T).numpy(), rel=1e-5)
    plan = CachePlan((0, 1), ("111111", "111011"), ((), ((0.0, 1.0),)))
    change = float((images_of(model, config, range(3), plan) - images).double().square().sum())
    squared = float((guided[3] - guided[1]).square().sum())
    assert measurement.effects[1, 3] == pytest.approx(change / squared, rel=1e-3)


def test_groups_start_where_tokens_are_added() -> None:
    jit = small("jit", depth=5, context_start=2).config
    assert groups_of(jit, 1) == (0, 2) and groups_of(jit, 3) == (0, 2, 4)
    assert sizes_of(jit, (0, 2, 4)) == (2 * 4, 2 * 7, 7)
    assert groups_of(small("dit").config, 2) == (0, 2)


def test_probes_are_among_the_evaluations() -> None:
    assert probes([]) == [] and probes([3]) == [3] and probes([1, 4]) == [1, 4]
    assert probes(list(range(1, 50))) == [1, 13, 25, 37, 47, 48, 49]


@pytest.mark.parametrize(
    ("sampler", "speedup", "reason"),
    [("dopri5", 2, "dopri5 chooses its steps for each image"), ("euler", 9, "a speed-up of 9 is too high")],
)
def test_impossible_requests_are_refused(sampler: str, speedup: float, reason: str) -> None:
    model = small("sit")
    with pytest.raises(UserError, match=reason):
        Planner(model, config_of(model, sampler=sampler), images=1).plan(speedup)


@pytest.fixture(scope="module")
def planned() -> Iterator[tuple[DiT, SamplingConfig]]:
    model, config = pixel_model(), SamplingConfig("ddim", "4", 2.0)
    runs, pairs = "1000", ((-30.0, 0.0),) * 3
    model.cache_plan = CachePlan((0,), (runs,), (pairs,), recorded(config), {"speedup": 4.0})
    yield model, config
    model.cache_plan = None


def test_sets_record_the_plan_and_do_not_depend_on_the_batch(
    planned: tuple[DiT, SamplingConfig], tmp_path: Path
) -> None:
    model, config = planned
    sets = [
        np.load(generate_dataset(model, tmp_path / str(n), 3, config, autoencoder=Squash(), batch_size=n))["arr_0"]
        for n in (1, 3)
    ]
    assert np.abs(sets[0].astype(int) - sets[1]).max() <= 1
    manifest = read_manifest(tmp_path / "1" / "manifest.json")
    assert manifest and manifest["caching"]["speedup"] == 4 and len(manifest["caching"]["sha256"]) == 16
    other = generate_dataset(model, tmp_path / "other", 3, replace(config, cfg_scale=1.5), autoencoder=Squash())
    assert read_manifest(other.with_suffix("") / "manifest.json")["caching"] is None  # type: ignore[index]
    plan, model.cache_plan = model.cache_plan, None
    whole = np.load(generate_dataset(model, tmp_path / "whole", 3, config, autoencoder=Squash()))["arr_0"]
    assert np.abs(whole.astype(int) - sets[0]).max() > 1
    with pytest.raises(UserError, match="belongs to a run with caching"):
        generate_dataset(model, tmp_path / "1", 3, config, autoencoder=Squash())
    model.cache_plan = plan
