"""python -m sansmax.bench.networks > docs/networks.md: every published network in a table.

Parameters and multiply-adds are counted on the networks as they are built, without allocating them.
"""

from collections import Counter

import timm
import torch

from .. import layers, models
from .measure import count_flops

__all__ = ["main", "row"]

SIZES = (224, 384)
POINTS = 1024
NOT_FOUND = "not found"
# Top-1 on ImageNet at 224 px that the authors give.
PAPER = {
    "sima_deit_small_p16": "79.8 (issue 3 of the published code)",
    "soft_tiny": "79.3",
    "soft_small": "82.2 (this or the 24 M form)",
    "soft_small_24m": "82.2 (this or the 39 M form)",
    "soft_medium": "82.9",
    "soft_large": "83.1",
    "soft_huge": "83.3",
    "soft_norm_tiny": "79.4",
    "soft_norm_small": "82.4 (this or the 24 M form)",
    "soft_norm_small_24m": "82.4 (this or the 39 M form)",
    "soft_norm_medium": "83.1",
    "soft_norm_large": "83.3",
    "soft_norm_huge": "83.4",
    "vibid_u_p16": "76.3",
    "vibid_tiny_p16": "78.8",
    "vibid_small_p16": "82.0",
    "vibid_medium_p16": "82.8",
    "vibid_base_p16": "83.3",
    "eamlp_7": "71.7 at 384 px",
    "eanet_resnet101": "mIoU 45.33 on ADE20K, 81.7 on Cityscapes",
    "pct_cls": "93.3 on ModelNet40",
    "pct_partseg": "mIoU 86.4 on ShapeNet part",
    "eamlp_14": "78.9",
    "eamlp_19": "79.4",
    "t2t_ea_14": "81.7",
    "aft_full_tiny_p16": "72.4",
    "aft_full_small_p16": "79.8",
    "aft_conv_tiny_p16_k11_h32": "73.9",
    "aft_conv_tiny_p16_k11_h192": "74.8",
    "aft_conv_small_p16_k11_h16": "80.2",
    "aft_conv_small_p16_k11_h384": "80.8",
    "aft_conv_small_p16_k15_h384": "81.0",
    "aft_conv_base_p16_k25_h32": "83.4 at 384 px, fine-tuned from DeiT",
}
WEIGHTS = {
    "soft": "the authors' Google Drive, by load_published",
    "sima": "none published",
    "xvit": "none published",
    "aft": "none published",
    "external": "none reachable",
    "points": "none reachable",
}
TEXT = """# The published networks

`import sansmax.models` registers them in timm: `timm.create_model("soft_tiny", num_classes=10)`.
Every one has timm's interface and takes `mechanism=` with any of sansmax's mechanisms (X-ViT and ViBid: any
but softmax). Multiply-adds (10^9, one image) count convolutions, matrix products and the mechanisms;
"exp-free" means that no layer computes an exponential to mix tokens. Results are the authors', top-1 on
ImageNet at 224 px unless it says otherwise, where a source was found; no network was trained on ImageNet
here. Networks of one stride are registered with features of four strides too, `sima_small_12_p16_pyramid`
and so on, and `vit_{tiny,small,base}_p16_pyramid` for softmax.

Written by `uv run python -m sansmax.bench.networks > docs/networks.md`.

| network | parameters | GMACs 224 px | GMACs 384 px | mechanism | exp-free | paper's result | weights |
|---|---|---|---|---|---|---|---|
"""
CLOUDS = f"""
Point clouds, (batch, points, 3):

| network | parameters | GMACs {POINTS:,} points | mechanism | exp-free | paper's result | weights |
|---|---|---|---|---|---|---|
"""


def row(name: str) -> str:
    """The network's line of its table."""
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    with torch.device("meta"):
        if family == "points":
            network = timm.create_model(name)
            inputs = [torch.empty(1, POINTS, 3)]
            inputs += [torch.zeros(1, dtype=torch.long)] if "partseg" in name else []
            costs = [count_flops(network, *inputs) / 2e9]
        else:
            built = [timm.create_model(name, img_size=size) for size in SIZES]
            network = built[0]
            costs = [
                count_flops(model, torch.empty(1, 3, size, size)) / 2e9
                for model, size in zip(built, SIZES, strict=True)
            ]
    names = {layer: key for key, layer in layers.mechanisms().items()}
    mixers = [module for module in network.modules() if isinstance(module, layers.Mixer)]
    mechanisms = Counter(names[type(mixer)] for mixer in mixers)
    cells = [
        f"`{name}`",
        f"{sum(p.numel() for p in network.parameters()):,}",
        *(f"{cost:.2f}" for cost in costs),
        " + ".join(mechanism for mechanism, _ in mechanisms.most_common()) or "its own softmax",
        "yes" if mixers and all(mixer.traits.exp_free for mixer in mixers) else "no",
        PAPER.get(name, NOT_FOUND),
        WEIGHTS[family],
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the page."""
    rows = {name: row(name) for name in models.networks()}
    clouds = [line for name, line in rows.items() if name.startswith("pct")]
    print(TEXT + "\n".join(line for line in rows.values() if line not in clouds))
    print(CLOUDS + "\n".join(clouds))


if __name__ == "__main__":
    main()
