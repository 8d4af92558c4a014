"""Fetching EMO-DB, against a local server that breaks off, corrupts, redirects, or knows no ranges."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile

import pytest
from conftest import ROOT, run_module

from npser import fetch
from npser.errors import RunFailed, UserError
from npser.fetch import download, emodb_manifest, fetch_emodb

FILES = {f"wav/{name}.wav": bytes([n]) * 50_000 + name.encode() for n, name in enumerate(["03a01Wa", "03a01Na"])}
MANIFEST = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


def archive(files, prefix="", compression=zipfile.ZIP_STORED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        for name, content in files.items():
            file.writestr(prefix + name, content)
    return data.getvalue()


class Server:
    """Serves `content` and does what a test tells it to; `requests` holds (path, Range header) of each request."""

    def __init__(self):
        self.content, self.requests = archive(FILES), []
        self.break_after = []  # for the next answers: bytes after which the connection is closed; then no breaks
        self.ranges, self.tag, self.errors, self.redirect = True, '"v1"', [], None

        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/download.zip"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def answer(self, handler):
        asked = handler.headers.get("Range")
        self.requests.append((handler.path, asked))
        if self.errors:
            handler.send_error(self.errors.pop(0))
            return
        if self.redirect and handler.path == "/download.zip":
            handler.send_response(302)
            handler.send_header("Location", self.redirect)
            handler.end_headers()
            return
        start = 0
        if asked and self.ranges and handler.headers.get("If-Range") == self.tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(self.content):
                handler.send_error(416)
                return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.send_header("ETag", self.tag)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.break_after.pop(0)] if self.break_after else body)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
    server.thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download, "__defaults__", (lambda seconds: None,))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def unpacked(monkeypatch):
    """The bytes of every archive that is unpacked. (A ZIP file is read from its end: what is before it is ignored.)"""
    seen, unpack = [], fetch.unpack
    monkeypatch.setattr(fetch, "unpack", lambda path, *rest: (seen.append(path.read_bytes()), unpack(path, *rest)))
    return seen


def leftovers(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


@pytest.mark.parametrize("prefix", ["", "emodb/", "a/b/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_fetches_unpacks_and_checks(server, tmp_path, prefix, compression):
    extra = {"erkennung.txt": b"Nr.", "lablaut/03a01Wa.lablaut": b"x", "../../evil.wav": b"x", "/etc/evil": b"x"}
    server.content = archive(FILES | extra, prefix, compression)
    folder = tmp_path / "cache" / "emodb"
    fetch_emodb(folder, server.url, MANIFEST)
    assert contents(folder) == FILES | {"erkennung.txt": b"Nr."}
    assert leftovers(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_goes_on_where_the_connection_broke_off(server, tmp_path, capsys):
    server.break_after = [30_000, 20_000, 0]
    fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert contents(tmp_path / "emodb") == FILES
    assert [asked for _, asked in server.requests] == [None, "bytes=30000-", "bytes=50000-", "bytes=50000-"]
    assert "going on" in capsys.readouterr().err


def test_gives_up_after_some_tries_and_goes_on_at_the_next_start(server, tmp_path):
    server.break_after = [40_000] + [0] * fetch.TRIES
    with pytest.raises(RunFailed, match=r"the connection broke off; 40000 bytes are kept.*--data FOLDER") as caught:
        fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert "\n" not in str(caught.value)
    server.break_after = []
    fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert server.requests[-1][1] == "bytes=40000-"
    assert contents(tmp_path / "emodb") == FILES
    assert leftovers(tmp_path / "emodb") == []


def test_another_version_is_not_glued_to_the_first(server, tmp_path, unpacked):
    server.break_after = [40_000] + [0] * fetch.TRIES
    with pytest.raises(RunFailed):
        fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    server.content, server.tag, server.break_after = archive(FILES, "other/"), '"v2"', []
    fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert contents(tmp_path / "emodb") == FILES
    assert unpacked == [server.content]


@pytest.mark.parametrize(("ranges", "tag"), [(False, '"v1"'), (True, 'W/"weak"')])
def test_a_server_that_cannot_go_on_starts_again(server, tmp_path, ranges, tag, unpacked):
    """One that knows no ranges, and one that promises no more than that another answer means the same."""
    server.ranges, server.tag, server.break_after = ranges, tag, [30_000]
    fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert contents(tmp_path / "emodb") == FILES
    assert unpacked == [server.content]
    assert (server.requests[-1][1] is None) == tag.startswith("W/")


def test_redirects_are_followed_and_keep_the_range(server, tmp_path):
    server.redirect, server.break_after = server.url.replace("download.zip", "moved.zip"), [30_000]
    fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert contents(tmp_path / "emodb") == FILES
    assert server.requests[-1] == ("/moved.zip", "bytes=30000-")


@pytest.mark.parametrize("target", ["/download.zip", "file:///etc/passwd"])
def test_redirects_in_a_circle_or_into_this_machine_end(server, tmp_path, target):
    server.redirect = target
    with pytest.raises(RunFailed, match="the server answers 30"):
        fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert not (tmp_path / "emodb").exists()


def test_a_wrong_byte_is_found(server, tmp_path):
    good = server.content
    broken = FILES | {"wav/03a01Na.wav": FILES["wav/03a01Na.wav"][:-1] + b"X"}
    server.content = archive(broken)
    with pytest.raises(RunFailed, match=r"1 of 2 files are missing or not the published ones .* wav/03a01Na\.wav"):
        fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert list(tmp_path.iterdir()) == []
    at = good.index(FILES["wav/03a01Wa.wav"]) + 1000  # damaged on its way: the zip's own check sum is wrong, too
    server.content = good[:at] + b"X" + good[at + 1 :]
    with pytest.raises(RunFailed, match="1 of 2 files"):
        fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    server.content = good
    fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert contents(tmp_path / "emodb") == FILES


def test_a_missing_file_and_no_archive_at_all(server, tmp_path):
    server.content = archive({"wav/03a01Wa.wav": FILES["wav/03a01Wa.wav"]})
    with pytest.raises(RunFailed, match=r"1 of 2 files .* wav/03a01Na\.wav"):
        fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    server.content = b"<html>The server is being repaired</html>"
    with pytest.raises(RunFailed, match="no usable zip archive"):
        fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_unpacks_to_something_huge_is_not_unpacked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_LARGEST_FILE", 60_000)
    server.content = archive({"wav/03a01Wa.wav": bytes(10**7)} | {"wav/03a01Na.wav": b""}, "", zipfile.ZIP_DEFLATED)
    with pytest.raises(RunFailed, match="2 of 2 files"):
        fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    monkeypatch.setattr(fetch, "_LARGEST", 100)
    with pytest.raises(RunFailed, match="that is not EMO-DB"):
        fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)


def test_server_errors(server, tmp_path):
    server.errors = [503, 429]
    fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    server.errors = [404]
    with pytest.raises(RunFailed, match="the server answers 404 Not Found; or fetch EMO-DB yourself"):
        fetch_emodb(tmp_path / "other", server.url, MANIFEST)
    assert len(server.requests) == 4
    for url in ("ftp://example.org/x.zip", "http://[x/", "http://example.org/ü.zip", "http://example.org/a b.zip"):
        with pytest.raises(UserError, match="not an address"):
            fetch_emodb(tmp_path / "other", url, MANIFEST)


def test_two_programs_that_fetch_at_once_fetch_once(server, tmp_path):
    code = (
        "import sys; from pathlib import Path; from npser.fetch import fetch_emodb; import json;"
        "fetch_emodb(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "emodb"), server.url, json.dumps(MANIFEST)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert len(server.requests) == 1
    assert contents(tmp_path / "emodb") == FILES
    assert leftovers(tmp_path / "emodb") == []


def test_no_server(tmp_path):
    with pytest.raises(RunFailed, match="refused"):
        fetch_emodb(tmp_path / "emodb", "http://127.0.0.1:9/download.zip", MANIFEST)


def test_unpacking_that_was_interrupted_needs_no_second_download(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "unpack", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    fetch_emodb(tmp_path / "emodb", server.url, MANIFEST)
    assert len(server.requests) == 1
    assert contents(tmp_path / "emodb") == FILES


def test_the_command_asks_the_server_that_the_environment_names(server, tmp_path):
    """With the shipped manifest: these two files are not the published ones, and 533 are missing."""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "NPSER_DATA": "", "NPSER_EMODB_URL": server.url}
    result = run_module("npser.corpus", "emodb", env=environment)
    assert result.returncode == 1
    assert "535 of 535 files are missing or not the published ones" in result.stderr
    assert not (tmp_path / "npser" / "emodb").exists()


def test_the_manifest_names_all_of_emodb():
    manifest = emodb_manifest()
    assert len(manifest) == 535
    assert all(name.startswith("wav/") and len(digest) == 64 for name, digest in manifest.items())
