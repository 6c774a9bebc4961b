"""The image sets of one evaluation: opened, chosen from, checked, and brought into the same order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from svdit.distributed import rank
from svdit.errors import UserError
from svdit.evaluation.opening import open_source
from svdit.evaluation.options import Options
from svdit.evaluation.sources import ImageSet, Indices, Source, choose
from svdit.files import sha256

SAMPLE_FIELDS = (
    *("image_size", "family", "prediction", "time", "path", "noise_scale", "precision", "vae", "latents", "uint8"),
    *("sampler", "steps", "time_shift", "sde_form", "sde_norm", "last_step", "last_step_size"),
    *("cfg_scale", "cfg_channels", "cfg_interval", "label_policy"),
)
SAME_NOISE = ("model", "seed", *SAMPLE_FIELDS)  # equal in the manifests of counterparts, which differ in their weights


@dataclass(frozen=True)
class Inputs:
    """`fake` and, in the same order, `second` (another generated set) and `counterparts` (full precision)."""

    fake: ImageSet
    real: ImageSet | None = None
    second: ImageSet | None = None
    counterparts: ImageSet | None = None

    @property
    def generated(self) -> list[ImageSet]:
        """The generated sets that are measured: one, or two to compare."""
        return [self.fake] if self.second is None else [self.fake, self.second]

    @property
    def named(self) -> dict[str, ImageSet]:
        """The sets by their key in `metrics.json`."""
        sets = {"real": self.real, "fake": self.fake, "second": self.second, "partners": self.counterparts}
        return {name: image_set for name, image_set in sets.items() if image_set is not None}


def open_inputs(real: str | Path | None, fake: str | Path | ImageSet, options: Options) -> Inputs:
    """Open and check all sets, unless `fake` is one that is still being sampled.

    Raises UserError for missing, unreadable or mismatched ones.
    """
    if real is None and options.network_metrics:
        raise UserError(f"{', '.join(options.network_metrics)} need --real_dir; only --metrics paired does not")
    fakes = fake if isinstance(fake, ImageSet) else open_set(fake, options)
    if fakes.count == 0:
        raise UserError(f"{fake} contains statistics only; --fake_dir must contain images")
    reals = None if real is None else open_set(real, options)
    second = None if options.compare is None else open_counterparts(options.compare, fakes, options)
    path = _counterparts(reals, fakes, options)
    inputs = Inputs(fakes, reals, second, None if path is None else open_counterparts(path, fakes, options))
    for a, b in combinations(inputs.named.values(), 2):
        _refuse_overlap(a.source, b.source)
    return inputs


def _refuse_overlap(a: Source, b: Source) -> None:
    """Raise UserError where one set lies inside the other, so that its images would count as the other's too."""
    if a.folders != b.folders and (shared := a.folders & b.folders):
        raise UserError(f"{a.path} and {b.path} share the images in {min(shared)}; move one set out of the other")


def open_set(path: str | Path, options: Options) -> ImageSet:
    """The chosen images of a source; a reference of statistics has none."""
    source = open_source(path, options.resize_to, _shown(options))
    if len(source) == 0 and source.gaussians:
        return ImageSet(source, np.arange(0), (0, 0), sha256(source.path))
    if source.gaussians:  # no choice among images that are stored beside the statistics of a larger set
        return _checked(source, np.arange(len(source)), options)
    indices = choose(source, options.num_images, options.seed, options.allow_fewer)
    fewer = options.num_images is not None and len(indices) < options.num_images
    warnings = (f"{path} contains only {len(indices)} of the {options.num_images} requested images",) if fewer else ()
    return _checked(source, indices, options, warnings)


def open_counterparts(path: str | Path, fakes: ImageSet, options: Options) -> ImageSet:
    """The images of `path` with the names of the chosen fake ones, in their order. Raises UserError on a mismatch."""
    source = open_source(path, options.resize_to, _shown(options))
    image_set = _checked(source, pair(fakes, source), options)
    if image_set.size != fakes.size:
        sizes = f"the images of {path} are {image_set.size}, those of {fakes.source.path} {fakes.size}"
        raise UserError(f"{sizes} (H, W); counterparts must have one size")
    return image_set


def _checked(source: Source, indices: Indices, options: Options, warnings: tuple[str, ...] = ()) -> ImageSet:
    if len(indices) < 2:
        raise UserError(f"{source.path} contains {len(indices)} images; at least 2 images are needed")
    size, lossy, remarks = source.check(indices, _shown(options))
    warnings += tuple(f"{source.path}: {remark}" for remark in remarks)
    stamp = source.stamp(indices)
    content, copies = source.content(indices, _shown(options))
    return ImageSet(source, indices, size, content, lossy, copies, warnings, stamp)


def _shown(options: Options) -> bool:
    """Whether this process shows progress."""
    return options.progress and rank() == 0


def _counterparts(reals: ImageSet | None, fakes: ImageSet, options: Options) -> str | Path | None:
    """--paired_dir; or the real images, if a metric of pairs is named or both manifests record the same noise."""
    if options.paired is not None:
        return options.paired
    if options.wants_pairs and reals is None:
        raise UserError("paired metrics and LPIPS need counterparts; pass --paired_dir")
    if reals is not None and (options.wants_pairs or (options.metrics is None and same_noise(reals, fakes))):
        return reals.source.path
    return None


def same_noise(a: ImageSet, b: ImageSet) -> bool:
    """Whether the manifests prove that images of one name have the same seed, label and sampling options."""
    records = [s.source.manifest for s in (a, b)]
    seeded = all(record.get("seed") is not None for record in records)
    alike = a.size == b.size and a.source.names == b.source.names and a.source.labels == b.source.labels
    return seeded and alike and not differences(a, b)


def differences(a: ImageSet, b: ImageSet) -> list[str]:
    """The fields of SAME_NOISE in which two manifests differ; none where a set has no manifest."""
    records = [s.source.manifest for s in (a, b)]
    if not all(records):
        return []
    return [f"{field} {x!r} and {y!r}" for field in SAME_NOISE for x, y in [[r.get(field) for r in records]] if x != y]


def pair(fakes: ImageSet, other: Source) -> Indices:
    """For each chosen fake image the index in `other` of the image with its name, or else with its number.

    7 and 000007 are the same number; it decides only where each set has it once. Raises UserError if an image has no
    counterpart, and for sets with two images of one name.
    """
    for source in (fakes.source, other):
        name, count = Counter(source.names).most_common(1)[0]
        if count > 1:
            raise UserError(f"{source.path} contains two images named {name} with different extensions; remove one")
    places = {name: i for i, name in enumerate(other.names)}
    ours, theirs = (Counter(map(_key, names)) for names in (fakes.source.names, other.names))
    numbers = {_key(name): i for i, name in enumerate(other.names) if theirs[_key(name)] == 1}
    names = [fakes.source.names[i] for i in fakes.indices]
    found = [places.get(name, numbers.get(_key(name)) if ours[_key(name)] == 1 else None) for name in names]
    missing = [name for name, place in zip(names, found, strict=True) if place is None]
    if missing:
        counts = f"{len(missing)} of {len(names)} images of {fakes.source.path} have no counterpart in {other.path}"
        raise UserError(f"{counts} (first: {missing[0]}); images are paired by name, or by a number that is unique")
    return np.array(found, np.int64)


def _key(name: str) -> str:
    return str(int(name)) if name.isdecimal() else name
