"""What holds for every operator, found by its file name."""

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sansmax.ops import operators

OPERATORS = operators()
QUADRATIC = {"softmax", "aft.full"}
each = pytest.mark.parametrize("name", OPERATORS)
both = pytest.mark.parametrize("backend", ["reference", "fused"])


def run(name, arguments, options, **more):
    return OPERATORS[name][1](*arguments, **options, **more)


def example(name, **sizes):
    return OPERATORS[name][0].example(**sizes)


def leaves(arguments):
    """The floating tensors among the arguments, one level into pairs."""
    flat = [t for a in arguments for t in (a if isinstance(a, tuple) else (a,))]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()]


def gradients(name, dtype, backend):
    arguments, options = example(name, dtype=dtype)
    inputs = leaves(arguments)
    for tensor in inputs:
        tensor.requires_grad_()
    out = run(name, arguments, options, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)


@each
def test_explain_prints_the_backend_and_why(name, capsys):
    arguments, options = example(name)
    run(name, arguments, options, explain=True)
    assert f"sansmax.{name.replace('.', '_')}: fused, because " in capsys.readouterr().out


@each
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grad", [False, True])
def test_fused_equals_reference(name, batch, grad, error):
    arguments, options = example(name, batch=batch)
    want = run(name, arguments, options, backend="reference")
    assert want.dtype == torch.float64
    with torch.set_grad_enabled(grad):
        for backend in ("fused", "auto"):
            assert error(run(name, arguments, options, backend=backend), want) < 1e-11
            inputs = leaves(arguments)
            for tensor in inputs:
                tensor.requires_grad_()  # no-grad forms must not leave them out
            assert error(run(name, arguments, options, backend=backend).detach(), want) < 1e-11


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_stays_in_the_error_budget_of_the_reference(name, dtype, error):
    """Both against float64 on the same rounded inputs; the reference's own error is the unit."""
    arguments, options = example(name, tokens=64, dim=8, dtype=dtype)
    exact, _ = copy.deepcopy((arguments, options))
    exact = tuple(tuple(t.double() for t in a) if isinstance(a, tuple) else a.double() for a in arguments)
    want = run(name, exact, options, backend="reference")
    unit = error(run(name, arguments, options, backend="reference"), want)
    assert unit < 20 * torch.finfo(dtype).eps
    got = run(name, arguments, options, backend="fused")
    assert got.dtype == dtype
    assert error(got, want) < 4 * unit + torch.finfo(dtype).eps


@each
@both
def test_gradcheck(name, backend):
    arguments, options = example(name, batch=1, heads=2, tokens=4, dim=3)
    inputs = leaves(arguments)
    for tensor in inputs:
        tensor.requires_grad_()

    def closure(*_):
        return run(name, arguments, options, backend=backend)

    assert torch.autograd.gradcheck(closure, inputs, atol=1e-6, rtol=1e-4)


@each
def test_gradients_of_fused_equal_the_reference(name, error):
    for got, want in zip(
        gradients(name, torch.float64, "fused"), gradients(name, torch.float64, "reference"), strict=True
    ):
        assert error(got, want) < 1e-10


@each
@both
def test_strides_do_not_matter(name, backend, error):
    arguments, options = example(name)

    def strided(t):
        return torch.stack([t, torch.full_like(t, float("nan"))], -1).mT.contiguous().mT[..., 0]

    views = tuple(tuple(map(strided, a)) if isinstance(a, tuple) else strided(a) for a in arguments)
    want = run(name, arguments, options, backend="reference")
    assert error(run(name, views, options, backend=backend), want) < 1e-11


@each
@both
def test_one_token(name, backend):
    arguments, options = example(name, tokens=1)
    out = run(name, arguments, options, backend=backend)
    assert out.isfinite().all()
    assert run(name, arguments, options, backend="reference").sub(out).abs().max() < 1e-11


@each
def test_an_image_does_not_see_its_batch_mates(name, error):
    arguments, options = example(name, batch=23)
    want = run(name, arguments, options)
    alone = tuple(a[1:2] if isinstance(a, torch.Tensor) and a.shape[0] == 23 else a for a in arguments)
    assert error(run(name, alone, options), want[1:2]) < 1e-12


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "softmax"])  # torch's own rules
@both
def test_autocast_changes_nothing(name, backend):
    arguments, options = example(name, tokens=24, dtype=torch.float32)
    want = run(name, arguments, options, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(name, arguments, options, backend=backend)
    assert got.dtype == torch.float32
    assert torch.equal(got, want) or (got - want).abs().max() < 1e-5 * want.abs().max()


@each
def test_compiles_as_one_graph_for_any_length(name, error):
    torch.compiler.reset()
    compiled = torch.compile(OPERATORS[name][1], backend="aot_eager", fullgraph=True)
    for tokens in (16, 25, 9):
        arguments, options = example(name, tokens=tokens, dtype=torch.float32)
        inputs = [tensor.requires_grad_() for tensor in leaves(arguments)]
        want = run(name, arguments, options, backend="reference")
        out = compiled(*arguments, **options)
        assert error(out, want) < 1e-5
        for got, grad in zip(
            torch.autograd.grad(out.square().sum(), inputs),
            torch.autograd.grad(want.square().sum(), inputs),
            strict=True,
        ):
            assert error(got, grad) < 2e-5


@each
def test_exports(name, error):
    arguments, options = example(name, tokens=16, dtype=torch.float32)

    class Wrapped(torch.nn.Module):
        def forward(self, *arguments):
            return run(name, arguments, options)

    program = torch.export.export(Wrapped(), arguments)
    assert error(program.module()(*arguments), run(name, arguments, options)) < 1e-6


@each
def test_cost_grows_as_declared(name):
    def count(tokens):
        arguments, options = example(name, tokens=tokens, batch=1, dtype=torch.float32)
        # Torch 2.10 counts nothing in SDPA's other kernel for CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(name, arguments, options, backend="fused")
        return counter.get_total_flops()

    small, large = count(1024), count(4096)
    if small == 0:  # sums and exponentials only
        assert name == "aft.simple"
    elif name in QUADRATIC:
        assert large > 12 * small
    else:
        assert large < 4.6 * small


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["softmax", "sima", "xnorm", "soft"])
def test_views_of_one_projection_are_not_copied(name, batch, grad):
    heads, tokens, dim = 3, 40, 8
    qkv = torch.randn(batch, tokens, 3 * heads * dim, requires_grad=grad)
    q, k, v = qkv.unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    arguments = (q, v, q.detach()[:, :, :5].contiguous()) if name == "soft" else (q, k, v)
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        run(name, arguments, {}, backend="fused")
    copies = [
        (event.name, event.input_shapes[0])
        for event in profile.function_events
        if event.name in ("aten::copy_", "aten::clone") and math.prod(event.input_shapes[0]) >= q.numel()
    ]
    assert not copies


@each
@pytest.mark.parametrize("fake", [False, True])
def test_shapes_without_values(name, fake):
    """On the meta device and in FakeTensorMode, where nothing can be read."""
    arguments, options = example(name, dtype=torch.float32)
    want = run(name, arguments, options)
    if fake:
        with FakeTensorMode() as mode:
            arguments = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            options = tree_map_only(torch.Tensor, mode.from_tensor, options)
            got = run(name, arguments, options)
    else:
        arguments = tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments)
        options = tree_map_only(torch.Tensor, lambda t: t.to("meta"), options)
        got = run(name, arguments, options)
        assert got.is_meta
    assert got.shape == want.shape
    assert got.dtype == want.dtype
