"""Downloads from a local server that fails in every way a real one does."""

import io
import multiprocessing
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from svdit import download
from svdit.checkpoints.hub import published_checkpoint
from svdit.errors import UserError

NAME = "DiT-XL-2-256x256.pt"


def payload() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(50_000.0)}, buffer)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `body`; the fields select how it fails, `ranges` records the requested offsets."""

    body = payload()
    ranges: list[int]
    drop_after = 10**9  # bytes sent before the connection drops
    drops = 10**9  # how many times it drops
    supports_ranges = True
    size_error = 0  # added to the sizes in the headers
    code = 200
    busy = 0  # how many times it responds 503 first
    delay = 0.0  # seconds before a response


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and server.supports_ranges else 0
        server.ranges.append(int(asked[1]) if asked else 0)
        time.sleep(server.delay)
        if self.path != f"/{NAME}" or server.code != 200 or server.busy:
            server.busy = max(0, server.busy - 1)
            return self.send_error(404 if self.path != f"/{NAME}" else server.code if server.code != 200 else 503)
        total = len(server.body) + server.size_error
        if start >= total:
            return self.send_error(416)
        self.send_response(206 if asked and server.supports_ranges else 200)
        if asked and server.supports_ranges:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        rest = server.body[start:]
        if len(rest) > server.drop_after and server.drops > 0:
            server.drops -= 1
            rest = rest[: server.drop_after]
        self.wfile.write(rest)
        return None

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.ranges = []
        monkeypatch.setenv("SVDIT_CHECKPOINT_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(download, "FIRST_WAIT", 0.0)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {f".{NAME}.lock"}


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        path = published_checkpoint(256, tmp_path / "new")
        assert path == tmp_path / "new" / NAME
        assert path.read_bytes() == server.body
    assert server.ranges == [0]
    assert files(path.parent) == {NAME}


def test_dropped_connections_resume_at_the_last_byte(server: Server, tmp_path: Path) -> None:
    server.drop_after = len(server.body) // 12  # more drops than ATTEMPTS, each after new bytes
    assert published_checkpoint(256, tmp_path).read_bytes() == server.body
    assert len(server.ranges) == 13
    assert server.ranges == sorted(set(server.ranges))


def test_a_later_run_resumes(server: Server, tmp_path: Path) -> None:
    half = len(server.body) // 2
    (tmp_path / f".{NAME}.part").write_bytes(server.body[:half])
    assert published_checkpoint(256, tmp_path).read_bytes() == server.body
    assert server.ranges == [half - 1]


def test_a_complete_partial_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / f".{NAME}.part").write_bytes(server.body)
    assert published_checkpoint(256, tmp_path).read_bytes() == server.body


@pytest.mark.parametrize("stale", ["longer", "other"])
def test_a_partial_file_of_another_file(server: Server, tmp_path: Path, stale: str) -> None:
    size = len(server.body) + 100 if stale == "longer" else 70_000
    (tmp_path / f".{NAME}.part").write_bytes(b"x" * size)
    if stale == "other":
        with pytest.raises(UserError, match="damaged or not what was expected; try again, or pass another"):
            published_checkpoint(256, tmp_path)
        assert files(tmp_path) == set()
    assert published_checkpoint(256, tmp_path).read_bytes() == server.body


def test_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    server.supports_ranges, server.drop_after, server.drops = False, 90_000, 2
    assert published_checkpoint(256, tmp_path).read_bytes() == server.body
    assert len(server.ranges) == 3


def test_it_gives_up_after_attempts_without_progress(server: Server, tmp_path: Path) -> None:
    server.supports_ranges, server.drop_after = False, 90_000
    with pytest.raises(UserError, match=rf"after 90000 of {len(server.body)} bytes\); download http.*{NAME} elsewhere"):
        published_checkpoint(256, tmp_path)
    assert len(server.ranges) == download.ATTEMPTS
    assert files(tmp_path) == {f".{NAME}.part"}  # a later run can resume


def test_a_busy_server_is_retried(server: Server, tmp_path: Path) -> None:
    server.busy = 3
    assert published_checkpoint(256, tmp_path).read_bytes() == server.body


@pytest.mark.parametrize("size_error", [-500, 500])
def test_a_wrong_size_is_rejected(server: Server, tmp_path: Path, size_error: int) -> None:
    server.size_error = size_error
    with pytest.raises(UserError, match=r"bytes|damaged or not what was expected"):
        published_checkpoint(256, tmp_path)
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("kind", ["a web page", "a changed byte"])
def test_invalid_content_is_deleted(server: Server, tmp_path: Path, kind: str) -> None:
    content = bytearray(server.body)
    content[len(content) // 2] ^= 1
    server.body = b"<html>please log in</html>" if kind == "a web page" else bytes(content)
    with pytest.raises(UserError, match="damaged or not what was expected; try again, or pass another"):
        published_checkpoint(256, tmp_path)
    assert files(tmp_path) == set()


def test_a_missing_file_is_not_retried(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"cannot download DiT-XL-2-512x512.pt .*404.* copy it to {tmp_path}"):
        published_checkpoint(512, tmp_path)
    assert len(server.ranges) == 1
    with pytest.raises(UserError, match="no DiT-XL/2 was published for 128-pixel images; choose 256 or 512"):
        published_checkpoint(128, tmp_path)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://no-such-host.invalid", "nonsense"])
def test_offline_the_message_names_url_and_path(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIT_CHECKPOINT_URL", url)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "FIRST_WAIT", 0.0)
    with pytest.raises(UserError, match=rf"download {url}/{NAME} elsewhere and copy it to {tmp_path}/{NAME}"):
        published_checkpoint(256, tmp_path)


def test_a_folder_that_is_not_writable(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file.*; free some space, or choose another folder"):
        published_checkpoint(256, tmp_path / "file")


def test_of_several_processes_one_downloads(server: Server, tmp_path: Path) -> None:
    server.delay = 0.5  # the others arrive meanwhile
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=published_checkpoint, args=(256, tmp_path)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert server.ranges == [0]
    assert (tmp_path / NAME).read_bytes() == server.body
