"""AFT-full and AFT-local against the golden cases, their own laws, and the extremes."""

import pytest
import torch

from sansmax.ops.aft import (
    aft_full,
    aft_full_init_state,
    aft_full_step,
    aft_local,
    aft_local_init_state,
    aft_local_step,
    aft_simple,
)

BACKENDS = ("reference", "fused")
PLAIN = [
    *(
        "full",
        "full_causal",
        "full_cropped",
        "full_cropped_causal",
        "full_factorised",
        "full_factorised_causal",
    ),
    *("full_long", "full_long_causal", "full_padded"),
    *("local_s0", "local_s0_causal", "local_s1", "local_s1_causal", "local_s3", "local_s3_causal"),
    *("local_s9", "local_s9_causal", "local_s32_long", "local_s32_long_causal"),
]
EXTREME = [
    *("full_bigk", "full_bigk_causal", "full_extreme", "full_extreme_causal", "full_gate_extreme"),
    *("full_misaligned", "full_misaligned_causal", "local_s3_cancel", "local_s3_cancel_causal"),
    *("local_s3_cancel_mild", "local_s3_cancel_mild_causal", "local_s3_extreme", "local_s3_extreme_causal"),
]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(case, dtype, backend):
    inputs = case.inputs()
    q, k, v = (inputs[name].to(dtype) for name in "qkv")
    w = inputs["w"].to(dtype) if "w" in inputs else (inputs["u"].to(dtype), inputs["p"].to(dtype))
    options = {"causal": case.config["causal"], "backend": backend}
    if "lengths" in inputs:
        options["mask"] = torch.arange(q.shape[1]) < inputs["lengths"][:, None]
    if case.config["variant"] == "local":
        return aft_local(q, k, v, w, case.config["window"], **options)
    return aft_full(q, k, v, w, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PLAIN + EXTREME)
def test_golden(golden, error, name, backend):
    case = golden(f"aft/aft_{name}")
    assert error(run(case, torch.float64, backend), case.outputs["out"]) < 1e-9
    assert error(run(case, torch.float32, backend), case.outputs["out"]) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EXTREME)
def test_golden_extremes_are_finite_in_half_precision(golden, name, dtype):
    assert run(golden(f"aft/aft_{name}"), dtype, "fused").isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_positions_are_not_local(golden, error, backend):
    case = golden("aft/aft_local_hard_s3")
    q, k, v, w = (case.inputs()[name] for name in "qkvw")
    at = torch.arange(9)
    hard = w.masked_fill((at[:, None] - at).abs() >= 3, -torch.inf)
    assert error(aft_full(q, k, v, hard, backend=backend), case.outputs["out"]) < 1e-9
    assert error(aft_local(q, k, v, w, 3, backend=backend), case.outputs["out"]) > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_windows_from_simple_to_full(backend, causal, error):
    q, k, v = random(3, 2, 300, 3).unbind(0)
    u, p = random(2, 310, 5, seed=1).unbind(0)
    options = {"causal": causal, "backend": backend}
    full = aft_full(q, k, v, (u, p), causal=causal, backend="reference")
    assert error(aft_local(q, k, v, (u, p), 300, **options), full) < 1e-11
    simple = aft_simple(q, k, v, causal=causal, backend="reference")
    assert error(aft_local(q, k, v, (u, p), 0, **options), simple) < 1e-11
    at = torch.arange(310)
    band = (u @ p.mT).masked_fill((at[:, None] - at).abs() >= 7, 0)
    want = aft_full(q, k, v, band, causal=causal, backend="reference")
    assert error(aft_local(q, k, v, (u, p), 7, **options), want) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("local", [False, True])
def test_a_future_key_changes_no_earlier_row(backend, local, error):
    q, k, v = random(3, 1, 150, 3, dtype=torch.float32).unbind(0)
    w = random(150, 150, seed=1, dtype=torch.float32)
    late = k.clone()
    late[:, 140] = 300

    def causal(k):
        out = aft_local(q, k, v, w, 5, causal=True, backend=backend) if local else None
        return aft_full(q, k, v, w, causal=True, backend=backend) if out is None else out

    assert error(causal(late)[:, :140], causal(k)[:, :140]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [30.0, 150.0, 900.0])
@pytest.mark.parametrize("local", [False, True])
def test_random_extremes(backend, size, local, error):
    q, k, v = random(3, 2, 40, 3, dtype=torch.float32).unbind(0)
    k, w = k * size, random(40, 40, seed=1, dtype=torch.float32) * size

    def call(*tensors, backend):
        return aft_local(*tensors, 4, backend=backend) if local else aft_full(*tensors, backend=backend)

    leaves = [t.clone().requires_grad_() for t in (q, k, v, w)]
    out = call(*leaves, backend=backend)
    want = call(*(t.double() for t in (q, k, v, w)), backend="reference")
    assert error(out, want) < 5e-6
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_padding_changes_nothing_and_gets_no_gradient(backend, causal, local, error):
    q, k, v = random(3, 2, 11, 3).unbind(0)
    w = random(17, 17, seed=1)

    def call(q, k, v, mask=None):
        options = {"causal": causal, "mask": mask, "backend": backend}
        return aft_local(q, k, v, w, 3, **options) if local else aft_full(q, k, v, w, **options)

    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 11:] = False
    nan = torch.full((2, 6, 3), float("nan")).double()
    padded = [torch.cat([t, nan], 1).requires_grad_() for t in (q, k, v)]
    got = call(*padded, mask=mask)[:, :11]
    assert error(got, call(q, k, v)) < 1e-12
    got.square().sum().backward()
    for t in padded:
        assert (t.grad[:, 11:] == 0).all()
        assert t.grad.isfinite().all()
    nothing = call(q, k, v, mask=torch.zeros(2, 11, dtype=torch.bool))
    assert (nothing == 0).all()


@pytest.mark.parametrize("window", [None, 0, 1, 4, 50])
def test_steps_equal_the_causal_form(window, error):
    q, k, v = random(3, 2, 30, 3, dtype=torch.float32).unbind(0)
    k, w = k * 40, random(30, 30, seed=1, dtype=torch.float32)
    exact = [t.double() for t in (q, k, v, w)]
    if window is None:
        state, want = aft_full_init_state(2, 3), aft_full(*exact, causal=True, backend="reference")
    else:
        state = aft_local_init_state(2, 3)
        want = aft_local(*exact, window, causal=True, backend="reference")

    def step(i, state):
        token = q[:, i], k[:, i], v[:, i], w
        return aft_full_step(*token, state) if window is None else aft_local_step(*token, window, state)

    outs = []
    for i in range(30):
        out, state = step(i, state)
        outs.append(out)
    assert error(torch.stack(outs, 1), want) < 5e-6
    with pytest.raises(ValueError, match="w must cover the token at position 30"):
        step(0, state)


@pytest.mark.parametrize("size", [1.0, 200.0])
def test_a_compiled_graph_decides_by_the_values(size, error):
    compiled = torch.compile(aft_full, backend="aot_eager", fullgraph=True)
    q, k, v = random(3, 1, 20, 3, dtype=torch.float32).unbind(0)
    k, w = k * size, random(20, 20, seed=1, dtype=torch.float32) * size
    inputs = [t.requires_grad_() for t in (q, k, v, w)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, want = compiled(*inputs), aft_full(*exact, backend="reference")
    assert error(out, want) < 5e-6
    weight = random(*out.shape, seed=2)
    for got, grad in zip(
        torch.autograd.grad(out, inputs, weight.float()),
        torch.autograd.grad(want, exact, weight),
        strict=True,
    ):
        assert error(got, grad) < 2e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("factors", [False, True])
def test_blocks_of_queries(causal, factors, error, monkeypatch):
    monkeypatch.setattr("sansmax.ops.aft.full.fused.ROWS", 5)
    q, k, v = random(3, 2, 13, 4).unbind(0)
    w = (random(14, 3, seed=1), random(14, 3, seed=2)) if factors else random(14, 14, seed=1)
    for spread in (1, 100, 1000):  # products, products in a wider range, one exponent per channel
        got = aft_full(q, k * spread, v, w, causal=causal, backend="fused")
        assert error(got, aft_full(q, k * spread, v, w, causal=causal, backend="reference")) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 3, 70])
@pytest.mark.parametrize("spread", [1, 100, 2000])
def test_blocks_of_a_long_sequence(window, causal, spread, error):
    q, k, v = random(3, 2, 600, 2).unbind(0)
    w = random(601, 601, seed=1)
    keep = torch.rand(2, 600, generator=torch.Generator().manual_seed(2)) > 0.2
    options = {"causal": causal, "mask": keep}
    want = aft_local(q, k * spread, v, w, window, **options, backend="reference")
    assert error(aft_local(q, k * spread, v, w, window, **options, backend="fused"), want) < 1e-11


@pytest.mark.parametrize("spread", [1, 60])  # within the range of float32, and of float64
def test_excluded_pairs_do_not_cost_the_products(spread, error, monkeypatch):
    q, k, v = random(3, 2, 13, 4, dtype=torch.float32).unbind(0)
    w = random(13, 13, seed=1, dtype=torch.float32)
    keep = torch.arange(13).expand(2, -1) != 4
    want = aft_full(q, k * spread, v, w, causal=True, mask=keep, backend="reference")
    monkeypatch.setattr("sansmax.ops.aft.full.fused.exact", None)
    got = aft_full(q, k * spread, v, w, causal=True, mask=keep, backend="fused")
    assert error(got, want) < 5e-6


def test_laws(error):
    q, k, v = random(3, 2, 13, 5).unbind(0)
    w = random(13, 13, seed=1)
    out = aft_full(q, k, v, w)
    shifted = aft_full(q, k + random(5, seed=2) * 50, v, w + random(13, 1, seed=3) * 50)
    assert error(shifted, out) < 1e-12
    assert error(aft_full(q, k, v, w.mT), out) > 0.05


def test_refusals():
    q, k, v = random(3, 2, 7, 3).unbind(0)
    w = random(7, 7)
    with pytest.raises(ValueError, match=r"w must cover all T = 7 tokens, got one for T_max = 6"):
        aft_full(q, k, v, w[:6, :6])
    with pytest.raises(ValueError, match=r"w must have shape \(7, 7\), got \(7, 6\)"):
        aft_full(q, k, v, w[:, :6])
    with pytest.raises(TypeError, match=r"pair of factors .* use aft_simple for no bias"):
        aft_full(q, k, v, None)
    with pytest.raises(ValueError, match="k must have shape"):
        aft_full(q, k[:, :6], v, w)
    with pytest.raises(ValueError, match="mask must have shape"):
        aft_local(q, k, v, w, 3, mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises((ValueError, TypeError), match="window"):
        aft_local(q, k, v, w, -1)
