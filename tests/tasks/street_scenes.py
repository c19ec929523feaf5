"""Small images with masks, and a run that learns from them in a moment."""

import numpy as np
import torch
from PIL import Image

from sansmax.tasks._mask_pictures import palette
from sansmax.tasks._recipes.segmentation import MaskData, Recipe
from sansmax.train.recipe import Optim

CPU = torch.device("cpu")
SMALL = {
    "embed_dims": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "softmax_free": True,
}
FPN = {"pyramid_channels": 8, "segmentation_channels": 32, "dropout": 0.0}
RUN = Recipe(
    mechanism="sima",
    model_args=SMALL,
    decoder_args=FPN,
    crop_size=(32, 32),
    epochs=2,
    batch_size=4,
    device="cpu",
    optim=Optim(lr=1e-2, lr_batch=None, per="update", warmup=0, min_lr=0.0),
)


def picture(path, height, width, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path, values, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putpalette(palette().tobytes())
    image.save(path)


def striped(height, width, values):
    """A mask with as many columns of each value."""
    return np.broadcast_to(np.asarray(values)[np.arange(width) * len(values) // width], (height, width))


def streets(tmp_path):
    """As CamVid in the SegNet tutorial: <split> and <split>annot; values 0 to 2, and 11 for none."""
    root = tmp_path / "streets"
    for split, count in (("train", 6), ("val", 3)):
        for i in range(count):
            picture(root / split / f"{i}.png", 37, 50, seed=i)
            mask(root / f"{split}annot" / f"{i}.png", striped(37, 50, [0, 1, 2, 11]), "L")
    return root


def data_of(root, **words):
    return MaskData(root=str(root), workers=0, **words)


def classes_in(scenes, index=0):
    return sorted(np.unique(scenes.read(index)[1]).tolist())


def names(scenes):
    return [scenes.name(i) for i in range(len(scenes))]
