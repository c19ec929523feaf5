"""timm's XCiT with any mechanism, and the class attention that SimA puts in place of CaiT's.

timm's XCiT supplies stem, Fourier positions, local patch interaction and the residual wiring; the published
SimA code (sima.py) differs from XCiT in the two attentions alone, and its state dict has the same keys.
"""

from typing import Any

import timm
import torch
from timm.models import load_checkpoint
from timm.models.xcit import (
    ClassAttentionBlock,
    PositionalEncodingFourier,
    XCABlock,
    Xcit,
)
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer
from ..layers._contract import Grid
from ..ops._backend import no_autocast
from ..ops._split import split_heads
from ..ops.sima import SimAState, parts
from ._inference import scale_outputs

__all__ = ["MixerXCBlock", "SimAClassAttention", "SimAClassAttentionBlock", "XCiT", "create_xcit"]


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
        q, k, v = split_heads(self.qkv(x), self.num_heads)  # (B, H, N, D)
        # In half precision 1 / N^2 weights are subnormal from about 420 tokens on.
        work = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            q, k = q.to(work), k.to(work)
            q_sum, k_sum = (t.abs().sum(-2, keepdim=True).clamp(min=self.eps) for t in (q, k))
            attention = self.attn_drop((q[:, :, :1] / q_sum / k_sum) @ k.mT)  # (B, H, 1, N)
            out = (attention @ v.to(work)).to(v.dtype)
        return self.output(out)

    def token_sums(self, x: Tensor, before: SimAState | None = None) -> SimAState:
        """See Mixer; the class token's first part begins with it."""
        return parts.summed(*split_heads(self.qkv(x), self.num_heads), before)

    def from_sums(self, x: Tensor, sums: SimAState) -> Tensor:
        """What `forward` gives for tokens x of which the first is the class token; see Mixer."""
        q, _, _ = split_heads(self.qkv(x[:, :1]), self.num_heads)
        return self.output(parts.applied(q, sums, self.eps))

    def output(self, y: Tensor) -> Tensor:
        """(B, H, 1, D) -> (B, 1, C)."""
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


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

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + self.drop_path1(self.scaled(1, self.attn(self.norm1(x), grid=(H, W))))
        x = x + self.drop_path3(self.scaled(3, self.local_mp(self.norm3(x), H, W)))
        return x + self.drop_path2(self.scaled(2, self.mlp(self.norm2(x))))

    def scaled(self, branch: int, y: Tensor) -> Tensor:
        """LayerScale of a branch."""
        gamma = getattr(self, f"gamma{branch}")
        return y if gamma is None else gamma * y

    def fold_scales(self) -> None:
        """Multiplies LayerScale into the layers that end the branches: for inference alone."""
        for branch, layer in (
            (1, self.attn.proj),
            (2, self.mlp.fc2),
            (3, getattr(self.local_mp, "conv2", None)),
        ):
            if layer is not None:
                scale_outputs(layer, getattr(self, f"gamma{branch}"), getattr(self, f"beta{branch}", None))
                setattr(self, f"gamma{branch}", None)


class DoubleFourierPositions(PositionalEncodingFourier):
    """timm's Fourier positions with a table in float64, where the published one is always float32."""

    hidden_dim: int
    scale: float
    temperature: float
    eps: float
    token_projection: nn.Conv2d

    def forward(self, B: int, H: int, W: int) -> Tensor:
        weight = self.token_projection.weight
        double: dict[str, Any] = {"dtype": torch.float64, "device": weight.device}
        channel = torch.arange(self.hidden_dim, **double)
        rates = self.temperature ** (2 * (channel // 2) / self.hidden_dim)
        rows, columns = (
            torch.arange(1, size + 1, **double)[:, None] / (size + self.eps) * self.scale / rates
            for size in (H, W)
        )
        waves = (torch.stack([a[:, 0::2].sin(), a[:, 1::2].cos()], 2).flatten(1) for a in (rows, columns))
        y, x = waves
        table = torch.cat([y[:, None].expand(H, W, -1), x[None].expand(H, W, -1)], -1).permute(2, 0, 1)
        return self.token_projection(table[None].to(weight.dtype)).repeat(B, 1, 1, 1)


class XCiT(Xcit):
    """timm's XCiT with a mechanism in place of cross-covariance attention, at any image size.

    image -> 3x3 convolutions with stride 2 -> + Fourier positions -> depth x (mechanism, local patch
    interaction, MLP) -> class token enters -> class attention blocks -> norm -> head. Height and width may
    be any number of pixels: the grid is ceil(height / patch_size) by ceil(width / patch_size).

    Args:
        mechanism: a file name of sansmax.layers; "softmax" is XCiT's own cross-covariance attention. "sima"
            also has its own class attention, as published; with the others it is XCiT's, with softmax.
        mechanism_args: the layer's own options; they also override what the trunk passes (num_heads).
        pos_dtype: of the table of Fourier positions: float32, as published whatever the network's, or
            float64, with which logits differ by some 1e-9.
        **words: see timm.models.xcit.Xcit. attn_drop_rate drops from the map of the class attention, and
            from the blocks' where they have one.
    """

    def __init__(
        self,
        *,
        mechanism: str = "softmax",
        mechanism_args: dict[str, Any] | None = None,
        pos_dtype: torch.dtype = torch.float32,
        img_size: int | Grid = 224,
        patch_size: int = 16,
        **words: Any,
    ) -> None:
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        # timm asserts whole patches, which its forward pass does not need.
        rows, columns = (-(-side // patch_size) * patch_size for side in sides)
        super().__init__(img_size=(rows, columns), patch_size=patch_size, **words)
        if pos_dtype == torch.float64 and isinstance(self.pos_embed, PositionalEncodingFourier):
            self.pos_embed.__class__ = DoubleFourierPositions
        elif pos_dtype != torch.float32:
            raise ValueError(
                f"{type(self).__name__}: pos_dtype must be torch.float32 or, with Fourier positions, "
                f"torch.float64, got {pos_dtype}; leave it out"
            )
        self.set_mechanism(mechanism, mechanism_args)

    def set_mechanism(self, mechanism: str, mechanism_args: dict[str, Any] | None = None) -> None:
        """Puts new layers of another mechanism into a network that still has XCiT's own."""
        layer = layers.mechanism(mechanism)
        if mechanism == "softmax":
            if mechanism_args:
                raise ValueError(
                    f"XCiT: mechanism_args must be empty for 'softmax', which is cross-covariance attention "
                    f"here, got {mechanism_args}; choose another mechanism"
                )
            return
        stem: Any = self.patch_embed
        class_blocks: Any = self.cls_attn_blocks
        weight = next(stem.parameters())
        factory = {"device": weight.device, "dtype": weight.dtype}
        for block in self.blocks:
            own: Any = block.attn
            words = {
                "num_heads": own.num_heads,
                "qkv_bias": own.qkv.bias is not None,
                "proj_drop": own.proj_drop.p,
                **({"attn_drop": own.attn_drop.p} if layer.attention_map else {}),
                **(mechanism_args or {}),
            }
            block.attn = layer(self.embed_dim, **words, **factory)
            block.__class__ = MixerXCBlock
        if mechanism == "sima":
            for block in class_blocks or ():  # features_only leaves them out
                own = block.attn
                block.attn = SimAClassAttention(
                    self.embed_dim,
                    (mechanism_args or {}).get("num_heads", own.num_heads),
                    own.q.bias is not None,
                    own.attn_drop.p,
                    own.proj_drop.p,
                    **factory,
                )
        rows, columns = (-(-side // stem.patch_size) for side in stem.img_size)
        for mixer in self.mixers().values():
            mixer.set_input((rows, columns))
        self.apply(self._init_weights)
        for mixer in self.mixers().values():
            mixer.reset_parameters()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """timm's; with return_prefix_tokens every map comes with the class token (B, 1, C).

        The class token enters behind the blocks, so it is the parameter itself.
        """
        got: Any = super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        final, maps = (None, got) if intermediates_only else got
        token: Any = self.cls_token
        if return_prefix_tokens and token is not None:
            maps = [(y, token.expand(len(y), -1, -1)) for y in maps]
        return maps if intermediates_only else (final, maps)

    def mixers(self) -> dict[str, Mixer]:
        """The mechanism's layers by module name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Mixer)}

    def no_weight_decay(self) -> set[str]:
        """Parameters that should not decay: timm's and the layers' position tables."""
        own = {f"{name}.{p}" for name, layer in self.mixers().items() for p in layer.no_weight_decay()}
        return super().no_weight_decay() | own

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' keys (XCiT's xcit.py, SimA's sima.py) in timm's names; timm's own pass as they are.

        timm's class attention has three layers where XCiT's has one. The authors' networks without positions
        keep their layer.
        """
        own, renamed = self.state_dict(), {}
        for key, value in state.items():
            key = key.replace("pos_embeder.", "pos_embed.")
            stem, _, leaf = key.partition(".qkv.")
            parts = [f"{stem}.{part}.{leaf}" for part in "qkv"]
            fits = value.ndim > 0 and len(value) % 3 == 0
            if key not in own and fits and all(part in own for part in parts):
                renamed |= zip(parts, value.chunk(3), strict=True)
            elif self.pos_embed is not None or not key.startswith("pos_embed."):
                renamed[key] = value
        return renamed


def create_xcit(
    trunk: str, mechanism: str, mechanism_args: dict[str, Any] | None, pretrained: bool, **kwargs: Any
) -> nn.Module:
    """One of timm's own XCiTs; see sansmax.create_model."""
    if pretrained and mechanism != "softmax":
        raise ValueError(
            f"{trunk}: pretrained must be False because timm's weights are made for cross-covariance "
            f"attention, got True for mechanism {mechanism!r}; use mechanism='softmax' or train the network"
        )
    checkpoint_path = kwargs.pop("checkpoint_path", None)
    model: Any = timm.create_model(trunk, pretrained=pretrained, **kwargs)
    xcit = getattr(model, "model", model)
    # timm's entrypoints decide which class they build; XCiT adds only methods to it.
    xcit.__class__ = XCiT
    xcit.set_mechanism(mechanism, mechanism_args)
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path)  # not by timm, whose network still has XCiT's attention
    return model
