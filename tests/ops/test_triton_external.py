"""What is special to the kernels of external attention; the laws of all kernels are in test_triton.py."""

import pytest
import torch

from sansmax.ops.external import external

pytest.importorskip("triton", reason="torch comes without triton on this system")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(*leading, tokens=37, dim=19, value_dim=23, rows=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (*leading, tokens, dim), (rows, dim), (rows, value_dim)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes]


def results(leaves, backend, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    out = external(*leaves, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weight = weight.half().to(out)  # the same in every dtype but bfloat16
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def assert_close(leaves, dtype, error, **options):
    leaves = [t.to(dtype) for t in leaves]
    want = results(leaves, "reference", torch.float64, **options)
    plain = results(leaves, "reference", dtype, **options)
    for got, eager, exact in zip(results(leaves, "triton", dtype, **options), plain, want, strict=True):
        assert got.shape == exact.shape
        assert error(got, exact) < 4 * error(eager, exact) + 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("leading", "dtype", "sizes"),
    [
        ((1,), torch.float16, dict(tokens=301, dim=40, value_dim=70, rows=50)),  # channel steps, five parts
        ((2,), torch.float32, dict(tokens=20, dim=40, value_dim=17, rows=130)),  # three chunks of a gradient
        ((3, 11), torch.float32, dict(tokens=5, dim=3)),  # more heads than programs
        ((1,), torch.bfloat16, dict(tokens=65, dim=5, value_dim=3, rows=256)),
        ((2, 3), torch.float32, dict(tokens=1, rows=1)),
    ],
)
def test_sizes(leading, dtype, sizes, error):
    assert_close([t / 2 for t in inputs(*leading, **sizes)], dtype, error)


@pytest.mark.parametrize("eps", [1e-9, 0.3, 1e-40, 0])
def test_eps(eps, error):
    x, memory_k, memory_v = inputs(1, 2, tokens=90)
    assert_close([x * 8, memory_k, memory_v], torch.float32, error, eps=eps)


def test_tokens_that_win_nowhere(error):
    """Row sums down to 1e-100, so that eps decides."""
    x, memory_k, memory_v = inputs(1, tokens=140, dim=4, rows=3)
    leaves = [x * 5, memory_k * 5, memory_v]
    out = external(*leaves)
    assert (out.abs().amax(-1) < 1e-6).double().mean() > 0.5
    assert_close(leaves, torch.float32, error)


@pytest.mark.parametrize("eps", [1e-9, 1e-40, 0])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 6e4),
        (torch.bfloat16, 3e38),
        (torch.float32, 300.0),  # row sums far below float32's smallest number
        (torch.float32, 1e15),
        (torch.float32, 3e38),
        (torch.float32, 1e-30),
    ],
)
def test_extremes(dtype, size, eps, error):
    x, memory_k, memory_v = inputs(1, 2, tokens=70)
    leaves = [(t.clamp(-1, 1) * size).to(dtype) for t in (x, memory_k)] + [memory_v.to(dtype)]
    got = results(leaves, "triton", dtype, eps=eps)
    assert all(t.isfinite().all() for t in got)
    if size == 300:
        assert error(got[0], external(*(t.double() for t in leaves), eps=eps)) < 0.05
    if eps == 0:
        assert (got[0].abs().amax(-1) > 0.01).all()


def test_weights_below_float16(error):
    """Row sums of 1 / 80 beside an eps of 1e6; the gradient of 1000 brings the products back."""
    leaves = [t.half() for t in inputs(1, tokens=400, rows=5, dim=7)]
    exact = [t.double().requires_grad_() for t in leaves]
    leaves = [t.requires_grad_() for t in leaves]
    out = external(*leaves, eps=1e6, backend="triton")
    (got,) = torch.autograd.grad(out, leaves[2], torch.full_like(out, 1000))
    out = external(*exact, eps=1e6, backend="reference")
    (want,) = torch.autograd.grad(out, exact[2], torch.full_like(out, 1000))
    assert error(got, want) < 5e-3


def test_an_image_all_masked(error):
    leaves = [t.float() for t in inputs(2, 3, tokens=100)]
    mask = torch.ones(2, 100, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    mask[1, :70] = False  # a whole part
    got = results(leaves, "triton", torch.float32, mask=mask)
    assert (got[0][0] == 0).all()
    assert (got[1][0] == 0).all()
    assert_close(leaves, torch.float32, error, mask=mask)


def test_only_small_tensors_are_kept():
    leaves = [t.float().requires_grad_() for t in inputs(1, tokens=300, dim=4, value_dim=4, rows=64)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        external(*leaves, backend="triton")
    assert sorted(t.numel() for t in kept.values()) == [2 * 64, 64 * 4, 64 * 4, 300 * 4]


@pytest.mark.parametrize(("sizes", "message"), [(dict(rows=257), "memory rows 257 is above 256")])
def test_refusals(sizes, message):
    with pytest.raises(ValueError, match=message):
        external(*(t.float() for t in inputs(1, **sizes)), backend="triton")


def test_the_choice_is_explained(capsys):
    external(*inputs(1), explain=True)
    assert "sansmax.external: fused, because" in capsys.readouterr().out
