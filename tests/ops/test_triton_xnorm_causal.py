"""What is special to the kernels of causal XNorm; the laws of all kernels are in test_triton.py."""

import pytest
import torch

from sansmax.ops.xnorm import xnorm

kernels = pytest.importorskip(
    "sansmax.ops.xnorm._triton_causal", reason="torch comes without triton on this system"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch=1, heads=2, tokens=10, dim=5, value_dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, dim), (tokens, dim), (tokens, value_dim)
    q, k, v = (torch.randn(batch, heads, *s, generator=generator, dtype=torch.float64) for s in shapes)
    gamma = torch.linspace(-2, 0.5, heads, dtype=torch.float64)
    return [t.to(DEVICE) for t in (q, k, v + v.sign() / 8, gamma)]


def results(leaves, backend, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    out = xnorm(*leaves, causal=True, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weight = weight.half().to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def assert_close(leaves, dtype, error, **options):
    leaves = [t.to(dtype) for t in leaves]
    want = results(leaves, "reference", torch.float64, **options)
    plain = results(leaves, "reference", dtype, **options)
    for got, eager, exact in zip(results(leaves, "triton", dtype, **options), plain, want, strict=True):
        assert got.shape == exact.shape
        assert error(got, exact) < 4 * error(eager, exact) + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("tokens", [3, 4, 5, 9])
def test_borders_of_chunks(tokens, error):
    assert_close(inputs(tokens=tokens), torch.float32, error)


@pytest.mark.parametrize(
    ("sizes", "chunk", "span", "entries"),
    [
        (dict(heads=1, tokens=5, dim=20, value_dim=37), 2, 1, 2048),  # four and two blocks of columns
        (dict(batch=2, heads=3, tokens=5, dim=3), 2, 2, 1024),  # 18 chunks, 4 of them in a program
        (dict(tokens=11, dim=9, value_dim=2), 16, 5, 2**16),
    ],
)
def test_blocks_and_groups(sizes, chunk, span, entries, error, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    monkeypatch.setattr(kernels, "SPAN", span)
    monkeypatch.setattr(kernels, "ENTRIES", entries)
    assert_close(inputs(**sizes), torch.float32, error)


def test_columns_that_cancel(error):
    """A token and its negative leave zeros, exactly, and what comes next has the column to itself."""
    q, k, v, gamma = inputs(tokens=10)
    k[:, :, 1::2] = k[:, :, ::2]
    v[:, :, 1::2] = -v[:, :, ::2]
    leaves = [t.float() for t in (q, k, v, gamma)]
    got = xnorm(*leaves, causal=True, backend="triton")
    want = xnorm(*(t.double() for t in leaves), causal=True, backend="reference")
    assert (got[:, :, 1::2] == 0).all()
    assert error(got[:, :, ::2], want[:, :, ::2]) < 1e-6
    k[:, :, :2], v[:, :, :2] = k[:, :, :2] * 1e18, v[:, :, :2] * 1e18
    k[:, :, 2:], v[:, :, 2:] = k[:, :, 2:] * 1e-18, v[:, :, 2:].abs() * 1e-18
    leaves = [t.float() for t in (q, k, v, gamma)]
    got = xnorm(*leaves, causal=True, eps=1e-40, backend="triton")
    want = xnorm(*(t.double() for t in leaves), causal=True, eps=1e-40, backend="reference")
    assert (got[:, :, 1] == 0).all()
    assert error(got[:, :, 2:], want[:, :, 2:]) < 1e-6


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of the interpreter
def test_gradients_of_large_tokens_around_zeros(error):
    """Tokens without a gradient, whose M is tiny, do not set the scale of the gradients' sum."""
    q, k, v, gamma = inputs()
    k, v = k * 1e25, v * 1e25
    k[:, :, 1], v[:, :, 1], k[:, :, 2], v[:, :, 2] = k[:, :, 0], -v[:, :, 0], 0, 0
    grads = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v, gamma)]
        out = xnorm(*leaves, causal=True, eps=1e-40, backend=backend)
        grads.append(torch.autograd.grad(out[:, :, 3:].square().sum(), leaves[1:3]))
    for want, got in zip(*grads, strict=True):
        assert error(got, want) < 1e-5
        assert error(got[:, :, :3], want[:, :, :3]) < 1e-5


def test_columns_that_nearly_cancel(error):
    """Lengths fall by 1e4 inside a chunk; |M_i|^2 from |M_{i-1}|^2 would keep no digit."""
    q, k, v, gamma = inputs(tokens=10)
    k[:, :, 1::2] = k[:, :, ::2]
    v[:, :, 1::2] = -v[:, :, ::2] * (1 + 2**-13)
    assert_close([q, k, v, gamma], torch.float32, error)


def test_columns_that_are_zero_at_first(error):
    q, k, v, gamma = inputs()
    v[:, :, :6, 1], v[:, :, :3, 2], v[..., 3], q[:, :, 7] = 0, 0, 0, 0
    k[:, :, 0] = 0
    assert_close([q, k, v, gamma], torch.float32, error, eps=3.0)  # some columns are shorter, some longer
    leaves = [t.float() for t in (q, k, v, gamma)]
    got = results(leaves, "triton", torch.float32)
    assert all(t.isfinite().all() for t in got)
    assert (got[0][:, :, :6, 1] == 0).all()


@pytest.mark.parametrize(
    "scales", [(1e18, 1e18, 1e18), (1e-18, 1e-18, 1e-18), (1, 1e30, 1e-30), (1, 3e37, 1e37)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of the interpreter
def test_extremes(dtype, scales, error):
    leaves = [(t * s).to(dtype) for t, s in zip(inputs(), (*scales, 1), strict=True)]
    want = results(leaves, "reference", torch.float64)
    got = results(leaves, "triton", dtype)
    for one, exact in zip(got, want, strict=True):
        assert one.isfinite().all()
        if 1e-33 < exact.abs().max() < 1e33:
            assert error(one, exact) < 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize("sizes", [(1e-4, 1.0), (1.0, 1e-4), (1e-15, 1e15)])
def test_keys_that_grow_or_shrink_inside_a_chunk(sizes, error):
    """M_i found by subtracting later tokens from M would hold none of the early ones."""
    q, k, v, gamma = inputs()
    k = k * torch.tensor(sizes).double().repeat_interleave(2).repeat(3)[:10, None].to(DEVICE)
    assert_close([q, k, v, gamma], torch.float32, error, eps=1e-36)


def test_masked_tokens_at_borders_and_an_image_all_masked(error):
    leaves = inputs(batch=2)
    mask = torch.ones(2, 10, dtype=torch.bool, device=DEVICE)
    mask[0], mask[1, :5], mask[1, 7:] = False, False, False
    got = results(leaves, "triton", torch.float32, mask=mask)
    assert all(t.isfinite().all() for t in got)
    assert (got[0][0] == 0).all()
    assert (got[0][1, :, :5] == 0).all()
    assert_close(leaves, torch.float32, error, mask=mask)


def test_without_gamma_it_is_binorm():
    q, k, v, _ = (t.float() for t in inputs())
    ones = torch.ones(2, device=DEVICE)
    assert torch.equal(*(xnorm(q, k, v, g, causal=True, backend="triton") for g in (None, ones)))


def test_only_the_inputs_are_kept():
    leaves = [t.float().requires_grad_() for t in inputs()]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        xnorm(*leaves, causal=True, backend="triton")
    assert set(kept) == {t.data_ptr() for t in leaves}
