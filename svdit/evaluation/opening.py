"""Paths to sources: folders of images, tar archives of images, .npz of images or of feature statistics.

Labels and sampling settings come from the manifest that `generate` writes, otherwise labels from `.cls` files in
archives or from sub-folders.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svdit.errors import UserError
from svdit.evaluation.shards import open_shards
from svdit.evaluation.sources import Source
from svdit.evaluation.statistics import Gaussian, load_statistics
from svdit.images import class_numbers, relative_names, scan_images
from svdit.printing import warn
from svdit.progress import progress
from svdit.storage.manifest import read_manifest
from svdit.storage.npz import map_npz, npz_keys

ELSEWHERE = {  # where the images of a set without files are, by the manifest's `storage`
    "npz": "they are in {0}.npz; pass that file",
    "features": "none were stored, only metrics; see {0}/metrics.json",
}


def open_source(path: str | Path, resize_to: int | None = None, show_progress: bool = False) -> Source:
    """Open a folder, sub-folders included, an .npz or a .tar. Raises UserError for anything else."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, resize_to, show_progress)
    if not path.is_file():
        raise UserError(f"there is no folder or file {path}; fix the path")
    if path.suffix.lower() == ".npz":
        return _open_npz(path, resize_to)
    if {".tar", ".tgz"} & {suffix.lower() for suffix in path.suffixes}:
        return _open_tars(path, [path], {}, resize_to, show_progress)
    raise UserError(f"{path} is no folder, .npz or .tar; pass a folder of images, an .npz or a .tar of images")


def _open_folder(path: Path, resize_to: int | None, show_progress: bool) -> Source:
    manifest = _read_manifest(path / "manifest.json")
    if (storage := manifest.get("storage")) in ELSEWHERE:  # there may be image grids
        raise UserError(f"{path} does not contain its images: {ELSEWHERE[storage].format(path)}")
    files, skipped = scan_images(path, ".tar")
    archives = [file for file in files if file.suffix.lower() == ".tar"]
    if not files:
        raise UserError(_no_images(path, skipped))
    if archives:
        if len(archives) < len(files):
            image = next(file for file in files if file.suffix.lower() != ".tar")
            raise UserError(
                f"{path} contains images, such as {image}, and archives, such as {archives[0]}; separate them"
            )
        return _open_tars(path, archives, manifest, resize_to, show_progress)
    names = tuple(name[: name.rindex(".")] for name in relative_names(path, files))
    return _labelled(Source(path, names, tuple(files), skipped=skipped, manifest=manifest, resize_to=resize_to))


def _no_images(path: Path, skipped: str) -> str:
    if compressed := sorted([*path.glob("*.tar.*"), *path.glob("*.tgz")]):
        return f"{path} contains no images, but {compressed[0].name}, which is compressed; decompress it first"
    found = f" (only {skipped})" if skipped else ""
    return f"{path} and its sub-folders contain no images{found}; pass a folder of PNG or JPEG files"


def _open_tars(
    path: Path, archives: list[Path], manifest: dict[str, Any], resize_to: int | None, show_progress: bool
) -> Source:
    with progress(f"opening {path.name}", show_progress, "archives") as update:
        images, labels, skipped = open_shards(archives, update)
    if not images:
        found = f" (only {skipped})" if skipped else ""
        raise UserError(f"{path} contains no images{found}; pass an archive of PNG or JPEG files")
    files = tuple(images.values())
    source = Source(path, tuple(images), files, labels=labels, skipped=skipped, manifest=manifest, resize_to=resize_to)
    return _labelled(source)


def _labelled(source: Source) -> Source:
    """With the labels of the manifest, or those it has, or else its sub-folders as classes."""
    manifest, names = source.manifest, source.names
    if (listed := len(manifest.get("files") or names)) > len(names):
        counts = f"{len(names)} of the {listed} images in its manifest"
        warn(f"{source.path} contains {counts}; generate the others, or remove it")
    if labels := _labels(manifest, names) or source.labels:
        return replace(source, labels=labels)
    classes, numbers = class_numbers([name.rpartition("/")[0] or "." for name in names])
    return replace(source, labels=tuple(numbers), classes=classes) if len(classes) > 1 else source


def _open_npz(path: Path, resize_to: int | None) -> Source:
    keys = npz_keys(path)
    gaussians, extractor = load_statistics(path)
    if not gaussians and "arr_0" not in keys:
        content = ", ".join(map(repr, sorted(keys))) or "none"
        problem = f"the arrays in {path} are {content}"
        raise UserError(f"{problem}; expected images under arr_0 or statistics under mu and sigma")
    array = _check_array(path, map_npz(path)) if "arr_0" in keys else None
    count = 0 if array is None else len(array)
    manifest = _manifest_of_npz(path, count)
    files = manifest.get("files") or ()
    names = tuple(Path(file).stem for file in files) if len(files) == count else tuple(map(str, range(count)))
    rows = _check_rows(path, map_npz(path, "features"), gaussians) if "features" in keys else None
    labels = _labels(manifest, names)
    return Source(path, names, (), array, labels, (), "", gaussians, rows, extractor, manifest, resize_to)


def _manifest_of_npz(path: Path, count: int) -> dict[str, Any]:
    """The .json with its name, or the manifest in the folder with its name, which `generate` wrote with it."""
    beside, inside = path.with_suffix(".json"), path.with_suffix("") / "manifest.json"
    of_file, of_folder = _read_manifest(beside), _read_manifest(inside)
    if of_folder and of_folder.get("num_images") != count:
        warn(f"{inside} does not describe the {count} images of {path} and is ignored")
        return of_file
    if of_file and of_folder and of_file != of_folder:
        raise UserError(f"{beside} and {inside} both describe {path}, and differ; remove one")
    return of_folder or of_file


def _check_array(path: Path, array: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise UserError(f"arr_0 in {path} is {array.dtype}; expected uint8 in 0 … 255, so convert it when writing it")
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:]:
        hint = "; move the channels last" if array.ndim == 4 and array.shape[1] in (1, 3) else ""
        raise UserError(f"arr_0 in {path} has the shape {array.shape}; expected (N, H, W, 3){hint}")
    return array  # type: ignore[return-value]


def _check_rows(path: Path, rows: npt.NDArray[Any], gaussians: dict[str, Gaussian]) -> npt.NDArray[np.float32]:
    width = gaussians["pool"].mean.size if "pool" in gaussians else "D"
    if rows.dtype.kind != "f" or rows.ndim != 2 or rows.shape[1] != width != "D":
        kind = f"{rows.dtype} {rows.shape}"
        raise UserError(f"features in {path} is {kind}; expected float32 (N, {width}), so create the file again")
    return np.asarray(rows, np.float32)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    manifest = read_manifest(path)
    if manifest is None:
        warn(f"{path} is not a manifest of svdit and is ignored")
    return manifest or {}


def _labels(manifest: dict[str, Any], names: tuple[str, ...]) -> tuple[int, ...] | None:
    labels = manifest.get("labels") or ()
    return tuple(labels) if len(labels) == len(names) else None
