"""PCT on ShapeNet part, with External Attention or with its own (Guo et al., 2021)."""

from ..tasks._recipes.points import PointAugment, PointData, Recipe
from .modelnet40_pct import OPTIM

__all__ = ["shapenetpart_pct"]

RUNS = {"shapenetpart_pct_ea": ("pct_ea_partseg",), "shapenetpart_pct": ("pct_partseg",)}


def shapenetpart_pct(model: str) -> Recipe:
    """ShapeNet part: 14,007 shapes to learn and 2,874 to test, 2,048 points each, 16 categories, 50 parts.

        sansmax train shapenetpart_pct_ea --data.root shapenetcore_partanno_segmentation_benchmark_v0_normal

    `--data.root` may also name the folder of HDF5 files.

    Cost: not measured. To reach: 86.4 % instance mIoU is PCT's own (85.3 to 85.6 % in others' hands); for
    External Attention no number could be read.

    Assumed, because no training code of PCT's part segmentation was published: optimiser, epochs, smoothing,
    scales and shifts of its classification, without dropout of points, on train and val together.
    """
    return Recipe(
        kind="parts",
        model=model,
        points=2048,
        epochs=250,
        batch_size=32,
        smoothing=0.2,
        data=PointData(root="shapenetcore_partanno_segmentation_benchmark_v0_normal", split="trainval"),
        augment=PointAugment(dropout=0.0),
        optim=OPTIM,
    )
