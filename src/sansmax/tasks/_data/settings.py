"""What is said of images: where they are, and how training changes them."""

from dataclasses import dataclass

__all__ = ["Augment", "Data"]


@dataclass(frozen=True)
class Data:
    """Where the images come from."""

    root: str = "digits"
    """digits (scikit-learn's, no download), or a folder, a .tar, a folder of shards, a torchvision folder."""
    reader: str = ""
    """torch/cifar10, hfds/<name> (of a local set hfds/./<path>), wds and the like, as in timm; empty: found
    by looking at the root."""
    split: str = "train"
    """Name of the training split: a folder, a split of the data set, or shards as train-{0000..0099}.tar."""
    val_split: str = "validation"
    """Name of the held-out split; of a folder without one, a fifth of every class is held out."""
    num_samples: int | None = None
    """Images of an epoch; of shards, where no _info.json counts them; of other sets, the first so many of a
    fixed shuffle (None: all)."""
    num_classes: int | None = None
    """Of shards without a list of classes."""
    memory: bool | None = None
    """Decode once and keep in memory (None: where all images fit into 1 GiB and no augmentation works on
    single images, which are auto_augment, color_jitter and crops)."""
    workers: int | None = None
    """Processes that decode, for each training process (None: one a core, at most 8)."""
    shuffle_buffer: int = 4096
    """Of shards: images among which a worker draws the next."""
    download: bool = False
    """Let torchvision or Hugging Face fetch the set."""


@dataclass(frozen=True)
class Augment:
    """How a training image is changed. Words, ranges and order are timm's."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the area that a random crop keeps; (1, 1) crops nothing."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    shift: float = 0.0
    """Largest shift, as a share of the side, of images in memory."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    interpolation: str = "bicubic"
    """bilinear, bicubic or random."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation; unused beside auto_augment, as in timm."""
    auto_augment: str = ""
    """rand-m9-mstd0.5-inc1 and the like; empty: none."""
    reprob: float = 0.0
    """Probability of random erasing by noise, pixel by pixel."""
    mixup: float = 0.0
    """Alpha of mixup; 0: none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0: none."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mix_switch: float = 0.5
    """Probability of cutmix where both are on."""
    smoothing: float = 0.1
    """Label smoothing."""
    repeats: int = 1
    """Repeated augmentation: views of an image in one epoch, of which there are fewer images then."""
