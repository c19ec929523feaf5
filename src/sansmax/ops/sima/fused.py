"""SimA without q^ and k^: the norms are folded into the D x D matrix of the "kv" order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import no_autocast
from .._eager import finite, overwritable, readable, without_tangent
from .._matmul import heads_matmul, prefix_sums
from .._split import side_by_side

# Tokens of a causal chunk: inside it the "qk" order, between chunks the running D x E matrix.
CHUNK = 64
# Absolute values taken at a time, 768 KiB in float32: within a second-level cache.
ENTRIES = 3 << 16
# Sums of |q| and of |k| up to here leave float32 room for small values; 100,000 tokens have 3e7 (400
# channels).
LIMIT = 1e10
# Brings sums over 2^60 tokens back into the range of float64; cancels in q / Sq and in k / Sk.
OUT_OF_RANGE = 2.0**-60


def sima(q: Tensor, k: Tensor, v: Tensor, causal: bool, eps: float, order: str) -> Tensor:
    """Masked tokens hold zeros; `order` is "qk" or "kv"."""
    dtype = q.dtype
    with no_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            # The sums over tokens leave the range of float16 and the precision of bfloat16.
            q, k, v = q.float(), k.float(), v.float()
        if causal:
            out = _causal(q, k, v, eps, CHUNK if order == "kv" else q.shape[2])
        else:
            out = _full(q, k, v, eps, order)
        return out.to(dtype)


def _full(q: Tensor, k: Tensor, v: Tensor, eps: float, order: str) -> Tensor:
    if readable(q, k, v):
        closed = order == "kv" and without_tangent(q, k, v)
        if closed:
            with torch.no_grad():
                out, q_sum, k_sum, matrix = _by_matrix(q, k, v, eps)
        else:
            q_sum, k_sum = (_recorded_abs_sum(t).clamp(min=eps) for t in (q, k))
            out, matrix = _products(q, k, v, q_sum * k_sum, order), None
        # An overflow of k^T v reaches every row, since 0 * inf is NaN.
        if torch.maximum(q_sum, k_sum).sum().item() < LIMIT and finite(out[:, :, 0]):
            if closed and torch.is_grad_enabled():
                return _Closed.apply(q, k, v, eps, (out, q_sum, k_sum, matrix))
            return out
    return _products(_unit(q, eps), _unit(k, eps), v, None, order)


def _products(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None, order: str) -> Tensor:
    """q diag(1 / scale) k^T v; scale (B, H, D)."""
    if order == "qk":
        q = q if scale is None else q / scale[..., None, :]
        return heads_matmul(heads_matmul(q, k.mT), v)
    kv = heads_matmul(k.mT, v)
    return heads_matmul(q, kv if scale is None else kv / scale[..., None])


def _by_matrix(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q A, the sums of |q| and of |k|, and A = k^T v / (Sq Sk)."""
    q_sum, k_sum = _abs_sum(q).clamp_(min=eps), _abs_sum(k).clamp_(min=eps)
    matrix = heads_matmul(k.mT, v).div_((q_sum * k_sum)[..., None])
    return heads_matmul(q, matrix), q_sum, k_sum, matrix


class _Closed(torch.autograd.Function):
    """What `_by_matrix` has found, with its gradient. From dA = q^T grad and c_d = sum_e (dA A)_de:

        dq = grad A^T - sign(q) c / Sq      dk = v dM^T - sign(k) c / Sk      dv = k dM      dM = dA / (Sq Sk)

    without the middle terms where a sum is at its floor. Of the inputs' size, nothing is kept but they.
    """

    @staticmethod
    def forward(ctx, q, k, v, eps, found):
        out, *small = found
        ctx.save_for_backward(q, k, v, *small)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, q_sum, k_sum, matrix = ctx.saved_tensors
        with no_autocast(grad):
            if torch.is_grad_enabled():  # of a gradient of the gradient
                return *_recorded_gradient(q, k, v, ctx.eps, grad), None, None
            grad_matrix = heads_matmul(q.mT, grad)
            shift = (grad_matrix * matrix).sum(-1)  # (B, H, D)
            grad_kv = grad_matrix.div_((q_sum * k_sum)[..., None])
            grad_q, grad_k, grad_v = side_by_side(q, k, v)
            _subtract_sign(heads_matmul(grad, matrix.mT), q, shift, q_sum, ctx.eps, grad_q)
            _subtract_sign(heads_matmul(v, grad_kv.mT), k, shift, k_sum, ctx.eps, grad_k)
            grad_v.copy_(heads_matmul(k, grad_kv))
            return grad_q, grad_k, grad_v, None, None


def _recorded_gradient(q: Tensor, k: Tensor, v: Tensor, eps: float, grad: Tensor) -> list[Tensor | None]:
    q_sum, k_sum = (_recorded_abs_sum(t).clamp(min=eps) for t in (q, k))
    out = _products(q, k, v, q_sum * k_sum, "kv")
    inputs = [t for t in (q, k, v) if t.requires_grad]
    found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
    return [next(found) if t.requires_grad else None for t in (q, k, v)]


def _subtract_sign(x: Tensor, of: Tensor, shift: Tensor, total: Tensor, eps: float, out: Tensor) -> None:
    """out = x - sign(of) shift / total, the second only where `total` is above its floor."""
    by = (shift / total).masked_fill_(total <= eps, 0)[:, :, None]
    rows = max(1, ENTRIES * of.shape[2] // of.numel())
    if of.shape[2] <= rows:
        torch.addcmul(x, of.sign(), by, value=-1, out=out)
        return
    parts = zip(x.split(rows, 2), of.split(rows, 2), out.split(rows, 2), strict=True)
    buffer = of.new_empty(*of.shape[:2], rows, of.shape[3])
    for x_i, of_i, out_i in parts:
        sign = torch.sign(of_i, out=buffer[:, :, : of_i.shape[2]])
        torch.addcmul(x_i, sign, by, value=-1, out=out_i)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x / max(sum_tokens |x|, eps) for any finite x, also where the sum leaves the range."""
    top = x.detach().abs().amax(-2, keepdim=True).clamp(min=eps)
    x = x / top
    return x / torch.maximum(x.abs().sum(-2, keepdim=True), eps / top)


def _recorded_abs_sum(x: Tensor) -> Tensor:
    return x.abs().sum(-2)


def _abs_sum(x: Tensor) -> Tensor:
    """sum_tokens |x|, where nothing is recorded.

    Heads outermost, so that a thread sums the heads that it took the absolute values of: 0.014 ms at 196
    tokens and 6 heads where the layout of x, tokens outermost, takes 0.023 to 0.065. Some tokens at a time:
    fresh pages for an array of the size of x can cost more than all the rest (4 to 20 ms at 4096 tokens).
    """
    rows = max(1, ENTRIES // (x.shape[0] * x.shape[1] * x.shape[3]))
    if x.shape[2] <= rows:
        return torch.abs(x, out=x.new_empty(x.shape)).sum(-2)
    first, *others = x.split(rows, -2)
    buffer = x.new_empty(first.shape)
    total = torch.abs(first, out=buffer).sum(-2)
    for part in others:
        total += torch.abs(part, out=buffer[:, :, : part.shape[2]]).sum(-2)
    return total


def _causal(q: Tensor, k: Tensor, v: Tensor, eps: float, chunk: int) -> Tensor:
    q_sum, k_sum = _running_sums(q, k, eps)
    if readable(q, k, v) and not (
        finite(q_sum[:, :, -1] + k_sum[:, :, -1]) and finite(heads_matmul(k.mT, v))
    ):
        # v's scale is no default because it looks ahead: early values 1e308 times smaller than the largest
        # vanish.
        dtype, top = q.dtype, v.detach().abs().amax(-2, keepdim=True).double().clamp(min=1)
        q, k, v = q.double() * OUT_OF_RANGE, k.double() * OUT_OF_RANGE, v / top
        q_sum, k_sum = _running_sums(q, k, eps * OUT_OF_RANGE)
        return (_causal_products(q, k, v, q_sum, k_sum, chunk) * top).to(dtype)
    return _causal_products(q, k, v, q_sum, k_sum, chunk)


def _running_sums(q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    q_sum, k_sum = (prefix_sums(t.abs(), spare=True).clamp(min=eps) for t in (q, k))
    return q_sum, k_sum


def _causal_products(q: Tensor, k: Tensor, v: Tensor, q_sum: Tensor, k_sum: Tensor, chunk: int) -> Tensor:
    in_place = overwritable(q, k, v)
    weights = torch.div(q, q_sum, out=q_sum).div_(k_sum) if in_place else q / q_sum / k_sum
    batch, heads, tokens, _ = q.shape
    missing = -tokens % chunk  # zeros at the end change no earlier row
    # (B H chunks, chunk, .), contiguous: a product of views would copy each of them again.
    weights, k, v = (
        (F.pad(t, (0, 0, 0, missing)) if missing else t).reshape(-1, chunk, t.shape[3])
        for t in (weights, k, v)
    )
    kv = torch.bmm(k.mT, v).view(batch * heads, -1, k.shape[2] * v.shape[2])
    before = F.pad(prefix_sums(kv)[:, :-1], (0, 0, 1, 0)).view(-1, k.shape[2], v.shape[2])
    scores = torch.bmm(weights, k.mT)
    out = torch.bmm(scores.tril_() if in_place else scores.tril(), v)
    out = out.baddbmm_(weights, before) if in_place else torch.baddbmm(out, weights, before)
    return out.view(batch, heads, tokens + missing, -1)[:, :, :tokens]
