"""The least that a quantizer can be: nearest codes of one codebook behind a layer, for the laws that all quantizers owe to their base."""

from __future__ import annotations

from vqkit.ops.codebook import gather_codes
from vqkit.ops.nearest_code import nearest_index
from vqkit.quantizers.base import Quantized, Quantizer
from vqkit.quantizers.codebook import Codebook
from vqkit.quantizers.committed import Committed


class Plain(Quantizer):
    """x [..., dim]; every vector counts but those that `mask` leaves out."""

    def __init__(self, dim=4, size=8, commit="auto", **choices):
        super().__init__()
        self.dim = dim
        self.table = Codebook(1, size, dim, **choices)
        self.clock = Committed()
        self.commit = commit

    def quantize(self, x, mask=None, *, freeze_codebook=False):
        vectors = x.reshape(1, -1, x.shape[-1])
        kept = None if mask is None else mask.reshape(-1)
        self.table.start_(vectors, kept)
        codes = self.table.codes()
        indices = nearest_index(vectors, codes.detach())
        vectors = vectors.where(indices.unsqueeze(-1) >= 0, 0.0)
        chosen = gather_codes(codes, indices)
        error = (vectors - chosen).square().sum(-1) * (1 if kept is None else kept)
        statistics = self.table.statistics(vectors, indices, mask=kept) if self.training and not freeze_codebook else None
        # reads the codes in the backward, so that a wrong codebook in a recomputation shows in the gradient
        return Quantized(
            (vectors + chosen * vectors.sin()).reshape(x.shape), indices.reshape(x.shape[:-1]), {"fit": error.mean()}, statistics
        )

    def decode(self, indices):
        return gather_codes(self.table.codes(), indices.reshape(1, -1)).reshape(*indices.shape, -1)

    decode_codes = decode

    def codebooks(self):
        return [self.table]

    @property
    def code_shape(self):
        return ()

    @property
    def codebook_sizes(self):
        return (self.table.size,)

    @property
    def loss_weights(self):
        return {"fit": 0.5}
