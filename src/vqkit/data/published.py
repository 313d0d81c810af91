"""The data of the published runs of Transformer-VQ: how each is read and split, and where it has its home. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from vqkit.data.config import DataConfig, ImageSource, PathSplits, SentencePieceTokens, SizedSplits


def enwik8(path: str = "data/enwik8/enwik8") -> DataConfig:
    """The first 10^8 bytes of an English Wikipedia: 90, 5 and 5 million, no end tokens."""
    return DataConfig(path=path, sequence_len=8192, segments="ignore", splits=SizedSplits())


def pg19(path: str = "data/pg19") -> DataConfig:
    """Books from before 1919, a file each in train, validation and test; a vocabulary of 32,000 learned from the training books."""
    splits, tokenizer = PathSplits(), SentencePieceTokens()
    return DataConfig(path=path, include=("*.txt",), sequence_len=8192, segments="ignore", splits=splits, tokenizer=tokenizer)


def imagenet64(path: str = "data/imagenet64") -> DataConfig:
    """Images of 64 by 64: 1,200,000 to train on, the rest of the training set validates, the official validation set is the test."""
    splits = PathSplits("train.npy", "validation.npy", "test.npy")
    return DataConfig(path=path, sequence_len=64 * 64 * 3, segments="ignore", source=ImageSource(), splits=splits)


PUBLISHED = {"enwik8": enwik8, "pg19": pg19, "imagenet64": imagenet64}
"""By name; each takes the path that `vqkit.data.homes.download` makes."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server; `digest` is the name of a hash, a colon and its hexadecimal digits."""

    name: str
    url: str
    size: int
    digest: str


@dataclass(frozen=True)
class ZippedFile:
    """One file in a zip archive: what it is called there and here, its size and digest."""

    archive: RemoteFile
    member: str
    size: int
    digest: str


@dataclass(frozen=True)
class Bucket:
    """All `.txt` objects under some prefixes of a public storage bucket, by its JSON listing, which knows sizes and MD5."""

    listing: str
    objects: str
    prefixes: tuple[tuple[str, int], ...]
    """Prefix, and how many objects it has."""


@dataclass(frozen=True)
class ImageArchives:
    """Zip archives of numpy's .npz, each with an array `data`, uint8 [N, 3 * side * side], channels first."""

    train: tuple[RemoteFile, ...]
    test: RemoteFile
    side: int
    train_images: int
    """The first so many train, those after them validate."""
    account: str
    """Where to ask for access."""


Home = ZippedFile | Bucket | ImageArchives
_DOWNSAMPLED = "https://image-net.org/data/downsample/"
HOMES: dict[str, Home] = {
    "enwik8": ZippedFile(
        archive=RemoteFile(
            name="enwik8.zip",
            url="https://mattmahoney.net/dc/enwik8.zip",
            size=36_445_475,
            digest="sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        ),
        member="enwik8",
        size=100_000_000,
        digest="sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    ),
    "pg19": Bucket(
        listing="https://storage.googleapis.com/storage/v1/b/deepmind-gutenberg/o",
        objects="https://storage.googleapis.com/deepmind-gutenberg/",
        prefixes=(("train/", 28_602), ("validation/", 50), ("test/", 100)),
    ),
    "imagenet64": ImageArchives(
        train=(
            RemoteFile(
                name="Imagenet64_train_part1_npz.zip",
                url=f"{_DOWNSAMPLED}Imagenet64_train_part1_npz.zip",
                size=6_783_426_789,
                digest="sha256:9422dc1dc5d092e9814a70a1cb7fc74880d2db5d88a0cb8a34ee363b12bde3f1",
            ),
            RemoteFile(
                name="Imagenet64_train_part2_npz.zip",
                url=f"{_DOWNSAMPLED}Imagenet64_train_part2_npz.zip",
                size=6_780_506_068,
                digest="sha256:9fafc115afb7e6c301e66dc16b2d737152b427bd5dab26e1293487a6819c7f30",
            ),
        ),
        test=RemoteFile(
            name="Imagenet64_val_npz.zip",
            url=f"{_DOWNSAMPLED}Imagenet64_val_npz.zip",
            size=529_522_927,
            digest="sha256:e1e75133158a1924135a9c6f97a80d2d237b158945e0b34074e58e6c8430eeb8",
        ),
        side=64,
        train_images=1_200_000,
        account="https://image-net.org/download-images.php",
    ),
}
"""Where the data of the published runs come from."""
