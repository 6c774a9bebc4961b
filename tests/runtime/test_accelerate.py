"""A whole quantized DiT on every backend, against the model it was made from."""

from copy import deepcopy

import pytest
import torch
from conftest import relative
from layers import CONFIGS, USABLE, model_bound
from torch import nn

from svdit.checkpoints.store import load_model
from svdit.diffusion.noise import batch_noise
from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels.cpu import choice
from svdit.model.dit import DiT
from svdit.quant.config import QuantConfig, Recipe, Rule, dit_config, recipe_for
from svdit.quant.linear import SVDLinear, linears, quantized_layers, swap
from svdit.quant.quantize import quantize_
from svdit.runtime import dit as runtime_dit
from svdit.runtime.accelerate import accelerate
from svdit.runtime.dit import FastDiT
from svdit.sampling.batch import SamplingConfig, generate
from svdit.sampling.calibration import calibration_loop

X, T = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 500, 3, 3, 3])
Y = torch.tensor([1, 1, 5, 1, 2])  # two rows have the same (t, y)


def quantized(model: DiT, config: str) -> DiT:
    quantize_(model, CONFIGS[config], lambda model: model(X, T, Y))
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_every_backend_computes_the_same(tiny: DiT, config: str) -> None:
    model = quantized(tiny, config)
    model.class_names = tuple("abcde")
    with torch.no_grad():
        expected, alone = model(X, T, Y), model(X[:1], T[:1], Y[:1])
    for backend in USABLE:
        fast = accelerate(deepcopy(model), backend)
        assert isinstance(fast, FastDiT) and isinstance(fast, DiT)
        assert fast.class_names == model.class_names
        bound = model_bound(backend, 4 if "w4a4" in config else 8)
        error = relative(fast(X, T, Y), expected)
        assert error < bound and (error > 0 or backend != "cpu" or config == "factors"), backend
        assert relative(fast(X[:1], T[:1], Y[:1]), alone) < bound, backend
        assert fast(X, T, Y).std() > 0.1


@pytest.mark.parametrize("backend", USABLE)
def test_one_image_meets_several_conditions_and_one_condition_several_images(tiny: DiT, backend: str) -> None:
    model, bound = quantized(tiny, "w8a8"), model_bound(backend, 8)
    fast = accelerate(deepcopy(model), backend)
    for call in ((X[:1], T, Y), (X, T[:1], Y), (X, T[:1], Y[:1]), (X[:1], T[:1], Y)):
        expected, found = model(*call), fast(*call)
        assert len(found) == 5
        assert all(relative(a, b) < bound for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("backend", USABLE)
def test_hooks_of_blocks_see_and_change_what_blocks_compute(tiny: DiT, backend: str, everywhere: bool) -> None:
    model, bound = quantized(tiny, "w8a8"), model_bound(backend, 8)

    def halved(model: DiT) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen = list[torch.Tensor]()

        def hook(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor | None:
            if module is not model.blocks[0]:
                return None
            seen.append(output.clone())
            return output * 0.5

        register = (
            nn.modules.module.register_module_forward_hook if everywhere else model.blocks[0].register_forward_hook
        )
        with torch.no_grad():
            handle = register(hook)
            try:
                return model(X, T, Y), seen
            finally:
                handle.remove()

    (image, seen), (expected, of_model) = halved(accelerate(deepcopy(model), backend)), halved(model)
    assert relative(seen[0], of_model[0]) < bound and relative(image, expected) < bound
    assert relative(expected, model(X, T, Y)) > bound


@pytest.mark.parametrize("config", ["w8a8", "w4a8"])
def test_pictures_are_the_same_on_every_backend(tiny: DiT, config: str) -> None:
    model = quantized(tiny, config)
    labels, walk = torch.tensor([0, 3, 3]), SamplingConfig("ddim", "ddim10", 4.0, None)
    drawn = {
        backend: generate(
            accelerate(deepcopy(model), backend),
            labels,
            walk,
            noise=batch_noise(0, (3, 4, 4, 4), torch.device("cpu"), False),
        )
        for backend in USABLE
    }
    for backend, picture in drawn.items():
        assert relative(picture, drawn["reference"]) < 0.02, backend
        assert picture.std() > 0.1


SLOW = [pytest.param(config, marks=pytest.mark.slow) for config in ("w8a8", "svdquant", "factors")]


@pytest.mark.parametrize("config", ["w4a8", *SLOW])
def test_stored_layers_compile_into_one_graph(tiny: DiT, config: str) -> None:
    model = quantized(tiny, config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # a graph break is an error
    with torch.no_grad():
        assert relative(compiled(X, T, Y), model(X, T, Y)) < 2e-3


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "reference"])
def test_an_accelerated_model_compiles_into_one_graph(tiny: DiT, backend: str) -> None:
    fast = accelerate(quantized(tiny, "w8a8"), backend)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert relative(compiled(X, T, Y), fast(X, T, Y)) < 1e-5


def test_the_trained_digits_are_the_same_pictures_on_every_backend() -> None:
    model, walk = load_model("digits"), SamplingConfig("ddim", "ddim10", 1.5)
    recipe = recipe_for("w4a8", rank=8, iterations=1)
    quantize_(model, dit_config(recipe), calibration_loop(images=4, steps=5))

    def drawn(model: DiT) -> torch.Tensor:
        noise = batch_noise(0, (10, 1, 8, 8), torch.device("cpu"), False)
        return generate(model, range(10), walk, noise=noise)

    pictures = {name: drawn(accelerate(deepcopy(model), name)) for name in USABLE}
    quantization = relative(pictures["reference"], drawn(load_model("digits")))
    assert quantization > 0.005
    for name, picture in pictures.items():
        # Codes between two values move, and some processors compute the branch in bfloat16. A deviation of half the
        # quantization error raises the total error by at most √1.25, 1 dB.
        assert relative(picture, pictures["reference"]) < 0.5 * quantization, name
        assert picture.std() > 0.5


def test_many_images_go_through_a_block_in_parts(tiny: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(tiny, "w8a8")
    whole = accelerate(deepcopy(model))(X, T, Y)
    size = 2 if ops.choose() == "cpu" and choice.attention_dtype() == torch.bfloat16 else 4
    monkeypatch.setattr(runtime_dit, "HIDDEN_BYTES", 2 * size * 4 * 256)  # two images of 4 tokens
    fast = accelerate(deepcopy(model))
    calls: list[int] = []
    block = fast.blocks[0]
    assert isinstance(block, runtime_dit.FastBlock)
    fused = block.second.fused

    def counted(x: torch.Tensor, **around: object) -> torch.Tensor:
        calls.append(len(x))
        return fused(x, **around)  # type: ignore[arg-type]

    monkeypatch.setattr(block.second, "fused", counted)
    assert torch.equal(fast(X, T, Y), whole)
    assert calls == [1, 2, 2]


def test_inputs_are_left_alone(tiny: DiT) -> None:
    fast, before = accelerate(quantized(tiny, "w8a8")), X.clone()
    first = fast(X, T, Y)
    assert torch.equal(X, before)
    assert torch.equal(fast(X, T, Y), first)


def test_modulations_are_computed_once_per_pair(tiny: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = accelerate(quantized(tiny, "w8a8"))
    block = fast.blocks[0]
    assert isinstance(block, runtime_dit.FastBlock)
    rows: list[int] = []
    fused = block.modulations.fused
    monkeypatch.setattr(block.modulations, "fused", lambda c: rows.append(c.shape[0]) or fused(c))
    fast(X, T, Y)
    assert rows == [4]


def test_without_sharing_modulations_as_on_a_gpu_it_is_the_same(tiny: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = accelerate(quantized(tiny, "w8a8"))
    shared = fast(X, T, Y)
    monkeypatch.setattr(runtime_dit, "distinct", lambda t, y: (t, y, slice(None)))
    assert relative(fast(X, T, Y), shared) < 1e-6


def test_the_original_is_empty_and_the_result_cannot_be_saved(tiny: DiT) -> None:
    model = quantized(tiny, "w8a8")
    fast = accelerate(model, "dequant")
    with pytest.raises(UserError, match="cannot be saved"):
        fast.state_dict()
    assert all(x.is_meta for layer in quantized_layers(model).values() for x in layer.state_dict().values())


@pytest.mark.parametrize("backend", USABLE)
def test_debug_names_the_layer(tiny: DiT, backend: str) -> None:
    model = quantized(tiny, "w8a8")
    x = X.clone()
    x[1, 0, 0, 0] = torch.nan
    assert accelerate(deepcopy(model), backend)(x, T, Y)[1].isnan().all()
    checked = accelerate(model, backend, debug=True)
    assert isinstance(checked, FastDiT) and not checked.graphs
    with pytest.raises(UserError, match=r"the input of layer x_embedder\.proj contains NaN or Inf"):
        checked(x, T, Y)
    checked.pos_embed[0, 1, 2] = torch.inf
    with pytest.raises(UserError, match=r"the input of layer blocks\.0\.attn\.qkv contains NaN or Inf"):
        checked(X, T, Y)


def test_float_models_stay_and_other_models_are_swapped(tiny: DiT) -> None:
    assert accelerate(tiny) is tiny
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 5))
    inputs = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    config = QuantConfig((Rule("*", Recipe(smoothing=0, rounding="nearest", rank=4)),))
    quantize_(model, config, lambda model: model(inputs))
    expected = model(inputs)
    fast = accelerate(deepcopy(model))
    assert 0 < relative(fast(inputs), expected) < model_bound(ops.choose())
    assert fast(inputs[0, 0]).shape == (5,)
    assert fast(inputs.double()).dtype == torch.float64


def test_layers_of_float_factors_alone_stay_as_they_are(tiny: DiT) -> None:
    for name, linear in list(linears(tiny)):
        if name.startswith("blocks"):
            swap(tiny, {name: SVDLinear.from_linear(linear, 0.5)})
    with torch.no_grad():
        expected = tiny(X, T, Y)
    assert relative(accelerate(tiny)(X, T, Y), expected) < 1e-5
