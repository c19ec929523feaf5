"""PCT for classification and part segmentation of point clouds, with its own attention or any mechanism.

Guo et al., "PCT: Point Cloud Transformer", Computational Visual Media 2021 (arXiv 2012.09688). `pct_cls` is
published code model_new.py of PCT_Pytorch; with `pos_embed=False` it is model.py, which its main.py trains.
`pct_partseg` is networks/seg/pct_partseg.py of PCT.

`pct_ea_*` have External Attention in place of PCT's (Guo et al., 2021, arXiv 2105.02358, which reports both
tasks). No code of it was published: that the layer stands in PCT's offset form, out = x + ReLU(BatchNorm(
linear(x - layer(x)))), and has no projection of its own behind it, is an inference.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._points import LinearNormAct, PointTrunk, pooled
from ._register import register

__all__ = ["PCT", "PCTPartSeg"]

# Published names in ours, in this order; <1> becomes 0, because they count from 1.
KEYS = (
    (r"\.conv\.(weight|bias)$", r".\1"),  # Jittor's Conv1d holds a Conv2d
    (r"^(?:pt_last\.)?sa(\d)\.", r"blocks.<\1>."),
    (r"\.(q|v)_conv\.", r".attn.\1."),
    (r"\.k_conv\.", r".attn.qk."),
    (r"\.trans_conv\.", r".trans.fc."),
    (r"\.after_norm\.", r".trans.norm."),
    (r"^pt_last\.pos_xyz\.", r"pos_embed."),
    (r"^pt_last\.(conv|bn)(\d)\.", r"proj.<\2>.\1."),
    (r"^gather_local_(\d)\.(conv|bn)(\d)\.", r"stages.\1.layers.<\3>.\2."),
    (r"^conv_fuse\.0\.", r"fuse.fc."),
    (r"^conv_fuse\.1\.", r"fuse.norm."),
    (r"^label_conv\.0\.", r"label.fc."),
    (r"^label_conv\.1\.", r"label.norm."),
    (r"^(?:linear|convs)3\.", r"head."),
    (r"^(?:linear|convs)(\d)\.", r"hidden.<\1>.fc."),
    (r"^bns(\d)\.", r"hidden.<\1>.norm."),
    (r"^bn6\.", r"hidden.0.norm."),
    (r"^bn7\.", r"hidden.1.norm."),
    (r"^(conv|bn)(\d)\.", r"embed.<\2>.\1."),
    (r">\.conv\.", r">.fc."),
    (r">\.bn\.", r">.norm."),
)


class PointNetwork(PointTrunk):
    """What both networks have around the trunk: a head, and the authors' names."""

    hidden: nn.ModuleList
    head: nn.Module

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_head(self, num_classes: int) -> None:
        """A new head for num_classes; 0 for none."""
        last: Any = self.hidden[-1]
        like = last.fc.weight
        self.num_classes, self.head = num_classes, nn.Identity()
        if num_classes:
            self.head = nn.Linear(len(like), num_classes, device=like.device, dtype=like.dtype)

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' keys (PCT_Pytorch, and PCT's part segmentation) in ours; our own pass as they are."""
        if not any(key.startswith("conv_fuse.") for key in state):
            return state
        renamed = {}
        for key, value in state.items():
            for pattern, ours in KEYS:
                key = re.sub(pattern, ours, key)
            key = re.sub(r"<(\d)>", lambda found: str(int(found[1]) - 1), key)
            renamed[key] = value.flatten(1) if value.ndim > 2 else value
        for key in [key for key in renamed if ".attn.q." in key]:
            q = renamed.pop(key)  # the one name that safetensors may have kept of the two
            if not torch.equal(q, renamed.setdefault(key.replace(".q.", ".qk."), q)):
                raise ValueError(
                    f"checkpoint: expected one weight for queries and keys of a block, got two in "
                    f"{key.partition('.attn')[0]}; PCT shares them, load weights that do"
                )
        # Jittor does not count batches.
        counters = {k: torch.zeros_like(v) for k, v in self.state_dict().items() if "num_batches" in k}
        return counters | renamed


class PCT(PointNetwork):
    """Classification: points -> trunk -> largest of all points in every channel -> two linear layers -> head.

    In eval mode the output of a cloud depends neither on its batch-mates nor, where no two distances are
    equal, on the order of the points behind the first, with which the sampling starts.

    Args:
        num_classes: 0 for no head.
        global_pool: "max" as published, "avg", or "" for an output per sample.
        head_dims: widths of the two linear layers.
        drop_rate: dropout behind both; 0.5 as published.
        **words: see PointTrunk.
    """

    def __init__(
        self,
        *,
        num_classes: int = 40,
        global_pool: str = "max",
        head_dims: tuple[int, int] = (512, 256),
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **words: Any,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(**words, **factory)
        first, second = head_dims
        self.hidden = nn.ModuleList(
            [
                LinearNormAct(self.num_features, first, nn.LeakyReLU(0.2), **factory),
                LinearNormAct(first, second, nn.LeakyReLU(0.2), bias=True, **factory),
            ]
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.head_hidden_size = second
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for num_classes (0: none); global_pool "max", "avg" or ""."""
        if global_pool not in (None, "max", "avg", ""):
            raise ValueError(
                f"{self.name}: global_pool must be max, avg or empty, got {global_pool!r}; use max"
            )
        if global_pool is not None:
            self.global_pool = global_pool
        self.set_head(num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False, *, mask: Tensor | None = None) -> Tensor:
        """(B, N, num_features) -> (B, num_classes); mask (B, N) only where the trunk has no samples."""
        if self.global_pool:
            x = pooled(x, mask, self.global_pool)
        for layer in self.hidden:
            x = self.head_drop(layer(x))
        return x if pre_logits else self.head(x)

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of whole clouds.

        Args:
            points: (B, N, in_chans), x, y, z first, any N.
            mask: (B, N) bool, True = keep: what a masked point holds changes nothing and gets no gradient.

        Returns:
            (B, num_classes).
        """
        points, mask = self.received(points, mask)
        return self.forward_head(self.forward_features(points, mask), mask=None if self.stages else mask)


class PCTPartSeg(PointNetwork):
    """Segmentation: points -> trunk without samples -> every point beside the largest and the mean of all
    points and a feature of the object's category -> two linear layers -> head.

    In eval mode the output of a cloud does not depend on its batch-mates, and permuted points have permuted
    outputs.

    Args:
        num_classes: parts of all categories together; 0 for no head.
        num_categories: kinds of objects, 16 as in ShapeNet; 0 for a network without labels.
        label_dim: width of the category's feature.
        head_dims: widths of the two linear layers.
        drop_rate: dropout behind the first; 0.5 as published.
        **words: see PointTrunk.
    """

    def __init__(
        self,
        *,
        num_classes: int = 50,
        num_categories: int = 16,
        label_dim: int = 64,
        head_dims: tuple[int, int] = (512, 256),
        drop_rate: float = 0.0,
        embed_dim: int = 128,
        pos_embed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **words: Any,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(embed_dim=embed_dim, pos_embed=pos_embed, num_samples=(), **words, **factory)
        self.num_categories, self.label, shared = num_categories, None, 2 * self.num_features
        if num_categories:
            self.label = LinearNormAct(num_categories, label_dim, nn.LeakyReLU(0.2), **factory)
            shared += label_dim
        first, second = head_dims
        self.hidden = nn.ModuleList(
            [
                LinearNormAct(self.num_features + shared, first, bias=True, **factory),
                LinearNormAct(first, second, bias=True, **factory),
            ]
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.head_hidden_size = second
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for num_classes (0: none); there is no pooling to choose."""
        if global_pool is not None:
            raise ValueError(
                f"{self.name}: global_pool must be None because every point has an output, got "
                f"{global_pool!r}; leave it out"
            )
        self.set_head(num_classes)

    def categories(self, label: Tensor | None, x: Tensor) -> Tensor | None:
        """label (B,) or (B, num_categories) -> (B, num_categories) in the dtype of x."""
        batch, kinds = len(x), self.num_categories
        if label is not None and kinds and label.shape == (batch,) and not label.is_floating_point():
            label = F.one_hot(label.long(), kinds)
        if (None if label is None else label.shape) != ((batch, kinds) if kinds else None):
            wanted = f"integers ({batch},) or one-hot ({batch}, {kinds})" if kinds else "None"
            got = None if label is None else f"{label.dtype} {tuple(label.shape)}"
            raise ValueError(
                f"{self.name}: label must be {wanted} with num_categories={kinds}, got {got}; "
                f"build the network with the number of categories, 0 for none"
            )
        return None if label is None else label.to(x.dtype)

    def forward_head(
        self,
        x: Tensor,
        label: Tensor | None = None,
        pre_logits: bool = False,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N, num_features) -> (B, num_classes, N); label and mask as in forward."""
        shared = [pooled(x, mask, "max"), pooled(x, mask, "avg")]
        category = self.categories(label, x)
        if self.label is not None:
            shared.append(self.label(category))
        first: Any
        first, second = self.hidden
        # What all points share is multiplied once, not N times.
        own, others = first.fc.weight.tensor_split([x.shape[-1]], 1)
        y = F.linear(x, own) + F.linear(torch.cat(shared, -1), others, first.fc.bias)[:, None]
        y = second(self.head_drop(first.output(y, mask)), mask)
        return (y if pre_logits else self.head(y)).mT

    def forward(self, points: Tensor, label: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits of every point, classes second, as F.cross_entropy takes them.

        Args:
            points: (B, N, in_chans), x, y, z first, any N.
            label: categories of the objects, integers (B,) or one-hot (B, num_categories).
            mask: (B, N) bool, True = keep: what a masked point holds changes nothing and gets no gradient;
                its logits are 0.

        Returns:
            (B, num_classes, N).
        """
        points, kept = self.received(points, mask)
        y = self.forward_head(self.forward_features(points, kept), label, mask=kept)
        return y if mask is None else y.masked_fill(~mask[:, None], 0)


# No images: timm would make in_chans of an input_size.
CFG = dict.fromkeys(("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std"))
# The block's linear layer follows the memory's values at once, as it does PCT's.
EXTERNAL = {"mechanism": "external", "mechanism_args": {"out_proj": False}, "drop_rate": 0.5}

register(
    __name__,
    PCT,
    {"pct_cls": {"drop_rate": 0.5}, "pct_ea_cls": EXTERNAL},
    source="PCT_Pytorch, model_new.py; ModelNet40, 1024 points in the unit ball.",
    num_classes=40,
    first_conv="embed.0.fc",
    **CFG,
)
register(
    __name__,
    PCTPartSeg,
    {"pct_partseg": {"drop_rate": 0.5}, "pct_ea_partseg": EXTERNAL},
    source="PCT, networks/seg/pct_partseg.py; ShapeNet's 16 categories of objects.",
    num_classes=50,
    first_conv="embed.0.fc",
    **CFG,
)
