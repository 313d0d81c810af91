"""environment.json tells what computed which steps."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from tiny_runs import tiny_config, write_texts
from vqkit.train.environment import ENVIRONMENT_FILE, note_environment
from vqkit.train.loop import train


def test_a_run_says_what_computed_it(tmp_path):
    config = tiny_config(write_texts(tmp_path / "texts"))
    config = replace(config, train=replace(config.train, steps=4))
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / ENVIRONMENT_FILE).read_text()
    [entry] = json.loads(before)
    assert (entry["after_step"], entry["torch"], entry["processes"]) == (0, torch.__version__, 1)
    assert entry["threads"] == torch.get_num_threads()
    train(replace(config, train=replace(config.train, steps=6)), tmp_path / "run")
    assert (tmp_path / "run" / ENVIRONMENT_FILE).read_text() == before, "the same machine went on: nothing new to say"


def test_another_machine_is_an_entry_and_what_is_done_again_counts_once(tmp_path):
    def notes() -> list[tuple[int, str]]:
        return [(entry["after_step"], entry["torch"]) for entry in json.loads((tmp_path / ENVIRONMENT_FILE).read_text())]

    for step, version in ((0, "a"), (10, "a"), (20, "b"), (30, "b")):
        note_environment(tmp_path, step, {"torch": version})
    assert notes() == [(0, "a"), (20, "b")]
    note_environment(tmp_path, 15, {"torch": "c"})
    assert notes() == [(0, "a"), (15, "c")]
    note_environment(tmp_path, 15, {"torch": "a"})
    assert notes() == [(0, "a")]


def test_a_damaged_file_is_written_anew(tmp_path):
    for text in ("", "[{]", "3", '[{"step": 1}]'):
        (tmp_path / ENVIRONMENT_FILE).write_text(text)
        note_environment(tmp_path, 7, {"torch": "a"})
        assert json.loads((tmp_path / ENVIRONMENT_FILE).read_text()) == [{"after_step": 7, "torch": "a"}]
