"""How many layers of a residual quantizer take part in a step of training: drawn as the peer draws, and equal on all processes."""

from __future__ import annotations

import random
from math import ceil

import torch
from torch import Tensor

from vqkit.dist import default_reducer
from vqkit.quantizers.committed import in_backward
from vqkit.quantizers.config import QuantizeDropout, check_count
from vqkit.quantizers.residual import dropout_depth

SEEDS = 10_000


def is_distributed() -> bool:
    """Whether there is a default process group of several processes, now."""
    return default_reducer().world_size > 1


def round_up_multiple(num: int, mult: int) -> int:
    """The smallest multiple of `mult` that is at least `num`."""
    return ceil(num / mult) * mult


def get_maybe_sync_seed(device: torch.device | str, max_size: int = SEEDS) -> int:
    """A number below `max_size`, or with several processes the sum of theirs. Waits for all processes and for the device."""
    number = torch.randint(0, max_size, (), device=device)
    default_reducer().all_reduce_(number)
    return int(number.item())


class Seeds:
    """Draws a seed a forward: by the global generator of the CPU, or with several processes one that follows from the number of forwards.

    So processes agree without a word; a recomputation has the seed of the forward.
    """

    def __init__(self) -> None:
        self.forwards = 0

    def draw(self) -> int:
        if not is_distributed():
            return int(torch.randint(0, SEEDS, (), device="cpu"))
        if not in_backward():
            self.forwards += 1
        return dropout_depth(QuantizeDropout(), self.forwards, SEEDS)


def check_dropout(quantize_dropout: bool, cutoff_index: int, multiple_of: int, num_quantizers: int) -> bool:
    """Whether layers are dropped. Raises ValueError for numbers that name no layers."""
    check_count("num_quantizers", num_quantizers)
    check_count("quantize_dropout_cutoff_index", cutoff_index, least=0)
    check_count("quantize_dropout_multiple_of", multiple_of)
    drops = bool(quantize_dropout) and num_quantizers > 1
    if drops and cutoff_index >= num_quantizers:
        raise ValueError(f"quantize_dropout_cutoff_index = {cutoff_index}: must be below num_quantizers = {num_quantizers}")
    return drops


def layers_taking_part(seed: int, cutoff_index: int, multiple_of: int, num_quantizers: int) -> int:
    """1 ... num_quantizers."""
    last = random.Random(seed).randrange(cutoff_index, num_quantizers)
    return min(round_up_multiple(last + 1, multiple_of), num_quantizers)


def all_layers(codes: Tensor, num_quantizers: int) -> Tensor:
    """[L, ...] -> [q, ...], zeros for the layers that are missing."""
    missing = num_quantizers - len(codes)
    return codes if missing <= 0 else torch.cat([codes, codes.new_zeros(missing, *codes.shape[1:])])
