"""The kernels of AFT-conv: grids, kernels, prefix tokens and extremes; test_triton.py has what all share."""

import pytest
import torch

from sansmax.ops.aft import aft_conv
from sansmax.ops.aft.conv import example

pytest.importorskip("triton", reason="torch comes without triton on this system")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = {torch.float16: 6e4, torch.bfloat16: 1e4}
# name -> tokens, kernel sizes, keywords
FORMS = {
    "sequence behind a prefix": (67, (3,), {"prefix_tokens": 18}),
    "causal": (49, (4,), {"causal": True}),
    "causal, many taps": (37, (18,), {"causal": True}),
    "causal, kernel longer than the sequence": (3, (7,), {"causal": True}),
    "grid, upright kernel": (99, (3, 1), {"grid": (9, 11)}),
    "grid behind a prefix": (35, (3, 3), {"grid": (3, 11), "prefix_tokens": 2}),
    "kernel as large as the grid": (35, (9, 9), {"grid": (5, 7)}),
    "kernel larger than the grid": (7, (9, 9), {"grid": (2, 3), "prefix_tokens": 1}),
    "grid, flat kernel": (45, (1, 3), {"grid": (5, 9)}),
    "one row": (37, (3, 3), {"grid": (1, 37)}),
    "one column": (49, (5, 5), {"grid": (49, 1)}),
    "one token": (1, (3, 3), {"grid": (1, 1)}),
    "one tap": (22, (1, 1), {"grid": (2, 11)}),
}
each = pytest.mark.parametrize("form", FORMS)
SOME = ("causal, many taps", "grid behind a prefix")
some = pytest.mark.parametrize("form", SOME)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks along each axis of what the interpreter can afford."""
    if DEVICE == "cpu":
        monkeypatch.setattr("sansmax.ops.aft.conv.triton.BLOCK", 16)


def draw(form, batch=1, heads=1, dim=3, keys=1.0, biases=1.0, dtype=torch.float32, seed=0):
    """q, k, v, w with keys and biases of the given spread, multiples of 1/8: sums are exact."""
    tokens, sizes, options = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, tokens, heads * dim),
        (batch, tokens, heads),
        (batch, tokens, heads * dim),
        (heads, *sizes),
    )
    q, k, v, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    k, w = ((x * spread * 8).round() / 8 for x, spread in ((k, keys), (w, biases)))
    return [x.to(DEVICE, dtype) for x in (q, k, v, w)], options


def results(inputs, options, backend, dtype):
    """The output, and the gradients together: one that is 0 but for rounding is measured by the others."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = aft_conv(*leaves, **options, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return out.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, weight)])


def assert_close(inputs, options, error, out, grads):
    want = results(inputs, options, "reference", torch.float64)
    got = results(inputs, options, "triton", inputs[0].dtype)
    assert error(got[0], want[0]) < out
    assert error(got[1], want[1]) < grads


def parts(gradients, inputs):
    return gradients.split([x.numel() for x in inputs])


@each
def test_grids_and_kernels(form, error):
    several = 2 if form == "grid behind a prefix" else 1
    inputs, options = draw(form, batch=several, heads=several)
    want = results(inputs, options, "reference", torch.float64)
    got = results(inputs, options, "triton", torch.float32)
    assert error(got[0], want[0]) < 1e-6
    assert error(got[1], want[1]) < 2e-6
    for one, other in zip(parts(got[1], inputs), parts(want[1], inputs), strict=True):
        if other.abs().max() > 1e-6:
            assert error(one, other) < 4e-6


@some
@pytest.mark.parametrize(("keys", "biases"), [(30.0, 60.0), (1e4, 1e3)])
def test_extremes(form, keys, biases, error):
    inputs, options = draw(form, keys=keys, biases=biases)
    assert_close(inputs, options, error, 2e-6, 4e-6)


def test_a_large_key_that_the_bias_hides(error):
    """From the tokens around it; to all others it is everything."""
    inputs, options = draw("grid behind a prefix", biases=0.0)
    inputs[1][:, 20], inputs[3][:] = 60, -80
    assert_close(inputs, options, error, 1e-6, 2e-6)


@some
@pytest.mark.parametrize("shared", [1e4, 1e30])
def test_keys_that_share_a_large_number(form, shared, error):
    """Biases that are no multiples of what such keys are rounded to."""
    inputs, options = draw(form)
    inputs[1] += shared
    if shared == 1e30:
        inputs[3] *= 100
        out, gradients = results(inputs, options, "triton", torch.float32)
        assert out.isfinite().all()
        assert gradients.isfinite().all()
        assert out.any()
    else:
        inputs[3] += 0.01 * torch.randn(inputs[3].shape, generator=torch.Generator().manual_seed(3)).to(
            DEVICE
        )
        assert_close(inputs, options, error, 1e-6, 4e-6)


@pytest.mark.parametrize(("form", "dtype"), list(zip(SOME, HALF, strict=True)))
def test_values_that_share_a_large_number(form, dtype, error):
    """The gradients of k and w are differences of values: half precision must not drown them."""
    inputs, options = draw(form, dim=8, dtype=dtype)
    inputs[2] += 100
    want, got = (
        results(inputs, options, backend, dtype)
        for backend, dtype in (("reference", torch.float64), ("triton", dtype))
    )
    assert error(got[0], want[0]) < 0.01
    for i in (1, 3):
        assert error(parts(got[1], inputs)[i], parts(want[1], inputs)[i]) < 0.05


@some
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_value_that_weighs_nothing(form, dtype, error):
    inputs, options = draw(form, dtype=dtype)
    inputs[1][:, 8], inputs[2][:, 8] = -150, 2.0**20
    want, got = (
        results(inputs, options, backend, to)[0]
        for backend, to in (("reference", torch.float64), ("triton", dtype))
    )
    rows = slice(None) if not options.get("causal") else slice(9, None)
    assert error(got[:, rows], want[:, rows]) < (1e-6 if dtype == torch.float32 else 0.02)


@some
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_at_its_limits(form, dtype, error):
    inputs, options = draw(form, dtype=dtype)
    largest = HALF[dtype]
    q, k, v, w = inputs
    k[:, 5], v[:, ::3], q[:, ::2], w[..., 1] = largest, -largest, -largest, -largest
    out, gradients = results(inputs, options, "triton", dtype)
    want, _ = results(inputs, options, "reference", torch.float64)
    assert error(out, want) < 2 * torch.finfo(dtype).eps
    assert gradients.isfinite().all()


def test_small_weights_of_large_values_in_float16(error):
    """Weights below what float16 holds."""
    inputs, options = draw("one row", dtype=torch.float16)
    inputs[1][:], inputs[2][:] = -20, 6e4
    inputs[1][:, 3], inputs[2][:, 3] = 0, 0
    out, _ = results(inputs, options, "triton", torch.float16)
    want, _ = results(inputs, options, "reference", torch.float64)
    assert error(out, want) < 2e-3


def test_a_future_key_changes_no_earlier_row(error):
    inputs, options = draw("causal, many taps")
    want = results(inputs, options, "triton", torch.float32)[0]
    inputs[1][:, 20:23], inputs[1][:, 34:], inputs[2][:, 34:] = 300, 1e4, 1e30
    got = results(inputs, options, "triton", torch.float32)[0]
    assert error(got[:, :20], want[:, :20]) < 1e-6


@some
def test_masked_tokens_are_not_there(form, error):
    """An image without tokens, whole blocks without tokens, first rows without keys, NaN in all of them."""
    inputs, options = draw(form, batch=2)
    mask = torch.ones(2, inputs[0].shape[1], dtype=torch.bool, device=DEVICE)
    mask[0], mask[1, :19], mask[1, 22:30:2] = False, False, False
    options = options | {"mask": mask}
    inputs[0][~mask] = 0
    want = results(inputs, options, "reference", torch.float64)
    for x in inputs[:3]:
        x[~mask] = torch.nan
    got = results(inputs, options, "triton", torch.float32)
    assert (got[0][0] == 0).all()
    assert error(got[0], want[0]) < 1e-6
    for one, other in zip(parts(got[1], inputs)[1:], parts(want[1], inputs)[1:], strict=True):
        assert error(one, other) < 2e-6


def test_views_of_one_projection_and_a_float32_kernel(error):
    dtype = torch.bfloat16
    inputs, options = draw("kernel larger than the grid", heads=2)
    q, k, v = torch.cat(inputs[:3], -1).to(dtype).split([6, 2, 6], -1)
    w = inputs[3].mT.contiguous().mT.requires_grad_()
    out = aft_conv(q, k, v, w, **options, backend="triton")
    exact = [x.detach().double() for x in (q, k, v, w)]
    exact[3].requires_grad_()
    want = aft_conv(*exact, **options, backend="reference")
    assert out.dtype == dtype
    assert error(out.detach(), want.detach()) < 4 * torch.finfo(dtype).eps
    grad, expected = (torch.autograd.grad(y.sum(), x)[0] for y, x in ((out, w), (want, exact[3])))
    assert grad.dtype == torch.float32
    assert error(grad, expected) < 8 * torch.finfo(dtype).eps


def test_gradients_of_the_kernel_in_parts(error, monkeypatch):
    """One program for all blocks of all images, and one for each."""
    inputs, options = draw("causal, many taps", batch=2)
    got = []
    for waves in (0, 1000):
        monkeypatch.setattr("sansmax.ops._triton.WAVES", waves)
        got.append(results(inputs, options, "triton", torch.float32)[1])
    assert error(got[0], got[1]) < 1e-6


def test_pairs_left_out_by_the_kernel(error):
    inputs, options = draw("grid behind a prefix")
    inputs[3][:, 1:3], inputs[3][0, 0, 0] = -torch.inf, -torch.inf
    assert_close(inputs, options, error, 1e-6, 2e-6)


def test_head_widths_and_what_is_refused(error):
    for dim in (1, 33):
        inputs, options = draw("kernel larger than the grid", dim=dim)
        assert_close(inputs, options, error, 1e-6, 2e-6)
    arguments, options = example(heads=1, dim=129, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match="head width 129 is above 128, the most that the kernel serves"):
        aft_conv(*arguments, **options, backend="triton")


def test_nothing_is_kept_for_gradients_that_nobody_wants():
    inputs, options = draw("one tap")
    with torch.no_grad():
        assert aft_conv(*inputs, **options, backend="triton").shape == inputs[0].shape
