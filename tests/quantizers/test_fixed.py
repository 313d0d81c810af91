import pytest
import torch

import golden_arrays
from vqkit.ops.nearest_code import nearest_code
from vqkit.quantizers import SimpleVQ


@pytest.mark.parametrize("case_id", golden_arrays.case_ids("unit", "simple_vq_call"))
def test_a_call_equals_the_official_one(case_id):
    golden = golden_arrays.load("unit", case_id)
    for case in golden.meta["cases"]:
        key, config = case["key"], case["config"]
        quantizer = SimpleVQ(1, config["n_code"], config["d_k"], config["pe_lam"], dtype=golden.dtype)
        golden.check(f"{key}/codebook", quantizer.codebook)
        x = golden[f"{key}/in/vecs"].requires_grad_()
        out = quantizer(x, golden[f"{key}/in/loss_mask"].bool())
        golden.check(f"{key}/out/quantized", out.quantized)
        golden.check(f"{key}/out/shortcodes", out.indices)
        golden.check(f"{key}/out/errs2", nearest_code(x, quantizer.codebook).squared_distance)
        zero = torch.zeros((), dtype=golden.dtype)
        commitment = out.commitment if config["is_train"] else zero  # in evaluation the official code has no losses
        golden.check(f"{key}/out/l_commit", commitment)
        golden.check(f"{key}/out/l_codebook", zero)
        ((out.quantized * golden[f"{key}/cotangent"]).sum() + 0.5 * commitment).backward()
        golden.check(f"{key}/grad/vecs", x.grad)


def test_every_head_has_the_same_codes():
    one, many = SimpleVQ(1, 6, 4), SimpleVQ(3, 6, 4)
    assert torch.equal(many.codebook, one.codebook.expand(3, -1, -1))
    x = torch.randn(2, 3, 5, 4)
    out = many(x)
    assert out.statistics is None and torch.equal(out.indices, many.encode(x)) and torch.equal(out.quantized, many.decode(out.indices))
    for head in range(3):
        assert torch.equal(out.indices[:, head : head + 1], one.encode(x[:, head : head + 1]))


def test_there_is_nothing_to_learn_or_store():
    assert not SimpleVQ(2, 6, 4).state_dict() and not list(SimpleVQ(2, 6, 4).parameters())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^heads = 0"):
        SimpleVQ(0, 6, 4)
    with pytest.raises(ValueError, match=r"^dim = 5: must be even"):
        SimpleVQ(1, 6, 5)
    with pytest.raises(ValueError, match=r"^x has shape"):
        SimpleVQ(1, 6, 4)(torch.randn(2, 6, 4))
