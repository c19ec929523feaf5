"""External attention against the published outputs, its own laws, and the extremes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sansmax.ops.external import external, external_map, flops

BACKENDS = ("reference", "fused")


def inputs(*leading, tokens=13, dim=5, value_dim=7, rows=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*(leading or (2,)), tokens, dim), (rows, dim), (rows, value_dim))
    return [torch.randn(s, generator=generator).double() for s in shapes]


def literal(x, memory_k, memory_v, eps=1e-9):
    a = (x @ memory_k.mT).softmax(-2)
    return a / (eps + a.sum(-1, keepdim=True)) @ memory_v


def convolution_module(x, state, backend):
    """The published single-head module around the operator; also the operator's own input and output."""
    query = F.conv2d(x, state["conv1.weight"], state["conv1.bias"]).flatten(2).mT  # (B, N, C)
    memory_k, memory_v = state["linear_0.weight"][..., 0], state["linear_1.weight"][..., 0].mT
    mixed = external(query, memory_k, memory_v, backend=backend)
    y = F.conv2d(mixed.mT.unflatten(-1, x.shape[2:]), state["conv2.0.weight"])
    norm = (state[f"conv2.1.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.relu(F.batch_norm(y, *norm) + x), external_map(query, memory_k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ea_conv_c32_5x7", "ea_conv_c512_6x5", "ea_conv_c16_peaked"])
def test_golden_module(golden, error, name, backend):
    case = golden(f"external_attention/{name}")
    out, attention = convolution_module(case.inputs()["x"], case.state_dict(), backend)
    assert error(out, case.outputs["out"]) < 1e-9
    assert error(attention.mT, case.outputs["attn"]) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_module_in_training(golden, error, backend):
    case = golden("external_attention/ea_conv_c32_train")
    state, x = case.state_dict(), case.inputs()["x"]
    query = F.conv2d(x, state["conv1.weight"], state["conv1.bias"]).flatten(2).mT
    mixed = external(
        query, state["linear_0.weight"][..., 0], state["linear_1.weight"][..., 0].mT, backend=backend
    )
    y = F.conv2d(mixed.mT.unflatten(-1, x.shape[2:]), state["conv2.0.weight"])
    y = F.batch_norm(y, None, None, state["conv2.1.weight"], state["conv2.1.bias"], training=True)
    assert error(F.relu(y + x), case.outputs["out"]) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_gradients(golden, error, backend):
    case = golden("external_attention/ea_conv_c32_grads")
    state, given = case.state_dict(), case.inputs()
    leaves = {
        name: t.requires_grad_()
        for name, t in (state | {"x": given["x"]}).items()
        if f"grad.{name}" in case.outputs
    }
    assert len(leaves) == 5
    out, _ = convolution_module(given["x"], state, backend)
    assert error(out, case.outputs["out"]) < 1e-9
    (out * given["cotangent"]).sum().backward()
    for name, leaf in leaves.items():
        assert error(leaf.grad, case.outputs[f"grad.{name}"]) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_peaked_in_lower_precision(golden, error, backend):
    """The module, then the operator alone from the same rounded tensors; most rows sum to nearly 0."""
    case = golden("external_attention/ea_conv_c16_peaked")
    state, x = case.state_dict(), case.inputs()["x"]
    out, _ = convolution_module(x.float(), {key: t.float() for key, t in state.items()}, backend)
    assert error(out, case.outputs["out"]) < 5e-6
    query = F.conv2d(x, state["conv1.weight"], state["conv1.bias"]).flatten(2).mT
    memories = [state["linear_0.weight"][..., 0], state["linear_1.weight"][..., 0].mT]
    assert (external_map(query, memories[0]).sum(-1) < 0.9).double().mean() > 0.75
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        rounded = [t.to(dtype).requires_grad_() for t in (query, *memories)]
        want = external(*(t.double() for t in rounded))
        out = external(*rounded, backend=backend)
        assert out.dtype == dtype
        assert error(out, want) < tolerance
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in rounded)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mea_d64_h4", "mea_d32_h1"])
def test_golden_multi_head(golden, error, name, backend):
    case = golden(f"external_attention/{name}")
    state, x = case.state_dict(), case.inputs()["x"]
    heads = case.config["num_heads"] * case.config["coef"]
    query = F.linear(x, state["trans_dims.weight"], state["trans_dims.bias"])
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    memory_k, memory_v = state["linear_0.weight"], state["linear_1.weight"].mT
    assert error(external_map(query, memory_k), case.outputs["attn"]) < 1e-9
    mixed = external(query, memory_k, memory_v, backend=backend) + state["linear_1.bias"]
    out = F.linear(mixed.transpose(1, 2).flatten(2), state["proj.weight"], state["proj.bias"])
    assert error(out, case.outputs["out"]) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "k", "v"), [("performer", 0, 1), ("transformer", 1, 2)])
def test_golden_token_layers(golden, error, name, k, v, backend):
    case = golden(f"external_attention/eamlp_token_{name}_147_64")
    state, x = case.state_dict(), case.inputs()["x"]
    x = F.layer_norm(x, (147,), state["norm1.weight"], state["norm1.bias"])
    query = F.linear(x, state["attn.q_linear.weight"], state["attn.q_linear.bias"])
    memory_k, memory_v = state[f"attn.linear_{k}.weight"], state[f"attn.linear_{v}.weight"].mT
    assert error(external_map(query, memory_k), case.outputs["attn"]) < 1e-9
    mixed = external(query, memory_k, memory_v, backend=backend) + state[f"attn.linear_{v}.bias"]
    out = F.linear(mixed, state["attn.proj.weight"], state["attn.proj.bias"]) + query
    assert error(out, case.outputs["attn_out"]) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_without_eps(golden, error, backend):
    case = golden("external_attention/xmu_ea_d24_s8")
    state, x = case.state_dict(), case.inputs()["x"]
    assert error(external_map(x, state["mk.weight"], eps=0), case.outputs["attn"]) < 1e-9
    out = external(x, state["mk.weight"], state["mv.weight"].mT, eps=0, backend=backend)
    assert error(out, case.outputs["out"]) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(2,), (2, 3)])
@pytest.mark.parametrize("eps", [1e-9, 0.3, 1e-40, 0])
@pytest.mark.parametrize("tokens", [1, 3, 23])
def test_equals_the_equation(tokens, eps, leading, backend, error):
    x, memory_k, memory_v = inputs(*leading, tokens=tokens)
    want = literal(x, memory_k, memory_v, eps)
    assert error(external(x, memory_k, memory_v, eps=eps, backend=backend), want) < 1e-12
    assert error(external_map(x, memory_k, eps=eps) @ memory_v, want) < 1e-12
    if tokens == 1:
        assert error(external_map(x, memory_k), torch.full((1,), 1 / 11, dtype=torch.float64)) < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-9, 1e-40, 0])
def test_gradcheck(eps, backend):
    leaves = [t.requires_grad_() for t in inputs(1, 2, tokens=4, rows=3)]

    def mixed(*leaves):
        return external(*leaves, eps=eps, backend=backend)

    assert torch.autograd.gradcheck(mixed, leaves)
    assert torch.autograd.gradgradcheck(mixed, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-9, 1e-40, 0])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 6e4),
        (torch.bfloat16, 1e15),
        (torch.float32, 300.0),  # row sums far below float32's smallest number
        (torch.float32, 1e15),
        (torch.float32, 1e-30),
    ],
)
def test_extremes(dtype, size, eps, backend, error):
    x, memory_k, memory_v = inputs(2, 3, tokens=70)
    x, memory_k = ((t.clamp(-1, 1) * size).to(dtype).requires_grad_() for t in (x, memory_k))
    memory_v = memory_v.to(dtype).requires_grad_()
    out = external(x, memory_k, memory_v, eps=eps, backend=backend)
    if size == 300:  # larger logits round by more than the differences that decide the softmax
        want = external(x.double(), memory_k.double(), memory_v.double(), eps=eps)
        assert error(out, want) < 0.05
    assert out.isfinite().all()
    if eps == 0:
        assert (out.abs().amax(-1) > 0.01).all()  # no silent zero: every row is a mean of memory rows
    out.float().sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, memory_k, memory_v))


@pytest.mark.parametrize("eps", [1e-9, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_that_overflow(dtype, eps):
    x, memory_k, memory_v = (
        (t.sign() * torch.finfo(dtype).max).to(dtype).requires_grad_() for t in inputs(2, 3)
    )
    out = external(x, memory_k, memory_v, eps=eps)
    assert out.isfinite().all()
    assert (out != 0).any()
    out.float().sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, memory_k, memory_v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-9, 0])
@pytest.mark.parametrize("leading", [(2,), (2, 3)])
@pytest.mark.parametrize("by_token", [False, True])
def test_padding_changes_nothing_and_gets_no_gradient(by_token, leading, eps, backend, error):
    x, memory_k, memory_v = inputs(*leading, tokens=11)
    want = external(x, memory_k, memory_v, eps=eps, backend=backend)
    hole = torch.full_like(x[..., :6, :], float("nan"))
    padded = torch.cat([x[..., :3, :], hole, x[..., 3:, :]], -2)
    if by_token:
        padded = padded.transpose(1, -2).contiguous().transpose(1, -2)
    padded.requires_grad_()
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 3:9] = False
    attention = external_map(padded, memory_k, mask=mask, eps=eps)
    assert error(attention[..., mask[0], :], external_map(x, memory_k, eps=eps)) < 1e-12
    assert (attention[..., 3:9, :] == 0).all()
    got = external(padded, memory_k, memory_v, mask=mask, eps=eps, backend=backend)
    assert error(got[..., mask[0], :], want) < 1e-12
    assert (got[..., 3:9, :] == 0).all()
    got.square().sum().backward()
    assert (padded.grad[..., 3:9, :] == 0).all()
    assert padded.grad.isfinite().all()
    assert (padded.grad[..., :3, :] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_image_all_masked(backend, error):
    x, memory_k, memory_v = (t.requires_grad_() for t in inputs(2, 3))
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0] = False
    out = external(x, memory_k, memory_v, mask=mask, backend=backend)
    assert (out[0] == 0).all()
    assert error(out[1:], literal(x[1:], memory_k, memory_v)) < 1e-8
    out.square().sum().backward()
    assert (x.grad[0] == 0).all()
    assert all(t.grad.isfinite().all() for t in (x, memory_k, memory_v))


def test_biases_of_the_first_memory_cancel(error):
    x, memory_k, memory_v = inputs()
    ones = torch.ones(*x.shape[:-1], 1).double()
    biased = torch.cat([memory_k, torch.randn(11, 1).double()], -1)
    assert error(external(torch.cat([x, ones], -1), biased, memory_v), external(x, memory_k, memory_v)) < 1e-9


def test_an_image_does_not_see_its_batch_mates(error):
    x, memory_k, memory_v = inputs(3, 2)
    x[0] *= 1e4
    assert error(external(x[1:2], memory_k, memory_v), external(x, memory_k, memory_v)[1:2]) < 1e-12


def test_heads_of_a_projection_are_neither_copied_nor_rearranged(error):
    x, memory_k, memory_v = inputs(2, 3)
    by_token = x.transpose(1, 2).contiguous().transpose(1, 2)
    out = external(by_token, memory_k, memory_v)
    assert error(out, external(x, memory_k, memory_v)) < 1e-12
    assert out.transpose(1, 2).is_contiguous()
    assert external(x, memory_k, memory_v).is_contiguous()


def test_autocast_keeps_float32_islands(error):
    x, memory_k, memory_v = (t.float() for t in inputs(2, 3))
    want = external(x, memory_k, memory_v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in BACKENDS:
            assert error(external(x, memory_k, memory_v, backend=backend), want) < 1e-6
        assert error(external_map(x, memory_k) @ memory_v.double().float(), want) < 2e-2
        assert external_map(x, memory_k).dtype == torch.float32


@pytest.mark.parametrize("eps", [1e-9, 0])
def test_compiles_with_its_backward_for_any_length(eps, error):
    torch.compiler.reset()

    def masked(x, memory_k, memory_v, mask):
        return external(x, memory_k, memory_v, mask=mask, eps=eps)

    compiled = torch.compile(masked, backend="aot_eager", fullgraph=True)
    for tokens in (16, 25, 9):
        leaves = [t.requires_grad_() for t in inputs(2, 3, tokens=tokens)]
        mask = torch.arange(tokens).expand(2, -1) != 3
        out, want = compiled(*leaves, mask), masked(*leaves, mask)
        assert error(out, want) < 1e-11
        for got, correct in zip(
            torch.autograd.grad(out.square().sum(), leaves),
            torch.autograd.grad(want.square().sum(), leaves),
            strict=True,
        ):
            assert error(got, correct) < 1e-10


def test_exports_for_any_length(error):
    class Wrapped(torch.nn.Module):
        def forward(self, x, memory_k, memory_v):
            return external(x, memory_k, memory_v)

    tokens = torch.export.Dim("tokens", min=2, max=99)
    program = torch.export.export(
        Wrapped(), tuple(inputs(2, 3, tokens=16)), dynamic_shapes=({2: tokens}, None, None)
    )
    other = inputs(2, 3, tokens=23)
    assert error(program.module()(*other), external(*other)) < 1e-11


@pytest.mark.parametrize("leading", [(2,), (2, 3)])
def test_flops(leading):
    def count(tokens):
        with FlopCounterMode(display=False) as counter:
            external(*inputs(*leading, tokens=tokens))
        return counter.get_total_flops()

    heads = leading[1] if len(leading) == 2 else 1
    assert count(13) == flops(2, heads, 13, 5, 7, 11)
    assert count(400) == 4 * count(100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps=-1e-9), "external: eps must be >= 0"),
        (dict(backend="triton"), "cpu tensors have no kernel|float64 has no kernel"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), r"mask must have shape \(B, M\) = \(2, 13\)"),
        (dict(memory_k=torch.randn(11, 6).double()), r"memory_k must have shape \(S, 5\), got \(11, 6\)"),
        (dict(memory_v=torch.randn(12, 7).double()), r"memory_v must have shape \(11, E\), got \(12, 7\)"),
        (dict(x=torch.randn(13, 5).double()), r"x must have shape \(B, N, D\), got \(13, 5\)"),
        (dict(x=torch.randn(2, 3, 0, 5).double()), r"x must have shape \(B, H, N, D\)"),
    ],
)
def test_refusals_with_a_value_error(change, message):
    arguments = dict(zip(("x", "memory_k", "memory_v"), inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        external(arguments.pop("x"), arguments.pop("memory_k"), arguments.pop("memory_v"), **arguments)


def test_refusals_with_a_type_error():
    x, memory_k, memory_v = inputs()
    with pytest.raises(TypeError, match=r"memory_v must have the dtype of x"):
        external(x, memory_k, memory_v.float())
    with pytest.raises(TypeError, match=r"x must be floating point, got torch.int64"):
        external_map(x.long(), memory_k)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor"):
        external(x, memory_k, memory_v, mask=torch.ones(2, 13))
    with pytest.raises(TypeError, match=r"external: x must be a torch.Tensor, got list"):
        external([1.0], memory_k, memory_v)
