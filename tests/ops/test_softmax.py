"""The softmax baseline: both backends, masks, and rows without any key."""

import math

import pytest
import torch

from sansmax.ops.softmax import softmax

BACKENDS = ("reference", "fused")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_literal_equation(backend, causal, error):
    q, k, v = random(2, 3, 7, 5), random(2, 3, 7, 5, seed=1), random(2, 3, 7, 11, seed=2)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(5)
    if causal:
        scores += torch.full((7, 7), -math.inf).triu(1)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    assert error(softmax(q, k, v, causal=causal, backend=backend), weights @ v) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_and_gets_no_gradient(backend, causal, error):
    q, k, v = random(3, 2, 3, 11, 5).unbind(0)
    want = softmax(q, k, v, causal=causal, backend=backend)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 11:] = False
    nan = torch.full((2, 3, 6, 5), float("nan")).double()
    padded = [torch.cat([t, nan], 2).requires_grad_() for t in (q, k, v)]
    got = softmax(*padded, mask=mask, causal=causal, backend=backend)[:, :, :11]
    assert error(got, want) < 1e-12
    got.square().sum().backward()
    for t in padded:
        assert (t.grad[:, :, 11:] == 0).all()
        assert t.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_a_key_are_zero(backend, causal):
    q, k, v = (t.requires_grad_() for t in random(3, 2, 3, 5, 7, dtype=torch.float32).unbind(0))
    mask = torch.tensor([[False] * 5, [False, True, True, False, True]])
    out = softmax(q, k, v, mask=mask, causal=causal, backend=backend)
    out.sum().backward()
    assert (out[0] == 0).all()
    assert (out[1, :, 0] == 0).all() == causal
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_attention_and_extreme_scores(backend, error):
    q, k, v = random(2, 3, 1, 5), random(2, 3, 13, 5, seed=1), random(2, 3, 13, 5, seed=2)
    want = softmax(q * 1e4, k, v)
    assert error(softmax((q * 1e4).float(), k.float(), v.float(), backend=backend), want) < 1e-4
    assert softmax(q.half() * 1e4, k.half() * 1e3, v.half(), backend=backend).isfinite().all()
