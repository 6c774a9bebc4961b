"""Images in WebDataset shards: tar archives in which the files of an image share its key, the name up to the first dot.

They are read by place, so nothing is unpacked. Of the other files only labels (`.cls`) are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from svdit.errors import UserError
from svdit.images import EXTENSIONS, UNREAD, in_words, is_hidden, natural_key
from svdit.progress import Update, counted
from svdit.storage.tar import PackedFile, read_members, tar_entries
from svdit.storage.tar_headers import Member

LONGEST = 20  # bytes of a label


class Shards(NamedTuple):
    """The images by key, in natural order; their labels, where each has one; what was skipped, in words."""

    images: dict[str, PackedFile]
    labels: tuple[int, ...] | None
    skipped: str


def open_shards(archives: Sequence[Path], update: Update = lambda done, total: None) -> Shards:
    """Read the headers and labels. Raises UserError for damaged archives, and for two images of one key."""
    found: dict[str, PackedFile] = {}
    labels: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    for archive in counted(archives, len(archives), update):
        classes: dict[str, Member] = {}
        for name, member in tar_entries(archive):
            _sort(archive, name.removeprefix("./"), member, found, classes, skipped)
        contents = read_members(archive, classes.values())
        labels |= {key: int(text) for key, text in zip(classes, contents, strict=True) if text.strip().isdigit()}
    images = {key: found[key] for key in sorted(found, key=lambda key: natural_key(found[key].name))}
    complete = labels.keys() >= images.keys()
    return Shards(images, tuple(labels[key] for key in images) if complete else None, in_words(skipped))


def _sort(
    archive: Path,
    name: str,
    member: Member | None,
    images: dict[str, PackedFile],
    classes: dict[str, Member],
    skipped: Counter[str],
) -> None:
    """Add an entry of an archive to the images, the labels or what is skipped. Raises UserError for a second image."""
    key, extensions = split(name)
    suffix = "." + extensions.rpartition(".")[2]
    if any(map(is_hidden, name.split("/"))):
        return
    if extensions == "cls" and member and member.size <= LONGEST:
        classes[key] = member
    elif suffix in EXTENSIONS and member:
        if key in images:
            both = f"{images[key]} and {archive}/{name}"
            raise UserError(f"{both} share the key {key}, the name up to the first dot; rename or remove one")
        images[key] = PackedFile(archive, name, member)
    elif suffix in EXTENSIONS | UNREAD | {".tar"}:
        skipped[f"{suffix} file" if member else "special file"] += 1


def split(name: str) -> tuple[str, str]:
    """The key and the lower-case extensions of a file: ("a/b", "seg.png") of "a/b.seg.PNG"."""
    folder, slash, file = name.rpartition("/")
    stem, _, extensions = file.partition(".")
    return folder + slash + stem, extensions.lower()
