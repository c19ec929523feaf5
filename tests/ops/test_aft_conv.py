"""AFT-conv against its literal equation, its own laws, and the extremes."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sansmax.ops._depthwise import depthwise
from sansmax.ops.aft.conv import (
    aft_conv,
    aft_conv_init_state,
    aft_conv_step,
    example,
    flops,
    fused,
    reparameterize,
)

BACKENDS = ("reference", "fused")
both = pytest.mark.parametrize("backend", BACKENDS)

# name -> tokens, kernel sizes, keywords; two batches of 3 heads with 2 channels each
FORMS = {
    "sequence": (13, (5,), {}),
    "sequence behind a prefix": (13, (3,), {"prefix_tokens": 2}),
    "long sequence": (263, (3,), {}),  # beyond the 0/1 matrices
    "causal": (13, (4,), {"causal": True}),
    "causal, many taps": (71, (35,), {"causal": True}),
    "causal, kernel longer than the sequence": (3, (7,), {"causal": True}),
    "grid": (35, (3, 3), {"grid": (5, 7)}),
    "grid behind a prefix": (36, (5, 5), {"grid": (5, 7), "prefix_tokens": 1}),
    "kernel larger than the grid": (6, (7, 7), {"grid": (2, 3)}),
    "one row": (11, (3, 3), {"grid": (1, 11)}),
    "one column": (11, (5, 5), {"grid": (11, 1)}),
    "one token": (1, (3, 3), {"grid": (1, 1)}),
}
each_form = pytest.mark.parametrize("form", FORMS)


def draw(form, dtype=torch.float64, keys=1.0, biases=1.0, seed=0):
    """(q, k, v, w) with keys and biases of the given spread, and the keywords of the form."""
    tokens, sizes, options = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, tokens, 6), (2, tokens, 3), (2, tokens, 6), (3, *sizes))
    q, k, v, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    # Multiples of 1/8, so that sums of large keys and biases are exact in float32 too.
    k, w = ((x * spread * 8).round() / 8 for x, spread in ((k, keys), (w, biases)))
    return tuple(x.to(dtype) for x in (q, k, v, w)), options


def literal(q, k, v, w, grid=None, causal=False, prefix_tokens=0):
    """Eq. 2 in float64 with the bias of each pair of positions looked up one by one."""
    q, k, v, w = (x.double() for x in (q, k, v, w))
    tokens = q.shape[1]
    w = w if w.ndim == 3 else w[:, None]
    columns = grid[1] if grid else tokens - prefix_tokens
    bias = torch.zeros(w.shape[0], tokens, tokens, dtype=torch.float64)
    for t in range(prefix_tokens, tokens):
        for u in range(prefix_tokens, tokens):
            (row, column), (row_u, column_u) = (divmod(x - prefix_tokens, columns) for x in (t, u))
            i = row_u - row + w.shape[1] // 2
            j = column_u - column + (w.shape[2] - 1 if causal else w.shape[2] // 2)
            if 0 <= i < w.shape[1] and 0 <= j < w.shape[2]:
                bias[:, t, u] = w[:, i, j]
    if causal:
        bias += torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    weights = (k.mT[:, :, None] + bias).softmax(-1).unsqueeze(-1)  # (B, H, T, T, 1)
    values = v.unflatten(-1, (w.shape[0], -1)).transpose(1, 2)[:, :, None]
    return q.sigmoid() * (weights * values).sum(3).transpose(1, 2).flatten(2)


@both
@pytest.mark.parametrize(
    "name",
    [
        *(f"conv1d_{case}" for case in ("h2_k3", "h4_k5", "h2_k4_causal", "h4_k3_causal")),
        *(f"conv1d_{case}" for case in ("cancel", "cancel_mild", "extreme")),
        *(f"conv1d_{case}_causal" for case in ("cancel", "cancel_mild", "extreme")),
        *(f"conv2d_{case}" for case in ("h2_k3_4x5", "h3_k7_4x5", "h6_k5_5x4", "init")),
        *(f"conv2d_{case}" for case in ("reparam_biased", "reparam_unbiased")),
        *(f"conv2d_{case}" for case in ("cancel", "cancel_mild", "extreme")),
    ],
)
def test_golden(golden, error, name, backend):
    case = golden(f"aft/aft_{name}")

    def run(dtype):
        inputs = {key: value.to(dtype) for key, value in case.inputs().items()}
        if "w_raw" in inputs:
            unbiased = case.config["std"] == "unbiased"
            inputs["w"] = reparameterize(inputs["w_raw"], inputs["gamma"], inputs["beta"], unbiased=unbiased)
        q, k, v = (inputs[key].flatten(1, -2) for key in "qkv")
        options = {"grid": case.config.get("grid"), "causal": case.config["causal"]}
        return aft_conv(q, k, v, inputs["w"], **options, backend=backend).view_as(inputs["q"])

    assert error(run(torch.float64), case.outputs["out"]) < 1e-9
    assert error(run(torch.float32), case.outputs["out"]) < 5e-6
    for dtype in (torch.bfloat16, torch.float16):
        assert run(dtype).isfinite().all()


@each_form
@both
def test_literal_equation(form, backend, error):
    inputs, options = draw(form)
    assert error(aft_conv(*inputs, **options, backend=backend), literal(*inputs, **options)) < 1e-12


@each_form
def test_reference_in_several_parts(form, error, monkeypatch):
    inputs, options = draw(form)
    inputs = [x.requires_grad_() for x in inputs]
    out = aft_conv(*inputs, **options, backend="reference")
    monkeypatch.setattr("sansmax.ops.aft.conv._REFERENCE_ENTRIES", 2 * 3 * inputs[0].shape[1] * 5)
    parts = aft_conv(*inputs, **options, backend="reference")
    assert error(parts, out) < 1e-14
    for got, want in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (parts, out)), strict=True):
        assert error(got, want) < 1e-12


@both
@each_form
def test_random_extremes_in_float32(form, backend, error):
    if form == "long sequence":
        pytest.skip("the literal equation is slow; scans are tested in test_aft_triple")
    for seed in range(8):
        keys, biases = (1, 30, 300, 3000)[seed % 4], (0, 5, 80, 1000)[(seed + seed // 4) % 4]
        inputs, options = draw(form, torch.float32, keys, biases, seed)
        got = aft_conv(*inputs, **options, backend=backend)
        assert error(got, literal(*inputs, **options)) < 2e-6


def branches(inputs, options):
    """Which of Eq. 6, the positive form, the causal sums and the regions the fused form takes."""
    taken = []

    def spy(name):
        function = getattr(fused, name)

        def wrapped(*args, **kwargs):
            taken.append("eq6" if name == "_by_convolution" and args[-1] is None else name)
            return function(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_by_convolution", "_causal_sums", "by_regions"):
            patch.setattr(fused, name, spy(name))
        out = aft_conv(*inputs, **options, backend="fused")
    return out, taken


@pytest.mark.parametrize(
    ("key", "bias", "want"),
    [
        (0.0, 0.0, ["eq6"]),
        (20.0, -3.0, ["eq6"]),  # where Eq. 6 is at its worst
        (20.0, -5.0, ["_by_convolution"]),
        (55.0, -55.0, ["_by_convolution"]),  # where sums are at their smallest
        (80.0, -80.0, ["_by_convolution", "by_regions"]),
        (0.0, 80.0, ["_by_convolution", "by_regions"]),
    ],
)
def test_each_branch_is_exact_up_to_its_border(key, bias, want, error):
    """One large key under biases that hide it from the tokens around it."""
    inputs, options = draw("grid behind a prefix", torch.float32, biases=0.0)
    _, k, _, w = inputs
    k[:, 17], w[:] = key, bias
    for tensor in inputs:
        tensor.requires_grad_()
    out, taken = branches(inputs, options)
    assert taken == want
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = literal(*exact, **options)
    assert error(out, expected) < 5e-6
    grads = [
        torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), x)])
        for y, x in ((out, inputs), (expected, exact))
    ]
    assert error(*grads) < 1e-5


@pytest.mark.parametrize(
    ("key", "bias", "size", "want"),
    [
        (0.0, 0.0, 1.0, ["_causal_sums"] * 2),
        (20.0, -19.0, 1.0, ["_causal_sums"] * 2),  # where Eq. 6 has nothing left
        (20.0, 19.0, 1.0, ["_causal_sums"] * 2),
        (-20.0, -19.0, 1.0, ["_causal_sums"] * 2),  # where sums are at their smallest
        (-20.0, 19.0, 1.0, ["_causal_sums"] * 2),
        (20.0, 19.0, 1e30, ["_causal_sums", "by_regions"]),
        (20.0, -21.0, 1.0, ["by_regions"]),
        (-41.0, 0.0, 1.0, ["by_regions"]),
        (0.0, 80.0, 1.0, ["by_regions"]),
    ],
)
@pytest.mark.parametrize("tokens", [2, 9, 71])
def test_each_causal_branch_is_exact_up_to_its_border(tokens, key, bias, size, want, error):
    """One key, the only one of the first row, that the biases hide, or lift, for as long as it is near."""
    (q, k, v, _), options = draw("causal, many taps", torch.float32, keys=0.0)
    inputs = [q[:, :tokens].clone(), k[:, :tokens].clone(), v[:, :tokens].clone() * size, torch.zeros(3, 9)]
    inputs[1][:, 0], inputs[3][:] = key, bias
    for tensor in inputs:
        tensor.requires_grad_()
    with torch.no_grad():
        closed, _ = branches(inputs, options)
    out, taken = branches(inputs, options)
    assert taken == want
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = literal(*exact, **options)
    assert error(closed, expected) < 1e-6
    assert error(out, expected) < 1e-6
    grads = [
        torch.cat([g.flatten() for g in torch.autograd.grad((y / size).square().sum(), x)])
        for y, x in ((out, inputs), (expected, exact))
    ]
    assert error(*grads) < 2e-6


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of forward mode itself
def test_causal_under_each_way_to_differentiate(error):
    inputs, options = draw("causal")
    inputs, tangents = (
        tuple(x[:1, :9] if x.ndim == 3 else x for x in xs) for xs in (inputs, draw("causal", seed=1)[0])
    )
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert branches(leaves, options)[1] == ["_causal_sums"] * 2
    assert torch.autograd.gradgradcheck(lambda *x: aft_conv(*x, **options), leaves, fast_mode=True)

    def found(backend):
        def run(*x):
            return aft_conv(*x, **options, backend=backend)

        mapped = torch.func.vmap(run, in_dims=(0, 0, 0, None))(
            *(torch.stack([x, -x]) for x in inputs[:3]), inputs[3]
        )
        with forward_ad.dual_level():
            dual = run(*map(forward_ad.make_dual, inputs, tangents))
            tangent = forward_ad.unpack_dual(dual).tangent
        return mapped, tangent, torch.func.jvp(run, inputs, tangents)[1]

    for got, want in zip(found("fused"), found("reference"), strict=True):
        assert error(got, want) < 1e-12


def test_a_masked_image_does_not_change_the_branch(error):
    inputs, options = draw("grid", torch.float32, biases=2.0, seed=3)
    mask = torch.ones(2, 35, dtype=torch.bool)
    mask[0] = False
    out, taken = branches(inputs, options | {"mask": mask})
    assert taken == ["_by_convolution"]
    assert (out[0] == 0).all()
    assert error(out[1:], literal(*(x[1:] for x in inputs[:3]), inputs[3], **options)) < 1e-6


@both
@pytest.mark.parametrize("key", [35.0, 300.0])
def test_a_future_key_changes_no_earlier_row(backend, key, error):
    (q, k, v, w), options = draw("causal", torch.float32)
    want = aft_conv(q, k, v, w, **options, backend=backend)
    k[:, 9:], v[:, 9:] = key, -7
    got = aft_conv(q, k, v, w, **options, backend=backend)
    if (
        key == 300 and backend == "fused"
    ):  # beyond 40 keys and biases are summed in another way: within rounding
        assert error(got[:, :9], want[:, :9]) < 1e-6
    else:
        assert torch.equal(got[:, :9], want[:, :9])
    assert not torch.equal(got[:, 9:], want[:, 9:])


@both
def test_without_bias_it_is_the_global_average(backend, error):
    (q, k, v, w), options = draw("grid")
    mean = (k.softmax(1)[..., None] * v.unflatten(-1, (3, 2))).sum(1, keepdim=True).flatten(2)
    assert error(aft_conv(q, k, v, 0 * w, **options, backend=backend), q.sigmoid() * mean) < 1e-12


@both
@pytest.mark.parametrize("biases", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("form", ["sequence behind a prefix", "causal", "grid behind a prefix"])
def test_a_masked_token_is_not_there(form, biases, backend, error):
    (q, k, v, w), options = draw(form, biases=biases, keys=biases)
    mask = torch.rand(2, q.shape[1], generator=torch.Generator().manual_seed(4)) > 0.4
    mask[1] = False
    poisoned = [x.masked_fill(~mask[..., None], float("nan")).requires_grad_() for x in (k, v)]
    out = aft_conv(q, *poisoned, w, **options, mask=mask, backend=backend)
    assert (out[1] == 0).all()
    absent = k.masked_fill(~mask[..., None], -1e5)
    rows = mask[0].cumsum(0) > 0 if options.get("causal") else slice(None)
    want = literal(q[:1], absent[:1], v[:1], w, **options)
    assert error(out[:1, rows], want[:, rows]) < 1e-12
    for grad in torch.autograd.grad(out.square().sum(), poisoned):
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()
        assert (grad[mask] != 0).any()


@both
@pytest.mark.parametrize(
    ("form", "biases"),
    [("one row", 1.0), ("one row", 4.0), ("kernel larger than the grid", 1.0), ("causal", 1.0)],
)
def test_gradcheck(form, biases, backend):
    inputs, options = draw(form, biases=biases)
    inputs = [x[:1, :5] if x.ndim == 3 and x.shape[0] == 2 else x for x in inputs]
    options = options | ({"grid": (1, 5)} if "grid" in options else {})
    inputs = [x.clone().requires_grad_() for x in inputs]
    check = torch.autograd.gradcheck
    assert check(lambda *x: aft_conv(*x, **options, backend=backend), inputs, fast_mode=True)


def test_gradcheck_of_the_regions():
    inputs, options = draw("grid behind a prefix", keys=80.0)
    inputs[3][:] -= 80
    inputs = [x.requires_grad_() for x in inputs]
    assert branches(inputs, options)[1][-1] == "by_regions"
    assert torch.autograd.gradcheck(lambda *x: aft_conv(*x, **options), inputs, fast_mode=True)


@each_form
@pytest.mark.parametrize(("keys", "biases"), [(1.0, 0.5), (5.0, 5.0), (300.0, 80.0)])
def test_gradients_in_float32_equal_the_reference_in_float64(form, keys, biases, error):
    values, options = draw(form, torch.float32, keys, biases, seed=6)
    cotangent = draw(form, seed=7)[0][0]

    def gradients(dtype, backend):
        inputs = [x.to(dtype).requires_grad_() for x in values]
        out = aft_conv(*inputs, **options, backend=backend)
        return torch.cat([g.flatten() for g in torch.autograd.grad(out, inputs, cotangent.to(dtype))])

    assert error(gradients(torch.float32, "fused"), gradients(torch.float64, "reference")) < 1e-5


@pytest.mark.parametrize(("sizes", "padding"), [((5, 5), None), ((1, 26), (0, 25)), ((4, 7), (1, 6))])
def test_second_gradients_of_the_own_convolution(sizes, padding):
    torch.manual_seed(0)
    cells, kernel = torch.randn(1, 3, 4, 2).double(), torch.randn(2, 1, *sizes).double()
    inputs = (cells.requires_grad_(), kernel.requires_grad_(), padding)
    assert torch.autograd.gradcheck(depthwise, inputs)
    assert torch.autograd.gradgradcheck(depthwise, inputs, fast_mode=True)


@pytest.mark.parametrize(("keys", "biases"), [(1.0, 1.0), (300.0, 80.0)])
@pytest.mark.parametrize("form", ["causal", "causal, many taps", "causal, kernel longer than the sequence"])
def test_steps_equal_the_causal_form(form, keys, biases, error):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        (q, k, v, w), options = draw(form, dtype, keys, biases)
        state = aft_conv_init_state(2, 6, 3, w.shape[1], dtype=torch.promote_types(dtype, torch.float32))
        outs = []
        for t in range(q.shape[1]):
            out, state = aft_conv_step(q[:, t], k[:, t], v[:, t], w, state)
            outs.append(out)
        want = aft_conv(q, k, v, w, **options, backend="reference")
        assert outs[0].dtype == dtype
        assert error(torch.stack(outs, 1), want) < 8 * torch.finfo(dtype).eps


@both
@pytest.mark.parametrize("form", ["sequence", "causal", "grid behind a prefix"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_its_limits(form, dtype, backend, error):
    (q, k, v, w), options = draw(form, dtype)
    largest = torch.finfo(torch.float16).max
    k[:, 5], v[:, ::3], q[:, ::2], w[1] = largest, -largest, -largest, -largest
    got = aft_conv(q, k, v, w, **options, backend=backend)
    assert error(got, literal(q, k, v, w, **options)) < 2 * torch.finfo(dtype).eps


@both
def test_views_of_one_projection_and_a_float32_kernel(backend, error):
    torch.manual_seed(8)
    joined, w = torch.randn(2, 35, 6 + 3 + 6).bfloat16(), torch.randn(3, 3, 3)
    q, k, v = joined.split([6, 3, 6], -1)
    got = aft_conv(q, k, v, w, grid=(5, 7), backend=backend)
    assert got.dtype == torch.bfloat16
    assert error(got, literal(q, k, v, w, grid=(5, 7))) < 1e-2


def test_one_graph_decides_at_run_time(error):
    """The branch is in the graph: the same one serves gentle inputs and ones whose sums underflow."""
    compiled = torch.compile(aft_conv, backend="aot_eager", fullgraph=True, dynamic=False)
    for keys in (1.0, 90.0):
        inputs, options = draw("grid", keys=keys)
        inputs[3][:] -= keys - 1
        inputs = [x.requires_grad_() for x in inputs]
        out, want = compiled(*inputs, **options), literal(*inputs, **options)
        assert error(out, want) < 1e-12
        for got, grad in zip(
            torch.autograd.grad(out.square().sum(), inputs),
            torch.autograd.grad(want.square().sum(), inputs),
            strict=True,
        ):
            assert error(got, grad) < 1e-10


@pytest.mark.parametrize("causal", [False, True])
def test_exported_for_every_length(causal, error):
    class Conv(torch.nn.Module):
        def forward(self, q, k, v, w):
            return aft_conv(q, k, v, w, causal=causal)

    inputs, _ = draw("sequence")
    length = torch.export.Dim("length", min=5, max=4096)
    program = torch.export.export(Conv(), inputs, dynamic_shapes=(*({1: length},) * 3, None))
    for form in ("sequence", "long sequence", "causal, many taps"):
        for keys in (1.0, 300.0):
            (q, k, v, _), _ = draw(form, keys=keys)
            w = inputs[3] - keys
            want = aft_conv(q, k, v, w, causal=causal, backend="reference")
            assert error(program.module()(q, k, v, w), want) < 1e-12


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("sizes", [(5,), (3, 3)])
def test_reparameterized_kernels_have_the_mean_and_deviation_asked_for(sizes, unbiased, error):
    torch.manual_seed(9)
    w, gamma, beta = (
        torch.randn(3, *sizes).double() * 7 - 40,
        torch.randn(3).double(),
        torch.randn(3).double(),
    )
    got = reparameterize(w, gamma, beta, unbiased=unbiased).flatten(1)
    assert error(got.mean(1), beta) < 1e-12
    assert error(got.std(1, unbiased=unbiased), gamma.abs()) < 1e-12
    inputs = [x.requires_grad_() for x in (w, gamma, beta)]
    assert torch.autograd.gradcheck(lambda *x: reparameterize(*x, unbiased=unbiased), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
@pytest.mark.parametrize("sizes", [(1,), (7,), (5, 5)])
def test_a_constant_kernel_becomes_beta(sizes, value, dtype):
    w = torch.full((3, *sizes), value, dtype=dtype, requires_grad=True)
    gamma = torch.tensor([0.0, 2.0, -5.0], dtype=dtype, requires_grad=True)
    beta = torch.tensor([0.5, 0.0, 3.0], dtype=dtype)
    for unbiased in (False, True):
        got = reparameterize(w, gamma, beta, unbiased=unbiased)
        assert torch.equal(got.flatten(1), beta[:, None].expand(-1, w[0].numel()))
        for grad in torch.autograd.grad(got.sum(), (w, gamma)):
            assert grad.isfinite().all()


def tensors(**change):
    sizes = {"q": (2, 12, 6), "k": (2, 12, 3), "v": (2, 12, 6), "w": (3, 3, 3)}
    return {name: torch.randn(size) for name, size in sizes.items()} | {"grid": (3, 4)} | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": torch.randn(3, 4, 4)}, "odd"),
        ({"w": torch.randn(3, 4), "grid": None}, "odd"),
        ({"w": torch.randn(2, 3, 3)}, "w must have shape"),
        ({"w": torch.randn(3)}, "w must have shape"),
        ({"w": torch.ones(3, 3, 3, dtype=torch.int32)}, "floating"),
        ({"k": torch.randn(2, 12, 6, 1)}, "one key per head"),
        ({"k": torch.randn(2, 12, 4), "w": torch.randn(4, 3, 3)}, "divisible"),
        ({"v": torch.randn(2, 12, 3)}, "v must have shape"),
        ({"k": torch.randn(2, 12, 3).half()}, "dtype of q"),
        ({"grid": None}, "grid must be"),
        ({"grid": (4, 4)}, "grid must be"),
        ({"grid": (-3, -4)}, "grid must be"),
        ({"prefix_tokens": 1}, "grid must be"),
        ({"prefix_tokens": 12}, "prefix_tokens must be"),
        ({"prefix_tokens": -1}, "prefix_tokens must be"),
        ({"causal": True}, "not defined for a two-dimensional kernel"),
        ({"w": torch.randn(3, 3)}, "grid must be None"),
        ({"w": torch.randn(3, 3), "grid": None, "causal": True, "prefix_tokens": 1}, "must be 0"),
        ({"mask": torch.ones(2, 11, dtype=torch.bool)}, "mask must have shape"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_refusals(change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        aft_conv(**tensors(**change))


def test_other_refusals():
    with pytest.raises(ValueError, match="divisible"):
        aft_conv_init_state(2, 7, 3, 5)
    state = aft_conv_init_state(2, 6, 3, 5)
    with pytest.raises(ValueError, match=r"w must have shape \(3, 5\)"):
        aft_conv_step(torch.randn(2, 6), torch.randn(2, 3), torch.randn(2, 6), torch.randn(3, 4), state)
    with pytest.raises(ValueError, match=r"gamma must have shape \(3\)"):
        reparameterize(torch.randn(3, 5), torch.randn(1), torch.randn(3))


def test_flops_are_those_of_the_convolution():
    (q, k, v, w), _ = example(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        aft_conv(q, k, v, 0 * w, backend="fused")
    assert counter.get_total_flops() == flops(2, 11, 15, 3, 3)
