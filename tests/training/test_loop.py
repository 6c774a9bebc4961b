"""An interrupted run resumes bit for bit; every draw is its example's own; the loss falls."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize, relative
from scipy.stats import chisquare, kstest
from torch import Tensor
from worlds import in_world

from svdit import distributed
from svdit.diffusion.noise import image_noise
from svdit.errors import UserError
from svdit.model.autoencoder import Autoencoder
from svdit.model.config import FAMILIES
from svdit.model.dit import DiT, DiTConfig
from svdit.shims import allow_cpu_torchvision
from svdit.training import loop
from svdit.training.data import LabelledImages, share
from svdit.training.loop import DRAWS, TrainOptions, draws, held_out_error, train
from svdit.training.monitor import read_curve
from svdit.training.objective import losses
from svdit.training.state import State, fresh

CPU = torch.device("cpu")
SMALL = DiTConfig(
    input_size=4, patch_size=2, in_channels=1, hidden_size=64, depth=1, num_heads=2, num_classes=3, learn_sigma=True
)
RANDOM = np.random.default_rng(0)
PIXELS = torch.from_numpy(RANDOM.uniform(-1, 1, (10, 1, 4, 4)).astype(np.float32))
IMAGES = LabelledImages(PIXELS.__getitem__, np.arange(10) % 3, 3, 1)
COLOUR = torch.from_numpy(RANDOM.uniform(-1, 1, (8, 3, 8, 8)).astype(np.float32))
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


class Noisy(Autoencoder):
    """Adds the encoder's noise to pixels."""

    def __init__(self) -> None:
        super().__init__("noisy", vae=True)

    def encode(self, x: Tensor, noise: Tensor) -> Tensor:
        return x + noise

    def decode(self, z: Tensor) -> Tensor:
        return z


def run(folder: Path, steps: int = 8, images: LabelledImages = IMAGES, **changes: object) -> State:
    return train(small(), images, TrainOptions(**{**OPTIONS, "steps": steps, **changes}), folder, autoencoder=Noisy())


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def curve_of(folder: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_curve(folder / "loss.csv")]


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    reads = iter(range(7 * 4))

    def dies_in_step_seven(i: int) -> Tensor:
        if next(reads) == 6 * 4:
            raise KeyboardInterrupt
        return PIXELS[i]

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", images=LabelledImages(dies_in_step_seven, IMAGES.labels, 3, 1))
    assert curve_of(tmp_path / "killed")[-1]["step"] == "6"
    resumed = run(tmp_path / "killed")
    assert equal(whole.model, resumed.model)
    assert equal(whole.ema, resumed.ema)
    assert curve_of(tmp_path / "whole") == curve_of(tmp_path / "killed")
    assert [row["step"] for row in curve_of(tmp_path / "whole")] == ["2", "4", "6", "8"]
    assert not equal(whole.model, run(tmp_path / "seed", seed=1).model)


def test_a_resumed_run_keeps_its_options(tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    with pytest.raises(UserError, match=r"trained with lr 0\.001, not 0\.1"):
        run(tmp_path, lr=0.1)
    with pytest.raises(UserError, match="trained with images 10, not 9"):
        run(tmp_path, images=LabelledImages(PIXELS.__getitem__, IMAGES.labels[:9], 3, 1))
    other = DiT(replace(SMALL, family="sit", **FAMILIES["sit"]))
    with pytest.raises(UserError, match="trained with family dit, not sit"):  # named before what follows from it
        train(other, IMAGES, TrainOptions(**OPTIONS), tmp_path, autoencoder=Noisy())  # type: ignore[arg-type]
    assert run(tmp_path, steps=2, log_every=1).step == 2
    known = replace(IMAGES, classes=("cat", "cow", "dog"), fingerprint="0123")
    run(tmp_path, steps=3, images=known)  # which earlier versions did not record
    with pytest.raises(UserError, match=r"trained with data 10 images in 3 classes: cat … dog \(0123\), not 10 .*4567"):
        run(tmp_path, images=replace(known, fingerprint="4567"))


def test_a_run_is_bound_to_its_autoencoder(tmp_path: Path) -> None:
    """By the VAE's weights: its folder may have moved."""

    def resume(vae: torch.nn.Module) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "encoded", lambda autoencoder, pixels, *rest: pixels)
            patch.setattr(loop, "sample_grid", lambda *arguments: None)
            options = TrainOptions(**{**OPTIONS, "steps": 1})
            train(small(), IMAGES, options, tmp_path, autoencoder=Autoencoder("x", vae))

    vae = torch.nn.Linear(2, 2)
    resume(vae)
    resume(deepcopy(vae))
    with pytest.raises(UserError, match=r"trained with vae [0-9a-f]{16}, not [0-9a-f]{16}"):
        resume(torch.nn.Linear(2, 3))


def test_a_folder_that_hosts_do_not_share_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "0", steps=2)
    (tmp_path / "1").mkdir()

    def resume() -> str:
        with pytest.raises(UserError) as caught:
            run(tmp_path / str(distributed.rank()))
        return str(caught.value)

    for message in in_world(2, resume):
        assert "last.pt is not the same on all hosts; choose a folder that they share" in message


def test_a_run_interrupted_before_its_checkpoint_exports_again(tmp_path: Path) -> None:
    def dies(state: State) -> None:
        raise KeyboardInterrupt

    exported = []
    options = TrainOptions(**{**OPTIONS, "steps": 2})
    with pytest.raises(KeyboardInterrupt):
        train(small(), IMAGES, options, tmp_path, export=dies)
    train(small(), IMAGES, options, tmp_path, export=lambda state: exported.append(state.step))
    assert exported == [2]


def test_the_loss_falls_and_the_average_follows(tmp_path: Path) -> None:
    options = {**OPTIONS, "steps": 150, "log_every": 50, "checkpoint_every": 150}
    state = train(small(), IMAGES, TrainOptions(**options), tmp_path)
    curve = [float(row["mse"]) for row in curve_of(tmp_path)]
    assert curve[-1] < 0.7 * curve[0]
    assert 0 < relative(state.ema.blocks[0].mlp.fc1.weight, state.model.blocks[0].mlp.fc1.weight) < 0.2
    untrained = held_out_error(small(), IMAGES)
    assert untrained == pytest.approx(1, abs=0.1)  # a new DiT predicts 0, and ε has variance 1
    assert held_out_error(state.ema, IMAGES) < 0.8 * untrained


def tiny_vae() -> Autoencoder:
    allow_cpu_torchvision()
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=4)
    return Autoencoder("tiny", randomize(vae))


def latents(monkeypatch: pytest.MonkeyPatch, world: int, batch: int) -> Tensor:
    """What the model learns in the first 8 examples, by `world` processes in global batches of `batch`."""
    config = DiTConfig(4, 2, 4, hidden_size=64, depth=1, num_heads=2, num_classes=3)
    captured: dict[int, Tensor] = {}
    monkeypatch.setattr(loop, "DistributedDataParallel", lambda module, **_: module)
    monkeypatch.setattr("svdit.distributed.world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr("svdit.distributed.rank", lambda rank=rank: rank)
        state = fresh(DiT(config), lr=1e-3)
        take_step = loop.stepper(state, TrainOptions(global_batch_size=batch, seed=7), tiny_vae())
        for step in range(8 // batch):
            numbers = share(step, batch)

            def keep(config: DiTConfig, model: Any, x0: Tensor, *rest: Any, numbers: range = numbers) -> Any:
                captured.update(zip(numbers, x0, strict=True))
                return losses(config, model, x0, *rest)

            monkeypatch.setattr(loop, "losses", keep)
            take_step(COLOUR[list(numbers)], torch.zeros(len(numbers), dtype=torch.int64))
    return torch.stack([captured[n] for n in range(8)])


def test_an_examples_latents_do_not_depend_on_batch_and_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = latents(monkeypatch, world=1, batch=8)
    assert latents(monkeypatch, 1, 8).equal(alone)
    for world, batch in ((1, 1), (1, 4), (2, 2), (2, 8)):
        # Other batch sizes may round differently: 2^-24 times the 1000 terms of a convolution, at most.
        assert relative(latents(monkeypatch, world, batch), alone) < 1e-4
    noise = image_noise(7, range(8), (4, 4, 4), CPU, loop.ENCODER)()
    with torch.no_grad():
        parts = tiny_vae().vae.encode(COLOUR).latent_dist
    assert (parts.std > 0.01).all()  # else there is no noise to compare
    assert relative(alone, 0.18215 * (parts.mean + parts.std * noise)) < 1e-5


def test_the_global_stream_is_not_used(tmp_path: Path) -> None:
    """Neither read nor seeded: by data, encoder, timesteps, noise, label dropout, samples or held-out error."""
    torch.manual_seed(3)
    model = DiT(SMALL)
    before = torch.get_rng_state()
    options = TrainOptions(**{**OPTIONS, "steps": 4})
    train(model, IMAGES, options, tmp_path, autoencoder=Noisy(), held_out=IMAGES)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_each_examples_own() -> None:
    eps, t, chance = draws(SMALL, 5, range(2000), DRAWS, CPU)
    alone = draws(SMALL, 5, [17], DRAWS, CPU)
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
    first = [float(curve_of(tmp_path / name)[0]["loss"]) for name in "ab"]
    assert first[0] == pytest.approx(first[1], rel=0.01)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss is nan at training step 4; start again with a smaller --lr"):
        run(tmp_path, lr=1e30, log_every=4)
    assert not (tmp_path / "last.pt").exists()


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    exported = []
    options = TrainOptions(**{**OPTIONS, "steps": 5})
    train(small(), IMAGES, options, tmp_path, held_out=IMAGES, export=lambda state: exported.append(state.step))
    assert exported == [4, 5]
    assert [row["held_out_mse"] != "" for row in curve_of(tmp_path)] == [False, True, True]
    for name in ("last.pt", "loss.png", "samples/0000004.png", "samples/0000005.png"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": float("nan")}, {"ema_decay": 1.1}, {"workers": -1}])
def test_invalid_options(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        TrainOptions(**wrong)


def test_batches_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdit.distributed.world_size", lambda: 3)
    with pytest.raises(UserError, match="batch size is 4; choose a multiple of the 3 processes"):
        TrainOptions(global_batch_size=4)
