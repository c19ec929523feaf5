"""The kernels of AFT where exponents leave every range; what holds for all kernels is in test_triton.py."""

import pytest
import torch

from sansmax.ops.aft import aft_full, aft_local, aft_simple

pytest.importorskip("triton", reason="torch comes without triton on this system")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = {torch.float16: 6e4, torch.bfloat16: 1e4}
# Three blocks: the interpreter takes minutes for blocks of 64 that are summed key by key.
TOKENS = 150 if DEVICE == "cuda" else 36
# name -> (function, whether it takes a bias)
FORMS = {
    "simple": (aft_simple, False),
    "full": (aft_full, True),
    "local": (lambda *inputs, **options: aft_local(*inputs, 4, **options), True),
    "local, the diagonal alone": (lambda *inputs, **options: aft_local(*inputs, 1, **options), True),
    "local, blocks apart": (lambda *inputs, **options: aft_local(*inputs, 18, **options), True),
    "local, longer than the sequence": (
        lambda *inputs, **options: aft_local(*inputs, 10**6, **options),
        True,
    ),
    "local, without a window": (lambda *inputs, **options: aft_local(*inputs, 0, **options), True),
}
each = pytest.mark.parametrize("name", FORMS)
some = pytest.mark.parametrize("name", ["simple", "full", "local, blocks apart"])
both = pytest.mark.parametrize("causal", [False, True])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr("sansmax.ops.aft._triton.BLOCK", 16)


def draw(name, tokens=TOKENS, channels=3, batch=1, keys=1.0, biases=1.0, dtype=torch.float32, seed=0):
    """q, k, v (and w) with keys and biases of the given spread, multiples of 1/8 so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    inputs = list(torch.randn(3, batch, tokens, channels, generator=generator, dtype=torch.float64))
    inputs[1] = (inputs[1] * keys * 8).round() / 8
    if FORMS[name][1]:
        w = torch.randn(tokens, tokens, generator=generator, dtype=torch.float64)
        inputs.append((w * biases * 8).round() / 8)
    return [x.to(DEVICE, dtype) for x in inputs]


def results(name, inputs, backend, dtype, **options):
    """The output, and the gradients together: one that is 0 but for rounding is measured by the others."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = FORMS[name][0](*leaves, **options, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return out.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, weight)])


def assert_close(name, inputs, error, out, grads, **options):
    want = results(name, inputs, "reference", torch.float64, **options)
    got = results(name, inputs, "triton", inputs[0].dtype, **options)
    assert error(got[0], want[0]) < out
    assert error(got[1], want[1]) < grads


@some
@pytest.mark.parametrize(("causal", "keys", "biases"), [(False, 30.0, 60.0), (True, 1e4, 1e3)])
def test_extremes(name, causal, keys, biases, error):
    inputs = draw(name, keys=keys, biases=biases)
    assert_close(name, inputs, error, 2e-6, 4e-6, causal=causal)


@some
@both
def test_keys_that_share_a_large_number(name, causal, error):
    inputs = draw(name)
    inputs[1] += 1e4
    assert_close(name, inputs, error, 1e-6, 4e-6, causal=causal)


@some
@both
def test_values_that_share_a_large_number(name, causal, error):
    """The gradients of k and w are differences of values: bfloat16 must not drown them."""
    inputs = draw(name, channels=16, dtype=torch.bfloat16)
    inputs[2] += 100
    want = results(name, inputs, "reference", torch.float64, causal=causal)[1]
    got = results(name, inputs, "triton", torch.bfloat16, causal=causal)[1]
    size = inputs[0].numel()
    assert error(got[size : 2 * size], want[size : 2 * size]) < 0.1
    if FORMS[name][1] and want[3 * size :].any():
        assert error(got[3 * size :], want[3 * size :]) < 0.1


@some
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_value_that_weighs_nothing(name, causal, dtype, error):
    """It is in no mean, so it may not coarsen the others; causal, it may be of the future."""
    inputs = draw(name, dtype=dtype)
    inputs[1][:, 8], inputs[2][:, 8] = -150, 2.0**20
    out = results(name, inputs, "triton", dtype, causal=causal)[0]
    want = results(name, inputs, "reference", torch.float64, causal=causal)[0]
    assert error(out, want) < (1e-6 if dtype == torch.float32 else 0.02)


@some
@both
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_at_its_limits(name, causal, dtype, error):
    inputs = draw(name, dtype=dtype)
    largest = HALF[dtype]
    inputs[1][:, 7::13], inputs[2][:, ::3], inputs[0][:, ::2] = largest, -largest, -largest
    out, grads = results(name, inputs, "triton", dtype, causal=causal)
    want, _ = results(name, inputs, "reference", torch.float64, causal=causal)
    assert error(out, want) < 2 * torch.finfo(dtype).eps
    assert grads.isfinite().all()


@some
def test_a_future_key_changes_no_earlier_row(name, error):
    inputs = draw(name)
    want = results(name, inputs, "triton", torch.float32, causal=True)[0]
    inputs[1][:, 20:23], inputs[1][:, 35:] = 300, 1e4
    got = results(name, inputs, "triton", torch.float32, causal=True)[0]
    assert error(got[:, :20], want[:, :20]) < 1e-6


@some
@both
def test_nothing_is_kept(name, causal, error):
    """An image without tokens, whole blocks without tokens, and first rows without keys."""
    inputs = draw(name, batch=2)
    mask = torch.ones(2, TOKENS, dtype=torch.bool, device=DEVICE)
    mask[0], mask[1, :18], mask[1, 21:] = False, False, False
    assert_close(name, inputs, error, 1e-6, 2e-6, causal=causal, mask=mask)


def test_pairs_left_out_by_the_bias(error):
    inputs = draw("full", tokens=31, keys=30.0)
    inputs[3][:, 3], inputs[3][5], inputs[3][20, :18] = -torch.inf, -torch.inf, -torch.inf
    assert_close("full", inputs, error, 1e-6, 4e-6)


@both
@pytest.mark.parametrize("window", [None, 9])
def test_factors_and_a_bias_of_more_positions(window, causal, error):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 70, 5, generator=generator).to(DEVICE)
    factors = torch.randn(2, 90, 4, generator=generator).to(DEVICE)

    def gradients(dtype, backend):
        u, p = (factor.to(dtype).requires_grad_() for factor in factors)
        inputs = (q.to(dtype), k.to(dtype), v.to(dtype), (u, p))
        options = {"causal": causal, "backend": backend}
        out = aft_local(*inputs, window, **options) if window else aft_full(*inputs, **options)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (u, p))

    exact = gradients(torch.float64, "reference")
    for got, want in zip(gradients(torch.float32, "triton"), exact, strict=True):
        assert error(got, want) < 2e-6
    long = torch.zeros(1, 8193, 1, device=DEVICE)
    with pytest.raises(ValueError, match="length of a bias in factors 8193 is above 8192"):
        aft_full(long, long, long, (long[0], long[0]), backend="triton")


@both
@each
def test_windows_and_forms(name, causal, error):
    assert_close(name, draw(name), error, 1e-6, 2e-6, causal=causal)


@some
def test_nothing_is_kept_for_gradients_that_nobody_wants(name):
    inputs = draw(name, tokens=5)
    with torch.no_grad():
        assert FORMS[name][0](*inputs, causal=True, backend="triton").shape == inputs[0].shape
