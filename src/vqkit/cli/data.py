"""`vqkit data`: fetch, prepare and check what a run reads."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from vqkit.cli.errors import UsageError
from vqkit.cli.options import near_miss, parse, value_of
from vqkit.config import overlay
from vqkit.data.config import CUT_OPTIONS, DataConfig, ImageSource
from vqkit.data.published import PUBLISHED
from vqkit.recipes import RECIPES

if TYPE_CHECKING:
    from vqkit.data import DataSummary

HELP = """usage: vqkit data download NAME [--to FOLDER] [--parts train validation test]
       vqkit data prepare WHAT [--to FOLDER] [OPTIONS]
       vqkit data check WHAT [OPTIONS]

Fetch, prepare and check what a run reads. NAME is one of the published data sets; WHAT is such a name, or a file or folder of your
own: text, ids of another tokenizer, images.

data sets:
{published}

examples:
  vqkit data download enwik8
  vqkit data prepare enwik8
  vqkit data prepare FOLDER --to packed/mine --data.tokenizer.kind sentencepiece --data.tokenizer.vocab-size 8000
  vqkit data prepare ids.npy --data.source.kind ids --data.source.vocab-size 50257
  vqkit data check packed/mine
  vqkit train text --data.path packed/mine --run runs/mine

vqkit data prepare WHAT --help shows every option.
"""


@dataclass(frozen=True)
class DownloadOptions:
    """Fetch a published data set from its home: enwik8, pg19 or imagenet64. What was cut off is gone on with; all is checked.
    $ vqkit data download enwik8
    $ vqkit data download pg19 --parts validation
    """

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]
    """Which one."""
    to: Path | None = None
    """Folder to put it in. None = data/NAME."""
    parts: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
    """Which parts. The recipe pg19-tiny needs validation alone, imagenet64-tiny test alone; enwik8 is one file."""


@dataclass(frozen=True)
class PrepareOptions:
    """Split, tokenize and pack data once, for any number of runs.
    $ vqkit data prepare FOLDER --to packed/mine
    """

    what: Annotated[Positional[str], tyro.conf.arg(metavar="WHAT")] = ""
    """A file or folder, or the name of a data set that was fetched."""
    to: Path | None = None
    """Folder to make; if it is there already it is checked against its source. None = packed/NAME."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class CheckOptions:
    """Read data that were fetched or packed and compare them with what was written; or see what a file or folder holds.
    $ vqkit data check packed/mine
    """

    what: Annotated[Positional[str], tyro.conf.arg(metavar="WHAT")] = ""
    """A folder of packed or of fetched data, a name, or a file or folder."""
    data: DataConfig = field(default_factory=DataConfig)


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    commands = {"download": _download, "prepare": _prepare, "check": _check}
    if not words:
        raise UsageError(f"data: what is to be done? One of {', '.join(commands)}; see vqkit data --help")
    if words[0] in ("-h", "--help"):
        published = "\n".join(f"  {name:<12}{(config.__doc__ or '').strip()}" for name, config in PUBLISHED.items())
        print(HELP.format(published=published), end="")
        return 0
    if words[0] not in commands:
        raise UsageError(f"unknown command data {words[0]!r}{near_miss(words[0], commands)}")
    return commands[words[0]](words[1:])


def _download(words: Sequence[str]) -> int:
    options = parse(DownloadOptions, words, prog="vqkit data download")
    if options.name not in PUBLISHED:
        raise UsageError(f"unknown data set {options.name!r}{near_miss(options.name, PUBLISHED)}")
    from vqkit.cli.data_view import DataView
    from vqkit.data.homes import download

    folder = options.to or Path("data") / options.name
    with DataView() as view:
        config = download(options.name, folder, parts=options.parts, on_event=view)
    print(f"{options.name} is in {folder}\n\nwhat next\n{_after_download(options, config.path)}")
    return 0


def _after_download(options: DownloadOptions, path: str) -> str:
    lines = [f"  check it later  vqkit data check {Path(options.to or Path('data') / options.name)}"]
    tiny = RECIPES[f"{options.name}-tiny"]().data.path
    if options.to is None and Path(tiny).exists():
        lines.append(f"  on a laptop     vqkit train {options.name}-tiny")
    if len(set(options.parts)) == 3:
        elsewhere = "" if options.to is None else f" --data.path {path}"
        lines.append(f"  pack it         vqkit data prepare {options.name}{elsewhere}")
    return "\n".join(lines)


def _prepare(words: Sequence[str]) -> int:
    options, config = _asked(PrepareOptions, words, "vqkit data prepare")
    from vqkit.cli.data_view import DataView
    from vqkit.data import is_packed, pack

    name = options.what if options.what in PUBLISHED else Path(config.path).stem or "data"
    folder = options.to or Path("packed") / name
    if folder.exists() and not is_packed(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else than packed data: --to must name a new folder, or one of packed data")
    with DataView() as view:
        summary = pack(config, folder, on_event=view)
    print(report(summary))
    print(f"packed: {folder}\n\nwhat next\n{_what_next(options.what, folder, summary)}")
    return 0


def _check(words: Sequence[str]) -> int:
    _, config = _asked(CheckOptions, words, "vqkit data check")
    from vqkit.cli.data_view import DataView
    from vqkit.data import find_defects, is_packed, read_summary
    from vqkit.data.homes import FETCHED_FILE, find_download_defects

    if (Path(config.path) / "config.json").is_file() and is_packed(Path(config.path) / "data"):
        config = replace(config, path=str(Path(config.path) / "data"))  # those of a run
    packing = [word.partition("=")[0] for word in words if word.startswith("--data.") and not word.startswith("--data.path")]
    if packing and is_packed(config.path):
        raise UsageError(f"{packing[0]}: {config.path} is packed already, by its own rules")
    fetched = Path(config.path) if (Path(config.path) / FETCHED_FILE).is_file() else Path(config.path).parent
    with DataView() as view:
        if is_packed(config.path):
            defects, text = find_defects(config.path, on_event=view), report(read_summary(config.path))
        elif (fetched / FETCHED_FILE).is_file():
            defects, text = find_download_defects(fetched, on_event=view), ""
        else:
            defects, text = [], _holds(config)
    if defects:
        raise ValueError(f"{defects[0]}{f'; {len(defects) - 1} more files are damaged or missing' if len(defects) > 1 else ''}")
    print(text or f"{fetched}: every file is what was fetched")
    return 0


def _asked(cls: type[Any], words: Sequence[str], prog: str) -> tuple[Any, DataConfig]:
    """The options, and what is to be read. The defaults are those of the published data set that the words name first, if any."""
    name = words[0] if words and words[0] in PUBLISHED else ""
    base = PUBLISHED[name]() if name else DataConfig(sequence_len=1)
    options = parse(cls, words, prog=prog, default=cls(data=with_length_of_images(base, words)))
    what = options.what
    if not what and options.data.path == base.path:
        raise UsageError(f"missing: a file or folder, or one of {', '.join(PUBLISHED)}; see {prog} --help")
    if what in PUBLISHED and not name:
        raise UsageError(f"{what!r} must come first: {prog} {what} ...")
    # Absolute, so that what is packed means the same files from wherever it is checked.
    path = Path(os.path.abspath(Path(options.data.path if name or not what else what).expanduser()))
    if name and not path.exists():
        raise ValueError(f"{name} is not at {path}: vqkit data download {name} fetches it; --data.path names another place")
    return options, replace(options.data, path=str(path))


def with_rules_of_packed(data: DataConfig, words: Sequence[str]) -> DataConfig:
    """`data` with the rules of the packed data that `--data.path` among `words` names; as it is where that names something else."""
    path = Path(value_of(words, "--data.path") or data.path).expanduser()
    if not (path / "meta.json").is_file():
        return data
    from vqkit.data import is_packed, read_rules

    if not is_packed(path):  # a text of that name
        return data

    rules = read_rules(path)
    kept = {name: getattr(data, name) for name in CUT_OPTIONS if rules.source.kind != "images" or name != "sequence_len"}
    return replace(rules, **kept)


def with_length_of_images(data: DataConfig, words: Sequence[str], named: bool = False) -> DataConfig:
    """`data` with the length of an image for that of a sequence, where `words` or `data` tell of images and nobody named a length."""
    kind = value_of(words, "--data.source.kind") or data.source.kind
    if kind != "images" or named or value_of(words, "--data.sequence-len") is not None:
        return data
    source = data.source if isinstance(data.source, ImageSource) else ImageSource()
    sizes = [value_of(words, f"--data.source.{name}") or str(getattr(source, name)) for name in ("height", "width", "channels")]
    if not all(size.isdecimal() and int(size) for size in sizes):
        return data
    return overlay(data, {"sequence_len": math.prod(map(int, sizes))})


def report(summary: DataSummary) -> str:
    """What packed data hold, split by split."""
    from vqkit.cli.tables import table

    skipped = f", {summary.empty_files + summary.short_files:,} skipped" if summary.empty_files + summary.short_files else ""
    splits = {name: getattr(summary, name) for name in ("train", "validation", "test")} | {"total": summary.total}
    rows = [(name, *(f"{value:,}" for value in (s.documents, s.tokens, s.bytes, s.words))) for name, s in splits.items()]
    return (
        f"source: {summary.path}, {summary.files:,} files{skipped}\n"
        f"hash: {summary.corpus_hash}\n"
        f"vocabulary: {summary.tokenizer}, {summary.vocab_size:,} ids, hash {summary.tokenizer_hash}\n\n"
        f"{table(('', 'documents', 'tokens', 'bytes', 'words'), rows)}\n"
    )


def _holds(config: DataConfig) -> str:
    """What there is to pack, without packing it."""
    from vqkit.cli.tables import table
    from vqkit.data.reading import measure_of
    from vqkit.data.source import SPLITS, find_documents

    sources, documents = find_documents(config, measure_of(config))
    unit = {"text": "bytes", "ids": "ids or rows", "images": "images"}[config.source.kind]
    rows = []
    for name in SPLITS:
        parts = [document for document in documents if document.split == name]
        rows.append((name, f"{len(parts):,}", f"{sum(part.size for part in parts):,}"))
    skipped = f"{sources.empty_files:,} empty, {sources.short_files:,} below data.min_file_bytes"
    return f"{config.path}: {len(sources.files):,} files to read, not packed yet; skipped: {skipped}\n\n{table(('', 'files', unit), rows)}"


def _what_next(what: str, folder: Path, summary: DataSummary) -> str:
    recipe = what if what in RECIPES else "tokens" if summary.tokenizer == "ids" else "text"
    lines = [f"  check it later  vqkit data check {folder}", f"  train on it     vqkit train {recipe} --data.path {folder}"]
    if recipe != what:
        lines[-1] += f" --run runs/{folder.name}"
    elif f"{what}-small" in RECIPES:
        lines.append(f"  on one GPU      vqkit train {what}-small --data.path {folder}")
    return "\n".join(lines)
