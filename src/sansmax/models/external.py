"""The published networks of External Attention.

Guo et al., "Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks", TPAMI 2022
(arXiv 2105.02358); published code MenghaoGuo/EANet. EANet labels every pixel.
"""

from ._eanet import EANet
from ._register import register

__all__: list[str] = []

register(
    __name__,
    EANet,
    {
        f"eanet_resnet{layers}": {"depths": depths}
        for layers, depths in ((50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)))
    },
    source="Published code of EANet, model_torch.py and settings.py.",
    num_classes=21,
    input_size=(3, 513, 513),
    first_conv="backbone.conv1.0",
    classifier="fc",
)
