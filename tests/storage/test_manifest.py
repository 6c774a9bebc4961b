"""A manifest comes back as it was written, or one sentence names the file and what changed."""

import json
from pathlib import Path
from typing import Any

import pytest

from svdit.errors import UserError
from svdit.storage.manifest import EARLIER, read_manifest, write_manifest

FIELDS = {
    "tool": "svdit",
    "num_images": 3,
    "seed": 5,
    "labels": [1, 2, 3],
    "files": ["0.png", "1.png"],
    "é": (1.5, None),
}


def test_all_fields_come_back(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.json", FIELDS)
    assert read_manifest(tmp_path / "m.json") == {**EARLIER, **json.loads(json.dumps(FIELDS))}
    assert len((tmp_path / "m.json").read_text().splitlines()) == len(FIELDS) + 3  # one field per line


def test_any_change_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    write_manifest(path, FIELDS)
    path.write_text(path.read_text().replace("[1, 2, 3]", "[1, 2, 4]"))
    with pytest.raises(UserError, match=r"m\.json does not match its checksum; restore it, or generate"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, "x"]}, "labels in .* is not a list of int; restore"),
        ({"labels": {"0": 1}}, "labels in .* is not a list of int"),
        ({"files": [1]}, "files in .* is not a list of str"),
        ({"num_images": True}, "num_images in .* is not one int"),
        ({"seed": "5"}, "seed in .* is not one int"),
    ],
)
def test_wrong_types_are_one_sentence_in_files_without_a_checksum(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "m.json").write_text(json.dumps({**FIELDS, **change}))
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path / "m.json")
