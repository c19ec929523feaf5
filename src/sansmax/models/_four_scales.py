"""Features with strides 4, 8, 16 and 32 from networks that have one stride: what decoders and detectors ask
for."""

import math
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ._t2t import T2T
from ._vit import ViT
from ._xcit import XCiT

__all__ = ["FourScales", "FourScalesT2T", "FourScalesViT", "FourScalesXCiT"]

STRIDES = (4, 8, 16, 32)


class FourScales(nn.Module):
    """A mix-in for trunks of equal blocks: feature maps of four blocks, brought to the four strides.

    The blocks stand at a third, a half, two thirds and the end of the depth (3, 5, 7 and 11 of 12 from 0).
    Transposed convolutions (2x2, stride 2; batch norm and GELU between two of them) enlarge, maximum pooling
    shrinks, as in the detection code of XCiT and BEiT. features_only=True gives the maps; as a classifier the
    network is the trunk's own, whose checkpoints it loads, with the necks as they are.

    A map has grid * patch_size / stride rows and columns (rounded up for stride 32): height / stride where
    32 divides the height.
    """

    blocks: Any
    feature_info: list[dict[str, Any]]
    embed_dim: int

    def __init__(self, *, device: Any = None, dtype: Any = None, **words: Any) -> None:
        super().__init__(device=device, dtype=dtype, **words)
        factory = {"device": device, "dtype": dtype}
        patch_size, depth, dim = self.feature_info[0]["reduction"], len(self.blocks), self.embed_dim
        steps = [round(math.log2(patch_size / stride)) for stride in STRIDES]
        if any(stride * 2.0**step != patch_size for stride, step in zip(STRIDES, steps, strict=True)):
            raise ValueError(
                f"{type(self).__name__}: patch_size must be a power of 2 for features with strides 4 to 32, "
                f"got {patch_size}; use 8 or 16"
            )
        self.taken = [max(round(depth * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        self.necks = nn.ModuleList(_neck(dim, step, factory) for step in steps)
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"necks.{i}"} for i, stride in enumerate(STRIDES)
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The feature maps of strides 4, 8, 16 and 32 (`indices` among them, None all); see timm.models.

        output_fmt "NLC" gives tokens in place of maps; norm=True normalises the tokens in front of the necks;
        with return_prefix_tokens every map comes with its block's class token, if the trunk has one.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be NCHW or NLC, got {output_fmt!r}; use NCHW"
            )
        wanted, _ = feature_take_indices(len(self.necks), indices)
        blocks = sorted({self.taken[i] for i in wanted})
        trunk: Any = super()
        got = trunk.forward_intermediates(
            x,
            blocks,
            norm=norm,
            stop_early=stop_early,
            intermediates_only=intermediates_only,
            return_prefix_tokens=return_prefix_tokens,
        )
        final, taken = (None, got) if intermediates_only else got
        maps = []
        for i in wanted:
            y = taken[blocks.index(self.taken[i])]
            y, *prefix = y if isinstance(y, tuple) else (y,)
            y = self.necks[i](y)
            y = y.flatten(2).mT if output_fmt == "NLC" else y
            maps.append((y, *prefix) if prefix else y)
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leaves out the blocks and necks behind the deepest scale that is asked for.

        The necks of others are frozen: without a gradient they would stop DistributedDataParallel.
        """
        wanted, deepest = feature_take_indices(len(self.necks), indices)
        trunk: Any = super()
        trunk.prune_intermediate_layers(sorted({self.taken[i] for i in wanted}), prune_norm, prune_head)
        self.necks = self.necks[: deepest + 1]
        for i, neck in enumerate(self.necks):
            if i not in wanted:
                neck.requires_grad_(False)
        return wanted

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The trunk's groups and, last, the necks."""
        trunk: Any = super()
        return {**trunk.group_matcher(coarse), "necks": r"^necks"}

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trunk's, and the necks' own weights for a checkpoint that has none."""
        rename = getattr(super(), "published_state", None)
        state = state if rename is None else rename(state)
        if not any(key.startswith("necks.") for key in state):
            own = {f"necks.{key}": value for key, value in self.necks.state_dict().items()}
            state = {**state, **own}
        return state


def _neck(dim: int, step: int, factory: dict[str, Any]) -> nn.Module:
    """(B, C, H, W) -> (B, C, 2^step H, 2^step W)."""
    if step < 0:
        return nn.MaxPool2d(2**-step, ceil_mode=True)
    enlarge: list[nn.Module] = []
    for i in range(step):
        if i:
            enlarge += [nn.BatchNorm2d(dim, **factory), nn.GELU()]
        enlarge.append(nn.ConvTranspose2d(dim, dim, 2, 2, **factory))
    return nn.Sequential(*enlarge)


# The trunks take further arguments in forward_intermediates, each others.
class FourScalesViT(FourScales, ViT):  # pyright: ignore[reportIncompatibleMethodOverride]
    """ViT with features of four scales."""


class FourScalesT2T(FourScales, T2T):  # pyright: ignore[reportIncompatibleMethodOverride]
    """T2T with features of four scales."""


class FourScalesXCiT(FourScales, XCiT):  # pyright: ignore[reportIncompatibleMethodOverride]
    """XCiT with features of four scales."""
