"""Download a file once, over connections that fail.

A dropped connection resumes at the last byte, also in a later run, if the file is still the same (If-Range). The file
appears under its name only when its size and content are right. Of several processes one downloads and the others wait.
Passwords and tokens in URLs are sent to their host only, and appear in no message.
"""

import re
import socket
import time
from base64 import b64encode
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from svdit.errors import UserError
from svdit.files import exclusive
from svdit.progress import Update, progress
from svdit.storage.filetype import describe

ATTEMPTS = 5  # in a row without a new byte
FIRST_WAIT = 1.0  # seconds, doubled from one attempt to the next
TIMEOUT = 30.0  # seconds without a response
CHUNK = 1 << 20


class DroppedError(Exception):
    """The connection failed in a way that another attempt may fix."""


def download(url: str, path: Path, problem: Callable[[Path], str], alternative: str) -> Path:
    """Download `url` to `path`, unless the file exists; `problem` returns what is wrong with the complete file, or "".

    `alternative` ends the messages: "pass another checkpoint with --ckpt". Raises UserError where the download fails,
    the content is not valid or the folder is not writable.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path, wait=-1):
            if not path.is_file():  # another process may have finished while this one waited
                fetch(url, path, problem, alternative)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); free some space, or choose another folder") from None
    return path


def fetch(url: str, path: Path, problem: Callable[[Path], str], alternative: str) -> None:
    """Download by way of a partial file, which is kept when the connection fails. Raises UserError as `download`."""
    part = path.with_name(f".{path.name}.part")
    if part.is_symlink():  # somebody else's: it would be followed
        part.unlink()
    try:
        with progress(f"downloading {path.name}", unit="MB") as update:
            complete(url, part, update)
    except (DroppedError, URLError, HTTPException, ValueError) as error:
        raise UserError(
            f"cannot download {path.name} ({redacted(error)}); download {redacted(url)} elsewhere and copy it to "
            f"{path}, or {alternative}"
        ) from None
    if wrong := problem(part):
        kind = describe(part)[0]
        part.unlink()
        version(part).unlink(missing_ok=True)
        found = f"it is {kind}" if kind else wrong
        raise UserError(
            f"the content of {redacted(url)} ({found}) is damaged or not what was expected; try again, or {alternative}"
        )
    version(part).unlink(missing_ok=True)
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
        if start > size(part):
            raise DroppedError(f"the server sent bytes from {start} on, not from {size(part)}")
        file.truncate(start)
        note_version(response, part)
        while chunk := receive(response):
            file.write(chunk)
            update(file.tell() / 1e6, None if total is None else total / 1e6)
    if total is not None and size(part) != total:
        raise DroppedError(f"the connection ended after {size(part)} of {total} bytes")


def request(url: str, start: int, part: Path) -> HTTPResponse:
    """Request `url` from byte `start` on, if it is the version of `part`; transient errors become DroppedError."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and version(part).is_file():
        headers["If-Range"] = version(part).read_text(encoding="latin-1")
    try:
        return urlopen(authorized(url, headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # `part` is longer than the file, so it belongs to another file
            part.unlink()
            version(part).unlink(missing_ok=True)
        elif error.code not in (408, 429) and error.code < 500:
            raise
        raise DroppedError(str(error)) from None
    except URLError as error:
        if isinstance(error.reason, socket.gaierror):  # no such host, or no network at all
            raise
        raise DroppedError(str(error)) from None
    except (OSError, HTTPException) as error:
        raise DroppedError(str(error)) from None


def authorized(url: str, headers: dict[str, str]) -> Request:
    """The request for `url`, with its user and password as basic authentication that redirections do not repeat."""
    parts = urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
    if credentials:
        request.add_unredirected_header("Authorization", f"Basic {b64encode(unquote(credentials).encode()).decode()}")
    return request


def version(part: Path) -> Path:
    """The file with the server's identifier of the version that `part` belongs to."""
    return part.with_name(f"{part.name}.version")


def note_version(response: HTTPResponse, part: Path) -> None:
    """Keep the identifier of the version that is sent: a strong ETag, or the date."""
    tag = response.headers.get("ETag", "")
    identifier = tag if tag.startswith('"') else response.headers.get("Last-Modified", "")
    version(part).unlink(missing_ok=True)
    if identifier:
        version(part).write_text(identifier, encoding="latin-1")


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
