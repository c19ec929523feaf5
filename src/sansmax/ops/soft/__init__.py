"""SOFT: softmax-free attention with a Gaussian kernel, in the low-rank form over m landmarks.

    K1_ij = exp(-|q_i - l_j|^2 / 2)        (N, m)
    A_ij  = exp(-|l_i - l_j|^2 / 2)        (m, m)
    out   = K1 Z (K1^T v),  Z ~ A^-1       evaluated as K1 (Z (K1^T v))

Queries and keys are one tensor q, scaled by D**-0.25 beforehand; the landmarks are not. Lu et al., "SOFT:
Softmax-free Transformer with Linear Complexity", NeurIPS 2021 (arXiv 2110.11945), eq. 4-9; SOFT++ is
"Softmax-free Linear Transformers" (arXiv 2207.03341). Where the published code (softmax_free_transformer.py)
and the papers differ, the code is followed.

Cross-attention is not defined: queries and keys share K1. Neither are a causal form and decoding token by
token: the landmarks summarise all tokens, the later ones too.
"""

import torch
from torch import Tensor

from .. import _check
from .._backend import choose, no_autocast
from . import fused
from ._inverse import checked, exact_dtype, landmark_inverse, newton_inverse

__all__ = ["example", "flops", "newton_inverse", "soft"]

# Of the kernels: a program holds the landmarks and matrices as large, HELD entries padded to powers of two.
WIDEST = 64
MOST_LANDMARKS = 128
HELD = 4096


def soft(
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    *,
    inverse: str = "plain",
    iterations: int = 20,
    batchwise: bool = True,
    mask: Tensor | None = None,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor:
    """SOFT attention (see the module for the equation).

    Args:
        q: (B, H, N, D), queries and keys at once, already scaled by D**-0.25; any floating dtype and strides.
        v: (B, H, N, E).
        landmarks: (B, H, m, D), the bottleneck tokens; published: GELU(LayerNorm(strided convolution of q)).
        inverse: how Z is made, see newton_inverse: "plain" (SOFT), "norm" (SOFT++: Z = D^-1/2 V D^-1/2 with D
            the row sums of A), "release2021" (the code of the NeurIPS release), "solve" (Cholesky).
        iterations: Newton steps.
        batchwise: "norm" and "release2021" take one step size for the whole batch, as published, so that an
            image's output depends on its batch-mates; False takes one for each image and head.
        mask: (B, N) bool, True = keep. A masked token takes no part: its row of K1 is 0, and so is its
            output. The landmarks are the caller's: none may hold anything of a masked token.
        backend: see sansmax.ops._backend. Half precision is computed in float32.
        explain: prints which backend serves the inputs, and why.

    Returns:
        (B, H, N, E) in the dtype of q.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, inverse, iterations or backend do not fit.
    """
    _check.floating("soft", q=q, v=v, landmarks=landmarks)
    _check.shape(
        "soft",
        "q",
        q,
        ("B", "H", "N", "D"),
        "split the heads with .unflatten(-1, (heads, -1)).transpose(1, 2)",
    )
    b, h, n, d = q.shape
    _check.shape("soft", "v", v, (b, h, n, "E"), "queries and keys are one: q and v have the same tokens")
    _check.shape("soft", "landmarks", landmarks, (b, h, "m", d))
    _check.key_mask("soft", mask, b, n, q)
    inverse = checked("soft", inverse, iterations)
    widest = max(d, v.shape[3])
    limits = (
        ("head or value width", widest, WIDEST),
        ("number of landmarks", landmarks.shape[2], min(MOST_LANDMARKS, HELD >> (widest - 1).bit_length())),
    )
    name, _ = choose("soft", backend, q, limits, explain=explain)
    if name == "triton":
        from . import triton

        return triton.soft(q, v, landmarks, inverse, iterations, batchwise, mask)
    q, v = _check.cleared(mask, q, v)
    body = reference if name == "reference" else fused.soft
    (out,) = _check.cleared(mask, body(q, v, landmarks, inverse, iterations, batchwise))
    return out


def reference(
    q: Tensor, v: Tensor, landmarks: Tensor, inverse: str, iterations: int, batchwise: bool
) -> Tensor:
    """The literal equation; masked tokens hold zeros."""
    dtype = q.dtype
    q, v, landmarks = (t.to(exact_dtype(t, inverse)) for t in (q, v, landmarks))
    with no_autocast(q):
        k1, a = (
            torch.exp(-(x[..., :, None, :] - landmarks[..., None, :, :]).square().sum(-1) / 2)
            for x in (q, landmarks)
        )
        z = landmark_inverse(a, inverse, iterations, batchwise)
        return ((k1 @ z) @ (k1.mT @ v)).to(dtype)


def flops(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    value_dim: int,
    landmarks: int,
    *,
    inverse: str = "plain",
    iterations: int = 20,
) -> int:
    """Two for each multiply-add of the products, without the search for the published step size.

    Linear in the tokens, cubic in the landmarks.
    """
    m = landmarks
    kernels = (tokens + m) * m * dim
    products = (2 * tokens + m) * m * value_dim
    # Cholesky: m^3 / 6 for the factor, m^3 / 2 for its inverse, m^3 for their product.
    inverse_cost = 5 * m**3 // 3 if inverse == "solve" else 2 * iterations * m**3
    return 2 * batch * heads * (kernels + products + inverse_cost)


def example(batch=2, heads=3, tokens=11, dim=5, *, dtype=torch.float64, device="cpu", seed=0):
    """Typical positional tensors and keyword arguments: 4 landmarks, however many tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, dim) for n in (tokens, tokens, 4))
    q, v, landmarks = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(t.to(device, dtype) for t in (q * dim**-0.25, v, landmarks)), {}
