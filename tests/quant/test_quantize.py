"""quantize_: in place, on any module, resumable, within memory, shared among processes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative
from helpers import hard_inputs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.model.zoo import DiT_models
from svdit.quant import quantize as module
from svdit.quant import resume
from svdit.quant.config import RECIPES, QuantConfig, Recipe, Rule, dit_config, rank_ratio_config
from svdit.quant.linear import linears, quantized_layers
from svdit.quant.observe import SAMPLE, Statistics, observe
from svdit.quant.quantize import quantize_
from svdit.quant.sensitivity import Call, recording
from svdit.quant.solve import layer_sqnr, quantize_linear
from svdit.sampling.calibration import CONDITIONS, calibration_loop, calibration_size

CONFIG = dit_config(replace(RECIPES["w4a8"], rank=4))
LOOP = calibration_loop(images=4, steps=5)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a)


@torch.no_grad()
def test_a_dit_is_quantized_in_place(tiny: DiT) -> None:
    x, t, y = torch.randn(4, 4, 4, 4), torch.tensor([3, 200, 500, 999]), torch.tensor([0, 1, 4, 5])
    before = tiny(x, t, y)
    report = quantize_(tiny, CONFIG, LOOP)
    assert 0 < relative(tiny(x, t, y), before) < 0.2
    assert len(report.layers) == 11
    assert set(quantized_layers(tiny)) == {line.name for line in report.layers}
    assert {name for name, _ in linears(tiny)} == {
        "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"
    }  # fmt: skip
    assert report.bytes_after == sum(v.nbytes for v in tiny.state_dict().values()) < report.bytes_before
    assert not any(m._forward_pre_hooks for m in tiny.modules())


def test_any_module_will_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    batches = torch.randn(8, 32, 64)
    with torch.no_grad():
        before = model(batches)
        report = quantize_(
            model, QuantConfig((Rule("2", None), Rule("*", RECIPES["w8a8"]))), lambda m: [m(x) for x in batches]
        )
        assert [line.name for line in report.layers] == ["0"]
        assert 0 < relative(model(batches), before) < 0.02


@pytest.mark.parametrize("rows_per_feature", [0.5, 2, 16])
@torch.no_grad()
def test_the_reported_sqnr_is_that_of_unseen_inputs(rows_per_feature: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96))
    linear, tokens = model[0], 4
    x = hard_inputs(int(32 * rows_per_feature) * 8 // 7 * tokens).view(-1, tokens, 128)
    report = quantize_(model, QuantConfig((Rule("*", replace(RECIPES["w4a8"], rank=8)),)), lambda m: m(x))
    line, fresh = report.layers[0], hard_inputs(4096, seed=7)
    assert line.rows + line.held_out == len(x) * tokens and line.held_out == len(x) // 8 * tokens
    assert line.sqnr == pytest.approx(layer_sqnr(linear, model[0], fresh), abs=1.5)
    few = f"fewer than 4 rows per input feature (the fewest: 0, {line.rows} rows for 128 features)"
    assert [few in warning for warning in report.warnings] == [True] * (rows_per_feature < 4)


@torch.no_grad()
def test_too_few_examples_report_no_sqnr() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    report = quantize_(model, QuantConfig((Rule("*", RECIPES["w8a8"]),)), lambda m: m(torch.randn(7, 99, 64)))
    assert (report.layers[0].sqnr, report.layers[0].rows, report.layers[0].held_out) == (None, 7 * 99, 0)


def test_calibration_images_are_held_out_as_a_whole(tiny: DiT) -> None:
    names, calls = ["blocks.0.mlp.fc1", "blocks.1.adaLN_modulation.1"], list[Call]()
    fc1, adaln = observe(tiny, names, recording(LOOP, calls)).values()
    assert (fc1.count, len(fc1.holdout_rows)) == (4 * 5 * 2 * 4, 2 * 5 * 2 * 4)  # images, steps, halves, tokens
    assert adaln.count == 4 * 5 * 2 + CONDITIONS and len(adaln.holdout_rows) == SAMPLE
    assert len(calls) == 5  # of the one batch that is not held out


def test_the_documented_mode_needs_no_calibration(tiny: DiT) -> None:
    names = [name for name, _ in linears(tiny)]
    report = quantize_(tiny, rank_ratio_config(0.95, 8))
    assert [line.name for line in report.layers] == names
    assert {layer.spec.rank_ratio for layer in quantized_layers(tiny).values()} == {0.95}
    assert all(line.weight == "INT8" and line.sqnr is None and line.weight_error > 0 for line in report.layers)


def test_quantizing_twice_is_an_error(tiny: DiT) -> None:
    quantize_(tiny, rank_ratio_config(0.5, 8))
    with pytest.raises(UserError, match="already quantized"):
        quantize_(tiny, rank_ratio_config(0.5, 8))


def test_a_missing_loop_and_an_empty_plan_are_sentences(tiny: DiT) -> None:
    with pytest.raises(UserError, match="needs calibration"):
        quantize_(tiny, CONFIG)
    with pytest.raises(UserError, match="no rule"):
        quantize_(tiny, QuantConfig((Rule("nothing", Recipe(), optional=True),)), LOOP)


def test_memory_only_decides_how_often_the_loop_runs(tiny: DiT) -> None:
    other = DiT(tiny.config).eval()
    other.load_state_dict(tiny.state_dict())
    runs: list[int] = []

    def counting(model: nn.Module) -> None:
        runs.append(1)
        LOOP(model)

    quantize_(tiny, CONFIG, counting)
    assert len(runs) == 1
    quantize_(other, CONFIG, counting, max_memory=Statistics.nbytes(256))
    assert len(runs) > 3
    assert equal(state_of(tiny), state_of(other))
    for bad in (0, -1, float("nan")):
        with pytest.raises(UserError, match=f"max_memory is {bad}; pass a positive number"):
            quantize_(DiT(tiny.config), CONFIG, counting, max_memory=bad)


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    tiny: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DiT(tiny.config).eval()
    whole.load_state_dict(tiny.state_dict())
    quantize_(whole, CONFIG, LOOP)
    solved: list[str] = []

    def dies_at_the_fifth(name: str, *rest: object) -> object:
        if len(solved) == 4:
            raise KeyboardInterrupt
        solved.append(name)
        return quantize_linear(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "quantize_linear", dies_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        quantize_(tiny, CONFIG, LOOP, work_dir=tmp_path)
    assert not quantized_layers(tiny)

    def refuses_old_work(name: str, *rest: object) -> object:
        assert name not in solved
        return quantize_linear(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "quantize_linear", refuses_old_work)
    report = quantize_(tiny, CONFIG, LOOP, work_dir=tmp_path)
    assert len(report.layers) == 11
    assert equal(state_of(tiny), state_of(whole))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "without a checksum"])
def test_a_damaged_layer_is_quantized_again(
    tiny: DiT, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, again = DiT(tiny.config), DiT(tiny.config)
    for model in (whole, again):
        model.load_state_dict(tiny.state_dict())
    config = rank_ratio_config(0.5, 8)
    quantize_(whole, config, work_dir=tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[3]
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    if damage == "without a checksum":
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            save_file(tensors, path, {"result": file.metadata()["result"]})
    else:
        path.write_bytes({"truncated": content[:-10], "flipped": content, "empty": b""}[damage])
    quantize_(again, config, work_dir=tmp_path)
    assert equal(state_of(again), state_of(whole))
    assert f"{path} is damaged" in (message := capsys.readouterr().err)
    assert message.count("the layer is quantized again") == 1


def test_work_of_other_settings_is_refused(tiny: DiT, tmp_path: Path) -> None:
    other = DiT(tiny.config)
    quantize_(tiny, rank_ratio_config(0.5, 8), work_dir=tmp_path)
    with pytest.raises(UserError, match="other settings"):
        quantize_(other, rank_ratio_config(0.5, 4), work_dir=tmp_path)


def test_work_of_another_version_is_refused(tiny: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = DiT(tiny.config)
    quantize_(tiny, rank_ratio_config(0.5, 8), work_dir=tmp_path)
    monkeypatch.setattr(resume, "__version__", "0.0.0")
    with pytest.raises(UserError, match="another version"):
        quantize_(other, rank_ratio_config(0.5, 8), work_dir=tmp_path)


def test_calibration_shows_what_was_promised(tiny: DiT) -> None:
    seen: list[tuple[int, int]] = []
    tokens = 0

    def count(m: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal tokens
        tokens += inputs[0].shape[0] * inputs[0].shape[1]

    def note(m: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.extend(zip(inputs[1].tolist(), inputs[2].tolist(), strict=True))

    images, steps = calibration_size(tiny)
    with tiny.register_forward_pre_hook(note), tiny.blocks[0].mlp.fc2.register_forward_pre_hook(count):
        calibration_loop(images=images, steps=steps)(tiny)
    assert tokens >= 20_000
    assert len({pair for pair in seen if pair[1] != tiny.null_class}) >= 48
    assert sum(pair[1] == tiny.null_class for pair in seen) == len(seen) / 2


@pytest.mark.parametrize(("name", "widest"), [("DiT-XL/2", 4608), ("LightningDiT-XL/1", 3072)])
def test_a_large_model_is_shown_eight_tokens_a_feature(name: str, widest: int) -> None:
    with torch.device("meta"):
        model = DiT_models[name]()
    images, steps = calibration_size(model)
    assert 8 * widest <= images * steps * 2 * 256 < 10 * widest
    assert images * steps >= 48


def test_the_calibration_set_can_be_chosen() -> None:
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"]()
    _, steps = calibration_size(model)
    assert calibration_size(model, images=3) == (3, steps)
    assert calibration_size(model, steps=4) == (18, 4)


@pytest.mark.parametrize(("preset", "where"), [("nvfp4", "everywhere: "), ("fp8", "except on GPUs of capability 9.0")])
def test_emulated_formats_are_called_so(tiny: DiT, preset: str, where: str) -> None:
    recipe = replace(RECIPES[preset], rank=4, smoothing=0, iterations=1)
    report = quantize_(tiny, QuantConfig((Rule("blocks.0.mlp.*", recipe),)), LOOP)
    assert [where in warning for warning in report.warnings if "emulated" in warning] == [True]
    assert "emulated" not in str(quantize_(DiT(tiny.config), rank_ratio_config(0.5, 8)).warnings)
