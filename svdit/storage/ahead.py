"""The checksum of a .safetensors file, computed by a thread while torch is imported: only its bytes are needed.

`start(path)` begins, and `started(path)` has the future of the digest. A file that has changed since has none.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

KEY = "svdit"  # of the header in a file's metadata
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
BATCH = 1 << 20  # bytes: each call of the hash waits for the interpreter, which the import keeps busy
Stamp = tuple[int, int, int, int]
futures: dict[Stamp, Future[str | None]] = {}


def rest(header: Mapping[str, Any]) -> bytes:
    """What the checksum covers of svdit's header."""
    return json.dumps({key: value for key, value in header.items() if key != "sha256"}, sort_keys=True).encode()


def entry(name: str, dtype: str, shape: list[int]) -> bytes:
    """What the checksum covers before the bytes of a tensor; `dtype` as torch prints it."""
    return f"{name} {dtype} {shape}\n".encode()


def start(path: Path) -> None:
    """Begin to hash a regular file, once; others are ignored."""
    with suppress(OSError):
        if path.is_file() and stamp(path) not in futures:
            future = futures[stamp(path)] = Future()
            Thread(target=lambda: future.set_result(digest(path)), daemon=True).start()


def started(path: Path) -> Future[str | None] | None:
    """The future of the file's digest, None where none was begun; its result is None for files not of svdit."""
    with suppress(OSError):
        return futures.pop(stamp(path), None)
    return None


def stamp(path: Path) -> Stamp:
    """What differs where the file was replaced or written."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def digest(path: Path) -> str | None:
    """What `checksum.digest` returns for the file's header and tensors; None where it is no such file."""
    sha, batch = hashlib.sha256(), bytearray()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for part in parts(memoryview(content)):
                if len(batch) + len(part) > BATCH:
                    sha.update(batch)
                    batch.clear()
                if len(part) > BATCH:
                    sha.update(part)
                else:
                    batch += part
                del part  # before the file is closed
    except Exception:  # of a file that is damaged or of another format, which its reader reports
        return None
    sha.update(batch)
    return sha.hexdigest()


def parts(content: memoryview) -> Iterator[bytes | memoryview]:
    """The parts that the checksum covers, in order."""
    with content:
        first = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(bytes(content[8:first]))
        yield rest(json.loads(entries.pop("__metadata__")[KEY]))
        for name, described in sorted(entries.items()):
            begin, end = described["data_offsets"]
            yield entry(name, f"torch.{DTYPES[described['dtype']]}", described["shape"])
            yield content[first + begin : first + end]
