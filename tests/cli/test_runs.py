"""The commands on a run of a tiny model, from a folder of files to a written text, and on what can be wrong with either."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import vqkit as package
from vqkit.cli import main, report
from vqkit.data import Split, read_summary
from vqkit.data.baselines import compressors

OPTIONS = {
    "model.dim": 16,
    "model.key-dim": 8,
    "model.value-dim": 16,
    "model.layers": 1,
    "model.codebook-size": 8,
    "model.block-len": 8,
    "model.mem-len": 8,
    "data.sequence-len": 32,
    "data.validation-fraction": 0.2,
    "data.test-fraction": 0.2,
    "train.steps": 12,
    "train.batch-size": 4,
    "train.warmup-steps": 2,
    "train.log-every": 4,
    "train.eval-every": 6,
    "train.checkpoint-every": 6,
}
TINY = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


@dataclass
class Said:
    """What one call said."""

    code: int
    out: str
    err: str


def _write_corpus(folder: Path) -> None:
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(f"the {word} of {i} is {word * 2}\n" for word in ("house", "tree", "r\u00eave", "sea")))
    (folder / "empty.txt").touch()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    _write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run, and all that its training printed."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out := io.StringIO())
        assert main(["train", "text", "--data.path", str(corpus), "--run", str(run), *TINY]) == 0
    return run, out.getvalue()


@pytest.fixture
def run(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the run, to be spoiled."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture
def vqkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def call(*words: str | Path) -> Said:
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return call


def test_training_tells_what_it_does_and_what_came_of_it(trained: tuple[Path, str]) -> None:
    run, out = trained
    lines = out.splitlines()
    assert f"corpus hash {read_summary(run / 'data').corpus_hash}" in lines
    assert any("40 files" in line and "1 more skipped" in line for line in lines)
    assert any(re.fullmatch(r"step 4/12  \d\.\d{3} bits/byte  [\d,]+ tokens/s  \S+ left  \d+% codes active", line) for line in lines)
    assert [line for line in lines if line.startswith("test: ")] == [
        line for line in lines if re.fullmatch(r"test: \d\.\d{3} bits per byte", line)
    ]
    data = b"".join(Split(run / "data", "test").document(i) for i in range(Split(run / "data", "test").num_documents))
    for name, bits in compressors(data).items():
        assert re.search(rf"^{name} +{bits:.3f}$", out, re.MULTILINE)
    for name in ("order-1", "order-2"):
        assert re.search(rf"^{name} +\d\.\d{{3}}$", out, re.MULTILINE)
    [(cut, full, difference)] = re.findall(r"cut to 4 bytes .* needs (\S+) bits per byte instead of (\S+), ([+-]\S+) ", out)
    assert float(cut) - float(full) == pytest.approx(float(difference), abs=2e-3)
    assert re.search(r"^layer 0 unit 1 head 0 +\d+\.\d% +\d+\.\d of 8$", out, re.MULTILINE)
    assert re.search(r"^worst: \d+\.\d% of codes active", out, re.MULTILINE)
    for path in ("checkpoints/step_00000012", "metrics.jsonl", "plots/loss.png", "plots/codes.png", "samples/step_00000012.txt"):
        assert (run / path).exists()
    sample = (run / "samples" / "step_00000012.txt").read_text()
    assert sample
    assert sample in out


def test_eval_says_what_training_said(vqkit: Callable[..., Said], trained: tuple[Path, str]) -> None:
    run, out = trained
    said = vqkit("eval", run)
    assert said.code == 0
    assert said.out.splitlines()[0] in out.splitlines()
    split = Split(run / "data", "test")
    assert f"{split.num_bytes:,} bytes of {split.num_documents} files" in said.out
    validation = vqkit("eval", run, "--split", "validation").out.splitlines()
    assert re.fullmatch(r"validation: \d\.\d{3} bits per byte", validation[0])
    assert validation[-1] in out.splitlines(), "the use of codes over the validation split"


def test_the_same_seed_writes_the_same_text_as_from_python(
    vqkit: Callable[..., Said], trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained[0]
    words = ("sample", run, "--prompt", "the s", "--num-tokens", "40", "--seed", "3")
    said = vqkit(*words)
    assert said.code == 0
    assert said.err == ""
    assert said.out == vqkit(*words).out == "the s" + package.load(run).generate("the s", 40, seed=3) + "\n"
    assert said.out != vqkit(*words[:-1], "4").out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the s")))
    assert vqkit("sample", run, "--prompt", "-", *words[4:]).out == said.out
    greedy = [vqkit(*words[:-1], seed, "--temperature", "0").out for seed in ("1", "2")]
    assert greedy[0] == greedy[1]
    assert (
        vqkit("sample", run, "--top-k", "1", "--num-tokens", "40").out
        == vqkit("sample", run, "--temperature", "0", "--num-tokens", "40").out
    )
    assert vqkit("sample", run, "--num-tokens", "0").out == "\n"


def test_probabilities_of_what_is_written(vqkit: Callable[..., Said], trained: tuple[Path, str]) -> None:
    words = ("sample", trained[0], "--prompt", "the s", "--num-tokens", "9", "--seed", "3")
    said = vqkit(*words, "--logprobs", "2")
    assert (said.code, said.err) == (0, "")
    steps = list(package.load(trained[0]).steps("the s", 9, logprobs=2, seed=3))
    for line, step in zip(said.out.splitlines(), steps, strict=True):
        assert step.logprobs is not None
        expected = [*step.logprobs.model.tolist(), *step.logprobs.top[0].tolist()]
        assert [float(number) for number in re.findall(r"-?\d+\.\d{3}", line)] == pytest.approx(expected, abs=6e-4)
        data = package.load(trained[0]).tokenizer.decode(step.tokens.tolist())
        assert line.startswith(repr(data.decode()) if data.isascii() else repr(data)[1:])
    assert vqkit(*words, "--logprobs", "-1").code == 2


def test_prompts_in_a_file_are_written_in_turn(vqkit: Callable[..., Said], trained: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("the s\nthe house of\n")
    words = ("--num-tokens", "30", "--seed", "3", "--repetition-penalty", "1.2")
    said = vqkit("sample", trained[0], "--prompts-file", tmp_path / "prompts", *words)
    prompts = ["the s", "the house of"]
    texts = package.load(trained[0]).generate(prompts, 30, seed=3, repetition_penalty=1.2)
    assert (said.code, said.out) == (0, "".join(f"{prompt}{text}\n" for prompt, text in zip(prompts, texts, strict=True)))
    (tmp_path / "prompts").write_text("")
    assert "is empty; must hold at least one line" in vqkit("sample", trained[0], "--prompts-file", tmp_path / "prompts").err
    assert vqkit("sample", trained[0], "--prompts-file", tmp_path / "prompts", "--prompt", "a").code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--temperature -1", "temperature = -1.0"),
        ("--top-k 0", "top_k = 0"),
        ("--top-p 2", "top_p = 2.0"),
        ("--num-tokens -1", "num_tokens = -1"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(vqkit: Callable[..., Said], trained: tuple[Path, str], words: str, message: str) -> None:
    said = vqkit("sample", trained[0], *words.split())
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"vqkit: {message}: must be")


def test_inspect_shows_what_the_run_is(vqkit: Callable[..., Said], trained: tuple[Path, str]) -> None:
    run = trained[0]
    out = vqkit("inspect", run).out
    model = package.load(run).model
    for line in (
        "recipe = text",
        "model.dim = 16",
        "train.steps = 12",
        rf"parameters +{sum(p.numel() for p in model.parameters()):,}",
        r"FLOPs per token, training +[\d,]+",
        r"decoding state, bytes per text +[\d,]+",
        r"layer 0 unit 1 head 0 +\d+\.\d% +\d\.\d of 8 +\d+\.\d%",
        r"step 12, kind validation, bits_per_byte \d.*",
        r"step_00000006: [\d,]+ bytes, whole",
        r"step_00000012: [\d,]+ bytes, whole",
    ):
        assert re.search(rf"^  {line}$", out, re.MULTILINE), line
    assert "model.dim = 16" in vqkit("inspect", run / "checkpoints" / "step_00000006").out


def test_a_finished_run_is_measured_again_and_changed_in_nothing(vqkit: Callable[..., Said], trained: tuple[Path, str], run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix != ".png"}
    said = vqkit("train", "--run", run)
    assert said.code == 0
    assert "after step 12 of 12" in said.out
    assert "trained: 12 steps, 0 of them now" in said.out
    assert re.findall(r"^test: .*$", said.out, re.MULTILINE) == re.findall(r"^test: .*$", trained[1], re.MULTILINE)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_goes_on_from_its_directory_alone(vqkit: Callable[..., Said], trained: tuple[Path, str], run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    said = vqkit("train", "--run", run)
    assert said.code == 0
    assert "after step 6 of 12" in said.out
    assert "trained: 12 steps, 6 of them now" in said.out
    resumed, unbroken = package.load(run).model.state_dict(), package.load(trained[0]).model.state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


def test_another_configuration_is_refused_by_the_names_of_what_differs(vqkit: Callable[..., Said], run: Path, corpus: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = vqkit("train", "text", "--data.path", corpus, "--run", run, *TINY, "--model.heads", "2", "--train.seed", "1")
    assert said.code == 1
    assert said.out == ""
    assert "model.heads: 1 -> 2, train.seed: 0 -> 1" in said.err
    assert said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_is_not_asked_to_end_before_where_it_is(vqkit: Callable[..., Said], run: Path) -> None:
    before = (run / "config.json").read_bytes()
    said = vqkit("train", "--run", run, "--train.steps", 10)
    assert said.code == 1 and f"train.steps = 10: {run} has done 12; must" in said.err
    assert (run / "config.json").read_bytes() == before


def test_eval_reads_no_damaged_data(vqkit: Callable[..., Said], run: Path) -> None:
    path = run / "data" / "test-00000.tokens"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = vqkit("eval", run)
    assert said.code == 1 and f"{path} is damaged" in said.err and not said.out
    assert vqkit("eval", run, "--split", "validation").code == 0


@pytest.mark.parametrize("command", ["sample", "eval", "train --run"])
def test_a_truncated_checkpoint_is_passed_over_with_a_word(vqkit: Callable[..., Said], run: Path, command: str) -> None:
    weights = run / "checkpoints" / "step_00000012" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = vqkit(*command.split(), run)
    assert said.code == 0
    assert re.search(r"note: step_00000012.*model\.safetensors has \d+ bytes, expected \d+", said.err + said.out)
    if command != "train --run":
        assert "using step_00000006" in said.err


def test_a_run_without_a_whole_checkpoint_is_refused(vqkit: Callable[..., Said], run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    for command in ("sample", "eval", "inspect", "train --run"):
        said = vqkit(*command.split(), run)
        assert (said.code, said.out) == (1, "")
        assert re.fullmatch(r"vqkit: .*no whole checkpoint.*manifest\.json is missing.*\n", said.err)


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "", r"corpus\b.*"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "", r"corpus\b.*"),
        (lambda folder: [path.write_text("") for path in folder.iterdir()], "", r"corpus\b.*empty"),
        (
            lambda folder: [path.write_text("ab") for path in folder.iterdir()],
            "",
            r"split of .* has \d+ tokens: one sequence needs data.sequence_len = 32",
        ),
    ],
    ids=["no folder", "no file", "empty files", "too short"],
)
def test_data_that_cannot_be_trained_on(
    vqkit: Callable[..., Said], tmp_path: Path, spoil: Callable[[Path], object], words: str, message: str
) -> None:
    folder, run = tmp_path / "corpus", tmp_path / "run"
    _write_corpus(folder)
    spoil(folder)
    said = vqkit("train", "text", "--data.path", folder, "--run", run, *TINY, *words.split())
    assert (said.code, said.out) == (1, "")
    assert re.search(message, said.err)
    assert said.err.count("\n") == 1
    assert not run.exists()


def test_a_folder_of_something_else_is_not_touched(vqkit: Callable[..., Said], corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    said = vqkit("train", "text", "--data.path", corpus, "--run", tmp_path, *TINY)
    assert said.code == 1
    assert "letter.txt" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_ctrl_c_says_where_the_run_stands(vqkit: Callable[..., Said], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "train", interrupted)
    said = vqkit("train", "--run", run)
    assert (said.code, said.err) == (130, f"vqkit: stopped; {run} goes on from step_00000012: vqkit train --run {run}\n")
    said = vqkit("train", "quickstart", "--run", tmp_path / "new")
    assert said.code == 130
    assert "no checkpoint yet" in said.err
