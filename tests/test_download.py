"""Downloads from a local server that fails in every way a real one does."""

import base64
import hashlib
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
from svdit.evaluation import weights
from svdit.evaluation.weights import find_weights

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
    etag = ""  # identifies the version, also in If-Range
    redirect = ""  # where to go instead
    requests: list[dict[str, str]]

    def handle_error(self, *_: object) -> None:
        """Print no traceback of clients that left: in a thread it would meet another use of the parser."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers.items()))
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            return self.end_headers()
        if server.etag and self.headers.get("If-Range", server.etag) != server.etag:
            del self.headers["Range"]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and server.supports_ranges else 0
        server.ranges.append(int(asked[1]) if asked else 0)
        time.sleep(server.delay)
        place = self.path.partition("?")[0]
        if place != f"/{NAME}" or server.code != 200 or server.busy:
            server.busy = max(0, server.busy - 1)
            return self.send_error(404 if place != f"/{NAME}" else server.code if server.code != 200 else 503)
        total = len(server.body) + server.size_error
        if start >= total:
            return self.send_error(416)
        self.send_response(206 if asked and server.supports_ranges else 200)
        if asked and server.supports_ranges:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        if server.etag:
            self.send_header("ETag", server.etag)
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
        server.ranges, server.requests = [], []
        monkeypatch.setenv("SVDIT_CHECKPOINT_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(download, "FIRST_WAIT", 0.0)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def files(folder: Path) -> set[str]:
    """Names in a folder, without the lock and the recorded checksum."""
    return {path.name for path in folder.iterdir()} - {f".{NAME}.lock", f"{NAME}.sha256"}


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


def other_body() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(50_000.0) + 1}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("etag", ['"one"', 'W/"weak"', ""])
def test_a_file_that_changed_is_downloaded_from_the_start(server: Server, tmp_path: Path, etag: str) -> None:
    server.etag, server.drop_after, server.drops = etag, 90_000, download.ATTEMPTS
    server.supports_ranges = False  # five attempts get no further
    with pytest.raises(UserError, match="after 90000 of"):
        published_checkpoint(256, tmp_path)
    server.supports_ranges, server.body = True, other_body()
    server.etag = '"two"' if etag == '"one"' else etag
    if etag == '"one"':
        assert published_checkpoint(256, tmp_path).read_bytes() == server.body
        assert server.requests[-1]["If-Range"] == '"one"'
        assert files(tmp_path) == {NAME}
    else:  # the server does not identify its versions, and the archive's checksums find the mixture
        with pytest.raises(UserError, match="damaged or not what was expected"):
            published_checkpoint(256, tmp_path)


def test_the_same_version_resumes(server: Server, tmp_path: Path) -> None:
    server.etag, server.drop_after, server.drops = '"one"', 90_000, 1
    assert published_checkpoint(256, tmp_path).read_bytes() == server.body
    assert server.ranges == [0, 89_999]
    assert server.requests[1]["If-Range"] == '"one"'


def test_a_server_that_skips_bytes_is_not_believed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f".{NAME}.part").write_bytes(server.body[:1000])
    extent = download.extent
    monkeypatch.setattr(download, "extent", lambda response: (5000, extent(response)[1]))
    with pytest.raises(UserError, match="sent bytes from 5000 on, not from 1000"):
        published_checkpoint(256, tmp_path)


def test_the_first_download_is_recorded_and_the_next_must_match(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = published_checkpoint(256, tmp_path)
    digest = hashlib.sha256(server.body).hexdigest()
    assert f"has the sha256 {digest}; set SVDIT_CHECKPOINT_SHA256 to pin it" in capsys.readouterr().err
    assert path.with_name(f"{NAME}.sha256").read_text() == f"{digest}  {NAME}\n"
    path.unlink()
    server.body = other_body()
    with pytest.raises(
        UserError, match=rf"\(the sha256 .*, not {digest} as in {NAME}\.sha256\) is damaged or not what"
    ):
        published_checkpoint(256, tmp_path)
    assert files(tmp_path) == set()
    path.with_name(f"{NAME}.sha256").unlink()
    assert published_checkpoint(256, tmp_path).read_bytes() == server.body


def test_a_pinned_checksum_must_match(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(server.body).hexdigest()
    monkeypatch.setenv("SVDIT_CHECKPOINT_SHA256", "0" * 64)
    with pytest.raises(UserError, match="damaged or not what was expected"):
        published_checkpoint(256, tmp_path)
    monkeypatch.setenv("SVDIT_CHECKPOINT_SHA256", digest.upper())
    path = published_checkpoint(256, tmp_path)
    path.write_bytes(other_body())
    with pytest.raises(UserError, match=r"the sha256 .*, not .* as in SVDIT_CHECKPOINT_SHA256; remove it, or unset"):
        published_checkpoint(256, tmp_path)


SECRET = "user:s3cr%40t@"


def with_secret(server: Server, monkeypatch: pytest.MonkeyPatch, query: str = "") -> None:
    monkeypatch.setenv("SVDIT_CHECKPOINT_URL", f"http://{SECRET}127.0.0.1:{server.server_port}/{query}")


def test_a_password_is_sent_to_its_host_only(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_secret(server, monkeypatch, "?token=abc")
    published_checkpoint(256, tmp_path)
    assert server.requests[0]["Authorization"] == "Basic " + base64.b64encode(b"user:s3cr@t").decode()
    (tmp_path / NAME).unlink()
    with Server(("127.0.0.1", 0), Handler) as other:
        other.ranges, other.requests = [], []
        threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.redirect = f"http://127.0.0.1:{other.server_port}/{NAME}"
        published_checkpoint(256, tmp_path)
        assert "Authorization" not in other.requests[0]
        other.shutdown()


@pytest.mark.parametrize("problem", ["missing", "busy", "web page", "loop", "dropped", "no server", "bad port"])
def test_no_message_has_a_password(
    problem: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_secret(server, monkeypatch, "?token=t0ken&x=1")
    if problem in ("missing", "busy"):
        server.code = 404 if problem == "missing" else 503
    elif problem == "web page":
        server.body = b"<html>log in</html>"
    elif problem == "loop":
        server.redirect = f"http://{SECRET}127.0.0.1:{server.server_port}/?token=t0ken"
    elif problem == "dropped":
        server.drop_after, server.supports_ranges = 10, False
    else:
        place = "127.0.0.1:9" if problem == "no server" else "127.0.0.1:port"
        monkeypatch.setenv("SVDIT_CHECKPOINT_URL", f"http://{SECRET}{place}/?token=t0ken")
    with pytest.raises(UserError) as error:
        published_checkpoint(256, tmp_path)
    message = str(error.value) + "".join(capsys.readouterr())
    assert "s3cr" not in message
    assert "t0ken" not in message
    assert "\n" not in str(error.value)
    assert "http://***@127.0.0.1" in message


def test_a_web_page_is_named(server: Server, tmp_path: Path) -> None:
    server.body = b"<html>please log in</html>"
    with pytest.raises(UserError, match=r"\(it is a web page\) is damaged or not what was expected"):
        published_checkpoint(256, tmp_path)


def test_a_link_in_place_of_the_partial_file_is_not_followed(server: Server, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f".{NAME}.part").symlink_to(victim)
    published_checkpoint(256, tmp_path / "new")
    assert victim.read_text() == "kept"


def test_inception_weights_download_in_the_same_way(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, locked, atomic, and checked by their SHA-256."""
    monkeypatch.setattr(weights, "URL", f"http://127.0.0.1:{server.server_port}/{NAME}")
    server.drop_after = len(server.body) // 3
    with pytest.raises(UserError, match=rf"sha256 .*, not {weights.SHA256}\) is damaged"):
        find_weights(None, tmp_path, download=True)
    assert len(server.ranges) == 4
    assert not list(tmp_path.glob("*.pth"))
    monkeypatch.setattr(weights, "SHA256", hashlib.sha256(server.body).hexdigest())
    assert find_weights(None, tmp_path, download=True).read_bytes() == server.body


def test_a_silent_server_is_not_waited_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    monkeypatch.setattr(weights, "URL", f"http://127.0.0.1:{server.server_port}/{NAME}")
    server.delay = 0.5
    with pytest.raises(UserError, match=r"cannot download .*timed out"):
        find_weights(None, tmp_path, download=True)
