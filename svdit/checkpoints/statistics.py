"""Statistics of latents, per channel: a model that learned normalized latents x needs them to decode std · x + mean.

They are in `latents_stats.pt` of LightningDiT (mean, std), in `*-latents-stats.pt` of REPA-E (1/std, mean), and in the
batch norm of models that REPA-E trained together with their autoencoder.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from svdit.errors import UserError
from svdit.storage import pickles

FILE = re.compile(r"(.+-latents-stats|latents_stats)\.pt")
MULTIPLIER = 0.18215  # LightningDiT's latent_multiplier where its configuration has none
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # means, standard deviations


def latent_statistics(path: str | Path, multiplier: float = 1.0) -> Statistics:
    """Means and standard deviations in a statistics file of LightningDiT or REPA-E.

    `multiplier` is LightningDiT's `latent_multiplier`. Raises UserError for other files.
    """
    path = Path(path)
    content = pickles.load(path)
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {key: value for key, value in entries if isinstance(value, Tensor)}
    pickles.check_memory(path, tensors, path.stat().st_size)
    if {"mean", "std"} <= tensors.keys():
        return checked(tensors["mean"], tensors["std"] / multiplier, path)
    if {"latents_scale", "latents_bias"} <= tensors.keys():
        return checked(tensors["latents_bias"], 1 / tensors["latents_scale"], path)
    raise UserError(
        f"{path} has no statistics of latents, mean and std or latents_bias and latents_scale; pass another file"
    )


def of_batch_norm(tensors: Mapping[str, Tensor], path: Path) -> Statistics | None:
    """Those of the batch norm among a model's tensors (…), None without one. Raises UserError for unusable ones."""
    names = ("bn.running_mean", "bn.running_var")
    if not any(name in tensors for name in names):
        return None
    if not all(name in tensors for name in names):
        raise UserError(f"{path} has only one of {names[0]} and {names[1]}; pass a complete checkpoint")
    mean, variance = (tensors[name] for name in names)
    return checked(mean, variance.float().sqrt(), path)


def beside(path: Path, channels: int, multiplier: float) -> Statistics | None:
    """Those in the only statistics file in the folder of a checkpoint; None where it is of other channels."""
    files = [file for file in path.parent.iterdir() if FILE.fullmatch(file.name)]
    statistics = latent_statistics(files[0], multiplier) if len(files) == 1 else None
    return statistics if statistics and len(statistics[1]) == channels else None


def checked(mean: Tensor, std: Tensor, path: Path) -> Statistics:
    """(C,) or (1, C, 1, 1) means and standard deviations as tuples. Raises UserError for others."""
    channels = std.numel()
    if any(tensor.shape not in ((channels,), (1, channels, 1, 1)) for tensor in (mean, std)):
        raise UserError(
            f"{path} has latent statistics of the shapes {tuple(mean.shape)} and {tuple(std.shape)}, not one number "
            "per channel; pass another file"
        )
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(
            f"{path} has latent statistics that are not finite, or variances that are not above 0; pass another file"
        )
    return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())
