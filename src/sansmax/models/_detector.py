"""Boxes and masks of objects: torchvision's detectors on any network with features of several strides."""

import inspect
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from .. import layers
from ._create import trunks
from ._dense import encoder, undecayed
from ._eanet import MapBlock

__all__ = ["DETECTORS", "LEVELS", "Detector", "Images"]

DETECTORS = ("retinanet", "faster_rcnn", "mask_rcnn")
LEVELS = 5  # of the pyramid, with an anchor size each
MULTIPLE = 32  # the largest stride of a backbone
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# For which the weights of RetinaNet's convolutions begin at 0.01: with that the small recipe (48 channels, 5
# epochs) reached mAP 9.5, with He's weights 32.3.
PUBLISHED_CHANNELS = 256
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors


class Images(NamedTuple):
    """What a detector takes: normalised images (3, height, width) of any sizes and, in training, of each its
    boxes float32 (n, 4) as x1 y1 x2 y2 in its pixels, labels int64 (n,) from 0 and, for masks, masks uint8
    (n, height, width)."""

    pixels: list[Tensor]
    targets: list[dict[str, Tensor]] | None = None


class Detector(nn.Module):
    """Images -> losses in training, {name: scalar}; else of every image boxes (n, 4), labels (n,) from 0,
    scores (n,) and, of mask_rcnn, masks (n, 1, 28, 28): the probability that a cell of the box is the object.

    RetinaNet: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 4: C3 to C5 under an
    FPN, P6 a 3x3 convolution of stride 2 of C5, P7 of relu(P6), so strides 8 to 128; three sizes and three
    ratios of anchors at a position. Faster and Mask R-CNN: He et al., "Mask R-CNN", ICCV 2017, section 3.1:
    C2 to C5, P6 every second position of P5, so strides 4 to 64; one size and three ratios.

    Images whose sides, rounded up to multiples of 32, are the same are a group: they go through the whole
    network together, padded to these sides at the right and below by 0. So does an image alone, and nothing
    else that is in its batch changes what is found in it. In training the losses of the groups are averaged,
    weighted by their images: where a published loss is divided by the boxes or anchors of a batch, it is by
    those of a group. Where batch norms learn, whose statistics want the whole batch and are shared between
    processes that must compute equally often, a training batch is one group, padded to its largest image.

    Args:
        detector: retinanet, faster_rcnn or mask_rcnn.
        network: a name of timm or sansmax with features of strides 4, 8, 16 and 32.
        mechanism: in place of the network's own attention; of a network without, such as resnet50, an
            attention on its last map: y = relu(x + bn(attention(x))), "added at the very end of the ResNet,
            i.e. the last layer of the backbone" (an author of External Attention; width and norm are not
            told: here all its channels, and the block of EANet).
        num_classes: without the background.
        anchor_sizes: side of the anchors of every level in pixels; RetinaNet has 2^(1/3) and 2^(2/3) times it
            too.
        fpn_channels: of the pyramid, and of RetinaNet's and the mask head's convolutions.
        head_channels: of the two linear layers of the R-CNNs' box head.
        freeze_norm: whether the backbone's batch norms stay as they are, statistics and weights.
        detector_args: of torchvision's RetinaNet, FasterRCNN or MaskRCNN (score_thresh, box_nms_thresh, ...).
        img_size: the size that tables of positions are made for.
        pretrained: timm's weights of the network.
        **words: see create_model.

    Raises:
        ValueError: the network lacks those features.
    """

    def __init__(
        self,
        detector: str,
        network: str,
        mechanism: str | None = None,
        *,
        num_classes: int,
        anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512),
        fpn_channels: int = 256,
        head_channels: int = 1024,
        freeze_norm: bool = False,
        detector_args: dict[str, Any] | None = None,
        img_size: tuple[int, int] = (224, 224),
        pretrained: bool = False,
        **words: Any,
    ) -> None:
        super().__init__()
        self.dense = detector == "retinanet"
        first = 8 if self.dense else 4
        strides = [stride for stride in (4, 8, 16, MULTIPLE) if stride >= first]
        backbone = Backbone(network, mechanism, strides, fpn_channels, img_size, pretrained, words)
        scales = (1, 2 ** (1 / 3), 2 ** (2 / 3)) if self.dense else (1,)
        sizes = tuple(tuple(int(size * scale) for scale in scales) for size in anchor_sizes)
        anchors = Anchors(sizes, (RATIOS,) * LEVELS, [first * 2**level for level in range(LEVELS)])
        options = detector_args or {}
        kind = {"retinanet": RetinaNet, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}[detector]
        if odd := sorted(options.keys() - inspect.signature(kind).parameters.keys()):
            raise TypeError(f"{kind.__name__} got an unexpected keyword argument {odd[0]!r}")
        if self.dense:
            self.model: Any = kind(backbone, num_classes, anchor_generator=anchors, **options)
            heads = [self.model.head]
            if fpn_channels < PUBLISHED_CHANNELS:
                parts = (self.model.head.classification_head, self.model.head.regression_head)
                for conv in (conv for part in parts for conv in part.conv):
                    nn.init.kaiming_normal_(conv[0].weight, nonlinearity="relu")
        else:
            r_cnn: dict[str, Any] = {
                "rpn_anchor_generator": anchors,
                "box_roi_pool": _pool(7),
                "box_head": TwoMLPHead(fpn_channels * 7**2, head_channels),
                "box_predictor": FastRCNNPredictor(head_channels, 1 + num_classes),
                **options,
            }
            if detector == "mask_rcnn":
                r_cnn["mask_roi_pool"] = _pool(14)
                r_cnn["mask_head"] = MaskRCNNHeads(fpn_channels, (fpn_channels,) * 4, 1)
                r_cnn["mask_predictor"] = MaskRCNNPredictor(fpn_channels, fpn_channels, 1 + num_classes)
            self.model = kind(backbone, **r_cnn)
            heads = [self.model.rpn.head, self.model.roi_heads.box_predictor]
            heads += [self.model.roi_heads.mask_predictor] if detector == "mask_rcnn" else []
        for head in heads:
            head.register_forward_hook(_in_float32)
        self.model.transform = Unchanged()
        self.freeze_norm = freeze_norm
        if freeze_norm:
            for norm in self._norms():
                norm.requires_grad_(False)

    @property
    def encoder(self) -> Any:
        """The network whose features are used."""
        return self.model.backbone.body

    def forward(self, inputs: Images) -> Any:
        images, targets = inputs
        groups, found = self.groups(images), []
        for group in groups:
            given = None
            if targets is not None:
                given = [_shifted(targets[i], 0 if self.dense else 1) for i in group]
            found.append(self.model([images[i] for i in group], given))
        if self.training:
            weights = [len(group) / len(images) for group in groups]
            return {
                name: sum(weight * losses[name] for weight, losses in zip(weights, found, strict=True))
                for name in found[0]
            }
        by_image = {
            i: one
            for group, some in zip(groups, found, strict=True)
            for i, one in zip(group, some, strict=True)
        }
        return [_shifted(by_image[i], 0 if self.dense else -1) for i in range(len(images))]

    def groups(self, images: list[Tensor]) -> list[list[int]]:
        """Positions of the images that go through the network together."""
        if self.training and any(isinstance(m, NORMS) and m.training for m in self.modules()):
            return [list(range(len(images)))]
        found: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            found.setdefault(tuple(-(-side // MULTIPLE) for side in image.shape[1:]), []).append(i)
        return list(found.values())

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        if self.freeze_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.encoder.modules() if isinstance(m, NORMS)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes the network's activations again in the backward pass instead of keeping them."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """The network's own, and the attention's tables of positions."""
        names = undecayed(self.encoder, "model.backbone.body.")
        attention = self.model.backbone.attention
        own = attention.attn.no_weight_decay() if isinstance(attention, MapBlock) else ()
        return names | {f"model.backbone.attention.attn.{name}" for name in own}


class Backbone(nn.Module):
    """image -> features of `strides` -> an attention on the last, where a network without one is given a
    mechanism -> feature pyramid of LEVELS maps, float32: {"0": (B, C, rows, columns), ...}."""

    def __init__(
        self,
        network: str,
        mechanism: str | None,
        strides: list[int],
        out_channels: int,
        img_size: tuple[int, int],
        pretrained: bool,
        words: dict[str, Any],
    ) -> None:
        super().__init__()
        own = network.partition(".")[0] in trunks()
        options = {} if own else words.pop("mechanism_args", {})
        words["out_indices"] = tuple(range(-len(strides), 0))
        self.body: Any = encoder(network, mechanism if own else None, img_size, pretrained, words)
        found, channels = self.body.feature_info.reduction(), self.body.feature_info.channels()
        if found != strides:
            raise ValueError(
                f"model: expected a network whose last features have strides "
                f"{', '.join(map(str, strides))}, got {network} with {', '.join(map(str, found))}; use "
                "soft_tiny, resnet50 or a network that ends in _pyramid"
            )
        self.attention: nn.Module = nn.Identity()
        if mechanism and not own:
            mixer = layers.mechanism(mechanism)(channels[-1], **options)
            mixer.set_input((-(-img_size[0] // MULTIPLE), -(-img_size[1] // MULTIPLE)))
            self.attention = MapBlock(channels[-1], mixer=mixer)
        if strides[0] == 4:
            coarser: Any = LastLevelMaxPool()
        else:
            coarser = LastLevelP6P7(channels[-1], out_channels)
            coarser.use_P5 = False  # also where C5 has as many channels
        self.fpn = FeaturePyramidNetwork(channels, out_channels, coarser)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = list(self.body(x))
        maps[-1] = self.attention(maps[-1])
        pyramid = self.fpn(OrderedDict((str(i), y) for i, y in enumerate(maps)))
        # Anchors and boxes have the maps' dtype; in bfloat16 a coordinate above 256 is rounded to 2 pixels.
        return OrderedDict((name, y.float()) for name, y in pyramid.items())


class Anchors(AnchorGenerator):
    """torchvision's, with strides that are told: it divides the image's sides by the maps', which gives 48 in
    place of 64 where a map of 3 rows has one of 2 above it."""

    def __init__(self, sizes: Any, ratios: Any, strides: list[int]) -> None:
        super().__init__(sizes, ratios)
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        like = feature_maps[0]
        self.set_cell_anchors(like.dtype, like.device)
        strides = [[torch.tensor(s, device=like.device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors([list(y.shape[-2:]) for y in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class Unchanged(GeneralizedRCNNTransform):
    """Images that are normalised and of their final size become a batch of multiples of 32; what is found
    stays in its pixels."""

    def __init__(self) -> None:
        super().__init__(1, 1, [0.0], [1.0], size_divisible=MULTIPLE)

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        return ImageList(self.batch_images(images, MULTIPLE), sizes), targets

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        return result


def _pool(side: int) -> MultiScaleRoIAlign:
    """Of strides 4 to 32, which are told: torchvision guesses them, once, from the first images' sizes before
    the padding."""
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2)
    pool.scales = [1 / stride for stride in (4, 8, 16, 32)]
    pool.map_levels = LevelMapper(2, 5)  # pyright: ignore[reportAttributeAccessIssue]
    return pool


def _in_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Under autocast what heads give is bfloat16, in which boxes would be rounded to 2 pixels."""
    if isinstance(outputs, dict):
        return {name: _in_float32(module, inputs, value) for name, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return type(outputs)(_in_float32(module, inputs, value) for value in outputs)
    return outputs.float()


def _shifted(target: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """With other labels: class 0 of the R-CNNs is the background."""
    return {**target, "labels": target["labels"] + by}
