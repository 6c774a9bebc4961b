"""Many images: a folder of PNGs, one .npz in ADM's layout, and a manifest of the settings that produced them.

Label and noise of image i depend on (seed, i) alone, so the set does not depend on the batch size or the world size:
bit for bit for quantized models on a CPU, elsewhere up to a float's last bits, hence one grey level. Files are written
whole or not at all: an interrupted run resumes, and a finished one can be extended. A second run in the same folder is
refused, and images that are damaged are generated again. Memory holds one batch.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from svdit import __version__, images
from svdit.diffusion.noise import image_labels, image_noise
from svdit.diffusion.schedule import make_schedule
from svdit.distributed import barrier, on_first, rank, world_size
from svdit.errors import UserError
from svdit.files import exclusive, writable_folder
from svdit.model.autoencoder import PIXELS, Autoencoder
from svdit.model.dit import DiT
from svdit.printing import warn
from svdit.sampling.batch import SamplingConfig, check_autoencoder, check_guidance, generate_images
from svdit.storage.manifest import read_manifest, write_manifest
from svdit.storage.npz import map_npz, write_npz

Progress = Callable[[float, int], None]

LABEL_POLICIES: dict[str, Callable[[int, Sequence[int], int], list[int]]] = {
    "random": image_labels,
    "balanced": lambda seed, indices, classes: [i % classes for i in indices],
}
# Fields that may differ between the run that created a folder and the one that resumes it.
MAY_CHANGE = {"num_images", "labels", "files", "checkpoint"}


def _silent(done: float, total: int) -> None:
    pass


def generate_dataset(
    model: DiT,
    folder: str | Path,
    count: int,
    config: SamplingConfig | None = None,
    *,
    autoencoder: Autoencoder = PIXELS,
    seed: int = 0,
    batch_size: int = 32,
    label_policy: str = "random",
    origin: dict[str, Any] | None = None,
    progress: Progress = _silent,
) -> Path:
    """Generate images 0 … count − 1 into `folder`; returns the path of `<folder>.npz`.

    `label_policy`: "random" (uniform over the classes) or "balanced" (i modulo the number of classes).
    `origin`: manifest fields about the model (model, checkpoint, checkpoint_sha256, quantization, precision).
    `progress(done, total)` counts this process's images, unfinished ones as fractions.
    Raises UserError for a folder of another run, naming the field that differs, for one that another process writes,
    and for options out of range.
    """
    config = config or SamplingConfig()
    _check(count, seed, batch_size, label_policy)
    check_autoencoder(model, autoencoder)
    check_guidance(model, config.cfg_scale)
    folder = Path(folder).resolve()
    manifest = describe(model, autoencoder, config, count, seed, label_policy) | (origin or {})
    with ExitStack() as locks:
        missing = on_first(lambda: _open(folder, manifest, locks))
        mine, steps = missing[rank() :: world_size()], len(make_schedule(config.steps))
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]

            def tick(step: int, x: object, done: int = start, size: int = len(batch)) -> None:
                progress(done + size * step / steps, len(mine))

            labels = [manifest["labels"][i] for i in batch]
            noise = image_noise(seed, batch, model.input_shape, model.pos_embed.device)
            pixels = generate_images(model, labels, config, autoencoder=autoencoder, noise=noise, callback=tick)
            for i, image in zip(batch, pixels, strict=True):
                images.write_png(folder / manifest["files"][i], image)
        barrier()
        return _finish(folder, manifest)


def describe(
    model: DiT, autoencoder: Autoencoder, config: SamplingConfig, count: int, seed: int, label_policy: str
) -> dict[str, Any]:
    """The manifest: every setting that determines the images, and the label of each file."""
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
    for value, what in ((count, "number of images"), (batch_size, "batch size")):
        if value < 1:
            raise UserError(f"the {what} is {value}; choose at least 1")
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed is {seed}; choose a number from 0 to 2^64 - 1")
    if label_policy not in LABEL_POLICIES:
        raise UserError(f"there is no label policy {label_policy!r}; choose one of {', '.join(LABEL_POLICIES)}")


def _open(folder: Path, manifest: dict[str, Any], locks: ExitStack) -> list[int]:
    """Lock and check the folder, and write the manifest; returns the missing indices. Raises UserError if it cannot."""
    npz, record = _npz(folder), folder / "manifest.json"
    for place in (folder.parent, folder):
        writable_folder(place)
    locks.enter_context(exclusive(folder, npz))
    present = {str(path.relative_to(folder)) for path in images.list_images(folder)}
    if record.exists():
        _compare(record, manifest)
    elif present:
        raise UserError(f"{folder} contains {len(present)} images but no manifest.json; choose an empty folder")
    if strays := sorted(present - set(manifest["files"])):
        raise UserError(f"{folder} contains {strays[0]}, which is not an image of this set; move it out of the folder")
    for path in (npz, *(folder / name for name in manifest["files"] if name not in present)):
        if path.is_dir():
            raise UserError(f"{path} is a folder where a file belongs; remove or rename it")
    present -= _damaged(folder, present, manifest["image_size"])
    missing = [i for i, name in enumerate(manifest["files"]) if name not in present]
    if missing:
        npz.unlink(missing_ok=True)  # it exists only for complete sets
    write_manifest(record, manifest)
    return missing


def _damaged(folder: Path, names: set[str], size: int) -> set[str]:
    """The images that are not whole, with a warning: they are generated again."""
    with ThreadPoolExecutor() as pool:
        whole = pool.map(lambda name: images.is_whole_png(folder / name, size), names)
        damaged = {name for name, is_whole in zip(names, whole, strict=True) if not is_whole}
    if damaged:
        warn(f"{len(damaged)} images in {folder} are damaged and are generated again (first: {min(damaged)})")
    return damaged


def _compare(record: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError unless `manifest` may resume the run that wrote `record`."""
    written = read_manifest(record)
    if written is None or written.get("num_images") is None:
        raise UserError(f"{record} is not a manifest written by svdit; choose another folder")
    for field, value in json.loads(json.dumps(manifest)).items():
        if field not in MAY_CHANGE and written.get(field) != value:
            raise UserError(
                f"{record.parent} belongs to a run with {field} {written.get(field)!r}, not {value!r}; "
                "choose another folder, or the same settings to resume"
            )
    if written["num_images"] > manifest["num_images"]:
        raise UserError(
            f"{record.parent} belongs to a run of {written['num_images']} images, not {manifest['num_images']}; "
            "choose another folder or a larger number"
        )


def _finish(folder: Path, manifest: dict[str, Any]) -> Path:
    """Write the .npz on rank 0, unless it is complete; returns its path."""
    npz, files = _npz(folder), manifest["files"]
    if rank() == 0 and not _is_complete(npz, len(files), manifest["image_size"]):
        write_npz(npz, (images.read_image(folder / name) for name in files), len(files))
    return npz


def _is_complete(npz: Path, count: int, size: int) -> bool:
    """Whether the file exists and contains that many images, by its header and its checksum."""
    if not npz.exists():
        return False
    try:
        array = map_npz(npz)
        complete = array.shape == (count, size, size, 3) and array.dtype == "uint8"
    except UserError:
        complete = False
    if not complete:
        warn(f"{npz} is damaged or incomplete and is written again")
    return complete


def _npz(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.npz")
