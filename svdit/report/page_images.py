"""Images from the same noise, in full precision and quantized, as the page's data: PNG files and PSNR."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

import numpy as np

from svdit.evaluation.inputs import SAME_NOISE
from svdit.images import Pixels, encode_png
from svdit.report.page_inputs import Run
from svdit.sheet import visible_gain

MOST = 200  # images on a page, of each model
SMALL = 128  # pixels; smaller images are enlarged without smoothing


@dataclass(frozen=True)
class Group:
    """A full-precision set and those from the same noise, with the names that all have."""

    reference: Run
    variants: list[Run]
    names: list[str]


def groups(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """The sets that belong together, and a sentence for each that belongs to none."""
    sampled = [run for run in runs if run.source]
    references = [run for run in sampled if run.full_precision]
    partners = {id(run): next((r for r in references if same_noise(r, run)), None) for run in sampled}
    found, notes = list[Group](), list[str]()
    for reference in references:
        variants = [run for run in sampled if run is not reference and partners[id(run)] is reference]
        if variants:
            found.append(Group(reference, variants, common_names([reference, *variants])))
    shown = {id(run) for group in found if group.names for run in (group.reference, *group.variants)}
    notes += [f"{run.name}: {unpaired(run, references)}" for run in sampled if id(run) not in shown]
    return [group for group in found if group.names], notes


def same_noise(a: Run, b: Run) -> bool:
    """Whether images of one name have the same noise, label and sampling options, by their manifests."""
    return bool(a.manifest and b.manifest) and not differing(a, b)


def differing(a: Run, b: Run) -> list[str]:
    """The settings of the noise in which two manifests differ."""
    return [key for key in (*SAME_NOISE, "num_classes") if a.manifest.get(key) != b.manifest.get(key)]


def unpaired(run: Run, references: Sequence[Run]) -> str:
    """Why a set is compared with none."""
    if run in references:
        return "no other set here is from the same noise."
    if not run.manifest:
        return "it has no manifest, so its noise is unknown."
    if not references:
        return "there is no full-precision set here to compare it with; add the folder of one."
    fields = {reference.name: ", ".join(differing(reference, run)) for reference in references}
    reasons = "; ".join(f"{name} differs in {keys or 'the names of its images'}" for name, keys in fields.items())
    return f"no full-precision set here is from the same noise ({reasons})."


def common_names(runs: Sequence[Run]) -> list[str]:
    """The names of the images that all sets have, in the order of the first."""
    others = [set(run.source.names) for run in runs[1:] if run.source]
    first = runs[0].source.names if runs[0].source else ()
    return [name for name in first if all(name in names for names in others)]


def gallery(group: Group, limit: int) -> dict[str, Any]:
    """The group's images in at most `limit` bytes of JSON, at even distances, and how many were left out."""
    runs = [group.reference, *group.variants]
    places = [{name: i for i, name in enumerate(run.source.names)} for run in runs if run.source]
    labels = group.reference.source.labels if group.reference.source else None

    def row(name: str) -> dict[str, Any]:
        pixels = [run.source.read(place[name]) for run, place in zip(runs, places, strict=True) if run.source]
        psnrs = [psnr(p, pixels[0]) for p in pixels[1:]]
        label = labels[places[0][name]] if labels else None
        return {"name": name, "label": label, "psnr": psnrs, "src": [data_uri(encode_png(p)) for p in pixels]}

    names, rows, used = group.names, list[dict[str, Any]](), 0
    probe = [row(name) for name in names[:4]]
    affordable = max(1, limit * len(probe) // max(1, sum(map(nbytes, probe))))
    count = min(len(names), affordable, MOST)
    for i in np.linspace(0, len(names) - 1, count).astype(int):
        rows.append(row(names[i]))
        used += nbytes(rows[-1])
        if used > limit:
            rows.pop()
            break
    columns = [run.name for run in runs]
    model = group.reference.manifest.get("model")
    small = max(group.reference.source.read(0).shape[:2]) < SMALL if group.reference.source else False
    shown = {"model": model, "columns": columns, "images": rows, "of": len(names)}
    return {**shown, "gain": gain_for(rows), "small": small}


def gain_for(rows: Sequence[dict[str, Any]]) -> int:
    """The gain by which the differences of the worst model become visible."""
    known = [[p for row in rows if isinstance(p := row["psnr"][i], float)] for i in range(len(rows[0]["psnr"]))]
    means = [sum(psnrs) / len(psnrs) for psnrs in known if psnrs]
    return visible_gain(255 * 10 ** (-min(means, default=0.0) / 20))


def nbytes(row: dict[str, Any]) -> int:
    """About the bytes of a row on the page."""
    return sum(map(len, row["src"])) + 100 + 20 * len(row["src"])


def psnr(a: Pixels, b: Pixels) -> float | str | None:
    """PSNR in dB of two uint8 images (H, W, 3); "identical", or None for two sizes."""
    if a.shape != b.shape:
        return None
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * log10(255**2 / error) if error else "identical"


def data_uri(content: bytes) -> str:
    """A PNG file as an address."""
    return f"data:image/png;base64,{b64encode(content).decode()}"
