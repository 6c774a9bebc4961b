"""Images in WebDataset shards: tar archives in which the files of an image share its key, the name up to the first dot.

They are read by place, so nothing is unpacked. Of the other files only labels (`.cls`) are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from svdit.errors import UserError
from svdit.images import EXTENSIONS, UNREAD, in_words, is_hidden, natural_key
from svdit.storage.tar import PackedFile, read_members, tar_entries
from svdit.storage.tar_headers import Member

LONGEST = 20  # bytes of a label


class Shards(NamedTuple):
    """The images by key, in natural order; their labels, where each has one; what was skipped, in words."""

    images: dict[str, PackedFile]
    labels: tuple[int, ...] | None
    skipped: str


def open_shards(archives: Iterable[Path]) -> Shards:
    """Read the headers and labels. Raises UserError for damaged archives, and for two images of one key."""
    found: dict[str, PackedFile] = {}
    labels: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    for archive in archives:
        classes: dict[str, Member] = {}
        for name, member in tar_entries(archive):
            name = name.removeprefix("./")
            key, extension = split(name)
            if any(map(is_hidden, name.split("/"))):
                continue
            if extension == "cls" and member and member.size <= LONGEST:
                classes[key] = member
            elif (suffix := "." + extension.rpartition(".")[2]) in EXTENSIONS and member:
                if key in found:
                    raise UserError(
                        f"{found[key]} and {archive}/{name} share the key {key}, the name before the first dot; "
                        "rename or remove one"
                    )
                found[key] = PackedFile(archive, name, member)
            elif suffix in EXTENSIONS | UNREAD | {".tar"}:
                skipped[f"{suffix} file" if member else "special file"] += 1
        contents = read_members(archive, classes.values())
        labels |= {key: int(text) for key, text in zip(classes, contents, strict=True) if text.strip().isdigit()}
    images = {key: found[key] for key in sorted(found, key=lambda key: natural_key(found[key].name))}
    complete = labels.keys() >= images.keys()
    return Shards(images, tuple(labels[key] for key in images) if complete else None, in_words(skipped))


def split(name: str) -> tuple[str, str]:
    """The key and the lower-case extensions of a file: ("a/b", "seg.png") of "a/b.seg.PNG"."""
    folder, slash, file = name.rpartition("/")
    stem, _, extensions = file.partition(".")
    return folder + slash + stem, extensions.lower()
