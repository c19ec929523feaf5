"""The trunk of PCT, the Point Cloud Transformer, with any mechanism: sampling, neighbourhoods, blocks.

Guo et al., "PCT: Point Cloud Transformer", Computational Visual Media 2021 (arXiv 2012.09688); published code
PCT_Pytorch, model_new.py, model.py and util.py (classification), and PCT, networks/seg/pct_partseg.py (part
segmentation). Points come as (B, N, 3), with any N; a mask tells which of them are padding.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer
from ..ops import _check
from ..ops._backend import no_autocast
from ._sampling import farthest_points, nearest_points, taken

__all__ = [
    "LinearNormAct",
    "OffsetAttention",
    "OffsetBlock",
    "PointTrunk",
    "SampleAndGroup",
    "pooled",
]

EPS = 1e-9


class LinearNormAct(nn.Module):
    """act(BatchNorm(W x + b)) of every point: (..., dim_in) -> (..., dim), a published 1x1 convolution.

    In training the statistics of the batch are those of the kept points alone.
    """

    def __init__(
        self, dim_in: int, dim: int, act: nn.Module | None = None, bias: bool = False, **factory: Any
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(dim_in, dim, bias=bias, **factory)
        self.norm = nn.BatchNorm1d(dim, **factory)
        self.act = nn.ReLU() if act is None else act

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(self.fc(x), mask)

    def output(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """What follows W x + b; mask is bool (B, N) for y (B, N, dim)."""
        if mask is not None and self.norm.training:
            kept = self.norm(y[mask])
            y = kept.new_zeros(y.shape).index_put((mask,), kept)
        else:
            y = self.norm(y.flatten(0, -2)).view(y.shape)
        return self.act(y)


class SampleAndGroup(nn.Module):
    """num_samples farthest points, and what lies around each: xyz (B, N, 3), x (B, N, C) -> (B, S, 3),
    (B, S, dim).

    Every one of the num_neighbors nearest points j of a sample i becomes [x_j - x_i, x_i], two linear layers
    with batch norm and ReLU follow, and the largest of the neighbours is kept, channel by channel.
    Published code util.py, sample_and_group, and model.py, class Local_op.
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        num_samples: int,
        num_neighbors: int,
        skip_origin: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_samples, self.num_neighbors, self.skip_origin = num_samples, num_neighbors, skip_origin
        self.layers = nn.ModuleList(
            [LinearNormAct(2 * dim_in, dim, **factory), LinearNormAct(dim, dim, **factory)]
        )

    def forward(self, xyz: Tensor, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sampled = farthest_points(xyz, self.num_samples, mask, skip_origin=self.skip_origin)
        centres = taken(xyz, sampled)
        index = nearest_points(centres, xyz, self.num_neighbors, mask)
        first: Any
        first, second = self.layers
        # W [x_j - x_i, x_i] = W_1 x_j + (W_2 - W_1) x_i: a product for every point, not for every neighbour.
        near, centre = first.fc.weight.chunk(2, 1)
        y = taken(F.linear(x, near), index) + F.linear(taken(x, sampled), centre - near)[:, :, None]
        return centres, second(first.output(y)).amax(2)


class OffsetAttention(nn.Module):
    """PCT's self-attention x_r: (B, N, C) -> (B, N, C), with softmax and a second normalisation.

        k = W x (N, C / 4), the queries too,  v = V x + b
        A = softmax(k k^T), over the keys,  A_ij / (eps + sum_i A_ij), over the queries,  x_r = A^T v

    There is no scale, and eps is 1e-9. x_r takes A transposed: a point gathers from those that look at it.
    Published code model.py, class SA_Layer. O(N^2 C) time and O(N^2) memory, in float32 or better.
    """

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.qk = nn.Linear(dim, dim // 4, bias=False, **factory)
        self.v = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """mask (B, N) bool, True = keep, with at least one True: masked points enter no sum."""
        k, v = self.qk(x), self.v(x)
        work = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            k = k.to(work)
            energy = k @ k.mT  # symmetric
            if mask is not None:
                energy = energy.masked_fill(~mask[:, None], -math.inf)
            # Of key j and query i, log A_ij: a column that nobody looks at is far below eps, not 0 / 0.
            log_map = energy - energy.logsumexp(-1)[:, None]
            share = torch.sigmoid(log_map.logsumexp(-1, keepdim=True) - math.log(EPS))
            return (log_map.softmax(-1) @ v.to(work) * share).to(v.dtype)


class OffsetBlock(nn.Module):
    """out = x + ReLU(BatchNorm(linear(x - attn(x)))): (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, attn: nn.Module, **factory: Any) -> None:
        super().__init__()
        self.attn = attn
        self.trans = LinearNormAct(dim, dim, bias=True, **factory)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        # The batch norm stays outside: made again, it would count its batch twice.
        if self.grad_checkpointing and self.training:
            y = checkpoint(self.attn, x, mask=mask)
        else:
            y = self.attn(x, mask=mask)
        return x + self.trans(x - y, mask)


class PointTrunk(nn.Module):
    """points -> two linear layers -> samples with their neighbourhoods -> `depth` blocks -> all blocks'
    outputs, and what entered the first, side by side -> one linear layer.

    Args:
        mechanism: a file name of sansmax.layers, in blocks out = x + ReLU(BatchNorm(linear(x - layer(x)))).
            "softmax" is PCT's own OffsetAttention.
        mechanism_args: the layer's own options; they also override what the trunk passes (num_heads).
        in_chans: channels of a point: x, y, z, and any others behind them (normals, colours).
        embed_dim, depth: width and number of the blocks.
        num_heads: of the mechanism; 4 are as wide as PCT's queries. PCT's own attention has one.
        num_samples: of the stages, each of which doubles the width; () keeps all points and has no stages. A
            cloud of fewer points repeats its first one, which then weighs more in the mechanism.
        num_neighbors: of every sample; fewer points are all taken.
        pos_embed: adds a linear map of x, y, z in front of every block, as model_new.py. False is model.py,
            with a second linear layer behind the stages in place of it.
        num_features: width behind the last linear layer.
        skip_origin: see farthest_points.
        proj_drop_rate: dropout behind the mechanism.
    """

    def __init__(
        self,
        *,
        mechanism: str = "softmax",
        mechanism_args: dict[str, Any] | None = None,
        in_chans: int = 3,
        embed_dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        num_samples: tuple[int, ...] = (512, 256),
        num_neighbors: int = 32,
        pos_embed: bool = True,
        num_features: int = 1024,
        skip_origin: bool = False,
        proj_drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        multiple = max(4, 2 ** len(num_samples))
        if in_chans < 3 or min(num_neighbors, depth, *num_samples) < 1 or embed_dim % multiple:
            raise ValueError(
                f"{self.name}: in_chans must be at least 3, num_neighbors, depth and num_samples at least 1 "
                f"and embed_dim a multiple of {multiple}, got {in_chans}, {num_neighbors}, {depth}, "
                f"{num_samples} and {embed_dim}; the defaults are published"
            )
        self.in_chans, self.num_features = in_chans, num_features
        width = embed_dim >> len(num_samples)
        self.embed = nn.ModuleList(LinearNormAct(dim_in, width, **factory) for dim_in in (in_chans, width))
        self.stages = nn.ModuleList(
            SampleAndGroup(width << i, width << i + 1, samples, num_neighbors, skip_origin, **factory)
            for i, samples in enumerate(num_samples)
        )
        in_front = 0 if not num_samples else 1 if pos_embed else 2
        self.proj = nn.ModuleList(LinearNormAct(embed_dim, embed_dim, **factory) for _ in range(in_front))
        self.pos_embed = nn.Linear(3, embed_dim, **factory) if pos_embed else None
        options = {"num_heads": num_heads, "proj_drop": proj_drop_rate}
        attention = self._attention(mechanism, mechanism_args, options, num_samples)
        self.blocks = nn.ModuleList(
            OffsetBlock(embed_dim, attention(embed_dim, **factory), **factory) for _ in range(depth)
        )
        if num_samples:
            # The order of sampling is no grid. A nearly square one gives a layer all its landmarks.
            rows = max(d for d in range(1, math.isqrt(num_samples[-1]) + 1) if num_samples[-1] % d == 0)
            for mixer in self.mixers().values():
                mixer.set_input((rows, num_samples[-1] // rows))
                mixer.reset_parameters()
        side_by_side = depth + bool(num_samples)
        self.fuse = LinearNormAct(side_by_side * embed_dim, num_features, nn.LeakyReLU(0.2), **factory)

    @property
    def name(self) -> str:
        """The class name, which begins every message."""
        return type(self).__name__

    def _attention(
        self,
        mechanism: str,
        mechanism_args: dict[str, Any] | None,
        options: dict[str, Any],
        num_samples: tuple[int, ...],
    ) -> Any:
        layer = layers.mechanism(mechanism)
        if mechanism == "softmax":
            if mechanism_args:
                raise ValueError(
                    f"{self.name}: mechanism_args must be empty for 'softmax', offset attention here, got "
                    f"{mechanism_args}; choose another mechanism"
                )
            return OffsetAttention
        if layer.traits.needs and not num_samples:
            free = [name for name, other in layers.mechanisms().items() if not other.traits.needs]
            raise ValueError(
                f"{self.name}: mechanism must need no places in a sequence because points have no order and "
                f"may be any number, got {mechanism!r}; use one of {', '.join(free)}"
            )
        return partial(layer, **{**options, **(mechanism_args or {})})

    def mixers(self) -> dict[str, Mixer]:
        """The mechanism's layers by module name; there are none with PCT's own attention."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Mixer)}

    def no_weight_decay(self) -> set[str]:
        """The layers' position tables; the published recipe decays everything."""
        return {f"{name}.{p}" for name, layer in self.mixers().items() for p in layer.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by depth, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^(?:embed|stages|proj|pos_embed)", "blocks": r"^blocks\.(\d+)"}
        return {
            "stem": r"^embed",
            "stages": r"^stages\.(\d+)",
            "proj": r"^(?:proj|pos_embed)",
            "blocks": r"^blocks\.(\d+)",
            "fuse": r"^fuse",
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes what the mechanism kept, such as N x N maps, again in the backward pass."""
        for block in self.blocks:
            block.grad_checkpointing = enable  # pyright: ignore[reportArgumentType]

    def prune_intermediate_layers(self, *args: Any, **words: Any) -> list[int]:
        """Refuses: timm asks for it with features_only=True, and points have no feature maps."""
        raise ValueError(
            f"{self.name}: features_only must be False because points on no grid have no feature maps, got "
            f"True; use model.forward_features(points)"
        )

    def received(self, points: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checked, with zeros in masked points; a cloud without any point is one point at the origin."""
        _check.floating(self.name, points=points)
        hint = "channels come last, x, y, z first; use points.mT on (B, C, N)"
        _check.shape(self.name, "points", points, ("B", "N", self.in_chans), hint)
        _check.key_mask(self.name, mask, points.shape[0], points.shape[1], points)
        (points,) = _check.cleared(mask, points)
        if mask is not None:
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            mask = mask | (first & ~mask.any(1, keepdim=True))
        return points, mask

    def forward_features(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, in_chans), mask (B, N) bool, True = keep -> (B, num_samples[-1] or N, num_features)."""
        x, mask = self.received(points, mask)
        xyz = x[..., :3]
        for layer in self.embed:
            x = layer(x, mask)
        for stage in self.stages:
            xyz, x = stage(xyz, x, mask)
            mask = None  # every sample is a kept point
        local = [x] if self.stages else []
        for layer in self.proj:
            x = layer(x)
        outputs = []
        for block in self.blocks:
            x = block(x if self.pos_embed is None else x + self.pos_embed(xyz), mask)
            outputs.append(x)
        return self.fuse(torch.cat([*outputs, *local], -1), mask)


def pooled(x: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """(B, N, C) -> (B, C): "max" or "avg" of the kept tokens, channel by channel."""
    if mask is not None:
        x = x.masked_fill(~mask[..., None], -math.inf if how == "max" else 0)
    if how == "max":
        return x.amax(1)
    count = x.shape[1] if mask is None else mask.sum(1, keepdim=True)
    # float16 holds no sum of some thousand points.
    return (x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)) / count).to(x.dtype)
