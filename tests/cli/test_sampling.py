"""The options of sampling: defaults, protocols, overrides, and the autoencoder."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pixels import saved

from svdit.cli import command, sample, sample_ddp, sampling
from svdit.errors import UserError
from svdit.model import autoencoder
from svdit.model.config import FAMILIES, DiTConfig
from svdit.model.zoo import config_for
from svdit.runtime import decoder
from svdit.sampling.batch import SamplingConfig
from svdit.sampling.protocols import PROTOCOLS
from svdit.shims import allow_cpu_torchvision

CPU = torch.device("cpu")
LATENTS: dict[str, Any] = {"in_channels": 32, "input_size": 16, "latent_mean": (0.0,) * 32, "latent_std": (1.0,) * 32}
MODELS = {  # a published one of each protocol
    "dit-250": config_for("DiT-XL/2"),
    "sit-sde-250": config_for("SiT-XL/2"),
    "sit-ode-250": config_for("SiT-XL/2"),
    "repa-sde-250": config_for("REPA-XL/2"),
    "repae-sde-250": config_for("REPA-XL/1", **LATENTS),
    "lightningdit-250": config_for("LightningDiT-XL/1", **LATENTS),
    "lightningdit-64ep-250": config_for("LightningDiT-XL/1", **LATENTS),
    "jit-heun-50": config_for("JiT-B/16"),
}


def arguments(line: str = "") -> argparse.Namespace:
    return sample_ddp.parser().parse_args(line.split())


def model(config: DiTConfig) -> Any:
    return SimpleNamespace(config=config)


def settings(line: str, config: DiTConfig = MODELS["dit-250"]) -> sampling.Settings:
    return sampling.settings(arguments(line), model(config), sample_ddp.CFG_SCALE)


def test_the_defaults_of_dit_are_the_published_ones() -> None:
    assert settings("") == (SamplingConfig("ddpm", "250", 1.5, 3), "auto", "random", {})
    ours = sampling.settings(sample.parser().parse_args([]), model(MODELS["dit-250"]), sample.CFG_SCALE)
    assert ours.config == SamplingConfig("ddpm", "250", 4.0, 3)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_decides_everything(name: str) -> None:
    protocol = PROTOCOLS[name]
    config, vae, label_policy, record = settings(f"--protocol {name}", MODELS[name])
    expected = {"cfg_scale": 3.0, **protocol.sampling}
    assert {field: getattr(config, field) for field in expected} == expected
    assert (vae, label_policy) == (protocol.vae or "auto", protocol.label_policy)
    assert record == {"protocol": name, "overrides": {}, "reference": protocol.references[256]}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_options_override_it_and_are_recorded(name: str) -> None:
    vae = PROTOCOLS[name].vae
    line = f"--protocol {name} --cfg-scale 1.25 --label-policy {PROTOCOLS[name].label_policy} --vae mse"
    config, chosen, _, record = settings(line, MODELS[name])
    assert (config.cfg_scale, chosen) == (1.25, "mse")
    assert record["overrides"] == {"cfg_scale": 1.25, **({"vae": "mse"} if vae else {})}
    policy = {"random": "balanced", "balanced": "random"}[PROTOCOLS[name].label_policy]
    record = settings(f"--protocol {name} --cfg-channels three --label-policy {policy}", MODELS[name]).record
    guided = {} if PROTOCOLS[name].sampling["cfg_channels"] else {"cfg_channels": 3}
    assert record["overrides"] == {**guided, "label_policy": policy}


@pytest.mark.parametrize(
    ("name", "size", "scale"),
    [("JiT-B/16", 256, 3.0), ("JiT-L/16", 256, 2.4), ("JiT-H/16", 256, 2.2),
     ("JiT-B/32", 512, 3.0), ("JiT-L/32", 512, 2.5), ("JiT-H/32", 512, 2.3)],
)  # fmt: skip
def test_the_guidance_of_jit_depends_on_the_size(name: str, size: int, scale: float) -> None:
    config, _, _, record = settings("--protocol jit-heun-50", config_for(name))
    assert (config.cfg_scale, record["reference"]) == (scale, f"jit_in{size}_stats.npz")


def test_a_protocol_without_a_scale_for_the_model_is_an_error() -> None:
    config = config_for("JiT-B/16", hidden_size=64, num_heads=4)
    with pytest.raises(UserError, match="no guidance scale for a model of width 64 and 256 pixels; pass --cfg-scale"):
        settings("--protocol jit-heun-50", config)
    assert settings("--protocol jit-heun-50 --cfg-scale 2", config).config.cfg_scale == 2


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_of_another_family_is_refused(name: str) -> None:
    other = next(config for config in MODELS.values() if config.family != PROTOCOLS[name].family)
    with pytest.raises(UserError, match=rf"--protocol {name} is for the family .*choose from {other.family}"):
        settings(f"--protocol {name}", other)


def test_cfg_channels() -> None:
    assert settings("").config.cfg_channels == 3
    assert settings("--cfg-channels all").config.cfg_channels is None


def test_cfg_interval() -> None:
    assert settings("").config.cfg_interval is None
    interval = settings("--cfg-interval 100 700").config.cfg_interval
    assert interval == (100, 700)
    assert interval is not None and {type(end) for end in interval} == {int}
    with pytest.raises(UserError, match=r"--cfg-interval is 0\.1 700; a DiT has timesteps, choose integers"):
        settings("--cfg-interval 0.1 700")
    assert settings("--cfg-interval 0.125 1", MODELS["sit-sde-250"]).config.cfg_interval == (0.125, 1)


@pytest.mark.parametrize(
    ("name", "line", "notes"),
    [
        ("dit-250", "--cfg-scale 1 --cfg-channels all", {"--cfg-channels": "the guidance scale is 1"}),
        ("sit-sde-250", "--cfg-interval 0 1", {"--cfg-interval": "the guidance scale is 1"}),  # as in its script
        (
            "dit-250",
            "--time-shift 0.3 --sde-norm 2",
            dict.fromkeys(("--time-shift", "--sde-norm"), "the sampler is ddpm"),
        ),
        (
            "repa-sde-250",
            "--cfg-scale 0.5 --cfg-channels three",
            {
                "--cfg-scale": "the family repa is guided by scales above 1 only",
                "--cfg-channels": "the guidance scale is 1",
            },
        ),
        (
            "sit-ode-250",
            "--sampler dopri5 --num-sampling-steps 50",
            {"--num-sampling-steps": "dopri5 chooses its own steps"},
        ),
        ("sit-sde-250", "--sampler euler --last-step none", {"--last-step": "the sampler is euler"}),
        ("sit-sde-250", "--last-step none --last-step-size 0.1", {"--last-step-size": "there is no last step"}),
        ("sit-sde-250", "--last-step euler --last-step-size 0.1 --sde-norm 2", {}),
    ],
)
def test_options_without_effect_are_reported(
    name: str, line: str, notes: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings(line, MODELS[name])
    expected = sorted(f"note: {option} has no effect: {reason}" for option, reason in notes.items())
    assert sorted(capsys.readouterr().err.splitlines()) == expected


@pytest.mark.parametrize("name", ["dit-250", "sit-sde-250", "sit-ode-250", "repa-sde-250"])
def test_the_manifest_records_the_protocol_and_overrides(name: str, tmp_path: Path) -> None:
    family = FAMILIES[PROTOCOLS[name].family]
    path = saved(tmp_path / "tiny.safetensors", family=PROTOCOLS[name].family, **family)
    line = f"--ckpt {path} --protocol {name} --num-sampling-steps 2 --vae none --num-fid-samples 2 --device cpu"
    command("generate", [*line.split(), "--sample-dir", str(tmp_path / "set")])
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["protocol"] == name
    assert manifest["overrides"] == {"steps": "2", "vae": "none"}
    assert manifest["reference"] is None  # of 8 × 8 images
    assert manifest["uint8"] == family.get("uint8", "half_up")
    expected = json.loads(json.dumps({**PROTOCOLS[name].sampling, "steps": "2"}))
    assert {field: manifest[field] for field in expected} == expected


@pytest.fixture
def vae(tmp_path: Path) -> str:
    """A folder with a random autoencoder of 32 channels at a factor of 16."""
    allow_cpu_torchvision()
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    vae = AutoencoderKL(
        block_out_channels=(4,) * 5, layers_per_block=1, norm_num_groups=2, latent_channels=32, **blocks
    )
    vae.save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


@pytest.mark.parametrize("name", ["repae-sde-250", "lightningdit-250"])
def test_latents_of_32_channels_are_decoded_by_their_statistics(
    name: str, vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"family": PROTOCOLS[name].family, **FAMILIES[PROTOCOLS[name].family], "in_channels": 32}
    statistics = {"latent_mean": (0.5,) * 32, "latent_std": (2.0,) * 32}
    line = f"--protocol {name} --num-sampling-steps 3 --cfg-scale 1.5 --num-fid-samples 2 --device cpu --vae {vae}"
    manifests = []
    for folder, others in (("a", statistics), ("b", {**statistics, "latent_mean": (0.0,) * 32})):
        ckpt = saved(tmp_path / "tiny.safetensors", **options, **others)
        command("generate", ["--ckpt", ckpt, *line.split(), "--sample-dir", str(tmp_path / folder)])
        manifests.append(json.loads((tmp_path / folder / "manifest.json").read_text()))
    assert [manifest["image_size"] for manifest in manifests] == [128, 128]
    assert None not in (manifests[0]["latents"], manifests[1]["latents"])
    assert manifests[0]["latents"] != manifests[1]["latents"]
    assert (tmp_path / "a" / "000000.png").read_bytes() != (tmp_path / "b" / "000000.png").read_bytes()
    ckpt = saved(tmp_path / "tiny.safetensors", **options)
    with pytest.raises(SystemExit, match="2"):
        command("generate", ["--ckpt", ckpt, *line.split(), "--sample-dir", str(tmp_path / "c")])
    assert "no statistics of its 32 latent channels, so they cannot be" in (error := capsys.readouterr().err)
    assert "pass --latent-stats" in error
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("channels", "name", "chosen"), [(1, "auto", "none"), (3, "none", "none"), (4, "auto", "mse"), (4, "ema", "ema")]
)
def test_the_autoencoder_follows_the_channels(
    channels: int, name: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoder, "load_autoencoder", lambda name, device: name)
    monkeypatch.setattr(decoder, "with_kernels", lambda encoder: encoder)
    model = SimpleNamespace(config=SimpleNamespace(in_channels=channels, latent_std=()))
    assert sampling.load_vae(name, model, CPU, "mse") == chosen  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize(
    ("channels", "name", "message"),
    [
        (1, "ema", "the vae is ema, but the model has 1 channels"),
        (4, "none", "the vae is none"),
        (7, "auto", "7 channels"),
        (32, "auto", "pass as vae"),
    ],
)
def test_an_autoencoder_that_does_not_match_is_an_error(channels: int, name: str, message: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(in_channels=channels, latent_std=()))
    with pytest.raises(UserError, match=message):
        sampling.load_vae(name, model, CPU, "mse")  # type: ignore[arg-type]


def test_a_pipeline_decodes_with_its_own_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "load_autoencoder", lambda name, device: name)
    monkeypatch.setattr(decoder, "with_kernels", lambda encoder: encoder)
    model = SimpleNamespace(config=SimpleNamespace(in_channels=4, latent_std=()))
    (tmp_path / "vae").mkdir()
    file = tmp_path / "transformer" / "x.safetensors"
    assert sampling.load_vae("auto", model, CPU, "mse", file) == "mse"  # type: ignore[arg-type, comparison-overlap]
    (tmp_path / "vae" / "config.json").touch()
    assert sampling.load_vae("auto", model, CPU, "mse", file) == str(tmp_path / "vae")  # type: ignore[arg-type, comparison-overlap]
    assert sampling.load_vae("ema", model, CPU, "mse", file) == "ema"  # type: ignore[arg-type, comparison-overlap]
