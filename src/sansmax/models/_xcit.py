"""Blocks of the XCiT trunk for any mechanism, and the class attention that SimA puts in place of CaiT's.

timm's XCiT supplies stem, Fourier positions, local patch interaction and the residual wiring; the published
SimA code (sima.py) differs from XCiT in the two attentions alone, and its state dict has the same keys.
"""

import torch
from timm.models.xcit import ClassAttentionBlock, XCABlock
from torch import Tensor, nn

from sansmax.layers._contract import Mixer
from sansmax.ops._backend import no_autocast

__all__ = ["MixerXCBlock", "SimAClassAttention", "SimAClassAttentionBlock"]


class SimAClassAttention(nn.Module):
    """SimA for a class token that asks all tokens: (B, N, C) -> (B, 1, C).

    q and k are divided by max(sum over all N tokens |.|, eps) and only the class token's row of q (token 0)
    is used: out = proj(dropout(q^_0 k^^T) v). q is therefore computed for every token. Published code
    sima.py, class ClassAttention; its eps is 1e-6, not the 1e-12 of SimA. O(N C) besides the projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        eps: float = 1e-6,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"SimAClassAttention: num_heads must divide dim={dim}, got {num_heads}; change one of them"
            )
        self.num_heads, self.eps = num_heads, eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
        # In half precision 1 / N^2 weights are subnormal from about 420 tokens on.
        work = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            q, k = q.to(work), k.to(work)
            q_sum, k_sum = (t.abs().sum(-2, keepdim=True).clamp(min=self.eps) for t in (q, k))
            attention = self.attn_drop((q[:, :, :1] / q_sum / k_sum) @ k.mT)  # (B, H, 1, N)
            out = (attention @ v.to(work)).to(v.dtype)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class SimAClassAttentionBlock(ClassAttentionBlock):
    """timm's class attention block around SimAClassAttention: patch tokens leave doubled, as published."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **words,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **words)
        self.attn = SimAClassAttention(
            dim,
            num_heads,
            qkv_bias,
            attn_drop,
            proj_drop,
            device=words.get("device"),
            dtype=words.get("dtype"),
        )


class MixerXCBlock(XCABlock):
    """timm's XCiT block, (attention, local patch interaction, MLP) with LayerScale, around any mechanism."""

    def __init__(self, dim: int, num_heads: int, *, mixer: Mixer, **words) -> None:
        super().__init__(dim, num_heads, **words)
        self.attn = mixer
