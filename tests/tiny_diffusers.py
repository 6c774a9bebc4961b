"""Nine transformers of diffusers with a few random blocks of width 128, and inputs for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from conftest import randomize
from torch import Tensor, nn

from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
import diffusers  # noqa: E402

Inputs = dict[str, Any]
HEADS, HEAD = 2, 64
WIDTH = HEADS * HEAD


class Tiny(NamedTuple):
    """A class of diffusers, a small configuration, and inputs for N examples from a generator."""

    kind: str
    config: dict[str, Any]
    inputs: Callable[[int, torch.Generator], Inputs]

    def model(self, seed: int = 0) -> Any:
        """The model with random weights, in eval mode."""
        torch.manual_seed(seed)
        model = getattr(diffusers, self.kind)(**self.config)
        randomize(model)
        return model.eval()


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def uniform(generator: torch.Generator, n: int, scale: float = 1.0) -> Tensor:
    return torch.rand(n, generator=generator) * scale


def dit(n: int, g: torch.Generator) -> Inputs:
    labels = torch.randint(0, 10, (n,), generator=g)
    return {"hidden_states": noise(g, n, 4, 8, 8), "timestep": uniform(g, n, 999).long(), "class_labels": labels}


def pixart(n: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": noise(g, n, 4, 8, 8),
        "encoder_hidden_states": noise(g, n, 6, 32),
        "timestep": uniform(g, n, 999).long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3(n: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": noise(g, n, 4, 8, 8),
        "encoder_hidden_states": noise(g, n, 6, 32),
        "pooled_projections": noise(g, n, 32),
        "timestep": uniform(g, n, 1000),
    }


def flux(n: int, g: torch.Generator, axes: int = 3) -> Inputs:
    grid = torch.zeros(16, axes)
    grid[:, 1], grid[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": noise(g, n, 16, 16),
        "encoder_hidden_states": noise(g, n, 6, 32),
        "pooled_projections": noise(g, n, 32),
        "timestep": uniform(g, n),
        "img_ids": grid,
        "txt_ids": torch.zeros(6, axes),
    }


def flux2(n: int, g: torch.Generator) -> Inputs:
    inputs = flux(n, g, 4)
    del inputs["pooled_projections"]
    return {**inputs, "guidance": torch.full((n,), 4.0)}


def sana(n: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": noise(g, n, 4, 8, 8),
        "encoder_hidden_states": noise(g, n, 6, 32),
        "timestep": uniform(g, n, 1000),
    }


def qwen(n: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": noise(g, n, 16, 16),
        "encoder_hidden_states": noise(g, n, 6, 32),
        "encoder_hidden_states_mask": torch.ones(n, 6, dtype=torch.bool),
        "timestep": uniform(g, n),
        "img_shapes": [[(1, 4, 4)]] * n,
    }


def wan(n: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": noise(g, n, 4, 2, 8, 8),
        "timestep": uniform(g, n, 999).long(),
        "encoder_hidden_states": noise(g, n, 6, 32),
    }


def z_image(n: int, g: torch.Generator) -> Inputs:
    images, captions = noise(g, n, 4, 1, 8, 8), noise(g, n, 6, 32)
    return {"x": list(images), "t": uniform(g, n), "cap_feats": list(captions)}


HEADED = {"num_attention_heads": HEADS, "attention_head_dim": HEAD, "num_layers": 2}
TEXT = {"joint_attention_dim": 32}
MODELS = {
    "DiT": Tiny("DiTTransformer2DModel", {**HEADED, "sample_size": 8, "num_embeds_ada_norm": 10}, dit),
    "PixArt": Tiny(
        "PixArtTransformer2DModel",
        {**HEADED, "sample_size": 8, "cross_attention_dim": WIDTH, "caption_channels": 32},
        pixart,
    ),
    "SD3": Tiny(
        "SD3Transformer2DModel",
        {
            **{**HEADED, **TEXT, "sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8},
            **{"caption_projection_dim": WIDTH, "pooled_projection_dim": 32, "dual_attention_layers": (0,)},
            "qk_norm": "rms_norm",
        },
        sd3,
    ),
    "Flux": Tiny(
        "FluxTransformer2DModel",
        {
            **{**HEADED, **TEXT, "in_channels": 16, "num_single_layers": 2, "pooled_projection_dim": 32},
            "axes_dims_rope": (16, 24, 24),
        },
        flux,
    ),
    "Flux2": Tiny(
        "Flux2Transformer2DModel",
        {
            **{**HEADED, **TEXT, "in_channels": 16, "num_single_layers": 2, "timestep_guidance_channels": 32},
            "axes_dims_rope": (16, 16, 16, 16),
        },
        flux2,
    ),
    "Sana": Tiny(
        "SanaTransformer2DModel",
        {
            **{**HEADED, "in_channels": 4, "out_channels": 4, "sample_size": 8, "caption_channels": 32},
            **{"cross_attention_dim": WIDTH, "num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD},
        },
        sana,
    ),
    "Qwen-Image": Tiny(
        "QwenImageTransformer2DModel",
        {**HEADED, **TEXT, "in_channels": 16, "out_channels": 4, "axes_dims_rope": (16, 24, 24)},
        qwen,
    ),
    "Wan": Tiny(
        "WanTransformer3DModel",
        {
            **{**HEADED, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 64, "ffn_dim": 4 * WIDTH},
            "rope_max_seq_len": 32,
        },
        wan,
    ),
    "Z-Image": Tiny(
        "ZImageTransformer2DModel",
        {
            **{"in_channels": 4, "dim": WIDTH, "n_layers": 2, "n_refiner_layers": 1, "n_heads": HEADS},
            **{"n_kv_heads": HEADS, "cap_feat_dim": 32, "axes_dims": [16, 24, 24], "axes_lens": [64, 64, 64]},
        },
        z_image,
    ),
}


@torch.no_grad()
def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """What the model predicts, as one tensor."""
    result = model(**inputs, return_dict=False)[0]
    return torch.stack(result) if isinstance(result, list) else result


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
