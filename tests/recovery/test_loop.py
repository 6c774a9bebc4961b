"""The loop: weights, the calls that are drawn, progress on held-out images, and runs that are interrupted."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative
from pixels import pixel_model

from svdit.errors import UserError
from svdit.model.config import FLOW
from svdit.model.dit import DiT
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.recovery import loop
from svdit.recovery.layers import TrainableLinear
from svdit.recovery.loop import RecoverOptions, Sampler, prepare, recover
from svdit.recovery.state import State
from svdit.recovery.states import TENTHS, Calls, Walk, Weights, measure, record
from svdit.sampling.calibration import calibration_loop
from svdit.sampling.numbers import RECOVERY_HELD_OUT, RECOVERY_REPORTED
from svdit.storage import pickles

OPTIONS = RecoverOptions(steps=4)
WALK = Walk(cfg_scale=1.5, seed=3, steps=10)
QUANTIZED: dict[str, DiT] = {}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images, calls and sampling steps."""
    for name, value in {"IMAGES": 4, "WALKS": 3, "STEPS": (3, 4), "REUSE": 3, "ROWS": 8, "EVERY": 2}.items():
        monkeypatch.setattr(loop, name, value)


def full_precision() -> DiT:
    """A flow of latents: a random one does not amplify errors, and their range is not clipped."""
    return pixel_model(in_channels=4, family="sit", **FLOW)


def quantized(preset: str = "w4a4") -> DiT:
    if preset not in QUANTIZED:
        QUANTIZED[preset] = full_precision()
        quantize_(QUANTIZED[preset], dit_config(recipe_for(preset, rank=4)), calibration_loop(images=4, steps=4))
    return copy.deepcopy(QUANTIZED[preset])


def test_the_rows_are_the_calls_of_the_model() -> None:
    teacher = full_precision()
    with torch.no_grad():
        calls = record(teacher, WALK, range(3))
        again = teacher(calls.x, calls.t, calls.y)[:, :4]
    assert len(calls.t) == 3 * 2 * 10
    assert relative(again, calls.target) < 1e-5
    null = calls.y == teacher.null_class
    assert calls.factor[null].unique(dim=0).tolist() == [[0.25] * 3 + [0]]
    assert calls.factor[~null].unique(dim=0).tolist() == [[2.25] * 3 + [1]]
    tenths = [sorted(set(calls.t.tolist())).index(t) for t in calls.t.tolist()]
    assert calls.place.tolist() == [tenth + TENTHS * half for tenth, half in zip(tenths, null.tolist(), strict=True)]


def test_a_weight_is_the_images_error_per_squared_error_of_outputs() -> None:
    teacher, student = full_precision(), quantized()
    with torch.no_grad():
        weights = measure(student, teacher, WALK, range(3))
        calls = record(teacher, WALK, range(3))
        last = calls.place % TENTHS == TENTHS - 1
        error = student(calls.x[last], calls.t[last], calls.y[last])[:, :4] - calls.target[last]
        conditional, null = error[0::2], error[1::2]
    guided = torch.cat([1.5 * conditional[:, :3] - 0.5 * null[:, :3], conditional[:, 3:]], dim=1)
    squares = [
        (factor * half[:, :3].square().sum() + last * half[:, 3:].square().sum()) / half.numel()
        for half, factor, last in ((conditional, 2.25, 1), (null, 0.25, 0))
    ]
    image = 0.1**2 * guided.square().mean()  # Euler's last step of ten: x + 0.1 v
    assert float(weights.weight[TENTHS - 1]) == pytest.approx(float(image / sum(squares)), rel=1e-3)
    shares = [float(weights.share[TENTHS - 1 + TENTHS * half]) for half in (0, 1)]
    assert shares == pytest.approx([float(image * square / sum(squares)) for square in squares], rel=1e-3)
    assert (weights.weight > 0).all()


def test_drawn_rows_stand_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    empty, place = torch.zeros(60), torch.arange(60) % 18  # the last two places have no rows
    factor = 1 + torch.rand(60, 1, generator=generator)
    weights = Weights(torch.rand(20, generator=generator), torch.rand(20, generator=generator) ** 4)
    sampler = Sampler(Calls(empty, empty, empty, empty, factor, place), weights)
    value = torch.rand(60, generator=generator)
    drawn = [sampler.draw(5, step) for step in range(500)]
    means = torch.stack([(weight[:, 0] * value[rows]).mean() for rows, weight in drawn])
    expected = float((factor[:, 0] * weights.weight[place] * value).mean())
    assert abs(float(means.mean()) - expected) < 4 * float(means.std()) / 500**0.5
    counts = torch.cat([rows for rows, _ in drawn]).bincount(minlength=60)
    assert (counts > 0).all() and counts.max() > 5 * counts.min()  # by their share
    assert torch.equal(sampler.draw(5, 7)[0], drawn[7][0])


def run(
    folder: Path, stop_at: int = -1, options: RecoverOptions = OPTIONS, walk: Walk = WALK, preset: str = "w4a4"
) -> State:
    """A recovery into a folder, interrupted after training step `stop_at`."""

    def progress(done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    student, binding = quantized(preset), {"seed": walk.seed}
    return recover(student, full_precision(), walk, options, folder / "state.pt", binding, progress)[0]


def test_progress_is_shown_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "prepare", interrupted)
    seen = list[tuple[int, int]]()
    with pytest.raises(KeyboardInterrupt):
        recover(quantized(), full_precision(), WALK, OPTIONS, tmp_path / "a.pt", {}, lambda *done: seen.append(done))
    assert seen == [(0, OPTIONS.steps)]


def test_images_come_nearer_to_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"IMAGES": 8, "ROWS": 32, "EVERY": 20}.items():
        monkeypatch.setattr(loop, name, value)
    student, teacher = quantized("w4a8"), full_precision()
    reported, held_out = (
        WALK.fidelity(full_precision(), first, loop.IMAGES) for first in (RECOVERY_REPORTED, RECOVERY_HELD_OUT)
    )
    before = reported(student)
    state, _ = recover(student, teacher, WALK, RecoverOptions(steps=60), tmp_path / "state.pt", {})
    assert reported(student).psnr > before.psnr + 0.5  # of images that chose nothing
    assert held_out(student) == (state.best_point.psnr, state.best_point.pooled)  # it ends with the best parameters


@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_interrupted_run_resumes_bit_for_bit(stop_at: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at)
    resumed = run(tmp_path / "parts")
    assert [point.step for point in resumed.curve] == [0, 2, 4] and resumed.curve == whole.curve
    one, other = (pickles.load(tmp_path / name / "state.pt") for name in ("whole", "parts"))
    for key in ("parameters", "average", "best"):
        assert all(torch.equal(tensor, other[key][name]) for name, tensor in one[key].items())
    assert all(tensor.any() for tensor in one["parameters"].values())
    assert not all(torch.equal(tensor, one["average"][name]) for name, tensor in one["parameters"].items())


def test_batches_change_rounding_only(tmp_path: Path) -> None:
    """Weight-only, where no activation is next to the middle of two codes."""
    teacher, small_batches = full_precision(), replace(WALK, batch_size=2)
    weights = [measure(quantized("w4a16"), teacher, walk, range(3)) for walk in (WALK, small_batches)]
    for one, other in zip(*weights, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-4)
    curves = [
        run(tmp_path / str(walk.batch_size), options=RecoverOptions(steps=2), walk=walk, preset="w4a16").curve
        for walk in (WALK, small_batches)
    ]
    for one, other in zip(*curves, strict=True):
        assert (one.loss or 0) == pytest.approx(other.loss or 0, rel=1e-4)
        assert one.psnr == pytest.approx(other.psnr, abs=0.01)


def test_a_state_of_another_run_or_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match=r"state.pt is of a run with seed 3, not 4; use the same, or choose another"):
        run(tmp_path, walk=Walk(cfg_scale=1.5, seed=4, steps=10))
    content = bytearray((tmp_path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"state.pt .*; move it away to start again, or choose another"):
        run(tmp_path)


def test_without_progress_it_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PATIENCE", 2)
    state = run(tmp_path, options=RecoverOptions(steps=50, lr=1e3))  # far too high a rate
    assert state.best_point.step == 0 and state.step == 4
    assert not any(parameter.any() for parameter in state.parameters.values())  # as they were


def test_layers_are_prepared_once_the_model_is_checked() -> None:
    layers = prepare(quantized(), full_precision(), WALK)
    assert all(isinstance(layer, TrainableLinear) for layer in layers.values()) and len(layers) == 6
    with pytest.raises(UserError, match="it is not quantized"):
        prepare(full_precision(), full_precision(), WALK)
