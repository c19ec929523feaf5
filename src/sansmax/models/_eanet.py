"""EANet: a dilated ResNet, one attention layer on its last feature map, a class for every pixel."""

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer
from ..layers._contract import Grid
from ._layouts import transposed

__all__ = ["DilatedResNet", "EANet"]

# Published names in ours: of the backbone, and of the whole network.
BACKBONE_KEYS = tuple(
    (rf"^extractor\.{i}\.", f"{name}.")
    for i, name in ((0, "conv1"), (1, "bn1"), (4, "layer1"), (5, "layer2"), (6, "layer3"), (7, "layer4"))
)
KEYS = (
    *((pattern, f"backbone.{ours}") for pattern, ours in BACKBONE_KEYS),
    (r"^fc0\.conv\.", "neck.0."),
    (r"^fc0\.bn\.", "neck.1."),
    (r"^linu\.conv1\.", "neck.3.attn.query."),
    (r"^linu\.linear_0\.weight$", "neck.3.attn.memory_k"),
    (r"^linu\.linear_1\.weight$", "neck.3.attn.memory_v"),
    (r"^linu\.conv2\.0\.", "neck.3.attn.proj."),
    (r"^linu\.conv2\.1\.", "neck.3.bn."),
    (r"^fc1\.0\.conv\.", "head.0."),
    (r"^fc1\.0\.bn\.", "head.1."),
    (r"^fc2\.", "fc."),
)


class DilatedResNet(ResNet):
    """timm's bottleneck ResNet with a stem of three 3x3 convolutions (64, 64, 128) and dilations for a stride
    of 8 or 16: (B, C, height, width) -> (B, 2048, ceil(height / stride), ceil(width / stride)).

    The 3x3 convolutions of layer3 are dilated by 1, 2, 2, ... and those of layer4 by 2, 8, 16 at stride 8; at
    stride 16 layer3 is plain and layer4 has 1, 4, 8 (the last for further blocks too). Published code of
    EANet and EMANet, class ResNet; its ImageNet files (resnet50-ebb6acbb.pth, resnet101-2a57e44d.pth,
    resnet152-0d43d698.pth) load with sansmax.load_published, and so do the weights of timm's resnet50s,
    resnet101s and resnet152s.
    """

    def __init__(self, depths: tuple[int, ...], *, output_stride: int = 8, **words: Any) -> None:
        super().__init__(
            Bottleneck,  # pyright: ignore[reportArgumentType] timm's annotation names an instance
            depths,
            num_classes=0,
            global_pool="",
            output_stride=output_stride,
            stem_type="deep",
            zero_init_last=False,
            **words,
        )
        layer4: Any = self.layer4
        for i, block in enumerate(layer4[1:]):
            conv, factor = block.conv2, 4 if i else 2
            conv.dilation = conv.padding = tuple(factor * d for d in conv.dilation)

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An ImageNet file's keys without its classifier, or the backbone's of a whole EANet or EMANet."""
        own = {_renamed(key, BACKBONE_KEYS): t for key, t in state.items() if key.startswith("extractor.")}
        return _counters(self) | {k: t for k, t in (own or state).items() if not k.startswith("fc.")}


class MapBlock(nn.Module):
    """out = ReLU(x + bn(attn(tokens of x))) on feature maps: (B, C, rows, columns) -> the same shape."""

    def __init__(self, dim: int, *, mixer: Mixer, **factory: Any) -> None:
        super().__init__()
        self.attn = mixer
        self.bn = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        y = self.attn(x.flatten(2).mT, grid=grid).mT.unflatten(-1, grid)
        return F.relu(x + self.bn(y))


def _conv(inputs: int, outputs: int, **factory: Any) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **factory),
        nn.BatchNorm2d(outputs, **factory),
        nn.ReLU(),
    ]


class EANet(nn.Module):
    """image -> DilatedResNet -> 3x3 convolution, MapBlock with the mechanism -> 3x3 convolution, dropout of
    whole channels -> class of every pixel, resized bilinearly (align_corners=True). Any image size.

    Guo et al., section 4 (arXiv 2105.02358); published code model_torch.py. "external" is the published
    External_attention; any other mechanism stands before the same batch norm, sum and ReLU. The published
    training starts from ImageNet, load_published(model.backbone, file), and synchronises the batch norms of
    its devices, nn.SyncBatchNorm.convert_sync_batchnorm(model); its loss is not part of the network.

    Args:
        mechanism: a file name of sansmax.layers.
        mechanism_args: the layer's own options; they override qkv_bias=True and proj_bias=False.
        img_size: the size that layers with tables of positions make them for; 513 is the published crop.
        num_classes: 21 for PASCAL VOC with its background; 0 leaves the last layer out.
        depths: blocks of the backbone's four stages: (3, 4, 6, 3) in ResNet-50, (3, 4, 23, 3) in 101,
            (3, 8, 36, 3) in 152.
        output_stride: 8 as published or 16, pixels per position of the last feature map.
        embed_dim, head_hidden_size: channels of the attention and of the convolution behind it.
        drop_rate: of the channels before the last layer.
        **backbone_args: of timm.models.resnet.ResNet (drop_path_rate, channels, cardinality, avg_down, ...).
    """

    def __init__(
        self,
        *,
        mechanism: str = "external",
        mechanism_args: dict[str, Any] | None = None,
        img_size: int | Grid = 513,
        in_chans: int = 3,
        num_classes: int = 21,
        depths: tuple[int, ...] = (3, 4, 6, 3),
        output_stride: int = 8,
        embed_dim: int = 512,
        head_hidden_size: int = 256,
        drop_rate: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **backbone_args: Any,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise ValueError(f"EANet: output_stride must be 8 or 16, got {output_stride}; 8 is published")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backbone = DilatedResNet(
            depths, output_stride=output_stride, in_chans=in_chans, **backbone_args, **factory
        )
        options = {"qkv_bias": True, "proj_bias": False, **(mechanism_args or {})}
        mixer = layers.mechanism(mechanism)(embed_dim, **options, **factory)
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
        mixer.set_input((-(-rows // output_stride), -(-columns // output_stride)))
        block = MapBlock(embed_dim, mixer=mixer, **factory)
        features: Any = self.backbone.num_features
        self.neck = nn.Sequential(*_conv(features, embed_dim, **factory), block)
        self.head = nn.Sequential(*_conv(embed_dim, head_hidden_size, **factory), nn.Dropout2d(drop_rate))
        self.feature_info = [
            *({**info, "module": f"backbone.{info['module']}"} for info in self.backbone.feature_info),
            {"num_chs": embed_dim, "reduction": output_stride, "module": "neck"},
        ]
        self.num_features, self.head_hidden_size = embed_dim, head_hidden_size
        self.reset_classifier(num_classes)
        # As published; the 3x3 convolutions and the last layer keep torch's own draw there.
        for module in mixer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.out_features))
        mixer.reset_parameters()

    def mixers(self) -> dict[str, Mixer]:
        """The mechanism's layer by module name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Mixer)}

    def no_weight_decay(self) -> set[str]:
        """The layer's tables of positions; the published recipe decays the memories."""
        return {f"{name}.{p}" for name, layer in self.mixers().items() for p in layer.no_weight_decay()}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The published training's: weights of convolutions, memories and all that is linear; weights of the
        norms, without decay; biases, without decay at twice the rate. Published code, train_torch.py."""
        undecayed = self.no_weight_decay()
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": weight_decay},
            {"params": [], "weight_decay": 0.0},
            {"params": [], "weight_decay": 0.0, "lr_scale": 2.0},
        ]
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                vector = parameter.ndim < 2 or name in undecayed
                groups[2 if name.endswith("bias") else int(vector)]["params"].append(parameter)
        return groups

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's layers by depth, for layer-wise learning rates; what follows it comes last."""
        own = r"^backbone\.layer(\d+)"
        return {"stem": r"^backbone\.(?:conv1|bn1)", "blocks": own if coarse else own + r"\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes the activations of the backbone's blocks again in the backward pass instead of keeping them.

        Their batch norms then count every batch twice in the running statistics.
        """
        self.backbone.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for num_classes (0: none)."""
        if global_pool:
            raise ValueError(
                f"EANet: global_pool must be None because every pixel gets a class, got {global_pool!r}; "
                f"leave it out"
            )
        self.num_classes = num_classes
        like = next(self.backbone.parameters())
        self.fc = (
            nn.Conv2d(self.head_hidden_size, num_classes, 1, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps behind the stem, the four stages and the attention; see timm.models.

        Args:
            x: (B, in_chans, height, width).
            indices: which of the six; an int takes the last ones, None all.
            norm: without effect, as in timm's ResNet.
            stop_early: leaves out what no index asks for.
            output_fmt: "NCHW".
            intermediates_only: leaves out the last map computed, which is otherwise the first of two results.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates: output_fmt must be NCHW, got {output_fmt!r}; use NCHW")
        last = len(self.feature_info) - 1
        wanted, deepest = feature_take_indices(last + 1, indices)
        if not (stop_early or intermediates_only):
            deepest = last
        stages = list(range(min(deepest + 1, last)))
        maps: Any
        x, maps = self.backbone.forward_intermediates(x, stages, stop_early=True)
        if deepest == last:
            x = self.neck(x)
            maps.append(x)
        maps = [y for i, y in enumerate(maps) if i in wanted]
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leaves out what stands behind the deepest map that is asked for."""
        last = len(self.feature_info) - 1
        wanted, deepest = feature_take_indices(last + 1, indices)
        self.backbone.prune_intermediate_layers([min(deepest, last - 1)])
        self.num_features = self.feature_info[deepest]["num_chs"]
        if deepest < last:
            self.neck = nn.Identity()
        if deepest < last or prune_head:
            self.head, self.head_hidden_size = nn.Identity(), self.num_features
            self.reset_classifier(0)
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, embed_dim, rows, columns), behind the attention."""
        return self.neck(self.backbone.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, embed_dim, rows, columns) -> (B, num_classes, rows, columns), not yet resized."""
        x = self.head(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor, size: Grid | None = None) -> Tensor:
        """(B, in_chans, height, width) -> logits (B, num_classes, height, width), or of `size`."""
        logits = self.forward_head(self.forward_features(x))
        return F.interpolate(logits, size or x.shape[2:], mode="bilinear", align_corners=True)

    def published_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' keys in ours; our own pass as they are."""
        if any(key.startswith("emau.") for key in state):
            raise ValueError(
                "EANet: expected External Attention (linu.*) in the checkpoint, got EMANet's "
                "expectation-maximisation unit (emau.*), which has no memories; load its backbone alone with "
                "load_published(model.backbone, checkpoint)"
            )
        renamed = {}
        for key, value in state.items():
            if key.startswith("linu.") and value.ndim > 1:
                value = value.flatten(1)  # their 1x1 convolutions are linear layers here
            renamed[_renamed(key, KEYS)] = transposed(value) if key == "linu.linear_1.weight" else value
        return _counters(self) | renamed


def _renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in names:
        key = re.sub(pattern, ours, key)
    return key


def _counters(model: nn.Module) -> dict[str, Tensor]:
    """The batch norms' own counts of batches, which files from before torch 0.4.1 do not have."""
    return {key: t for key, t in model.state_dict().items() if key.endswith("num_batches_tracked")}
