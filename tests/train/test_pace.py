"""A run that is to end in some minutes takes as many steps as fit, decided once, and is otherwise the run of so many steps."""

from dataclasses import replace

import pytest
import torch

from tiny_runs import STEPS, differing, tiny_config, write_texts
from vqkit.train import pace
from vqkit.train.loop import train
from vqkit.train.pace import seconds_per_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(write_texts(tmp_path_factory.mktemp("data") / "texts"))


def in_minutes(config, minutes):
    return replace(config, train=replace(config.train, minutes=minutes))


@pytest.mark.parametrize(("seconds", "minutes", "steps"), [(1.0, 10.0, STEPS), (1.0, 0.2, 12), (1.0, 0.001, 4), (100.0, 20.0, 12)])
def test_steps_are_what_fits(config, tmp_path, monkeypatch, seconds, minutes, steps):
    """At most those asked for, and never fewer than warm-up needs."""
    monkeypatch.setattr(pace, "seconds_per_step", lambda *_: seconds)
    assert pace.paced(in_minutes(config, minutes), tmp_path / "config.json", CPU).train.steps == steps


def test_without_minutes_nothing_is_measured(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "seconds_per_step", lambda *_: 1 / 0)
    assert pace.paced(config, tmp_path / "config.json", CPU) is config


def test_a_paced_run_is_the_run_of_so_many_steps_and_keeps_them(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "seconds_per_step", lambda *_: 1.0)
    paced = in_minutes(config, 0.2)
    assert train(paced, tmp_path / "paced").step == 12
    monkeypatch.setattr(pace, "seconds_per_step", lambda *_: 0.1)
    assert train(paced, tmp_path / "paced").step == 12
    train(replace(config, train=replace(config.train, steps=12)), tmp_path / "plain")
    differ = differing(tmp_path / "paced", tmp_path / "plain")
    assert all(name.endswith(("config.json", "training.json")) for name in differ), differ


def test_measuring_takes_time_and_no_random_numbers(config):
    before = torch.get_rng_state()
    assert seconds_per_step(config, CPU) > 0
    assert torch.equal(torch.get_rng_state(), before)
