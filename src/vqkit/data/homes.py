"""The data of the published runs from their homes to files that `DataConfig` names. What was fetched is written down with its
hashes (`fetched.jsonl`), so that it can be checked later.

Archives are never unpacked by the names in them: what is wanted is read out of them, and written under names that stand here.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from vqkit.data.config import DataConfig
from vqkit.data.download import PIECE, Emit, Unreachable, fetch, fetch_text, file_digest, find_defect
from vqkit.data.events import Note
from vqkit.data.published import HOMES, PUBLISHED, Bucket, Home, ImageArchives, RemoteFile, ZippedFile
from vqkit.data.source import SPLITS
from vqkit.files import sync_folder, temporary_name, write_text_atomic

FETCHED_FILE = "fetched.jsonl"
CONNECTIONS = 8
ROWS = 1024
"""Images that are turned at once."""


def download(
    name: str,
    folder: str | os.PathLike[str],
    *,
    parts: Collection[str] = SPLITS,
    home: Home | None = None,
    on_event: Emit | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> DataConfig:
    """Fetch the data `name` into `folder`, unpacked; returns how they are read. What is there already is not fetched again.

    `parts` are those of train, validation and test that are wanted, where they lie apart: of images training and validation come together.
    Raises ValueError for an unknown name or part, or a file that is not what it must be, and OSError for a server that cannot be reached,
    saying which file to put where.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name = {name!r}: must be one of {', '.join(PUBLISHED)}")
    if not parts or not set(parts) <= set(SPLITS):
        raise ValueError(f"parts = {sorted(parts)}: must be some of {', '.join(SPLITS)}")
    folder, emit = Path(folder), on_event or (lambda event: None)
    home = home or HOMES[name]
    if isinstance(home, ZippedFile) and set(parts) != set(SPLITS):
        raise ValueError(f"parts = {sorted(parts)}: {name} is one file, of which no part can be fetched alone")
    folder.mkdir(parents=True, exist_ok=True)
    match home:
        case ZippedFile():
            _zipped_file(home, folder, emit, wait)
            return PUBLISHED[name](str(folder / home.member))
        case Bucket():
            prefixes = tuple(entry for entry in home.prefixes if entry[0].rstrip("/") in parts)
            _bucket(replace(home, prefixes=prefixes), folder, emit, wait)
        case ImageArchives():
            _images(home, folder, parts, emit, wait)
    return PUBLISHED[name](str(folder))


def find_download_defects(folder: str | os.PathLike[str], *, on_event: Emit | None = None) -> list[str]:
    """Read all that was fetched into `folder`: every file that is not what it was, by name. Raises ValueError if nothing was."""
    folder, emit = Path(folder), on_event or (lambda event: None)
    entries = _fetched(folder)
    if not entries:
        raise ValueError(f"{folder} holds nothing that was fetched: there is no {FETCHED_FILE} in it")
    emit(Note(f"checking {len(entries):,} files"))
    defects = []
    for entry in entries:
        path = folder / entry.name
        defect = find_defect(path, entry.size, entry.digest) if path.is_file() else "it is missing"
        defects += [f"{path}: {defect}"] if defect else []
    return defects


def _zipped_file(home: ZippedFile, folder: Path, emit: Emit, wait: Callable[[float], None]) -> None:
    target = folder / home.member
    if not target.exists():
        archive = folder / home.archive.name
        fetch(home.archive, archive, on_event=emit, wait=wait)
        emit(Note(f"unpacking {archive}"))
        temporary = temporary_name(target)
        try:
            with _opened(archive) as file:
                _copy_member(file, archive, home.member, temporary, home.size)
            _settle(temporary, target, home.size, home.digest)
        finally:
            temporary.unlink(missing_ok=True)
    elif defect := find_defect(target, home.size, home.digest):
        raise ValueError(f"{target} is not what it must be: {defect}; move it away, and it is fetched again")
    _write_down(folder, [RemoteFile(home.member, home.archive.url, home.size, home.digest)])


def _bucket(home: Bucket, folder: Path, emit: Emit, wait: Callable[[float], None]) -> None:
    own = tuple(prefix for prefix, _ in home.prefixes)
    emit(Note(f"asking for the list of files at {home.listing}"))
    try:
        files = list(_listed(home, wait))
    except Unreachable as error:
        files = [file for file in _fetched(folder) if file.name.startswith(own)]
        if not files:
            places = " and ".join(f"{number:,} files at {folder / prefix}" for prefix, number in home.prefixes)
            raise Unreachable(f"{error}; fetch {home.objects} elsewhere and put its {places}") from error
    _write_down(folder, [*(file for file in _fetched(folder) if not file.name.startswith(own)), *files])
    missing = [file for file in files if not (folder / file.name).exists() or (folder / file.name).stat().st_size != file.size]
    emit(Note(f"{len(files) - len(missing):,} of {len(files):,} files are there"))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        tasks = [pool.submit(fetch, file, folder / file.name, on_event=emit, wait=wait) for file in missing]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _listed(home: Bucket, wait: Callable[[float], None]) -> Iterator[RemoteFile]:
    """What the bucket holds. Raises ValueError if that is not what is known of it."""
    for prefix, number in home.prefixes:
        found, page = [], ""
        while True:
            fields = {"prefix": prefix, "fields": "items(name,size,md5Hash),nextPageToken", "maxResults": "1000"}
            url = f"{home.listing}?{urllib.parse.urlencode(fields | ({'pageToken': page} if page else {}))}"
            try:
                answer = json.loads(fetch_text(url, wait=wait))
                found += [_object(home, prefix, item) for item in answer.get("items", []) if item["name"].endswith(".txt")]
                page = answer.get("nextPageToken", "")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{url} answers something else than a list of files: {error}") from error
            if not page:
                break
        if len(found) != number:
            raise ValueError(f"{home.listing} has {len(found):,} files under {prefix}: must have {number:,}")
        yield from found


def _object(home: Bucket, prefix: str, item: dict[str, Any]) -> RemoteFile:
    if not re.fullmatch(re.escape(prefix) + r"[\w-]+\.txt", item["name"]):
        raise ValueError(f"the name {item['name']!r} is not of this kind")
    digest = base64.b64decode(item["md5Hash"], validate=True).hex()
    return RemoteFile(item["name"], home.objects + urllib.parse.quote(item["name"]), int(item["size"]), f"md5:{digest}")


def _images(home: ImageArchives, folder: Path, parts: Collection[str], emit: Emit, wait: Callable[[float], None]) -> None:
    done = _fetched(folder)
    whole = {entry.name for entry in done if (folder / entry.name).exists()}
    groups = [(home.train, ("train.npy", "validation.npy"), home.train_images), ((home.test,), ("test.npy",), None)]
    wanted = [
        (archives, names, limit)
        for archives, names, limit in groups
        if not set(names) <= whole and any(name.removesuffix(".npy") in parts for name in names)
    ]
    needed = [archive for archives, _, _ in wanted for archive in archives]
    try:
        for archive in needed:
            fetch(archive, folder / archive.name, on_event=emit, wait=wait)
    except Unreachable as error:
        missing = ", ".join(f"{a.url} at {folder / a.name}" for a in needed if not (folder / a.name).exists())
        raise Unreachable(f"{error}; an account may be needed ({home.account}). To put here: {missing}") from error
    for archives, names, limit in wanted:
        blocks = (block for archive in archives for block in _blocks(folder / archive.name, home.side, emit))
        _write_arrays([folder / name for name in names], blocks, home, limit)
        emit(Note(f"hashing {' and '.join(names)}"))
        made = [RemoteFile(name, "", (folder / name).stat().st_size, file_digest(folder / name)) for name in names]
        done = [*(entry for entry in done if entry.name not in names), *made]
        _write_down(folder, done)


def _write_arrays(targets: list[Path], blocks: Iterator[np.ndarray], home: ImageArchives, limit: int | None) -> None:
    """The first `limit` images into the first .npy file, those after them into the second; None: all into the first."""
    temporaries = [temporary_name(path) for path in targets]
    shape = (home.side, home.side, 3)
    counts = [0 for _ in targets]
    try:
        with ExitStack() as stack:
            files: list[IO[bytes]] = [stack.enter_context(path.open("xb")) for path in temporaries]
            for file in files:
                _write_head(file, 0, shape)
            for block in blocks:
                first = len(block) if limit is None else max(limit - counts[0], 0)
                for i, part in enumerate((block[:first], block[first:])[: len(files)]):
                    files[i].write(part.tobytes())
                    counts[i] += len(part)
            if limit is not None and counts[0] < limit:
                raise ValueError(f"the archives hold {counts[0]:,} training images: must hold at least {limit:,}")
            for file, count in zip(files, counts, strict=True):
                file.seek(0)
                _write_head(file, count, shape)  # as long as the first: numpy leaves room for the count to grow
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, targets, strict=True):
            os.replace(temporary, path)
        sync_folder(targets[0].parent)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _write_head(file: IO[bytes], count: int, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})  # pyrefly: ignore


def _blocks(archive: Path, side: int, emit: Emit) -> Iterator[np.ndarray]:
    """All images of an archive, uint8 [n, side, side, 3] at a time, in the order of the numbers of its parts."""
    with _opened(archive) as outer:
        members = [info for info in outer.infolist() if info.filename.endswith(".npz")]
        if not members:
            raise ValueError(f"{archive} holds no .npz file")
        for info in sorted(members, key=lambda info: [int(digits) for digits in re.findall(r"\d+", Path(info.filename).name)]):
            emit(Note(f"unpacking {info.filename} of {archive}"))
            temporary = temporary_name(archive)
            try:
                _copy_member(outer, archive, info.filename, temporary, info.file_size)
                yield from _rows(temporary, f"{archive}: {info.filename}", side)
            finally:
                temporary.unlink(missing_ok=True)


def _rows(path: Path, name: str, side: int) -> Iterator[np.ndarray]:
    width = 3 * side * side
    with _opened(path, name) as inner, _member(inner, name, "data.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name}: data.npy is of another version of numpy's format than 1.0")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or len(shape) != 2 or shape[1] != width or by_column:
            raise ValueError(f"{name}: data.npy holds {dtype} of shape {shape}: must be uint8 of shape [N, {width}]")
        for start in range(0, shape[0], ROWS):
            number = min(ROWS, shape[0] - start)
            content = file.read(number * width)
            if len(content) != number * width:
                raise ValueError(f"{name}: data.npy is cut short after {start} images")
            yield np.frombuffer(content, dtype=np.uint8).reshape(number, 3, side, side).transpose(0, 2, 3, 1)


def _opened(path: Path, name: str = "") -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name or path} is not a zip archive, or it is damaged: {error}") from error


def _member(archive: zipfile.ZipFile, name: str, member: str) -> Any:
    try:
        return archive.open(member)
    except (KeyError, RuntimeError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{name}: cannot read {member} in it: {error}") from error


def _copy_member(archive: zipfile.ZipFile, name: Path, member: str, target: Path, size: int) -> None:
    """The content of `member`, which must have `size` bytes, at `target`; the path in the archive has no say in that."""
    with _member(archive, str(name), member) as source:
        found = archive.getinfo(member).file_size
        if found != size:
            raise ValueError(f"{name}: {member} has {found:,} bytes, must have {size:,}")
        try:
            with open(target, "xb") as out:
                shutil.copyfileobj(source, out, PIECE)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{name}: {member} is damaged: {error}") from error


def _settle(temporary: Path, target: Path, size: int, digest: str) -> None:
    """Give a file its name once it is what it must be."""
    defect = find_defect(temporary, size, digest)
    if defect:
        raise ValueError(f"{target}, as it came out of its archive, is not what it must be: {defect}")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    sync_folder(target.parent)


def _write_down(folder: Path, files: list[RemoteFile]) -> None:
    lines = [json.dumps({"name": file.name, "url": file.url, "size": file.size, "digest": file.digest}) + "\n" for file in files]
    write_text_atomic(folder / FETCHED_FILE, "".join(lines))


def _fetched(folder: Path) -> list[RemoteFile]:
    """What was written down; [] if nothing was."""
    path = folder / FETCHED_FILE
    if not path.is_file():
        return []
    try:
        return [RemoteFile(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
