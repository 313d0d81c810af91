"""The feed-forward part of a layer: norm, a wide projection, squared ReLU, a projection back, residual."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vqkit.models.config import ModelConfig
from vqkit.models.dropout import NO_MASKS, PartMasks, drop_elements
from vqkit.models.norm import RMSNorm


class FeedForward(nn.Module):
    """x + W_down relu(W_up norm(x))^2 (So et al. 2021, squared ReLU), as in the official branch `optimized`; no residual dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.dim, affine=config.norm == "affine")
        self.up = nn.Linear(config.dim, config.feed_forward_width, bias=False)
        self.down = nn.Linear(config.feed_forward_width, config.dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, *, masks: PartMasks = NO_MASKS) -> Tensor:
        """x [B, T, D] -> [B, T, D], residual included."""
        added = self.down(F.relu(self.up(self.norm(x))).square())
        return x + drop_elements(added, self.config.layer_dropout, masks.layer)
