"""Archives compared with Python's tarfile and WebDataset, and damaged ones."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from svdit.errors import UserError
from svdit.images import write_png
from svdit.storage.tar import PackedFile, read_member, tar_entries, tar_members, write_tar

FILES = {"000007.png": b"seven" * 300, "000007.cls": b"3", "empty.cls": b"", "block.png": bytes(512)}


def test_members_are_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, FILES.items())
    members = tar_members(path)
    assert {name: read_member(path, member) for name, member in members.items()} == FILES
    with tarfile.open(path) as archive:
        assert {info.name: archive.extractfile(info).read() for info in archive} == FILES  # type: ignore[union-attr]


def test_equal_files_make_equal_archives(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, FILES.items())
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_webdataset_reads_images_and_labels(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    for i, image in enumerate(pixels):
        write_png(tmp_path / f"{i}.png", image)
    files = [(f"{i:06d}.png", (tmp_path / f"{i}.png").read_bytes()) for i in range(2)]
    write_tar(tmp_path / "0.tar", [files[0], ("000000.cls", b"4"), files[1], ("000001.cls", b"2")])
    samples = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False).decode("rgb8"))
    assert [(sample["__key__"], sample["cls"]) for sample in samples] == [("000000", 4), ("000001", 2)]
    assert np.array_equal(np.stack([sample["png"] for sample in samples]), pixels)


def test_folders_and_links_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.png").symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "folder", "folder")
    assert tar_members(tmp_path / "x.tar") == {}


@pytest.mark.parametrize("kept", [0, 100, 600, 2000, 3000, -10240, "text", "a folder", "missing"])
def test_damaged_archives_are_errors(tmp_path: Path, kept: int | str) -> None:
    path = tmp_path / "x.tar"
    if kept == "a folder":
        path.mkdir()
    elif kept == "text":
        path.write_text("no archive " * 1000)
    elif kept != "missing":
        write_tar(path, ((f"{i}.png", b"x" * 1000) for i in range(9)))
        path.write_bytes(path.read_bytes()[: int(kept)])
    with pytest.raises(UserError, match=r"x\.tar"):
        tar_members(path)


NAMES = ("a.png", "./b.png", "ä/ö.png", "x" * 100 + ".png", "d/" * 90 + "e.png", "f" * 300 + ".png", "\udce9.png")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("mtime", [0, 1.5])  # pax stores fractions in an extended header, as WebDataset's writer does
def test_every_layout_is_read_as_by_tarfile(tmp_path: Path, layout: str, mtime: float) -> None:
    names = [name for name in NAMES if layout != "ustar" or len(name) < 100]
    with tarfile.open(tmp_path / "x.tar", "w", format=FORMATS[layout], pax_headers={"comment": "of all"}) as archive:
        for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
            for name in names:
                info = tarfile.TarInfo(name)
                info.type, info.mtime, info.linkname = kind, mtime, name
                info.size = 1000 if kind == tarfile.REGTYPE else 0
                archive.addfile(info, io.BytesIO(name[-20:].encode(errors="surrogateescape") * 1000))
    with tarfile.open(tmp_path / "x.tar") as archive:
        expected = [(info.name, (info.offset_data, info.size) if info.isreg() else None) for info in archive]
    assert [(name.rstrip("/"), member) for name, member in tar_entries(tmp_path / "x.tar")] == expected
    assert len(expected) == 5 * len(names)


@given(st.lists(st.tuples(st.sampled_from(["read", "set", "current", "end"]), st.integers(-20, 20)), max_size=9))
def test_a_file_in_an_archive_behaves_as_a_file(steps: list[tuple[str, int]]) -> None:
    content = bytes(range(16))
    with io.BytesIO(content) as expected, PACKED.open() as file:
        for what, n in steps:
            if what == "read":
                assert file.read(max(n, -1)) == expected.read(max(n, -1))
            elif (place := n + {"set": 0, "current": expected.tell(), "end": 16}[what]) >= 0:
                assert file.seek(place) == expected.seek(place)
            assert file.tell() == expected.tell()


@pytest.fixture(scope="module", autouse=True)
def packed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`PACKED`, 16 bytes between two other files."""
    global PACKED
    path = tmp_path_factory.mktemp("packed") / "x.tar"
    write_tar(path, [("a", b"before"), ("b", bytes(range(16))), ("c", b"after")])
    PACKED = PackedFile(path, "b", tar_members(path)["b"])


def test_a_file_in_an_archive_is_named_like_a_path() -> None:
    assert str(PACKED) == f"{PACKED}" == f"{PACKED.archive}/b"
    assert PACKED.parent == PACKED.archive


def header(kind: bytes = b"0", size: bytes = b"%011o\0" % 4, name: bytes = b"a.png") -> bytes:
    """A block with the right checksum."""
    block = bytearray(name.ljust(124, b"\0") + size.ljust(24) + b" " * 8 + kind).ljust(512, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(**fields: str) -> bytes:
    """An extended header."""
    lines = "".join(f"{len(key) + len(value) + 5:2} {key}={value}\n" for key, value in fields.items()).encode()
    return header(b"x", b"%011o\0" % len(lines)) + lines.ljust(512, b"\0")


END, CONTENT = bytes(1024), b"abcd".ljust(512, b"\0")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "a wrong checksum": (header().replace(b"a.png", b"b.png") + CONTENT + END, "does not match its checksum"),
    "a huge file": (header(size=b"77777777777\0") + CONTENT + END, "declares a file of 8589934591 bytes and has"),
    "a file of 2^80 bytes": (header(size=b"\x80\0" + b"\xff" * 10) + CONTENT + END, "declares a file of"),
    "a negative size": (header(size=b"\xff" * 12) + CONTENT + END, "cannot be read"),
    "a negative size in text": (header(size=b"-0000000777\0") + CONTENT + END, "declares a file of -511 bytes"),
    "a negative extended size": (pax(size="-1024") + header() + CONTENT + END, "declares a file of -1024 bytes"),
    "an extended size in words": (pax(size="many") + header() + CONTENT + END, "cannot be read"),
    "a negative size of a name": (header(b"L", b"-0000000777\0") + END, "declares a file of -511 bytes"),
    "a header of 8 GB": (header(b"x", b"77777777777\0") + END, "declares a file of"),
    "a header of 2 MB": (header(b"x", b"00010000000\0") + bytes(1 << 21) + END, "has a header of 2097152 bytes"),
    "a record of no bytes": (header(b"x") + b"0 a\n".ljust(512, b"\0") + END, "has a record of 0 bytes"),
    "a record that goes back": (header(b"x") + b"-9 \n".ljust(512, b"\0") + END, "has a record of -9 bytes"),
    "a record without length": (header(b"x") + CONTENT + header() + CONTENT + END, "cannot be read"),
    "no end": (header() + CONTENT, "its end is missing"),
    "half a header": (header() + CONTENT + header()[:100], "its end is missing"),
    "two archives": ((header() + CONTENT + END) * 2, "something follows its end"),
    "a gzip": (gzip.compress(header() + CONTENT + END), "is compressed; decompress it first"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_end_and_are_errors(tmp_path: Path, kind: str) -> None:
    content, message = HOSTILE[kind]
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        tar_members(tmp_path / "x.tar")
    assert str(tmp_path / "x.tar") in str(caught.value)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_the_size_of_what_has_no_content_is_ignored(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(header(kind, b"77777777777\0", b"link") + header() + CONTENT + END)
    assert list(tar_entries(tmp_path / "x.tar")) == [("link", None), ("a.png", (1024, 4))]


def test_other_fields_of_gnu_headers_are_no_part_of_the_name(tmp_path: Path) -> None:
    block = bytearray(header())
    block[257:265], block[345:357], block[148:156] = b"ustar  \0", b"01234567012\0", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "x.tar").write_bytes(bytes(block) + CONTENT + END)
    assert list(tar_members(tmp_path / "x.tar")) == ["a.png"]


SPARSE = {"gnu": header(b"S"), "pax 0.0": pax(**{"GNU.sparse.size": "9"}) + header()}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_files_are_no_regular_files(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.tar").write_bytes(SPARSE[kind] + CONTENT + header(name=b"b.png") + CONTENT + END)
    assert list(tar_members(tmp_path / "x.tar")) == ["b.png"]


def test_no_damage_of_a_header_is_a_traceback(tmp_path: Path) -> None:
    random, errors = np.random.default_rng(0), 0
    whole = pax(path="b.png") + header() + CONTENT + header(b"L") + CONTENT + header() + CONTENT + END
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[int(random.integers(len(whole) - len(END)))] = int(random.integers(256))
        (tmp_path / "x.tar").write_bytes(damaged)
        try:
            assert len(tar_members(tmp_path / "x.tar")) <= 2
        except UserError:
            errors += 1
    assert errors > 100
