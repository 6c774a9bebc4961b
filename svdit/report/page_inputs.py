"""What a report page is made from: reports of `quantize`, sets of `generate`, metrics of `evaluate`, image grids.

A run is what belongs together: a quantized model, the set that was sampled from it, and that set's metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdit.errors import UserError
from svdit.evaluation.opening import open_source
from svdit.evaluation.report import read_report
from svdit.evaluation.sources import Source
from svdit.files import reading
from svdit.images import encode_png, read_image
from svdit.storage.manifest import read_manifest

SUFFIX = ".report.json"
KINDS = f"a {SUFFIX} of svdit quantize, a folder of svdit generate, a metrics.json, a .png, or a folder of these"


@dataclass
class Run:
    """A model by its name, with what is known of it."""

    name: str
    report: dict[str, Any] = field(default_factory=dict)  # of `quantize`
    source: Source | None = None  # the images
    metrics: Path | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)  # the content of `metrics`

    @property
    def manifest(self) -> dict[str, Any]:
        """The settings of the images."""
        return self.source.manifest if self.source else {}

    @property
    def full_precision(self) -> bool:
        """Whether the images are of a model that is neither quantized nor cached."""
        return bool(self.manifest) and not self.manifest.get("quantization") and not self.manifest.get("caching")

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The entries of the quantized layers."""
        return [line for line in self.report.get("layers", ()) if isinstance(line, dict)]

    @property
    def tries(self) -> list[dict[str, Any]]:
        """The choices that were compared by images, the used one first."""
        values = self.plan.get("tries")
        return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []

    @property
    def plan(self) -> dict[str, Any]:
        """What was chosen by a target; empty without one."""
        return part(part(self.report, "settings"), "plan")

    @property
    def measured(self) -> dict[str, Any]:
        """The numbers behind the figures; empty with --no-figures."""
        return part(self.report, "measured")


@dataclass(frozen=True)
class Inputs:
    """The runs in the order of the arguments, full precision first, and image grids (name, content of the PNG)."""

    runs: list[Run]
    grids: list[tuple[str, bytes]]


def part(content: dict[str, Any], key: str) -> dict[str, Any]:
    """The dict under a key; an empty one where an earlier version wrote none."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def number(value: object) -> float | None:
    """A finite number in a file; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None  # type: ignore[arg-type]


def numbers(values: object) -> list[float | None]:
    """The entries of a list in a file; empty for anything else."""
    return [number(value) for value in values] if isinstance(values, list) else []


def read_inputs(paths: Sequence[str | Path]) -> Inputs:
    """Read and connect everything. Raises UserError for missing and unreadable paths, and other files."""
    places = list({place.resolve(): place for path in paths for place in places_in(Path(path))}.values())
    folders = {place.parent.resolve() for place in places if place.name == "manifest.json"}
    places = [place for place in places if place.suffix != ".npz" or place.with_suffix("").resolve() not in folders]
    reports = [place for place in places if place.name.endswith(SUFFIX)]
    grids = [(place.name, encode_png(read_image(place))) for place in places if place.suffix.lower() == ".png"]
    runs = [Run(place.name.removesuffix(SUFFIX), read_quantization(place)) for place in reports]
    for place in places:
        if place.name == "manifest.json" or place.suffix == ".npz":
            add_set(runs, place)
    for place in places:
        if place.suffix == ".json" and place.name != "manifest.json" and place not in reports:
            add_metrics(runs, place)
    for i, run in enumerate(runs):
        while run.name in [other.name for other in runs[:i]]:
            run.name += "′"
    return Inputs(sorted(runs, key=lambda run: not run.full_precision), grids)


def places_in(path: Path, nested: bool = False) -> Iterator[Path]:
    """The files that a path stands for. Raises UserError if there are none."""
    if not path.exists():
        raise UserError(f"there is no file or folder {path}; pass {KINDS}")
    if path.is_dir():
        names = ("manifest.json", "metrics.json", f"../{path.resolve().name}.json")  # the last beside its figures
        inside = [path / name for name in names[: 3 if path.name.endswith(".report") else 2] if (path / name).is_file()]
        if not inside and not nested:
            with reading(path):
                children = sorted(child for child in path.iterdir() if not child.name.startswith("."))
            inside = [place for child in children for place in of_child(child)]
        if not inside and not nested:
            raise UserError(f"{path} contains no report, set or metrics; pass {KINDS}")
        yield from inside
    elif path.suffix in (".safetensors", ".pt"):
        if not path.with_suffix(SUFFIX).is_file():
            raise UserError(
                f"there is no {path.with_suffix(SUFFIX)} beside {path}: svdit recover and svdit cache write none; pass "
                f"that of the file before, quantize it again, or pass {KINDS}"
            )
        yield path.with_suffix(SUFFIX)
    elif path.suffix.lower() in (".json", ".npz", ".png"):
        yield path
    else:
        raise UserError(f"{path} is no report; pass {KINDS}")


def of_child(child: Path) -> Iterator[Path]:
    """What a folder of runs contributes: reports, and the contents of its folders."""
    if child.is_dir():
        yield from places_in(child, nested=True)
    elif child.name.endswith(SUFFIX):
        yield child


def read_quantization(path: Path) -> dict[str, Any]:
    """The report of `quantize`. Raises UserError for anything else."""
    try:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); quantize again") from None
    if not isinstance(content, dict) or not isinstance(content.get("layers"), list):
        raise UserError(f"{path} is not a report of svdit quantize; pass {KINDS}")
    return content


def add_set(runs: list[Run], place: Path) -> None:
    """Add the images of a manifest or an .npz to their model's run; with feature caching they are one of their own.

    Raises UserError as `open_source`.
    """
    folder = place.parent if place.name == "manifest.json" else place
    manifest = read_manifest(place) if folder is not place else {}
    if manifest is None:
        raise UserError(f"{place} is not a manifest of svdit generate; pass {KINDS}")
    if manifest.get("storage") == "features":  # only metrics were stored
        return
    npz = folder.with_name(f"{folder.name}.npz")
    source = open_source(npz if manifest.get("storage") == "npz" else folder)
    if any(run.source and run.source.path == source.path for run in runs):
        return
    recorded = None if source.manifest.get("caching") else source.manifest.get("quantization")
    same = [run for run in runs if run.report and recorded and run.report.get("settings") == recorded]
    name = folder.stem if folder is place else folder.resolve().name
    run = next((run for run in same if not run.source), None)
    if run is None:
        run = Run(name)
        runs.append(run)
    run.source = source


def add_metrics(runs: list[Run], place: Path) -> None:
    """Add a metrics.json to the run of the images that it measured. Raises UserError for anything else."""
    evaluation = read_report(place)
    measured = Path(str(part(part(evaluation, "inputs"), "fake").get("path", "")))
    folder = place.resolve().parent.name
    names = [name for name in (measured.name.removesuffix(".npz"), folder, folder.removesuffix("-evaluation")) if name]
    own = [run for run in runs if run.source and run.source.path.resolve() == measured.resolve()]
    named = [
        run
        for name in names
        for run in runs
        if name in (run.name, run.source and run.source.path.name.removesuffix(".npz"))
    ]
    run = next((run for run in own + named if not run.metrics), None)
    if run is None:
        run = Run(names[0] if names else place.stem)
        runs.append(run)
    run.metrics, run.evaluation = place, evaluation
