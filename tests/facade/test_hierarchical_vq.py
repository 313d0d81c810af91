"""The facade's HierarchicalVQ beside the peer's: every pair of options, and what is right where the two differ."""

from contextlib import contextmanager

import pytest
import torch

from facade import strict
from facade.compare import compare
from facade.peer import facade, peer
from facade.strict import Array

DIM, CODES = 5, 8
OPTIONS = {
    "axes": (1, 2, 3),
    "scales": ("usual", "one", "equal", "numbers"),
    "shared_codebook": (False, True),
    "codebook_size": (CODES, (8, 6, 4)),
    "channel_first": (True, False),
    "sync_codebook": (None, False),
    "decay": (1.0, 0.99, 0.7),
    "commitment_weight": (1.0, 0.25, 0.0),
    "rotation_trick": (False, True),
    "kmeans_init": (False, True),
    "kmeans_iters": (10, 2),
    "threshold_ema_dead_code": (0, 0.85),
    "orthogonal_reg_weight": (0.0, 0.5),
    "orthogonal_reg_max_codes": (128, None, 4),
    "orthogonal_reg_active_codes_only": (False, True),
    "quant_resi": (0.5, 0.0, -0.25),
    "share_quant_resi": (1, 0, 2),
    "nested_dropout": (0.0, 0.9),
    "nested_dropout_min_levels": (1, 2),
    "stochastic_sample_codes": (False, True),
    "sample_codebook_temp": (0.1, 1.0),
    "indices": (None,),
    "mask": (None, "some"),
    "lens": (None, "some"),
    "call_temperature": (None, 0.5),
    "return_cutoff": (False, True),
}
OF_CALL = ("axes", "indices", "mask", "lens", "call_temperature", "return_cutoff")
SCALES = {
    "usual": {1: (1, 3, 6), 2: (1, (2, 3), (4, 6)), 3: (1, (1, 2, 2), (2, 4, 2))},
    "one": {1: (3,), 2: ((2, 3),), 3: ((1, 2, 2),)},
    "equal": {1: (2, 2, 9), 2: ((1, 2), (1, 2), (4, 6)), 3: (1, 1, (2, 4, 3))},
    "numbers": dict.fromkeys((1, 2, 3), (1, 2, 3)),
}
POSITIONS = {1: (9,), 2: (4, 6), 3: (2, 4, 3)}


def setting(row, seed=0):
    kwargs = {name: value for name, value in row.items() if name not in OF_CALL}
    kwargs |= {"dim": DIM, "scales": SCALES[row["scales"]][row["axes"]]}
    if row["kmeans_init"]:  # so that no code is one vector, where a distance is rounding alone
        kwargs["codebook_size"] = 3 if row["codebook_size"] == CODES else (4, 3, 3)
    kwargs |= {"accept_image_fmap": row["axes"] == 2, "accept_3d_fmap": row["axes"] == 3}
    batch, positions = (40 if row["kmeans_init"] else CODES), POSITIONS[row["axes"]]
    x = strict.draw(batch, *positions, DIM, seed=1 + seed, scale=1.5)
    calls = {"return_cutoff": True} if row["return_cutoff"] else {}
    if row["lens"]:
        calls["lens"] = torch.tensor([9, 4, 7, 9]).repeat(batch // 4)
    if row["call_temperature"]:
        calls["sample_codebook_temp"] = row["call_temperature"]
    if row["mask"]:
        mask = torch.rand(batch, *positions, generator=torch.Generator().manual_seed(2)) < 0.6
        mask[1] = True
        calls["mask"] = mask
    if row["indices"]:
        calls["indices"] = torch.zeros(batch, 3, dtype=torch.int64)
    return kwargs, x.movedim(-1, 1).contiguous() if row["channel_first"] else x, calls


REFUSED = (
    ({"indices": "given"}, lambda row: row["indices"] is not None),
    ({"mask": "some", "lens": "some"}, lambda row: row["mask"] and row["lens"]),
    ({"lens": "some", "axes": 2}, lambda row: row["lens"] and row["axes"] > 1),
    (
        {"shared_codebook": True, "codebook_size": (8, 6, 4)},
        lambda row: row["shared_codebook"] and row["codebook_size"] != CODES,
    ),
    ({"scales": "one", "codebook_size": (8, 6, 4)}, lambda row: row["scales"] == "one" and row["codebook_size"] != CODES),
)
LEARNS = {"shared_codebook": True, "decay": 0.7}
ORTHOGONAL = {"orthogonal_reg_weight": 0.5}
DEVIATING = {
    "shared_codebook & decay=0.99 or 0.7": LEARNS,
    "kmeans_init & shared_codebook": {"kmeans_init": True, "shared_codebook": True},
    "kmeans_init & threshold_ema_dead_code": {"kmeans_init": True, "threshold_ema_dead_code": 30.0},
    "orthogonal_reg_weight & decay=0.99 or 0.7": {**ORTHOGONAL, "decay": 0.7},
    "orthogonal_reg_weight & an optimizer": ORTHOGONAL,
    "orthogonal_reg_weight & orthogonal_reg_active_codes_only & masked": {
        **ORTHOGONAL,
        "orthogonal_reg_active_codes_only": True,
        "lens": "some",
    },
}


@contextmanager
def alike(row):
    """A shared codebook that learns one step, as its first level sees the same codes once; orthogonality in float64, as it is small.

    With the many vectors of k-means small steps of an optimizer, else the convolutions grow without bound.
    """
    options = {"steps": 1} if row["shared_codebook"] and row["decay"] < 1.0 else {}
    options |= {"rate": 1e-3} if row["kmeans_init"] else {}
    with pytest.MonkeyPatch.context() as patch:
        if row["orthogonal_reg_weight"]:
            patch.setattr(torch.Tensor, "float", lambda tensor: tensor if tensor.is_floating_point() else tensor.to(torch.float32))
            options |= {"dtype": torch.float64, "prepare": torch.nn.Module.double}
        yield options


ARRAY = Array("HierarchicalVQ", OPTIONS, setting, REFUSED, DEVIATING, around=alike)
ARRAYS = (ARRAY,)


@pytest.mark.parametrize("row", ARRAY.rows, ids=range(len(ARRAY.rows)))
def test_a_pair_of_options_is_the_peers(row, same_draws):
    ARRAY.compared(compare, row).check()


def test_indices_are_taken_by_neither():
    for package in (peer, facade):
        made = package.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 2))
        with pytest.raises((AssertionError, ValueError)):
            made(torch.randn(2, DIM, 4), indices=torch.zeros(2, 3, dtype=torch.int64))


def test_decoding_is_the_peers():
    made = [
        package.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 2, 4), kmeans_init=False, accept_image_fmap=True)
        for package in (peer, facade)
    ]
    made[1].load_state_dict(made[0].state_dict())
    x = torch.randn(2, DIM, 7, 6)
    found = [m.eval()(x) for m in made]
    for there, here in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(here, there)
    for shape in (None, 8, (7, 6)):
        torch.testing.assert_close(*(m.get_output_from_indices(found[0][1], full_shape=shape) for m in made))
    torch.testing.assert_close(made[1].get_output_from_indices(found[1][1], full_shape=(7, 6)), found[1][0])
    t, mask = torch.randn(2, DIM, 4, 6), torch.rand(2, 4, 6) < 0.5
    for there, here in zip(*(m.pool_residual(t, (2, 3), mask) for m in made), strict=True):
        torch.testing.assert_close(here, there)
    torch.testing.assert_close(*(m.upsample_to_full(t, (9, 7), 1) for m in made))


def test_lengths_are_a_mask():
    vq = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 2), kmeans_init=False).eval()
    x, lens = torch.randn(2, DIM, 6), torch.tensor([6, 3])
    mask = torch.arange(6) < lens.unsqueeze(1)
    for one, other in zip(vq(x, lens=lens)[1], vq(x, mask=mask)[1], strict=True):
        assert torch.equal(one, other)


def test_k_means_starts_at_what_all_levels_see():
    vq = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 4), threshold_ema_dead_code=0)
    x = torch.randn(20, DIM, 8)
    vq(x)
    assert vq.vq._codebook.cluster_size.sum().item() == pytest.approx(20 * 5, rel=0.05)
    with pytest.raises(ValueError, match="k-means"):
        facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 4)).eval()(x)


def test_a_call_of_shared_levels_sees_one_codebook():
    vq = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 3), kmeans_init=False, decay=0.5, threshold_ema_dead_code=0)
    x = torch.randn(6, DIM, 6)
    still = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 3), kmeans_init=False, decay=0.5, threshold_ema_dead_code=0)
    still.load_state_dict(vq.state_dict())
    quantized, indices, _ = vq(x)
    torch.testing.assert_close(still.eval()(x)[0], quantized)
    counts = torch.bincount(torch.cat([grid.flatten() for grid in indices]), minlength=CODES).float()
    torch.testing.assert_close(vq.vq._codebook.cluster_size[0], torch.lerp(counts, still.vq._codebook.cluster_size[0], 0.5))


def test_the_regularisation_is_that_of_the_codes_of_the_call():
    vq = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 3), kmeans_init=False, orthogonal_reg_weight=0.5)
    x, codes = torch.randn(6, DIM, 6), vq.vq.codebook.detach().clone()
    cosines = torch.nn.functional.normalize(codes, dim=-1)
    expected = (cosines @ cosines.T - torch.eye(CODES)).square().mean()
    plain = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 3), kmeans_init=False)
    plain.load_state_dict(vq.state_dict())
    torch.testing.assert_close(vq(x)[2] - plain(x)[2], 0.5 * expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_an_optimizer_moves_the_codes_that_are_regularised(shared):
    options = {"shared_codebook": shared, "kmeans_init": False, "orthogonal_reg_weight": 0.5, "decay": 1.0, "threshold_ema_dead_code": 0}
    vq = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 3), **options)
    x, codes = torch.randn(6, DIM, 6), vq.get_vq(1).codebook.detach().clone()
    vq(x)[2].backward()
    torch.optim.SGD(vq.parameters(), lr=0.5).step()
    moved = vq.get_vq(1).codebook.detach().clone()
    assert not torch.allclose(moved, codes, atol=1e-3)
    vq(x)  # with a decay of 1 averages add nothing
    torch.testing.assert_close(vq.get_vq(1).codebook.detach(), moved, rtol=1e-4, atol=1e-5)


def test_a_cell_without_a_code_gives_zeros_and_wrong_indices_are_named():
    vq = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 2), kmeans_init=False, quant_resi=0.0).eval()
    none = (torch.full((1, 1), -1), torch.full((1, 2), -1))
    assert not vq.get_output_from_indices(none).any()
    for bad, message in (
        ((torch.zeros(1, 1).long(),), r"^indices: must be a tuple of 2"),
        ((torch.zeros(1, 1).long(), torch.full((1, 2), 8)), r"^indices holds 8"),
        ((torch.zeros(1, 1).long(), torch.zeros(1, 3).long()), r"^indices\[1\] is \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            vq.get_output_from_indices(bad)
    x = torch.randn(1, DIM, 4)
    for calls, message in (({"indices": none}, r"^indices are given"), ({"mask": torch.ones(1, 3).bool()}, r"^mask has shape")):
        with pytest.raises(ValueError, match=message):
            vq(x, **calls)


def test_the_codes_that_are_drawn_follow_the_temperature():
    vq = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 4), kmeans_init=False, stochastic_sample_codes=True, decay=0.999)
    x = torch.randn(4, DIM, 8)
    plain = facade.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 4), kmeans_init=False)
    plain.load_state_dict(vq.state_dict())
    assert all(torch.equal(*pair) for pair in zip(vq(x, sample_codebook_temp=0.0)[1], plain.eval()(x)[1], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(vq(x, sample_codebook_temp=9.0)[1], plain(x)[1], strict=True))
