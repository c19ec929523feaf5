"""A pyramid of four stages with strides 4, 8, 16 and 32, for any mechanism: the trunk of SOFT."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.activations import GELUTanh
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer
from ..layers._contract import Grid
from ..ops._eager import for_all
from ._staged import Stage, Staged

__all__ = ["PostNormBlock", "Pyramid"]


class PostNormBlock(nn.Module):
    """y = norm1(x + drop(mixer(x))); out = norm2(y + drop(mlp(y))): (B, N, C) -> (B, N, C).

    Published code of SOFT, class SoftmaxFreeTransformerBlock: the norms come after the sums (LayerNorm eps
    1e-5), the MLP's GELU is the tanh approximation, and the recipe's drop path is an ordinary dropout.
    """

    def __init__(
        self, dim: int, *, mixer: Mixer, mlp_ratio: float = 4.0, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.attn = mixer
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = Mlp(
            dim,
            int(dim * mlp_ratio),
            act_layer=GELUTanh,
            device=device,
            dtype=dtype,
        )
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x, grid=grid)))
        return self.norm2(x + self.drop(self.mlp(x)))


class PreNormBlock(nn.Module):
    """x = x + dp(mixer(norm1(x))); x = x + dp(mlp(norm2(x))), LayerNorm eps 1e-6: the last stage's block."""

    def __init__(
        self, dim: int, *, mixer: Mixer, mlp_ratio: float = 4.0, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.attn = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop) if drop > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid=grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PositionedStage(Stage):
    """A stage with positions behind its convolutions: a table, resized bilinearly to any grid."""

    def __init__(
        self, embed: nn.Sequential, grid: Grid, dim: int, blocks: Iterable[nn.Module], prefix: int, **factory
    ):
        super().__init__(embed, blocks, prefix)
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1], dim, **factory))

    def placed(self, x: Tensor, grid: Grid) -> Tensor:
        return x + self.positions(self.pos_embed, self.grid, grid)

    def positions(self, table: Tensor, old: Grid, new: Grid) -> Tensor:
        """A table for the grid `old` resized to `new`; the class token's row stays."""
        if not for_all(*new) and old == new:
            return table
        image = table[:, self.prefix :].mT.unflatten(-1, old)
        image = F.interpolate(image, new, mode="bilinear", align_corners=False)
        return torch.cat([table[:, : self.prefix], image.flatten(2).mT], 1)


def _conv(inputs: int, outputs: int, stride: int, **factory: Any) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, 1, **factory),
        nn.BatchNorm2d(outputs, **factory),
        nn.ReLU(),
    ]


class Pyramid(Staged):
    """image -> stages 1 to 3: convolutions, + positions, post-norm blocks with the mechanism -> stage 4:
    class token, pre-norm blocks with softmax attention -> norm -> head. Any image size.

    Published code of SOFT, softmax_free_vision_transformer.py.

    Args:
        mechanism: a file name of sansmax.layers, for stages 1 to 3.
        mechanism_args: the layer's own options in all stages.
        stage_args: further options for one stage each.
        softmax_free: the mechanism in the last stage too, where the paper and its code keep softmax.
        img_size: the size that the tables of positions are made for.
        embed_dims, depths: of the four stages.
        num_heads: of the stages, or one number for all.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head, behind the mechanisms, and the
            largest of the branches' rates, which grow with depth: an ordinary dropout in stages 1 to 3, as
            published.
    """

    def __init__(
        self,
        *,
        mechanism: str = "soft",
        mechanism_args: dict[str, Any] | None = None,
        stage_args: tuple[dict[str, Any], ...] = ({}, {}, {}),
        softmax_free: bool = False,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (1, 2, 3, 2),
        num_heads: int | tuple[int, ...] = (2, 4, 10, 16),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        layer = layers.mechanism(mechanism)
        self.num_classes = num_classes
        self.set_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
        if isinstance(num_heads, int):
            num_heads = (num_heads,) * len(embed_dims)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims[-1], **factory))
        self.stages, channels = nn.ModuleList(), in_chans
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            last = i == len(embed_dims) - 1
            if i == 0:
                convs = [
                    *_conv(channels, 32, 2, **factory),
                    *_conv(32, 32, 1, **factory),
                    *_conv(32, dim, 2, **factory),
                ]
            else:
                convs = _conv(channels, dim, 2, **factory)
            for _ in range(2 if i == 0 else 1):
                rows, columns = -(-rows // 2), -(-columns // 2)
            own = layer if not last or softmax_free else layers.mechanism("softmax")
            options = {**(mechanism_args or {}), **(stage_args[min(i, len(stage_args) - 1)])}
            options = options if own is layer else {}
            mixers = [
                own(
                    dim,
                    **{
                        "num_heads": heads,
                        "qkv_bias": True,
                        "proj_drop": proj_drop_rate,
                        **options,
                        **factory,
                    },
                )
                for _ in range(depths[i])
            ]
            for mixer in mixers:
                mixer.set_input((rows, columns), int(last))
            block = PreNormBlock if last else PostNormBlock
            blocks = [
                block(dim, mixer=mixer, mlp_ratio=mlp_ratio, drop=rate.item(), **factory)
                for mixer, rate in zip(mixers, rates[i], strict=True)
            ]
            self.stages.append(
                PositionedStage(nn.Sequential(*convs), (rows, columns), dim, blocks, int(last), **factory)
            )
            channels = dim
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(embed_dims)
        ]
        self.norm = nn.LayerNorm(embed_dims[-1], eps=1e-6, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dims[-1], num_classes, **factory) if num_classes else nn.Identity()
        self.apply(self._init_weights)
        for table in (self.cls_token, *(stage.pos_embed for stage in self.stages)):
            trunc_normal_(table, std=0.02)
        for mixer in self.mixers().values():
            mixer.reset_parameters()
