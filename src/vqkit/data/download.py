"""One file from a server: gone on with where it was cut off, checked, and whole or absent under its name."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vqkit.data.events import DataEvent, Downloading
from vqkit.data.published import RemoteFile
from vqkit.files import sync_folder

PIECE = 1 << 20
ATTEMPTS = 6
"""Tries in a row that bring nothing before it is given up."""
TIMEOUT = 30.0
Emit = Callable[[DataEvent], None]
_CUT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class Unreachable(OSError):
    """A server that cannot be reached, or does not give the file."""


def fetch(
    file: RemoteFile, path: str | os.PathLike[str], *, on_event: Emit | None = None, wait: Callable[[float], None] = time.sleep
) -> None:
    """Bring `file` to `path`, unless it is there already. What a call that fails has brought is kept, and the next goes on from there.

    Raises Unreachable, naming address and place; ValueError where what lies or came there is not the file that was meant.
    """
    path, emit = Path(path), on_event or (lambda event: None)
    if path.exists():
        defect = find_defect(path, file.size, file.digest)
        if defect:
            raise ValueError(f"{path} is not {file.url}: {defect}; move it away, and it is fetched again")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    resumed = part.exists()
    part.touch()
    _complete(file, part, path, emit, wait)
    defect = find_defect(part, file.size, file.digest)
    if defect and resumed:  # what was there before may be at fault
        part.write_bytes(b"")
        _complete(file, part, path, emit, wait)
        defect = find_defect(part, file.size, file.digest)
    if defect:
        part.unlink()
        raise ValueError(f"{file.url} brought another file than was meant: {defect}; nothing was kept")
    with open(part, "rb") as done:
        os.fsync(done.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def fetch_text(url: str, *, wait: Callable[[float], None] = time.sleep) -> bytes:
    """All that `url` answers, in memory. Raises Unreachable."""
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            wait(min(2.0**attempt, 30.0) / 4)
        try:
            with _open(url, 0) as response:
                content, length = response.read(), response.headers.get("Content-Length")
                if length is None or len(content) == int(length):
                    return content
        except _CUT as error:
            failure = _given_up(error)
    raise Unreachable(f"cannot reach {url} ({_reason(failure)})")


def part_of(path: Path) -> Path:
    """Where a file lies while it is incomplete."""
    return path.with_name(f".{path.name}.part")


def find_defect(path: Path, size: int, digest: str) -> str:
    """How the file at `path` differs from what it must be; "" if it does not."""
    found = path.stat().st_size
    if found != size:
        return f"it has {found:,} bytes, must have {size:,}"
    kind, _, wanted = digest.partition(":")
    now = file_digest(path, kind)
    return "" if now == digest else f"its {kind} is {now.partition(':')[2]}, must be {wanted}"


def file_digest(path: Path, kind: str = "sha256") -> str:
    """The hash of a file's content, as `RemoteFile.digest` has it."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return f"{kind}:{digest.hexdigest()}"


def _complete(file: RemoteFile, part: Path, path: Path, emit: Emit, wait: Callable[[float], None]) -> None:
    """Append to `part` what is missing, over as many connections as it takes."""
    failures, failure = 0, None
    while (have := part.stat().st_size) < file.size:
        if failures == ATTEMPTS:
            raise Unreachable(
                f"cannot reach {file.url} ({_reason(failure)}); {have:,} of {file.size:,} bytes are kept, the same command goes on. Or "
                f"fetch it elsewhere and put it at {path}"
            )
        if failures:
            wait(min(2.0**failures, 30.0) / 4)
        try:
            for piece, start in _pieces(file.url, have):
                with open(part, "r+b") as out:
                    out.seek(start)
                    out.truncate()
                    out.write(piece)
                emit(Downloading(file.name, start + len(piece), file.size))
                if start + len(piece) > file.size:
                    return
        except _CUT as error:
            if have and isinstance(error, urllib.error.HTTPError) and error.code == 416:
                return  # the file there is shorter than what is here already: not the one that was meant
            failure = _given_up(error, path)
        failures = 0 if part.stat().st_size > have else failures + 1


def _pieces(url: str, have: int) -> Iterator[tuple[bytes, int]]:
    """What the server sends from byte `have` on, or from the first where it does not know parts; each piece with its place."""
    with _open(url, have) as response:
        place = have if response.status == 206 and _first_byte(response) == have else 0
        if response.status == 206 and place != have:
            raise http.client.HTTPException(f"asked for bytes from {have} on, and got {response.headers.get('Content-Range')}")
        while piece := response.read(PIECE):
            yield piece, place
            place += len(piece)


def _open(url: str, have: int) -> Any:
    headers = {"User-Agent": "vqkit", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()  # it is an open connection as well
        raise


def _first_byte(response: Any) -> int:
    kind, _, rest = response.headers.get("Content-Range", "").partition(" ")
    first = rest.partition("-")[0]
    return int(first) if kind == "bytes" and first.isdigit() else -1


def _given_up(error: Exception, path: Path | None = None) -> Exception:
    """`error` if another try may help; else Unreachable is raised."""
    if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429):
        where = f"; fetch it elsewhere and put it at {path}" if path else ""
        raise Unreachable(f"{error.url} answers {error.code} {error.reason}{where}") from error
    return error


def _reason(error: Exception | None) -> str:
    if error is None:
        return "the connection ends early"
    return str(getattr(error, "reason", "") or error or type(error).__name__)
