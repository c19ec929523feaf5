"""A run that learns the class of every pixel."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from .._run import Run, Words, at_least, positive, shares

__all__ = ["MaskData", "Recipe"]


@dataclass(frozen=True)
class MaskData:
    """Where images and their masks come from."""

    root: str = "digits"
    """VOCdevkit/VOC2012, ADEChallengeData2016, or a folder with images/<split> and masks/<split>, with
    <split> and <split>annot, with <split>/images and <split>/masks, or with images and masks alone; digits:
    scikit-learn's handwritten digits on its photographs, without a download."""
    split: str = "train"
    """What is learned: train, and with VOC also trainaug and trainval."""
    val_split: str = "val"
    """What is held out; of images and masks alone, a fifth is."""
    ignore: int = 255
    """In a folder, the value of pixels without a class; VOC has 255 and ADE20K 0. -1: none."""
    classes: tuple[str, ...] = ()
    """Of a folder, the names of the values 0, 1, ...; empty: the lines of classes.txt, or else the values
    that the training masks hold."""
    num_samples: int | None = None
    """Learn from the first so many of a fixed shuffle; None: all."""
    val_samples: int | None = None
    """Hold out the first so many of a fixed shuffle; None: all."""
    workers: int | None = None
    """Processes that decode, for each training process (None: one a core, at most 8)."""


@dataclass(frozen=True)
class Recipe(Run):
    """A network that learns the class of every pixel."""

    task: ClassVar[str] = "segmentation"
    evaluated: ClassVar[tuple[str, ...]] = (
        "data",
        "scales",
        "eval_flip",
        "window",
        "stride",
        "batch_size",
        "device",
        "precision",
    )

    model: str = "soft_tiny"
    """eanet_resnet50 or eanet_resnet101, or, with a decoder, any network of timm or sansmax that has features
    of strides 4, 8, 16 and 32."""
    decoder: Literal["", "fpn", "upernet"] = "fpn"
    """Of segmentation_models_pytorch; empty: the network's own head (eanet_*)."""
    decoder_args: Words = field(default_factory=dict)
    """Further words for the decoder, as JSON."""
    crop_size: tuple[int, int] = (64, 64)
    """Height and width of what is learned from."""
    rescale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor of the random rescale before the crop, in steps of 0.1."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    loss: Literal["pixels", "labelled"] = "labelled"
    """Mean over all pixels, those without a class counting 0 (EANet's), or over those that have one."""
    scales: tuple[float, ...] = (1.0,)
    """At which an image is looked at in evaluation and prediction; the logits are averaged."""
    eval_flip: bool = False
    """Whether its mirror image is looked at too."""
    window: int | None = None
    """Side of the windows in which larger images are looked at; None: an image is looked at whole."""
    stride: int | None = None
    """Pixels from a window to the next; where windows overlap the logits are averaged. None: two thirds of
    the window."""
    data: MaskData = field(default_factory=MaskData)

    def checked(self) -> Self:
        d = self.data
        at_least(
            1,
            {f"data.{k}": getattr(d, k) for k in ("num_samples", "val_samples")},
            crop_size=min(self.crop_size),
            window=self.window,
            stride=self.stride,
        )
        at_least(0, {"data.workers": d.workers})
        shares({"hflip": self.hflip})
        positive({"scales": min(self.scales, default=0.0)})
        if not 0 < self.rescale[0] <= self.rescale[1]:
            raise ValueError(f"rescale: expected two rising factors above 0, got {self.rescale}; use 0.5 2")
        if self.stride is not None and self.stride > (self.window or 0):
            raise ValueError(
                f"stride: expected at most the window's side {self.window}, so that no pixel is left out, "
                f"got {self.stride}; lower it"
            )
        if not isinstance(self.decoder_args, dict):
            raise ValueError(
                f"decoder_args: expected a JSON object such as '{{\"dropout\": 0.1}}', got "
                f"{self.decoder_args!r}"
            )
        return super().checked()
