"""A class for every pixel: any network with features of four strides under a decoder."""

from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from ._create import create_model, trunks

__all__ = ["Dense", "encoder", "undecayed"]

STRIDES = (4, 8, 16, 32)


class Dense(nn.Module):
    """image -> features of strides 4, 8, 16, 32 -> decoder of segmentation_models_pytorch -> logits of every
    pixel, resized bilinearly. Any image size: the image is resized to the next multiples of 32 pixels, at
    least 64 (the decoders' norms need more than one position), so that no padding enters an attention.

    fpn: Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, section 3.1; upernet: Xiao et al.,
    "Unified Perceptual Parsing for Scene Understanding", ECCV 2018.

    Args:
        network: a name of timm or sansmax with features of those strides.
        mechanism: in place of the network's own attention; None: its own.
        num_classes: of a pixel.
        decoder: fpn or upernet.
        decoder_args: of smp.decoders.fpn.decoder.FPNDecoder (pyramid_channels, segmentation_channels, a
            multiple of 32, dropout) or smp.decoders.upernet.decoder.UPerNetDecoder (decoder_channels).
        img_size: the size that tables of positions are made for.
        pretrained: timm's weights of the network.
        **words: see create_model.

    Raises:
        ValueError: the network lacks those features, or segmentation_models_pytorch is not installed.
    """

    def __init__(
        self,
        network: str,
        mechanism: str | None = None,
        *,
        num_classes: int,
        decoder: str = "fpn",
        decoder_args: dict[str, Any] | None = None,
        img_size: tuple[int, int] = (224, 224),
        pretrained: bool = False,
        **words: Any,
    ) -> None:
        super().__init__()
        self.encoder = encoder(network, mechanism, _seen(*img_size), pretrained, words)
        strides = self.encoder.feature_info.reduction()
        if not set(STRIDES) <= set(strides):
            more = f"; use {network}_pyramid" if f"{network}_pyramid" in timm.list_models() else ""
            raise ValueError(
                f"model: expected a network with features of strides 4, 8, 16 and 32, got {network} with "
                f"{', '.join(map(str, strides))}{more or '; use soft_tiny'}"
            )
        self.taken = [strides.index(stride) for stride in STRIDES]
        channels = [self.encoder.feature_info.channels()[i] for i in self.taken]
        self.decoder, width = _decoder(decoder, channels, decoder_args or {})
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, height, width) -> logits (B, num_classes, height, width)."""
        height, width = x.shape[2:]
        whole = _seen(height, width)
        if whole != (height, width):
            x = F.interpolate(x, whole, mode="bilinear", align_corners=False)
        maps = self.encoder(x)
        # The decoders leave out two maps, of strides 1 and 2, in front.
        y = self.decoder([x, x, *(maps[i] for i in self.taken)])
        return F.interpolate(self.head(y), (height, width), mode="bilinear", align_corners=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes the network's activations again in the backward pass instead of keeping them."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """The network's own."""
        return undecayed(self.encoder, "encoder.")


def undecayed(features: Any, prefix: str) -> set[str]:
    """The parameters that a network of `encoder` keeps from decay, by their names behind `prefix`."""
    inner = getattr(features, "model", features)
    names = getattr(inner, "no_weight_decay", lambda: set())()
    return {f"{prefix}{'model.' if inner is not features else ''}{name}" for name in names}


def _seen(height: int, width: int) -> tuple[int, int]:
    """The size to which an image is enlarged, so that every stride divides it."""
    return max(64, -(-height // 32) * 32), max(64, -(-width // 32) * 32)


def encoder(
    network: str, mechanism: str | None, img_size: tuple[int, int], pretrained: bool, words: dict[str, Any]
) -> Any:
    """timm's wrapper of a network that gives features."""
    common = {"features_only": True, "pretrained": pretrained, **words}
    if network in trunks():
        return create_model(network, mechanism, **{"img_size": img_size, **common})
    if mechanism is not None:
        raise ValueError(
            f"mechanism: expected none with {network}, whose attention cannot be replaced, got {mechanism}; "
            "leave it out, or use soft_tiny or a network that ends in _pyramid"
        )
    if not timm.is_model(network):
        raise ValueError(
            f"model: expected a name of timm or sansmax, got {network!r}; see `sansmax list` and "
            "timm.list_models()"
        )
    return timm.create_model(network, **common)


def _decoder(name: str, channels: list[int], words: dict[str, Any]) -> tuple[nn.Module, int]:
    try:
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as error:
        raise ValueError(
            f"decoder: expected segmentation_models_pytorch to be installed, got {error}; pip install "
            "sansmax[dense]"
        ) from None
    above = [3, 3, *channels]
    if name == "fpn":
        fpn = FPNDecoder(above, **words)
        return fpn, fpn.out_channels
    upernet = UPerNetDecoder(above, **words)
    return upernet, words.get("decoder_channels", 256)
