"""The guide for users of vector-quantize-pytorch: its Python runs, and every argument of the classes that have a section has its line."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import vqkit.quantizers
from vqkit.quantizers import (
    FSP,
    FSQ,
    LFQ,
    BinaryMapper,
    EvoLFQ,
    GroupedResidualVQ,
    Hierarchical,
    HierarchicalVQ,
    LatentQuantize,
    Residual,
    ResidualVQ,
    VectorQuantize,
    config,
)

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")

NATIVE = GUIDE.split("\n## On to the quantizers of vqkit\n", 1)[1]
"""What to write in place of the facade."""

CONSTRUCTOR = """
    dim codebook_size codebook_dim heads separate_codebook_per_head decay eps freeze_codebook kmeans_init kmeans_iters sync_kmeans
    use_cosine_sim layernorm_after_project_in threshold_ema_dead_code channel_last accept_image_fmap accept_3d_fmap commitment_weight
    commitment_use_cross_entropy_loss orthogonal_reg_weight orthogonal_reg_active_codes_only orthogonal_reg_max_codes
    codebook_diversity_loss_weight codebook_diversity_temperature stochastic_sample_codes sample_codebook_temp straight_through
    rotation_trick directional_reparam directional_reparam_variance sync_codebook sync_affine_param ema_update vq_bridge
    manual_ema_update learnable_codebook in_place_codebook_optimizer manual_in_place_optimizer_update affine_param
    affine_param_batch_decay affine_param_codebook_decay sync_update_v return_zeros_for_masked_padding route_gradients_to_input
"""
FORWARD = """
    x indices mask lens topk sample_codebook_temp freeze_codebook return_loss_breakdown codebook_transform_fn ema_update_weight
    accum_ema_update ema_update get_codes_from_indices get_output_from_indices codebook update_indices expire_codes_
    update_in_place_optimizer
"""
RESIDUAL = """
    dim num_quantizers codebook_size codebook_dim shared_codebook diveq heads quantize_dropout quantize_dropout_cutoff_index
    quantize_dropout_multiple_of accept_image_fmap implicit_neural_codebook mlp_kwargs beam_size eval_beam_size
    beam_score_quantizer_weights quant_grad_frac return_zeros_for_masked_padding
    x mask indices return_all_codes sample_codebook_temp freeze_codebook beam_size rand_quantize_dropout_fixed_seed
    get_codes_from_indices get_output_from_indices codebooks
"""
GROUPED = """
    dim groups accept_image_fmap
    x indices return_all_codes sample_codebook_temp freeze_codebook mask get_codes_from_indices get_output_from_indices codebooks
"""

FSP_NAMES = """
    levels dim channel_first projection_has_bias act_name quantize_rate need_inv_act vector_norm
    z eps indices_to_codes level_indices_to_indices indices_to_level_indices
"""
BINARY = """
    bits kl_loss_threshold deterministic_on_eval
    logits temperature straight_through calc_aux_loss deterministic return_indices reduce_aux_kl_loss log_prob binary_entropy codes
"""
EVOLUTION = """
    encoder decoder lfq dim codebook_size num_codebooks pop_size mutation_rate tournament_size elitism_count generations
    encode decode_bits init_random_population init_population_from_data uniform_crossover mutate tournament_selection step evolve
    return_best_decoded
"""
HIERARCHICAL = """
    dim codebook_size scales shared_codebook channel_first sync_codebook decay commitment_weight rotation_trick kmeans_init kmeans_iters
    threshold_ema_dead_code stochastic_sample_codes sample_codebook_temp orthogonal_reg_weight orthogonal_reg_max_codes
    orthogonal_reg_active_codes_only quant_resi share_quant_resi nested_dropout nested_dropout_min_levels accept_image_fmap accept_3d_fmap
    x indices mask lens sample_codebook_temp return_cutoff get_output_from_indices get_vq
"""


def section(title: str) -> str:
    return GUIDE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "title, names",
    [
        ("VectorQuantize(...)", CONSTRUCTOR),
        ("quantizer(x, ...)", FORWARD),
        ("ResidualVQ(...)", RESIDUAL),
        ("GroupedResidualVQ(...)", GROUPED),
        ("FSP(...)", FSP_NAMES),
        ("BinaryMapper(...)", BINARY),
        ("EvoLFQ(...)", EVOLUTION),
        ("HierarchicalVQ(...)", HIERARCHICAL),
    ],
)
def test_every_argument_has_its_line(title: str, names: str) -> None:
    found = [name for name, _ in rows(section(title))]
    assert sorted(found) == sorted(names.split())


def test_it_counts_the_arguments() -> None:
    assert len(CONSTRUCTOR.split()) == 44


def test_the_python_of_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 11
    exec("\n".join(blocks), {})
    assert "diversity" in capsys.readouterr().out


def test_what_it_tells_to_write_exists() -> None:
    """Options named as `name=` or alone, and classes with their fields."""
    classes = {name: value for name, value in vars(config).items() if inspect.isclass(value)}
    for name, fields in re.findall(r"\b([A-Z]\w+)\(([^()]*)\)", NATIVE):
        if name in classes:
            assert {f.split("=")[0].strip() for f in fields.split(",") if "=" in f} <= set(inspect.signature(classes[name]).parameters), (
                name
            )
        elif name not in ("ResidualVQ", "GroupedResidualVQ", "VectorQuantize", "ImplicitVQ", "LocalReducer", "Linear"):
            assert hasattr(vqkit.quantizers, name), name
    more = (FSQ, LFQ, LatentQuantize, Residual, FSP, BinaryMapper, EvoLFQ, HierarchicalVQ, Hierarchical)
    kinds = (VectorQuantize, ResidualVQ, GroupedResidualVQ, *more)
    known = {
        p
        for kind in kinds
        for method in (kind.__init__, kind.quantize, getattr(kind, "evolve", kind.encode))
        for p in inspect.signature(method).parameters
    }
    table = "\n".join(here for _, here in rows(NATIVE))
    for name in re.findall(r"`(\w+)=[^`]*`", table):
        assert name in known, name
    for name in re.findall(r"`([a-z]\w*)`", table):
        attributes = {name for kind in kinds for name in dir(kind)} | {"project_in", "project_out"}
        places = (*known, *attributes, *(f for c in classes.values() for f in inspect.signature(c).parameters))
        assert name in places or name in [*CONSTRUCTOR.split(), "reset_cluster_size", "inplace_optimize", "return_all_codes"], name
