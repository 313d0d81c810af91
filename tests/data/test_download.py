"""A download is gone on with, checked and whole or absent; archives cannot write where they like."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest

from local_server import Server, serve
from vqkit.data import Split, homes, pack
from vqkit.data import download as downloading
from vqkit.data.config import SizedSplits
from vqkit.data.download import ATTEMPTS, Unreachable, fetch, part_of
from vqkit.data.events import DataEvent, Downloading
from vqkit.data.homes import download, find_download_defects
from vqkit.data.published import HOMES, PUBLISHED, Bucket, ImageArchives, RemoteFile, ZippedFile

CONTENT = np.random.default_rng(0).bytes(5000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloading, "PIECE", 512)
    monkeypatch.setattr(downloading, "TIMEOUT", 5.0)
    with serve() as server:
        yield server


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def remote(server: Server, name: str, content: bytes) -> RemoteFile:
    server.files[f"/{name}"] = content
    return RemoteFile(name, f"{server.url}/{name}", len(content), sha256(content))


def no_wait(seconds: float) -> None:
    assert 0 < seconds < 60


# One file


def test_a_file_comes_whole_and_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    file, events = remote(server, "file", CONTENT), list[DataEvent]()
    for _ in range(2):
        fetch(file, tmp_path / "new" / "file", on_event=events.append)
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert server.asked == [("/file", 0)]
    assert events[-1] == Downloading("file", 5000, 5000)


def test_a_cut_connection_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    file = remote(server, "file", CONTENT)
    server.cuts = [700, 0, 1300]
    fetch(file, tmp_path / "file", wait=no_wait)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [("/file", 0), ("/file", 700), ("/file", 700), ("/file", 2000)]


def test_a_server_that_knows_no_parts_begins_again(server: Server, tmp_path: Path) -> None:
    file = remote(server, "file", CONTENT)
    server.knows_parts, server.cuts = False, [700, 300]
    fetch(file, tmp_path / "file", wait=no_wait)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_what_was_brought_is_kept_for_the_next_call(server: Server, tmp_path: Path) -> None:
    file = remote(server, "file", CONTENT)
    server.cuts = [900] + [0] * ATTEMPTS
    with pytest.raises(Unreachable, match=r"cannot reach http.*/file \(.*\); 900 of 5,000 bytes are kept, .* put it at .*/file"):
        fetch(file, tmp_path / "file", wait=no_wait)
    assert not (tmp_path / "file").exists() and part_of(tmp_path / "file").read_bytes() == CONTENT[:900]
    server.asked.clear()
    fetch(file, tmp_path / "file")
    assert server.asked == [("/file", 900)]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_what_does_not_go_with_the_rest_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    file = remote(server, "file", CONTENT)
    part_of(tmp_path / "file").write_bytes(b"another file" * 5)
    fetch(file, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [("/file", 60), ("/file", 0)]


def test_busy_servers_are_asked_again_and_others_named_at_once(server: Server, tmp_path: Path) -> None:
    file = remote(server, "file", CONTENT)
    server.refusals = [503, 429]
    fetch(file, tmp_path / "file", wait=no_wait)
    server.asked.clear()
    with pytest.raises(Unreachable, match=r"/gone answers 404 Not Found; fetch it elsewhere and put it at .*gone"):
        fetch(replace(file, url=f"{server.url}/gone"), tmp_path / "gone")
    assert server.asked == [("/gone", 0)]


@pytest.mark.parametrize("change", [CONTENT[:-1] + b"x", CONTENT + b"more", CONTENT[:400]])
def test_another_file_than_was_meant_is_refused(server: Server, tmp_path: Path, change: bytes) -> None:
    file = remote(server, "file", CONTENT)
    server.files["/file"] = change
    message = "it has 400 bytes, must have 5,000|has 5,004 bytes, must have 5,000|its sha256 is [0-9a-f]{64}, must be [0-9a-f]{64}"
    with pytest.raises(ValueError, match=message):
        fetch(file, tmp_path / "file", wait=no_wait)
    assert not (tmp_path / "file").exists()


def test_a_file_without_end_does_not_fill_the_disk(server: Server, tmp_path: Path) -> None:
    file, events = remote(server, "file", CONTENT), list[DataEvent]()
    server.files["/file"] = CONTENT * 100
    with pytest.raises(ValueError, match=r"it has .* bytes, must have 5,000"):
        fetch(file, tmp_path / "file", on_event=events.append)
    assert max(event.done for event in events if isinstance(event, Downloading)) <= 5000 + downloading.PIECE
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_put_there_is_checked(server: Server, tmp_path: Path) -> None:
    file = remote(server, "file", CONTENT)
    (tmp_path / "file").write_bytes(CONTENT)
    fetch(file, tmp_path / "file")
    (tmp_path / "file").write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"/file is not http.*/file: it has 4,999 bytes, must have 5,000; move it away"):
        fetch(file, tmp_path / "file")
    assert server.asked == []


def test_without_a_network_it_is_said_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # a port that nobody listens to
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        archive = RemoteFile("a.zip", f"{nowhere}/a.zip", 10, sha256(b""))
        message = rf"cannot reach {nowhere}/a\.zip \(.*refused\).* put it at {tmp_path}/a\.zip"
        with pytest.raises(Unreachable, match=message):
            download("enwik8", tmp_path, home=ZippedFile(archive, "enwik8", 10, ""), wait=no_wait)
        bucket = Bucket(f"{nowhere}/o", f"{nowhere}/files/", (("train/", 3), ("test/", 1)))
        message = rf"cannot reach {nowhere}/o.*; fetch {nowhere}/files/ elsewhere and put its 3 files at {tmp_path}/train and 1 files at"
        with pytest.raises(Unreachable, match=message):
            download("pg19", tmp_path, home=bucket, wait=no_wait)
        images = ImageArchives((archive,), replace(archive, name="b.zip", url=f"{nowhere}/b.zip"), 2, 3, "http://account")
        message = (
            rf"an account may be needed \(http://account\). To put here: .*/a\.zip at {tmp_path}/a\.zip, .*/b\.zip at {tmp_path}/b\.zip"
        )
        with pytest.raises(Unreachable, match=message):
            download("imagenet64", tmp_path, home=images, wait=no_wait)


# enwik8


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def zipped_file(server: Server, members: dict[str, bytes]) -> ZippedFile:
    return ZippedFile(remote(server, "a.zip", zipped(members)), "enwik8", len(CONTENT), sha256(CONTENT))


def test_enwik8_is_fetched_unpacked_and_packed(server: Server, tmp_path: Path) -> None:
    home = zipped_file(server, {"../escaped": b"no", "/tmp/absolute": b"no", "enwik8": CONTENT})
    for _ in range(2):
        config = download("enwik8", tmp_path / "here", home=home)
    assert server.asked == [("/a.zip", 0)]
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["a.zip", "enwik8", "fetched.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"], "the archive wrote beside its folder"
    assert find_download_defects(tmp_path / "here") == []
    pack(replace(config, sequence_len=64, splits=SizedSplits(4000, 500, 500)), tmp_path / "data")
    assert Split(tmp_path / "data", "train").document(0) == CONTENT[:4000]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../enwik8": CONTENT}, r"a\.zip: cannot read enwik8 in it"),
        ({"enwik8": CONTENT + b"!"}, r"a\.zip: enwik8 has 5,001 bytes, must have 5,000"),
        ({"enwik8": CONTENT[::-1]}, r"enwik8, as it came out of its archive, is not what it must be: its sha256"),
    ],
)
def test_another_archive_is_refused(server: Server, tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        download("enwik8", tmp_path, home=zipped_file(server, members))
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_rubbish_instead_of_an_archive_is_named(server: Server, tmp_path: Path) -> None:
    home = ZippedFile(remote(server, "a.zip", b"rubbish"), "enwik8", len(CONTENT), sha256(CONTENT))
    with pytest.raises(ValueError, match=r"a\.zip is not a zip archive, or it is damaged"):
        download("enwik8", tmp_path, home=home)


def test_what_changed_since_it_was_fetched_is_named(server: Server, tmp_path: Path) -> None:
    home = zipped_file(server, {"enwik8": CONTENT})
    download("enwik8", tmp_path, home=home)
    (tmp_path / "enwik8").write_bytes(CONTENT[::-1])
    (defect,) = find_download_defects(tmp_path)
    assert defect.startswith(f"{tmp_path}/enwik8: its sha256 is ")
    with pytest.raises(ValueError, match=r"enwik8 is not what it must be: its sha256"):
        download("enwik8", tmp_path, home=home)
    (tmp_path / "enwik8").unlink()
    assert find_download_defects(tmp_path) == [f"{tmp_path}/enwik8: it is missing"]
    with pytest.raises(ValueError, match="holds nothing that was fetched"):
        find_download_defects(tmp_path / "elsewhere")


# PG-19


BOOKS = {"train/10.txt": b"a first book", "train/2.txt": b"a second one", "train/a_b-3.txt": b"", "test/7.txt": b"a test"}


def bucket(server: Server, books: dict[str, bytes], listed: dict[str, bytes] | None = None) -> Bucket:
    """Two objects to a page; what is listed and what is there may differ."""
    server.files.update({f"/files/{name}": content for name, content in books.items()})

    def answer(query: str) -> bytes:
        fields = {name: values[0] for name, values in parse_qs(query).items()}
        names = [name for name in (listed or books) if name.startswith(fields["prefix"])]
        first = int(fields.get("pageToken", "0"))
        items = [
            {"name": name, "size": str(len(content)), "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode()}
            for name, content in ((name, (listed or books)[name]) for name in names[first : first + 2])
        ]
        return json.dumps({"items": items} | ({"nextPageToken": str(first + 2)} if first + 2 < len(names) else {})).encode()

    server.answers["/o"] = answer
    return Bucket(f"{server.url}/o", f"{server.url}/files/", (("train/", 3), ("test/", 1)))


def test_books_are_listed_fetched_and_checked(server: Server, tmp_path: Path) -> None:
    home = bucket(server, BOOKS | {"train/readme.md": b"no book"})
    server.cuts = [1000, 1000, 1000, 5]
    config = download("pg19", tmp_path, home=home, wait=no_wait)
    assert (config.path, config.include) == (str(tmp_path), ("*.txt",))
    found = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.glob("*/*")}
    assert found == BOOKS
    assert find_download_defects(tmp_path) == []
    (tmp_path / "train" / "2.txt").write_bytes(b"a 2nd, other")
    assert [defect.partition(" is ")[0] for defect in find_download_defects(tmp_path)] == [f"{tmp_path}/train/2.txt: its md5"]
    # Only what is missing is asked for, and without the list the one from before serves.
    (tmp_path / "train" / "10.txt").unlink()
    server.asked.clear()
    server.answers.clear()
    download("pg19", tmp_path, home=home, wait=no_wait)
    assert [path for path, _ in server.asked if path != "/o"] == ["/files/train/10.txt"]


def test_parts_of_the_books_are_fetched_alone_and_added_to(server: Server, tmp_path: Path) -> None:
    home = bucket(server, BOOKS)
    download("pg19", tmp_path, home=home, parts=("test",))
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.glob("*/*"))] == ["test/7.txt"]
    assert find_download_defects(tmp_path) == []
    download("pg19", tmp_path, home=home, parts=("train",))
    assert len(list(tmp_path.glob("*/*"))) == len(BOOKS)
    assert [path for path, _ in server.asked if path != "/o"].count("/files/test/7.txt") == 1
    (tmp_path / "test" / "7.txt").write_bytes(b"an exam")
    assert len(find_download_defects(tmp_path)) == 1, "both parts are known"
    for parts in ((), ("tset",)):
        with pytest.raises(ValueError, match=r"must be some of train, validation, test"):
            download("pg19", tmp_path, home=home, parts=parts)
    with pytest.raises(ValueError, match=r"enwik8 is one file, of which no part can be fetched alone"):
        download("enwik8", tmp_path / "new", parts=("test",))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"train/1.txt": b"a"}, r"has 1 files under train/: must have 3"),
        ({"train/../../1.txt": b"a"}, r"the name 'train/\.\./\.\./1\.txt' is not of this kind"),
        ({"train//etc/x.txt": b"a"}, r"is not of this kind"),
    ],
)
def test_a_list_that_is_another_is_refused(server: Server, tmp_path: Path, listed: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        download("pg19", tmp_path, home=bucket(server, BOOKS, listed))
    assert list(tmp_path.iterdir()) == []


def test_a_page_instead_of_a_list_is_named(server: Server, tmp_path: Path) -> None:
    home = bucket(server, BOOKS)
    server.answers["/o"] = lambda query: b"<html>please log in</html>"
    with pytest.raises(ValueError, match="answers something else than a list of files"):
        download("pg19", tmp_path, home=home)


def test_a_book_that_is_another_is_refused(server: Server, tmp_path: Path) -> None:
    home = bucket(server, BOOKS | {"train/2.txt": b"another book"}, BOOKS)
    with pytest.raises(ValueError, match=r"train/2\.txt brought another file than was meant: its md5 is"):
        download("pg19", tmp_path, home=home)
    assert not (tmp_path / "train" / "2.txt").exists()


# ImageNet64


def npz(images: np.ndarray) -> bytes:
    """As the archives have it: a row per image, red, then green, then blue."""
    out = io.BytesIO()
    np.savez(out, data=images.transpose(0, 3, 1, 2).reshape(len(images), -1), labels=np.arange(len(images)))
    return out.getvalue()


def image_archives(server: Server, images: np.ndarray) -> ImageArchives:
    """Nine images: batch 10 after batch 2, and the last two are for the test."""
    parts = [
        zipped({"part1/batch_2.npz": npz(images[2:4]), "../batch_1.npz": npz(images[:2]), "part1/": b""}),
        zipped({"part2/batch_10.npz": npz(images[6:7]), "part2/batch_9.npz": npz(images[4:6])}),
        zipped({"val.npz": npz(images[7:])}),
    ]
    files = [remote(server, f"{i}.zip", part) for i, part in enumerate(parts)]
    return ImageArchives((files[0], files[1]), files[2], side=2, train_images=5, account="")


def test_images_are_fetched_turned_and_split(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "ROWS", 1)
    images = np.random.default_rng(0).integers(0, 256, (9, 2, 2, 3), dtype=np.uint8)
    home = image_archives(server, images)
    for _ in range(2):
        config = download("imagenet64", tmp_path / "here", home=home)
    assert len(server.asked) == 3
    assert config == PUBLISHED["imagenet64"](str(tmp_path / "here"))
    for name, part in (("train", images[:5]), ("validation", images[5:7]), ("test", images[7:])):
        assert np.array_equal(np.load(tmp_path / "here" / f"{name}.npy", mmap_mode="r"), part)
    assert find_download_defects(tmp_path / "here") == []
    assert [path.name for path in tmp_path.iterdir()] == ["here"], "the archive wrote beside its folder"
    assert len(list((tmp_path / "here").iterdir())) == 7


def test_parts_of_the_images_are_fetched_alone_and_added_to(server: Server, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 2, 2, 3), dtype=np.uint8)
    home = image_archives(server, images)
    download("imagenet64", tmp_path, home=home, parts=("test",))
    assert [path for path, _ in server.asked] == ["/2.zip"] and not (tmp_path / "train.npy").exists()
    assert np.array_equal(np.load(tmp_path / "test.npy"), images[7:]) and find_download_defects(tmp_path) == []
    download("imagenet64", tmp_path, home=home, parts=("validation",))
    assert [path for path, _ in server.asked] == ["/2.zip", "/0.zip", "/1.zip"]
    assert np.array_equal(np.load(tmp_path / "validation.npy"), images[5:7])
    for archive in tmp_path.glob("*.zip"):
        archive.unlink()
    download("imagenet64", tmp_path, home=home)
    assert len(server.asked) == 3, "of what is unpacked no archive is needed"
    (tmp_path / "test.npy").write_bytes(b"")
    assert len(find_download_defects(tmp_path)) == 1


def test_archives_that_hold_something_else_are_named(server: Server, tmp_path: Path) -> None:
    images = np.zeros((9, 2, 2, 3), dtype=np.uint8)
    home = image_archives(server, images)
    few = replace(home, train_images=8)
    other = replace(home, side=3)
    text = replace(home, train=(remote(server, "t.zip", zipped({"readme": b"hello"})),))
    wrong = replace(home, train=(remote(server, "w.zip", zipped({"b_1.npz": zipped({"labels.npy": b""})})),))
    for given, message in (
        (few, "hold 7 training images: must hold at least 8"),
        (other, r"batch_1\.npz: data\.npy holds uint8 of shape \(2, 12\): must be uint8 of shape \[N, 27\]"),
        (text, r"t\.zip holds no \.npz file"),
        (wrong, r"w\.zip: b_1\.npz: cannot read data\.npy in it"),
    ):
        with pytest.raises(ValueError, match=message):
            download("imagenet64", tmp_path, home=given)
        assert {path.suffix for path in tmp_path.iterdir()} == {".zip"}


# The homes that there are


def test_every_published_data_set_has_a_home_and_a_configuration() -> None:
    assert HOMES.keys() == PUBLISHED.keys()
    assert PUBLISHED["enwik8"]("x").splits == SizedSplits(90_000_000, 5_000_000, 5_000_000)
    assert PUBLISHED["pg19"]("x").vocab_size == 32_000
    assert PUBLISHED["imagenet64"]("x").sequence_len == 12_288
    assert {PUBLISHED[name]("x").segments for name in PUBLISHED} == {"ignore"}
    with pytest.raises(ValueError, match="name = 'enwik9': must be one of enwik8, pg19, imagenet64"):
        download("enwik9", "somewhere")
