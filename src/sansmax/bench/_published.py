"""Every operator in its published form, written the obvious way: what `fused` is measured against.

Plain equations in the dtype of their inputs, without masks and without care for extreme values. Axes as in
sansmax.ops: heads (B, H, N, D), channels (B, T, C).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.soft import SOFT

__all__ = [
    "PublishedSOFT",
    "published_aft_conv",
    "published_aft_full",
    "published_aft_local",
    "published_aft_simple",
    "published_external",
    "published_sima",
    "published_soft",
    "published_softmax",
    "published_xnorm",
]


def published_softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with the map written out."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(~torch.ones_like(logits[0, 0], dtype=torch.bool).tril(), -math.inf)
    return logits.softmax(-1) @ v


def published_sima(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """l1 norms over the tokens, and the order by the test N < D (SimA, published code).

    Causal, which is not published, as its equation reads: prefix sums and a map.
    """
    if causal:
        return ((q / q.abs().cumsum(-2) / k.abs().cumsum(-2)) @ k.mT).tril() @ v
    q, k = F.normalize(q, p=1.0, dim=-2), F.normalize(k, p=1.0, dim=-2)
    if q.shape[-2] < q.shape[-1]:
        return (q @ k.mT) @ v
    return q @ (k.mT @ v)


def published_xnorm(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, causal: bool = False) -> Tensor:
    """XN(q) XN(k^T v), each l2-normalised and scaled by gamma (X-ViT; ViBid, Algorithm 1).

    Causal, which is not published, as its equation reads: a D x E matrix for every token.
    """
    gamma = gamma[:, None, None]
    if causal:
        kv = (k[..., :, None] * v[..., None, :]).cumsum(2)
        rows = (gamma * F.normalize(q, dim=-1))[..., None, :]
        return (rows @ (gamma[..., None] * F.normalize(kv, dim=-2))).squeeze(-2)
    return (gamma * F.normalize(q, dim=-1)) @ (gamma * F.normalize(k.mT @ v, dim=-2))


def published_soft(q: Tensor, v: Tensor, landmarks: Tensor) -> Tensor:
    """(K1 Z) (K1^T v), Z after 20 Newton steps (SOFT, published code, inverse "plain")."""
    k1 = _gaussian(q, landmarks)
    z = _Newton.apply(_gaussian(landmarks, landmarks))
    return (k1 @ z) @ (k1.mT @ v)


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return torch.exp(-(squares - 2 * x @ y.mT) / 2)


class _Newton(torch.autograd.Function):
    """V <- 2 V - V A V with a ridge of 0.01; the gradient in one shot, as published."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        ridged = a + 0.01 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        v = ridged * (1.8 / a.sum(-1).amax(-1).square())[..., None, None]
        for _ in range(20):
            v = 2 * v - v @ ridged @ v
        ctx.save_for_backward(v)
        return v

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (v,) = ctx.saved_tensors
        return -v.mT @ grad @ v.mT


class PublishedSOFT(nn.Module):
    """A SOFT layer with `ratio` as its published torch path computes it, around that layer's own weights."""

    def __init__(self, layer: SOFT) -> None:
        super().__init__()
        self.layer: SOFT = layer

    def forward(self, x: Tensor) -> Tensor:
        layer: SOFT = self.layer
        b, n, _ = x.shape
        h, d, side = layer.num_heads, layer.head_dim, math.isqrt(n)
        q, v = (f(x).reshape(b, n, h, d).transpose(1, 2) for f in (layer.q, layer.v))
        q = q / d**0.25
        tokens = layer.landmark(q.mT.reshape(b * h, d, side, side)).reshape(b, h, d, -1).mT
        out = published_soft(q, v, F.gelu(layer.landmark_norm(tokens)))
        if layer.conv is not None:
            image = layer.conv(v.permute(0, 3, 1, 2).reshape(b * d, h, side, side))
            out = out + image.reshape(b, d, h, n).permute(0, 2, 3, 1)
        return layer.proj(out.transpose(1, 2).reshape(b, n, h * d))


def published_external(x: Tensor, memory_k: Tensor, memory_v: Tensor) -> Tensor:
    """Softmax over the tokens, then rows divided by 1e-9 + their sum (External Attention, published code)."""
    attention = (x @ memory_k.mT).softmax(-2)
    return (attention / (1e-9 + attention.sum(-1, keepdim=True))) @ memory_v


def published_aft_full(q: Tensor, k: Tensor, v: Tensor, w: Tensor, causal: bool = False) -> Tensor:
    """Eq. 2 as two products with the T x T matrix exp(w)."""
    w, k = w.exp(), k.exp()
    if causal:
        w = w.tril()
    return q.sigmoid() * (w @ (k * v)) / (w @ k)


def published_aft_local(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, window: int, causal: bool = False
) -> Tensor:
    """Eq. 2 with w = 0 at a distance of `window` and more (Eq. 4)."""
    at = torch.arange(w.shape[0], device=w.device)
    near = (at[:, None] - at).abs() < window
    return published_aft_full(q, k, v, w.where(near, torch.zeros_like(w)), causal)


def published_aft_simple(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Eq. 5: softmax of the keys over time; causal as two prefix sums."""
    if causal:
        k = k.exp()
        return q.sigmoid() * (k * v).cumsum(1) / k.cumsum(1)
    return q.sigmoid() * (k.softmax(1) * v).sum(1, keepdim=True)


def published_aft_conv(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, grid: tuple[int, int] | None = None
) -> Tensor:
    """Eq. 6: depth-wise convolutions with exp(w) - 1, and sums over all tokens; k (B, T, H), w (H, s, s).

    Without a grid it is the causal form over a sequence: w (H, s), zeros in front, prefix sums.
    """
    b, t, c = v.shape
    heads, size = w.shape[:2]
    k = k.exp().mT  # (B, H, T)
    kv = k[:, :, None] * v.mT.unflatten(1, (heads, -1))  # (B, H, C/H, T)

    def mixed(x: Tensor) -> Tensor:
        """(B, H, E, T) -> the convolution plus the sum over all tokens."""
        rows = x.transpose(1, 2)
        if grid is None:
            near = F.conv1d(F.pad(rows.flatten(0, 1), (size - 1, 0)), (w.exp() - 1)[:, None], groups=heads)
            return near.reshape(b, -1, heads, t).transpose(1, 2) + x.cumsum(-1)
        near = F.conv2d(
            rows.reshape(-1, heads, *grid), (w.exp() - 1)[:, None], padding=size // 2, groups=heads
        )
        return near.reshape(b, -1, heads, t).transpose(1, 2) + x.sum(-1, keepdim=True)

    ratio = mixed(kv) / mixed(k[:, :, None])
    return q.sigmoid() * ratio.reshape(b, c, t).mT
