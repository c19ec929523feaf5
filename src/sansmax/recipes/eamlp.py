"""EAMLP and T2T-ViT with External Attention."""

from dataclasses import replace

from ..train.recipe import Recipe
from ._imagenet import AUGMENT, DEIT

__all__ = ["eamlp"]

NETWORKS = (
    *(f"eamlp_{depth}" for depth in (7, 10, 12, 14, 19, 24)),
    *(f"eamlp_t_{depth}" for depth in (14, 19, 24)),
    "t2t_ea_14",
)
RUNS = {network: (network,) for network in NETWORKS}


def eamlp(network: str) -> Recipe:
    """EAMLP (eamlp_*) and T2T-ViT with External Attention in its token layers (t2t_ea_14) on ImageNet-1k.

        sansmax train eamlp_7 --data.root imagenet
        sansmax train eamlp_14 --data.root imagenet

    Cost: not stated.
    To reach: top-1 eamlp_7 at 384 px 71.66 (released log; 71.6 before the cool-down), eamlp_14 78.9 and
    eamlp_19 79.4 at 224 px, t2t_ea_14 81.7. The others: not published.

    Source: the only released log, EAMLP-7 at 384 px (MenghaoGuo/EANet, EAMLP/EAMLP_7_384/args.yaml) and its
    main.py, which is T2T-ViT's.
    Differences:
    - The log has 10 more epochs at the lowest rate, 1e-5, after the 300; they are not run here.
    - The schedule there steps with e + 1 after epoch e, which is what happens here.
    - The moving average (0.99996) is what is evaluated, there and here.
    - eamlp_7 alone is trained at 384 px, as in the log.
    Assumed:
    - 512 images an update. The log has 64 a process and a rate of 1e-3 that does not follow the batch, so
      that neither does it here; the number of GPUs is not recorded. T2T-ViT has 8 of 64 for 1e-3.
    - the log's recipe for all networks, weight decay 0.03 among it. T2T-ViT has 10 warm-up epochs, mixed
      precision, and weight decay 0.05 (14) or 0.065 (19, 24).
    """
    return replace(
        DEIT,
        model=network,
        img_size=384 if network == "eamlp_7" else 224,
        eval_crop=0.9,
        batch_size=512,
        seed=42,
        precision="fp32",
        augment=replace(AUGMENT, interpolation="random"),
        optim=replace(DEIT.optim, lr=1e-3, lr_batch=None, weight_decay=0.03, evaluate_ema=True),
    )
