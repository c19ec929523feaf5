"""Plain ViTs as a backbone with four scales, for any mechanism: the softmax twins of the networks here.

Touvron et al., "Training data-efficient image transformers", ICML 2021 (arXiv 2012.12877): DeiT's three
sizes, which are ViT's. timm's own `vit_*` and `deit_*` with a mechanism are made by sansmax.create_model.
"""

from ._four_scales import FourScalesViT
from ._register import register
from ._vit import DEIT

__all__: list[str] = []

register(
    __name__,
    FourScalesViT,
    {f"vit_{size}_p16_pyramid": {**words, "mechanism": "softmax"} for size, words in DEIT.items()},
    source="DeiT, Table 1, without distillation. Features with strides 4, 8, 16 and 32.",
    out_indices=4,
    first_conv="patch_embed.proj",
    crop_pct=0.9,
)
