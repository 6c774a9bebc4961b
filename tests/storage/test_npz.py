"""Arrays in .npz files, compared with NumPy; and files that are damaged or declare more than they hold."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from svdit.errors import UserError
from svdit.storage.npz import map_npz, npz_keys, write_npz


def random_image(height: int = 5, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def test_streamed_npz_loads_in_numpy(tmp_path: Path):
    images = np.stack([random_image(seed=i) for i in range(5)])
    write_npz(tmp_path / "x.npz", iter(images), 5)
    with np.load(tmp_path / "x.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], images)


def test_streamed_npz_can_be_read_as_a_stream(tmp_path: Path):
    """As ADM's evaluator does: the header of version 1.0, then batches of images, in the order of the bytes."""
    images = np.stack([random_image(seed=i) for i in range(5)])
    write_npz(tmp_path / "x.npz", iter(images), 5)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive, archive.open("arr_0.npy") as stream:
        assert np.lib.format.read_magic(stream) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        assert (shape, fortran, dtype) == (images.shape, False, np.uint8)
        batches = [np.frombuffer(stream.read(2 * images[0].nbytes), np.uint8) for _ in range(3)]
        assert stream.read() == b""
    assert np.array_equal(np.concatenate(batches).reshape(shape), images)


@pytest.mark.parametrize(("shapes", "count"), [([(5, 7), (5, 7)], 3), ([(5, 7), (7, 5)], 2)])
def test_wrong_counts_and_sizes_are_errors_and_leave_no_file(tmp_path: Path, shapes, count: int):
    with pytest.raises(UserError, match=r"; (use images of one size|pass all of them)$"):
        write_npz(tmp_path / "x.npz", (random_image(*shape) for shape in shapes), count)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["renamed", "hidden"])
def test_damage_in_the_list_of_members_is_found(tmp_path: Path, change: str):
    """Without it an array would be missing, and its default would be used."""
    path = tmp_path / "x.npz"
    np.savez(path, mean=np.ones(3), count=np.array(7))
    content = bytearray(path.read_bytes())
    second = content.rindex(b"PK\x01\x02")
    if change == "renamed":
        content[second + 46] ^= 1
    else:  # the comment of the first member is as long as the entry of the second
        first, end = content.index(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
        content[first + 32 : first + 34] = (end - second).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz cannot be read as an \.npz"):
        npz_keys(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array", [np.arange(24).reshape(2, 3, 4), np.asfortranarray(np.arange(15).reshape(3, 5)), np.zeros((0, 4))]
)
def test_mapped_array_is_the_stored_one(tmp_path: Path, save, array: np.ndarray):
    save(tmp_path / "x.npz", first=np.ones(1000), arr_0=array)
    mapped = map_npz(tmp_path / "x.npz")
    np.testing.assert_array_equal(mapped, array)
    assert mapped.dtype == array.dtype
    assert isinstance(mapped, np.memmap) == (array.size > 0)


def test_version_2_headers_and_extra_fields_are_supported(tmp_path: Path):
    """An extra field in the zip entry moves the data."""
    array = random_image()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        info = zipfile.ZipInfo("arr_0.npy")
        info.extra = b"\x99\x99\x04\x00abcd"
        with archive.open(info, "w") as member:
            np.lib.format.write_array(member, array, version=(2, 0))
    np.testing.assert_array_equal(map_npz(tmp_path / "x.npz"), array)


def test_mapped_arrays_are_copy_on_write(tmp_path: Path):
    np.savez(tmp_path / "x.npz", np.zeros(4))
    map_npz(tmp_path / "x.npz")[0] = 1
    assert map_npz(tmp_path / "x.npz")[0] == 0


@pytest.mark.parametrize("key", ["arr_0", "arr_1"])
def test_unusable_archives_are_named(tmp_path: Path, key: str):
    np.savez(tmp_path / "x.npz", np.array([{}], object))
    with pytest.raises(UserError, match=r"x\.npz (cannot be read|contains no array arr_1)"):
        map_npz(tmp_path / "x.npz", key)


def npy(shape: tuple[int, ...], body: bytes = b"", descr: str = "|u1") -> bytes:
    """A .npy whose header declares `shape`, whatever follows."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + body


def archive(path: Path, method: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def flipped(path: Path) -> Path:
    """One bit of the first image is another one; the rest fits."""
    np.savez(path, arr_0=np.stack([random_image()] * 9))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def cut_inside(path: Path) -> Path:
    """A compressed member that ends before its array does."""
    np.savez_compressed(path, arr_0=random_image(99, 99))
    with zipfile.ZipFile(path) as whole:
        end = whole.infolist()[0].header_offset + whole.infolist()[0].compress_size // 2
    content = path.read_bytes()
    path.write_bytes(content[:end] + b"\0" * 200 + content[end + 200 :])
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def many_members(path: Path) -> None:
    """100 000 entries for one member, 5 MB."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", npy((1,), b"1"))
    content = path.read_bytes()
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    size = 100_000 * (end - start)
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, start, 0)
    path.write_bytes(content[:start] + content[start:end] * 100_000 + tail)


LIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "more than the member, less than the file": (
        lambda path: archive(path, arr_0=npy((64,), b"1234"), other=npy((999,), bytes(999))),
        r"declares uint8 \(64,\)",
    ),
    "less than the member": (lambda path: archive(path, arr_0=npy((2,), b"1234")), r"declares uint8 \(2,\)"),
    "4 TB in 100 bytes": (lambda path: archive(path, arr_0=npy((1 << 42,))), "declares uint8"),
    "a negative size": (lambda path: archive(path, arr_0=npy((-4, -1), b"1234")), "cannot be read"),
    "a zip bomb": (
        lambda path: archive(path, zipfile.ZIP_DEFLATED, arr_0=npy((1 << 27,), bytes(1 << 27))),
        r"declares 134 MB in 13\d+ bytes",
    ),
    "a long list of members": (many_members, "its list of members is too long"),
    "many members": (
        lambda path: archive(path, **{f"a{i}": b"" for i in range(2000)}), "it has 2000 members"
    ),
    "another bit": (flipped, "Bad CRC-32"),
    "a damaged stream": (cut_inside, r"cannot be read as an \.npz"),
    "objects": (lambda path: archive(path, arr_0=npy((1,), b"", "|O")), "Python objects"),
    "a header of rubbish": (lambda path: archive(path, arr_0=b"\x93NUMPY\1\0\4\0(((("), r"cannot be read as an \.npz"),
    "a pipe": (fifo, "it is not a file"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_before_memory_is_used(tmp_path: Path, lie: str):
    make, message = LIES[lie]
    make(path := tmp_path / "x.npz")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            map_npz(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scalars_text_and_names_are_read(tmp_path: Path):
    np.savez(tmp_path / "x.npz", count=np.array(3), extractor=np.array("inception"))
    assert npz_keys(tmp_path / "x.npz") == {"count", "extractor"}
    assert map_npz(tmp_path / "x.npz", "count").item() == 3
    assert str(map_npz(tmp_path / "x.npz", "extractor")) == "inception"


@pytest.mark.parametrize("order", ["C", "F"])
def test_another_process_gets_the_place_of_an_array(order: str, tmp_path: Path) -> None:
    """Workers that are not forked would each get a copy."""
    array = np.asarray(np.random.default_rng(0).integers(0, 256, (40, 30, 20), np.uint8), order=order)
    np.savez(tmp_path / "a.npz", arr_0=array)
    sent = pickle.dumps(map_npz(tmp_path / "a.npz"))
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent), array)


def test_parts_and_unpacked_arrays_are_sent_themselves(tmp_path: Path) -> None:
    array = np.arange(120).reshape(4, 5, 6)
    np.savez(tmp_path / "a.npz", arr_0=array)
    np.savez_compressed(tmp_path / "b.npz", arr_0=array)
    whole, unpacked = map_npz(tmp_path / "a.npz"), map_npz(tmp_path / "b.npz")
    parts = (whole[1:3], whole[::2, 1:], whole.T, whole + 1, unpacked)
    for part, expected in zip(parts, (array[1:3], array[::2, 1:], array.T, array + 1, array), strict=True):
        assert np.array_equal(pickle.loads(pickle.dumps(part)), expected)
