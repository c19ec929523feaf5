"""What is special to the kernels of SOFT; the laws of all kernels are in test_triton.py."""

import pytest
import torch

from sansmax.ops.soft import newton_inverse, soft
from sansmax.ops.soft._inverse import INVERSES

triton = pytest.importorskip("sansmax.ops.soft.triton", reason="torch comes without triton on this system")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch=1, heads=2, tokens=37, dim=19, value_dim=23, landmarks=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (tokens, dim), (tokens, value_dim), (landmarks, dim)
    made = (torch.randn(batch, heads, *s, generator=generator, dtype=torch.float64) for s in sizes)
    q, v, m = (t.to(DEVICE) for t in made)
    return [q * dim**-0.25, v, m * dim**-0.25]


def results(leaves, backend, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    out = soft(*leaves, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weight = weight.half().to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def assert_close(leaves, dtype, error, **options):
    leaves = [t.to(dtype) for t in leaves]
    want = results(leaves, "reference", torch.float64, **options)
    plain = results(leaves, "fused", dtype, **options)
    for got, eager, exact in zip(results(leaves, "triton", dtype, **options), plain, want, strict=True):
        assert got.shape == exact.shape
        assert error(got, exact) < 4 * error(eager, exact) + 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("sizes", [dict(landmarks=49, dim=32), dict(landmarks=67), dict(landmarks=1)])
def test_every_inverse(inverse, sizes, error):
    assert_close(inputs(**sizes), torch.float32, error, inverse=inverse, batchwise=False)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(batch=1, heads=1, tokens=301),  # five parts
        dict(batch=3, heads=11, tokens=5),  # more heads than programs
        dict(tokens=1, landmarks=2, dim=1, value_dim=1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sizes(sizes, dtype, error):
    assert_close(inputs(**sizes), dtype, error)


@pytest.mark.parametrize("spread", [0.3, 0.03])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_landmarks_that_nearly_coincide(dtype, spread, error):
    """The inverse amplifies what is rounded before it by up to 100."""
    q, v, m = inputs(heads=1, landmarks=49, dim=8)
    assert_close([q * spread, v, m * spread], dtype, error)


@pytest.mark.parametrize("count", [1, 49, 64])
@pytest.mark.parametrize("iterations", [0, 3, 20])
def test_the_inverse_in_the_kernel(count, iterations, error):
    *_, m = inputs(landmarks=count, dim=6)
    m = (m * 0.5).float()
    a = torch.exp(
        -(torch.cdist(m.double(), m.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 2
    )
    want = newton_inverse(a, iterations=iterations)
    assert error(triton._plain_inverse(m, iterations), want) < 2e-5


@pytest.mark.parametrize("inverse", ["plain", "solve"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 6e4),
        (torch.bfloat16, 30.0),
        (torch.bfloat16, 3e38),
        (torch.float32, 3e38),
        (torch.float32, 1e-30),
        (torch.float32, 0.0),
    ],
)
def test_extremes(dtype, size, inverse):
    q, v, m = inputs(tokens=50, landmarks=6, dim=5)
    q, m = (t.mul(5**0.25).clamp(-1, 1).mul(size).to(dtype) for t in (q, m))
    got = results([q, v.to(dtype), m], "triton", dtype, inverse=inverse)
    want = soft(q.double(), v.to(dtype).double(), m.double(), inverse=inverse, backend="reference")
    tolerance = (2 * torch.finfo(dtype).eps + 5e-5) * want.abs().max() + 1e-30
    assert (got[0] - want).abs().max() < tolerance
    assert all(t.isfinite().all() for t in got)


def test_a_common_offset_costs_no_precision(error):
    q, v, m = (t.float() for t in inputs())
    q, m = ((t * 256).round() / 256 for t in (q, m))  # so that the offset rounds nothing away
    want = results([q, v, m], "reference", torch.float64)
    for got, exact in zip(results([q + 4096, v, m + 4096], "triton", torch.float32), want, strict=True):
        assert error(got, exact) < 2e-5


def test_everything_masked_is_zero():
    mask = torch.zeros(1, 37, dtype=torch.bool, device=DEVICE)
    for inverse in INVERSES:
        assert all(
            (t == 0).all() for t in results(inputs(), "triton", torch.float32, inverse=inverse, mask=mask)
        )


def test_no_kernel_matrix_of_the_tokens_is_kept():
    leaves = [
        t.float().requires_grad_() for t in inputs(heads=1, tokens=301, dim=3, value_dim=5, landmarks=40)
    ]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        soft(*leaves, backend="triton")
    assert max(t.numel() for t in kept.values()) == 40 * 40


def test_autocast_changes_nothing():
    leaves = [t.float() for t in inputs()]
    want = results(leaves, "triton", torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = results(leaves, "triton", torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(dim=65, landmarks=2), "head or value width 65 is above 64"),
        (dict(landmarks=300), "number of landmarks 300 is above"),
    ],
)
def test_refusals(sizes, message):
    with pytest.raises(ValueError, match=message):
        soft(*(t.float() for t in inputs(**sizes)), backend="triton")


def test_the_choice_is_explained(capsys):
    soft(*inputs(), explain=True)
    assert "sansmax.soft: fused, because" in capsys.readouterr().out
