"""Files that are something else: the message says what they are and what to do."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdit.checkpoints.store import load_model
from svdit.errors import UserError
from svdit.evaluation.weights import load_weights
from svdit.storage.filetype import describe


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "png")
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.pt", b"x" * 100)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"), io.BytesIO())
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("model/data.pkl", "model/code/model.py", "model/constants.pkl"):
            archive.writestr(name, b"")
    return buffer.getvalue()


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2704364825\n".encode()
FILES = {
    "pointer": (POINTER, "a Git LFS pointer; run `git lfs pull`"),
    "web page": (b"\n<!DOCTYPE html><html>404</html>", "a web page; download the file itself"),
    "page without doctype": (b"<HTML>" + b"x" * 900, "a web page"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
    "empty": (b"", r"an empty file; copy or download it again"),
    "zeros": (bytes(5000), "a file of zero bytes, as after an interrupted copy"),
    "gzip": (gzip.compress(b"x" * 100), "a gzip archive; decompress it first"),
    "bzip2": (bz2.compress(b"x" * 100), "a bzip2 archive"),
    "xz": (lzma.compress(b"x" * 100), "an xz archive"),
    "zip": (zipped(), r"a zip archive \('model.pt', …\); decompress it first"),
    "tar": (tarred(), "a tar archive"),
    "npz": (npz(), "an .npz of NumPy arrays; pass a file of PyTorch"),
    "npy": (npy(), "a NumPy array"),
    "png": (png(), "a PNG image"),
    "text": (b"please log in first\n" * 9, r"a text file \('please log in first', …\)"),
    "json": (b'{"error": "not found"}', "a text file"),
    "torchscript": (script(), r"a TorchScript archive; save the model's state_dict\(\)"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(90), "a GGUF file"),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(("content", "sentence"), FILES.values(), ids=FILES)
def test_other_files_are_named(content: bytes, sentence: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"is not a checkpoint, or an incomplete one: it is {sentence}"):
        load_model(path)
    with pytest.raises(UserError, match=rf"it is {sentence.partition(';')[0]}.*; it cannot be read as a weights file"):
        load_weights(path)


def test_unknown_bytes_are_not_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(os.urandom(8) + b"\xff\xfe" * 200)
    assert describe(tmp_path / "x") == ("", "copy or download it again")


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "pipe"
    if kind != "device":
        os.mkfifo(path)
    if kind == "link to a pipe":
        path = tmp_path / "link"
        path.symlink_to(tmp_path / "pipe")
    for load in (load_model, load_weights):
        with pytest.raises(UserError, match=r"is a pipe, a socket or a device, not a regular file; "):
            load(path)
