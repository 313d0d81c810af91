"""Asked to stop, a run finishes its step, writes a checkpoint and goes on from there; steps whose numbers are not finite are not taken."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tiny_runs import STEPS, differing, tiny_config, with_codebook, write_texts
from vqkit.train.events import Progress, Skipped, Spiked
from vqkit.train.interruption import Interrupted, StopRequests
from vqkit.train.loop import train
from vqkit.train.metrics import read_lines


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(write_texts(tmp_path_factory.mktemp("data") / "texts"))


def at_step(step, action):
    return lambda event: action() if isinstance(event, Progress) and event.step == step else None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_first_and_resumes_bit_for_bit(config, tmp_path, number):
    train(config, tmp_path / "unbroken")
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted) as stop:
        train(config, run_dir, on_event=at_step(8, lambda: os.kill(os.getpid(), number)))
    assert stop.value.signal_number == number
    assert max(path.name for path in (run_dir / "checkpoints").iterdir()) == "step_00000008"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(config, run_dir)
    assert differing(run_dir, tmp_path / "unbroken") == []


def test_a_second_signal_acts_at_once():
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_two_runs_do_not_share_a_directory(config, tmp_path):
    refused = []

    def try_it():
        program = "import sys; from vqkit.train.loop import _alone_in; from pathlib import Path\nwith _alone_in(Path(sys.argv[1])): pass"
        refused.append(subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True, text=True))

    train(config, tmp_path / "run", on_event=at_step(8, try_it))
    assert "is being trained by another process" in refused[0].stderr
    try_it()
    assert refused[1].returncode == 0


def poison(model, step, when):
    """Make one gradient infinite in the backward of step number `when`."""
    count = iter(range(1000))
    model.layers[0].register_full_backward_pre_hook(lambda *_: None)
    parameter = next(p for name, p in model.named_parameters() if name == "logits.bias")
    parameter.register_hook(lambda gradient: gradient * float("inf") if next(count) == when else gradient)


@pytest.fixture
def poisoned(monkeypatch):
    """Training in which step 5, the sixth, has a gradient that is not finite."""
    from vqkit.train import checkpoint

    original = checkpoint.Training.of.__func__

    def of(cls, config, model, processes):
        training = original(cls, config, model, processes)
        poison(training.model, training, 5)
        return training

    monkeypatch.setattr(checkpoint.Training, "of", classmethod(of))


def test_a_step_that_is_not_finite_ends_the_run_and_names_the_place(config, tmp_path, poisoned):
    with pytest.raises(RuntimeError, match=r"step 6: the gradient of logits\.bias is not finite"):
        train(config, tmp_path / "run")
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == "step_00000003"


def test_a_step_that_is_not_finite_can_be_passed_over(config, tmp_path, poisoned):
    events = []
    result = train(replace(config, train=replace(config.train, not_finite="skip")), tmp_path / "run", on_event=events.append)
    assert [event for event in events if isinstance(event, Skipped)] == [Skipped(6, "the gradient of logits.bias")]
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "skipped"] == [6]
    commits = [quantizer.updates.item() for quantizer in result.model.quantizers()]
    assert commits == [STEPS - 1] * len(commits)


def test_what_is_not_finite_in_the_forward_is_found_by_its_layer(config):
    from vqkit.data import Batch
    from vqkit.models import TransformerVQ
    from vqkit.train.diagnosis import where_not_finite

    model = TransformerVQ(with_codebook(config, init="normal").model)
    tokens = torch.randint(3, 259, (2, 8))
    batch = Batch(tokens, tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
    model.layers[0].register_forward_hook(lambda module, inputs, output: output._replace(output=output.output * float("nan")))
    assert where_not_finite(model, batch, model.initial_state(2)) == "the output of layers.0"
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    assert where_not_finite(model, batch, model.initial_state(2)) == "parameter embedding.weight"


def test_a_loss_far_above_the_usual_is_told(config, tmp_path):
    events = []
    steep = replace(config, train=replace(config.train, spike_ratio=1.0001, learning_rate=0.3))
    train(steep, tmp_path / "run", on_event=events.append)
    spikes = [event for event in events if isinstance(event, Spiked)]
    assert spikes
    assert all(event.loss > event.usual for event in spikes)


def test_the_best_checkpoint_is_kept(config, tmp_path, monkeypatch):
    """Measurements that get worse after the third."""
    from vqkit.train import loop

    measured, worse = loop.evaluate, iter([3.0, 2.0, 1.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: replace(measured(*a, **k), nats=next(worse), num_bytes=1))
    run_dir = tmp_path / "run"
    many = replace(config, train=replace(config.train, eval_every=4, checkpoint_every=5, keep_checkpoints=1))
    train(many, run_dir)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_00000012", f"step_{STEPS:08d}"}


def test_tensorboard_has_the_metrics(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config, run_dir, on_event=at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train(config, run_dir)
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [line["step"] for line in lines]
    assert [scalar.value for scalar in scalars] == pytest.approx([line["loss"] for line in lines], rel=1e-6)


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"compile": True}])
def test_other_ways_to_compute_learn_as_well(config, tmp_path, change, monkeypatch):
    """bfloat16 products, and a compiled model, which is traced here by the cheapest backend."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled(module, **options, backend="aot_eager"))
    base = with_codebook(replace(config, train=replace(config.train, steps=8, eval_every=0)), init="normal", dead_code_threshold=0.0)
    plain = train(base, tmp_path / "plain").validation_bits
    other = train(replace(base, train=replace(base.train, **change)), tmp_path / "other").validation_bits
    assert other == pytest.approx(plain, rel=1e-2 if "precision" in change else 1e-4)
