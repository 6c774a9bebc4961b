"""The models of all families against the published outputs."""

import pytest
import torch
from conftest import relative
from families import MODELS, VARIANTS, Published, small

from svdit.errors import UserError
from svdit.model.config import FAMILIES, DiTConfig
from svdit.model.dit import DiT
from svdit.model.embeddings import rotation


@pytest.fixture(scope="module", params=MODELS)
def published(request: pytest.FixtureRequest) -> Published:
    return Published(request.param)


@torch.no_grad()
def test_forward_equals_published(published: Published) -> None:
    output = published.model(published["x"], published["t"], published["y"])
    assert output.shape == published["forward"].shape
    assert relative(output, published["forward"]) < 2e-5


@torch.no_grad()
def test_every_block_equals_published(published: Published) -> None:
    """Of the first image, also where the tokens of the class are in front of the patches."""
    tokens = []
    for block in published.model.blocks:
        block.register_forward_hook(lambda module, args, output: tokens.append(output[:1]))
    published.model(published["x"], published["t"], published["y"])
    for i, ours in enumerate(tokens):
        theirs = published[f"tokens_{i + 1}"]
        assert relative(ours.squeeze(0), theirs.reshape(ours.shape[1:])) < 2e-5


def test_rotations_equal_published(published: Published) -> None:
    if "feat_rope.freqs_cos" in published.weights:
        theirs = published.weights["feat_rope.freqs_cos"], published.weights["feat_rope.freqs_sin"]
    elif "rope_cos" in published:
        theirs = published["rope_cos"], published["rope_sin"]
    else:
        assert not published.config.rope
        return
    assert torch.equal(published.model.rotation, torch.stack(theirs))


def test_all_families_have_published_outputs() -> None:
    assert {Published(name).config.family for name in MODELS} == set(FAMILIES) - {"dit"} == set(VARIANTS) - {"dit"}


@torch.no_grad()
def test_without_shift_is_with_a_shift_of_zero() -> None:
    """Scale, gate, scale, gate become zero, scale, gate, zero, scale, gate."""
    without, with_ = small("lightningdit", shift=False), small("lightningdit")
    for mine, others in zip(without.blocks, with_.blocks, strict=True):
        linear, wider = mine.adaLN_modulation[1], others.adaLN_modulation[1]
        for name in ("weight", "bias"):
            scale1, gate1, scale2, gate2 = getattr(linear, name).chunk(4)
            zero = torch.zeros_like(scale1)
            getattr(wider, name).copy_(torch.cat([zero, scale1, gate1, zero, scale2, gate2]))
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([0.1, 0.7]), torch.tensor([0, 3])
    rest = {key: value for key, value in without.state_dict().items() if ".adaLN" not in key or "final" in key}
    with_.load_state_dict(rest, strict=False)
    assert relative(without(x, t, y), with_(x, t, y)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_only_dit_returns_a_variance(family: str) -> None:
    model = small(family, learn_sigma=True)
    x = torch.randn(2, *model.input_shape)
    output = model(x, torch.tensor([0.0, 1.0]), torch.tensor([0, 5]))
    assert output.shape == (2, (2 if family == "dit" else 1) * x.shape[1], 4, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_model_returns_zero(family: str) -> None:
    model = DiT(small(family).config)
    x = torch.randn(2, *model.input_shape)
    assert model(x, torch.tensor([0.0, 1.0]), torch.tensor([0, 5])).abs().max() == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_rotations_keep_lengths_and_depend_on_distances() -> None:
    """The product of two turned vectors depends on the difference of their places, in rows and columns."""
    cos, sin = rotation(16, 5)
    q, k = torch.randn(16), torch.randn(16)

    def turned(x: torch.Tensor, row: int, column: int) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(-1, 2).contiguous())
        turn = torch.complex(cos[row * 5 + column, ::2], sin[row * 5 + column, ::2])
        return torch.view_as_real(pairs * turn).flatten()

    assert torch.allclose(turned(q, 3, 2).norm(), q.norm())
    there, here = turned(q, 3, 2) @ turned(k, 1, 4), turned(q, 2, 0) @ turned(k, 0, 2)
    assert torch.allclose(there, here, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"family": "rit"}, "family is 'rit'; choose one of dit, sit"),
        ({"family": "sit"}, "time is 'timesteps', but family 'sit' has 'noise_to_data'"),
        ({"path": "linear"}, "a dit with path 'linear' and prediction 'epsilon' does not exist; choose ddpm"),
        ({"prediction": "score"}, "a dit with path 'ddpm' and prediction 'score' does not exist"),
        ({"family": "sit", "time": "noise_to_data"}, "choose linear, gvp or vp"),
        ({"latent_std": (1.0,)}, "latent_mean has 0 values and latent_std 1"),
        ({"latent_std": (1.0,), "latent_mean": (0.0,)}, "pass one for each of the 4 channels"),
        ({"latent_std": (1.0, 1.0, 1.0, 0.0), "latent_mean": (0.0,) * 4}, "choose numbers above 0"),
        ({"latent_std": [1.0] * 4}, "pass a tuple of finite floats"),
        ({"latent_std": (1.0, 1.0, 1.0, float("nan"))}, "pass a tuple of finite floats"),
        ({"noise_scale": -1.0}, "choose numbers above 0"),
        ({"rope": True, "num_heads": 32}, "a head has 2 channels; choose a multiple of 4"),
        ({"context_tokens": -1}, "choose 0 or more"),
        ({"context_start": 28}, "choose a block from 0 to 27"),
    ],
)
def test_impossible_configurations_are_sentences(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        DiTConfig(**{"hidden_size": 64, "num_heads": 2, **fields})  # type: ignore[arg-type]
