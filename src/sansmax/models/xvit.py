"""X-ViT and ViBid: XCiT's skeleton around XNorm, with a bottleneck, affine residuals and learned positions.

Song and Lee, "X-ViT: High Performance Linear Vision Transformer without Softmax", 2022 (arXiv 2205.13805) and
"ViBid", UAI 2023 (PMLR 216), whose Table 1 the sizes are from. `xvit_*` learns a gamma per head, `vibid_*`
has none. No code and no weights were published: stem, kind of positions and the start of the affine scales
are not printed. Here stem and start are XCiT's, positions are learned; parameters and multiply-adds are the
printed ones.
"""

from functools import partial
from typing import Any

import torch
from timm.layers.mlp import Mlp
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer, XNorm
from ._four_scales import FourScales
from ._layouts import square
from ._register import register
from ._xcit import MixerXCBlock, XCiT

__all__ = ["XViT"]


class LearnedPositions(nn.Module):
    """One vector per patch, (1, rows * columns, C), resampled bicubic to any other grid."""

    def __init__(self, dim: int, grid: tuple[int, int], device=None, dtype=None) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, batch: int, rows: int, columns: int) -> Tensor:
        """(B, C, rows, columns), as timm's XCiT asks for it."""
        table = resample_abs_pos_embed(self.table, [rows, columns], list(self.grid), num_prefix_tokens=0)
        # A view would require gradients even under no_grad, and torch.utils.flop_counter then fails.
        return table.mT.unflatten(-1, (rows, columns)).repeat(batch, 1, 1, 1)


class PatchInteraction(nn.Module):
    """Twice a 3x3 depth-wise convolution, a batch norm and a GELU: (B, rows * columns, C) -> the same.

    XCiT's own has one norm and one GELU, between its convolutions.
    """

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        stages = [
            (
                nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory),
                nn.BatchNorm2d(dim, **factory),
                nn.GELU(),
            )
            for _ in range(2)
        ]
        self.stages = nn.Sequential(*(layer for stage in stages for layer in stage))

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        return self.stages(x.mT.unflatten(-1, (rows, columns))).flatten(2).mT


class AffineXCBlock(MixerXCBlock):
    """The XCiT block with gamma y + beta (ResMLP's affine) in place of LayerScale's gamma y."""

    beta1: nn.Parameter
    beta2: nn.Parameter
    beta3: nn.Parameter

    def scaled(self, branch: int, y: Tensor) -> Tensor:
        gamma = getattr(self, f"gamma{branch}")
        return y if gamma is None else torch.addcmul(self.get_parameter(f"beta{branch}"), gamma, y)


class ClassBlock(nn.Module):
    """XNorm class attention and an MLP, both for the class token alone: (B, 1 + N, C) -> (B, 1 + N, C).

    c = c + gamma1 attn(norm1(c), norm1([c; x])) + beta1; c = c + gamma2 mlp(norm2(c)) + beta2. The patch
    tokens x pass as they are.
    """

    def __init__(
        self, dim: int, mixer: Mixer, mlp_ratio: float, norm_layer: Any, eta: float, drop: float, **factory
    ):
        super().__init__()
        self.norm1 = norm_layer(dim, **factory)
        self.attn = mixer
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **factory)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), eta, **factory)) for _ in range(2))
        self.beta1, self.beta2 = (nn.Parameter(torch.zeros(dim, **factory)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        token = x[:, :1] + torch.addcmul(self.beta1, self.gamma1, self.attn(y[:, :1], context=y))
        token = token + torch.addcmul(self.beta2, self.gamma2, self.mlp(self.norm2(token)))
        return torch.cat([token, x[:, 1:]], 1)


class XViT(XCiT):
    """image -> 3x3 convolutions with stride 2 -> + positions -> depth x (XNorm, local patch interaction,
    MLP), each branch behind a LayerNorm and followed by gamma y + beta -> class token enters -> 2 class
    blocks -> norm -> head.

    Args:
        attn_dim: h, the width of the attention: q, k and v have h channels, `proj` leads back to embed_dim.
        gamma: XNorm's number per head (X-ViT); False is ViBid's BiNorm.
        lpi: "bn_gelu" (PatchInteraction, with which the number of parameters is the printed one) or "xcit".
        positions: "learned" (resampled to other grids), "fourier" as in XCiT, or "none".
        eta: where the affine scales start.
        mechanism, mechanism_args: another mechanism for the blocks, and its options; the class blocks keep
            XNorm.
        **words: see timm.models.xcit.Xcit.
    """

    def __init__(
        self,
        *,
        attn_dim: int,
        gamma: bool = True,
        lpi: str = "bn_gelu",
        positions: str = "learned",
        mechanism: str = "xnorm",
        mechanism_args: dict[str, Any] | None = None,
        embed_dim: int = 384,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Any = None,
        eta: float = 1.0,
        cls_attn_layers: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **words: Any,
    ) -> None:
        if positions not in ("learned", "fourier", "none"):
            raise ValueError(
                f"XViT: positions must be learned, fourier or none, got {positions!r}; learned is usual"
            )
        if lpi not in ("bn_gelu", "xcit"):
            raise ValueError(f"XViT: lpi must be bn_gelu or xcit, got {lpi!r}; bn_gelu is usual")
        if mechanism == "softmax":
            raise ValueError(
                "XViT: mechanism must be linear in the tokens because XCiT's softmax has no bottleneck, got "
                "'softmax'; use an xcit network for it"
            )
        if attn_drop_rate > 0 and not layers.mechanism(mechanism).attention_map:
            raise ValueError(
                f"XViT: attn_drop_rate must be 0 because {mechanism!r} and the class blocks have no map to "
                f"drop from, got {attn_drop_rate}; use proj_drop_rate"
            )
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        factory = {"device": device, "dtype": dtype}
        own = {"attn_dim": attn_dim, "gamma": gamma}
        super().__init__(
            mechanism=mechanism,
            mechanism_args={**(own if mechanism == "xnorm" else {}), **(mechanism_args or {})},
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            norm_layer=norm_layer,
            eta=eta,
            cls_attn_layers=0,
            use_pos_embed=positions == "fourier",
            **factory,
            **words,
        )
        if positions == "learned":
            stem: Any = self.patch_embed
            rows, columns = (-(-side // stem.patch_size) for side in stem.img_size)
            self.pos_embed = LearnedPositions(embed_dim, (rows, columns), **factory)
        for block in self.blocks:
            block.__class__ = AffineXCBlock
            if lpi == "bn_gelu":
                block.local_mp = PatchInteraction(embed_dim, **factory)
            for branch in (1, 2, 3):
                block.register_parameter(f"beta{branch}", nn.Parameter(torch.zeros(embed_dim, **factory)))
        self.cls_attn_blocks = nn.ModuleList(
            ClassBlock(
                embed_dim,
                XNorm(embed_dim, num_heads, qkv_bias, **own, proj_drop=proj_drop_rate, **factory),
                mlp_ratio,
                norm_layer,
                eta,
                proj_drop_rate,
                **factory,
            )
            for _ in range(cls_attn_layers)
        )
        self.cls_attn_blocks.apply(self._init_weights)

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Learned positions resampled where the file's grid is square and of another number of patches."""
        key, own = "pos_embed.table", self.pos_embed
        table = state.get(key)
        if not isinstance(own, LearnedPositions) or table is None or table.shape == own.table.shape:
            return state
        if table.shape[2:] == own.table.shape[2:] and (old := square(table.shape[1])):
            table = resample_abs_pos_embed(table, list(own.grid), list(old), num_prefix_tokens=0)
        return {**state, key: table}


class FourScalesXViT(FourScales, XViT):  # pyright: ignore[reportIncompatibleMethodOverride]
    """XViT with features of four scales."""


# Width, width of the attention, heads, blocks (ViBid, Table 1).
SIZES = {
    "u": (192, 96, 4, 12),
    "tiny": (192, 96, 4, 24),
    "small": (384, 128, 8, 12),
    "medium": (384, 128, 8, 24),
    "base": (512, 128, 8, 24),
}

register(
    __name__,
    XViT,
    {
        f"{family}_{size}_p16": {
            "patch_size": 16,
            "embed_dim": width,
            "attn_dim": attn_dim,
            "num_heads": heads,
            "depth": depth,
            "gamma": family == "xvit",
            "eta": 1.0 if depth == 12 else 1e-5,
        }
        for family in ("xvit", "vibid")
        for size, (width, attn_dim, heads, depth) in SIZES.items()
    },
    source="ViBid, Table 1; X-ViT's own table was not readable.",
    pyramid=FourScalesXViT,
    first_conv="patch_embed.proj.0.0",
)
