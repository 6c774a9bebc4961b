"""The published DiT-XL/2 checkpoints, downloaded once into a folder as the original code does.

A dropped connection is taken up where it broke, also by a later run; the file appears under its name only when it is
whole (size, checksums inside, a state dict); of several processes one downloads and the others wait.
The environment variable SVDIT_CHECKPOINT_URL names another folder on the web to fetch from, a mirror for example.
"""

import os
import re
import socket
import time
import zipfile
from collections.abc import Callable
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from svdit.checkpoints import io
from svdit.errors import UserError

BASE_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
PUBLISHED = {256: "DiT-XL-2-256x256.pt", 512: "DiT-XL-2-512x512.pt"}
ATTEMPTS = 5  # in a row without a new byte
FIRST_WAIT = 1.0  # seconds, doubled from one attempt to the next
TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 20


class DroppedError(Exception):
    """The connection failed in a way that another attempt may mend."""


def published_checkpoint(image_size: int, folder: str | Path = "pretrained_models") -> Path:
    """The published DiT-XL/2 for images of that size, 256 or 512; downloaded into `folder` unless it is there."""
    if image_size not in PUBLISHED:
        raise UserError(f"no DiT-XL/2 was published for {image_size}-pixel images; choose 256 or 512, or give --ckpt")
    path = Path(folder) / PUBLISHED[image_size]
    if path.is_file():
        return path
    url = os.environ.get("SVDIT_CHECKPOINT_URL", BASE_URL).rstrip("/") + "/" + path.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():  # another process may have finished while this one waited
                download(url, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); make room, or give another folder") from None
    return path


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`, by way of a partial file that survives interruptions."""
    part = path.with_name(f".{path.name}.part")
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(path.name, total=None)
        try:
            complete(url, part, partial(progress.update, task))
        except (DroppedError, URLError, ValueError) as error:
            raise UserError(
                f"cannot download {path.name} ({error}); fetch {url} where that is possible and put it at {path}, "
                "or give another checkpoint with --ckpt"
            ) from None
    check(url, part)
    part.replace(path)


def complete(url: str, part: Path, report: Callable[..., None]) -> None:
    """Extend `part` until it is whole; give up after ATTEMPTS in a row that brought nothing new."""
    furthest, failures = size(part), 0
    while True:
        try:
            return extend(url, part, report)
        except DroppedError:
            failures = failures + 1 if size(part) <= furthest else 1
            furthest = max(furthest, size(part))
            if failures == ATTEMPTS:
                raise
        time.sleep(FIRST_WAIT * 2 ** (failures - 1))


def extend(url: str, part: Path, report: Callable[..., None]) -> None:
    """One attempt: append what `part` lacks, or start over where the server knows no ranges."""
    # One byte that is there already is asked for again: a file that lacks nothing is then no special case.
    with ask(url, max(0, size(part) - 1), part) as response, part.open("ab") as file:
        start, total = extent(response)
        file.truncate(start)
        while chunk := receive(response):
            file.write(chunk)
            report(total=total, completed=file.tell())
    if total is not None and size(part) != total:
        raise DroppedError(f"the connection ended after {size(part)} of {total} bytes")


def ask(url: str, start: int, part: Path) -> HTTPResponse:
    """Request `url` from byte `start` on; errors that may pass become DroppedError."""
    try:
        return urlopen(Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # the part is longer than the file: not of this file
            part.unlink()
        elif error.code not in (408, 429) and error.code < 500:
            raise
        raise DroppedError(str(error)) from None
    except URLError as error:
        if isinstance(error.reason, socket.gaierror):  # no such host, or no network at all
            raise
        raise DroppedError(str(error)) from None
    except (OSError, HTTPException) as error:
        raise DroppedError(str(error)) from None


def extent(response: HTTPResponse) -> tuple[int, int | None]:
    """Where the answer starts, and the size of the whole file if the server tells it."""
    if span := re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "")):
        return int(span[1]), None if span[2] == "*" else int(span[2])
    length = response.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def receive(response: HTTPResponse) -> bytes:
    """The next piece; empty at the end."""
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise DroppedError(f"the connection broke: {error}") from None


def size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def check(url: str, part: Path) -> None:
    """Remove `part` and say so unless it is a state dict whose bytes have the checksums that the archive holds."""
    try:
        io.read_header(part)
        damaged = zipfile.ZipFile(part).testzip() if zipfile.is_zipfile(part) else None
    except (UserError, zipfile.BadZipFile):
        damaged = part.name
    if damaged is not None:
        part.unlink()
        raise UserError(f"what {url} sent is damaged, or no checkpoint; try again, or give a file with --ckpt")
