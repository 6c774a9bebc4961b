"""Position and timestep embeddings against diffusers'."""

import torch

from svdit.model.embeddings import position_embedding, sinusoids
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding  # noqa: E402


def test_position_embedding_equals_diffusers() -> None:
    ours = position_embedding(64, 6)[0]
    theirs = get_2d_sincos_pos_embed(64, 6, base_size=6, output_type="pt")
    assert (ours - theirs).abs().max() < 1e-6
    assert ours.std() > 0.5


def test_timestep_embedding_equals_diffusers() -> None:
    t = torch.tensor([0, 1, 17, 999])
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert (sinusoids(t) - theirs).abs().max() < 1e-5
