"""Second derivatives are those of the first ones, or they are refused: never are first ones taken for constants.

Those of coding and of the losses of bits stand beside their plain operations in test_coding.py and test_bits.py.
"""

import pytest
import torch
from torch.autograd import gradgradcheck

from vqkit.ops import assignment, estimators
from vqkit.ops.assignment import assignment_cross_entropy, mean_assignment, mean_assignment_cross_entropy, soft_codes
from vqkit.ops.codebook import directions
from vqkit.ops.estimators import directional, rotation_trick, straight_through
from vqkit.ops.losses import diversity_loss, mean_commitment_loss, orthogonality_loss
from vqkit.ops.scores import OwnCodes
from vqkit.ops.vq_attention.api import vq_attention

INDICES = torch.tensor([[0, 3, -1, 2, 4], [1, 1, 0, -1, 3]])


def inputs():
    x, codebook = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 6, 3, dtype=torch.float64)
    return x.requires_grad_(), codebook.requires_grad_()


def of_metric(metric):
    """What looks at all codes, by the names of the passes."""
    options = {"temperature": 0.7, "metric": metric}
    return {
        "soft codes": lambda x, c: soft_codes(x, c, INDICES, **options),
        "reinmax": lambda x, c: soft_codes(x, c, INDICES, estimator="reinmax", **options),
        "cross entropy": lambda x, c: assignment_cross_entropy(x, c, INDICES, **options),
        "mean cross entropy": lambda x, c: mean_assignment_cross_entropy(x, c, INDICES, **options),
        "mean": lambda x, c: mean_assignment(x, c, **options),
        "diversity": lambda x, c: diversity_loss(x, c, INDICES >= 0, **options),
    }


def soften(x, c, estimator):
    """Of codebooks of single vectors."""
    own = OwnCodes(c.unsqueeze(1).expand(2, 5, 6, 3), "cosine")
    vectors = directions(own.arrange(x))
    scores = own.scores(vectors)
    indices = own.arrange(INDICES).unsqueeze(-1)
    return own.soften(own.take(indices), scores, indices, 0.7, estimator)


SOFT = {f"{name}, {metric}": form for metric in ("euclidean", "cosine", "product") for name, form in of_metric(metric).items()}
FUNCTIONS = SOFT | {
    "straight through": lambda x, c: straight_through(x, c[:, :5]),
    "commitment": lambda x, c: mean_commitment_loss(x, c[:, :5], INDICES >= 0, pull=1.0),
    "orthogonality": lambda x, c: orthogonality_loss(c) + 0.0 * x.sum(),
    "own codes": lambda x, c: soften(x, c, "straight_through"),
    "own codes, reinmax": lambda x, c: soften(x, c, "reinmax"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_are_those_of_the_first(name):
    assert gradgradcheck(FUNCTIONS[name], inputs(), atol=1e-6)


@pytest.mark.parametrize("name", ["rotation", "directional"])
def test_those_of_maps_that_are_constants_of_the_gradient_are_those_of_plain_operations(name):
    noise = torch.randn(2, 5, 3, dtype=torch.float64)
    forms = {
        "rotation": (rotation_trick, estimators._rotated),
        "directional": (
            lambda x, code: directional(x, code, sigma2=0.25, noise=noise),
            lambda x, code: estimators._directed(x, code, noise, 0.5),
        ),
    }[name]
    x, codebook = inputs()
    found = []
    for form in forms:
        first = torch.autograd.grad(form(x, codebook[:, :5]).sin().sum(), x, create_graph=True)[0]
        found.append((first, *torch.autograd.grad(first.sin().sum(), (x, codebook), materialize_grads=True)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", of_metric("euclidean"))
@pytest.mark.parametrize("kept", [False, True])
def test_first_derivatives_are_the_same_where_they_are_to_be_differentiated(name, kept, monkeypatch):
    monkeypatch.setattr(assignment, "_KEPT_SCORES", 1 << 20 if kept else 0)
    given = inputs()
    result = FUNCTIONS[f"{name}, euclidean"](*given).square().sum()
    first = torch.autograd.grad(result, given, retain_graph=True)
    for a, b in zip(torch.autograd.grad(result, given, create_graph=True), first, strict=True):
        torch.testing.assert_close(a.detach(), b)
        assert a.requires_grad


@pytest.mark.parametrize("name", SOFT)
def test_a_codebook_that_is_updated_before_the_backward_changes_no_second_derivative(name):
    found = []
    for update in (0.0, 1.0):
        torch.manual_seed(3)
        x, codes = inputs()
        codes = codes.detach()
        result = FUNCTIONS[name](x, codes).sin().sum()
        codes.add_(update)
        first = torch.autograd.grad(result, x, create_graph=True)[0]
        found.append(torch.autograd.grad(first.sin().sum(), x)[0])
    assert torch.equal(*found)


def test_attention_refuses_them():
    q, k, v = (torch.randn(1, 1, 8, 4, requires_grad=True) for _ in range(3))
    codebook, indices = torch.randn(1, 3, 4), torch.zeros(1, 1, 8, dtype=torch.int64)
    output = vq_attention(q, k, v, indices, codebook, block_len=4, mem_len=4).output
    (first,) = torch.autograd.grad(output.sin().sum(), q, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="autograd"):
        first.square().sum().backward()
