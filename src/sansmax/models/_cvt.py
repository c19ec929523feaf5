"""CvT, a pyramid of three stages with strides 4, 8 and 16 whose attention stands behind convolutions.

Wu et al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021 (arXiv 2103.15808), section 3;
published code cls_cvt.py.
"""

import re
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.activations import QuickGELU
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer
from ..layers._contract import Grid
from ..layers._parts import HeadsMixer
from ..layers.softmax import Softmax
from ._layouts import join
from ._pyramid import PreNormBlock
from ._staged import Stage, Staged

__all__ = ["ConvAttention", "CvT"]

# Kernel, stride and padding of the convolutions that make tokens: of the first stage and of the others.
PATCHES = ((7, 4, 2), (3, 2, 1))
# Below, the first of them finds no place in the image.
SMALLEST = 3

# Published names in ours, in this order.
KEYS = (
    (r"^stage2\.cls_token$", "cls_token"),
    (r"^stage(\d)\.patch_embed\.", r"stages.\1.embed."),
    (r"^stage(\d)\.", r"stages.\1."),
    (r"\.attn\.conv_proj_(q|k|v)\.", r".attn.conv_proj.\1."),
    (r"\.attn\.proj\.", r".attn.mixer.proj."),
)


class ConvAttention(nn.Module):
    """A mechanism behind depthwise 3x3 convolutions: (B, prefix + rows * columns, C) -> the same.

        softmax, sima, xnorm:  q, k, v = W_q f_q(x), W_k f_k(x), W_v f_v(x), then the mechanism in its heads
        the others:            mechanism(f(x))

    Every f is a convolution without bias and a BatchNorm. f_q has stride 1, f_k and f_v have stride 2:
    rows * columns queries meet ceil(rows / 2) * ceil(columns / 2) keys. The others make keys of the queries'
    own tokens (soft, soft_norm, aft_*) or have learned ones (external, external_multihead), so that no number
    of keys can differ from that of the queries: they have one f, of stride 1. The prefix tokens pass by the
    convolutions and stand in front of queries, keys and values.

    The scale of softmax is C^-1/2 with the whole width C, as in the published code, not head_dim^-1/2; sima
    and xnorm divide any scale of q out. The rows of the layer's `qkv` are W_q, W_k, W_v.
    """

    def __init__(self, mixer: Mixer, prefix: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.mixer, self.prefix = mixer, prefix
        strides = {"q": 1, "k": 2, "v": 2} if isinstance(mixer, HeadsMixer) else {"x": 1}
        width, factory = mixer.dim, {"device": device, "dtype": dtype}
        self.conv_proj = nn.ModuleDict()
        for key, stride in strides.items():
            conv = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False, **factory)
            self.conv_proj[key] = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width, **factory)))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        mixer, image = self.mixer, x[:, self.prefix :].mT.unflatten(-1, grid)
        inputs = [conv(image).flatten(2).mT for conv in self.conv_proj.values()]
        if self.prefix:
            inputs = [torch.cat([x[:, : self.prefix], tokens], 1) for tokens in inputs]
        if not isinstance(mixer, HeadsMixer):
            return mixer(inputs[0], grid=grid)
        weight, bias = mixer.qkv.weight, mixer.qkv.bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(*projection).unflatten(-1, (mixer.num_heads, mixer.head_dim)).transpose(1, 2)
            for projection in zip(inputs, weight.chunk(3), biases, strict=True)
        )
        q, k, drop = mixer.q_norm(q), mixer.k_norm(k), 0.0
        if isinstance(mixer, Softmax):
            q = q * mixer.num_heads**-0.5
            drop = mixer.attn_drop.p if mixer.training else 0.0
        if drop:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        else:
            y = mixer.attend(q, k, v, None, False)
        return mixer.output(y.transpose(1, 2).flatten(2), x)


class Block(PreNormBlock):
    """x = x + dp(attn(norm1(x))); x = x + dp(mlp(norm2(x))), LayerNorm eps 1e-5, QuickGELU."""

    def __init__(self, dim: int, *, proj_drop: float, **words: Any) -> None:
        super().__init__(dim, **words)
        self.norm1.eps = self.norm2.eps = 1e-5
        self.mlp.act = QuickGELU()
        self.mlp.drop1.p = self.mlp.drop2.p = proj_drop


class CvT(Staged):
    """image -> stages of a convolution, LayerNorm and pre-norm blocks; a class token enters the last stage
    -> norm -> head on the class token. No positions, and any image of at least 3 x 3 pixels.

    The first grid has floor((height + 1) / 4) rows, every further one half of them, rounded up; columns
    likewise.

    Args:
        mechanism: a file name of sansmax.layers; "softmax" is CvT itself. See ConvAttention for where it
            stands.
        mechanism_args: the layer's own options in all stages; they also override what the trunk passes.
        img_size: the size that the layers' tables are made for, if they have any.
        embed_dims, depths: of the stages; three as published.
        num_heads: of the stages, or one number for all.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, behind the mechanisms and in the
            MLPs, and on softmax's attention map; the other mechanisms refuse the last.
        drop_path_rate: the largest of the last stage's branches, whose rates grow linearly with depth; the
            other stages have none. 0.1 in the published recipe.

    Raises:
        ValueError: the image is too small, or an argument that the mechanism cannot follow.
    """

    def __init__(
        self,
        *,
        mechanism: str = "softmax",
        mechanism_args: dict[str, Any] | None = None,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: tuple[int, ...] = (64, 192, 384),
        depths: tuple[int, ...] = (1, 2, 10),
        num_heads: int | tuple[int, ...] = (1, 3, 6),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        layer = layers.mechanism(mechanism)
        self.num_classes = num_classes
        self.set_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
        _check_size(rows, columns)
        if isinstance(num_heads, int):
            num_heads = (num_heads,) * len(embed_dims)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims[-1], **factory))
        self.stages, channels = nn.ModuleList(), in_chans
        for i, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            last = i == len(embed_dims) - 1
            kernel, stride, padding = PATCHES[min(i, 1)]
            rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (rows, columns))
            rates = torch.linspace(0, drop_path_rate if last else 0, depth, device="cpu")
            blocks = []
            for rate in rates.tolist():
                words = {
                    "num_heads": heads,
                    "qkv_bias": True,
                    "attn_drop": attn_drop_rate,
                    "proj_drop": proj_drop_rate,
                    **(mechanism_args or {}),
                }
                mixer = layer(dim, **words, **factory)
                mixer.set_input((rows, columns), int(last))
                attention = ConvAttention(mixer, int(last), **factory)
                blocks.append(
                    Block(
                        dim,
                        mixer=attention,
                        mlp_ratio=mlp_ratio,
                        drop=rate,
                        proj_drop=proj_drop_rate,
                        **factory,
                    )
                )
            proj = nn.Conv2d(channels, dim, kernel, stride, padding, **factory)
            norm = LayerNorm2d(dim, eps=1e-5, **factory)
            self.stages.append(Stage(nn.Sequential(OrderedDict(proj=proj, norm=norm)), blocks, int(last)))
            channels = dim
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(embed_dims)
        ]
        self.norm = nn.LayerNorm(embed_dims[-1], **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dims[-1], num_classes, **factory) if num_classes else nn.Identity()
        self.apply(self._init_weights)
        trunc_normal_(self.cls_token, std=0.02)
        for mixer in self.mixers().values():
            mixer.reset_parameters()

    def _stage(self, stage: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if stage is self.stages[0]:
            _check_size(*x.shape[-2:])
        return super()._stage(stage, x)

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' keys in ours; our own pass as they are."""
        if not any(key.startswith("stage0.") for key in state):
            return state
        renamed = {}
        for key, value in state.items():
            for pattern, ours in KEYS:
                key = re.sub(pattern, ours, key)
            renamed[key] = value
        for key in [key for key in renamed if ".attn.proj_q." in key]:
            parts = [key.replace(".proj_q.", f".proj_{part}.") for part in "qkv"]
            join(renamed, parts, key.replace(".proj_q.", ".mixer.qkv."))
        return renamed


def _check_size(height: int, width: int) -> None:
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"CvT: an image must have at least {SMALLEST} x {SMALLEST} pixels, got {height} x {width}; "
            f"enlarge it"
        )
