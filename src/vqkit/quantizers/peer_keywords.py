"""What is said to those who write an argument of vector-quantize-pytorch here: what to write instead, and where all of them stand."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)
GUIDE = "docs/migration.md"
IN_OUR_WORDS = {
    "separate_codebook_per_head": "separate_heads=True",
    "decay": "update=EMA(decay=...)",
    "eps": "update=EMA(eps=...)",
    "freeze_codebook": "update=Frozen()",
    "kmeans_init": "init=KMeans()",
    "kmeans_iters": "init=KMeans(iterations=...)",
    "sync_kmeans": "nothing, it is always so",
    "use_cosine_sim": 'metric="cosine"',
    "layernorm_after_project_in": "projection_norm=True",
    "threshold_ema_dead_code": "dead_codes=DeadCodes(threshold=...)",
    "channel_last": 'layout="first" for False',
    "accept_image_fmap": 'layout="first"',
    "accept_3d_fmap": 'layout="first"',
    "commitment_weight": "losses=(Commitment(...),)",
    "commitment_use_cross_entropy_loss": "losses=(CrossEntropyCommitment(...),)",
    "orthogonal_reg_weight": "Orthogonality(...) among losses",
    "orthogonal_reg_active_codes_only": "Orthogonality(active_only=True) among losses",
    "orthogonal_reg_max_codes": "Orthogonality(max_codes=...) among losses",
    "codebook_diversity_loss_weight": "Diversity(...) among losses",
    "codebook_diversity_temperature": "Diversity(temperature=1 / ...) among losses",
    "stochastic_sample_codes": "assignment=Gumbel(...)",
    "sample_codebook_temp": "assignment=Gumbel(...)",
    "straight_through": 'estimator="straight_through", or assignment=Softmax()',
    "rotation_trick": 'estimator="rotation", the default',
    "directional_reparam": "estimator=DiVeQ(), update=Gradient(), losses=()",
    "directional_reparam_variance": "estimator=DiVeQ(sigma2=...)",
    "sync_codebook": "nothing, it is always so",
    "sync_affine_param": "nothing, it is always so",
    "ema_update": "update=Frozen() or Gradient() for False",
    "vq_bridge": "transform=module, update=Gradient()",
    "manual_ema_update": 'commit="manual"',
    "learnable_codebook": "update=Gradient()",
    "in_place_codebook_optimizer": "update=OwnOptimizer(...)",
    "manual_in_place_optimizer_update": 'commit="manual"',
    "affine_param": "affine=Affine()",
    "affine_param_batch_decay": "affine=Affine(batch_decay=...)",
    "affine_param_codebook_decay": "affine=Affine(codebook_decay=...)",
    "sync_update_v": "sync_update=...",
    "return_zeros_for_masked_padding": 'masked="input" for False',
    "route_gradients_to_input": 'estimator="none" for False',
    # Those of ResidualVQ, which hands what it does not know to its layers.
    "diveq": "estimator=DiVeQ(sigma2=5e-3), update=Gradient(), losses=()",
    "quantize_dropout_cutoff_index": "quantize_dropout=QuantizeDropout(cutoff_index=...)",
    "quantize_dropout_multiple_of": "quantize_dropout=QuantizeDropout(multiple_of=...)",
    "implicit_neural_codebook": "implicit=MLP(...)",
    "mlp_kwargs": "implicit=MLP(...)",
    "beam_size": "beam=BeamSearch(...)",
    "eval_beam_size": "beam=BeamSearch(eval_size=...)",
    "beam_score_quantizer_weights": "beam=BeamSearch(weights=...)",
    "quant_grad_frac": "gradient_fraction=...",
}
"""Arguments there, and what they are here."""


def knows_the_peer(cls: Class) -> Class:
    """Let the constructor of `cls` refuse a keyword that it has not by a TypeError that says what it is called here."""
    construct: Callable[..., None] = cls.__init__
    known = list(inspect.signature(construct).parameters)[1:]

    @functools.wraps(construct)
    def constructed(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name in IN_OUR_WORDS and name not in known:
                raise TypeError(
                    f"{cls.__name__} has no {name!r}, an argument of vector-quantize-pytorch; here it is {IN_OUR_WORDS[name]}. "
                    f"All of them: {GUIDE}. vqkit.compat.vector_quantize_pytorch takes them as they are"
                )
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise TypeError(f"{cls.__name__} has no argument {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        construct(self, *args, **options)

    cls.__init__ = constructed
    return cls
