"""SOFT against the published outputs, its own laws, and the extremes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sansmax.ops.soft import flops, fused, newton_inverse, soft
from sansmax.ops.soft.fused import gaussian

BACKENDS = ("reference", "fused")
INVERSES = ("plain", "release2021", "norm", "solve")
GOLDEN = {
    "soft_attention_plain": "plain",
    "soft_attention_norm": "norm",
    "soft_attention_2021": "release2021",
    "soft_attention_plain_smooth": "plain",
    "soft_attention_norm_smooth": "norm",
}


def kernel(x, y):
    return torch.exp(-(x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) / 2)


def kernel_matrices(*shape, dim=7, spread=0.5, seed=0):
    """Kernel matrices (*shape, m, m); a smaller spread makes them worse conditioned."""
    x = torch.randn(*shape, dim, generator=torch.Generator().manual_seed(seed)).double() * spread
    return kernel(x, x)


def inputs(batch=2, heads=3, tokens=13, dim=5, value_dim=7, landmarks=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, dim), (tokens, value_dim), (landmarks, dim))
    return [torch.randn(batch, heads, *s, generator=generator).double() * dim**-0.25 for s in shapes]


def literal_norm(a, iterations):
    """The published loop, with its search over data."""
    identity, alpha = torch.eye(a.shape[-1]).double(), 2 / a.sum(-1).max() ** 2
    v, halvings = alpha * a, 0
    while halvings < 10 and (identity - a @ v).abs().sum(-2).max() > 1.01:
        alpha, halvings = alpha / 2, halvings + 1
        v = alpha * a
    for _ in range(iterations):
        v = 2 * v - v @ a @ v
    return v, halvings


@pytest.mark.parametrize("name", ["A_well", "A_ill", "A_special"])
@pytest.mark.parametrize("inverse", ["plain", "norm", "release2021"])
def test_golden_newton(golden, error, inverse, name):
    case = golden("soft/soft_newton_plain" if inverse == "plain" else "soft/soft_newton_norm")
    a = case.inputs()[name]
    for iterations in (0, 1, 6, 20):
        want = case.outputs[f"{name}.it{iterations}"]
        assert error(newton_inverse(a, inverse=inverse, iterations=iterations), want) < 1e-9
        assert error(newton_inverse(a.float(), inverse=inverse, iterations=iterations), want) < 5e-5
    if name == "A_special" and inverse == "norm":
        want = case.outputs["A_special.one_at_a_time.it20"]
        alone = torch.cat([newton_inverse(m, inverse=inverse) for m in a.split(1, dim=1)], dim=1)
        assert error(alone, want) < 1e-9
        assert (alone[0, 0] == 0).all()


def test_golden_squared_distance(golden, error):
    case = golden("soft/soft_squared_distance")
    q, k, weight = (case.inputs()[name] for name in "qkg")
    q.requires_grad_(), k.requires_grad_()
    distance = gaussian(q, k.mT).log() * -2
    assert error(distance, case.outputs["dist"]) < 1e-9
    (distance * weight).sum().backward()
    assert error(q.grad, case.outputs["grad_q"]) < 1e-9
    assert error(k.grad, case.outputs["grad_k"]) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_attention(golden, error, name, backend):
    case, inverse = golden(f"soft/{name}"), GOLDEN[name]
    state, x = case.state_dict(), case.inputs()["x"]
    rows, columns, ratio = (case.config[key] for key in ("H", "W", "ratio"))
    q, v = (
        F.linear(x, state[f"{n}.weight"], state[f"{n}.bias"]).unflatten(-1, (2, 32)).transpose(1, 2)
        for n in ("W_q", "W_v")
    )
    q = q / 32**0.25
    image = q.mT.reshape(-1, 32, rows, columns)
    landmarks = F.conv2d(image, state["attn.Qlandmark_op.weight"], stride=ratio).flatten(2).mT
    weights = (state[f"attn.Qnorm_act.0.{key}"] for key in ("weight", "bias"))
    landmarks = F.gelu(F.layer_norm(landmarks, (32,), *weights)).unflatten(0, (2, 2))
    assert error(landmarks, case.outputs["landmarks"]) < 1e-9
    a = gaussian(landmarks, landmarks.clone())
    assert error(a, case.outputs["A"]) < 1e-9
    assert error(gaussian(q, landmarks)[:1], case.outputs["P_item0"]) < 1e-9
    z = newton_inverse(a, inverse=inverse)
    assert error(z, case.outputs["A_inv"]) < 1e-9
    if inverse == "norm":
        scale = a.sum(-1).rsqrt()
        z = scale[..., None] * z * scale[..., None, :]
        assert error(z, case.outputs["A_inv_normalized"]) < 1e-9
    attention = soft(q, v, landmarks, inverse=inverse, backend=backend)
    assert error(attention, case.outputs["attn"]) < 1e-9
    width = case.config["conv_size"]
    convolved = F.conv2d(
        v.permute(0, 3, 1, 2).reshape(-1, 2, rows, columns),
        state["attn.conv.weight"],
        padding=width // 2,
        groups=2,
    )
    convolved = convolved.unflatten(0, (2, 32)).flatten(3).permute(0, 2, 3, 1)
    merged = (attention + convolved).transpose(1, 2).flatten(2)
    assert error(F.linear(merged, state["ff.weight"], state["ff.bias"]), case.outputs["out"]) < 1e-9
    in_float32 = soft(q.float(), v.float(), landmarks.float(), inverse=inverse, backend=backend)
    assert error(in_float32, case.outputs["attn"]) < 5e-5


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize(("tokens", "landmarks"), [(1, 1), (1, 5), (3, 11), (7, 1), (13, 4)])
def test_fused_equals_the_equation(tokens, landmarks, inverse, error):
    q, v, m = inputs(tokens=tokens, landmarks=landmarks)
    k1, a = kernel(q, m), kernel(m, m)
    ridge = 0.01 * torch.eye(landmarks) if inverse in ("plain", "solve") else 0
    z = torch.linalg.inv(a + ridge)
    if inverse == "norm":
        z = z / (a.sum(-1)[..., None] * a.sum(-2)[..., None, :]).sqrt()
    want = k1 @ z @ k1.mT @ v
    for backend in BACKENDS:
        # 40 steps without a ridge, one step size for each matrix: all are converged
        got = soft(q, v, m, inverse=inverse, iterations=40, batchwise=False, backend=backend)
        assert error(got, want) < 1e-9
    for batchwise in (False, True):
        want = soft(q, v, m, inverse=inverse, batchwise=batchwise, backend="reference")
        got = soft(q, v, m, inverse=inverse, batchwise=batchwise, backend="fused")
        assert error(got, want) < 1e-9


@pytest.mark.parametrize("inverse", ["plain", "solve"])
def test_backward_is_the_gradient_of_a_true_inverse(inverse, error):
    a = kernel_matrices(2, 3, 11, spread=0.03).requires_grad_()
    v = newton_inverse(a, inverse=inverse)
    weight = torch.randn(v.shape).double()
    (got,) = torch.autograd.grad(v, a, weight)
    v = v.detach()
    assert error(got, -v.mT @ weight @ v.mT) < 1e-12
    if inverse == "plain":  # not converged, so that the steps themselves have another gradient
        identity, r = 0.01 * torch.eye(11).double(), a.detach().sum(-1).amax(-1)[..., None, None]
        steps = 1.8 / r**2 * (a + identity)
        for _ in range(20):
            steps = 2 * steps - steps @ (a + identity) @ steps
        assert error(steps, v) < 1e-9
        (unrolled,) = torch.autograd.grad(steps, a, weight)
        assert error(got, unrolled) > 0.1


@pytest.mark.parametrize("batchwise", [False, True])
@pytest.mark.parametrize("inverse", INVERSES)
def test_gradients_of_a_converged_inverse(inverse, batchwise):
    a = kernel_matrices(1, 2, 3, spread=0.8).requires_grad_()

    def inverted(a):
        a = (a + a.mT) / 2  # Cholesky reads one triangle
        return newton_inverse(a, inverse=inverse, iterations=25, batchwise=batchwise)

    assert torch.autograd.gradcheck(inverted, a)
    assert torch.autograd.gradgradcheck(inverted, a)


@pytest.mark.parametrize("spread", [3.0, 0.8, 0.3, 0.1, 0.03, 0.0])
def test_norm_equals_the_published_loop(spread, error):
    a = kernel_matrices(2, 3, 12, spread=spread, seed=3).requires_grad_()
    want, halvings = literal_norm(a, 12)
    assert halvings == {3.0: 0, 0.8: 7, 0.1: 8}.get(spread, halvings)
    got = newton_inverse(a, inverse="norm", iterations=12)
    assert error(got, want) < 1e-11
    weight = torch.randn(a.shape).double()
    (want_grad,) = torch.autograd.grad(want, a, weight)
    (got_grad,) = torch.autograd.grad(got, a, weight)
    assert error(got_grad, want_grad) < 1e-9


@pytest.mark.parametrize("inverse", INVERSES)
def test_batch_mates(inverse, error):
    q, v, m = inputs(batch=3)
    m[1] = m[1] * 0.01  # an image whose landmarks nearly coincide
    whole = soft(q, v, m, inverse=inverse, batchwise=False)
    alone = soft(q[2:], v[2:], m[2:], inverse=inverse, batchwise=False)
    assert error(whole[2:], alone) < 1e-12
    assert error(soft(q[1:], v[1:], m[1:], inverse=inverse), whole[1:]) < 1e-12 or inverse not in (
        "plain",
        "solve",
    )
    if inverse in ("norm", "release2021"):
        identity = torch.eye(5).double().expand(1, 1, 5, 5)
        assert (newton_inverse(identity, inverse=inverse) == 0).all()
        assert error(newton_inverse(identity, inverse=inverse, batchwise=False), identity) < 1e-12
        published = soft(q, v, m, inverse=inverse, iterations=8)
        assert error(published[2:], soft(q[2:], v[2:], m[2:], inverse=inverse, iterations=8)) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing_and_gets_no_gradient(backend, error):
    q, v, m = inputs(tokens=11)
    want = soft(q, v, m, backend=backend)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 3:9] = False

    def padded(t):
        hole = torch.full_like(t[:, :, :6], float("nan"))
        return torch.cat([t[:, :, :3], hole, t[:, :, 3:]], 2).requires_grad_()

    q, v, m = padded(q), padded(v), m.requires_grad_()
    got = soft(q, v, m, mask=mask, backend=backend)
    assert error(got[:, :, mask[0]], want) < 1e-12
    assert (got[:, :, 3:9] == 0).all()
    got.square().sum().backward()
    for t in (q, v):
        assert (t.grad[:, :, 3:9] == 0).all()
        assert t.grad.isfinite().all()
        assert (t.grad[:, :, :3] != 0).any()
    assert m.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inverse", INVERSES)
def test_everything_masked_is_zero(inverse, backend):
    q, v, m = (t.requires_grad_() for t in inputs())
    out = soft(q, v, m, inverse=inverse, mask=torch.zeros(2, 13, dtype=torch.bool), backend=backend)
    out.sum().backward()
    assert (out == 0).all()
    assert all((t.grad == 0).all() for t in (q, v, m))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inverse", ["plain", "solve"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 6e4),  # |q|^2 leaves float16
        (torch.bfloat16, 30.0),  # distances in bfloat16 would give exp(9e6)
        (torch.bfloat16, 3e38),
        (torch.float32, 3e38),  # |q|^2, and differences, leave float32
        (torch.float32, 1e-30),
        (torch.float32, 0.0),
    ],
)
def test_extremes(dtype, size, inverse, backend, error):
    q, v, m = inputs(tokens=50, landmarks=6)
    q, m = (t.clamp(-1, 1).mul(size).to(dtype).requires_grad_() for t in (q, m))
    v = v.to(dtype).requires_grad_()
    out = soft(q, v, m, inverse=inverse, backend=backend)
    assert out.dtype == dtype
    want = soft(q.double(), v.double(), m.double(), inverse=inverse, backend="reference")
    assert (out - want).abs().max() < (2 * torch.finfo(dtype).eps + 5e-5) * want.abs().max() + 1e-30
    if backend == "fused" or size < 1e38:
        out.float().square().sum().backward()
        assert all(t.grad.isfinite().all() for t in (q, v, m))


@pytest.mark.parametrize("inverse", INVERSES)
def test_300_equal_landmarks(inverse, error):
    """R^2 = 9e4 leaves float16, and A has rank 1."""
    q, v, m = (t.half() for t in inputs(batch=1, heads=1, landmarks=1))
    m = m.expand(-1, -1, 300, -1)
    want = soft(q.double(), v.double(), m.double(), inverse=inverse, backend="reference")
    assert want.abs().max() > 1e-3
    for backend in BACKENDS:
        assert error(soft(q, v, m, inverse=inverse, backend=backend), want) < 1e-3
        assert error(soft(q.float(), v.float(), m.float(), inverse=inverse, backend=backend), want) < 5e-5


def test_a_common_offset_costs_no_precision(error):
    q, v, m = (t.float() for t in inputs(tokens=40))
    q, m = ((t * 256).round() / 256 for t in (q, m))  # so that the offset rounds nothing away
    want = soft(q.double(), v.double(), m.double(), backend="reference")
    moved = [(t + 4096).requires_grad_() for t in (q, m)]
    out = soft(moved[0], v, moved[1])
    assert error(out, want) < 1e-5
    exact = [t.detach().double().requires_grad_() for t in moved]
    out.square().sum().backward()
    soft(exact[0], v.double(), exact[1], backend="reference").square().sum().backward()
    for got, correct in zip(moved, exact, strict=True):
        assert error(got.grad, correct.grad) < 1e-5


def test_the_diagonal_of_a_is_one(monkeypatch):
    seen = []
    monkeypatch.setattr(fused, "landmark_inverse", lambda a, *_: seen.append(a) or a)
    q, v, m = (t.float() for t in inputs(landmarks=30))
    soft(q, v, m * 1000)
    assert (seen[0] == torch.eye(30)).all()


def test_reduced_float32_products_do_not_reach_the_inverse(error):
    a = kernel_matrices(2, 30, spread=0.05).float()
    want = newton_inverse(a.double())
    default = error(newton_inverse(a), want)
    torch.set_float32_matmul_precision("medium")
    try:
        got = newton_inverse(a)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert got.dtype == torch.float32
    assert error(got, want) < 1.2e-7 < default


def test_autocast_keeps_float32_islands(error):
    q, v, m = (t.float() for t in inputs(tokens=40))
    a = kernel_matrices(2, 9).float().requires_grad_()
    want = soft(q, v, m)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in BACKENDS:
            assert error(soft(q, v, m, backend=backend), want) < 1e-6
        inverse = newton_inverse(a)
        assert inverse.dtype == torch.float32
        inverse.sum().backward()
    exact = a.detach().double().requires_grad_()
    newton_inverse(exact).sum().backward()
    assert error(a.grad, exact.grad) < 1e-3


def test_strided_views(error):
    q, v, m = inputs()
    views = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, v)]
    want = soft(q.requires_grad_(), v.requires_grad_(), m)
    out = soft(*views, m)
    assert error(out, want) < 1e-12
    out.square().sum().backward()
    want.square().sum().backward()
    assert error(views[0].grad, q.grad) < 1e-12
    assert error(views[1].grad, v.grad) < 1e-12


@pytest.mark.parametrize("inverse", ["plain", "norm", "solve"])
def test_compiles_with_its_backward_for_any_length(inverse, error):
    torch.compiler.reset()

    def masked(q, v, m, mask):
        return soft(q, v, m, inverse=inverse, iterations=2, mask=mask)

    compiled = torch.compile(masked, backend="aot_eager", fullgraph=True)
    for tokens in (16, 25):
        leaves = [t.requires_grad_() for t in inputs(tokens=tokens)]
        mask = torch.arange(tokens).expand(2, -1) != 3
        out, want = compiled(*leaves, mask), masked(*leaves, mask)
        assert error(out, want) < 1e-11
        for got, correct in zip(
            torch.autograd.grad(out.square().sum(), leaves),
            torch.autograd.grad(want.square().sum(), leaves),
            strict=True,
        ):
            assert error(got, correct) < 1e-10


@pytest.mark.parametrize("inverse", ["norm", "solve"])
def test_exports(inverse, error):
    class Wrapped(torch.nn.Module):
        def forward(self, q, v, m):
            return soft(q, v, m, inverse=inverse)

    tokens = torch.export.Dim("tokens", min=2, max=99)
    program = torch.export.export(
        Wrapped(), tuple(inputs(tokens=16)), dynamic_shapes=({2: tokens}, {2: tokens}, None)
    )
    other = inputs(tokens=23)
    assert error(program.module()(*other), soft(*other, inverse=inverse)) < 1e-10


def test_one_kernel_matrix_is_kept_for_the_backward_pass():
    q, v, m = (t.requires_grad_() for t in inputs(tokens=301, dim=3, value_dim=5, landmarks=40))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        soft(q, v, m)
    assert sum(t.numel() >= 301 * 40 for t in kept.values()) == 1


@pytest.mark.parametrize("inverse", ["plain", "norm"])
def test_flops(inverse):
    def count(tokens):
        with FlopCounterMode(display=False) as counter:
            soft(*inputs(tokens=tokens), inverse=inverse, iterations=9, batchwise=False)
        return counter.get_total_flops()

    assert count(13) == flops(2, 3, 13, 5, 7, 4, inverse=inverse, iterations=9)
    assert count(400) - count(300) == count(300) - count(200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(inverse="solv"), "expected one of plain, release2021, norm, solve; did you mean 'solve'"),
        (dict(iterations=-1), "soft: iterations must be an int >= 0, got -1"),
        (dict(iterations=2.5), "soft: iterations must be an int >= 0, got 2.5"),
        (dict(backend="triton"), "cpu tensors have no kernel|float64 has no kernel"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), r"mask must have shape \(B, M\) = \(2, 13\)"),
        (dict(v=torch.randn(2, 3, 12, 7).double()), r"v must have shape \(2, 3, 13, E\).*are one"),
        (dict(landmarks=torch.randn(2, 3, 4, 6).double()), r"landmarks must have shape \(2, 3, m, 5\)"),
        (dict(q=torch.randn(2, 13, 5).double()), r"q must have shape \(B, H, N, D\)"),
    ],
)
def test_refusals_with_a_value_error(change, message):
    arguments = dict(zip(("q", "v", "landmarks"), inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        soft(arguments.pop("q"), arguments.pop("v"), arguments.pop("landmarks"), **arguments)


def test_more_refusals():
    q, v, m = inputs()
    with pytest.raises(TypeError, match=r"landmarks must have the dtype of q"):
        soft(q, v, m.float())
    with pytest.raises(TypeError, match=r"mask must be a bool tensor"):
        soft(q, v, m, mask=torch.ones(2, 13))
    with pytest.raises(TypeError, match=r"a must be floating point, got torch.int64"):
        newton_inverse(torch.eye(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"a must have shape \(\.\.\., m, m\), got \(3, 4\)"):
        newton_inverse(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"inverses of newton_inverse: expected one of plain"):
        newton_inverse(torch.eye(3), inverse="pinv")
