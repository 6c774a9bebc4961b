"""Tiny random pipelines of diffusers: a DiT, and others with text encoders and tokenizers that are built here."""

from pathlib import Path
from typing import Any

import torch
from conftest import randomize
from tiny_diffusers import MODELS

import diffusers  # isort: skip

WORDS = ["▁a", "▁photograph", "▁of", "▁red", "▁fox", "▁painting", "▁the", "▁in", "▁on"]
ALPHABET = [chr(i) for i in range(97, 123)]


def vae(channels: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=4, latent_channels=channels, sample_size=16, **blocks, **options
    )


def t5() -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(word, -3.0) for word in WORDS] + [(letter, -5.0) for letter in ALPHABET]
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    torch.manual_seed(1)
    return {"encoder": T5EncoderModel(config), "tokenizer": T5Tokenizer(vocab=vocabulary, extra_ids=0)}


def clip(projection: bool) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [*ALPHABET, *(f"{letter}</w>" for letter in ALPHABET), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    torch.manual_seed(2)
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return {"encoder": kind(config), "tokenizer": tokenizer}


def transformer(name: str, **changes: Any) -> Any:
    tiny = MODELS[name]
    return tiny._replace(config={**tiny.config, **changes}).model()


def dit() -> Any:
    model = transformer("DiT", num_embeds_ada_norm=1000, out_channels=8)  # its null class is 1000
    return diffusers.DiTPipeline(model, vae(), diffusers.DDIMScheduler())


def pixart() -> Any:
    text = t5()
    return diffusers.PixArtSigmaPipeline(
        tokenizer=text["tokenizer"],
        text_encoder=text["encoder"],
        vae=vae(),
        transformer=transformer("PixArt"),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sd3() -> Any:
    first, second, third = clip(True), clip(True), t5()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer("SD3"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=first["encoder"],
        tokenizer=first["tokenizer"],
        text_encoder_2=second["encoder"],
        tokenizer_2=second["tokenizer"],
        text_encoder_3=third["encoder"],
        tokenizer_3=third["tokenizer"],
    )


def flux() -> Any:
    first, second = clip(False), t5()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=first["encoder"],
        tokenizer=first["tokenizer"],
        text_encoder_2=second["encoder"],
        tokenizer_2=second["tokenizer"],
        transformer=transformer("Flux", pooled_projection_dim=16),
    )


PIPELINES = {"DiT": dit, "PixArt": pixart, "SD3": sd3, "Flux": flux}


def saved(name: str, folder: Path, **options: Any) -> Path:
    """A pipeline written to a new folder."""
    pipeline = PIPELINES[name]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            randomize(part)
    pipeline.save_pretrained(folder, **options)
    return folder
