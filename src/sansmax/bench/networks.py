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
}
TEXT = """# The published networks

`import sansmax.models` registers them in timm: `timm.create_model("soft_tiny", num_classes=10)`.
Every one has timm's interface and takes `mechanism=` with any of sansmax's mechanisms (X-ViT and ViBid: any
but softmax). Multiply-adds (10^9, one image) count convolutions, matrix products and the mechanisms;
"exp-free" means that no layer computes an exponential to mix tokens. Top-1 is the authors' on ImageNet at 224
px, where a source was found; no network was trained on ImageNet here.

Written by `uv run python -m sansmax.bench.networks > docs/networks.md`.

| network | parameters | GMACs 224 px | GMACs 384 px | mechanism | exp-free | paper's top-1 % | weights |
|---|---|---|---|---|---|---|---|
"""


def row(name: str) -> str:
    """The network's line of the table."""
    with torch.device("meta"):
        built = [timm.create_model(name, img_size=size) for size in SIZES]
        costs = [
            count_flops(network, torch.empty(1, 3, size, size)) / 2e9
            for network, size in zip(built, SIZES, strict=True)
        ]
    mixers = [module for module in built[0].modules() if isinstance(module, layers.Mixer)]
    names = {layer: name for name, layer in layers.mechanisms().items()}
    mechanisms = Counter(names[type(mixer)] for mixer in mixers)
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    cells = [
        f"`{name}`",
        f"{sum(p.numel() for p in built[0].parameters()):,}",
        *(f"{cost:.2f}" for cost in costs),
        " + ".join(mechanism for mechanism, _ in mechanisms.most_common()),
        "yes" if all(mixer.traits.exp_free for mixer in mixers) else "no",
        PAPER.get(name, NOT_FOUND),
        WEIGHTS[family],
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the page."""
    print(TEXT + "\n".join(row(name) for name in models.networks()))


if __name__ == "__main__":
    main()
