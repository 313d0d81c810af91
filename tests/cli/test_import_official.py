"""`vqkit import-official`: from a file of the official code to a text, a measurement and the run's own words."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import golden_arrays
import vqkit as package
from official_files import nested, with_lists, write
from tiny_models import tiny_model
from tiny_runs import tiny_config, write_texts
from vqkit.cli import main
from vqkit.compat.official_names import to_official
from vqkit.config import to_json
from vqkit.data import pack
from vqkit.models import load_weights
from vqkit.models.transformer import TransformerVQ

MODEL = {"vocab_size": 259, "block_len": 8, "mem_len": 6, "absolute_positions": False, "position_base": 100_000.0}
WORDS = ["--block-len", "8", "--mem-len", "6", "--logit-scale", "1"]


@dataclass
class Said:
    """What one call said."""

    code: int
    out: str
    err: str


@pytest.fixture
def vqkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def call(*words: str | Path) -> Said:
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def model() -> TransformerVQ:
    return tiny_model(**MODEL).float()


@pytest.fixture
def official(model: TransformerVQ, tmp_path: Path) -> Path:
    """The folder that the official code writes its checkpoints into."""
    tree = {"step": torch.tensor(7, dtype=torch.int32), "opt_state": {}, "params": nested(to_official(model.state_dict(), model.config))}
    write(
        with_lists(nested({"step": tree["step"]}) | {"params": tree["params"], "opt_state": {}}),
        tmp_path / "official" / "checkpoint_7" / "checkpoint",
    )
    return tmp_path / "official"


def test_what_is_imported_writes_and_is_measured(vqkit: Callable[..., Said], official: Path, model: TransformerVQ, tmp_path: Path) -> None:
    out = tmp_path / "imported"
    said = vqkit("import-official", official, "--out", out, *WORDS)
    assert (said.code, said.err) == (0, "")
    for line in (
        rf"parameters +{sum(p.numel() for p in model.parameters()):,}",
        r"updates done +7",
        r"optimizer state +none",
        r"vocab_size +259",
        r"dim, layers, heads +8, 1, 2",
        r"tied +False",
        rf'  let it write  vqkit sample {out} --prompt "Once" --temperature 0\.8',
    ):
        assert re.search(rf"^{line}$", said.out, re.MULTILINE), line
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    loaded, config = load_weights(out)
    assert config == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())

    text = package.load(out).generate("ab", 20, seed=3)
    assert vqkit("sample", out, "--prompt", "ab", "--num-tokens", "20", "--seed", "3").out == f"ab{text}\n"
    assert "model.mem_len = 6" in vqkit("inspect", out).out

    run_config = tiny_config(write_texts(tmp_path / "texts"))
    run = tmp_path / "run"
    run.mkdir()
    pack(run_config.data, run / "data")
    (run / "config.json").write_text(to_json(run_config))
    measured = vqkit("eval", out, "--data", run)
    assert re.match(r"test: \d+\.\d{3} bits per byte\n", measured.out), measured
    alone = vqkit("eval", out)
    assert (alone.code, alone.err) == (1, f"vqkit: {out} holds weights and no data: name a run whose data to measure on, --data RUN\n")


def test_an_import_again_replaces_the_first(vqkit: Callable[..., Said], official: Path, tmp_path: Path) -> None:
    out = tmp_path / "imported"
    for scale in ("1", "0.5"):
        assert vqkit("import-official", official, "--out", out, *WORDS[:-1], scale).code == 0
        assert load_weights(out)[1].logit_scale == float(scale)


def test_a_model_of_other_tokens_is_imported_and_says_so(vqkit: Callable[..., Said], tmp_path: Path) -> None:
    checkpoint = golden_arrays.ROOT / "checkpoint" / "ckpt_lion_tied.train_state.msgpack"
    words = ["--block-len", "4", "--mem-len", "4", "--logit-scale", "0.1", "--position-base", "10000"]
    said = vqkit("import-official", checkpoint, "--out", tmp_path / "out", *words)
    assert said.code == 0
    assert re.search(r"^optimizer state +lion", said.out, re.MULTILINE)
    assert "from_pretrained" in said.out
    assert "vqkit sample" not in said.out
    assert TransformerVQ.from_pretrained(tmp_path / "out").config.vocab_size == 20
    assert "a vocabulary of 20 tokens" in vqkit("sample", tmp_path / "out").err


@pytest.mark.parametrize("case", ["nothing", "damaged", "another model", "occupied", "a file", "no msgpack", "no mem_len"])
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(
    vqkit: Callable[..., Said], official: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words, checkpoint = tmp_path / "out", list(WORDS), official / "checkpoint_7" / "checkpoint"
    if case == "nothing":
        checkpoint, message = tmp_path / "nowhere", r"\S*nowhere does not exist: must be an official checkpoint"
    elif case == "damaged":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
        message = r"\S*checkpoint: not a whole msgpack serialisation"
    elif case == "another model":
        write(nested({"params/dense/kernel": torch.zeros(2, 2)}), checkpoint)
        message = r"\S*checkpoint: no key begins with 'transformer_layers_' or"
    elif case == "occupied":
        out.mkdir()
        (out / "letter.txt").write_text("dear")
        message = r"\S*out holds letter\.txt: --out must be absent, empty, or what an earlier import left"
    elif case == "a file":
        out.write_text("dear")
        message = r"\S*out is a file: --out must be a folder, or absent"
    elif case == "no msgpack":
        monkeypatch.setitem(sys.modules, "msgpack", None)
        message = r'checkpoints of the official code need the package msgpack: pip install "vqkit\[official\]"'
    else:
        words, message = [*WORDS[:2], *WORDS[4:]], r"\S*checkpoint: mem_len = None: no array of a checkpoint"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = vqkit("import-official", checkpoint, "--out", out, *words)
    assert (said.code, said.out) == (1, "")
    assert re.match(f"vqkit: {message}", said.err)
    assert said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
