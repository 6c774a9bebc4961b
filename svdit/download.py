"""Download a file once, over connections that fail.

A dropped connection resumes at the last byte, also in a later run. The file appears under its name only when its
size and content are right. Of several processes one downloads and the others wait.
"""

import re
import socket
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock

from svdit.errors import UserError
from svdit.progress import progress

ATTEMPTS = 5  # in a row without a new byte
FIRST_WAIT = 1.0  # seconds, doubled from one attempt to the next
TIMEOUT = 30.0  # seconds without a response
CHUNK = 1 << 20
Update = Callable[[float, float | None], None]


class DroppedError(Exception):
    """The connection failed in a way that another attempt may fix."""


def download(url: str, path: Path, is_valid: Callable[[Path], bool], alternative: str) -> Path:
    """Download `url` to `path`, unless the file exists; `is_valid` checks the content of the complete file.

    `alternative` ends the messages: "pass another checkpoint with --ckpt". Raises UserError where the download fails,
    the content is not valid or the folder is not writable.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():  # another process may have finished while this one waited
                fetch(url, path, is_valid, alternative)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); free some space, or choose another folder") from None
    return path


def fetch(url: str, path: Path, is_valid: Callable[[Path], bool], alternative: str) -> None:
    """Download by way of a partial file, which is kept when the connection fails. Raises UserError as `download`."""
    part = path.with_name(f".{path.name}.part")
    try:
        with progress(path.name, unit="bytes") as update:
            complete(url, part, update)
    except (DroppedError, URLError, ValueError) as error:
        raise UserError(
            f"cannot download {path.name} ({error}); download {url} elsewhere and copy it to {path}, or {alternative}"
        ) from None
    if not is_valid(part):
        part.unlink()
        raise UserError(f"the content of {url} is damaged or not what was expected; try again, or {alternative}")
    part.replace(path)


def complete(url: str, part: Path, update: Update) -> None:
    """Extend `part` until it is complete. Raises DroppedError after ATTEMPTS in a row without progress."""
    furthest, failures = size(part), 0
    while True:
        try:
            return extend(url, part, update)
        except DroppedError:
            failures = failures + 1 if size(part) <= furthest else 1
            furthest = max(furthest, size(part))
            if failures == ATTEMPTS:
                raise
        time.sleep(FIRST_WAIT * 2 ** (failures - 1))


def extend(url: str, part: Path, update: Update) -> None:
    """One attempt: append the missing bytes, or start over where the server does not support ranges."""
    # Ask again for the last byte, so that a complete file is not a special case (an empty range is error 416).
    with request(url, max(0, size(part) - 1), part) as response, part.open("ab") as file:
        start, total = extent(response)
        file.truncate(start)
        while chunk := receive(response):
            file.write(chunk)
            update(file.tell(), total)
    if total is not None and size(part) != total:
        raise DroppedError(f"the connection ended after {size(part)} of {total} bytes")


def request(url: str, start: int, part: Path) -> HTTPResponse:
    """Request `url` from byte `start` on; transient errors become DroppedError."""
    try:
        return urlopen(Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # `part` is longer than the file, so it belongs to another file
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
    """The offset of the response's first byte, and the size of the complete file, None if unknown."""
    if span := re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "")):
        return int(span[1]), None if span[2] == "*" else int(span[2])
    length = response.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def receive(response: HTTPResponse) -> bytes:
    """The next chunk; empty at the end. Raises DroppedError where the connection fails."""
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise DroppedError(f"the connection failed: {error}") from None


def redacted(text: object) -> str:
    """The first line of a text without passwords and tokens in URLs."""
    line = str(text).partition("\n")[0]
    line = re.sub(r"(://)[^/\s]*@", r"\1***@", line)
    return re.sub(r"([?&][^=&\s]*=)[^&\s'\")]+", r"\1***", line)


def size(part: Path) -> int:
    """The size of `part` in bytes; 0 if it does not exist."""
    return part.stat().st_size if part.exists() else 0
