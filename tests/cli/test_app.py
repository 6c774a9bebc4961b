"""`svdit app`: what it computes, and its page, which sends nothing to the network. test_app_browser.py opens it."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from pixels import pixel_model, saved

import svdit
from svdit.checkpoints.store import save_model
from svdit.cli import app_page, side_by_side
from svdit.errors import UserError
from svdit.images import grid, to_uint8

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(saved(tmp_path / "tiny.safetensors"))


def test_both_models_start_from_the_same_noise(tiny: Path) -> None:
    ticks: list[int] = []
    result = side_by_side.compare(tiny, "rtn", 3, 7, 4, CPU, lambda done, x: ticks.append(done))
    model = svdit.load(tiny)
    images = svdit.sample(model, [3] * side_by_side.IMAGES, sampler="ddim", steps=4, cfg_scale=1.5, seed=7)
    assert (result.original.pixels == grid(to_uint8(images), 2, scale=16)).all()
    svdit.quantize_(model, "rtn")
    quantized = svdit.sample(
        svdit.accelerate(model), [3] * side_by_side.IMAGES, sampler="ddim", steps=4, cfg_scale=1.5, seed=7
    )
    assert (result.quantized.pixels == grid(to_uint8(quantized), 2, scale=16)).all()
    assert result.psnr == pytest.approx(svdit.psnr(quantized, images))
    assert 10 < result.psnr < 99
    assert ticks == list(range(1, 9))
    assert result.original.nbytes == 4 * sum(tensor.numel() for tensor in svdit.load(tiny).state_dict().values())
    assert result.quantized.nbytes < 0.6 * result.original.nbytes
    assert min(result.original.seconds, result.quantized.seconds) > 0


def test_another_seed_class_or_preset_are_other_images(tiny: Path) -> None:
    settings = ("rtn", 3, 7), ("rtn", 3, 8), ("rtn", 2, 7), ("fp8", 3, 7)
    first, *others = (side_by_side.compare(tiny, *each, 4, CPU) for each in settings)
    for other in others[:2]:
        assert (other.original.pixels != first.original.pixels).any()
    assert (others[2].original.pixels == first.original.pixels).all()
    assert (others[2].quantized.pixels != first.quantized.pixels).any()


@pytest.mark.parametrize("name", ["digits", "digits-sit", "digits-jit"])
def test_the_embedded_models_are_compared(name: str) -> None:
    path = svdit.checkpoints.store.embedded_models()[name]
    result = side_by_side.compare(path, "rtn", 3, 0, 4, CPU)
    assert result.psnr > 30
    assert np.ptp(result.original.pixels) > 200


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "w8a7"}, "there is no preset 'w8a7'"),
        ({"label": 5}, "there is no class 5"),
        ({"seed": -1}, "the seed is -1; choose an integer"),
        ({"steps": 0}, "'0'"),
    ],
)
def test_mistakes_are_sentences(changed: dict[str, object], message: str, tiny: Path) -> None:
    settings = {"preset": "rtn", "label": 0, "seed": 0, "steps": 4} | changed
    with pytest.raises(UserError, match=message):
        side_by_side.compare(tiny, device=CPU, **settings)  # type: ignore[arg-type]


def test_a_quantized_file_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    model = pixel_model()
    svdit.quantize_(model, "rtn")
    save_model(model, tmp_path / "q.safetensors")
    with pytest.raises(UserError, match=r"q\.safetensors is already quantized; pass the checkpoint"):
        side_by_side.full(tmp_path / "q.safetensors", CPU)


def test_the_table_has_a_column_for_each_model() -> None:
    drawn = [side_by_side.Drawn(np.zeros((8, 8, 3), np.uint8), seconds, size) for seconds, size in ((2, 8e6), (1, 2e6))]  # type: ignore[arg-type]
    header, _, *rows = app_page.table_of(side_by_side.Comparison(*drawn, psnr=41.26)).splitlines()
    assert header == "| | full precision | quantized |"
    assert rows == [
        "| time | 2.00 s | 1.00 s |",
        "| weights in memory | 8.00 MB | 2.00 MB |",
        "| PSNR to full precision | – | 41.3 dB |",
    ]


def test_a_port_in_use_is_a_sentence(tiny: Path) -> None:
    pytest.importorskip("gradio")
    with socket.create_server((app_page.ADDRESS, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use; pass another --port"):
            app_page.serve({"tiny": tiny}, CPU, port)
