"""SOFT++: SOFT with a normalised inverse."""

from dataclasses import replace

from .soft import SOFT

__all__ = ["SOFTNorm"]


class SOFTNorm(SOFT):
    """SOFT with inverse "norm": Z = D^-1/2 A^+ D^-1/2, D the row sums of the landmarks' kernel matrix A.

    The scale of the iteration is found for each image and head, so that an output never depends on
    batch-mates; batchwise=True is the published one. Options and parameters: see SOFT.
    """

    traits = replace(
        SOFT.traits,
        title="SOFT++",
        paper="Lu et al., Softmax-free Linear Transformers, IJCV 2024 (arXiv 2207.03341)",
        computes="SOFT with an inverse that is normalised by the row sums of the landmarks' kernel",
    )

    def __init__(self, *args, inverse: str = "norm", **words) -> None:
        super().__init__(*args, inverse=inverse, **words)
