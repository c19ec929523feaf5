"""AFT-full as two matrix products, exp(w - max w) @ (exp(k - max k) v) over exp(w - max w) @ exp(k - max k).

A product is blind to terms that leave the range of its dtype: where the largest k meets the smallest w of a
row (or lies in the future of a causal row) every term may vanish, 0 / 0. `depth` bounds how far below 1 the
largest term of a row can lie; by it the products run in the dtype of k, in float64, or give way to one
exponent per (query, key, channel).
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..._backend import no_autocast
from ..._eager import exporting, holds_values
from .. import _triple

# exp(-60) leaves 27 nats above the smallest normal float32 for the small terms and values, exp(-600) 108 in
# float64.
LIMITS = {torch.float32: 60.0, torch.float64: 600.0}

# Query rows of one product: exp(w) of a block stays in cache and nothing T x T is made without gradients.
ROWS = 512

# Entries of one (B, rows, T, C) temporary of `exact`.
ENTRIES = 1 << 21

Bias = tuple[Tensor, ...]  # (w,) or its factors (u, v)


def aft_full(q: Tensor, k: Tensor, v: Tensor, w: Bias, causal: bool) -> Tensor:
    """Masked keys are -inf and hold zeros in v."""
    dtype = q.dtype
    with no_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        return _mean(k, v, crop(w, k.shape[1]), causal).mul_(torch.sigmoid(q)).to(dtype)


def _mean(k: Tensor, v: Tensor, w: Bias, causal: bool, window: int = 0) -> Tensor:
    def reach(k: Tensor, w: Bias) -> Tensor:
        return depth(k, (rows for _, rows in biases(w, causal, k.dtype, ROWS)))

    def product(k: Tensor, v: Tensor, w: Bias) -> Tensor:
        return _product(k, v, biases(w, causal, k.dtype, ROWS))

    def direct(k: Tensor, v: Tensor, w: Bias) -> Tensor:
        return exact(k, v, biases(w, causal, k.dtype, max(1, ENTRIES // k.numel())))

    return choose_range(
        k, v, w, reach, product, direct, lambda *first: _correct(*first, k, v, w, causal, window)
    )


def crop(w: Bias, tokens: int) -> Bias:
    """The corner of a dense w, the first rows of its factors."""
    if exporting():
        # A slice would exclude tokens == T_max from the exported range of lengths.
        first = torch.arange(tokens, device=w[0].device)
        w = tuple(t.index_select(0, first) for t in w)
        return w if len(w) == 2 else (w[0].index_select(1, first),)
    return (w[0][:tokens], w[1][:tokens]) if len(w) == 2 else (w[0][:tokens, :tokens],)


def biases(w: Bias, causal: bool, dtype: torch.dtype, size: int) -> Iterator[tuple[int, Tensor]]:
    """(end, w[start:start + size, :end]), -inf in the future; one block of all rows while compiling."""
    start, tokens = 0, w[0].shape[0]
    for rows in [w[0]] if torch.compiler.is_compiling() else w[0].split(size):
        end = start + rows.shape[0] if causal else tokens
        rows = rows[:, :end].to(dtype) if len(w) == 1 else rows.to(dtype) @ w[1][:end].to(dtype).mT
        if causal:
            future = torch.ones(rows.shape, dtype=torch.bool, device=rows.device).triu(start + 1)
            rows = rows.masked_fill(future, -torch.inf)
        yield end, rows
        start = end


def depth(k: Tensor, biases: Iterable[Tensor]) -> Tensor:
    """No row's largest exp(w - max w) exp(k - max k) is below exp(-depth).

    The span of k alone is such a bound, since at the largest w of the row the first factor is 1; so is the
    span of the rows of w. If excluded entries (-inf) may hide either maximum, the sum of the spans of the
    finite entries is.
    """
    k = k.detach()
    k_span = span(k, 1)
    if holds_values(k_span) and k_span <= LIMITS[k.dtype]:
        return k_span
    both = (torch.stack([span(rows, -1), _finite_span(rows, -1)]) for rows in (r.detach() for r in biases))
    w_span, w_finite = torch.stack(list(both)).amax(0)
    return torch.minimum(torch.minimum(k_span, w_span), _finite_span(k, 1) + w_finite)


def span(x: Tensor, dim: int) -> Tensor:
    """The largest difference along `dim`; inf where an entry is -inf. (torch.aminmax takes 6 times as
    long.)"""
    return (x.amax(dim).clamp(min=torch.finfo(x.dtype).min) - x.amin(dim)).max()


def _finite_span(x: Tensor, dim: int) -> Tensor:
    return (x.amax(dim) - x.masked_fill(x == -torch.inf, torch.inf).amin(dim)).max()


def choose_range(
    k: Tensor,
    v: Tensor,
    w: Bias,
    reach: Callable[[Tensor, Bias], Tensor],
    product: Callable[[Tensor, Tensor, Bias], Tensor],
    direct: Callable[[Tensor, Tensor, Bias], Tensor],
    correct: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`product` where `reach` allows it in the dtype of k, else in float64, else `direct` in float64."""
    limit, wide_limit = LIMITS[k.dtype], LIMITS[torch.float64]
    bound = reach(k, w)
    if holds_values(bound):
        bound = bound.item()  # waits for the device
        if not bound > limit:
            return product(k, v, w)
        return (direct if bound > wide_limit else product)(k.double(), v.double(), w).to(k.dtype)
    out = product(k, v, w)
    if not exporting():
        return correct(out, bound <= limit)
    if k.dtype == torch.float32:
        out = _unless(bound <= limit, product, out, k, v, w)
    return _unless(bound <= wide_limit, direct, out, k, v, w)


def _unless(fine: Tensor, body: Callable[..., Tensor], out: Tensor, k: Tensor, v: Tensor, w: Bias) -> Tensor:
    """`out` if `fine`, else `body` in float64, as a branch of the exported graph; it carries no gradient."""

    def skip(k: Tensor, v: Tensor, *w: Tensor) -> Tensor:
        return torch.zeros_like(k)

    def replace(k: Tensor, v: Tensor, *w: Tensor) -> Tensor:
        return body(k.double(), v.double(), w).to(k.dtype).clone(memory_format=torch.contiguous_format)

    operands = tuple(t.detach().contiguous() for t in (k, v, *w))
    return torch.where(fine, out, torch.cond(fine, skip, replace, operands))


def correction(name: str, mean: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """(out, fine, k, v, w, causal, window) -> `out` if `fine`, else `mean`, chosen outside the compiled
    graph.

    As torch.cond it would trace every body in every graph, and its gradients fail where the strides of the
    branches differ (torch 2.15).
    """

    @torch.library.custom_op(f"sansmax::{name}", mutates_args=())
    def forward(
        out: Tensor, fine: Tensor, k: Tensor, v: Tensor, w: list[Tensor], causal: bool, window: int
    ) -> Tensor:
        out = out if fine else mean(k, v, tuple(w), causal, window)
        return out.clone(memory_format=torch.contiguous_format)

    # custom_op would run this below autograd, where nothing is recorded.
    arguments = "Tensor grad, Tensor fine, Tensor k, Tensor v, Tensor[] w, bool causal, int window"
    torch.library.define(f"sansmax::{name}_backward", f"({arguments}) -> Tensor[]")

    @torch.library.impl(f"sansmax::{name}_backward", "CompositeExplicitAutograd")
    def _(grad, fine, k, v, w, causal, window):
        inputs = [t.detach().requires_grad_() for t in (k, v, *w)]
        if fine:
            return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
        with torch.enable_grad():
            out = mean(*inputs[:2], tuple(inputs[2:]), causal, window)
        return [t.contiguous() for t in torch.autograd.grad(out, inputs, grad)]

    @torch.library.register_fake(f"sansmax::{name}_backward")
    def _(grad, fine, k, v, w, causal, window):
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v, *w)]

    backward = getattr(torch.ops.sansmax, f"{name}_backward").default

    @forward.register_fake
    def _(out, fine, k, v, w, causal, window):
        return torch.empty_like(out, memory_format=torch.contiguous_format)

    def setup_context(ctx, inputs, output):
        _, fine, k, v, w, ctx.causal, ctx.window = inputs
        ctx.save_for_backward(fine, k, v, *w)

    def differentiate(ctx, grad):
        fine, k, v, *w = ctx.saved_tensors
        dk, dv, *dw = backward(grad, fine, k, v, w, ctx.causal, ctx.window)
        return grad.masked_fill(~fine, 0), None, dk, dv, dw, None, None

    forward.register_autograd(differentiate, setup_context=setup_context)
    return lambda out, fine, k, v, w, causal, window: forward(out, fine, k, v, list(w), causal, window)


_correct = correction("aft_full", _mean)


def _product(k: Tensor, v: Tensor, biases: Iterable[tuple[int, Tensor]]) -> Tensor:
    weights = powers(k, 1)
    values = weights * v
    # One product for the whole batch gives w its gradient without B x T x T; it costs a copy of k and v, so
    # that without gradients B products are 20 to 40 % faster (CPU, B = 8 and 64, T = 196).
    fold = k.shape[0] == 1 or torch.is_grad_enabled()
    if fold:
        weights, values = weights.transpose(0, 1).flatten(1), values.transpose(0, 1).flatten(1)
    parts = []
    for end, rows in biases:
        rows = powers(rows, -1)
        if fold:
            parts.append(ratio(rows @ values[:end], rows @ weights[:end]))
        else:
            parts.append(ratio(rows @ values[:, :end], rows @ weights[:, :end]))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 0 if fold else 1)
    return out.unflatten(1, (k.shape[0], -1)).transpose(0, 1) if fold else out


def powers(x: Tensor, dim: int) -> Tensor:
    """exp(x - max x), 0 for -inf."""
    top = x.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
    return (x - top).exp_()


def ratio(num: Tensor, den: Tensor) -> Tensor:
    """num / den, and 0 for an empty sum: no other is below exp(-limit). (den == 0 takes 10 times as long.)"""
    return num.div_(den.clamp_(min=math.exp(-1 - LIMITS[den.dtype])))


def exact(k: Tensor, v: Tensor, biases: Iterable[tuple[int, Tensor]]) -> Tensor:
    parts = [_triple.finish(exact_rows(k[:, :end], v[:, :end], rows)) for end, rows in biases]
    return torch.cat(parts, 1)


def exact_rows(k: Tensor, v: Tensor, rows: Tensor) -> _triple.Triple:
    """One exponent per (query, key, channel): sums over the keys (B, T, C) by the biases (n, T) of n
    queries."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _exact_rows(k, v, rows)
    # Without it the gradients keep B x T x T x C numbers.
    return checkpoint(_exact_rows, k, v, rows, use_reentrant=False, preserve_rng_state=False)


def _exact_rows(k: Tensor, v: Tensor, rows: Tensor) -> _triple.Triple:
    exponents = k[:, None] + rows[:, :, None]  # (B, n, T, C)
    top = exponents.detach().amax(2)
    weights = _triple.weight(exponents, top[:, :, None])
    return _triple.Triple((weights * v[:, None]).sum(2), weights.sum(2), top)
