"""The images of a report: a sheet of generated images, and of the pairs that differ most."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from svdit.evaluation.sources import ImageSet
from svdit.images import Pixels
from svdit.pictures import setting, subject
from svdit.sheet import DIFFERENCE, compared, sheet

SHOWN, COLUMNS, PAIRS = 64, 8, 8


def shown(count: int) -> list[int]:
    """The places in a set of `count` images of those that represent it: 64 at even distances."""
    return np.linspace(0, count - 1, min(SHOWN, count)).astype(int).tolist()


def about(images: ImageSet) -> str:
    """The model, its setting and the sampler, from the set's manifest; without one, its name. And the day."""
    manifest = images.source.manifest
    if not manifest:
        return subject(images.source.path.name)
    model, guidance = manifest.get("model") or manifest.get("checkpoint") or "", manifest.get("cfg_scale")
    sampler = " ".join(str(manifest[key]) for key in ("sampler", "steps") if manifest.get(key) is not None)
    return subject(model, setting(manifest.get("quantization")), sampler, f"guidance {guidance}" if guidance else "")


def overview(fake: ImageSet, images: Mapping[int, Pixels], notes: Sequence[str] = ()) -> Pixels:
    """Images (H, W, 3) of a set by their places in it, with the name of the first in every row, uint8 (H, W, 3)."""
    places = list(images)
    rows = [places[i : i + COLUMNS] for i in range(0, len(places), COLUMNS)]
    labelled = [(fake.source.names[fake.indices[row[0]]], [images[i] for i in row]) for row in rows]
    title = f"{len(places)} of {fake.count} generated images, at even distances"
    return sheet(title, about(fake), labelled, ("first image", ()), notes)


def worst_pairs(fake: ImageSet, other: ImageSet, psnrs: npt.NDArray[np.float64], notes: Sequence[str] = ()) -> Pixels:
    """The 8 pairs of lowest PSNR, worst first, uint8 (H, W, 3): counterpart, image, and their difference."""
    worst = np.argsort(psnrs, kind="stable")[:PAIRS]
    after, before = ([image_set.read(n) for n in worst] for image_set in (fake, other))
    captions = [f"{psnrs[n]:.1f}\n{fake.source.names[fake.indices[n]]}" for n in worst]
    title = f"The {len(worst)} of {fake.count} pairs of lowest PSNR"
    rows = compared(before, {"generated": after})
    return sheet(title, about(fake), rows, ("PSNR, dB\nimage", captions), [DIFFERENCE, *notes])
