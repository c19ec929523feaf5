"""Messages about shapes, dtypes and devices, worded once: who, expected, got, and what to do."""

import torch
from torch import Tensor


def floating(op: str, **tensors: Tensor) -> None:
    """Every tensor is floating point, of one dtype, on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}; use torch.as_tensor"
            )
        if not tensor.is_floating_point():
            raise TypeError(
                f"{op}: {name} must be floating point, got {tensor.dtype}; convert it with .float() first"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first_name} ({first.device}), got {tensor.device}; "
                f"move it with .to({first.device.type!r})"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first_name} ({first.dtype}), got {tensor.dtype}; "
                f"cast one of them"
            )


def shape(op: str, name: str, tensor: Tensor, expected: tuple[str | int, ...], hint: str = "") -> None:
    """`expected` holds an int where the size must be equal and a letter where any size >= 1 does."""
    matches = tensor.ndim == len(expected) and all(
        got >= 1 if isinstance(want, str) else got == want
        for got, want in zip(tensor.shape, expected, strict=True)
    )
    if not matches:
        wanted = ", ".join(str(e) for e in expected)
        empty = "every size must be at least 1"
        todo = empty if 0 in tensor.shape else hint or f"reshape it first; {empty}"
        raise ValueError(f"{op}: {name} must have shape ({wanted}), got {tuple(tensor.shape)}; {todo}")


def key_mask(op: str, mask: Tensor | None, batch: int, keys: int, like: Tensor) -> None:
    """A key mask is None or bool (B, M), True = keep."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be a bool tensor, True = keep, got {got}; use mask.bool()")
    if tuple(mask.shape) != (batch, keys):
        raise ValueError(
            f"{op}: mask must have shape (B, M) = ({batch}, {keys}), got {tuple(mask.shape)}; "
            f"it is a key mask with one entry per key, not one per query and key"
        )
    if mask.device != like.device:
        raise ValueError(
            f"{op}: mask must be on {like.device}, got {mask.device}; move it with .to({like.device.type!r})"
        )


def qkv(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> None:
    """q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), mask (B, M); causal needs N == M."""
    if mask is None and _plain(q, k, v) and not (causal and q.shape[2] != k.shape[2]):
        return
    floating(op, q=q, k=k, v=v)
    shape(
        op, "q", q, ("B", "H", "N", "D"), "split the heads with .unflatten(-1, (heads, -1)).transpose(1, 2)"
    )
    b, h, n, d = q.shape
    shape(op, "k", k, (b, h, "M", d))
    m = k.shape[2]
    shape(op, "v", v, (b, h, m, "E"))
    key_mask(op, mask, b, m, q)
    if causal and n != m:
        raise ValueError(
            f"{op}: causal=True needs as many queries as keys, got N={n} and M={m}; "
            f"decode token by token with {op}_step instead"
        )


def _plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether all is well, in 2 us; the messages take 6 to be left unsaid."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return False
    shape, keys, values = q.shape, k.shape, v.shape
    return (
        len(shape) == len(keys) == len(values) == 4
        and shape[:2] == keys[:2]
        and keys[:3] == values[:3]
        and shape[3] == keys[3]
        and 0 not in (*shape, keys[2], values[3])
    )


def cleared(mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Zeros where a token is masked, so that nothing it holds (NaN, inf) reaches a product or a gradient.

    `mask` is (B, M); the tensors have their tokens on the last axis but one.
    """
    if mask is None:
        return list(tensors)
    return [t.masked_fill(~mask.view(mask.shape[0], *(1,) * (t.ndim - 3), -1, 1), 0) for t in tensors]


def finite_queries(mask: Tensor | None, q: Tensor) -> Tensor:
    """Zeros for NaN and inf in the queries of masked tokens, whose gradients (0 * NaN) would reach others.

    Only where there are as many queries (axis -2) as keys: `mask` says nothing about other queries.
    """
    if mask is None or q.shape[-2] != mask.shape[1]:
        return q
    keep = mask.view(mask.shape[0], *(1,) * (q.ndim - 3), -1, 1)
    return q.masked_fill(~(keep | q.isfinite()), 0)


def eps(op: str, value: float, zero: bool = False) -> None:
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"{op}: eps must be {'>= 0' if zero else '> 0'}, got {value}; the default is safe")
