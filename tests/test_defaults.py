"""torch's default type and device, and the inference mode of a caller, change nothing that svdit computes."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pixels import pixel_model
from torch import Tensor, nn

import svdit
from svdit.diffusion.noise import batch_noise
from svdit.evaluation.metrics import monge_distance
from svdit.evaluation.neighbours import neighbour_metrics
from svdit.kernels.cpu import choice, ffi
from svdit.model.dit import DiT
from svdit.quant.config import RECIPES
from svdit.sampling.calibration import calibration_loop

FEATURES = [torch.randn(40, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
MODEL = pixel_model()  # made before the default changes, which is a model's own type

DEFAULTS = (torch.bfloat16, torch.float64, "meta")


@contextmanager
def default(kind: torch.dtype | str) -> Iterator[None]:
    """With a default type or device."""
    torch.set_default_device(kind) if isinstance(kind, str) else torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def quantized(preset: str, loop: Callable[[DiT], None] | None = None) -> dict[str, Tensor]:
    model = copy.deepcopy(MODEL)
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    t, y = torch.arange(8, device="cpu") * 99, torch.arange(8, device="cpu") % 5
    svdit.quantize_(model, preset, loop or [(x, t, y)])
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


COMPUTED: dict[str, Callable[[], Any]] = {
    **{f"quantize_ {preset}": lambda preset=preset: quantized(preset) for preset in RECIPES},
    "calibrated": lambda: quantized("w4a8", calibration_loop(images=2, steps=2)),
    "sample": lambda: svdit.sample(MODEL, [0, 1], steps=3),
    "published noise": lambda: batch_noise(0, (2, 3, 8, 8), torch.device("cpu"), True)(),
    "neighbours": lambda: neighbour_metrics(*FEATURES),
    "mind": lambda: monge_distance(*FEATURES),
}


@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
@pytest.mark.parametrize("name", COMPUTED)
def test_defaults_change_nothing(name: str, kind: torch.dtype | str) -> None:
    expected = COMPUTED[name]()
    with default(kind):
        found = COMPUTED[name]()
    if name in ("neighbours", "mind"):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing())
@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
def test_kernels_are_chosen_under_any_default(kind: torch.dtype | str) -> None:
    with default(kind), torch.no_grad():
        for attention in (ffi.isas()[0], choice.TORCH):
            pair = choice.Choice(ffi.isas()[0], attention)
            choice.block_trial(choice.trial_layers(ffi.kernels(pair.linears)), pair)()


@pytest.mark.parametrize("inside", [True, False])
def test_models_made_in_inference_mode_are_quantized(inside: bool) -> None:
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(64, 64)
    with torch.inference_mode(inside):
        svdit.quantize_(model, "w8a8", [x])
        assert model(x).isfinite().all()
