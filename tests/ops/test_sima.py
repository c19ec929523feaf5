"""SimA against the published outputs, its own laws, and the extremes."""

import pytest
import torch
import torch.nn.functional as F

from sansmax.ops.sima import order_for, sima, sima_init_state, sima_step

BACKENDS = ("reference", "fused")


def heads(x, state, num_heads):
    """The published projection: rows ordered (q|k|v, head, channel)."""
    qkv = F.linear(x, state["qkv.weight"], state.get("qkv.bias"))
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def merge(out):
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["attn_kv_order", "attn_qk_order", "attn_single_head_nobias"])
def test_golden(golden, error, name, backend):
    case = golden(f"sima/{name}")
    state, x = case.state_dict(), case.inputs()["x"].requires_grad_()
    weight = state["qkv.weight"].requires_grad_()
    context = merge(sima(*heads(x, state, case.config["num_heads"]), backend=backend))
    out = F.linear(context, state["proj.weight"], state["proj.bias"])
    assert error(context, case.outputs["ctx"]) < 1e-9
    assert error(out, case.outputs["out"]) < 1e-9
    (out * case.fill("input:cotangent", out.shape)).sum().backward()
    assert error(x.grad, case.outputs["grad_x"]) < 1e-9
    if "grad_qkv_weight" in case.outputs:
        assert error(weight.grad, case.outputs["grad_qkv_weight"]) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_eps(golden, error, backend, dtype):
    case = golden("sima/attn_eps")
    state = {key: value.to(dtype) for key, value in case.state_dict().items()}
    x = case.inputs()["x"].to(dtype)
    context = merge(sima(*heads(x, state, 4), backend=backend))
    assert error(context * 1e8, case.outputs["ctx_x1e8"]) < (1e-9 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["class_attn", "class_attn_eps"])
def test_golden_class_attention(golden, error, name, backend):
    """q is normalised over all tokens, then only the class token asks; eps is 1e-6."""
    case = golden(f"sima/{name}")
    q, k, v = heads(case.inputs()["x"], case.state_dict(), 4)
    context = merge(sima(q, k, v, eps=1e-6, backend=backend)[:, :, :1])
    want = case.outputs["ctx"] if name == "class_attn" else case.outputs["ctx_x1e8"] / 1e8
    assert error(context, want) < 1e-9


@pytest.mark.parametrize("order", ["qk", "kv"])
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim"), [(1, 1, 5, 3), (7, 13, 5, 3), (13, 2, 5, 11)]
)
def test_orders_agree_with_the_reference(queries, keys, dim, value_dim, order, error):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, queries, dim).double(), torch.randn(2, 3, keys, dim).double()
    v = torch.randn(2, 3, keys, value_dim).double()
    want = sima(q, k, v, backend="reference")
    assert error(sima(q, k, v, order=order, backend="fused"), want) < 1e-12


def test_order_follows_the_flops():
    assert order_for(196, 196, 64, 64) == "kv"
    assert order_for(20, 20, 48, 48) == "qk"
    assert order_for(48, 48, 48, 48) == "kv"  # the published test: N < D takes (q k^T) v
    assert order_for(3136, 10, 64, 64) == "qk"  # 2 M N < D (M + N)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_rows_are_the_last_rows_of_prefixes(backend, error):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, 3, 151, 5).double().unbind(0)
    out = sima(q, k, v, causal=True, backend=backend)
    for i in (0, 1, 63, 64, 150):
        prefix = sima(q[:, :, : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], backend="reference")
        assert error(out[:, :, i], prefix[:, :, -1]) < 1e-12


def test_steps_equal_the_causal_form(error):
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 3, 70, 5).unbind(0)
    want = sima(q.double(), k.double(), v.double(), causal=True)
    state, outs = sima_init_state(2, 3, 5), []
    for i in range(70):
        out, state = sima_step(q[:, :, i], k[:, :, i], v[:, :, i], state)
        outs.append(out)
    assert error(torch.stack(outs, 2), want) < 1e-6
    assert error(sima(q, k, v, causal=True), want) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_and_gets_no_gradient(backend, causal, error):
    torch.manual_seed(3)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 3, 11, 5).double().unbind(0))
    want = sima(q, k, v, causal=causal, backend=backend)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 11:] = False
    padded = [torch.cat([t.detach(), torch.full((2, 3, 6, 5), float("nan")).double()], 2) for t in (q, k, v)]
    for t in padded:
        t.requires_grad_()
    got = sima(*padded, mask=mask, causal=causal, backend=backend)
    assert error(got[:, :, :11], want) < 1e-12
    assert (got[:, :, 11:] == 0).all()
    got[:, :, :11].square().sum().backward()
    for t in padded:
        assert (t.grad[:, :, 11:] == 0).all()
        assert t.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_mask_in_cross_attention(backend, error):
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 2, 3, 7, 5).double().unbind(0)
    keep = torch.tensor([[True] * 4 + [False] * 3] * 2)
    everyone = torch.ones(2, 7, dtype=torch.bool)
    got = sima(q, k, v, mask=keep, query_mask=everyone, backend=backend)
    assert error(got, sima(q, k[:, :, :4], v[:, :, :4], backend="reference")) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_everything_masked_is_zero(backend, causal):
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 2, 5, 3).unbind(0))
    out = sima(q, k, v, mask=torch.zeros(1, 5, dtype=torch.bool), causal=causal, backend=backend)
    out.sum().backward()
    assert (out == 0).all()
    assert (q.grad == 0).all()


def test_laws_of_the_published_form(error):
    torch.manual_seed(5)
    q, k, v = torch.randn(3, 1, 2, 50, 5).double().unbind(0)
    out = sima(q, k, v)
    assert error(sima(q * 37, k * torch.rand(5).double().add(0.1), v), out) < 1e-12
    twice = [torch.cat([t, t], 2) for t in (q, k, v)]
    assert error(sima(*twice)[:, :, :50] * 2, out) < 1e-12
    wrong_axis = F.normalize(q, p=1, dim=-1) @ (F.normalize(k, p=1, dim=-1).mT @ v)
    assert error(wrong_axis, out) > 0.1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [
        (torch.float16, 6e4, 1e-3),  # sums over tokens leave float16
        (torch.float16, 1e-4, 2e-3),
        (torch.bfloat16, 1e30, 8e-3),
        (torch.float32, 1e25, 1e-5),  # k^T v leaves float32
        (torch.float32, 1e-9, 1e-5),
    ],
)
def test_extremes(dtype, size, tolerance, causal, error):
    torch.manual_seed(6)
    q, k, v = (torch.randn(3, 1, 2, 700, 5).clamp(-1, 1) * size).to(dtype).unbind(0)
    if dtype == torch.float16:  # keep the output itself inside the type
        v = (v.double() / size).to(dtype)
    want = sima(q.double(), k.double(), v.double(), causal=causal, backend="reference")
    assert error(sima(q, k, v, causal=causal), want) < tolerance


@pytest.mark.parametrize("size", [1, 1e30])  # of v
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [5, 600, 1100])
def test_late_sums_out_of_range_change_no_earlier_row(tokens, dtype, size, error):
    torch.manual_seed(7)
    q, k, v = torch.randn(3, 1, 2, tokens, 8, dtype=dtype).clamp(-1, 1).unbind(0)
    early = sima(q[:, :, :-4], k[:, :, :-4], v[:, :, :-4] * size, causal=True)
    late = torch.finfo(dtype).max / 1.1
    q[:, :, -4:] *= late
    k[:, :, -4:] *= late
    got = sima(q, k, v * size, causal=True, backend="fused")
    # A power of two below the range cancels.
    q, k, v = q.double() * 2**-60, k.double() * 2**-60, v.double()
    want = sima(q, k, v * size, causal=True, backend="reference", eps=1e-12 * 2**-60)
    assert error(got[:, :, :-4], early) < (1e-13 if dtype == torch.float64 else 1e-5)
    assert error(got[:, :, -4:], want[:, :, -4:]) < (1e-13 if dtype == torch.float64 else 1e-5)


def test_a_key_that_is_not_finite_shows():
    q, k, v = torch.randn(3, 1, 1, 100, 4).unbind(0)
    k[:, :, 70] = torch.inf
    assert sima(q, k, v, causal=True, backend="fused").isnan().any()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("order", ["qk", "kv"])
@pytest.mark.parametrize("q_scale", [1e-11, 1, 1e20, 3e38])
@pytest.mark.parametrize("k_scale", [1e-11, 1, 1e20, 3e38])  # sums of 3e38 are infinite in float32
@pytest.mark.parametrize("v_scale", [1e-20, 1, 1e30])
def test_sums_and_products_may_leave_float32(q_scale, k_scale, v_scale, order, grad, error):
    torch.manual_seed(8)
    q, k, v = (
        t.clamp(-1, 1) * s
        for t, s in zip(torch.randn(3, 1, 2, 30, 5), (q_scale, k_scale, v_scale), strict=True)
    )
    want = sima(q.double(), k.double(), v.double())
    with torch.set_grad_enabled(grad):
        assert error(sima(q.requires_grad_(grad), k, v, order=order).detach(), want) < 1e-5


def test_the_sums_are_taken_in_blocks(error, monkeypatch):
    torch.manual_seed(9)
    q, k, v = torch.randn(3, 2, 3, 23, 5, dtype=torch.float64).unbind(0)
    monkeypatch.setattr("sansmax.ops.sima.fused.ENTRIES", 4 * 2 * 3 * 5)
    assert error(sima(q, k, v), sima(q, k, v, backend="reference")) < 1e-12


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of jacfwd itself
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacfwd, torch.func.jacrev])
def test_transforms_of_torch_func(transform, error):
    torch.manual_seed(10)
    q, k, v = torch.randn(3, 1, 2, 7, 3, dtype=torch.float64).unbind(0)
    if transform is torch.func.vmap:
        q = torch.stack([q, q + 1])
    got, want = (transform(lambda q, b=b: sima(q, k, v, backend=b))(q) for b in BACKENDS)
    assert error(got, want) < 1e-12


def test_autocast_keeps_float32_islands(error):
    torch.manual_seed(7)
    q, k, v = torch.randn(3, 1, 2, 300, 8).bfloat16().unbind(0)
    want = sima(q.double(), k.double(), v.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(sima(q, k, v), want) < 4e-3
        assert error(sima(q.float(), k.float(), v.float()), want) < 1e-5
        assert error(sima(q.float(), k.float(), v.float(), backend="reference"), want) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(order="best"), "order must be one of auto, qk, kv"),
        (dict(backend="cuda"), "unknown backend 'cuda'"),
        (dict(eps=0.0), "eps must be > 0"),
        (dict(mask=torch.ones(2, 5, dtype=torch.bool)), r"mask must have shape \(B, M\) = \(2, 7\)"),
        (dict(k=torch.randn(2, 3, 9, 5), v=torch.randn(2, 3, 9, 5), causal=True), "as many queries as keys"),
        (dict(k=torch.randn(2, 3, 7, 4)), r"k must have shape \(2, 3, M, 5\)"),
        (dict(v=torch.randn(2, 3, 6, 5)), r"v must have shape \(2, 3, 7, E\)"),
        (dict(q=torch.randn(2, 7, 5)), r"q must have shape \(B, H, N, D\)"),
    ],
)
def test_refusals_with_a_value_error(change, message):
    arguments = dict(zip("qkv", torch.randn(3, 2, 3, 7, 5).unbind(0), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        sima(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.ones(2, 3, 7, 5, dtype=torch.int64)), "q must be floating point, got torch.int64"),
        (dict(v=torch.randn(2, 3, 7, 5).double()), "v must have the dtype of q"),
        (dict(mask=torch.ones(2, 7)), "mask must be a bool tensor"),
        (dict(k=[1.0]), "k must be a torch.Tensor, got list"),
    ],
)
def test_refusals_with_a_type_error(change, message):
    arguments = dict(zip("qkv", torch.randn(3, 2, 3, 7, 5).unbind(0), strict=True)) | change
    with pytest.raises(TypeError, match=message):
        sima(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
