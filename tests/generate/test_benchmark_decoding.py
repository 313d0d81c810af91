"""The workload of decoding goes on where it stopped, and costs what the place in the text costs."""

import pytest
import torch

from tiny_models import tiny_config
from vqkit.generate.benchmark import TOKENS, decoding_flops, sampling


@pytest.mark.parametrize("attention", ["vq", "full"])
def test_it_samples(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr("vqkit.generate.benchmark.Decoder.read", lambda self, tokens: read.append(tokens) or torch.zeros(2, 11))
    call, tokens, flops = sampling(tiny_config(attention=attention), 9, 2, torch.device("cpu"))
    call()
    call()
    assert tokens == 2 * TOKENS == len(read)
    assert flops == decoding_flops(tiny_config(attention=attention), 9)
    assert torch.stack(read).unique().numel() > 5


def test_ordinary_attention_costs_more_the_more_was_read() -> None:
    quantized, full = tiny_config(), tiny_config(attention="full", relative_positions=False)
    assert decoding_flops(quantized, 10) == decoding_flops(quantized, 1000)
    # Two units, two heads: a score of 4 and a value of 6 entries for each token before.
    assert decoding_flops(full, 11) - decoding_flops(full, 10) == 2 * 2 * 2 * (4 + 6)
