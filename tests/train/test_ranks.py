"""Several processes with shares of one batch take the steps of one process with the whole: all forms of the model, in one spawn."""

import pytest
import torch
import torch.multiprocessing as mp

import tiny_steps

WORLD = 2
OWN = ("step", "state.")  # what is of the rows of a process alone, but for the norm


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(tiny_steps.on_rank, args=(WORLD, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("form", tiny_steps.FORMS)
def test_two_ranks_with_two_micro_batches_are_one_batch(form, ranks):
    """Of three blocks a step; codebooks and optimizer step once, from all blocks of all rows; with the masks of whole sequences."""
    whole = tiny_steps.course(form)
    courses = [rank[form] for rank in ranks]
    for name, tensor in whole.items():
        found = [rank_course[name] for rank_course in courses]
        if not name.startswith(OWN) or (name.startswith("step") and name.endswith(".3")):
            assert torch.equal(*found), name
            joined = found[0]
        elif name.startswith("state.masks.sinusoid"):
            joined = found[0]
        else:
            joined = torch.cat(found) if name.startswith("state.") else torch.stack(found).mean(0)
        torch.testing.assert_close(joined, tensor, rtol=1e-9, atol=1e-12, msg=lambda words, name=name: f"{name}: {words}")
