"""Many images: PNG files, WebDataset shards or an .npz in ADM's layout, and a manifest of the settings behind them.

Label and noise of image i depend on (seed, i) alone, so the set does not depend on the batch size or the world size:
bit for bit for quantized models on a CPU, elsewhere up to a float's last bits, hence one grey level. Processes claim
batches, so a slower one draws fewer. Files are written whole or not at all, by threads: an interrupted run resumes,
on any number of processes, and a finished one can be extended. A second run in the same folder is refused. Memory
holds a few batches.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from svdit import __version__, images
from svdit.diffusion.noise import check_seed, image_labels, image_noise
from svdit.distributed import Counter, check_shared, claimed, gather, on_first, world_size
from svdit.errors import UserError, nearest, unknown
from svdit.files import exclusive, writable_folder
from svdit.model.autoencoder import PIXELS, Autoencoder
from svdit.model.dit import DiT
from svdit.printing import warn
from svdit.sampling.batch import (
    SamplingConfig,
    check_autoencoder,
    check_guidance,
    default_sampling,
    generate_images,
    plan_for,
)
from svdit.sampling.parts import NAME as PARTS
from svdit.sampling.sinks import SINKS, Sink, earlier_path, npz_path
from svdit.sampling.writers import Writers
from svdit.storage.checksum import digest
from svdit.storage.manifest import read_manifest, write_manifest

Progress = Callable[[float, int], None]

LABEL_POLICIES: dict[str, Callable[[int, Sequence[int], int], list[int]]] = {
    "random": image_labels,
    "balanced": lambda seed, indices, classes: [i % classes for i in indices],
}
OF_MODEL = ("family", "prediction", "time", "path", "noise_scale", "uint8")  # of its configuration
# Fields that may differ between the run that created a folder and the one that resumes it.
MAY_CHANGE = {"num_images", "labels", "files", "checkpoint", "command"}
ARCHIVES = ("*.tar", f"{PARTS}/*.tar", "features/*.npz")  # in which sinks keep what they have of a set
POLL = 0.1  # seconds between two looks at what the other processes have finished


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
    sink: str | Sink = "png",
    origin: dict[str, Any] | None = None,
    progress: Progress = _silent,
) -> Any:
    """Generate images 0 … count − 1 into `folder`; returns the path of `<folder>.npz`, or what another `sink` returns.

    `label_policy`: "random" (uniform over the classes) or "balanced" (i modulo the number of classes).
    `sink`: "png", "tar" or "npz", see `SINKS`, or an object with the methods of `Sink`, as `evaluation.stream.Stream`.
    `batch_size`: at most so many images at once.
    `origin`: manifest fields about the model (model, checkpoint, checkpoint_sha256, quantization, precision) and its
    protocol (protocol, overrides, reference), on every process. Without checkpoint_sha256 the tensors are hashed, those
    of an accelerated model as this processor's kernels have them.
    `progress(done, total)` counts the images of all processes, this one's unfinished ones as fractions.
    Raises UserError for a folder of another run, naming the field that differs, for one that another process writes
    or that not all hosts see, for processes that differ in a setting, and for options out of range.
    """
    config = config or default_sampling(model.config)
    steps = len(config.schedule(model.config))
    _check(count, seed, batch_size, label_policy)
    check_autoencoder(model, autoencoder)
    check_guidance(model, config.scale(model.config))
    folder, sink = Path(folder).resolve(), _sink(sink)
    manifest = describe(model, autoencoder, config, count, seed, label_policy)
    manifest |= {"storage": sink.form} | (origin or {})
    if not manifest["checkpoint_sha256"]:
        manifest["checkpoint_sha256"] = digest({}, tensors_of(model))
    _check_alike(manifest)
    sink.open(folder, manifest)
    with ExitStack() as locks:
        missing = on_first(lambda: _open(folder, manifest, sink, locks))
        check_shared(folder / "manifest.json")
        tally = _Tally(count, len(missing), progress)

        def draw(batch: Sequence[int]) -> images.Pixels:
            labels = [manifest["labels"][i] for i in batch]
            noise = image_noise(seed, batch, model.input_shape, model.pos_embed.device)
            tick = tally.ticks(len(batch), steps)
            return generate_images(model, labels, config, autoencoder=autoencoder, noise=noise, callback=tick)

        batches = list(split(missing, batch_size, world_size()))
        with Writers(sink.write) as writers:
            store = writers.submit if sink.threaded else sink.write
            for k in claimed(len(batches)):
                store(batches[k], draw(batches[k]))
                tally.add(len(batches[k]))
        tally.wait()
        return sink.finish()


class _Tally:
    """Reports the progress of all processes, with this one's unfinished images as fractions."""

    def __init__(self, total: int, missing: int, progress: Progress) -> None:
        self.total, self.before, self.progress = total, total - missing, progress
        self.drawn, self.ended = Counter(), Counter()

    def add(self, images: int = 0, unfinished: float = 0) -> None:
        """Count drawn images."""
        self.progress(self.before + self.drawn.add(images) + unfinished, self.total)

    def ticks(self, size: int, steps: int) -> Callable[[int, Tensor], None]:
        """The sampler's callback for a batch."""
        return lambda done, x: self.add(unfinished=size * done / steps)

    def wait(self) -> None:
        """Wait until every process has called this."""
        self.ended.add(1)
        while self.ended.add(0) < world_size():
            self.add()
            time.sleep(POLL)
        if self.before < self.total:
            self.add()  # what the others have finished since


def split(missing: Sequence[int], batch_size: int, processes: int) -> Iterator[Sequence[int]]:
    """Batches to claim one by one: smaller ones at the end, down to a quarter, so that all finish at about one time."""
    start = 0
    while (rest := len(missing) - start) > 0:
        size = min(batch_size, max(-(-rest // processes), batch_size // 4, 1))
        yield missing[start : start + size]
        start += size


def _check_alike(manifest: dict[str, Any]) -> None:
    """Raises UserError where hosts have other processors, checkpoints or versions: images would depend on who drew."""
    first, *others = gather({field: value for field, value in manifest.items() if field not in MAY_CHANGE})
    for n, other in enumerate(others, 1):
        for field, value in first.items():
            if other[field] != value:
                raise UserError(
                    f"process {n} has the {field} {other[field]!r}, the first one {value!r}; use the same checkpoint "
                    "and options everywhere, and set SVDIT_ISA to the same on all hosts"
                )


def _sink(sink: str | Sink) -> Sink:
    if isinstance(sink, str) and sink in SINKS:
        return SINKS[sink]()
    if isinstance(sink, str | type) or not isinstance(sink, Sink):
        choices = f"{', '.join(SINKS)}, or pass an object like them"
        raise UserError(f"there is no sink {sink!r}; choose one of {choices}{nearest(sink, SINKS)}")
    return sink


def describe(
    model: DiT, autoencoder: Autoencoder, config: SamplingConfig, count: int, seed: int, label_policy: str
) -> dict[str, Any]:
    """The manifest: every setting that determines the images, and the label of each file."""
    classes, statistics = model.config.num_classes, (model.config.latent_mean, model.config.latent_std)
    return {
        "tool": "svdit",
        "version": __version__,
        "model": "",
        "checkpoint": "",
        "checkpoint_sha256": "",
        "quantization": None,
        "precision": str(model.pos_embed.dtype).removeprefix("torch."),
        **{field: getattr(model.config, field) for field in OF_MODEL},
        "latents": digest({"statistics": statistics}, {})[:16] if model.config.latent_std else None,
        **dict.fromkeys(("protocol", "overrides", "reference")),
        "image_size": model.config.input_size * autoencoder.factor,
        "num_images": count,
        "num_classes": classes,
        "label_policy": label_policy,
        "seed": seed,
        **asdict(config),
        "caching": caching(model, config),
        "vae": autoencoder.name,
        "labels": LABEL_POLICIES[label_policy](seed, range(count), classes),
        "files": [f"{i:06d}.png" for i in range(count)],
    }


def tensors_of(model: DiT) -> dict[str, Tensor]:
    """Every tensor (…) of a model, on the CPU; of an accelerated one as its backend packed them."""
    return {name: x.detach().cpu() for name, x in (*model.named_parameters(), *model.named_buffers())}


def caching(model: DiT, config: SamplingConfig) -> dict[str, Any] | None:
    """What identifies the cache plan that sampling follows; None without."""
    plan = plan_for(model, config)
    return {"speedup": plan.record.get("speedup"), "sha256": digest(asdict(plan), {})[:16]} if plan else None


def _check(count: int, seed: int, batch_size: int, label_policy: str) -> None:
    for value, what in ((count, "number of images"), (batch_size, "batch size")):
        if value < 1:
            raise UserError(f"the {what} is {value}; choose at least 1")
    check_seed(seed)
    if label_policy not in LABEL_POLICIES:
        raise unknown("label policy", label_policy, LABEL_POLICIES)


def _open(folder: Path, manifest: dict[str, Any], sink: Sink, locks: ExitStack) -> list[int]:
    """Lock and check the folder, and write the manifest; returns the missing indices. Raises UserError if it cannot."""
    npz, record = npz_path(folder), folder / "manifest.json"
    for place in (folder.parent, folder):
        writable_folder(place)
    locks.enter_context(exclusive(folder, npz))
    if npz.is_dir():
        raise UserError(f"{npz} is a folder where a file belongs; remove or rename it")
    if record.exists():
        _compare(record, manifest)
    else:
        _check_empty(folder)
        for other in filter(Path.exists, (npz, earlier_path(npz))):
            _set_aside(other, npz)
    missing = sink.missing()
    write_manifest(record, manifest)
    return missing


def _check_empty(folder: Path) -> None:
    """Raises UserError for images, archives or features, whose settings nobody knows without a manifest."""
    archives = (path for pattern in ARCHIVES for path in folder.glob(pattern))
    if present := [*images.list_images(folder), *sorted(archives)]:
        stray = present[0].relative_to(folder)
        raise UserError(f"{folder} contains {stray} but no manifest.json; choose an empty folder")


def _set_aside(other: Path, npz: Path) -> None:
    """Rename images of another set, of a folder that was renamed for example. Raises UserError if that is taken."""
    kept = npz.with_suffix(".other.npz")
    if kept.exists():
        raise UserError(f"{other} is not of this set and {kept} exists; remove one of them, or choose another folder")
    other.rename(kept)
    warn(f"{other} was not of this set and is now {kept}")


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
