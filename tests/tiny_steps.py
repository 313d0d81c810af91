"""Training steps of tiny models in all forms, in one process or in several, and what they were like by name."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from vqkit.data import Batch
from vqkit.dist import ProcessGroupReducer
from vqkit.models import TransformerVQ
from vqkit.models.config import ModelConfig
from vqkit.quantizers.config import CodebookConfig
from vqkit.train.config import TrainConfig
from vqkit.train.optimizer import Optimizer
from vqkit.train.state import named_tensors, split_rows
from vqkit.train.step import train_step

VOCAB = 259


def model_config(**codebook) -> ModelConfig:
    return ModelConfig(
        dim=8, key_dim=4, value_dim=8, layers=1, heads=2, codebook_size=6, block_len=4, mem_len=5, codebook=CodebookConfig(**codebook)
    )


_SEQUENCE_DROPOUT = {"sinusoid_dropout": 0.3, "layer_dropout": 0.3}
FORMS = {
    "gated": replace(model_config(decay=0.8), layers=2, **_SEQUENCE_DROPOUT),
    "feed_forward": replace(model_config(decay=0.8), layer="feed_forward", key_heads=1, **_SEQUENCE_DROPOUT),
    "full": replace(model_config(), attention="full", **_SEQUENCE_DROPOUT),
}


def new_model(**codebook) -> TransformerVQ:
    torch.manual_seed(0)
    return TransformerVQ(model_config(**codebook)).double()


def random_batch(rows=4, length=12, seed=0) -> Batch:
    """Two documents a row, which follow those of smaller seeds, and padding at the end of the second row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (rows, length + 1), generator=generator)
    segments = (torch.arange(length) >= torch.randint(2, length, (rows, 1), generator=generator)).long() + 2 * seed
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1 % rows, length - 3 :] = False
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, mask)


def course(form, *, micro_batches=1, segments=True, rank=0, reducer=None, **options):
    """Three steps: losses and norm of each, the model and the state at the end; with a reducer as one of its ranks."""
    torch.manual_seed(0)
    model = TransformerVQ(replace(FORMS[form], **options)).double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    world = 1 if reducer is None else reducer.world_size
    optimizer = Optimizer(model.named_parameters(), TrainConfig(batch_size=4 // world, micro_batches=micro_batches, warmup_steps=0))
    state, found = split_rows(model.initial_state(4), world)[rank], {}
    called = model if reducer is None else DistributedDataParallel(model)
    for step in range(3):
        batch = split_rows(random_batch(seed=step), world)[rank]
        result = train_step(model, optimizer, batch, state, step, segments=segments, reducer=reducer, called=called)
        state = result.state
        found |= named_tensors((*result.losses, result.gradient_norm), f"step {step}")
    after = model.state_dict()
    assert not any(torch.equal(after[name], start[name]) for name in after if name.endswith(("quantizer.sum", "weight")))
    return found | named_tensors(state, "state") | {name: tensor.clone() for name, tensor in after.items()}


def on_rank(rank, world, folder):
    """All forms in one process group, one after the other, the courses written to a file."""
    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    torch.distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=world, timeout=timedelta(seconds=600))
    courses = {form: course(form, micro_batches=2, rank=rank, reducer=ProcessGroupReducer()) for form in FORMS}
    torch.save(courses, Path(folder) / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def assert_same_course(first, *others):
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda words, name=name: f"{name}: {words}")
