"""The autoencoder against diffusers' own encode and decode, on a tiny random VAE."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, relative
from safetensors.torch import load_file, save_file

from svdit.errors import UserError
from svdit.model import autoencoder
from svdit.model.autoencoder import Autoencoder, load_autoencoder
from svdit.model.config import DiTConfig
from svdit.model.vae import VAE, VAEConfig
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
from diffusers import AutoencoderKL  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    randomize(vae)
    vae.decoder.conv_out.weight.data *= 10  # images outside of [-1, 1]
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 3 * 16 * 32, 10**6])  # one by one, three and two, all five
def test_equals_diffusers(folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(autoencoder, "MAX_PIXELS", at_once)
    ours, theirs = load_autoencoder(str(folder)), AutoencoderKL.from_pretrained(folder).eval()
    assert isinstance(ours.vae, VAE)
    assert (ours.factor, ours.channels, ours.name) == (8, 4, str(folder))
    x = torch.rand(5, 3, 16, 32) * 2 - 1
    gaussian = theirs.encode(x).latent_dist
    noise = torch.randn(5, 4, 2, 4, generator=torch.Generator().manual_seed(7))
    expected = gaussian.sample(torch.Generator().manual_seed(7)) * 0.18215  # draws the same noise
    z = ours.encode(x, noise)
    assert gaussian.std.min() > 0.01
    assert relative(z, expected) < 1e-5
    images = theirs.decode(z / 0.18215).sample
    assert relative(ours.decode(z), images.clamp(-1, 1)) < 1e-5
    assert images.abs().max() > 1


def statistics(mean: np.ndarray, std: np.ndarray) -> Autoencoder:
    return Autoencoder("", None, tuple(mean.ravel().tolist()), tuple(std.ravel().tolist()))


def test_latent_statistics_are_applied_as_published() -> None:
    golden = np.load(GOLDEN / "lightningdit" / "lightningdit.npz")
    ours = statistics(golden["latent_mean"], golden["latent_std"])
    z = torch.from_numpy(golden["ode_euler_10"])
    raw = ours.denormalized(z)
    assert relative(raw, torch.from_numpy(golden["denormalized_mult1"])) < 1e-6
    scaled = statistics(golden["latent_mean"], golden["latent_std"] / 0.18215)
    assert relative(scaled.denormalized(z), torch.from_numpy(golden["denormalized_mult018215"])) < 1e-6
    assert relative(ours.normalized(raw), z) < 1e-6


def test_latent_statistics_of_repa_e() -> None:
    golden = np.load(GOLDEN / "repae" / "repae.npz")
    std = 1 / golden["latents_scale"]
    ours = statistics(golden["latents_bias"], std)
    z = torch.from_numpy(golden["sde_10_cfg18_0_07"])
    assert relative(ours.denormalized(z).float(), torch.from_numpy(golden["denormalized_sde_10"])) < 1e-6
    trained = torch.from_numpy(golden["normalized_raw"] * np.sqrt(std**2 + 1e-4) / std)  # trained with another divisor
    assert relative(ours.normalized(torch.from_numpy(golden["raw_latents"])), trained) < 1e-6


def test_32_channels_at_a_factor_of_16(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    vae = AutoencoderKL(
        block_out_channels=(4,) * 5, layers_per_block=1, norm_num_groups=2, latent_channels=32, **blocks
    )
    randomize(vae).save_pretrained(tmp_path)
    mean, std = tuple(torch.randn(32).tolist()), tuple((torch.rand(32) + 0.5).tolist())
    config = DiTConfig(input_size=2, patch_size=1, in_channels=32, latent_mean=mean, latent_std=std)
    ours = load_autoencoder(str(tmp_path)).for_model(config)
    with pytest.raises(UserError, match=r"no statistics of its 32 latent channels.*--latent-stats"):
        ours.for_model(replace(config, latent_mean=(), latent_std=()))
    assert (ours.factor, ours.channels) == (16, 32)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z = ours.encode(x, torch.zeros(2, 32, 2, 2))
    raw = vae.eval().encode(x).latent_dist.mean
    assert relative(z, (raw - torch.tensor(mean).view(32, 1, 1)) / torch.tensor(std).view(32, 1, 1)) < 1e-5
    assert relative(ours.decode(z), vae.decode(raw).sample.clamp(-1, 1)) < 1e-5


def test_images_depend_neither_on_the_batch_nor_on_the_number_of_threads() -> None:
    ours = Autoencoder("random", randomize(VAE(VAEConfig((64, 64)))))
    x, noise, found = torch.rand(3, 3, 64, 64) * 2 - 1, torch.randn(3, 4, 32, 32), list[torch.Tensor]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = ours.decode(ours.encode(x, noise))
            alone = [ours.decode(ours.encode(a, b)) for a, b in zip(x.split(1), noise.split(1), strict=True)]
            assert torch.get_num_threads() == threads
            found += [together, torch.cat(alone)]
    finally:
        torch.set_num_threads(1)
    assert found[0].std() > 0.01
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_other_blocks_and_files_are_left_to_diffusers(folder: Path, tmp_path: Path) -> None:
    attending = AutoencoderKL(up_block_types=("AttnUpDecoderBlock2D",), block_out_channels=(8,), norm_num_groups=4)
    attending.save_pretrained(tmp_path / "attending")
    pickled = AutoencoderKL.from_pretrained(folder)
    pickled.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    for name in ("attending", "pickled"):
        assert isinstance(load_autoencoder(str(tmp_path / name)).vae, AutoencoderKL)


def test_half_precision_is_decoded_in_full(folder: Path, tmp_path: Path) -> None:
    half = AutoencoderKL.from_pretrained(folder).half()
    half.save_pretrained(tmp_path / "half")
    z = torch.randn(1, 4, 4, 4)
    expected = half.float().eval().decode(z / 0.18215).sample
    assert relative(load_autoencoder(str(tmp_path / "half")).decode(z), expected.clamp(-1, 1)) < 1e-5


def test_a_cached_repository_is_read_without_diffusers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--stabilityai--sd-vae-ft-ema"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(autoencoder, "from_diffusers", None)
    assert load_autoencoder("ema").channels == 4


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 1, 3), (2, 4, 5, 7), (0, 4, 2, 2)])
def test_winograd_products_equal_direct_ones(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    vae, z = randomize(VAE(VAEConfig((64, 64)))), torch.randn(shape)
    fast = vae.decode(z).sample
    monkeypatch.setattr("svdit.model.vae.winograd", lambda x: False)
    direct = vae.decode(z).sample
    assert fast.shape == direct.shape == (len(z), 3, 2 * shape[2], 2 * shape[3])
    if len(z):
        error = relative(fast, direct)
        assert error < 1e-4 and (error > 0) is torch._nnpack_available()


@torch.no_grad()
@pytest.mark.parametrize("name", ["_nnpack_available", "_nnpack_spatial_convolution"])
def test_without_torchs_winograd_products_images_are_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, name)
    assert randomize(VAE(VAEConfig((64,)))).decode(torch.randn(1, 4, 2, 2)).sample.isfinite().all()


def test_pixels_pass_through() -> None:
    none = load_autoencoder("none")
    assert none == Autoencoder("none")
    assert (none.factor, none.channels) == (1, None)
    x = torch.randn(2, 1, 8, 8)
    assert none.encode(x, x) is x
    assert torch.equal(none.decode(x), x.clamp(-1, 1))


def test_what_cannot_be_loaded_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no autoencoder nowhere; choose ema, mse, none, a folder"):
        load_autoencoder("nowhere")
    with pytest.raises(UserError, match=r"cannot load the autoencoder .*config\.json.*; save it again with diffusers"):
        load_autoencoder(str(tmp_path))
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["decoder.conv_out.bias"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors, first decoder\.conv_out\.bias; download it again"):
        load_autoencoder(str(folder))
    save_file(state | {"decoder.conv_out.bias": torch.zeros(2)}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot load the autoencoder .*size mismatch for decoder\.conv_out\.bias"):
        load_autoencoder(str(folder))
    config = folder / "config.json"
    for groups in ("0", '"x"', "3", "null"):
        config.write_text(re.sub(r'(?<="norm_num_groups": )[^,]*', groups, config.read_text()))
        with pytest.raises(UserError, match="cannot load the autoencoder"):
            load_autoencoder(str(folder))
    weights.write_bytes(weights.read_bytes()[:9000])
    with pytest.raises(UserError, match="cannot load the autoencoder"):
        load_autoencoder(str(folder))


@pytest.mark.parametrize("name", [*autoencoder.REPOSITORIES, "REPA-E/e2e-vavae-hf"])
def test_offline_the_error_says_how_to_download_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = autoencoder.REPOSITORIES.get(name, name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=rf"autoencoder {repository} .*; download it elsewhere, `hf download {repository} "
    ):
        load_autoencoder(name)


def test_the_old_names_of_stable_diffusions_vae_are_read(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    before = load_autoencoder(str(folder)).vae.state_dict()
    state = load_file(weights)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in state.items()}
    assert state.keys() != before.keys()
    weights.unlink()  # `before` may be mapped from this file
    save_file(state, weights, metadata={"format": "pt"})
    after = load_autoencoder(str(folder)).vae.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_pipelines_folder_means_its_vae(folder: Path) -> None:
    (folder.parent / "model_index.json").touch()
    assert load_autoencoder(str(folder.parent)).factor == 8


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://user:secret@127.0.0.1:9/x"])
def test_an_unreachable_hub_is_asked_once(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    attempts: list[bool] = []

    def load(source: str, local_files_only: bool = False, **options: object) -> None:
        attempts.append(local_files_only)
        raise OSError("not cached")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", load)
    message = rf"not in {tmp_path}, and http://.*127.0.0.1:9.* is unreachable: .*--vae \./vae"
    with pytest.raises(UserError, match=message) as error:
        load_autoencoder("mse")
    assert attempts == [True]  # the hub's client, which retries, was not called
    assert "secret" not in str(error.value)
