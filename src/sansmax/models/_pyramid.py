"""A pyramid of four stages with strides 4, 8, 16 and 32, for any mechanism: the trunk of SOFT."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.activations import GELUTanh
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer
from ..layers._contract import Grid

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


class Stage(nn.Module):
    """Convolutions, positions (a table, resized bilinearly to any grid), blocks.

    (B, C, height, width) -> tokens (B, prefix + rows * columns, C') and their grid.
    """

    def __init__(
        self, embed: nn.Sequential, grid: Grid, dim: int, blocks: Iterable[nn.Module], prefix: int, **factory
    ):
        super().__init__()
        self.embed, self.grid, self.prefix = embed, grid, prefix
        self.pos_embed = nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1], dim, **factory))
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, class_token: Tensor | None = None) -> tuple[Tensor, Grid]:
        x = self.embed(x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).mT
        if class_token is not None:
            x = torch.cat([class_token, x], 1)
        x = x + self.positions(self.pos_embed, self.grid, grid)
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x, grid

    def positions(self, table: Tensor, old: Grid, new: Grid) -> Tensor:
        """A table for the grid `old` resized to `new`; the class token's row stays."""
        if old == new:
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


class Pyramid(nn.Module):
    """image -> stages 1 to 3: convolutions, + positions, post-norm blocks with the mechanism -> stage 4:
    class token, pre-norm blocks with softmax attention -> norm -> head. Any image size.

    Published code of SOFT, softmax_free_vision_transformer.py.

    Args:
        mechanism: a file name of sansmax.layers, for stages 1 to 3.
        mechanism_args: the layer's own options in all stages.
        stage_args: further options for one stage each.
        softmax_free: the mechanism in the last stage too, where the paper and its code keep softmax.
        img_size: the size that the tables of positions are made for.
        embed_dims, depths, num_heads: of the four stages.
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
        num_heads: tuple[int, ...] = (2, 4, 10, 16),
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
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
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
                Stage(nn.Sequential(*convs), (rows, columns), dim, blocks, int(last), **factory)
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

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def mixers(self) -> dict[str, Mixer]:
        """The mechanism's layers by module name, and softmax in the last stage."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Mixer)}

    def no_weight_decay(self) -> set[str]:
        """The class token and the layers' tables; the published recipe decays the positions."""
        own = {f"{name}.{p}" for name, layer in self.mixers().items() for p in layer.no_weight_decay()}
        return {"cls_token"} | own

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by depth, for layer-wise learning rates."""
        stem = r"^cls_token|^stages\.0\.(embed|pos_embed)"
        if coarse:
            return {"stem": stem, "blocks": r"^stages\.(\d+)"}
        return {
            "stem": stem,
            "blocks": [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.(embed|pos_embed)", (0,)),
                (r"^norm", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes the activations of the blocks again in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # pyright: ignore[reportArgumentType]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for num_classes (0: none); global_pool "token", "avg" or ""."""
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.cls_token
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The patch tokens behind the stages `indices`; see timm.models.

        Args:
            x: (B, in_chans, height, width).
            indices: stages; an int takes the last ones, None all.
            norm: the final norm on the last stage's tokens.
            stop_early: leaves stages out that no index asks for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: leaves out the normalised tokens of the last stage, which are otherwise the
                first of two results.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be NCHW or NLC, got {output_fmt!r}; use NCHW"
            )
        wanted, deepest = feature_take_indices(len(self.stages), indices)
        maps, tokens = [], x
        stages: Any = self.stages[: deepest + 1] if stop_early else self.stages
        for i, stage in enumerate(stages):
            tokens, x = self._stage(stage, x)
            if i in wanted:
                last = stage.prefix > 0
                y = self.norm(tokens) if norm and last else tokens
                y = y[:, stage.prefix :]
                maps.append(y.mT.unflatten(-1, x.shape[2:]) if output_fmt == "NCHW" else y)
        return maps if intermediates_only else (self.norm(tokens), maps)

    def _stage(self, stage: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with the class token, and the image of the others."""
        # A view would require gradients even under no_grad, and torch.utils.flop_counter then fails.
        tokens, grid = stage(x, self.cls_token.repeat(x.shape[0], 1, 1) if stage.prefix else None)
        return tokens, tokens[:, stage.prefix :].mT.unflatten(-1, grid)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leaves out what stands behind the deepest stage that is asked for."""
        wanted, deepest = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: deepest + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, 1 + tokens, C), the class token first."""
        tokens = x
        for stage in self.stages:
            tokens, x = self._stage(stage, x)
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x[:, 1:].mean(1) if self.global_pool == "avg" else x[:, 0]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
