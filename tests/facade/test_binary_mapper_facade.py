"""The facade's BinaryMapper beside the peer's: every pair of options, and what is right where the two differ."""

import itertools
from math import log

import pytest
import torch

from facade import strict
from facade.compare import compare
from facade.peer import facade, facade_module, peer
from facade.strict import Array

OPTIONS = {
    "bits": (4, 1),
    "kl_loss_threshold": (log(2), 0.1, 1.0),
    "deterministic_on_eval": (False, True),
    "temperature": (1.0, 0.5),
    "straight_through": (None, True, False),
    "calc_aux_loss": (None, True, False),
    "deterministic": (None, True, False),
    "return_indices": (False, True),
    "reduce_aux_kl_loss": (True, False),
    "input": ("sequence", "image", "vectors", "alone", "empty", "no batch"),
}
CONSTRUCTOR = ("bits", "kl_loss_threshold", "deterministic_on_eval")


def setting(row, seed=0):
    calls = {name: value for name, value in row.items() if name not in (*CONSTRUCTOR, "input") and value is not None}
    return {name: row[name] for name in CONSTRUCTOR}, strict.placed(row, row["bits"], first=False, seed=seed, scale=1.0), calls


DEVIATING = {"temperature=0.5": {"temperature": 0.5}, "no vectors": {"input": "empty"}}
ARRAY = Array("BinaryMapper", OPTIONS, setting, (), DEVIATING)
ARRAYS = (ARRAY,)


@pytest.mark.parametrize("row", ARRAY.rows, ids=range(len(ARRAY.rows)))
def test_a_pair_of_options_is_the_peers(row):
    ARRAY.compared(compare, row).check()


def test_the_parts_are_the_peers():
    made = [package.BinaryMapper(bits=3) for package in (peer, facade)]
    logits, indices = torch.randn(4, 5, 3), torch.randint(0, 8, (4, 5))
    assert torch.equal(*(m.codes for m in made)) and torch.equal(*(m.power_two for m in made))
    modules = peer.binary_mapper, facade_module("binary_mapper")
    torch.testing.assert_close(*(module.binary_entropy(logits) for module in modules))
    for sum_bits in (True, False):
        found = made[1].log_prob(logits, indices=indices, sum_bits=sum_bits)
        if sum_bits:  # the peer's cannot give back the bits of several axes
            torch.testing.assert_close(found, made[0].log_prob(logits, indices=indices))
        else:
            torch.testing.assert_close(found.sum(-1), made[0].log_prob(logits, indices=indices))
        one_hot = torch.nn.functional.one_hot(indices, 8)
        assert torch.equal(made[1].log_prob(logits, one_hot=one_hot, sum_bits=sum_bits), found)


def test_the_gradient_is_that_of_the_chances_at_the_temperature():
    logits = torch.randn(6, 3, requires_grad=True)
    upstream = torch.randn(6, 8)
    ones = torch.sigmoid(logits / 0.25)
    each = [
        torch.stack([ones[:, i] if code[2 - i] else 1 - ones[:, i] for i in range(3)]).prod(0)
        for code in itertools.product((0, 1), repeat=3)
    ]
    expected = torch.autograd.grad((torch.stack(each, dim=-1) * upstream).sum(), logits)[0]
    found = torch.autograd.grad((facade.BinaryMapper(3)(logits, temperature=0.25)[0] * upstream).sum(), logits)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_what_is_wrong_is_named():
    mapper = facade.BinaryMapper(3)
    logits = torch.randn(2, 3)
    for attempt, message in (
        (lambda: mapper(torch.randn(2, 4)), r"^logits has shape \(2, 4\): must be \[\.\.\., 3\]"),
        (lambda: mapper(logits, temperature=0.0), r"^temperature = 0.0"),
        (lambda: mapper.log_prob(logits), r"^indices and one_hot"),
        (lambda: mapper.log_prob(logits, indices=torch.tensor([0, 8])), r"^indices holds 8"),
        (lambda: facade.BinaryMapper(0), r"^bits = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    mapper(logits)[1].add_(5.0)
    assert mapper.eval()(logits)[1].item() == 0.0


def test_logits_that_are_not_finite_and_none_at_all_have_no_loss():
    mapper, logits = facade.BinaryMapper(bits=3, kl_loss_threshold=0.1), 3.0 * torch.randn(4, 3)
    broken = torch.cat([logits, torch.full((1, 3), torch.nan)]).requires_grad_()
    one_hot, indices, loss = mapper(broken, return_indices=True)
    assert indices[-1] == -1 and not one_hot[-1].any()
    torch.testing.assert_close(loss, mapper.calc_aux_loss(logits))
    each = mapper(broken, reduce_aux_kl_loss=False)[1]
    torch.testing.assert_close(each, torch.cat([mapper.calc_aux_loss(logits, False), torch.zeros(1)]))
    (loss + one_hot.sum()).backward()
    assert broken.grad.isfinite().all() and not broken.grad[-1].any()
    assert mapper(torch.zeros(0, 3))[1] == 0
