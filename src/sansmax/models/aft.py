"""The image networks of AFT: DeiT with AFT-full or AFT-conv for its attention.

Zhai et al., "An Attention Free Transformer", 2021 (arXiv 2105.14103), section 5.3 and Table 7. AFT-full keeps
the class token and the position embedding; AFT-conv has neither and averages its tokens before the
classifier. No code and no weights were published.
"""

from ._four_scales import FourScalesViT
from ._register import register
from ._vit import DEIT, ViT

__all__: list[str] = []

# Size of the network, kernel, heads of the kernel.
CONV = (
    ("tiny", 11, 32),
    ("tiny", 11, 192),
    ("small", 11, 16),
    ("small", 11, 384),
    ("small", 15, 384),
    ("base", 25, 32),
)

FULL_NETWORKS = {
    f"aft_full_{size}_p16": {
        **DEIT[size],
        "mechanism": "aft_full",
        "mechanism_args": {"factor_dim": 128},
    }
    for size in ("tiny", "small")
}
CONV_NETWORKS = {
    f"aft_conv_{size}_p16_k{kernel}_h{heads}": {
        **DEIT[size],
        "mechanism": "aft_conv",
        "mechanism_args": {"kernel_size": kernel, "num_heads": heads},
        "class_token": False,
        "pos_embed": "none",
        "global_pool": "avg",
    }
    for size, kernel, heads in CONV
}

register(
    __name__,
    ViT,
    FULL_NETWORKS | CONV_NETWORKS,
    source="AFT, section 5.3 and Tables 7 and 8.",
    pyramid=FourScalesViT,
    first_conv="patch_embed.proj",
    crop_pct=0.9,
)
