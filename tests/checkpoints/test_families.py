"""Checkpoints as the training scripts of SiT, REPA, REPA-E, LightningDiT and JiT write them, and hostile ones."""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative
from families import FOLDER, MODELS, Published, config_of, small
from hypothesis import given, settings
from hypothesis import strategies as st

from svdit.checkpoints import hub, io, store
from svdit.checkpoints.families import converted
from svdit.checkpoints.statistics import latent_statistics
from svdit.checkpoints.store import load_model, save_model
from svdit.errors import UserError
from svdit.model.config import FAMILIES
from svdit.model.dit import DiT
from svdit.model.zoo import CONFIGS, config_for

State = dict[str, torch.Tensor]
CHECKPOINTS = [path for path in sorted(FOLDER.glob("*/*checkpoint*")) if path.suffix in (".pt", ".pth")]
REPA, REPAE = FOLDER / "repa" / "repa_train_checkpoint.pt", FOLDER / "repae" / "repae_train_checkpoint.pt"
LIGHTNINGDIT = FOLDER / "lightningdit" / "lightningdit_train_checkpoint.pt"
SIT, JIT = FOLDER / "sit" / "sit_train_checkpoint.pt", FOLDER / "jit" / "jit_checkpoint-last.pth"
LEGACY = FOLDER / "repa" / "repa_legacy_bare.pt"


def expected_of(path: Path) -> dict[str, Any]:
    """The recorded outputs beside a checkpoint, and `config` as ours."""
    arrays = np.load(path.with_suffix(".npz"))
    return {**arrays, "config": config_of(json.loads(str(arrays["config"])))}


def unseen(path: Path) -> dict[str, Any]:
    """What the tiny checkpoints do not show: they have no named size."""
    config = expected_of(path)["config"]
    fields: dict[str, Any] = {"num_heads": config.num_heads}
    if config.family == "jit":
        fields["context_start"] = config.context_start
    return fields | ({"family": "sit"} if config.family == "sit" else {})


@torch.no_grad()
def outputs(model: DiT, expected: dict[str, Any]) -> torch.Tensor:
    return model(*(torch.from_numpy(expected[key]) for key in "xty"))


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_checkpoints_of_training_scripts_load_the_weights_that_are_sampled(path: Path) -> None:
    expected, model = expected_of(path), load_model(path, **unseen(path))
    sampled = "forward_model_ema1" if "forward_model_ema1" in expected else "forward_ema"
    assert relative(outputs(model, expected), torch.from_numpy(expected[sampled])) < 2e-5
    others = [key for key in expected if key.startswith("forward") and key != sampled]
    assert all(relative(outputs(model, expected), torch.from_numpy(expected[key])) > 0.01 for key in others)
    shown = {key: value for key, value in vars(model.config).items() if not key.startswith(("latent", "mlp_"))}
    assert shown == {key: vars(expected["config"])[key] for key in shown}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_published_names_load(name: str) -> None:
    published = Published(name)
    fields = {key: vars(published.config)[key] for key in ("family", "num_heads", "context_start", "noise_scale")}
    model = load_model(FOLDER / f"{name}.weights.safetensors", **fields)
    assert relative(model(published["x"], published["t"], published["y"]), published["forward"]) < 2e-5


def test_every_family_has_such_a_checkpoint() -> None:
    assert {expected_of(path)["config"].family for path in CHECKPOINTS} == set(FAMILIES) - {"dit"}


def test_the_first_names_of_repas_later_blocks_are_read() -> None:
    expected = expected_of(REPA)
    model = load_model(LEGACY, num_heads=2)
    assert model.config == load_model(REPA, num_heads=2).config
    assert relative(outputs(model, expected), torch.from_numpy(expected["forward_ema"])) < 2e-5


def content_of(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(torch.load(path, weights_only=True))


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_the_batch_norm_of_the_averaged_weights_has_the_statistics(tmp_path: Path) -> None:
    content = content_of(REPAE)
    content["model"]["bn.running_mean"] += 1
    config = load_model(saved(content, tmp_path / "0400000.pt"), num_heads=2).config
    mean, variance = (content["ema"][f"bn.running_{key}"] for key in ("mean", "var"))
    assert torch.equal(torch.tensor(config.latent_mean), mean)
    assert torch.equal(torch.tensor(config.latent_std), variance.sqrt())
    path = saved(content["model"], tmp_path / "bare.pt")
    shutil.copy(FOLDER / "repae" / "repae-latents-stats.pt", tmp_path)  # of 8 channels: not those of this model
    assert load_model(path, num_heads=2).config.latent_mean == tuple(content["model"]["bn.running_mean"].tolist())


def test_statistics_files_are_read() -> None:
    mean, std = latent_statistics(FOLDER / "lightningdit" / "latents_stats.pt")
    theirs = torch.load(FOLDER / "lightningdit" / "latents_stats.pt", weights_only=True)
    assert torch.equal(torch.tensor(mean), theirs["mean"].flatten())
    assert torch.equal(torch.tensor(std), theirs["std"].flatten())
    mean, std = latent_statistics(FOLDER / "repae" / "repae-latents-stats.pt")
    theirs = torch.load(FOLDER / "repae" / "repae-latents-stats.pt", weights_only=True)
    assert torch.equal(torch.tensor(mean), theirs["latents_bias"].flatten())
    assert relative(torch.tensor(std), 1 / theirs["latents_scale"].flatten()) < 1e-6


def test_statistics_beside_a_checkpoint_become_part_of_its_configuration(tmp_path: Path) -> None:
    path, stats = tmp_path / "0080000.pt", FOLDER / "lightningdit" / "latents_stats.pt"
    shutil.copy(LIGHTNINGDIT, path)
    assert load_model(path).config.latent_std == ()
    given = load_model(path, latent_stats=stats)
    shutil.copy(stats, tmp_path)
    model = load_model(tmp_path)  # the folder: statistics are no checkpoint
    assert model.config == given.config
    assert (model.config.latent_mean, model.config.latent_std) == latent_statistics(stats)
    save_model(model, tmp_path / "own.safetensors")
    assert load_model(tmp_path / "own.safetensors", latent_stats=stats).config == model.config
    content = content_of(path)
    content["config"]["data"]["latent_multiplier"] = 0.5
    assert load_model(saved(content, path)).config.latent_std == tuple(2 * std for std in model.config.latent_std)
    del content["config"]["data"]["latent_multiplier"]  # its default is that of Stable Diffusion
    loaded = load_model(saved(content, path)).config.latent_std
    assert loaded == pytest.approx([std / 0.18215 for std in model.config.latent_std])


def test_latents_that_were_not_normalized_are_only_scaled(tmp_path: Path) -> None:
    path, stats = tmp_path / "0080000.pt", FOLDER / "lightningdit" / "latents_stats.pt"
    shutil.copy(stats, tmp_path)
    content = content_of(LIGHTNINGDIT)
    content["config"]["data"] |= {"latent_norm": False, "latent_multiplier": 0.25}
    model = load_model(saved(content, path))
    assert (model.config.latent_mean, model.config.latent_std) == ((0.0,) * 8, (4.0,) * 8)
    with pytest.raises(UserError, match="the checkpoint has others than"):
        load_model(path, latent_stats=stats)
    content["config"]["data"]["latent_multiplier"] = 0.0
    with pytest.raises(UserError, match="latent statistics that it cannot be used with"):
        load_model(saved(content, path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"mean": torch.zeros(1, 8, 1, 1)}, "has no statistics of latents"),
        ([1], "has no statistics of latents"),
        ({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, "4 values"),
        ({"mean": torch.zeros(2, 8), "std": torch.ones(2, 8)}, "not one number per channel"),
        ({"mean": torch.zeros(8), "std": torch.zeros(8)}, "not above 0"),
        ({"mean": torch.full((8,), torch.nan), "std": torch.ones(8)}, "not finite"),
        ({"latents_scale": torch.zeros(8), "latents_bias": torch.ones(8)}, "not finite"),
        ({"latents_scale": -torch.ones(8), "latents_bias": torch.ones(8)}, "not above 0"),
    ],
    ids=str,
)
def test_other_statistics_are_one_sentence(content: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        load_model(LIGHTNINGDIT, latent_stats=saved(content, tmp_path / "x.pt"))
    assert "\n" not in str(error.value) and str(error.value).count("; ") == 1


def test_other_statistics_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    other = saved({"mean": torch.zeros(4), "std": torch.ones(4)}, tmp_path / "stats.pt")
    save_model(load_model(REPAE, num_heads=2), tmp_path / "own.pt")
    for path in (REPAE, tmp_path / "own.pt"):
        with pytest.raises(UserError, match=r"the checkpoint has others than .*stats\.pt\); pass other --latent-stats"):
            load_model(path, num_heads=2, latent_stats=other)


def test_a_file_that_may_be_a_dit_or_a_sit_is_refused_unless_named(tmp_path: Path) -> None:
    message = r"may be a DiT or a SiT, .*\(its training script recorded the model 'SiT-XL/2'\); pass --family dit or"
    with pytest.raises(UserError, match=message) as error:
        load_model(SIT, num_heads=2)
    assert str(error.value).count("; ") == 1
    with pytest.raises(UserError, match="records the training of another model than a DiT"):  # a flow's path
        load_model(SIT, num_heads=2, family="dit")
    bare = content_of(SIT)["ema"]
    with pytest.raises(UserError, match="may be a DiT or a SiT, which have the same tensors"):
        load_model(saved(bare, tmp_path / "x.pt"), num_heads=2)
    assert load_model(tmp_path / "x.pt", num_heads=2, family="sit").config.prediction == "velocity"
    shutil.move(tmp_path / "x.pt", tmp_path / "DiT-XL-2-256x256.pt")
    assert load_model(tmp_path / "DiT-XL-2-256x256.pt", num_heads=2).config.family == "dit"
    assert load_model(tmp_path / "DiT-XL-2-256x256.pt", num_heads=2, family="sit").config.family == "sit"


def test_the_name_of_a_model_names_its_family(tmp_path: Path) -> None:
    model = DiT(config_for("SiT-digits"))
    path = saved(model.state_dict(), tmp_path / "x.pt")
    assert load_model(path, name="SiT-digits").config == model.config
    assert load_model(path, name="DiT-digits").config.family == "dit"
    with pytest.raises(UserError, match="so it is not DiT-digits"):
        load_model(path, name="DiT-digits", family="sit")
    save_model(model, tmp_path / "own.pt")
    with pytest.raises(UserError, match="has family sit and not dit, so it is not DiT-digits"):
        load_model(tmp_path / "own.pt", name="DiT-digits")


def test_a_file_with_the_pinned_checksum_is_the_published_dit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(content_of(SIT)["ema"], tmp_path / "renamed.pt")
    monkeypatch.setenv(hub.PIN, "0" * 64)
    with pytest.raises(UserError, match="may be a DiT or a SiT"):
        load_model(path, num_heads=2)
    monkeypatch.setenv(hub.PIN, io.fingerprint(path).upper())
    assert load_model(path, num_heads=2).config.family == "dit"


def test_without_projectors_a_repa_may_also_be_a_dit_or_a_sit(tmp_path: Path) -> None:
    bare = {key: value for key, value in content_of(REPA)["ema"].items() if "projectors" not in key}
    path = saved(bare, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"a DiT, a SiT or a REPA, .* pass --family dit, --family sit or --family repa"):
        load_model(path, num_heads=2)
    assert load_model(path, num_heads=2, family="repa").config == load_model(REPA, num_heads=2).config


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("family", [*FAMILIES, "unet"])
def test_a_family_that_the_tensors_contradict_is_refused(path: Path, family: str) -> None:
    expected = expected_of(path)["config"].family
    if family == expected:
        assert load_model(path, **{**unseen(path), "family": family}).config.family == expected
    else:
        with pytest.raises(UserError, match=f"{path}"):
            load_model(path, **{**unseen(path), "family": family})


def test_of_two_averages_the_sampled_one_is_chosen_in_any_order(tmp_path: Path) -> None:
    content = content_of(JIT)
    backwards = saved(dict(reversed(content.items())), tmp_path / "x.pth")
    expected = load_model(JIT, context_start=1).state_dict()
    assert all(
        torch.equal(expected[key], value) for key, value in load_model(backwards, context_start=1).state_dict().items()
    )


def test_what_training_scripts_record_is_used(tmp_path: Path) -> None:
    content = content_of(LIGHTNINGDIT)
    content["config"]["transport"] |= {"path_type": "GVP", "prediction": "noise"}
    config = load_model(saved(content, tmp_path / "x.pt")).config
    assert (config.path, config.prediction) == ("gvp", "epsilon")
    with pytest.raises(UserError, match=r"no named model has depth 2 and width 8; .*--context-start"):
        load_model(JIT)
    content = content_of(REPA)
    content["args"].path_type, content["args"].path = "cosine", "/data/imagenet"
    assert load_model(saved(content, tmp_path / "x.pt"), num_heads=2).config.path == "gvp"
    del content["args"].path_type
    assert load_model(saved(content, tmp_path / "x.pt"), num_heads=2).config.path == "linear"


def test_a_run_of_svdit_records_its_family(tmp_path: Path) -> None:
    model = small("sit", path="gvp")
    content = {"ema": model.state_dict(), "binding": {**vars(model.config), "lr": 0.1}}
    assert load_model(saved(content, tmp_path / "last.pt")).config == model.config
    with pytest.raises(UserError, match="records the training of another model than a DiT"):
        load_model(tmp_path / "last.pt", family="dit")
    del content["binding"]["family"], content["binding"]["path"], content["binding"]["prediction"]  # type: ignore[union-attr]
    assert load_model(saved(content, tmp_path / "last.pt")).config.family == "dit"  # of an earlier version


SHAPES = sorted(FOLDER.glob("*/shapes_*.json"))
NAMED = {"REPA SiT-XL/2 256": "REPA-XL/2", "REPA-E SiT-XL/1 f16d32": "REPA-XL/1", "SiT-XL/2 512": "SiT-XL/2"}


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_files_of_published_shapes_are_the_named_models(path: Path) -> None:
    """Without memory: all but the vectors is on the meta device."""
    content = json.loads(path.read_text())
    shapes = {key: entry["shape"] for key, entry in content["tensors"].items()}
    name = NAMED.get(content["name"], content["name"].split(" ")[0])
    tensors = {
        key.removeprefix("net."): torch.ones(shape, device="meta" if len(shape) > 1 else None)
        for key, shape in shapes.items()
    }
    loaded, config = store.configured(io.Contents(tensors, None, {}), name, {}, path)
    loaded = converted(loaded, config, path)
    assert CONFIGS[name].items() <= {**vars(config), "learn_sigma": CONFIGS[name].get("learn_sigma")}.items()
    with torch.device("meta"):
        wanted = DiT(config).state_dict()
    assert {key: value.shape for key, value in loaded.items()} == {key: value.shape for key, value in wanted.items()}


@torch.no_grad()
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("width", [85, 64, 130])
def test_hidden_widths_of_swiglu_are_padded_exactly(width: int, own: bool, tmp_path: Path) -> None:
    model, path = small("jit", mlp_hidden=width), tmp_path / "model.pt"
    if own:
        save_model(model, path)
    else:
        saved({"model_ema1": {f"net.{key}": value for key, value in model.state_dict().items()}}, path)
    loaded = load_model(path, context_start=1)
    assert loaded.config.mlp_hidden == {85: 128, 64: 64, 130: 192}[width]
    x, t, y = torch.randn(2, *model.input_shape), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])
    assert relative(loaded(x, t, y), model(x, t, y)) < 1e-6
    a, b = loaded.blocks[0].mlp.w12.weight.chunk(2)
    theirs = model.blocks[0].mlp.w12.weight.chunk(2)
    assert torch.equal(a[:width], theirs[0]) and torch.equal(b[:width], theirs[1])
    assert all(part[width:].abs().sum() == 0 for part in (a, b, loaded.blocks[0].mlp.w3.weight.T))


HOSTILE: dict[str, tuple[Path, Callable[[State], object]]] = {
    "half of w12": (JIT, lambda s: s.update({"blocks.0.mlp.w12.weight": s["blocks.0.mlp.w12.weight"][:10]})),
    "no w12": (JIT, lambda s: s.pop("blocks.1.mlp.w12.weight")),
    "no bias of w12": (JIT, lambda s: s.pop("blocks.0.mlp.w12.bias")),
    "odd w12": (JIT, lambda s: s.update({"blocks.1.mlp.w12.weight": s["blocks.1.mlp.w12.weight"][:19]})),
    "scalar w12": (JIT, lambda s: s.update({"blocks.0.mlp.w12.weight": torch.ones(())})),
    "empty w3": (JIT, lambda s: s.update({"blocks.0.mlp.w3.weight": torch.ones(8, 0)})),
    "narrower w3": (JIT, lambda s: s.update({"blocks.1.mlp.w3.weight": torch.ones(8, 9)})),
    "no context": (JIT, lambda s: s.pop("in_context_posemb")),
    "wider context": (JIT, lambda s: s.update(in_context_posemb=torch.ones(1, 2, 9))),
    "flat context": (JIT, lambda s: s.update(in_context_posemb=torch.ones(2, 8))),
    "scalar context": (JIT, lambda s: s.update(in_context_posemb=torch.ones(()))),
    "two contexts": (JIT, lambda s: s.update(in_context_posemb=torch.ones(2, 2, 8))),
    "no second embedding": (JIT, lambda s: s.pop("x_embedder.proj2.weight")),
    "bias of the first embedding": (JIT, lambda s: s.update({"x_embedder.proj1.bias": torch.ones(6)})),
    "wide norm of queries": (JIT, lambda s: s.update({"blocks.0.attn.q_norm.weight": torch.ones(16)})),
    "empty norm of queries": (JIT, lambda s: s.update({"blocks.0.attn.q_norm.weight": torch.ones(0)})),
    "scalar norm of queries": (JIT, lambda s: s.update({"blocks.0.attn.q_norm.weight": torch.ones(())})),
    "five modulations": (JIT, lambda s: s.update({"blocks.0.adaLN_modulation.1.weight": torch.ones(40, 8)})),
    "no sines": (LIGHTNINGDIT, lambda s: s.pop("feat_rope.freqs_sin")),
    "other positions": (LIGHTNINGDIT, lambda s: s["feat_rope.freqs_cos"].mul_(0.9)),
    "NaN in tables": (LIGHTNINGDIT, lambda s: s["feat_rope.freqs_cos"].fill_(torch.nan)),
    "fewer positions": (LIGHTNINGDIT, lambda s: s.update({"feat_rope.freqs_cos": s["feat_rope.freqs_cos"][:9]})),
    "wide tables": (LIGHTNINGDIT, lambda s: s.update({"feat_rope.freqs_cos": torch.ones(16, 64)})),
    "scalar tables": (LIGHTNINGDIT, lambda s: s.update({"feat_rope.freqs_cos": torch.ones(())})),
    "no tables": (LIGHTNINGDIT, lambda s: [s.pop(f"feat_rope.freqs_{kind}") for kind in ("cos", "sin")]),
    "one norm": (LIGHTNINGDIT, lambda s: s.pop("blocks.1.norm2.weight")),
    "negative variance": (REPAE, lambda s: s["bn.running_var"].neg_()),
    "NaN in statistics": (REPAE, lambda s: s["bn.running_mean"].fill_(torch.nan)),
    "other channels": (REPAE, lambda s: s.update({"bn.running_var": torch.ones(5), "bn.running_mean": torch.ones(5)})),
    "no variance": (REPAE, lambda s: s.pop("bn.running_var")),
    "scalar statistics": (REPAE, lambda s: s.update({"bn.running_var": torch.ones(())})),
    "norm with weights": (REPAE, lambda s: s.update({"bn2.weight": torch.ones(4)})),
    "blocks without end": (LEGACY, lambda s: s.update({f"decoder_blocks.{10**30}.x": torch.ones(1)})),
    "blocks twice": (LEGACY, lambda s: s.update({"decoder_blocks.00.attn.qkv.bias": torch.ones(24)})),
    "blocks without numbers": (LEGACY, lambda s: s.update({"decoder_blocks.x": torch.ones(1)})),
    "only later blocks": (LEGACY, lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.0")]),
    "integers": (REPA, lambda s: s.update({"projectors.0.0.weight": torch.ones(12, 8, dtype=torch.int8)})),
}


def hostile(path: Path, edit: Callable[[State], object]) -> State:
    """The sampled weights of a checkpoint after `edit`."""
    content = content_of(path)
    state = content.get("model_ema1", content.get("ema", content))
    state = {key.removeprefix("net."): value.detach().clone() for key, value in state.items()}
    edit(state)
    return state


def one_sentence(text: str) -> bool:
    return "\n" not in text and text.count("; ") == 1


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_files_are_one_sentence(case: str, tmp_path: Path) -> None:
    path, edit = HOSTILE[case]
    known = {} if "jit" not in str(path) else {"context_start": 1}
    known |= {"num_heads": 2} if "repa" in str(path) else {}
    state = hostile(path, edit)
    if case == "no context":  # such models exist
        assert load_model(saved(state, tmp_path / "x.pt")).config.context_tokens == 0
        return
    with pytest.raises(UserError) as error:
        load_model(saved(state, tmp_path / "x.pt"), **known)
    assert one_sentence(str(error.value))


STATES = {path: hostile(path, lambda state: None) for path in [*CHECKPOINTS, LEGACY]}


@settings(max_examples=100)
@given(st.data())
def test_files_with_one_changed_tensor_are_right_or_one_sentence(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(STATES)))
    state = dict(STATES[path])
    name = data.draw(st.sampled_from(sorted(state)))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24]), max_size=4))
    change = data.draw(st.sampled_from(["shape", "missing", "other name", "integers"]))
    tensor = state.pop(name)
    if change != "missing":
        number = torch.ones(
            shape if change == "shape" else tensor.shape, dtype=torch.int8 if change == "integers" else None
        )
        state[name + "2" if change == "other name" else name] = number
    known = unseen(path if path != LEGACY else REPA)
    message = ""
    try:
        tensors, config = store.configured(io.Contents(state, None, {}), None, known, Path("x.pt"))
        tensors = converted(tensors, config, Path("x.pt"))
        store.restore_(store.empty(config, tensors, Path("x.pt")), tensors, {}, Path("x.pt"))
    except UserError as error:
        message = str(error)
    assert message == "" or one_sentence(message)


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"family": "rit"}, "family is 'rit'; choose"),
    ({"time": "noise_to_data"}, "time is 'noise_to_data', but family 'dit'"),
    ({"path": "linear"}, "path 'linear'"),
    ({"prediction": "flow"}, "prediction is 'flow'"),
    ({"uint8": "up"}, "uint8 is 'up'"),
    ({"latent_mean": [1.0], "latent_std": [1.0]}, "one for each of the 4 channels"),
    ({"mlp": "relu"}, "mlp is 'relu'"),
    ({"rope": True, "input_size": 2**20}, "pos_embed is"),  # of tables that would fill the memory
    ({"rope": True, "hidden_size": 2**40}, "pos_embed is"),
    ({"rope": True, "context_tokens": 2**40}, "in_context_posemb"),
]


@pytest.mark.parametrize(("fields", "sentence"), IMPOSSIBLE, ids=str)
def test_headers_of_no_family_are_one_sentence(fields: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    model = small("dit")
    header = {"config": {**vars(model.config), **fields}}
    io.write(tmp_path / "x.safetensors", model.state_dict(), header)
    message = re.escape(str(tmp_path)) + ".*" + re.escape(sentence.replace("; ", ", "))
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path / "x.safetensors")
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_our_own_files_carry_the_family(family: str, suffix: str, tmp_path: Path) -> None:
    channels = {"jit": 3}.get(family, 4)
    statistics = {"latent_mean": (0.5,) * channels, "latent_std": (2.0,) * channels}
    model = small(family, **statistics, **({} if family == "dit" else {"path": "vp"}))
    save_model(model, tmp_path / f"x{suffix}")
    loaded = load_model(tmp_path / f"x{suffix}")
    assert loaded.config == model.config
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_headers_of_earlier_versions_are_a_dits(tmp_path: Path) -> None:
    model = small("dit")
    old = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    header = {"config": {key: vars(model.config)[key] for key in old}}
    io.write(tmp_path / "x.safetensors", model.state_dict(), header)
    assert load_model(tmp_path / "x.safetensors").config == model.config
