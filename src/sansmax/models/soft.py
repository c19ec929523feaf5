"""SOFT and SOFT++: pyramids whose first three stages have a Gaussian kernel in place of softmax.

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021 (arXiv 2110.11945) and
"Softmax-free Linear Transformers", IJCV 2024 (arXiv 2207.03341); published code of both. The last stage of
the published networks is ordinary softmax attention. `soft_small_24m` has the depths of the paper's Table 1,
which fit its 24 M parameters; the code's `soft_small` has 20 blocks in its third stage and 39 M.
"""

import re
from typing import Any

from torch import Tensor

from ._layouts import join, square
from ._pyramid import Pyramid
from ._register import register

__all__ = ["SOFTPyramid"]

# Published names in ours, in this order.
KEYS = (
    (r"^patch_embed(\d)\.proj\.", r"stages.\1.embed."),
    (r"^pos_embed(\d)$", r"stages.\1.pos_embed"),
    (r"^block(\d)\.", r"stages.\1.blocks."),
    (r"\.att\.mha\.W_(q|v)\.", r".attn.\1."),
    (r"\.att\.mha\.ff\.", r".attn.proj."),
    (r"\.att\.mha\.attn\.Qlandmark_op\.", r".attn.landmark."),
    (r"\.att\.mha\.attn\.Qnorm_act\.0\.", r".attn.landmark_norm."),
    (r"\.att\.mha\.attn\.conv\.", r".attn.conv."),
    (r"\.att\.ff(1|2)\.", r".mlp.fc\1."),
    (r"\.att\.norm", r".norm"),
)


class SOFTPyramid(Pyramid):
    """The pyramid with SOFT's landmarks: a convolution of size and stride 8, 4, 2 in the three stages, as
    published.

    Args:
        inverse: "plain", "norm" or "release2021", see sansmax.ops.soft; None is the mechanism's own.
        landmarks: in place of the strides, a fixed number of landmarks (49) at any image size. With the
            strides the landmarks grow with the image, and the cost is quadratic again.
        **words: see Pyramid.
    """

    published_wrappers = ("state_dict_ema",)

    def __init__(
        self,
        *,
        mechanism: str = "soft",
        mechanism_args: dict[str, Any] | None = None,
        inverse: str | None = None,
        landmarks: int | None = None,
        **words: Any,
    ) -> None:
        stage_args: tuple[dict[str, Any], ...] = ({}, {}, {})
        if mechanism in ("soft", "soft_norm"):
            own = {} if inverse is None else {"inverse": inverse}
            stage_args = tuple(
                {
                    **own,
                    "conv_size": size,
                    **({"ratio": ratio} if landmarks is None else {"landmarks": landmarks}),
                }
                for ratio, size in ((8, 9), (4, 5), (2, 3), (1, 3))
            )
        elif inverse is not None or landmarks is not None:
            raise ValueError(
                f"SOFTPyramid: inverse and landmarks belong to mechanism 'soft' or 'soft_norm', got "
                f"{mechanism!r}; leave them out"
            )
        super().__init__(mechanism=mechanism, mechanism_args=mechanism_args, stage_args=stage_args, **words)

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' keys in ours, with positions of a square grid resized; so are those of our own files
        where they have another number of patches."""
        published = any(key.startswith("block1.") for key in state)
        renamed = {}
        for key, value in state.items():
            if published:
                for pattern, ours in KEYS:
                    key = re.sub(pattern, ours, key)
                # Their stages count from 1.
                key = re.sub(r"^stages\.(\d)", lambda found: f"stages.{int(found[1]) - 1}", key)
            renamed[key] = value
        for key in [key for key in renamed if ".attn.kv." in key]:
            join(renamed, [key.replace(".kv.", ".q."), key], key.replace(".kv.", ".qkv."))
        stages: Any = self.stages
        for i, stage in enumerate(stages):
            table: Any = renamed.get(f"stages.{i}.pos_embed")
            if table is None or table.shape[2:] != stage.pos_embed.shape[2:] or not table.is_floating_point():
                continue
            old = square(table.shape[1] - stage.prefix)
            if old and (published or table.shape[1] != stage.pos_embed.shape[1]):
                renamed[f"stages.{i}.pos_embed"] = stage.positions(table, old, stage.grid)
        return renamed


DEPTHS = {
    "tiny": (1, 2, 3, 2),
    "small": (1, 3, 20, 4),
    "small_24m": (1, 3, 7, 4),
    "medium": (1, 3, 29, 5),
    "large": (1, 3, 40, 5),
    "huge": (1, 5, 49, 5),
}
# Channels of the third stage, in heads of 32.
THIRD = {"medium": 288, "huge": 352}

register(
    __name__,
    SOFTPyramid,
    {
        f"{mechanism}_{size}": {
            "mechanism": mechanism,
            "depths": depths,
            "embed_dims": (64, 128, THIRD.get(size, 320), 512),
            "num_heads": (2, 4, THIRD.get(size, 320) // 32, 16),
        }
        for mechanism in ("soft", "soft_norm")
        for size, depths in DEPTHS.items()
    },
    source="Published code of SOFT.",
    out_indices=4,
    first_conv="stages.0.embed.0",
    crop_pct=0.9,
)
