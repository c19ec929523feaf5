"""The post-norm block of the SOFT pyramid, for any mechanism."""

from timm.layers.activations import GELUTanh
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from sansmax.layers._contract import Grid, Mixer

__all__ = ["PostNormBlock"]


class PostNormBlock(nn.Module):
    """y = norm1(x + drop(mixer(x))); out = norm2(y + drop(mlp(y))): (B, N, C) -> (B, N, C).

    Published code of SOFT, class SoftmaxFreeTransformerBlock: the norms come after the sums (LayerNorm eps
    1e-5), the MLP's GELU is the tanh approximation, and the recipe's drop path is an ordinary dropout.
    """

    def __init__(
        self, dim: int, *, mixer: Mixer, mlp_ratio: float = 4.0, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.attn = mixer
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = Mlp(
            dim,
            int(dim * mlp_ratio),
            act_layer=GELUTanh,
            device=device,
            dtype=dtype,
        )
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x, grid=grid)))
        return self.norm2(x + self.drop(self.mlp(x)))
