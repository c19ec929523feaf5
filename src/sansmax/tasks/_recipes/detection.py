"""A run that learns to find objects."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from .._run import Run, Words, at_least, positive, shares

__all__ = ["LEVELS", "ObjectData", "Recipe"]

LEVELS = 5  # of a detector's pyramid


@dataclass(frozen=True)
class ObjectData:
    """Where images and the boxes of their objects come from."""

    root: str = "digits"
    """A folder in COCO's layout (annotations/instances_<split>.json beside the folders of images) or
    VOCdevkit/VOC2012; digits: scikit-learn's handwritten digits on its photographs, without a download."""
    split: str = "train"
    """What is learned."""
    val_split: str = "val"
    """What is held out; the training split again shows what a network can learn by heart."""
    num_samples: int | None = None
    """Learn from the first so many of a fixed shuffle; None: all."""
    val_samples: int | None = None
    """Hold out the first so many of a fixed shuffle; None: all."""
    workers: int | None = None
    """Processes that decode, for each training process (None: one a core, at most 8)."""


@dataclass(frozen=True)
class Recipe(Run):
    """A network that finds objects: boxes, and with mask_rcnn their pixels."""

    task: ClassVar[str] = "detection"
    evaluated: ClassVar[tuple[str, ...]] = (
        "data",
        "eval_side",
        "long_side",
        "batch_size",
        "device",
        "precision",
    )

    model: str = "soft_tiny"
    """Any network of timm or sansmax with features of strides 4, 8, 16 and 32. One without attention, such as
    resnet50, has the mechanism on its last map."""
    detector: Literal["retinanet", "faster_rcnn", "mask_rcnn"] = "retinanet"
    """Of torchvision; mask_rcnn also finds an object's pixels."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Side in pixels of the anchors on each of the five levels of the pyramid (strides 8 to 128 of retinanet,
    4 to 64 of the others)."""
    fpn_channels: int = 256
    """Of the feature pyramid, and of the convolutions of retinanet and of the mask head."""
    head_channels: int = 1024
    """Of the linear layers behind a box of faster_rcnn and mask_rcnn."""
    freeze_norm: bool = False
    """Whether batch norms of the network stay as they begin."""
    detector_args: Words = field(default_factory=dict)
    """Further words for torchvision's detector, as JSON: {"score_thresh": 0.01}."""
    short_sides: tuple[int, ...] = (800,)
    """An image is resized so that its short side is one of these, drawn anew each time."""
    long_side: int = 1333
    """At most so long; then the short side is shorter."""
    eval_side: int | None = None
    """The short side in evaluation and prediction; None: the largest of short_sides."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    data: ObjectData = field(default_factory=ObjectData)

    def checked(self) -> Self:
        d = self.data
        at_least(
            1,
            {f"data.{k}": getattr(d, k) for k in ("num_samples", "val_samples")},
            short_sides=min(self.short_sides, default=0),
            long_side=self.long_side,
            eval_side=self.eval_side,
            fpn_channels=self.fpn_channels,
            head_channels=self.head_channels,
        )
        at_least(0, {"data.workers": d.workers})
        shares({"hflip": self.hflip})
        positive({"anchor_sizes": min(self.anchor_sizes, default=0.0)})
        if len(self.anchor_sizes) != LEVELS:
            raise ValueError(
                f"anchor_sizes: expected {LEVELS} sides, one for each level of the pyramid, got "
                f"{self.anchor_sizes}; use 32 64 128 256 512, or smaller ones for small images"
            )
        if self.parallel == "fsdp":
            raise ValueError(
                "parallel: expected ddp with detection, whose processes compute unequally often, got fsdp; "
                "use ddp"
            )
        if not isinstance(self.detector_args, dict):
            raise ValueError(
                f"detector_args: expected a JSON object such as '{{\"score_thresh\": 0.01}}', got "
                f"{self.detector_args!r}"
            )
        return super().checked()

    @property
    def evaluation_side(self) -> int:
        """The short side in evaluation."""
        return self.eval_side or max(self.short_sides)
