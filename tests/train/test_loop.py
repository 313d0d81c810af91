"""The loop: resuming is as if nothing had happened, damage is passed over, and what does not fit is refused before it is touched."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from tiny_runs import STEPS, differing, tiny_config, traces, with_codebook, write_texts
from vqkit.cli.errors import UsageError
from vqkit.cli.train import requested
from vqkit.data import Batch, SequenceSampler, Split
from vqkit.data.events import Checking, Packing
from vqkit.models import TransformerVQ
from vqkit.models.weights import write_manifest
from vqkit.train.checkpoint import Training
from vqkit.train.events import CheckpointSaved, Evaluated, Finished, Progress, Resumed, Started
from vqkit.train.loop import train
from vqkit.train.metrics import read_lines
from vqkit.train.parallel import resolve_device
from vqkit.train.step import train_step


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def config(texts):
    return tiny_config(texts)


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """A finished run with its events; not to be changed."""
    events: list[Any] = []
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    train(config, run_dir, on_event=events.append)
    return run_dir, events


class Stop(Exception):
    pass


def stop_at(kind, step):
    """A listener that ends the run where an event of `kind` tells of `step`."""

    def listen(event):
        if isinstance(event, kind) and event.step == step:
            raise Stop

    return listen


def stopped_run(config, run_dir, kind=CheckpointSaved, step=15):
    with pytest.raises(Stop):
        train(config, run_dir, on_event=stop_at(kind, step))
    return run_dir


def test_events_tell_the_course(config, unbroken, capsys):
    events = unbroken[1]
    assert isinstance(events[0], Packing)
    events = [event for event in events if not isinstance(event, Packing)]
    kinds = [type(event) for event in events]
    assert kinds[0] is Started
    assert kinds[-1] is Finished
    assert [e.step for e in events if isinstance(e, Progress)] == list(range(2, STEPS + 1, 2))
    assert [e.step for e in events if isinstance(e, Evaluated)] == [10, 20, 24]
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == sorted({*range(3, STEPS + 1, 3), 10, 20})  # the best so far, too
    assert events[0].steps == STEPS
    assert events[0].training_bytes > events[0].validation_bytes > 0
    last = [e for e in events if isinstance(e, Progress)][-1]
    assert last.seconds_left == 0
    assert last.tokens_per_second > 0
    assert capsys.readouterr() == ("", "")


def test_metrics_hold_no_clock_and_timings_do(unbroken):
    run_dir, _ = unbroken
    lines = read_lines(run_dir / "metrics.jsonl")
    training = {"step", "kind", "learning_rate", "loss", "bits_per_byte", "commitment", "gradient_norm", "active_codes", "perplexity"}
    validation = {"step", "kind", "bits_per_byte", "active_codes", "perplexity"}
    assert all(set(line) == (training if line["kind"] == "train" else validation) for line in lines)
    assert all(line["session_seconds"] > 0 for line in read_lines(run_dir / "timings.jsonl"))


def test_the_loop_is_its_parts(config, unbroken):
    """Without k-means start: sampler, step and a state that starts anew at each sequence, by hand, give the bits of the loop."""
    run_dir, _ = unbroken
    plain = with_codebook(config, init="normal")
    result = train(plain, run_dir.parent / "plain")
    torch.manual_seed(plain.train.seed)
    training = Training.of(plain, TransformerVQ(plain.model))
    sampler = SequenceSampler(Split(run_dir / "data", "train"), 32, plain.train.batch_size, plain.train.seed)
    for number in range(STEPS // 4):
        sequence, state = sampler.batch(number), training.model.initial_state(plain.train.batch_size)
        for part in range(4):
            batch = Batch(*(field[:, part * 8 : (part + 1) * 8] for field in sequence))
            state = train_step(training.model, training.optimizer, batch, state, 4 * number + part).state
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


def without_checks(events: list[Any]) -> list[Any]:
    return [event for event in events if not isinstance(event, Checking)]


@pytest.mark.parametrize(
    "kind, step", [(CheckpointSaved, 3), (CheckpointSaved, 15), (CheckpointSaved, 24), (Progress, 14), (Evaluated, 20)]
)
def test_resumed_equals_unbroken(config, unbroken, tmp_path, kind, step):
    run_dir = stopped_run(config, tmp_path / "run", kind, step)
    events: list[Any] = []
    result = train(config, run_dir, on_event=events.append)
    resumed = without_checks(events)[0]
    assert isinstance(resumed, Resumed)
    assert (resumed.step, resumed.notes) == (step // 3 * 3, ())
    assert differing(run_dir, unbroken[0]) == []
    assert result.step == STEPS
    assert result.validation_bits == [e for e in unbroken[1] if isinstance(e, Evaluated)][-1].bits


def test_a_run_of_ordinary_attention_resumes_in_the_middle_of_a_sequence(config, tmp_path):
    """Its state grows, and there are no codebooks to tell of; Lion keeps its momentum in bfloat16."""
    full = with_codebook(config, init="normal", dead_code_threshold=0.0)
    full = replace(full, model=replace(full.model, attention="full"), train=replace(full.train, steps=6, micro_batches=2))
    full = replace(full, train=replace(full.train, optimizer="lion", momentum_dtype="bfloat16", learning_rate=1e-3))
    train(full, tmp_path / "unbroken")
    run_dir = stopped_run(full, tmp_path / "run", step=3)
    train(full, run_dir)
    assert differing(run_dir, tmp_path / "unbroken") == []
    assert "active_codes" not in read_lines(run_dir / "metrics.jsonl")[-1]


def tensors_of(run_dir, step, kind="model"):
    start = f"checkpoints/step_{step:08d}/{kind}."
    found = {name.removeprefix(start): value for name, value in traces(run_dir).items() if name.startswith(start)}
    return {name: value for name, value in found.items() if ".pending." not in name}


def test_a_run_starts_from_the_weights_of_another_under_a_new_optimizer(config, unbroken, tmp_path, monkeypatch):
    """With codebooks as they were, whatever of the training is other; at the end come steps at the last rate."""
    source, run_dir = unbroken[0], tmp_path / "run"
    tuned = with_codebook(replace(config, init_from=str(source)), decay=0.5, dead_code_threshold=0.0)
    tuned = replace(tuned, model=replace(tuned.model, layer_dropout=0.0, block_len=4))
    tuned = replace(tuned, train=replace(tuned.train, steps=6, extra_steps=4, keep_checkpoints=9))
    monkeypatch.setattr("vqkit.train.loop.initialize_codebooks_", None)  # there is nothing to start by k-means
    events: list[Any] = []
    train(tuned, run_dir, on_event=events.append)
    assert [type(event) for event in events if not isinstance(event, Packing)][:2] == [Started, CheckpointSaved]
    assert len(tensors_of(run_dir, 0)) > 10
    assert tensors_of(run_dir, 0) == tensors_of(source, STEPS)
    assert not any("optimizer" in name for name in tensors_of(run_dir, 0, "training"))
    rates = [line["learning_rate"] for line in read_lines(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert rates[3:] == [pytest.approx(config.train.learning_rate * config.train.final_ratio)] * 2
    first, firsts = (next(e for e in found if isinstance(e, Progress)) for found in (events, unbroken[1]))
    assert first.bits < 0.9 * firsts.bits


def test_a_run_that_started_from_another_needs_it_no_longer(config, unbroken, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(unbroken[0], source)
    tuned = replace(config, init_from=str(source), train=replace(config.train, steps=5))
    train(tuned, tmp_path / "unbroken")
    run_dir = stopped_run(tuned, tmp_path / "run", Progress, 2)
    shutil.rmtree(source)
    train(tuned, run_dir)
    assert differing(run_dir, tmp_path / "unbroken") == []


def test_weights_of_another_model_are_refused_by_field(config, unbroken, tmp_path):
    other = replace(config, init_from=str(unbroken[0]), model=replace(config.model, mem_len=7, logit_scale=0.5))
    with pytest.raises(ValueError, match=r"model\.mem_len is 6 there and 7 here, model\.logit_scale is 1\.0 there and 0\.5 here"):
        train(other, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(replace(config, init_from=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    _, asked = requested("text", ["--data.path", "x", "--init-from", str(unbroken[0]), "--model.layer-dropout", "0.5"])
    assert (asked.init_from, asked.model) == (str(unbroken[0]), replace(config.model, layer_dropout=0.5))
    with pytest.raises(UsageError, match=r"--init-from: .*nowhere"):
        requested("text", ["--data.path", "x", "--init-from", "nowhere"])


def test_a_finished_run_has_nothing_left_to_do(config, unbroken, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken[0], run_dir)
    events: list[Any] = []
    result = train(config, run_dir, on_event=events.append)
    assert [type(event) for event in without_checks(events)] == [Resumed, Finished]
    assert result.checkpoint == run_dir / "checkpoints" / f"step_{STEPS:08d}"
    assert differing(run_dir, unbroken[0]) == []


def test_a_finished_run_goes_on_with_more_steps(config, unbroken, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken[0], run_dir)
    longer = replace(config, train=replace(config.train, extra_steps=2))
    assert train(longer, run_dir).step == STEPS + 2
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl")][-2:] == [26, 26]


def cut_short(folder):
    path = folder / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return "training.safetensors has"


def without_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


def without_weights(folder):
    (folder / "model.safetensors").unlink()
    return "model.safetensors is missing"


def flip_one_bit(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    return "model.safetensors has another hash"


@pytest.mark.parametrize("damage", [cut_short, without_manifest, without_weights, flip_one_bit])
def test_a_damaged_checkpoint_is_passed_over_and_replaced(config, unbroken, tmp_path, damage):
    run_dir = stopped_run(config, tmp_path / "run")
    words = damage(run_dir / "checkpoints" / "step_00000015")
    events: list[Any] = []
    train(config, run_dir, on_event=events.append)
    resumed = without_checks(events)[0]
    assert resumed.step == 12
    (note,) = resumed.notes
    assert "step_00000015" in note and words in note
    assert differing(run_dir, unbroken[0]) == []


def test_without_any_whole_checkpoint_nothing_is_begun_anew(config, tmp_path):
    run_dir = stopped_run(config, tmp_path / "run")
    for folder in (run_dir / "checkpoints").iterdir():
        cut_short(folder)
    before = traces_or_broken(run_dir)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        train(config, run_dir)
    assert traces_or_broken(run_dir) == before


def traces_or_broken(run_dir):
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_other_circumstances_are_noted(config, tmp_path):
    run_dir = stopped_run(config, tmp_path / "run")
    folder = run_dir / "checkpoints" / "step_00000015"
    values = folder / "training.json"
    values.write_text(values.read_text().replace('"threads": 1', '"threads": 99'))
    write_manifest(folder)
    events: list[Any] = []
    train(config, run_dir, on_event=events.append)
    assert without_checks(events)[0].notes == ("threads was 99, is 1: results agree, but not to the last bit",)


CHANGES = {
    "train.learning_rate: 0.004 -> 0.001": lambda c: replace(c, train=replace(c.train, learning_rate=1e-3)),
    "model.codebook.decay: 0.9 -> 0.5": lambda c: with_codebook(c, decay=0.5),
    "data.sequence_len: 32 -> 16": lambda c: replace(c, data=replace(c.data, sequence_len=16)),
    "recipe: 'tiny' -> 'other'": lambda c: replace(c, recipe="other"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_run_of_another_configuration_is_refused_by_field(config, unbroken, words):
    run_dir, _ = unbroken
    before = traces(run_dir)
    with pytest.raises(ValueError) as error:
        train(CHANGES[words](config), run_dir)
    assert words in str(error.value)
    assert traces(run_dir) == before


def test_data_that_are_not_there_are_said_to_be_so_first(config, unbroken):
    elsewhere = replace(config, data=replace(config.data, path="/nope"))
    with pytest.raises(ValueError, match=r"^data\.path = '/nope': there is no such file or folder; \S*run is a run of '\S+texts'$"):
        train(elsewhere, unbroken[0])


def test_a_directory_that_is_no_run_is_refused_untouched(config, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"love\.txt"):
        train(config, tmp_path / "letters")
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["love.txt"]
    with pytest.raises(ValueError, match="is a file"):
        train(config, tmp_path / "letters" / "love.txt")


def test_bad_data_leave_nothing_that_stands_in_the_way(config, texts, tmp_path):
    run_dir = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError):
        train(replace(config, data=replace(config.data, path=str(tmp_path / "empty"))), run_dir)
    with pytest.raises(Stop):
        train(config, run_dir, on_event=stop_at(Progress, 2))


def test_a_loss_that_is_no_number_ends_the_run_with_its_checkpoints_kept(config, tmp_path):
    wild = replace(config, train=replace(config.train, learning_rate=1e38, clip=None, schedule="constant", warmup_steps=0))
    with pytest.raises(RuntimeError, match=r"train\.learning_rate = 1e\+38"):
        train(wild, tmp_path / "run")
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert torch.isfinite(torch.tensor(line["loss"]))


def test_the_callers_random_numbers_go_on_as_they_would(config, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stopped_run(config, tmp_path / "run", Progress, 2)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_without_validation_split_runs(config, tmp_path):
    bare = replace(config, data=replace(config.data, validation_fraction=0.0), train=replace(config.train, steps=4))
    assert train(bare, tmp_path / "run").validation_bits is None


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda"):
        resolve_device("cuda")
