"""Fetching EMO-DB from where its authors publish it, when it is nowhere on this machine.

The archive is downloaded into the user's cache folder, goes on where it broke off, and is unpacked file by file: of its
contents only the recordings that the shipped manifest (emodb.sha256) names are taken, and each must have the SHA-256
that stands there. The folder appears under its name when all of them are right, and not before.
"""

import contextlib
import hashlib
import http.client
import os
import re
import secrets
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from npser.errors import RunFailed, UserError
from npser.lock import alone

EMODB_URL = "http://emodb.bilderbar.info/download/download.zip"  # $NPSER_EMODB_URL names a mirror
LISTENERS = "erkennung.txt"  # how well human listeners recognised each recording; taken along if it is there
TRIES = 5  # in a row that bring nothing new
TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 16
_LARGEST = 1 << 30  # bytes of an archive; EMO-DB's has 40 million
_LARGEST_FILE = 1 << 24
_BROKEN = (OSError, http.client.HTTPException)  # urllib's URLError is an OSError


def emodb_manifest() -> dict[str, str]:
    """The recordings of EMO-DB: name in the archive ("wav/03a01Fa.wav") -> SHA-256."""
    lines = Path(__file__).with_name("emodb.sha256").read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def fetch_emodb(folder: Path, url: str | None = None, manifest: Mapping[str, str] | None = None) -> None:
    """Download EMO-DB and unpack it as `folder`. RunFailed, in one line, when that cannot be done; call it again then.

    url: where from (default: $NPSER_EMODB_URL, else the authors' server); manifest: what must be in it.
    """
    url = url or os.environ.get("NPSER_EMODB_URL") or EMODB_URL
    if not re.fullmatch(r"https?://[!-Z\\^-~]+", url):
        raise UserError(
            f"NPSER_EMODB_URL {url}: not an address that begins with http:// or https:// and holds neither spaces nor "
            "letters beyond ASCII"
        )
    archive = folder.with_name(f"{folder.name}.zip")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder.parent, f"another program is fetching {folder}: waiting for it"):
            if folder.exists():
                return
            if not archive.exists():
                part = archive.with_name(f"{archive.name}.part")
                download(url, part)
                os.replace(part, archive)
            unpack(archive, folder, emodb_manifest() if manifest is None else manifest, url)
    except OSError as error:
        raise RunFailed(f"{folder}: cannot be written ({error.strerror or error})") from error
    print(f"EMO-DB is in {folder}", file=sys.stderr)


# --- downloading -------------------------------------------------------------------------------------------------


def download(url: str, target: Path, wait: Callable[[float], Any] = time.sleep) -> None:
    """Download `url` to `target`, going on behind what is there already. RunFailed when it does not get to the end.

    Beside `target` lies, until the end, a file that says which version of the address its bytes belong to: the server
    sends the rest only of that same version, and everything otherwise.
    """
    version = target.with_name(target.name + ".version")
    failures, size = 0, _size(target)
    while True:
        try:
            if _fetch_rest(url, target, version):
                version.unlink(missing_ok=True)
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise _unreachable(url, f"the server answers {error.code} {error.reason}") from error
            reason = f"the server answers {error.code} {error.reason}"
        except _NotWritten as error:
            raise error.cause from error
        except _BROKEN as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        failures, size = (failures + 1, size) if _size(target) <= size else (1, _size(target))
        if failures >= TRIES:
            raise _unreachable(url, f"{reason}; {size} bytes are kept, the same command goes on behind them")
        print(f"{url}: {reason}; going on", file=sys.stderr, flush=True)
        wait(2.0 ** (failures - 1))


class _NotWritten(Exception):
    """The disk failed, not the connection."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


def _fetch_rest(url: str, target: Path, version: Path) -> bool:
    """One request for what is missing; True when everything is there. OSError or HTTPException when it breaks off."""
    have, known = _size(target), version.read_text() if version.exists() else ""
    headers = {"User-Agent": "npser", "Accept-Encoding": "identity"}
    if have and known:
        headers |= {"Range": f"bytes={have}-", "If-Range": known}
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing behind what is there: it is whole, or of another version
            target.unlink()
        raise
    with answer:
        resumed = answer.status == 206 and _starts_at(answer.headers.get("Content-Range", "")) == have
        if answer.status == 206 and not resumed:
            target.unlink(missing_ok=True)
            raise OSError("the server sent another part than the one asked for")
        start = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        if (total or 0) > _LARGEST:
            raise RunFailed(f"{url}: {total} bytes are promised, that is not EMO-DB")
        try:
            if not resumed:
                # A weak ETag promises no equal bytes, and If-Range refuses it.
                tag = answer.headers.get("ETag", "")
                version.write_text(tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", ""))
            file = target.open("ab" if resumed else "wb")
        except OSError as error:
            raise _NotWritten(error) from error
        with file:
            done = _copy(answer, file, start, total, url)
    return total is None or done == total


def _copy(answer: Any, file: Any, done: int, total: int | None, url: str) -> int:
    """Copy the answer's body; returns how many bytes there are now."""
    live = sys.stderr.isatty()
    started, first, drawn = time.monotonic(), done, 0.0
    if not live:
        print(f"fetching {url}{f', going on behind {done} bytes' if done else ''}", file=sys.stderr, flush=True)
    try:
        while chunk := answer.read(_CHUNK):
            try:
                file.write(chunk)
            except OSError as error:
                raise _NotWritten(error) from error
            done += len(chunk)
            if done > _LARGEST:
                raise RunFailed(f"{url}: more than {_LARGEST} bytes, that is not EMO-DB")
            now = time.monotonic()
            if live and now - drawn > 0.2:
                drawn = now
                speed = (done - first) / max(now - started, 1e-9) / 1e6
                of = f" of {total / 1e6:.1f}" if total else ""
                print(f"\r\x1b[Kfetching {url}  {done / 1e6:.1f}{of} MB  {speed:.1f} MB/s", end="", file=sys.stderr)
                sys.stderr.flush()
    finally:
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return done


def _starts_at(content_range: str) -> int | None:
    """The first byte of "bytes 100-199/200"."""
    first = content_range.removeprefix("bytes ").split("-")[0]
    return int(first) if first.isdigit() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _unreachable(url: str, reason: str) -> RunFailed:
    return RunFailed(
        f"{url}: {reason}; or fetch EMO-DB yourself, unpack it, and pass --data FOLDER "
        "(or set NPSER_DATA to the folder that holds emodb)"
    )


# --- unpacking ---------------------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path, manifest: Mapping[str, str], url: str) -> None:
    """Take the files of the manifest out of the archive, each checked, and make them `folder`. Removes the archive.

    RunFailed when a file is missing or is another one than the manifest says; the archive is removed then, too, so that
    the next start fetches it afresh.
    """
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with zipfile.ZipFile(archive) as content:
                bad = _take(content, temporary, manifest)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            archive.unlink(missing_ok=True)
            raise RunFailed(f"{url}: what it sends is no usable zip archive ({error}); try again later") from error
        if bad:
            archive.unlink(missing_ok=True)
            raise RunFailed(
                f"{url}: {len(bad)} of {len(manifest)} files are missing or not the published ones (SHA-256), "
                f"{bad[0]} for one; nothing is kept, try again"
            )
        os.replace(temporary, folder)
        archive.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take(content: zipfile.ZipFile, target: Path, manifest: Mapping[str, str]) -> list[str]:
    """Unpack the manifest's files below `target`; returns the names of those that are missing or wrong.

    Only names of the manifest are ever written, wherever in the archive they lie.
    """
    wanted = {*manifest, LISTENERS}
    members: dict[str, zipfile.ZipInfo] = {}
    for member in content.infolist():
        parts = member.filename.split("/")
        for name in ("/".join(parts[-2:]), parts[-1]):  # some archives have a folder around everything
            if name in wanted:
                members.setdefault(name, member)
    bad = []
    for name, digest in manifest.items():
        data = _member(content, members.get(name))
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            bad.append(name)
            continue
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if not bad and (data := _member(content, members.get(LISTENERS))) is not None:
        (target / LISTENERS).write_bytes(data)
    return bad


def _member(content: zipfile.ZipFile, member: zipfile.ZipInfo | None) -> bytes | None:
    """The bytes of a member; None where there is none, it is too large to be meant, or it is damaged."""
    if member is None or member.file_size > _LARGEST_FILE:
        return None
    with contextlib.suppress(zipfile.BadZipFile, zlib.error, EOFError), content.open(member) as file:
        data = file.read(_LARGEST_FILE + 1)
        return data if len(data) <= _LARGEST_FILE else None
    return None
