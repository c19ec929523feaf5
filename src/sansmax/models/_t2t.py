"""T2T-ViT: tokens made of overlapping windows in three soft splits with token layers between them.

Yuan et al., "Tokens-to-Token ViT", ICCV 2021 (arXiv 2101.11986); in the form of EAMLP (published code of
External Attention, EAMLP/models), whose token layers differ from T2T-ViT's: the skip is the projected query.
"""

import math
import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.format import Format, nchw_to
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.layers.weight_init import trunc_normal_
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer
from ..layers._contract import Grid
from ..layers.external import ExternalAttention
from . import _layouts
from ._vit import ViT

__all__ = ["T2T", "TokenLayer", "TokensToToken", "sinusoid_positions"]

# Window, stride and padding of the soft splits.
SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


def sinusoid_positions(tokens: int, dim: int) -> Tensor:
    """(1, tokens, dim) in float64: sin and cos of n / 10000^(2 (j // 2) / dim) in even and odd channels j."""
    channel = torch.arange(dim, dtype=torch.float64, device="cpu")
    rates = 10000 ** (-2 * (channel // 2) / dim)
    angles = torch.arange(tokens, dtype=torch.float64, device="cpu")[:, None] * rates
    angles[:, 0::2].sin_()
    angles[:, 1::2].cos_()
    return angles[None]


class TokenLayer(nn.Module):
    """i = query(norm1(x)); y = i + mixer(i); out = y + mlp(norm2(y)): (B, N, in_dim) -> (B, N, dim).

    Published code of EAMLP, classes Token_performer and Token_transformer. LayerNorm's eps is 1e-5.
    """

    def __init__(self, in_dim: int, dim: int, *, mixer: Mixer, **factory: Any) -> None:
        super().__init__()
        self.norm1 = LayerNorm(in_dim, eps=1e-5, **factory)
        self.query = nn.Linear(in_dim, dim, **factory)
        self.attn = mixer
        self.norm2 = LayerNorm(dim, eps=1e-5, **factory)
        self.mlp = Mlp(dim, dim, **factory)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        query = self.query(self.norm1(x))
        x = query + self.attn(query, grid=grid)
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """image -> 7x7 windows, stride 4 -> token layer -> 3x3 windows, stride 2 -> token layer -> 3x3 windows,
    stride 2 -> linear: a patch embedding of timm with patches of 16, for images of any size from 3 px.

    Args:
        mechanism, mechanism_args: of the token layers, which have one head; "external" is published, with
            128 rows, a bias behind M_v and no query of its own.
        token_dim: width of the token layers.
        token_attn_drop, token_drop: dropout on their maps, and behind their attention.
        strict_img_size: images of another size are refused.
        output_fmt: None for tokens (B, N, C), or "NHWC" or "NCHW".
        **unused: arguments of timm's patch embeddings that have no meaning here.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        patch_size: int | Grid = 16,
        in_chans: int = 3,
        embed_dim: int = 256,
        *,
        mechanism: str = "external",
        mechanism_args: dict[str, Any] | None = None,
        token_dim: int = 64,
        token_attn_drop: float = 0.0,
        token_drop: float = 0.0,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.strict_img_size, self.output_fmt = strict_img_size, output_fmt
        layer = layers.mechanism(mechanism)
        own: dict[str, Any] = {"num_heads": 1, "proj_drop": token_drop}
        if layer.attention_map:
            own["attn_drop"] = token_attn_drop
        if layer is ExternalAttention:
            own |= {"memory": 128, "query_proj": False, "memory_bias": True}
        else:
            own["qkv_bias"] = True
        own |= mechanism_args or {}
        widths = [in_chans * SPLITS[0][0] ** 2, *(token_dim * split[0] ** 2 for split in SPLITS[1:])]
        self.token_layers = nn.ModuleList(
            TokenLayer(width, token_dim, mixer=layer(token_dim, **own, **factory), **factory)
            for width in widths[:-1]
        )
        self.proj = nn.Linear(widths[-1], embed_dim, **factory)
        self.grad_checkpointing = False
        self.img_size: Grid = (0, 0)
        self.set_input_size(img_size, patch_size)

    def set_input_size(
        self, img_size: int | Grid | None = None, patch_size: int | Grid | None = None
    ) -> None:
        """Another image size, which the token layers are told; the patch stays 16."""
        if patch_size not in (None, 16, (16, 16)):
            raise ValueError(
                f"T2T: patch_size must be 16, 4 * 2 * 2 in three splits, got {patch_size}; use 16"
            )
        if img_size is not None:
            self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
            token_layers: Any = self.token_layers
            for module, grid in zip(token_layers, self.grids(self.img_size), strict=False):
                module.attn.set_input(grid)

    @staticmethod
    def grids(size: Grid) -> list[Grid]:
        """Rows and columns behind each soft split."""
        found = [size]
        for window, stride, padding in SPLITS:
            rows, columns = ((side + 2 * padding - window) // stride + 1 for side in found[-1])
            found.append((rows, columns))
        return found[1:]

    @property
    def grid_size(self) -> Grid:
        return self.grids(self.img_size)[-1]

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid_size)

    @property
    def patch_size(self) -> Grid:
        return 16, 16

    def feat_ratio(self, as_scalar: bool = True) -> int | Grid:
        return 16 if as_scalar else (16, 16)

    def dynamic_feat_size(self, img_size: Grid) -> Grid:
        """Rows and columns of tokens of an image."""
        return self.grids((img_size[0], img_size[1]))[-1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        size: Grid = (x.shape[2], x.shape[3])
        if (self.strict_img_size and size != self.img_size) or min(size) < 3:
            raise ValueError(
                f"T2T: the image must be {self.img_size[0]} x {self.img_size[1]}, as the network was built, "
                f"or with dynamic_img_size=True at least 3 x 3, got {size[0]} x {size[1]}; resize it, or "
                f"call set_input_size"
            )
        grids = self.grids(size)
        for module, grid, (window, stride, padding) in zip(self.token_layers, grids, SPLITS, strict=False):
            x = F.unfold(x, window, stride=stride, padding=padding).mT
            x = checkpoint(module, x, grid) if self.grad_checkpointing else module(x, grid)
            x = x.mT.unflatten(-1, grid)
        window, stride, padding = SPLITS[-1]
        x = self.proj(F.unfold(x, window, stride=stride, padding=padding).mT)
        return (
            x if self.output_fmt is None else nchw_to(x.mT.unflatten(-1, grids[-1]), Format(self.output_fmt))
        )


class T2T(ViT):
    """Soft splits and token layers, then a ViT with fixed sinusoid positions; LayerNorm's eps is 1e-5.

    Published code of EAMLP, class T2T_ViT. Images may have any size (the published one takes squares, with
    sides that are multiples of 16): the positions are resampled for grids other than img_size's.

    Args:
        mechanism, mechanism_args: of the blocks.
        token_mechanism, token_args: of the token layers, see TokensToToken.
        token_dim, token_attn_drop, token_drop: see TokensToToken.
        **words: see ViT and timm's VisionTransformer.
    """

    def __init__(
        self,
        *,
        token_mechanism: str = "external",
        token_args: dict[str, Any] | None = None,
        token_dim: int = 64,
        token_attn_drop: float = 0.0,
        token_drop: float = 0.0,
        **words: Any,
    ) -> None:
        embed = partial(
            TokensToToken,
            mechanism=token_mechanism,
            mechanism_args=token_args,
            token_dim=token_dim,
            token_attn_drop=token_attn_drop,
            token_drop=token_drop,
        )
        super().__init__(**{"norm_layer": partial(LayerNorm, eps=1e-5), "embed_layer": embed, **words})

    def settle(self) -> None:
        super().settle()
        self._draw_memories()

    def _draw_memories(self) -> None:
        """The published token layers draw them like all linear layers."""
        for mixer in self.patch_embed.modules():
            if isinstance(mixer, ExternalAttention):
                memory_k, memory_v = mixer.memories
                trunc_normal_(memory_k, std=0.02)
                with torch.no_grad():
                    memory_v.copy_(memory_k)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's, with the class token drawn at 0.02 and the positions fixed."""
        super().init_weights(mode, needs_reset)
        self._draw_memories()
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed.copy_(sinusoid_positions(*self.pos_embed.shape[1:]))
            self.pos_embed.requires_grad_(False)

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The keys of EAMLP in ours, with positions of a square grid resampled; our own pass as they are.

        The token layers' memories are linear_0 and linear_1 in the networks with Token_performer, linear_1
        and linear_2 with Token_transformer. The blocks' linear_0.bias cancels in the softmax over tokens; it
        is kept where the network has a place for it (mechanism_args={"dead_bias": True}, as eamlp_* have).
        """
        if not any(key.startswith("tokens_to_token.") for key in state):
            return super().published_state(state)
        renamed = {}
        for key, value in state.items():
            token_layer = re.match(r"tokens_to_token\.attention(\d+)\.", key)
            if token_layer is None:
                key = _layouts.renamed(
                    key, (("tokens_to_token.project.", "patch_embed.proj."), *_layouts.EXTERNAL_MULTIHEAD)
                )
            else:
                key = key.replace("attn.q_linear.", "query.")
                key = f"patch_embed.token_layers.{int(token_layer[1]) - 1}.{key[token_layer.end() :]}"
                first = 1 if "tokens_to_token.attention1.attn.linear_2.weight" in state else 0
                for name, ours in ((f"linear_{first}", "memory_k"), (f"linear_{first + 1}", "memory_v")):
                    key = key.replace(f"attn.{name}.weight", f"attn.{ours}")
                    key = key.replace(f"attn.{name}.bias", f"attn.{ours}_bias")
            renamed[key] = _layouts.transposed(value) if key.endswith("attn.memory_v") else value
        for key in [key for key in renamed if key.endswith("attn.memory_k_bias")]:
            if key not in dict(self.named_parameters()):
                del renamed[key]
        return super().published_state(renamed)
