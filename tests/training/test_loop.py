"""A stopped run goes on bit for bit; every draw is its example's own; the loss falls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative
from scipy.stats import chisquare, kstest
from torch import Tensor

from svdit.errors import UserError
from svdit.model.dit import DiT, DiTConfig
from svdit.training.data import Pictures
from svdit.training.loop import DRAWS, TrainOptions, draws, held_out_error, train
from svdit.training.monitor import read_curve
from svdit.training.state import State

CPU = torch.device("cpu")
SMALL = DiTConfig(
    input_size=4, patch_size=2, in_channels=1, hidden_size=64, depth=1, num_heads=2, num_classes=3, learn_sigma=True
)
RANDOM = np.random.default_rng(0)
PIXELS = torch.from_numpy(RANDOM.uniform(-1, 1, (10, 1, 4, 4)).astype(np.float32))
PICTURES = Pictures(PIXELS.__getitem__, np.arange(10) % 3, 3, 1)
OPTIONS = {
    "global_batch_size": 4,
    "lr": 1e-3,
    "ema_decay": 0.9,
    "log_every": 2,
    "checkpoint_every": 4,
    "workers": 0,
}


def small() -> DiT:
    torch.manual_seed(0)
    return DiT(SMALL)


def noisy(x: Tensor) -> Tensor:
    """Samples, as a VAE's encoder does."""
    return x + torch.randn_like(x)


def run(folder: Path, steps: int = 8, pictures: Pictures = PICTURES, **changes: object) -> State:
    return train(small(), pictures, TrainOptions(**{**OPTIONS, "steps": steps, **changes}), folder, encode=noisy)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def losses(folder: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_curve(folder / "loss.csv")]


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    reads = iter(range(7 * 4))

    def dies_in_step_seven(i: int) -> Tensor:
        if next(reads) == 6 * 4:
            raise KeyboardInterrupt
        return PIXELS[i]

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", pictures=Pictures(dies_in_step_seven, PICTURES.labels, 3, 1))
    assert losses(tmp_path / "killed")[-1]["step"] == "6"
    resumed = run(tmp_path / "killed")
    assert equal(whole.model, resumed.model)
    assert equal(whole.ema, resumed.ema)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert [row["step"] for row in losses(tmp_path / "whole")] == ["2", "4", "6", "8"]
    assert not equal(whole.model, run(tmp_path / "seed", seed=1).model)


def test_a_run_that_goes_on_keeps_its_options(tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    with pytest.raises(UserError, match=r"trained with lr 0\.001, not 0\.1"):
        run(tmp_path, lr=0.1)
    with pytest.raises(UserError, match="trained with pictures 10, not 9"):
        run(tmp_path, pictures=Pictures(PIXELS.__getitem__, PICTURES.labels[:9], 3, 1))
    assert run(tmp_path, steps=2, log_every=1).step == 2


def test_a_run_killed_before_its_file_is_written_exports_again(tmp_path: Path) -> None:
    def dies(state: State) -> None:
        raise KeyboardInterrupt

    exported = []
    options = TrainOptions(**{**OPTIONS, "steps": 2})
    with pytest.raises(KeyboardInterrupt):
        train(small(), PICTURES, options, tmp_path, export=dies)
    train(small(), PICTURES, options, tmp_path, export=lambda state: exported.append(state.step))
    assert exported == [2]


def test_the_loss_falls_and_the_average_follows(tmp_path: Path) -> None:
    options = {**OPTIONS, "steps": 150, "log_every": 50, "checkpoint_every": 150}
    state = train(small(), PICTURES, TrainOptions(**options), tmp_path)
    curve = [float(row["mse"]) for row in losses(tmp_path)]
    assert curve[-1] < 0.7 * curve[0]
    assert 0 < relative(state.ema.blocks[0].mlp.fc1.weight, state.model.blocks[0].mlp.fc1.weight) < 0.2
    untrained = held_out_error(small(), PICTURES, lambda x: x)
    assert untrained == pytest.approx(1, abs=0.1)  # a new DiT says 0, and ε has variance 1
    assert held_out_error(state.ema, PICTURES, lambda x: x) < 0.8 * untrained


def test_draws_are_each_examples_own() -> None:
    eps, t, chance = draws(5, range(2000), DRAWS, (1, 2, 2), CPU)
    alone = draws(5, [17], DRAWS, (1, 2, 2), CPU)
    assert torch.equal(alone[0][0], eps[17])
    assert (alone[1], alone[2]) == (t[17], chance[17])
    assert kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest(chance.numpy(), "uniform").pvalue > 1e-3
    assert chisquare((t // 100).bincount(minlength=10).numpy()).pvalue > 1e-3
    assert int(t.max()) <= 999


@pytest.mark.parametrize(("dropout", "trained"), [(0.0, [True, True, True, False]), (1.0, [False, False, False, True])])
def test_dropped_labels_become_the_null_class(tmp_path: Path, dropout: float, trained: list[bool]) -> None:
    state = run(tmp_path, steps=4, label_dropout=dropout)
    before = small().y_embedder.embedding_table.weight
    assert (state.model.y_embedder.embedding_table.weight != before).any(1).tolist() == trained


def test_bf16_rounds_and_no_more(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b", bf16=True)
    weights = [state.model.blocks[0].mlp.fc1.weight for state in (a, b)]
    assert weights[1].dtype == torch.float32
    assert 0 < relative(weights[1], weights[0]) < 0.01
    first = [float(losses(tmp_path / name)[0]["loss"]) for name in "ab"]
    assert first[0] == pytest.approx(first[1], rel=0.01)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss is nan at step 4; start again with a smaller --lr"):
        run(tmp_path, lr=1e30, log_every=4)
    assert not (tmp_path / "last.pt").exists()


def test_what_a_checkpoint_leaves(tmp_path: Path) -> None:
    exported = []
    options = TrainOptions(**{**OPTIONS, "steps": 5})
    train(small(), PICTURES, options, tmp_path, held_out=PICTURES, export=lambda state: exported.append(state.step))
    assert exported == [4, 5]
    assert [row["held_out_mse"] != "" for row in losses(tmp_path)] == [False, True, True]
    for name in ("last.pt", "loss.png", "samples/0000004.png", "samples/0000005.png"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": float("nan")}, {"ema_decay": 1.1}, {"workers": -1}])
def test_impossible_options(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} cannot be {next(iter(wrong.values()))}"):
        TrainOptions(**wrong)


def test_batches_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdit.distributed.world_size", lambda: 3)
    with pytest.raises(UserError, match="batch of 4 cannot be shared by 3 processes"):
        TrainOptions(global_batch_size=4)
