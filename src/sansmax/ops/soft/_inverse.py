"""The inverse of the landmark matrix: Newton-Raphson as published (three versions), and a direct solve."""

import torch
from torch import Tensor

from ..._find import pick
from .. import _check
from .._backend import no_autocast

INVERSES = ("plain", "release2021", "norm", "solve")
RIDGE = 0.01


def newton_inverse(
    a: Tensor, *, inverse: str = "plain", iterations: int = 20, batchwise: bool = True
) -> Tensor:
    """An inverse of the kernel matrices `a`, by V <- 2 V - V a V from V = alpha a, a fixed number of times.

    With R the largest row sum of a matrix:

        =============  =====  =================================================  ==========================
        inverse        ridge  alpha                                              gradient
        =============  =====  =================================================  ==========================
        "plain"        0.01   1.8 / R^2 for each matrix                          -V^T G V^T, once
        "release2021"  none   2 / R^2, R over the WHOLE batch and all heads;     through alpha and all steps
                              halved, at most 10 times, while the largest
                              column sum of |I - alpha a a| exceeds 1.01
        "norm"         none   as release2021                                     through alpha and all steps
        "solve"        0.01   no iteration: Cholesky of a + 0.01 I               -V^T G V^T, once
        =============  =====  =================================================  ==========================

    Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021 (arXiv 2110.11945), Alg.
    2, and "Softmax-free Linear Transformers" (arXiv 2207.03341), as their code has it: "plain" is
    kernel/inverse.py, "release2021" the code of the NeurIPS release, "norm" that of the soft_norm models,
    here WITHOUT their D^-1/2 V D^-1/2, which sansmax.soft applies. "solve" is not published.

    A fixed number of steps is a spectral cut-off and so a part of the trained model: an eigenvalue l becomes
    (1 - (1 - alpha l^2)^(2^iterations)) / l. "solve" inverts all of them, and weights do not carry over.

    "release2021" and "norm" are parity modes: as published, one alpha serves the batch, so that a result
    depends on the batch-mates, and the eigenvalue l = R can be lost (the identity alone gives 0).
    `batchwise=False` mends both: 1.8 / R^2 for each matrix, which needs no halving.

    Args:
        a: (..., m, m), symmetric, entries in [0, 1], unit diagonal. Half precision is computed in float32;
            float32 in float64 by "solve", and wherever float32 products may round to TF32 or bfloat16.
        inverse: one of the table.
        iterations: Newton steps, >= 0; "solve" takes none.
        batchwise: False for one alpha per matrix in "release2021" and "norm"; the others always have that.

    Returns:
        (..., m, m) in the dtype of `a`.

    Raises:
        ValueError, TypeError: `a` is not square or not floating point; unknown inverse; iterations < 0.
    """
    _check.floating("newton_inverse", a=a)
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] < 1:
        raise ValueError(
            f"newton_inverse: a must have shape (..., m, m), got {tuple(a.shape)}; "
            f"pass the kernel matrix between the landmarks"
        )
    inverse = checked("newton_inverse", inverse, iterations)
    with no_autocast(a):
        exact = a.to(exact_dtype(a, inverse))
        return invert(exact, inverse, iterations, batchwise).to(a.dtype)


def checked(op: str, inverse: str, iterations: int) -> str:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"{op}: iterations must be an int >= 0, got {iterations!r}; 20 is published")
    return pick(f"the inverses of {op}", inverse, INVERSES)


def exact_dtype(x: Tensor, inverse: str) -> torch.dtype:
    """The dtype from the landmarks to Z: at least float32, and float64 where that is not enough.

    Newton steps in TF32 move Z by 0.3 % to 28 %; float64 is immune to those flags, which are the user's and
    stay as they are. The solve lets eigenvalues down to 0.01 through: 300 equal landmarks cost it 4 % of the
    output in float32.
    """
    wide = x.dtype == torch.float64 or inverse == "solve" or _rounds_float32(x.device.type)
    return torch.float64 if wide and x.device.type != "mps" else torch.float32


def _rounds_float32(device: str) -> bool:
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device)
    return backend is not None and backend.matmul.fp32_precision in ("tf32", "bf16")


# What torch.compiler.assume_constant_result does, which imports the compiler and triton for it: torch.compile
# cannot trace the flags, and reads them once.
vars(_rounds_float32)["_dynamo_marked_constant"] = True


def landmark_inverse(a: Tensor, inverse: str, iterations: int, batchwise: bool) -> Tensor:
    """Z of out = K1 Z K1^T V: the inverse, for "norm" between two D^-1/2, D the row sums of `a`."""
    z = invert(a, inverse, iterations, batchwise)
    if inverse == "norm":
        scale = a.sum(-1).rsqrt()
        z = scale[..., :, None] * z * scale[..., None, :]
    return z


def invert(a: Tensor, inverse: str, iterations: int, batchwise: bool) -> Tensor:
    if inverse in ("plain", "solve"):
        return _RidgeInverse.apply(a, iterations if inverse == "plain" else None)
    largest = _largest_row_sum(a)
    if batchwise:
        return _newton(a, a * _halved(a, 2 / largest.max().square()), iterations)
    return _newton(a, a * (1.8 / largest.square()), iterations)


def _largest_row_sum(a: Tensor) -> Tensor:
    # At least the unit diagonal; the bound keeps a zero matrix from dividing by zero.
    return a.sum(-1).amax(-1)[..., None, None].clamp(min=1)


def _newton(a: Tensor, v: Tensor, iterations: int) -> Tensor:
    shape = v.shape
    a, v = a.reshape(-1, *shape[-2:]), v.reshape(-1, *shape[-2:])
    for _ in range(iterations):
        v = torch.baddbmm(v, v, a @ v, beta=2, alpha=-1)
    return v.reshape(shape)


def _halved(a: Tensor, alpha: Tensor) -> Tensor:
    """The published search without its loop over data: a factor that has passed the test stays."""
    with torch.no_grad():
        square, identity = a @ a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        factor, failing = torch.ones_like(alpha), torch.ones_like(alpha, dtype=torch.bool)
        for _ in range(10):
            residual = (identity - alpha * factor * square).abs().sum(-2).max()
            failing = failing & (residual > 1.01)
            factor = torch.where(failing, factor / 2, factor)
    return alpha * factor


class _RidgeInverse(torch.autograd.Function):
    """V ~ (a + 0.01 I)^-1 with the gradient of a true inverse, whatever V is: one m x m matrix is kept."""

    @staticmethod
    def forward(a: Tensor, iterations: int | None) -> Tensor:
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        ridged = a + RIDGE * identity
        if iterations is None:
            # cholesky_ex and a triangular solve work on whole batches and never wait for a GPU.
            lower, _ = torch.linalg.cholesky_ex(ridged)
            half = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
            return half.mT @ half
        return _newton(ridged, ridged * (1.8 / _largest_row_sum(a).square()), iterations)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (v,) = ctx.saved_tensors
        with no_autocast(grad):
            return -(v.mT @ grad @ v.mT), None
