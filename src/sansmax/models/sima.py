"""SimA's networks: the XCiT trunk with SimA for both attentions (published code sima.py), DeiT's and CvT's.

Koohpayegani and Pirsiavash, "SimA: Simple Softmax-free Attention for Vision Transformers", WACV 2024 (arXiv
2206.08898). Parameters are XCiT's less one temperature per head. `num_heads=1` is the paper's single-head
form. No weights were published.

Of SimA-CvT nothing was published but that SimA takes the place of softmax. The reading here is an inference:
CvT and its parameters as they are, with q divided by its l1 norm over its M tokens, k by its own over its N
(CvT's keys are fewer), and v left alone; M and N count the class token of the last stage.
"""

from ._cvt import CvT
from ._four_scales import FourScalesViT, FourScalesXCiT
from ._register import register
from ._vit import DEIT, ViT
from ._xcit import XCiT

__all__: list[str] = []

# Width, heads, blocks. LayerScale starts at 1 in 12 blocks and at 1e-5 in 24.
SIZES = {
    "nano_12": (128, 4, 12),
    "tiny_12": (192, 4, 12),
    "small_12": (384, 8, 12),
    "tiny_24": (192, 4, 24),
    "small_24": (384, 8, 24),
    "medium_24": (512, 8, 24),
    "large_24": (768, 16, 24),
}

register(
    __name__,
    XCiT,
    {
        f"sima_{size}_p{patch_size}": {
            "mechanism": "sima",
            "patch_size": patch_size,
            "embed_dim": width,
            "num_heads": heads,
            "depth": depth,
            "eta": 1.0 if depth == 12 else 1e-5,
            "tokens_norm": size != "nano_12",
        }
        for size, (width, heads, depth) in SIZES.items()
        for patch_size in (16, 8)
    },
    source="Published code of SimA, sima.py.",
    pyramid=FourScalesXCiT,
    first_conv="patch_embed.proj.0.0",
)

register(
    __name__,
    ViT,
    {
        f"sima_deit_{size}_p16": {**words, "mechanism": "sima", "init_values": 1.0}
        for size, words in DEIT.items()
    },
    # Where LayerScale starts, and whether positions are learned, is not known: 1 as in 12 blocks of
    # SimA-XCiT, and learned as in DeiT.
    source="DeiT with SimA; its block, with LayerScale, is the author's in issue 3 of the published code.",
    pyramid=FourScalesViT,
    first_conv="patch_embed.proj",
    crop_pct=0.9,
)

register(
    __name__,
    CvT,
    {
        f"sima_cvt_{blocks}": {
            "mechanism": "sima",
            "embed_dims": (64, 192, 384),
            "depths": depths,
            "num_heads": (1, 3, 6),
        }
        for blocks, depths in {13: (1, 2, 10), 21: (1, 4, 16)}.items()
    },
    source="CvT's published code with SimA for softmax, an inference: see the module.",
    first_conv="stages.0.embed.proj",
    crop_pct=0.875,
)
