"""Many pictures: a folder of PNGs, one .npz in ADM's layout, and a manifest of how they came about.

Label and noise of picture i depend on (seed, i) alone, so the set does not depend on the batch size or on the
number of processes (pictures may differ in a float's last bits, hence by one grey level). Each picture is a whole
file or none: a run that was stopped continues, and a finished one can be grown. Memory holds one batch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from svdit import __version__, images
from svdit.diffusion.noise import image_labels, image_noise
from svdit.diffusion.schedule import make_schedule
from svdit.distributed import barrier, gather, rank, world_size
from svdit.errors import UserError
from svdit.files import atomic_path, writable_folder
from svdit.model.autoencoder import Autoencoder
from svdit.model.dit import DiT
from svdit.sampling.batch import SamplingConfig, pictures

Progress = Callable[[float, int], None]

LABEL_POLICIES: dict[str, Callable[[int, Sequence[int], int], list[int]]] = {
    "random": lambda seed, indices, classes: image_labels(seed, indices, classes).tolist(),
    "balanced": lambda seed, indices, classes: [i % classes for i in indices],
}
# What may differ between the run that began a folder and the one that continues it.
GROWS = {"num_images", "labels", "files", "checkpoint"}


def _silent(done: float, total: int) -> None:
    pass


def generate_dataset(
    model: DiT,
    autoencoder: Autoencoder,
    config: SamplingConfig,
    *,
    folder: str | Path,
    count: int,
    seed: int = 0,
    batch_size: int = 32,
    label_policy: str = "random",
    origin: dict[str, Any] | None = None,
    progress: Progress = _silent,
) -> Path:
    """Draw pictures 0 … count − 1 into `folder` and return the path of `<folder>.npz`.

    `label_policy`: "random" labels, uniform over the classes, or "balanced", i modulo the number of classes.
    `origin`: what the manifest shall say of the model (model, checkpoint, checkpoint_sha256, quantization,
    precision). `progress(done, total)` counts this process's pictures, unfinished ones in fractions.
    A folder that another run began is a UserError naming the field that differs.
    """
    _check(count, seed, batch_size, label_policy)
    folder = Path(folder).resolve()
    manifest = describe(model, autoencoder, config, count, seed, label_policy) | (origin or {})
    missing = _begin(folder, manifest)
    mine = missing[rank() :: world_size()]
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]

        def tick(share: float, done: int = start, size: int = len(batch)) -> None:
            progress(done + size * share, len(mine))

        labels = [manifest["labels"][i] for i in batch]
        for i, picture in zip(batch, _draw(model, autoencoder, config, seed, batch, labels, tick), strict=True):
            images.write_png(folder / manifest["files"][i], picture)
    barrier()
    return _finish(folder, manifest["files"])


def describe(
    model: DiT, autoencoder: Autoencoder, config: SamplingConfig, count: int, seed: int, label_policy: str
) -> dict[str, Any]:
    """The manifest: everything that decides what the pictures are, and which label each file has."""
    classes = model.config.num_classes
    return {
        "tool": "svdit",
        "version": __version__,
        "model": "",
        "checkpoint": "",
        "checkpoint_sha256": "",
        "quantization": None,
        "precision": "float32",
        "image_size": model.config.input_size * autoencoder.factor,
        "num_images": count,
        "num_classes": classes,
        "label_policy": label_policy,
        "seed": seed,
        **asdict(config),
        "vae": autoencoder.name,
        "labels": LABEL_POLICIES[label_policy](seed, range(count), classes),
        "files": [f"{i:06d}.png" for i in range(count)],
    }


def _check(count: int, seed: int, batch_size: int, label_policy: str) -> None:
    for value, what in ((count, "number of pictures"), (batch_size, "batch size")):
        if value < 1:
            raise UserError(f"the {what} cannot be {value}; give at least 1")
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed cannot be {seed}; give a number from 0 to 2^64 - 1")
    if label_policy not in LABEL_POLICIES:
        raise UserError(f"there is no label policy {label_policy!r}; choose one of {', '.join(LABEL_POLICIES)}")


def _draw(
    model: DiT,
    autoencoder: Autoencoder,
    config: SamplingConfig,
    seed: int,
    indices: list[int],
    labels: list[int],
    tick: Callable[[float], None],
) -> images.Pixels:
    """The pictures `indices`; `tick` hears the share of the steps that is done."""
    steps = len(make_schedule(config.steps))
    shape = (model.config.in_channels, model.config.input_size, model.config.input_size)
    noise = image_noise(seed, indices, shape, model.pos_embed.device)
    y = torch.tensor(labels)
    return pictures(model, autoencoder, y, noise, config, callback=lambda done, x: tick(done / steps))


def _begin(folder: Path, manifest: dict[str, Any]) -> list[int]:
    """The indices still to draw; one process looks, and all of them hear the same answer."""
    missing: list[int] = []
    problem: UserError | None = None
    if rank() == 0:
        try:
            missing = _open(folder, manifest)
        except UserError as error:
            problem = error
    problem, missing = gather((problem, missing))[0]
    if problem:
        raise problem
    return missing


def _open(folder: Path, manifest: dict[str, Any]) -> list[int]:
    writable_folder(folder.parent)
    writable_folder(folder)
    present = {path.name for path in images.list_images(folder)}
    record = folder / "manifest.json"
    if record.exists():
        _compare(record, manifest)
    elif present:
        raise UserError(f"{folder} holds {len(present)} pictures and no manifest.json; choose an empty folder")
    missing = [i for i, name in enumerate(manifest["files"]) if name not in present]
    if missing:
        _npz(folder).unlink(missing_ok=True)  # where it stands, the set is complete
    with atomic_path(record) as temporary:
        fields = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
        temporary.write_text(f"{{\n{fields}\n}}\n")
    return missing


def _compare(record: Path, manifest: dict[str, Any]) -> None:
    try:
        begun = json.loads(record.read_text())
        drawn = begun["num_images"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{record} is not a manifest of this tool; choose another folder") from None
    for field, value in json.loads(json.dumps(manifest)).items():
        if field not in GROWS and begun.get(field) != value:
            raise UserError(
                f"{record.parent} belongs to a run with {field} {begun.get(field)!r}, this one has {value!r}; "
                "choose another folder, or the same settings to continue"
            )
    if drawn > manifest["num_images"]:
        raise UserError(
            f"{record.parent} belongs to a run of {drawn} pictures, this one has {manifest['num_images']}; "
            "choose another folder or a larger number"
        )


def _finish(folder: Path, files: list[str]) -> Path:
    npz = _npz(folder)
    if rank() == 0 and not npz.exists():
        images.write_npz(npz, (images.read_image(folder / name) for name in files), len(files))
    return npz


def _npz(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.npz")
