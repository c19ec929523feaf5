"""Running sums as triples: what a float64 cumulative sum gives, and what it cannot."""

import pytest
import torch

from sansmax.ops.aft import _triple, aft_conv, aft_local, aft_simple


def draw(*shape, spread=1.0):
    return torch.randn(*shape, dtype=torch.float64) * spread


@pytest.mark.parametrize("length", [1, 31, 33, 1055, 2049])  # around chunks of 32 and groups of 1024
@pytest.mark.parametrize("near", [True, False])
def test_scan_equals_cumulative_sums(length, near, error, monkeypatch):
    if not near:
        monkeypatch.setitem(_triple.NEAR, torch.float64, 0.0)
    torch.manual_seed(length)
    k, v = draw(2, length, 1, spread=3), draw(2, length, 5)
    weights = k.exp()
    for got, sums in (
        (_triple.scan(_triple.tokens(k, v)), lambda x: x.cumsum(1)),
        (
            _triple.flip(_triple.scan(_triple.flip(_triple.tokens(k, v)))),
            lambda x: x.flip(1).cumsum(1).flip(1),
        ),
    ):
        assert error(_triple.finish(got), sums(weights * v) / sums(weights)) < 1e-12
        assert error(got.top + got.den.log(), sums(weights).log()) < 1e-12
        assert got.den.min() >= (k.min().exp() if near else 1)


def test_scan_survives_any_range_of_keys(error):
    torch.manual_seed(0)
    k = torch.cat([torch.linspace(-600, 600, 71), 600 * torch.randn(70)]).view(1, -1, 1).expand(2, -1, 3)
    v = torch.randn(2, 141, 3)
    causal = torch.ones(141, 141, dtype=torch.bool).tril()[..., None]
    want = (k[:, None].double().masked_fill(~causal, -torch.inf).softmax(2) * v[:, None].double()).sum(2)
    assert error(_triple.finish(_triple.scan(_triple.tokens(k, v))), want) < 1e-6


def test_parts_make_the_whole_and_empty_ones_add_nothing(error):
    torch.manual_seed(1)
    k, v, keep = draw(2, 13, 3, spread=200), draw(2, 13, 3), torch.rand(2, 13, 1) > 0.5
    whole = _triple.finish(_triple.total(_triple.tokens(k, v)))
    nothing = _triple.empty((2, 1, 3), (2, 1, 3), k)
    parts = (
        _triple.total(_triple.tokens(k, v.masked_fill(~mask, torch.nan), mask)) for mask in (keep, ~keep)
    )
    assert error(_triple.finish(_triple.combine(nothing, *parts, nothing)), whole) < 1e-14
    assert (_triple.finish(_triple.combine(nothing, nothing)) == 0).all()


@pytest.mark.parametrize("by", [0, 1, 7, 20])
def test_shift_leaves_the_nearest_out(by):
    k, v = draw(2, 7, 3), draw(2, 7, 3)
    x = _triple.scan(_triple.tokens(k, v))
    shifted = _triple.shift(x, by)
    assert shifted.num.shape == v.shape
    assert torch.equal(shifted.num[:, by:], x.num[:, : max(7 - by, 0)])
    assert (shifted.top[:, :by] == -torch.inf).all()


def test_gradients_of_a_scan():
    torch.manual_seed(2)
    k, v = draw(1, 35, 1).requires_grad_(), draw(1, 35, 2).requires_grad_()
    keep = torch.arange(35)[:, None] % 3 > 0

    def average(k, v):
        return _triple.finish(_triple.scan(_triple.tokens(k, v, keep)))

    assert torch.autograd.gradcheck(average, (k, v), fast_mode=True)
    k_grad, v_grad = torch.autograd.grad(average(k * 300, v).sum(), (k, v))
    assert k_grad.isfinite().all()
    assert v_grad.isfinite().all()
    assert (v_grad[:, ~keep[:, 0]] == 0).all()


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-36])
@pytest.mark.parametrize("op", ["simple", "local", "conv"])
def test_tiny_values_under_small_weights_do_not_vanish(op, size, error):
    torch.manual_seed(9)
    q, k, v = torch.randn(3, 1, 200, 8).unbind(0)
    k, v = k.clamp(-3, 3) - 30, v * size
    calls = {
        "simple": lambda q, k, v: aft_simple(q, k, v, causal=True),
        "local": lambda q, k, v: aft_local(q, k, v, torch.zeros(200, 200, dtype=q.dtype), 5, causal=True),
        "conv": lambda q, k, v: aft_conv(q, k[..., :2], v, torch.zeros(2, 5, dtype=q.dtype), causal=True),
    }
    # Larger by 1e20 in float64: the output is in proportion to v.
    want = calls[op](q.double(), k.double(), v.double() * 1e20) / 1e20
    assert error(calls[op](q, k, v), want) < 1e-6
