"""Lion as the official code computes it in float64."""

import torch


def round_products(monkeypatch):
    """As XLA compiles Lion in float64 and not in float32: factor * momentum is rounded to bfloat16 before the gradient's share is added."""

    def share(momentum, factor, kept_type):
        return (momentum * float(torch.tensor(factor, dtype=kept_type))).to(kept_type).to(momentum.dtype)

    monkeypatch.setattr("vqkit.train.update_rules._share", share)
