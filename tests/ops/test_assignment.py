"""Laws of soft choices: values and gradients of the dense formulas, at any tile size, without ever an N x C matrix."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqkit.ops import assignment, distances
from vqkit.ops.assignment import (
    assignment_cross_entropy,
    mean_assignment,
    mean_assignment_cross_entropy,
    sample_codes,
    sample_indices,
    soft_codes,
)
from vqkit.ops.codebook import gather_codes

METRICS = ("euclidean", "cosine")
SHAPES = [((), ()), ((3,), (3,)), ((2, 3), (3,)), ((2,), ()), ((3,), (2, 3))]


def dense_scores(x, codebook, metric):
    if metric == "cosine":
        return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(codebook, dim=-1).mT
    return -(x.unsqueeze(-2) - codebook.unsqueeze(-3)).square().sum(-1).sqrt()


def dense_sample(x, codebook, indices, temperature, metric, estimator):
    """Algorithm 2 of ReinMax with logits = scores / temperature, or the plain softmax in place of the one-hot."""
    logits = dense_scores(x, codebook, metric) / temperature
    p = logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(indices, codebook.shape[-2]).to(p.dtype)
    if estimator == "reinmax":
        halfway = ((((one_hot + p) / 2).log() - logits).detach() + logits).softmax(-1)
        p = 2 * halfway - p / 2
    return (one_hot + p - p.detach()) @ codebook


def draw(leading=((3,), (3,)), num=13, codes=7, width=4, dtype=torch.float64):
    of_x, of_codes = leading
    x, codebook = torch.randn(*of_x, num, width, dtype=dtype), torch.randn(*of_codes, codes, width, dtype=dtype)
    return x.requires_grad_(), codebook.requires_grad_()


@pytest.fixture(params=[(1, False), (40, True), (1 << 18, True)], ids=lambda p: f"tiles of {p[0]} scores, {p[1] and 'products'}")
def tiles(request, monkeypatch):
    num, by_products = request.param
    monkeypatch.setitem(assignment._SCORES_PER_TILE, "cpu", num)
    monkeypatch.setattr(assignment, "_FEWEST_ROWS_PER_TILE", 1)
    monkeypatch.setitem(assignment._ENTRIES_AT_ONCE, "cpu", num)
    if by_products:
        take_products(monkeypatch)


def take_products(monkeypatch):
    monkeypatch.setattr(distances, "_FEW_DIFFERENCES", 1)
    monkeypatch.setattr(distances, "_FEW_VECTORS", 1)


def assert_same_gradients(found, expected, inputs, **tolerance):
    weight = torch.randn_like(expected)
    of_found, of_expected = (torch.autograd.grad((result * weight).sum(), inputs) for result in (found, expected))
    for a, b in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("leading", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("estimator", ["straight_through", "reinmax"])
def test_samples_are_codes_with_the_gradient_of_the_dense_formula(leading, metric, estimator, tiles):
    x, codebook = draw(leading)
    quantized, indices = sample_codes(x, codebook, temperature=0.7, estimator=estimator, metric=metric)
    assert torch.equal(quantized, gather_codes(codebook, indices)) and indices.shape == quantized.shape[:-1]
    assert_same_gradients(quantized, dense_sample(x, codebook, indices, 0.7, metric, estimator), (x, codebook))


@pytest.mark.parametrize("leading", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_cross_entropy_is_that_of_the_dense_softmax(leading, metric, tiles):
    x, codebook = draw(leading)
    logits = dense_scores(x, codebook, metric) / 0.7
    target = torch.randint(-1, 7, logits.shape[:-1])
    expected = -logits.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (target >= 0)
    found = assignment_cross_entropy(x, codebook, target, temperature=0.7, metric=metric)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(found, expected, (x, codebook))


@pytest.mark.parametrize("leading", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("constant", [None, "x", "codebook"])
def test_the_mean_cross_entropy_is_that_of_the_dense_softmax(leading, metric, constant, tiles):
    x, codebook = draw(leading)
    inputs = [tensor for name, tensor in (("x", x), ("codebook", codebook)) if name != constant]
    x.requires_grad_(constant != "x")
    codebook.requires_grad_(constant != "codebook")
    logits = dense_scores(x, codebook, metric) / 0.7
    target = torch.randint(-1, 7, logits.shape[:-1])
    expected = torch.nn.functional.cross_entropy(logits.movedim(-1, 0).flatten(1).mT, target.flatten(), ignore_index=-1)
    found = mean_assignment_cross_entropy(x, codebook, target, temperature=0.7, metric=metric)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(found, expected, inputs)
    assert mean_assignment_cross_entropy(x, codebook, torch.full_like(target, -1), metric=metric) == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_assignment_is_that_of_the_dense_softmax(metric, masked, tiles):
    x, codebook = draw(((2, 3), (3,)))
    mask = torch.rand(2, 1, 13) < 0.6 if masked else None
    p = (dense_scores(x, codebook, metric) / 0.7).softmax(-1)
    weight = torch.ones(2, 3, 13, 1, dtype=p.dtype) if mask is None else mask.unsqueeze(-1).to(p.dtype).expand(2, 3, 13, 1)
    expected = (p * weight).sum((0, 2)) / weight.sum((0, 2))
    found = mean_assignment(x, codebook, mask, temperature=0.7, metric=metric)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(found, expected, (x, codebook))


@pytest.mark.parametrize("metric", METRICS)
def test_codes_are_drawn_with_the_probabilities_of_the_softmax(metric):
    x, codebook, num = torch.randn(1, 5), torch.randn(6, 5), 20000
    p = (dense_scores(x, codebook, metric) / 0.5).softmax(-1)[0]
    frequency = sample_codes(x.expand(num, 5), codebook, temperature=0.5, metric=metric).indices.bincount(minlength=6) / num
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / num).sqrt() + 1e-4).all()


def test_noise_decides_by_the_cumulated_probabilities_and_is_one_number_a_vector():
    x, codebook = draw(num=500, dtype=torch.float32)
    noise = torch.rand(3, 500)
    noise[:, 0], noise[:, 1] = 0.0, 1.0 - 2.0**-24
    indices = sample_codes(x, codebook, noise=noise).indices
    cumulated = dense_scores(x.double(), codebook.double(), "euclidean").softmax(-1).cumsum(-1)
    lower = torch.nn.functional.pad(cumulated, (1, 0)).gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    upper = cumulated.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    assert (lower <= noise + 1e-6).all() and (noise <= upper + 1e-6).all()
    assert not indices[:, 0].any() and (indices[:, 1] == 6).all()
    assert torch.equal(sample_codes(x, codebook, noise=noise).indices, indices)
    torch.manual_seed(5)
    drawn = sample_codes(x, codebook).indices
    torch.manual_seed(5)
    assert torch.equal(sample_codes(x, codebook, noise=torch.rand(3, 500)).indices, drawn)


def test_no_code_of_probability_zero_is_drawn():
    """Far codes: exp underflows, so that several cumulated probabilities are equal, also at the end."""
    codebook = torch.tensor([[1e4], [0.0], [1e4], [0.1], [1e4]])
    noise = torch.cat([torch.rand(200).double(), torch.tensor([0.0, 1.0 - 1e-12], dtype=torch.float64)])  # the last is 1 in float32
    assert set(sample_codes(torch.zeros(202, 1), codebook, noise=noise).indices.tolist()) == {1, 3}


@pytest.mark.parametrize("leading", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("estimator", ["straight_through", "reinmax"])
def test_soft_codes_are_the_given_codes_with_the_gradient_of_the_dense_formula(leading, metric, estimator, tiles):
    x, codebook = draw(leading)
    shape = dense_scores(x, codebook, metric).shape[:-1]
    indices = torch.randint(7, shape)
    quantized = soft_codes(x, codebook, indices, temperature=0.7, estimator=estimator, metric=metric)
    assert torch.equal(quantized, gather_codes(codebook, indices))
    assert_same_gradients(quantized, dense_sample(x, codebook, indices, 0.7, metric, estimator), (x, codebook))
    none = soft_codes(x, codebook, torch.full(shape, -1), estimator=estimator, metric=metric)
    assert not none.any() and not any(g.any() for g in torch.autograd.grad(none.sum(), (x, codebook)))


@pytest.mark.parametrize("metric", METRICS)
def test_several_codes_are_drawn_one_after_the_other_without_those_before(metric, tiles):
    """The probability of an ordered pair is p_i p_j / (1 - p_i), that of the two largest scores with Gumbel noise."""
    x, codebook, num = torch.randn(1, 5), torch.randn(4, 5), 8000
    p = (dense_scores(x, codebook, metric) / 0.5).softmax(-1)[0].double()
    pair = sample_indices(x.expand(num, 5), codebook, 2, temperature=0.5, metric=metric)
    frequency = (pair[:, 0] * 4 + pair[:, 1]).bincount(minlength=16).reshape(4, 4) / num
    expected = (p[:, None] * p / (1 - p[:, None])).fill_diagonal_(0.0)
    assert not frequency.diagonal().any()
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / num).sqrt() + 1e-4).all()


@pytest.mark.parametrize("leading", SHAPES)
def test_as_many_draws_as_codes_are_a_permutation(leading, tiles):
    x, codebook = draw(leading, dtype=torch.float32)
    x = torch.cat([x, torch.full_like(x[..., :1, :], torch.nan)], dim=-2)
    indices = sample_indices(x, codebook * 100.0, 7, temperature=1e-3)
    shape = dense_scores(x, codebook, "euclidean").shape[:-1]
    assert indices.shape == (*shape, 7)
    assert torch.equal(indices[..., :-1, :].sort(-1).values, torch.arange(7).expand(indices[..., :-1, :].shape))
    assert (indices[..., -1, :] == -1).all()
    noise = torch.rand(*shape, 2)
    assert torch.equal(sample_indices(x, codebook, 2, noise=noise)[..., 0], sample_indices(x, codebook, noise=noise[..., :1]).squeeze(-1))


def test_a_cold_temperature_draws_the_nearest():
    x, codebook = draw()
    nearest = dense_scores(x, codebook, "euclidean").argmax(-1)
    assert torch.equal(sample_codes(x, codebook, temperature=1e-6).indices, nearest)


OPERATIONS = {
    "sample": lambda x, c: sample_codes(x, c, noise=torch.full(x.shape[:-1], 0.3, dtype=x.dtype)).quantized,
    "reinmax": lambda x, c: sample_codes(x, c, estimator="reinmax", noise=torch.full(x.shape[:-1], 0.3, dtype=x.dtype)).quantized,
    "cross entropy": lambda x, c: assignment_cross_entropy(x, c, torch.arange(x.shape[-2]).expand(x.shape[:-1]) % c.shape[-2]),
    "mean": mean_assignment,
    "mean cross entropy": lambda x, c: mean_assignment_cross_entropy(x, c, torch.arange(x.shape[-2]).expand(x.shape[:-1]) % c.shape[-2]),
}


def with_gradients(operation, x, codebook, seed=1):
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    result = operation(x, codebook)
    torch.manual_seed(seed)
    return result.detach(), *torch.autograd.grad((result * torch.randn_like(result)).sum(), (x, codebook))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1000.0, 1.0), (0.0, 1e-12), (0.0, 1e12)])
@pytest.mark.parametrize("by_products", [False, True])
def test_float32_is_accurate_off_centre_and_at_any_scale(name, offset, scale, by_products, monkeypatch):
    """Against the dense arithmetic of the same numbers in float64; at the scale of the data its temperature."""
    if by_products:
        take_products(monkeypatch)
    x, codebook = torch.randn(1, 60, 8) * scale + offset, torch.randn(1, 20, 8) * scale + offset
    operation = {
        "sample": lambda a, b: sample_codes(a, b, temperature=scale, noise=torch.full((1, 60), 0.3, dtype=a.dtype)).quantized,
        "reinmax": lambda a, b: (
            sample_codes(a, b, temperature=scale, estimator="reinmax", noise=torch.full((1, 60), 0.3, dtype=a.dtype)).quantized
        ),
        "cross entropy": lambda a, b: assignment_cross_entropy(a, b, torch.arange(60).unsqueeze(0) % 20, temperature=scale),
        "mean": lambda a, b: mean_assignment(a, b, temperature=scale),
        "mean cross entropy": lambda a, b: mean_assignment_cross_entropy(a, b, torch.arange(60).unsqueeze(0) % 20, temperature=scale),
    }[name]
    x64, codebook64 = x.double(), codebook.double()
    weight = torch.randn_like(operation(x, codebook))

    def gradients(a, b):
        a, b = a.requires_grad_(), b.requires_grad_()
        result = operation(a, b)
        return result.detach(), *torch.autograd.grad((result * weight.to(a.dtype)).sum(), (a, b))

    for found, expected in zip(gradients(x, codebook), gradients(x64, codebook64), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_vector_on_a_code_has_a_finite_gradient(name):
    codebook = torch.randn(1, 9, 4)
    assert all(tensor.isfinite().all() for tensor in with_gradients(OPERATIONS[name], codebook.clone(), codebook))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_not_finite_influences_nothing(name, poison):
    x, codebook = torch.randn(1, 20, 4), torch.randn(1, 9, 4)
    spoiled = torch.cat([x, torch.full((1, 2, 4), poison)], dim=1)
    value, of_x, of_codes = with_gradients(OPERATIONS[name], spoiled, codebook)
    clean, clean_of_x, _ = with_gradients(OPERATIONS[name], x, codebook)
    if name.startswith("mean"):
        torch.testing.assert_close(value, clean)
        torch.testing.assert_close(of_x[:, :20], clean_of_x)
    else:
        assert torch.equal(value[:, :20], clean) and not value[:, 20:].any()
    assert not of_x[:, 20:].any() and of_x.isfinite().all() and of_codes.isfinite().all()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 0, 4), (0, 1, 3, 4), (2, 1, 0, 4)])
def test_empty_inputs(name, shape):
    x, codebook = torch.empty(shape, requires_grad=True), torch.randn(1, 9, 4, requires_grad=True)
    OPERATIONS[name](x, codebook).sum().backward()
    assert x.grad.shape == shape and not codebook.grad.any()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_compute_as_float32_does(name, dtype):
    x, codebook = torch.randn(1, 20, 4).to(dtype), torch.randn(1, 9, 4)
    wide = with_gradients(OPERATIONS[name], x.float(), codebook)
    narrow = with_gradients(OPERATIONS[name], x, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = with_gradients(OPERATIONS[name], x.float(), codebook)
    for a, b, c in zip(wide, narrow, cast, strict=True):
        assert torch.equal(a, c) and a.dtype == c.dtype == torch.float32
        assert torch.equal(a.to(b.dtype), b)
    assert narrow[1].dtype == dtype


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_update_of_the_codebook_between_forward_and_backward_changes_no_gradient(name):
    x, codes = torch.randn(1, 20, 4, requires_grad=True), torch.randn(1, 9, 4)
    result = OPERATIONS[name](x, codes)
    weight = torch.randn_like(result)
    (expected,) = torch.autograd.grad((result * weight).sum(), x, retain_graph=True)
    codes.add_(1.0)
    assert torch.equal(torch.autograd.grad((result * weight).sum(), x)[0], expected)


def test_codebooks_of_single_vectors_are_not_copied_so_autograd_refuses_an_update_before_the_backward():
    x, codes = torch.randn(3, 1, 4, requires_grad=True), torch.randn(3, 9, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        mean_assignment(x, codes)
    assert codes.data_ptr() in kept
    result = mean_assignment(x, codes)
    codes.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.square().sum().backward()


@pytest.mark.parametrize("name", ["cross entropy", "mean", "mean cross entropy", "soft"])
def test_the_product_of_directions_is_their_cosine(name):
    x, codebook = (torch.nn.functional.normalize(tensor.detach(), dim=-1).requires_grad_() for tensor in draw())
    indices = torch.arange(13).expand(3, 13) % 7
    operation = {
        "cross entropy": lambda metric: assignment_cross_entropy(x, codebook, indices, metric=metric),
        "mean": lambda metric: mean_assignment(x, codebook, metric=metric),
        "mean cross entropy": lambda metric: mean_assignment_cross_entropy(x, codebook, indices, metric=metric),
        "soft": lambda metric: soft_codes(x, codebook, indices, metric=metric),
    }[name]
    torch.testing.assert_close(operation("product"), operation("cosine"))
    dense = -(x @ codebook.mT).log_softmax(-1).gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    if name == "cross entropy":
        assert_same_gradients(operation("product"), dense, (x, codebook))


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_compile_to_one_graph(dynamic):
    def run(x, codebook):
        sampled = sample_codes(x, codebook, estimator="reinmax")
        entropy = assignment_cross_entropy(x, codebook, sampled.indices, metric="cosine")
        entropy = entropy + mean_assignment_cross_entropy(x, codebook, sampled.indices)
        return sampled.quantized.sum(-1) + entropy + (mean_assignment(x, codebook).square().sum())

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for num in (13, 17) if dynamic else (13,):
        x, codebook = draw(num=num)
        results = []
        for form in (run, compiled):
            torch.manual_seed(7)
            results.append(with_gradients(form, x, codebook))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


class _Sizes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_matrix_of_vectors_by_codes_is_made_or_kept(name, monkeypatch):
    """Of what autograd keeps, and of all that the passes make, which a dispatch mode sees."""
    monkeypatch.setitem(assignment._SCORES_PER_TILE, "cpu", 1 << 10)
    monkeypatch.setattr(assignment, "_FEWEST_ROWS_PER_TILE", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    num, codes, width = 512, 128, 4
    monkeypatch.setattr(assignment, "_KEPT_SCORES", num * codes - 1)
    x, codebook = torch.randn(1, num, width, requires_grad=True), torch.randn(1, codes, width, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        OPERATIONS[name](x, codebook)
    assert max(kept) <= num * width

    chosen, share, gradient = torch.zeros(1, num, dtype=torch.int64), torch.rand(1, num), torch.randn(1, num, width)
    bodies = {
        "sample": [(assignment._draw, (x, codebook, share.unsqueeze(-1), 1.0, "euclidean"))],
        "reinmax": [(assignment._look_up_backward, (gradient, x, codebook, codebook, chosen, 1.0, "euclidean", True, (True, True, True)))],
        "cross entropy": [
            (assignment._cross_entropy, (x, codebook, chosen, 1.0, "euclidean")),
            (assignment._cross_entropy_backward, (share, x, codebook, chosen, 1.0, "euclidean", (True, True))),
        ],
        "mean cross entropy": [(mean_assignment_cross_entropy, (x, codebook, chosen))],
        "mean": [
            (assignment._mean_softmax, (x, codebook, share, 1.0, "euclidean")),
            (assignment._mean_softmax_backward, (codebook[..., 0], x, codebook, share, 1.0, "euclidean", (True, True))),
        ],
    }[name]
    for form, arguments in bodies:
        with torch.no_grad(), _Sizes() as sizes:
            form(*arguments)
        assert 0 < sizes.largest <= num * (width + 2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_what_the_softmax_keeps_of_few_scores_changes_no_gradient(metric, spread, tiles, monkeypatch):
    """Vectors are `spread` away from a code, so that some pairs, or none, are near."""
    codebook = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    x = codebook.detach()[:, torch.arange(13) % 7] + spread * torch.randn(3, 13, 4, dtype=torch.float64)
    x.requires_grad_()
    weight, found, sizes = torch.randn(3, 7, dtype=torch.float64), [], []
    for limit in (3 * 13 * 7, 3 * 13 * 7 - 1):
        monkeypatch.setattr(assignment, "_KEPT_SCORES", limit)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            mean = mean_assignment(x, codebook, temperature=0.7, metric=metric)
        sizes.append(max(kept))
        for _ in range(2):  # the graph stays
            found.append((mean, *torch.autograd.grad((mean * weight).sum(), (x, codebook), retain_graph=True)))
    assert sizes == [3 * 13 * 7, 3 * 13 * 4]
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b)


def test_nothing_is_kept_where_no_gradient_is_asked_for(monkeypatch):
    asked, softmax = [], assignment._sum_softmax
    monkeypatch.setattr(assignment, "_sum_softmax", lambda *given: asked.append(given[-1]) or softmax(*given))
    x, codebook = draw()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            mean_assignment(x, codebook)
    mean_assignment(x.detach(), codebook.detach())
    assert [kept is None for kept in asked] == [False, True, True]


def test_bad_arguments_are_named():
    x, codebook = draw()
    with pytest.raises(ValueError, match=r"^temperature = 0\.0: must be positive"):
        sample_codes(x, codebook, temperature=0.0)
    with pytest.raises(ValueError, match=r"^estimator = 'best'"):
        sample_codes(x, codebook, estimator="best")
    with pytest.raises(ValueError, match=r"^metric = 'l1'"):
        mean_assignment(x, codebook, metric="l1")
    with pytest.raises(TypeError, match=r"^codebook is torch.int64: must be floating point"):
        mean_assignment(x, codebook.long())
    with pytest.raises(ValueError, match=r"^x has shape \(3, 13, 3\) and codebook \(3, 7, 4\): must be"):
        assignment_cross_entropy(x[..., :3], codebook, torch.zeros(3, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^x has shape \(4,\) and codebook"):
        sample_codes(x[0, 0], codebook)
    with pytest.raises(ValueError, match=r"^noise has shape \(3,\): must be \(3, 13\)"):
        sample_codes(x, codebook, noise=torch.rand(3))
    with pytest.raises(ValueError, match=r"^noise has shape \(3, 13\): must be \(3, 13, 2\), one number a draw"):
        sample_indices(x, codebook, 2, noise=torch.rand(3, 13))
    for num in (0, 8):
        with pytest.raises(ValueError, match=rf"^num = {num}: must be from 1 to 7, the size of the codebook"):
            sample_indices(x, codebook, num)
    with pytest.raises(ValueError, match=r"^indices has shape \(3,\): must be \(3, 13\)"):
        soft_codes(x, codebook, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^estimator = 'best'"):
        soft_codes(x, codebook, torch.zeros(3, 13, dtype=torch.int64), estimator="best")
    with pytest.raises(ValueError, match=r"^indices has shape \(3,\): must be \(3, 13\)"):
        assignment_cross_entropy(x, codebook, torch.zeros(3, dtype=torch.int64))


def test_the_mean_cross_entropy_of_float64_has_gradients_of_float64():
    x, codebook = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    target = torch.randint(0, 5, (7,))
    found = mean_assignment_cross_entropy(x, codebook, target)
    expected = assignment_cross_entropy(x, codebook, target).mean()
    assert_same_gradients(found, expected, (x, codebook), rtol=1e-13, atol=1e-15)


def test_without_gradients_the_mean_cross_entropy_computes_none(monkeypatch):
    asked = []
    function = assignment._cross_entropy_and_gradients
    monkeypatch.setattr(assignment, "_cross_entropy_and_gradients", lambda *given: asked.append(given[6:]) or function(*given))
    x, codebook = torch.randn(7, 4), torch.randn(5, 4, requires_grad=True)
    target = torch.randint(0, 5, (7,))
    expected = mean_assignment_cross_entropy(x, codebook, target)
    ((of_x, of_codes),) = asked
    assert of_x is None and of_codes is not None
    with torch.no_grad():
        torch.testing.assert_close(mean_assignment_cross_entropy(x, codebook, target), expected)
    torch.testing.assert_close(mean_assignment_cross_entropy(x, codebook.detach(), target), expected)
    assert len(asked) == 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["soft", "reinmax", "cross entropy", "mean cross entropy", "mean"])
def test_a_transform_sees_the_gradients_of_autograd(name, metric):
    x, codebook = (tensor.detach() for tensor in draw())
    indices = torch.randint(-1, 7, (3, 13))
    operation = {
        "soft": lambda x, c: soft_codes(x, c, indices, temperature=0.7, metric=metric),
        "reinmax": lambda x, c: soft_codes(x, c, indices, temperature=0.7, metric=metric, estimator="reinmax"),
        "cross entropy": lambda x, c: assignment_cross_entropy(x, c, indices, temperature=0.7, metric=metric),
        "mean cross entropy": lambda x, c: mean_assignment_cross_entropy(x, c, indices, temperature=0.7, metric=metric),
        "mean": lambda x, c: mean_assignment(x, c, temperature=0.7, metric=metric),
    }[name]
    weight = torch.randn_like(operation(x, codebook))
    found = torch.func.grad(lambda *given: (operation(*given) * weight).sum(), argnums=(0, 1))(x, codebook)
    leaves = x.requires_grad_(), codebook.requires_grad_()
    for a, b in zip(found, torch.autograd.grad((operation(*leaves) * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
