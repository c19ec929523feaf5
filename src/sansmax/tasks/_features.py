"""What images are judged by: Inception's features, or those of a small classifier of the same images."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ._data import Images
from ._data.draws import order

__all__ = ["Features", "Inception", "OwnClassifier", "fidelity"]

FILE = "weights-inception-2015-12-05-6726825d.pth"
IMAGES, EPOCHS, BATCH, RATE = 100_000, 20, 64, 3e-3  # of the classifier: at most so many, so often


class Features(Protocol):
    """uint8 images (B, C, H, W) -> features (B, F) and logits (B, K), float32."""

    dim: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


def fidelity() -> Any:
    """The package torch_fidelity.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from torch_fidelity import metric_fid, metric_isc, metric_kid

        return metric_fid, metric_isc, metric_kid
    except ImportError as error:
        raise ValueError(
            f"generation: expected torch-fidelity to be installed, got {error}; pip install sansmax[fid]"
        ) from None


class Inception:
    """torch-fidelity's Inception v3 of 2015, by which FID and IS are published: its 2,048 features behind
    the last pooling, and logits without biases.

    Args:
        weights: a .pth file, or hub: where torch.hub would keep it. Nothing is fetched.

    Raises:
        ValueError, OSError: it is not there, or holds something else.
    """

    dim = 2048

    def __init__(self, weights: str, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(torch.hub.get_dir(), "checkpoints", FILE) if weights == "hub" else Path(weights)
        path = path.expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"inception: expected torch-fidelity's file {FILE}, got nothing at {path}; fetch it, or "
                "leave it out"
            )
        try:
            torch.load(path, weights_only=True)  # which runs nothing; torch-fidelity would
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
        except Exception as error:
            raise ValueError(
                f"inception: expected the weights of torch-fidelity's Inception in {path}, got "
                f"{' '.join(str(error).split())[:160]}; give {FILE}"
            ) from None
        self.network.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colours = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return self.network(colours.contiguous())


class OwnClassifier:
    """A small convolutional network that learns the classes of the training images: of each resolution down
    to 4 x 4 a convolution, batch norm and ReLU; features are the means over the last map.

    It sees at most 100,000 images, each at most 20 times, in an order that follows from the seed alone. All
    processes have the first one's weights.
    """

    def __init__(self, images: Images, seed: int, device: torch.device) -> None:
        channels, side = images.train_images.shape[1:3]
        depth = max(1, int(math.log2(side / 4)))
        widths = [channels, *(min(64, 16 * 2**i) for i in range(depth)), 64]
        self.dim, self.device = widths[-1], device
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            maps = [
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                    nn.MaxPool2d(2) if i < depth else nn.AdaptiveAvgPool2d(1),
                )
                for i, (before, after) in enumerate(pairwise(widths))
            ]
            self.trunk = nn.Sequential(*maps, nn.Flatten()).to(device)
            self.head = nn.Linear(self.dim, len(images.classes)).to(device)
        self._learn(images, seed)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _learn(self, images: Images, seed: int) -> None:
        count = len(images.train_images)
        batch = min(BATCH, count)
        per_epoch = count // batch
        updates = min(EPOCHS * per_epoch, IMAGES // batch)
        network = nn.Sequential(self.trunk, self.head)
        optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
        falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(2, updates))
        epochs = range(-(-updates // per_epoch))
        batches = [index for epoch in epochs for index in order(count, seed, epoch).split(batch)[:per_epoch]]
        for index in batches[:updates]:
            seen, truth = images.train_images[index], images.train_labels[index]
            loss = F.cross_entropy(network(self._scaled(seen)), truth.to(self.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
        network.eval().requires_grad_(False)
        if dist.is_available() and dist.is_initialized():
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0)

    def _scaled(self, images: Tensor) -> Tensor:
        return images.to(self.device, torch.float32) / 127.5 - 1

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, enabled=False):
            features = self.trunk(self._scaled(images))
            return features, self.head(features)
