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
from vqkit.config import from_json, to_json
from vqkit.data import pack
from vqkit.dist import LocalReducer
from vqkit.models import find_weights, load_weights
from vqkit.models.transformer import TransformerVQ
from vqkit.train.checkpoint import load_checkpoint
from vqkit.train.config import RunConfig
from vqkit.train.parallel import Processes

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
    """The folder that the official code writes its checkpoints into; parameters alone have no optimizer state."""
    arrays = {f"params/{key}": array for key, array in to_official(model.state_dict(), model.config).items()}
    tree = nested(arrays | {"step": torch.tensor(7, dtype=torch.int32)})
    write(with_lists(tree), tmp_path / "official" / "checkpoint_7" / "checkpoint")
    return tmp_path / "official"


def with_optimizer(model: TransformerVQ, path: Path, updates: int) -> Path:
    """A checkpoint with the state of AdamW after some updates."""
    arrays = to_official(model.state_dict(), model.config)
    chain = "opt_state/inner_states/main/inner_state"
    count = torch.tensor(updates, dtype=torch.int32)
    tree = {f"params/{key}": array for key, array in arrays.items()} | {
        "step": count,
        f"{chain}/1/0/count": count,
        f"{chain}/2/count": count,
    }
    for key, array in arrays.items():
        if "quantizer" not in key:
            tree |= {f"{chain}/1/0/mu/{key}": array * 0.01, f"{chain}/1/0/nu/{key}": array**2}
    return write(with_lists(nested(tree)), path)


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


GOES_ON = {
    "data.sequence-len": 32,
    "data.validation-fraction": 0.2,
    "data.test-fraction": 0.2,
    "train.steps": 6,
    "train.warmup-steps": 2,
    "train.update-len": 16,
    "train.batch-size": 2,
}
RUN = [word for name, value in GOES_ON.items() for word in (f"--{name}", str(value))]


def test_with_data_and_an_optimizer_state_training_goes_on(vqkit: Callable[..., Said], model: TransformerVQ, tmp_path: Path) -> None:
    texts, run = write_texts(tmp_path / "texts"), tmp_path / "run"
    checkpoint = with_optimizer(model, tmp_path / "checkpoint_4" / "checkpoint", 4)
    said = vqkit("import-official", checkpoint.parent, "--out", run, *WORDS, "--data.path", texts, *RUN)
    assert (said.code, said.err) == (0, "")
    assert re.search(rf"^  go on         vqkit train --run {run}$", said.out, re.MULTILINE)
    assert re.search(r"^optimizer state +adamw$", said.out, re.MULTILINE)

    config = from_json(RunConfig, (run / "config.json").read_text())
    training, _ = load_checkpoint(run / "checkpoints" / "step_00000004", config, Processes(torch.device("cpu"), LocalReducer()))
    assert (training.step, training.state) == (4, None)
    state, parameters = training.optimizer.state_tensors(), dict(model.named_parameters())
    assert state.keys() == {f"{name}.{moment}" for name in parameters for moment in ("exp_avg", "exp_avg_sq", "step")}
    for name, parameter in parameters.items():
        assert torch.equal(dict(training.model.named_parameters())[name], parameter)
        assert torch.equal(state[f"{name}.exp_avg"], parameter * 0.01)
        assert torch.equal(state[f"{name}.exp_avg_sq"], parameter**2)
        assert state[f"{name}.step"] == 4

    trained = vqkit("train", "--run", run)
    assert trained.code == 0, trained.err
    assert "after step 4 of 6" in trained.out
    assert "trained: 6 steps, 2 of them now" in trained.out
    assert find_weights(run).name == "step_00000006"


@pytest.mark.parametrize(
    ("updates", "words", "message"),
    [
        (None, [], r"the checkpoint holds no optimizer state to go on with: import the weights alone"),
        (4, ["--train.optimizer", "lion"], r'train\.optimizer = "lion": the checkpoint has the state of adamw; leave it out'),
        (4, ["--train.steps", "4"], r"train\.steps = 4: the checkpoint has done 4 updates, must be more than that"),
        (3, [], r"data\.sequence_len = 32 is 2 updates of train\.update_len = 16: the 3 updates of the checkpoint must be whole sequences"),
        (4, ["--train.update-len", "20"], r"train\.update_len = 20: must divide data\.sequence_len = 32"),
    ],
    ids=["no state", "another rule", "no step left", "within a sequence", "contradictory"],
)
def test_what_no_run_can_be_made_of(
    vqkit: Callable[..., Said], official: Path, model: TransformerVQ, tmp_path: Path, updates: int | None, words: list[str], message: str
) -> None:
    checkpoint = official if updates is None else with_optimizer(model, tmp_path / "state", updates)
    run = tmp_path / "run"
    said = vqkit("import-official", checkpoint, "--out", run, *WORDS, "--data.path", tmp_path, *RUN, *words)
    assert (said.code, said.out) == (1, "")
    assert re.match(f"vqkit: {message}", said.err)
    assert not run.exists()


def test_a_run_needs_a_folder_of_its_own(vqkit: Callable[..., Said], model: TransformerVQ, tmp_path: Path) -> None:
    checkpoint, out = with_optimizer(model, tmp_path / "state", 4), tmp_path / "out"
    assert vqkit("import-official", checkpoint, "--out", out, *WORDS).code == 0
    said = vqkit("import-official", checkpoint, "--out", out, *WORDS, "--data.path", tmp_path, *RUN)
    assert said.code == 1
    assert "is there already: a run needs a directory that is its own" in said.err
