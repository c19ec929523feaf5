"""XNorm against the golden cases, its own laws, and the extremes."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from sansmax.ops.xnorm import _causal, xnorm, xnorm_init_state, xnorm_step

BACKENDS = ("reference", "fused")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["xnorm_n49_d32_h4", "xnorm_n5_d48_h3", "binorm_n36_d24_e16_h2"])
def test_golden(golden, error, name, backend):
    case = golden(f"xvit/{name}")
    state, x = case.state_dict(), case.inputs()["x"]
    qkv = F.linear(x, state["qkv.weight"], state["qkv.bias"])
    q, k, v = qkv.unflatten(-1, (3, case.config["num_heads"], -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out = xnorm(q, k, v, state.get("gamma"), backend=backend).transpose(1, 2).flatten(2)
    assert error(F.linear(out, state["proj.weight"], state["proj.bias"]), case.outputs["out"]) < 1e-9
    units = xnorm(torch.eye(k.shape[3]).double().expand(2, k.shape[1], -1, -1), k, v, backend=backend)
    assert error(units, case.outputs["kv_unit"]) < 1e-9


def test_the_unofficial_axis_is_another_function(golden, error):
    """The common port divides by the norm over the value axis: columns of v^T k reproduce it exactly."""
    case = golden("xvit/unofficial_ufo_attention_xmu")
    state, inputs = case.state_dict(), case.inputs()

    def project(name, x):
        return (
            F.linear(x, state[f"fc_{name}.weight"], state[f"fc_{name}.bias"])
            .unflatten(-1, (3, -1))
            .transpose(1, 2)
        )

    q, k, v = project("q", inputs["queries"]), project("k", inputs["keys"]), project("v", inputs["values"])
    gamma = state["gamma"].flatten()

    def finish(out):
        return F.linear(out.transpose(1, 2).flatten(2), state["fc_o.weight"], state["fc_o.bias"])

    assert error(finish(xnorm(q, k, v, gamma)), case.outputs["out"]) > 0.05
    eye = torch.eye(6).double().expand(2, 3, -1, -1)
    rows = xnorm(eye, v, k).mT  # columns of v^T k are rows of k^T v
    theirs = F.normalize(q, dim=-1) @ rows * gamma.square()[:, None, None]
    assert error(finish(theirs), case.outputs["out"]) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_laws(backend, error):
    q, k, v = random(3, 2, 3, 13, 5).unbind(0)
    gamma = torch.tensor([0.5, -2.0, 3.0]).double()
    out = xnorm(q, k, v, gamma, backend=backend)
    assert (out.abs() <= gamma.square()[:, None, None] * (1 + 1e-12)).all()
    scaled = xnorm(q * random(2, 3, 13, 1).abs(), k * 1e-3, v * random(5).abs(), -gamma, backend=backend)
    assert error(scaled, out) < 1e-12
    assert error(xnorm(q, torch.cat([k, k], 2), torch.cat([v, v], 2), gamma, backend=backend), out) < 1e-12
    assert error(xnorm(q, k * random(5).abs(), v, gamma, backend=backend), out) > 0.05


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim"), [(1, 1, 5, 3), (7, 13, 5, 3), (13, 2, 5, 11)]
)
def test_fused_equals_reference(queries, keys, dim, value_dim, error):
    q, k, v = (
        random(2, 3, queries, dim),
        random(2, 3, keys, dim, seed=1),
        random(2, 3, keys, value_dim, seed=2),
    )
    assert error(xnorm(q, k, v, backend="fused"), xnorm(q, k, v, backend="reference")) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_rows_are_the_last_rows_of_prefixes(backend, error):
    q, k, v = random(3, 2, 3, 37, 5).unbind(0)
    gamma = torch.tensor([0.5, -2.0, 3.0]).double()
    out = xnorm(q, k, v, gamma, causal=True, backend=backend)
    for i in (0, 1, 15, 16, 36):
        prefix = xnorm(q[:, :, : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], gamma, backend="reference")
        assert error(out[:, :, i], prefix[:, :, -1]) < 1e-12


@pytest.mark.parametrize("eps", [1e-12, 3.0])  # 3: some norms are at their floor, others above
@pytest.mark.parametrize("tokens", [1, 35, 64])
def test_causal_gradients_equal_the_reference(tokens, eps):
    """Once, and twice; the gradient of a single token is 0 but for rounding."""
    first, second = [], []
    for backend in BACKENDS:
        leaves = [random(2, 3, tokens, dim, seed=i) for i, dim in enumerate((5, 5, 3))]
        leaves = [t.requires_grad_() for t in (*leaves, torch.tensor([0.5, -2.0, 3.0]).double())]
        out = xnorm(*leaves, causal=True, backend=backend, eps=eps)
        weight = random(*out.shape, seed=9)
        first.append(torch.autograd.grad(out, leaves, weight, retain_graph=True))
        again = torch.autograd.grad(out, leaves, weight, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in again), leaves))
    for got, want in (*zip(*first, strict=True), *zip(*second, strict=True)):
        assert (got - want).abs().max() < 1e-9 * max(1, want.abs().max())


def undone(k, v, at, by, after=40):
    """The token `at` a multiple of what it was, and undone by a later one."""
    k[:, :, at] *= by
    later = at + after
    k[:, :, later], v[:, :, later] = -k[:, :, at], v[:, :, at]


def every_token_undone(k, v):
    k[:, :, 1::2], v[:, :, 1::2] = -k[:, :, :-1:2], v[:, :, :-1:2]


def nearly_undone(k, v):
    undone(k, v, 0, 1e20, 1)
    v[:, :, 1] *= 1 + 1e-3


def zeros(k, v):
    v[..., 1], v[:, :, :40, 2], k[:, :, 60:] = 0, 0, 0


def scales(k, v):
    k *= 10.0 ** torch.linspace(0, 15, 71)[:, None]
    v *= 10.0 ** torch.linspace(-20, 18, 5)


def widely_spread(k, v):
    v *= 10.0 ** (6 * random(71, 5, seed=8))


# What is done to keys and values, and how many of the three chunks are summed token by token.
HOSTILE = {
    "nothing": (lambda k, v: None, 0),
    "1e4 undone later": (lambda k, v: undone(k, v, 10, 1e4), 1),
    "1e8 undone later": (lambda k, v: undone(k, v, 10, 1e8), 1),
    "1e8 undone at the next chunk's beginning": (lambda k, v: undone(k, v, 31, 1e8, 1), 1),
    "1e20 undone at once": (lambda k, v: undone(k, v, 0, 1e20, 1), 1),
    "1e20 nearly undone": (nearly_undone, 1),
    "every token undone": (every_token_undone, 3),
    "zeros": (zeros, 0),
    "1e-20": (lambda k, v: (k.mul_(1e-20), v.mul_(1e-10)), 0),
    "1e20": (lambda k, v: (k.mul_(1e20), v.mul_(1e18)), 0),
    "1e38": (lambda k, v: (k.mul_(1e37), v.mul_(1e37)), 0),
    "scales that grow": (scales, 0),
    "scales that fall": (lambda k, v: k.mul_(10.0 ** torch.linspace(15, 0, 71)[:, None]), 0),
    "widely spread": (widely_spread, 0),
    "keys with a large mean": (lambda k, v: k.mul_(0.05).add_(1), 0),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e30])
def test_causal_chunks_where_sums_cancel(case, size, error, monkeypatch):
    q, k, v = (random(1, 2, 71, dim, seed=dim).clone() for dim in (8, 8, 5))
    q = random(1, 2, 71, 8, seed=3) * size
    change, wanted = HOSTILE[case]
    change(k, v)
    inputs = [t.float().requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    turns, in_turn = [], _causal._in_turn
    monkeypatch.setattr(_causal, "_in_turn", lambda *x: turns.append(x) or in_turn(*x))
    recorded = _causal._recorded
    monkeypatch.setattr(_causal, "_recorded", None)  # not asked
    with torch.no_grad():
        assert error(xnorm(*inputs, causal=True), xnorm(*exact, causal=True, backend="reference")) < 1e-6
    assert len(turns) == wanted
    if wanted:
        monkeypatch.setattr(_causal, "_recorded", recorded)
    out, want = xnorm(*inputs, causal=True), xnorm(*exact, causal=True, backend="reference")
    weight = random(*out.shape, seed=9)
    grads = (
        torch.autograd.grad(out, inputs, weight.float()),
        torch.autograd.grad(want, exact, weight.float().double()),
    )
    for got, grad in zip(*grads, strict=True):
        # Where float32 holds it: at sizes of 1e-20 the gradient may exceed its range.
        inside = grad.abs().max() < 1e38 and grad.abs().max() > 1e-30
        assert not inside or case == "1e20 nearly undone" or error(got, grad) < 1e-5


@pytest.mark.parametrize(("keys", "values"), [(1e200, 1e-200), (1e-200, 1e200), (1e140, 1e60)])
def test_causal_squares_beyond_float64(keys, values, error, monkeypatch):
    """Keys or values whose squares, or those of whose products, float64 does not hold."""
    q, k, v = random(3, 1, 2, 40, 5).unbind(0)
    k, v, asked, recorded = k * keys, v * values, [], _causal._recorded
    monkeypatch.setattr(_causal, "_recorded", lambda *x: asked.append(x) or recorded(*x))
    want = xnorm(q, k / keys, v / values, causal=True, backend="reference")
    assert error(xnorm(q, k, v, causal=True), want) < 1e-12
    assert asked


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of forward mode itself
def test_causal_under_every_transformation(error):
    inputs, tangents = (
        tuple(random(3, 2, 3, 35, 5).unbind(0)),
        tuple(random(3, 2, 3, 35, 5, seed=1).unbind(0)),
    )

    def found(backend):
        def run(*x):
            return xnorm(*x, causal=True, backend=backend)

        with forward_ad.dual_level():
            dual = run(*map(forward_ad.make_dual, inputs, tangents))
            tangent = forward_ad.unpack_dual(dual).tangent
        mapped = torch.func.vmap(run)(*(torch.stack([x, -x.flip(2)]) for x in inputs))
        return tangent, torch.func.jvp(run, inputs, tangents)[1], mapped

    for got, want in zip(found("fused"), found("reference"), strict=True):
        assert error(got, want) < 1e-11


def test_causal_compiles_and_exports(error):
    class Causal(torch.nn.Module):
        def forward(self, q, k, v):
            return xnorm(q, k, v, causal=True)

    inputs = tuple(t.requires_grad_() for t in random(3, 1, 2, 20, 3).unbind(0))
    want = xnorm(*inputs, causal=True, backend="reference")
    torch.compiler.reset()
    compiled = torch.compile(Causal(), backend="aot_eager", fullgraph=True)(*inputs)
    assert error(compiled, want) < 1e-12
    grads = (torch.autograd.grad(y.square().sum(), inputs) for y in (compiled, want))
    for got, grad in zip(*grads, strict=True):
        assert error(got, grad) < 1e-10
    program = torch.export.export(Causal(), tuple(t.detach() for t in inputs))
    assert error(program.module()(*inputs), want) < 1e-12


def test_causal_images_and_projections_lie_apart(error):
    """Views of one projection, two images, and another width of the values."""
    qkv = random(2, 70, 3, 13).float()
    q, k, v = (t.transpose(1, 2) for t in qkv.split([5, 5, 3], -1))
    want = xnorm(q.double(), k.double(), v.double(), causal=True, backend="reference")
    assert error(xnorm(q, k, v, causal=True), want) < 1e-6


def test_steps_equal_the_causal_form(error):
    q, k, v = random(3, 2, 3, 40, 5, dtype=torch.float32).unbind(0)
    gamma = torch.tensor([0.5, -2.0, 3.0])
    want = xnorm(q.double(), k.double(), v.double(), gamma.double(), causal=True)
    state, outs = xnorm_init_state(2, 3, 5), []
    for i in range(40):
        out, state = xnorm_step(q[:, :, i], k[:, :, i], v[:, :, i], state, gamma)
        outs.append(out)
    assert error(torch.stack(outs, 2), want) < 2e-6
    assert error(xnorm(q, k, v, gamma, causal=True), want) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_and_gets_no_gradient(backend, causal, error):
    q, k, v = random(3, 2, 3, 11, 5).unbind(0)
    want = xnorm(q, k, v, causal=causal, backend=backend)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 11:] = False
    nan = torch.full((2, 3, 6, 5), float("nan")).double()
    padded = [torch.cat([t, nan], 2).requires_grad_() for t in (q, k, v)]
    got = xnorm(*padded, mask=mask, causal=causal, backend=backend)[:, :, :11]
    assert error(got, want) < 1e-12
    got.square().sum().backward()
    for t in padded:
        assert (t.grad[:, :, 11:] == 0).all()
        assert t.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_zeros_and_full_masks_stay_finite(backend, causal):
    q, k, v = random(3, 1, 2, 5, 3, dtype=torch.float32).unbind(0)
    zero_query, zero_channel = q.clone(), v.clone()
    zero_query[:, :, 2] = 0
    zero_channel[..., 1] = 0
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    for arguments, mask in (
        ((zero_query, k, zero_channel), None),
        ((q, 0 * k, v), None),
        ((q, k, v), nothing),
    ):
        leaves = [t.clone().requires_grad_() for t in arguments]
        out = xnorm(*leaves, mask=mask, causal=causal, backend=backend)
        out.sum().backward()
        assert out.isfinite().all()
        assert all(t.grad.isfinite().all() for t in leaves)
    assert (out == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [
        (torch.float16, 6e4, 1e-3),
        (torch.float16, 1e-4, 2e-3),
        (torch.bfloat16, 1e15, 8e-3),
        (torch.float32, 1e15, 1e-5),
        (torch.float32, 1e-3, 1e-5),
    ],
)
def test_extremes(dtype, size, tolerance, causal, error):
    q, k, v = (random(3, 1, 2, 700, 5).clamp(-1, 1) * size).to(dtype).unbind(0)
    want = xnorm(q.double(), k.double(), v.double(), causal=causal, backend="reference")
    assert error(xnorm(q, k, v, causal=causal), want) < tolerance


def test_squares_and_products_beyond_float32(error):
    q, k, v = (random(3, 1, 2, 70, 5) * 1e30).float().unbind(0)
    want = xnorm(q.double(), k.double(), v.double())
    assert error(xnorm(q, k, v), want) < 1e-5
    compiled = torch.compile(lambda *t: xnorm(*t), backend="eager", fullgraph=True)
    assert error(compiled(q, k, v), want) < 1e-5


def test_gamma_is_refused_when_it_does_not_fit():
    q, k, v = random(3, 1, 2, 5, 3).unbind(0)
    with pytest.raises(ValueError, match=r"gamma must have shape \(2\), got \(3,\)"):
        xnorm(q, k, v, torch.ones(3).double())
    with pytest.raises(TypeError, match="gamma must be floating point"):
        xnorm(q, k, v, torch.ones(2, dtype=torch.int64))
