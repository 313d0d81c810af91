import pytest
import torch

import golden_arrays
from vqkit.ops.positions import sinusoids


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "sinusoid_embs"))
def test_sinusoids_equal_the_official_table(case_id):
    golden = golden_arrays.load("unit", case_id)
    for case in golden.meta["cases"]:
        table = sinusoids(case["length"], case["width"], case["lam"], start=case["start"], flip=case["flip"], dtype=golden.dtype)
        golden.check(f"{case['key']}/out", table)


def test_a_table_is_a_window_of_a_longer_one():
    whole = sinusoids(30, 8, 50.0)
    assert torch.equal(sinusoids(7, 8, 50.0, start=11), whole[11:18])
    assert torch.equal(sinusoids(7, 8, 50.0, start=11, flip=True), whole[11:18].flip(0))


@pytest.mark.parametrize(
    ("length", "width", "base", "named"), [(4, 3, 10.0, "width"), (4, 0, 10.0, "width"), (-1, 2, 10.0, "length"), (4, 2, 0.0, "base")]
)
def test_bad_arguments_are_named(length, width, base, named):
    with pytest.raises(ValueError, match=f"^{named} = "):
        sinusoids(length, width, base)
