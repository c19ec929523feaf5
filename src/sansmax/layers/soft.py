"""SOFT: a Gaussian kernel in place of softmax, through landmarks and the inverse of their kernel matrix."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _check
from ..ops._backend import no_autocast
from ..ops._depthwise import depthwise
from ..ops.soft import flops, soft
from ._contract import Grid, Mixer, Traits
from ._parts import kept, pulled_back

__all__ = ["SOFT"]


class SOFT(Mixer):
    """out = P Z (P^T V) + conv(V); queries and keys are one, P is their Gaussian kernel with the landmarks.

    The landmarks are made of the queries on the patch grid: pooled or strided, then a convolution over the
    channels of a head (one for all heads), LayerNorm and GELU. Tokens in front of the grid (a class token)
    are ordinary queries and keys, but enter neither a landmark nor the convolution of V.

    Args:
        landmarks: how many, a square number: the grid is averaged into as many equal regions, so the cost
            stays linear at any image size (a grid side shorter than its root gives one landmark a token). 49
            as in the paper.
        ratio: in place of `landmarks`, as in the published code: a convolution of this size and stride, so
            that their number grows with the image. Rows and columns that do not fill a stride are left out.
        conv_size: width of the depth-wise convolution of V, one filter per head, odd, added to the output as
            in the published code (9, 5, 3 in its stages); None for the paper's equation, without it.
        inverse, iterations: see sansmax.ops.soft.
        batchwise: see sansmax.ops.soft; True is the published scale of the inverses "norm" and "release2021",
            which makes an image's output depend on its batch-mates.
        grid, num_prefix_tokens: as in set_input.

    Other options: see Mixer. Published names: q = W_q, v = W_v, landmark = attn.Qlandmark_op, landmark_norm =
    attn.Qnorm_act.0, conv = attn.conv, proj = ff.
    """

    traits = Traits(
        title="SOFT",
        paper="Lu et al., SOFT: Softmax-free Transformer with Linear Complexity, NeurIPS 2021 "
        "(arXiv 2110.11945)",
        computes="a Gaussian kernel of the queries, through landmarks and a Newton inverse of their kernel",
        cost="N m D + N m^2 + m^3",
        causal=False,
        cross=False,
        mask=True,
        streaming=False,
        exp_free=False,
        needs="grid",
    )
    head_norms = ("q_norm",)
    no_causal = "every landmark is made of tokens from the whole grid"
    no_cross = "its queries and keys are one projection"

    q: nn.Linear
    v: nn.Linear

    def __init__(
        self,
        dim: int,
        *args,
        landmarks: int = 49,
        ratio: int | None = None,
        conv_size: int | None = 3,
        inverse: str = "plain",
        iterations: int = 20,
        batchwise: bool = False,
        grid: Grid | None = None,
        num_prefix_tokens: int | None = None,
        **words,
    ) -> None:
        super().__init__(dim, *args, inputs={"q": dim, "v": dim}, **words)
        side = math.isqrt(max(landmarks, 0))
        if (side * side != landmarks or side < 1) if ratio is None else ratio < 1:
            raise ValueError(
                f"{self.name}: landmarks must be a square number or ratio at least 1, got "
                f"landmarks={landmarks} and ratio={ratio}; use landmarks=49"
            )
        if conv_size is not None and (conv_size < 1 or conv_size % 2 == 0):
            raise ValueError(
                f"{self.name}: conv_size must be odd, got {conv_size}; use {max(conv_size, 0) + 1}"
            )
        self.landmark_side, self.ratio = side, ratio
        self.inverse, self.iterations, self.batchwise = inverse, iterations, batchwise
        width, stride = self.head_dim, ratio or 1
        self.landmark = nn.Conv2d(width, width, stride, stride, bias=False, **self.factory)
        self.landmark_norm = nn.LayerNorm(width, eps=1e-5, **self.factory)
        self.conv = None
        if conv_size is not None:
            heads, pad = self.num_heads, conv_size // 2
            self.conv = nn.Conv2d(
                heads, heads, conv_size, padding=pad, groups=heads, bias=False, **self.factory
            )
        if grid is not None:
            self.set_input(grid, num_prefix_tokens or 0)
        self.num_prefix_tokens = num_prefix_tokens

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        rows, columns, prefix = self.layout(x.shape[1], grid)
        q, v = self.heads(x, mask)
        y = self.attend(q, v, self.landmarks(q[:, :, prefix:], rows, columns), mask)
        y = y.transpose(1, 2)  # (B, N, H, D)
        if self.conv is not None:
            # Tokens are an image with its channels last: nothing is moved, and a depth-wise convolution takes
            # a quarter of the time of one over heads (64 images of 8 x 8, with gradients).
            image = v[:, :, prefix:].transpose(1, 2).flatten(2).unflatten(1, (rows, columns))
            filters = self.conv.weight.repeat_interleave(self.head_dim, 0)
            with no_autocast(image):
                image = depthwise(image, filters.to(image.dtype))
            image = image.flatten(1, 2).unflatten(-1, (self.num_heads, -1))  # (B, P, H, D)
            y = y + F.pad(image, (0, 0, 0, 0, prefix, 0))
        return y.flatten(2)

    def heads(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """q, v (B, H, N, D), zeros in masked tokens, which the biases fill."""
        q, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.v))
        q, v = _check.cleared(mask, self.q_norm(q) * self.head_dim**-0.25, v)
        return q, v

    def attend(self, q: Tensor, v: Tensor, landmarks: Tensor, mask: Tensor | None) -> Tensor:
        """P Z (P^T V)."""
        return soft(
            q.to(landmarks.dtype),
            v.to(landmarks.dtype),
            landmarks,
            inverse=self.inverse,
            iterations=self.iterations,
            mask=mask,
            batchwise=self.batchwise,
        ).to(v.dtype)

    def map_product(
        self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """See Mixer. A = P Z P^T, without the convolution of V."""
        x, _, mask = self.received(x, None, False, None, mask)
        height, width, prefix = self.layout(x.shape[1], grid)
        q, v = self.heads(x, mask)
        landmarks = self.landmarks(q[:, :, prefix:], height, width)

        def mix(values: Tensor) -> Tensor:
            return self.attend(q, values, landmarks, mask)

        return pulled_back(mix, v[..., :1], kept(rows, mask)[:, None, :, None]).squeeze(-1)

    def landmarks(self, q: Tensor, rows: int, columns: int) -> Tensor:
        """q (B, H, rows * columns, D), row-major -> (B, H, m, D) in the dtype of the parameters."""
        counts = self.landmark_grid(rows, columns)
        # The inverse multiplies errors by its condition: autocast stays outside.
        with no_autocast(q):
            image = q.to(self.landmark.weight.dtype).mT.reshape(-1, self.head_dim, rows, columns)
            if self.ratio is None:
                image = F.adaptive_avg_pool2d(image, counts)
            tokens = self.landmark(image).flatten(2).mT.unflatten(0, q.shape[:2])
            return F.gelu(self.landmark_norm(tokens))

    def landmark_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """How many landmarks a patch grid has in each direction."""
        if self.ratio is None:
            return min(self.landmark_side, rows), min(self.landmark_side, columns)
        if min(rows, columns) < self.ratio:
            raise ValueError(
                f"{self.name}: the grid must have at least ratio={self.ratio} rows and columns, got "
                f"({rows}, {columns}); use a smaller ratio, or landmarks"
            )
        return rows // self.ratio, columns // self.ratio

    def flops(self, n: int, m: int | None = None) -> int:
        rows, columns, _ = self.layout(n, None)
        width = self.head_dim
        count = math.prod(self.landmark_grid(rows, columns))
        convolutions = count * self.landmark.weight.numel() * self.num_heads
        if self.conv is not None:
            convolutions += rows * columns * width * self.conv.weight.numel()
        options = {"inverse": self.inverse, "iterations": self.iterations}
        attention = flops(1, self.num_heads, n, width, width, count, **options)
        return 6 * n * self.dim * self.dim + 2 * convolutions + attention
