"""The decoder on the C kernels against the layers of model/vae.py, which run on torch."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import randomize, relative
from torch import Tensor

from svdit.kernels.cpu import choice, ffi
from svdit.model.autoencoder import Autoencoder
from svdit.model.vae import VAE, VAEConfig
from svdit.runtime import decoder
from svdit.runtime.decoder import Decoder, with_kernels

FAST = [isa for isa in ffi.isas() if isa in decoder.FASTER]
CONFIG = VAEConfig((32, 64, 32), layers_per_block=1, latent_channels=5, norm_num_groups=8)
pytestmark = pytest.mark.skipif(bool(ffi.missing()) or not FAST, reason=ffi.missing() or "no fast instruction set")


@pytest.fixture
def vae() -> VAE:
    return randomize(VAE(CONFIG).requires_grad_(False))


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("change", [{}, {"mid_block_add_attention": False}, {"use_post_quant_conv": False}])
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (1, 5, 1, 1), (0, 5, 2, 2), (1, 5, 0, 3)])
def test_images_are_those_of_torch(isa: str, change: dict[str, bool], shape: tuple[int, ...]) -> None:
    vae, z = randomize(VAE(replace(CONFIG, **change)).requires_grad_(False)), torch.randn(shape)
    images = Decoder(vae, ffi.kernels(isa))(z)
    assert images.shape == (shape[0], 3, 4 * shape[2], 4 * shape[3])
    if z.numel():
        expected = vae.decode(z).sample
        assert 0 < relative(images, expected) < 1e-4


def test_it_is_copied_and_changed_like_that_of_torch(vae: VAE) -> None:
    ours, z = Autoencoder("random", vae, decoder=Decoder(vae, ffi.kernels(FAST[0]))), torch.randn(2, 5, 3, 7)
    expected = ours.decode(z)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied.decode(z), expected)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert torch.equal(ours.decode(z), expected)
    vae.bfloat16()
    assert ours.decode(z).dtype == torch.bfloat16
    assert torch.equal(ours.decode(z), replace(ours, decoder=None).decode(z))


def test_attention_of_many_pixels_in_parts(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    z, fast = torch.randn(1, 5, 5, 6), Decoder(vae, ffi.kernels(FAST[0]))
    whole = fast(z)
    monkeypatch.setattr(decoder, "QUERIES", 7)
    assert torch.equal(fast(z), whole)


def test_images_depend_neither_on_the_batch_nor_on_the_number_of_threads(vae: VAE) -> None:
    ours, z, found = (
        Autoencoder("random", vae, decoder=Decoder(vae, ffi.kernels(FAST[0]))),
        torch.randn(3, 5, 9, 16),
        [],
    )
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [ours.decode(z), torch.cat([ours.decode(one) for one in z.split(1)])]
    finally:
        torch.set_num_threads(1)
    assert found[0].std() > 0.01
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_latents_are_denormalized_first_and_images_clamped(vae: VAE) -> None:
    plain = Autoencoder("random", vae, mean=(1.0,) * 5, std=(30.0,) * 5)
    fast, z = replace(plain, decoder=Decoder(vae, ffi.kernels(FAST[0]))), torch.randn(1, 5, 4, 4)
    assert relative(fast.decode(z), plain.decode(z)) < 1e-4
    assert fast.decode(z).abs().max() <= 1


def test_only_what_is_faster_is_replaced(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoder_for(own: object) -> Decoder | None:
        return with_kernels(Autoencoder("random", own)).decoder  # type: ignore[return-value]

    def chosen(isa: str) -> None:
        monkeypatch.setattr(choice, "choice", lambda: choice.Choice(isa, isa))

    chosen(FAST[-1])
    fast = decoder_for(vae)
    assert fast is not None and fast.kernels.isa == FAST[-1]
    for other in (None, torch.nn.Identity(), VAE(CONFIG).bfloat16(), VAE(CONFIG).to("meta")):
        assert decoder_for(other) is None
    chosen("portable")
    assert decoder_for(vae) is None
    chosen(FAST[-1])
    monkeypatch.setattr(ffi, "missing", lambda: "there is no C compiler")
    assert decoder_for(vae) is None


def test_decoding_leaves_weights_and_latents_alone(vae: VAE) -> None:
    z = torch.randn(1, 5, 4, 4)
    before: dict[str, Tensor] = {name: x.clone() for name, x in vae.state_dict().items()}
    latents = z.clone()
    Decoder(vae, ffi.kernels(FAST[0]))(z)
    assert torch.equal(z, latents)
    assert all(torch.equal(x, before[name]) for name, x in vae.state_dict().items())
