"""`vqkit import-official`: a checkpoint of the official Transformer-VQ as a folder that every other command reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from vqkit.cli.options import parse
from vqkit.compat.config import OfficialSettings
from vqkit.data.config import DataConfig
from vqkit.train.config import TrainConfig

if TYPE_CHECKING:
    from vqkit.compat import OfficialModel


@dataclass(frozen=True)
class ImportOptions:
    """Take a checkpoint of the official Transformer-VQ (JAX) over: writes a folder with config.json and model.safetensors.
    $ vqkit import-official checkpoints/checkpoint_125000 --out models/enwik8 --block-len 512 --mem-len 512 --logit-scale 1

    The checkpoint is a file of Flax, a folder checkpoint_N, or a folder of those, of which the newest is taken. Sizes, tying, norms and
    positions are read from its arrays. What no array tells are the options; in brackets the flag of the official launch script that
    means the same. A wrong one gives no error but another model. Neither JAX nor Flax is needed, the package msgpack is.

    With --data.path, and an optimizer state in the checkpoint, the folder becomes a run, and vqkit train --run goes on with it: with the
    optimizer and at the step of the checkpoint. The options of training are then yours to say as the official command had them.
    """

    checkpoint: Annotated[Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """File or folder that the official code wrote."""
    out: Path
    """Folder to write; made if absent. Weights that an earlier import left there are replaced."""
    settings: Annotated[OfficialSettings, tyro.conf.arg(name="")]
    data: DataConfig
    train: TrainConfig


FILES = ("config.json", "model.safetensors", "README.md")


def main(words: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    options = parse(ImportOptions, words, prog="vqkit import-official")
    check_folder(options.out)
    from vqkit.compat import load_official, run_config, write_run
    from vqkit.models.weights import save_weights

    loaded = load_official(options.checkpoint, options.settings)
    goes_on = bool(options.data.path)
    if goes_on:
        data = replace(options.data, path=str(Path(options.data.path).expanduser().absolute()))
        write_run(loaded, run_config(loaded, data, options.train), options.out)
    else:
        save_weights(loaded.model, loaded.config, options.out)
    print(f"{_found(loaded, goes_on)}\n\n{_what_next(options.out, loaded, goes_on)}")
    return 0


def check_folder(folder: Path) -> None:
    """Raise ValueError unless `folder` is absent, empty, or what an import left."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --out must be a folder, or absent")
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.exists() else []
    if others:
        raise ValueError(f"{folder} holds {others[0]}: --out must be absent, empty, or what an earlier import left")


def _found(loaded: OfficialModel, goes_on: bool) -> str:
    """What the arrays told."""
    from vqkit.cli.tables import table

    config = loaded.config
    rows = [
        ("parameters", f"{sum(parameter.numel() for parameter in loaded.model.parameters()):,}"),
        ("updates done", "not told" if loaded.step is None else f"{loaded.step:,}"),
        ("optimizer state", _of_optimizer(loaded, goes_on)),
        ("vocab_size", f"{config.vocab_size:,}"),
        ("dim, layers, heads", f"{config.dim}, {config.layers}, {config.heads}"),
        ("key_dim, value_dim", f"{config.key_dim}, {config.value_dim}"),
        ("codebook_size", f"{config.codebook_size}"),
        ("layer, attention", f"{config.layer}, {config.attention}"),
        ("input", config.input),
        ("tied", f"{config.tied}"),
        ("output_norm", f"{config.output_norm}"),
        ("absolute_positions", f"{config.absolute_positions}"),
    ]
    return table(("in the checkpoint", ""), rows)


def _of_optimizer(loaded: OfficialModel, goes_on: bool) -> str:
    if loaded.optimizer is None:
        return "none"
    return loaded.optimizer.kind if goes_on else f"{loaded.optimizer.kind}, left out (--data.path makes a run of it)"


def _what_next(folder: Path, loaded: OfficialModel, goes_on: bool) -> str:
    from vqkit.data import ByteTokenizer

    lines = [f"written: {folder}", "", "what next", f"  look inside   vqkit inspect {folder}"]
    if goes_on:
        lines.append(f"  go on         vqkit train --run {folder}")
    if loaded.config.vocab_size == ByteTokenizer.vocab_size and loaded.config.input == "tokens":
        lines += [
            f'  let it write  vqkit sample {folder} --prompt "Once" --temperature 0.8',
            f"  measure it    vqkit eval {folder} --data RUN   on the data of a run",
            f'  from Python   vqkit.load("{folder}").generate("Once", 200)',
        ]
    else:
        lines.append(f'  from Python   vqkit.TransformerVQ.from_pretrained("{folder}")   its tokens are those of its own vocabulary')
    return "\n".join(lines)
