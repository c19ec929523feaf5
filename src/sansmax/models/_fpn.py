"""Any network with features of several strides as the backbone of torchvision's detectors."""

from collections import OrderedDict
from typing import Any

import timm
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

__all__ = ["FPNBackbone"]


class FPNBackbone(nn.Module):
    """image -> feature maps of a network -> feature pyramid: {"0": (B, C, H/4, W/4), "1": ..., "pool": ...}.

    torchvision.models.detection.RetinaNet(FPNBackbone("soft_tiny"), num_classes=91), and the same for
    FasterRCNN and MaskRCNN. Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017.

    Args:
        network: a name of timm with features_only: "soft_tiny", "sima_small_12_p16_pyramid".
        out_channels: C, of all maps.
        extra_blocks: makes the coarser maps behind the network's; None for the maximum pooling of
            torchvision's Mask R-CNN. RetinaNet usually has LastLevelP6P7.
        norm_layer: behind the pyramid's convolutions.
        **words: see timm.create_model.
    """

    def __init__(
        self,
        network: str,
        out_channels: int = 256,
        *,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Any = None,
        **words: Any,
    ) -> None:
        super().__init__()
        self.body: Any = timm.create_model(network, features_only=True, **words)
        self.fpn = FeaturePyramidNetwork(
            self.body.feature_info.channels(), out_channels, extra_blocks or LastLevelMaxPool(), norm_layer
        )
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))
