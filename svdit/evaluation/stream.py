"""Evaluation while sampling: a sink of `generate_dataset` that keeps the features of images instead of the images.

DIR/features/000000.npz, … hold for each batch what the metrics need of its images, 20 KB per image: features, hashes of
the pixels, distances to counterparts, and the pixels of the 64 images to show. They stay there: the same command, also
with another reference, samples nothing, and the set can grow.

The report is that of `evaluate` on the same images in files, up to the network's round-off in batches of other sizes,
but for: path, kind and hash of the generated set; the seconds, of the metrics only; the grid of pairs, which needs the
images; and the warning that both sets contain the same images. Real features with NaN or Inf are an error at the start.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from svdit.distributed import on_first, rank, seen, world_size
from svdit.errors import UnreadableError, UserError
from svdit.evaluation.evaluate import (
    FAKE_ROWS,
    extraction,
    feature_metrics,
    picture_notes,
    prepare,
    reference,
    report,
)
from svdit.evaluation.features import (
    Extraction,
    FeatureNetwork,
    Features,
    full_precision,
    private_folder,
    summarize,
)
from svdit.evaluation.figures import overview, shown
from svdit.evaluation.inputs import open_inputs
from svdit.evaluation.jackknife import Blocks, Estimates, assign_blocks
from svdit.evaluation.options import Options
from svdit.evaluation.paired import paired_metrics
from svdit.evaluation.report import Report
from svdit.evaluation.rows import RowFiles
from svdit.evaluation.sources import ImageSet, Source
from svdit.files import atomic_path, writing
from svdit.images import Pixels, list_images
from svdit.printing import warn
from svdit.storage.npz import map_npz, npz_keys
from svdit.threads import in_threads

Part = dict[str, npt.NDArray[Any]]
NEED_IMAGES = ("num_images", "compare", "resize_to")  # options that choose or change images


class Stream:
    """The sink: `open` and `finish` are called by all processes, `missing` by the first one.

    `real`, `network` and `options` are those of `evaluate`. Raises UserError for options that need stored images.
    """

    form = "features"
    threaded = False  # TF32 is a setting of the process, and a network on the sampler's device has nothing to overlap

    def __init__(self, real: str | Path, network: FeatureNetwork | None = None, options: Options | None = None) -> None:
        self.real, self.network, self.options = real, network, options or Options()
        if used := [name for name in NEED_IMAGES if getattr(self.options, name)]:
            raise UserError(f"{', '.join(used)} cannot be used while sampling; store the images and evaluate them")

    def open(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Open the real images and the counterparts, and compute the features of the real ones.

        Raises UserError for unusable ones, and for a network that is missing.
        """
        self.folder, self.parts = folder, folder / "features"
        fake = _generated(folder, manifest)
        self.inputs = open_inputs(self.real, fake, self.options)
        self.network, self.distances = prepare(self.inputs, self.network, self.options)
        self.shown, self.reference = set(shown(fake.count)), Features({}, {})
        if self.network is not None:
            with extraction(self.options) as how:
                self.reference = reference(self.inputs, self.network, self.options, how)

    def missing(self) -> list[int]:
        """The images without features; damaged files are deleted, with a warning.

        Raises UserError where files lack what this run needs, and for images in the folder.
        """
        strays = {path.relative_to(self.folder) for path in list_images(self.folder)} - {Path("grid_fake.png")}
        if strays:
            raise UserError(
                f"{self.folder} contains {min(strays)}, but no images are stored with --evaluate; move it elsewhere"
            )
        present = {i for indices in in_threads(self._usable, self._paths()) for i in indices}
        return [i for i in range(self.inputs.fake.count) if i not in present]

    @torch.inference_mode()
    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """Store what the metrics need of a batch, uint8 (N, H, W, 3)."""
        kept = [n for n, i in enumerate(indices) if i in self.shown]
        part: Part = {"index": np.array(indices, np.int64), "sha256": _hashes(pixels)}
        part |= {"kept": part["index"][kept], "pixels": pixels[kept]}
        with full_precision():
            part |= self._measured(indices, pixels)
        with atomic_path(self.parts / f"{indices[0]:06d}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **part)

    def _measured(self, indices: Sequence[int], pixels: Pixels) -> Part:
        """The features and the distances of a batch (N, H, W, 3)."""
        part: Part = {}
        if self.network is not None:
            batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(self.options.device)
            part |= {layer: features.cpu().numpy() for layer, features in self.network(batch).items()}
            part["network"] = np.array(_identity(self.network))
        if self.inputs.counterparts is not None:
            others = [self.inputs.counterparts.read(i) for i in indices]
            part["counterparts"] = _hashes(others)
            for name, distance in self.distances.items():
                part[name] = np.array([distance(a, b) for a, b in zip(pixels, others, strict=True)], np.float32)
        return part

    def finish(self) -> Report:
        """The report, which the first process also saves in the folder."""
        started = time.perf_counter()
        paths, blocks = on_first(self._complete), assign_blocks(self.inputs.fake.count)
        estimates = feature_metrics(self.inputs, self.network, self.options, blocks, partial(self._features, paths))
        return on_first(lambda: self._report(paths, blocks, estimates[0], started))

    def _paths(self) -> list[Path]:
        return sorted(self.parts.glob("*.npz"))

    def _complete(self) -> list[Path]:
        """The files, which contain all images. Raises UserError where some are gone."""
        present: dict[Path, list[int]] = {}

        def lacking() -> int:
            present.update((path, map_npz(path, "index").tolist()) for path in self._paths() if path not in present)
            return self.inputs.fake.count - len(set().union(*present.values()))

        if not seen(lambda: lacking() == 0):
            raise UserError(f"{self.parts} lacks {lacking()} images that were sampled; run the same command again")
        return list(present)

    def _usable(self, path: Path) -> list[int]:
        """The images of a file; none if it is damaged, and deleted. Raises UserError if it is of another run."""
        try:
            part = _read(path)
        except UnreadableError:
            raise
        except UserError:
            path.unlink()
            warn(f"{path} is damaged; its images are generated again")
            return []
        if lacking := self._lacking(part):
            raise UserError(
                f"{path} has no {lacking}; choose another folder, or remove {self.parts} to sample all images again"
            )
        return part["index"].tolist()

    def _lacking(self, part: Part) -> str:
        """What this run needs and another one did not compute."""
        network, counterparts = self.network, self.inputs.counterparts
        if "index" not in part:
            return "features of svdit"
        if network is not None and str(part.get("network")) != _identity(network):
            return f"features of this {network.name} network"
        if lacking := self.distances.keys() - part.keys():
            return ", ".join(sorted(lacking))
        if counterparts is not None and not np.array_equal(
            part["counterparts"], _hashes(counterparts.read(i) for i in part["index"])
        ):
            return f"distances to the images of {counterparts.source.path}"
        return ""

    def _features(self, paths: list[Path], network: FeatureNetwork) -> tuple[Features, list[Features]]:
        """The rows of all files in order of the index, and their statistics, on the first process."""
        count = self.inputs.fake.count
        with writing(self.folder), private_folder(self.folder) as folder:
            files = RowFiles(folder, {layer: (count, network.widths[layer]) for layer in FAKE_ROWS})
            for path in paths[rank() :: world_size()]:
                part = _read(path)
                for layer in FAKE_ROWS:
                    files.write(layer, part["index"], part[layer])
            how = Extraction(folder, self.options.device, self.options.batch_size)
            fake = summarize(files.read(), self.inputs.fake, network, how)
        return self.reference, [fake]  # the rows stay mapped

    def _report(self, paths: list[Path], blocks: Blocks, estimates: Estimates, started: float) -> Report:
        count = self.inputs.fake.count
        hashes, pixels = np.empty((count, 32), np.uint8), dict[int, Pixels]()
        scores = {name: np.empty(count) for name in self.distances}
        for part in map(_read, paths):
            hashes[part["index"]] = part["sha256"]
            pixels |= zip(part["kept"].tolist(), part["pixels"], strict=True)
            for name, values in scores.items():
                values[part["index"]] = part[name]
        if scores:
            estimates = estimates | paired_metrics(scores, blocks)
        copies = count - len({line.tobytes() for line in hashes})
        fake = replace(self.inputs.fake, content=hashlib.sha256(hashes.tobytes()).hexdigest(), copies=copies)
        # A set that has grown lacks some of the images to show: then those nearest to them.
        kept = [min(pixels, key=lambda i: abs(i - n)) for n in shown(count)]
        images = {"grid_fake": overview(self.inputs.fake, {i: pixels[i] for i in kept}, picture_notes(self.network))}
        inputs, seconds = replace(self.inputs, fake=fake), time.perf_counter() - started
        result = report(inputs, self.network, self.options, [estimates], images, seconds)
        result = replace(result, command=self.inputs.fake.source.manifest.get("command"))
        result.save(self.folder)
        return result


def _generated(folder: Path, manifest: dict[str, Any]) -> ImageSet:
    """The set that is sampled, as `evaluate` would open it."""
    manifest = json.loads(json.dumps(manifest))
    names, side = tuple(Path(name).stem for name in manifest["files"]), manifest["image_size"]
    source = Source(folder, names, labels=tuple(manifest["labels"]), manifest=manifest)
    return ImageSet(source, np.arange(len(names)), (side, side), content="")


def _identity(network: FeatureNetwork) -> str:
    return f"{network.name} {network.digest}"


def _hashes(images: Iterable[Pixels]) -> npt.NDArray[np.uint8]:
    """SHA-256 of the pixels of each image (H, W, 3): (N, 32)."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def _read(path: Path) -> Part:
    """The arrays of a file. Raises UserError for a damaged one."""
    return {key: map_npz(path, key) for key in npz_keys(path)}
