"""The sets of images of one evaluation: opened, chosen from, checked, and brought into the same order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svdit.errors import UserError
from svdit.evaluation.options import Options
from svdit.evaluation.sources import Indices, Source, choose, open_source
from svdit.files import sha256


@dataclass(frozen=True)
class Set:
    """The images chosen from a source, their one size (H, W), the hash of their content, and what to warn about."""

    source: Source
    indices: Indices
    size: tuple[int, int]
    content: str
    warnings: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.indices)

    def describe(self) -> dict[str, Any]:
        path, kind = str(self.source.path), self.source.kind
        return {"path": path, "kind": kind, "images": self.count, "size": list(self.size), "sha256": self.content}


@dataclass(frozen=True)
class Inputs:
    """`fake` and, image by image beside it, `second` (another generated set) and `partners` (full precision)."""

    fake: Set
    real: Set | None = None
    second: Set | None = None
    partners: Set | None = None

    @property
    def named(self) -> dict[str, Set]:
        sets = {"real": self.real, "fake": self.fake, "second": self.second, "partners": self.partners}
        return {name: each for name, each in sets.items() if each is not None}


def open_inputs(real: str | Path | None, fake: str | Path, options: Options) -> Inputs:
    """UserError for whatever is wrong with any of them."""
    if real is None and options.network_metrics:
        raise UserError(f"{', '.join(options.network_metrics)} need --real_dir; only --metrics paired does without")
    fakes = open_set(fake, options)
    if fakes.count == 0:
        raise UserError(f"{fake} holds statistics only; --fake_dir must hold images")
    reals = None if real is None else open_set(real, options)
    second = None if options.compare is None else open_counterparts(options.compare, fakes, options)
    partners = _partners(reals, fakes, options)
    return Inputs(fakes, reals, second, None if partners is None else open_counterparts(partners, fakes, options))


def open_set(path: str | Path, options: Options) -> Set:
    """The chosen images of a source; a reference of statistics has none."""
    source = open_source(path, options.resize_to)
    if len(source) == 0 and source.gaussians:
        return Set(source, np.arange(0), (0, 0), sha256(source.path))
    if source.gaussians:
        return _checked(source, np.arange(len(source)))  # the images beside statistics are there as they are
    indices = choose(source, options.num_images, options.seed, options.allow_fewer)
    fewer = options.num_images is not None and len(indices) < options.num_images
    told = (f"{path} holds only {len(indices)} of the {options.num_images} images asked for",) if fewer else ()
    return _checked(source, indices, told)


def open_counterparts(path: str | Path, fakes: Set, options: Options) -> Set:
    """The images of `path` that have the names of the chosen fake ones, in the same order."""
    source = open_source(path, options.resize_to)
    each = _checked(source, pair(fakes, source))
    if each.size != fakes.size:
        sizes = f"the images of {path} are {each.size}, those of {fakes.source.path} {fakes.size}"
        raise UserError(f"{sizes} (H, W); counterparts must have one size")
    return each


def _checked(source: Source, indices: Indices, warnings: tuple[str, ...] = ()) -> Set:
    if len(indices) < 2:
        raise UserError(f"need at least 2 images, found {len(indices)} in {source.path}; give more")
    size, said = source.check(indices)
    warnings += tuple(f"{source.path}: {one}" for one in said)
    return Set(source, indices, size, source.content(indices), warnings)


def _partners(reals: Set | None, fakes: Set, options: Options) -> str | Path | None:
    """What was given, or real images of exactly the fake ones' names; whether or not by name, if asked to pair."""
    if options.metrics is not None and not options.wants_pairs:
        return None
    if options.paired is not None:
        return options.paired
    if reals is None:
        raise UserError("paired metrics and LPIPS need counterparts; give --paired_dir")
    alike = bool(reals.source.files) and reals.size == fakes.size and reals.source.names == fakes.source.names
    return reals.source.path if options.wants_pairs or alike else None


def pair(fakes: Set, other: Source) -> Indices:
    """For each chosen fake image the index in `other` of the one with its name (7 and 000007 are the same)."""
    places = {_key(name): i for i, name in enumerate(other.names)}
    names = [fakes.source.names[i] for i in fakes.indices]
    missing = [name for name in names if _key(name) not in places]
    if missing:
        told = f"{len(missing)} of {len(names)} images of {fakes.source.path} have no counterpart in {other.path}"
        raise UserError(f"{told} (first: {missing[0]}); images are paired by name")
    return np.array([places[_key(name)] for name in names], np.int64)


def _key(name: str) -> str:
    return str(int(name)) if name.isdecimal() else name
