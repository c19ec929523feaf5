"""Gradients in closed form: equal to the recorded ones, once and twice, and without hidden copies."""

import pytest
import torch
from torch.autograd import forward_ad

from sansmax import sima, xnorm
from sansmax.ops._split import side_by_side, split_heads


def project(batch=2, tokens=7, heads=3, dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 3 * heads * dim, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), heads


def attend(name, q, k, v, gamma, backend="fused", **options):
    if name == "sima":
        return sima(q, k, v, order="kv", backend=backend, **options)
    return xnorm(q, k, v, gamma, backend=backend, **options)


def gammas(heads):
    return torch.linspace(-1.5, 1.5, heads, dtype=torch.float64).requires_grad_()


each = pytest.mark.parametrize("name", ["sima", "xnorm"])


@each
@pytest.mark.parametrize("eps", [1e-12, 2.0])  # 2: some sums and norms are at their floor, others above
@pytest.mark.parametrize(("batch", "tokens"), [(1, 7), (2, 7), (5, 1), (1, 70)])
def test_first_and_second_gradients(name, eps, batch, tokens, error):
    x, heads = project(batch, tokens)
    gamma = gammas(heads)
    weight = torch.randn(
        batch, heads, tokens, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def gradients(backend, split):
        q, k, v = split(x, heads)
        leaves = (x, gamma) if name == "xnorm" else (x,)
        out = attend(name, q, k, v, gamma, backend, eps=eps)
        first = torch.autograd.grad(out, leaves, weight, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return (
            torch.autograd.grad(attend(name, q, k, v, gamma, backend, eps=eps), leaves, weight),
            first,
            second,
        )

    def plain(x, heads):
        return x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    want = gradients("reference", plain)
    for split in (split_heads, plain):
        for got, exact in zip(gradients("fused", split), want, strict=True):
            for one, other in zip(got, exact, strict=True):
                # The gradient of a single query is 0 but for rounding.
                assert (one - other).abs().max() < 1e-9 * max(1, other.abs().max())


@each
def test_a_part_of_the_inputs_asks_for_gradients(name, error):
    x, heads = project()
    q, k, v = (t.detach().clone().requires_grad_() for t in split_heads(x, heads))
    gamma = gammas(heads)
    want = torch.autograd.grad(attend(name, q, k, v, gamma).square().sum(), (q, k, v))
    for i in range(3):
        parts = [t if i == j else t.detach() for j, t in enumerate((q, k, v))]
        out = attend(name, *parts, gamma.detach())
        (got,) = torch.autograd.grad(out.square().sum(), parts[i], create_graph=True)
        assert error(got.detach(), want[i]) < 1e-12
        assert got.requires_grad


@each
@pytest.mark.parametrize("tokens", [1, 9, 400])
def test_float32(name, tokens, error):
    x, heads = project(1, tokens, dtype=torch.float32, seed=3)
    gamma = gammas(heads)
    weight = torch.randn(1, heads, tokens, 4, generator=torch.Generator().manual_seed(2))
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(
        attend(name, *split_heads(wide, heads), gamma, "reference"), wide, weight.double()
    )
    out = attend(name, *split_heads(x, heads), gamma.float())
    (got,) = torch.autograd.grad(out, x, weight)
    (plain,) = torch.autograd.grad(
        attend(name, *split_heads(x, heads), gamma.float(), "reference"), x, weight
    )
    assert error(got, want) < 4 * error(plain, want) + 1e-6


@each
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of forward mode itself
def test_forward_mode(name, error):
    x, heads = project()
    tangent = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = []
    for backend in ("reference", "fused"):
        with forward_ad.dual_level():
            qkv = split_heads(forward_ad.make_dual(x, tangent), heads)
            found.append(forward_ad.unpack_dual(attend(name, *qkv, gammas(heads), backend)).tangent)
    assert error(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of forward mode itself
def test_split_under_torch_func(transform, error):
    x, heads = project(1, 3)

    def attended(x, split):
        return sima(*split(x, heads)).square().sum()

    def plain(x, heads):
        return x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    got, want = (transform(lambda x, s=s: attended(x, s))(x.detach()) for s in (split_heads, plain))
    assert error(got, want) < 1e-12


def test_gradients_side_by_side_are_the_gradient_of_the_projection():
    x, heads = project()
    q, k, v = split_heads(x, heads)
    grads = side_by_side(q, k, v)
    for i, grad in enumerate(grads):
        grad.fill_(i + 1)
    (got,) = torch.autograd.grad((q, k, v), x, grads)
    assert got.untyped_storage().data_ptr() == grads[0].untyped_storage().data_ptr()
    assert torch.equal(got, torch.tensor([1.0, 2, 3]).double().repeat_interleave(12).expand_as(got))
    # In another order, or one of them apart, they are copied.
    for others in ((grads[1], grads[0], grads[2]), (grads[0], grads[1].clone(), grads[2])):
        q, k, v = split_heads(x, heads)
        (got,) = torch.autograd.grad((q, k, v), x, others)
        assert got.untyped_storage().data_ptr() != grads[0].untyped_storage().data_ptr()
        want = torch.cat([g.transpose(1, 2).flatten(2) for g in others], -1)
        assert torch.equal(got, want)


def test_a_part_that_nothing_used_has_a_gradient_of_zeros():
    x, heads = project()
    q, _, v = split_heads(x, heads)
    (got,) = torch.autograd.grad((q * v).sum(), x)
    assert torch.equal(got[..., 12:24], torch.zeros(2, 7, 12, dtype=torch.float64))
    assert got[..., :12].abs().min() > 0


def test_widths_that_differ_have_gradients_of_their_own():
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 8)
    for grad, t in zip(side_by_side(q, k, v), (q, k, v), strict=True):
        assert grad.shape == t.shape
        assert grad.transpose(1, 2).is_contiguous()
