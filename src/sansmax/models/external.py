"""The networks of External Attention: EAMLP, T2T-ViT with External Attention in its token layers, and EANet.

Guo et al., "Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks", TPAMI 2022
(arXiv 2105.02358); published code MenghaoGuo/EANet. `eamlp_*` has multi-head External Attention in every
block (the names of the published code are T2t_vit_7 and so on), `t2t_ea_14` T2T-ViT-14's softmax blocks;
`eanet_*` labels every pixel.
"""

from typing import Any

from ._eanet import EANet
from ._four_scales import FourScalesT2T
from ._register import register
from ._t2t import T2T

__all__: list[str] = []

# Width, heads (the layer makes four times as many), ratio of the MLP.
SIZES = {
    7: (256, 4, 2.0),
    10: (256, 4, 2.0),
    12: (256, 4, 2.0),
    14: (384, 6, 3.0),
    19: (448, 7, 3.0),
    24: (512, 8, 3.0),
}


def _words(depth: int, **own: Any) -> dict[str, Any]:
    width, heads, mlp_ratio = SIZES[depth]
    return {
        "embed_dim": width,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio,
        "depth": depth,
        "dynamic_img_size": True,
        **own,
    }


# The published Token_performer always drops 0.1 in training, Token_transformer nothing.
PERFORMER = {"token_attn_drop": 0.1, "token_drop": 0.1}
EAMLP: dict[str, Any] = {"mechanism": "external_multihead", "mechanism_args": {"dead_bias": True}}

register(
    __name__,
    T2T,
    {
        **{f"eamlp_{depth}": _words(depth, **EAMLP, **PERFORMER) for depth in SIZES},
        **{f"eamlp_t_{depth}": _words(depth, **EAMLP) for depth in (14, 19, 24)},
        "t2t_ea_14": _words(14, mechanism="softmax", qkv_bias=False, **PERFORMER),
    },
    source="Published code of External Attention, EAMLP.",
    pyramid=FourScalesT2T,
    crop_pct=0.9,
)

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
