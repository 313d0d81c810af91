"""What the arguments of the peer's VectorQuantize are in parts of vqkit.

`codebook_options` gives what makes a codebook of them, `quantizer_options` what makes the quantizer around it. Arguments that contradict
each other are refused here, by the names that the peer has for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from vqkit.quantizers.config import (
    Affine,
    Assignment,
    Commitment,
    CrossEntropyCommitment,
    DeadCodes,
    DiVeQ,
    Diversity,
    Estimator,
    Gumbel,
    KMeans,
    Loss,
    Orthogonality,
    Softmax,
    StoredEMA,
    check_number,
)


def settled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the peer's VectorQuantize, all of them by name, with those that are None for "as the others say" decided.

    Beside them `has_...`: which losses there are.

    Raises ValueError for what contradicts each other.
    """
    given = dict(arguments)
    directional, bridged = bool(given["directional_reparam"]), given["vq_bridge"] is not None
    soft = bool(given["straight_through"] or given["reinmax"])
    if given["learnable_codebook"] is None:
        given["learnable_codebook"] = directional or bridged
    if given["ema_update"] is None:
        given["ema_update"] = not (given["learnable_codebook"] or directional or bridged)
    if given["rotation_trick"] is None:
        given["rotation_trick"] = not directional and not soft and given["dim"] > 1
    if given["codebook_dim"] is None:
        given["codebook_dim"] = given["dim"]
    given["has_commitment_loss"] = given["commitment_weight"] > 0 and not directional
    given["has_codebook_orthogonal_loss"] = given["orthogonal_reg_weight"] > 0
    given["has_codebook_diversity_loss"] = given["codebook_diversity_loss_weight"] > 0
    _refuse(given, directional, bridged)
    return given


def _refuse(given: Mapping[str, Any], directional: bool, bridged: bool) -> None:
    learnable, cosine, ema = given["learnable_codebook"], given["use_cosine_sim"], given["ema_update"]
    ways = [name for name in ("straight_through", "rotation_trick", "directional_reparam") if given[name]]
    clashes: list[tuple[bool, str]] = [
        (len(ways) > 1, f"{' and '.join(ways)} are True: must be at most one of them, they are gradients for the same place"),
        (
            bool(given["reinmax"]) and given["rotation_trick"],
            "rotation_trick = True: must be False with reinmax, of the same place",
        ),
        (cosine and learnable, "learnable_codebook = True: must be False with use_cosine_sim"),
        (learnable and given["straight_through"], "straight_through = True: must be False with learnable_codebook"),
        (bridged and bool(ema), "ema_update = True: must be False with vq_bridge, which stands between the averages and the codes"),
        (ema and learnable, "ema_update = True: must be False with learnable_codebook, which the optimizer steps"),
        (bridged and not learnable, "learnable_codebook = False: must be True with vq_bridge"),
        (given["affine_param"] and cosine, "affine_param = True: must be False with use_cosine_sim, codes of length 1 have no scale"),
        (
            given["sync_update_v"] > 0 and not learnable,
            f"sync_update_v = {given['sync_update_v']}: must be 0 unless learnable_codebook is True",
        ),
    ]
    for wrong, what in clashes:
        if wrong:
            raise ValueError(what)


def update_rule(
    *, decay: float, eps: float, ema_update: bool, manual_ema_update: bool, learnable_codebook: bool, expires: bool
) -> StoredEMA:
    """How a codebook learns: averages that move where anything asks for them, and codes that follow them unless that is done by hand."""
    follow = bool(ema_update and not manual_ema_update)
    return StoredEMA(decay=decay, eps=eps, follow=follow, count=bool(ema_update or expires), learn=bool(learnable_codebook))


_NEXT_TO_NOTHING = 1e-20
"""What a code counts that shall count nothing."""


class Expiry(DeadCodes):
    """As the peer's: a new code may count less than the threshold, and is then replaced again, unless it is chosen meanwhile."""

    def __post_init__(self) -> None:
        for name, value in (("threshold_ema_dead_code", self.threshold), ("reset_cluster_size", self.reset_count)):
            check_number(name, value)
            if not 0 < cast(float, value) < math.inf:
                raise ValueError(f"{name} = {value}: must be positive and finite where dead codes are replaced")


def codebook_options(settings: Mapping[str, Any], *, kmeans_init: bool, vq_bridge: nn.Module | None) -> dict[str, Any]:
    """Keyword arguments of `vqkit.quantizers.Codebook`, from the attributes of the peer's Codebook, by name."""
    expires = bool(settings["has_dead_code_replacement"]) and settings["threshold_ema_dead_code"] > 0
    names = ("decay", "eps", "ema_update", "manual_ema_update", "learnable_codebook")
    return {
        "metric": "cosine" if settings["use_cosine_sim"] else "euclidean",
        "update": update_rule(**{name: settings[name] for name in names}, expires=expires),
        "init": KMeans(iterations=settings["kmeans_iters"], start="random") if kmeans_init else "uniform",
        "dead_codes": Expiry(settings["threshold_ema_dead_code"], settings["reset_cluster_size"] or _NEXT_TO_NOTHING) if expires else None,
        "transform": vq_bridge,
        "affine": Affine(settings["affine_param_batch_decay"], settings["affine_param_codebook_decay"], current=True)
        if settings["affine_param"]
        else None,
    }


def quantizer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `vqkit.quantizers.VectorQuantize`, but for `table`, from what `settled` gives."""
    return {
        "dim": given["dim"],
        "codebook_size": given["codebook_size"],
        "codebook_dim": given["codebook_dim"],
        "heads": given["heads"],
        "separate_heads": bool(given["separate_codebook_per_head"]),
        "metric": "cosine" if given["use_cosine_sim"] else "euclidean",
        "assignment": _assignment(given),
        "estimator": _estimator(given),
        "losses": _losses(given),
        "layout": "first" if _width_is_first(given) else "last",
        "projection_norm": bool(given["layernorm_after_project_in"]) and given["codebook_dim"] * given["heads"] != given["dim"],
        "masked": "zero" if given["return_zeros_for_masked_padding"] else "input",
        "sync_update": given["sync_update_v"],
    }


def _width_is_first(given: Mapping[str, Any]) -> bool:
    return bool(given["accept_image_fmap"] or given["accept_3d_fmap"] or not given["channel_last"])


def _assignment(given: Mapping[str, Any]) -> Assignment:
    soft: Any = None
    if given["reinmax"]:
        soft = "reinmax"
    elif given["straight_through"] and not given["route_gradients_to_input"]:  # else the gradient of the estimator takes its place
        soft = "straight_through"
    if given["stochastic_sample_codes"]:
        return Gumbel(max(given["sample_codebook_temp"], 0.0), soft)
    return Softmax(1.0, soft) if soft else "nearest"


def _estimator(given: Mapping[str, Any]) -> Estimator:
    if not given["route_gradients_to_input"]:
        return "none"
    if given["rotation_trick"]:
        return "rotation"
    if given["directional_reparam"]:
        return DiVeQ(given["directional_reparam_variance"])
    return "straight_through"


def _losses(given: Mapping[str, Any]) -> tuple[Loss, ...]:
    """Those of weight 1 are learned from, whatever a call weighs them by. The squared error is always the first: some calls return it."""
    commits, by_choice = given["has_commitment_loss"], given["commitment_use_cross_entropy_loss"]
    losses: list[Loss] = [Commitment(float(commits and not by_choice), pull=1.0 if given["learnable_codebook"] else 0.0)]
    if commits and by_choice:
        losses.append(CrossEntropyCommitment(1.0))
    if given["has_codebook_orthogonal_loss"]:
        losses.append(Orthogonality(1.0, bool(given["orthogonal_reg_active_codes_only"]), given["orthogonal_reg_max_codes"]))
    if given["has_codebook_diversity_loss"]:
        scale = given["codebook_diversity_temperature"]
        if not scale > 0:
            raise ValueError(f"codebook_diversity_temperature = {scale}: must be positive")
        losses.append(Diversity(1.0, 1.0 / scale))
    return tuple(losses)


def temperature(assignment: Assignment, given: float | None, own: float) -> float | None:
    """What a call's `sample_codebook_temp` is to `quantize`; None where nothing is drawn."""
    if isinstance(assignment, str):
        return None
    return max(own if given is None else given, 0.0)
