"""Words of the command line: help without torch, refusals in one line, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vqkit.cli import app, main
from vqkit.cli.bench import BenchOptions
from vqkit.cli.data import DownloadOptions, PrepareOptions
from vqkit.cli.errors import UsageError
from vqkit.cli.eval import EvalOptions
from vqkit.cli.export import ExportOptions
from vqkit.cli.import_official import ImportOptions
from vqkit.cli.options import OTHER_NAMES, option_names
from vqkit.cli.sample import SampleOptions
from vqkit.cli.train import TrainOptions, requested
from vqkit.data.config import ImageSource, PathSplits
from vqkit.recipes import RECIPES

HELP = [
    "--help",
    "train --help",
    "train quickstart --help",
    "train text --help",
    "eval --help",
    "sample --help",
    "bench --help",
    "bench train --help",
    "bench sample quickstart --help",
    "inspect --help",
    "recipes",
    "recipes --help",
    "recipes text",
    "export --help",
    "data --help",
    "data download --help",
    "data prepare x --help",
    "data check --help",
    "import-official --help",
    "--version",
]


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


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that ought to be refused fail a test here; they do not start a run of minutes."""

    def refuse(*_: object) -> int:
        raise RuntimeError("these words started a run")

    monkeypatch.setattr("vqkit.cli.report.train_and_report", refuse)


def test_help_and_refusals_import_no_torch() -> None:
    """In a process of its own, where nothing else has imported it."""
    program = f"""
import sys
from vqkit.cli import main
for words in {HELP!r}:
    assert main(words.split()) == 0, words
    assert "torch" not in sys.modules, words
for words in ["trian", "train quickstat", "train quickstart --steps 3", "train text", "sample", "eval x --splt y"]:
    assert main(words.split()) == 2, words
    assert "torch" not in sys.modules, words
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("vqkit: ") == 6


@pytest.mark.parametrize("words", HELP[:-1])
def test_every_help_teaches_by_an_example(vqkit: Callable[..., Said], words: str) -> None:
    said = vqkit(*words.split())
    assert said.code == 0
    assert said.err == ""
    assert re.search(
        r"^(usage:|#|\$)? *vqkit (train|eval|sample|bench|inspect|data|recipes|export|import-official) [^C]",
        said.out.split("\n", 1)[1],
        re.MULTILINE,
    )


@pytest.mark.parametrize("words", HELP[:-1])
def test_every_example_has_a_line_of_its_own(vqkit: Callable[..., Said], words: str) -> None:
    for line in vqkit(*words.split()).out.splitlines():
        assert len(re.findall(rf"\bvqkit ({'|'.join(app.COMMANDS)}) [^-\s]", re.sub(r"`.*?`", "", line))) < 2, line


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_a_recipe_names_every_option(vqkit: Callable[..., Said], recipe: str) -> None:
    out = vqkit("train", recipe, "--help").out
    names = list(option_names(TrainOptions))
    assert len(names) > 40
    assert [name for name in names if not re.search(rf"{name}\s", out)] == []
    assert set(re.findall(r"^\S+ (--[\w.-]+)", out, re.MULTILINE)) <= set(names)


def test_positional_arguments_are_no_options() -> None:
    assert list(option_names(ImportOptions))[:4] == ["--out", "--block-len", "--logit-scale", "--mem-len"]
    assert list(option_names(SampleOptions))[:5] == ["--prompt", "--prompts-file", "--images", "--out", "--num-tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no command given; one of train, eval, sample, bench, inspect"),
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("xyz", "unknown command 'xyz'; there are train, eval, sample, bench, inspect"),
        ("train", "no recipe given; there are quickstart, text"),
        ("train quikstart", "unknown recipe 'quikstart'; did you mean quickstart?"),
        ("train enwik9", "unknown recipe 'enwik9'; did you mean enwik8?"),
        ("train xyz", "unknown recipe 'xyz'; there are quickstart, text, tokens"),
        ("train text", "recipe text needs data: add --data.path FOLDER"),
        ("train quickstart extra", "unexpected argument 'extra'"),
        ("train quickstart --steps 3", "unknown option --steps; did you mean --train.steps?"),
        ("train quickstart --quietly x --seed 3", "unknown option --quietly; see vqkit train quickstart --help"),
        ("train text --model.seed 3", "unknown option --model.seed; did you mean --train.seed?"),
        ("train quickstart --model.dimm=3", "unknown option --model.dimm; did you mean --model.dim?"),
        ("train quickstart --block_length 3", "unknown option --block-length; did you mean --model.block-len?"),
        ("train quickstart --model.dim x", "--model.dim: must be an integer, not 'x'"),
        ("train quickstart --train.learning_rate x", "--train.learning-rate: must be a number, not 'x'"),
        ("train quickstart --model.dim", "--model.dim: needs a value"),
        ("train quickstart --data.segments maybe", "--data.segments: must be isolate or ignore, not 'maybe'"),
        ("train quickstart --train.compile yes", "--train.compile: must be True or False, not 'yes'"),
        ("train quickstart --train.betas 0.9", "--train.betas: must be None or 2 numbers, not '0.9'\n"),
        ("train quickstart --train.betas 0.9 x", "--train.betas: must be None or 2 numbers, not '0.9 x'\n"),
        ("train quickstart --train.minutes soon", "--train.minutes: must be None or a number, not 'soon'\n"),
        ("train quickstart --model.key-heads 1.5", "--model.key-heads: must be None or an integer, not '1.5'\n"),
        ("train quickstart --model.dim 33", "model.dim = 33: must be even"),
        ("train quickstart --model.codebook.decay 2", "codebook.decay = 2.0: must be at least 0 and below 1"),
        ("train quickstart --train.update-len 100", "train.update_len = 100: must divide data.sequence_len = 512"),
        ("train quickstart --train.steps 50 --train.warmup-steps 50", "train.warmup_steps = 50: must be less than train.steps = 50"),
        ("train text --data.source.kind pictures", "--data.source.kind: unknown kind 'pictures'; there are text, ids, images"),
        ("train text --data.splits.kind", "--data.splits.kind: needs a value; one of fractions, sizes, paths"),
        (
            "train text --data.splits.kind=sizes --data.splits.trian 3",
            "unknown option --data.splits.trian; did you mean --data.splits.train?",
        ),
        ("train text --data.source.vocab-size 3", "unknown option --data.source.vocab-size; did you mean --model.vocab-size?"),
        (
            "train text --data.path x --data.source.kind images --data.source.height 8 --data.sequence-len 512",
            "data.sequence_len = 512: must be the 1536 bytes of an image, data.source.height * width * channels = 8 * 64 * 3",
        ),
        ("train --file", "--file: needs a value"),
        ("train --rnu x", "unknown option --rnu; did you mean --run?"),
        ("sample", "missing: RUN: The folder of a run, a checkpoint or exported weights.\n"),
        ("sample RUN --length 9", "unknown option --length; did you mean --num-tokens?"),
        ("sample RUN --xyz 9", "unknown option --xyz; there are --prompt, --prompts-file, --images, --out, --num-tokens, "),
        ("train text --lr 9", "unknown option --lr; did you mean --train.learning-rate?"),
        ("train text --epochs=9", "unknown option --epochs; did you mean --train.steps?"),
        ("train text --out x", "unknown option --out; did you mean --run?"),
        ("train text --fsdp x", "unknown option --fsdp; did you mean --train.parallel?"),
        ("bench train text --length 9", "unknown option --length; did you mean --lengths?"),
        ("bench train text --data.path x", "--data.path: bench reads no data, its tokens are random: leave it out; --model.vocab-size and"),
        ("sample RUN --temprature 1", "unknown option --temprature; did you mean --temperature?"),
        ("eval RUN --split trian", "--split: must be train or validation or test, not 'trian'"),
        ("inspect", "missing: "),
        ("import-official X --out Y", "missing: --block-len: Queries per block"),
        ("import-official X --out Y --block-len 4 --e_scale 1", "unknown option --e-scale; did you mean --logit-scale?"),
        ("import-official X --out Y --block-len 4 --logit-scale 0", "logit_scale = 0.0: must be a finite number greater than 0"),
        ("import-official X --out Y --block-len 4 --logit-scale x", "--logit-scale: must be a number, not 'x'"),
    ],
)
def test_words_that_make_no_sense_are_refused_in_one_line(vqkit: Callable[..., Said], words: str, message: str) -> None:
    said = vqkit(*words.split())
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("vqkit: ")
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("command", ["eval", "sample", "inspect", "train --run"])
def test_what_is_not_there_is_named(vqkit: Callable[..., Said], tmp_path: Path, command: str) -> None:
    said = vqkit(*command.split(), tmp_path / "nowhere")
    assert said.code == 1
    assert said.out == ""
    assert re.fullmatch(r"vqkit: \S*nowhere (does not exist|is no run).*\n", said.err)


def test_a_missing_extra_names_the_command_that_installs_it(vqkit: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    said = vqkit("train", "quickstart", "--help")
    assert (said.code, said.err) == (1, 'vqkit: this command needs the package tyro: pip install "vqkit[train]"\n')


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a = 1:\n  must be 2"), 1, "a = 1: must be 2"),
        (OSError(2, "No such file or directory", "x.txt"), 1, "x.txt: No such file or directory"),
        (RuntimeError("the loss is no number"), 1, "the loss is no number"),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError: division by zero (VQKIT_TRACEBACK=1 shows where)"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 1, 'this command needs the package rich: pip install "vqkit[train]"'),
        (KeyboardInterrupt(), 130, "stopped"),
        (KeyboardInterrupt("stopped; go on"), 130, "stopped; go on"),
    ],
)
def test_whatever_happens_is_one_line_and_the_traceback_can_be_asked_for(
    vqkit: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(app, "_dispatch", fail)
    said = vqkit("train")
    assert (said.code, said.err) == (code, f"vqkit: {line}\n")
    monkeypatch.setenv("VQKIT_TRACEBACK", "1")
    said = vqkit("train")
    assert said.code == code
    assert said.err.startswith("Traceback")
    assert said.err.endswith(f"vqkit: {line}\n")


def test_what_other_programs_call_an_option_leads_to_one_that_there_is() -> None:
    classes = [TrainOptions, SampleOptions, BenchOptions, EvalOptions, ExportOptions, PrepareOptions, DownloadOptions]
    here = {name.rpartition(".")[2].lstrip("-") for cls in classes for name in option_names(cls)}
    assert set(OTHER_NAMES) <= here


@pytest.mark.parametrize(("rank", "local_rank", "lines"), [("0", "0", 1), ("1", "1", 0), ("2", "0", 1)])
def test_words_that_all_processes_get_are_refused_once_a_machine(
    vqkit: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, rank: str, local_rank: str, lines: int
) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", rank), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, value)
    said = vqkit("train", "quickstat")
    assert (said.code, said.err.count("\n")) == (2, lines)


@pytest.mark.parametrize("reworded", [False, True])
@pytest.mark.parametrize("consequence", [False, True])
def test_the_process_that_failed_first_speaks(
    vqkit: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, reworded: bool, consequence: bool
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)

    def fail(_: list[str]) -> int:
        error = OSError("full")
        error.of_another_process = consequence  # type: ignore[attr-defined]
        if not reworded:
            raise error
        raise OSError("the disk is full") from error

    monkeypatch.setattr(app, "_dispatch", fail)
    assert vqkit("train").err.count("\n") == (not consequence)


def test_none_is_written_as_in_a_file_or_as_in_python() -> None:
    for word in ("none", "None"):
        train = requested("quickstart", ["--train.clip", word, "--train.betas", word])[1].train
        assert (train.clip, train.betas) == (None, None)


def test_the_twin_with_ordinary_attention_needs_no_more_words() -> None:
    config = requested("text", ["--data.path", "x", "--model.attention", "full"])[1]
    assert (config.model.attention, config.model.codebook.dead_code_threshold) == ("full", 0.0)
    with pytest.raises(
        UsageError, match=r'"full", which has no codebook .*: codebook\.init must be "normal", codebook\.dead_code_threshold 0'
    ):
        requested("text", ["--data.path", "x", "--model.attention", "full", "--model.codebook.dead-code-threshold", "2"])


def test_help_before_a_command_is_its_help(vqkit: Callable[..., Said]) -> None:
    assert vqkit("help", "eval").out == vqkit("eval", "--help").out != vqkit("help").out == vqkit("--help").out


def test_whoever_names_a_number_of_steps_gets_that_number() -> None:
    assert requested("quickstart", [])[1].train.minutes is not None
    assert requested("quickstart", ["--train.steps", "200"])[1].train.minutes is None
    assert requested("quickstart", ["--train.steps", "4000"])[1].train.minutes is None
    assert requested("quickstart", ["--train.steps", "4000", "--train.minutes", "3.5"])[1].train.minutes == 3.5
    both = requested("quickstart", ["--train.steps", "200", "--train.minutes", "1"])[1].train
    assert (both.steps, both.minutes) == (200, 1.0)


def test_the_sequence_of_images_follows_their_size(tmp_path: Path) -> None:
    words = ["--data.path", "x", "--data.source.kind", "images"]
    assert requested("text", [*words, "--data.source.height", "4", "--data.source.width=2"])[1].data.sequence_len == 24
    assert requested("text", words)[1].data.sequence_len == 64 * 64 * 3
    (tmp_path / "my.toml").write_text('[data]\npath = "x"\nsource = { kind = "images", height = 2, width = 5, channels = 1 }\n')
    assert requested("text", ["--file", str(tmp_path / "my.toml")])[1].data.sequence_len == 10
    assert requested("imagenet64-tiny", ["--data.source.channels", "1"])[1].data.sequence_len == 64 * 64


def test_a_kind_brings_its_options() -> None:
    words = "--data.source.kind images --data.path x --data.sequence_len 48 --data.source.height=4 --data.source.width 4 --model.dim 32"
    _, config = requested("text", [*words.split(), "--data.splits.kind=paths", "--data.splits.test", "", "--train.update-len", "48"])
    assert config.data.source == ImageSource(height=4, width=4)
    assert config.data.splits == PathSplits("train", "validation", "")
    assert (config.data.sequence_len, config.model.dim) == (48, 32)
    assert config.data.max_test_bytes == RECIPES["text"]().data.max_test_bytes
    assert requested("text", ["--data.path", "x", "--data.source.kind", "text"])[1] == requested("text", ["--data.path", "x"])[1]


@pytest.mark.parametrize(
    ("words", "vocab_size"),
    [
        ([], 259),
        (["--data.source.kind", "ids", "--data.source.vocab-size", "100"], 103),
        (["--data.source.kind", "ids", "--data.source.vocab-size", "100", "--model.vocab-size", "128"], 128),
        (["--data.tokenizer.kind", "sentencepiece", "--data.tokenizer.vocab-size", "500"], 500),
    ],
)
def test_the_vocabulary_of_the_model_follows_the_data(tmp_path: Path, words: list[str], vocab_size: int) -> None:
    _, config = requested("text", ["--data.path", str(tmp_path), *words])
    assert config.model.vocab_size == vocab_size
