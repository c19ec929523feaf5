"""Farthest points and nearest neighbours of point clouds, batched, with padding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["farthest_points", "nearest_points", "taken"]

# Squared distances that nearest_points has in memory at a time.
CHUNK = 2**22


@torch.no_grad()
def farthest_points(
    xyz: Tensor, count: int, mask: Tensor | None = None, *, skip_origin: bool = False
) -> Tensor:
    """Farthest point sampling: the first point, then again and again the one farthest from all chosen ones.

    Where several are equally far, the first in order is taken: the first point again, once all distinct ones
    are. O(count N) time and O(N) memory, in float32 or better.

    Args:
        xyz: (B, N, 3).
        count: how many; may be more than N.
        mask: (B, N) bool, True = keep, with at least one True: masked points, and points that are not finite,
            are never taken, and the first other one is the start.
        skip_origin: never takes a point with |p|^2 <= 1e-3, the start apart, as the CUDA kernel of
            PointNet++, for which zeros are padding, and which PCT's authors use. It ignores real points near
            the origin, and all of a small enough cloud.

    Returns:
        Indices (B, count).
    """
    # One node for torch.compile: pct_ea_cls in 11 s, and in 730 s with all steps (2 busy CPU cores).
    # An exported program has the steps, and stands alone.
    sample = _farthest_points if torch.compiler.is_exporting() else _farthest_points_node
    return sample(xyz.detach(), count, mask, skip_origin)


def _farthest_points(xyz: Tensor, count: int, mask: Tensor | None, skip_origin: bool) -> Tensor:
    planes = _planes(xyz)
    # One NaN among the distances would be the largest of all, and end the search.
    kept = planes.isfinite().all(1)
    if mask is not None:
        kept = kept & mask
    planes = planes.masked_fill(~kept[:, None], 0)
    start = kept.long().argmax(1)
    distance = torch.full_like(planes[:, 0], math.inf).masked_fill(~kept, -1)
    if skip_origin:
        distance = distance.masked_fill(planes.square().sum(1) <= 1e-3, -1)
    chosen = [start]
    for _ in range(count - 1):
        last = planes.gather(2, chosen[-1][:, None, None].expand(-1, 3, -1))  # (B, 3, 1)
        distance = distance.minimum((planes - last).square().sum(1))
        best, index = distance.max(1)
        chosen.append(index.where(best >= 0, start))
    return torch.stack(chosen, 1)


_farthest_points_node = torch.library.custom_op("sansmax::farthest_points", _farthest_points, mutates_args=())


@_farthest_points_node.register_fake
def _(xyz: Tensor, count: int, mask: Tensor | None, skip_origin: bool) -> Tensor:
    return xyz.new_empty((len(xyz), count), dtype=torch.long)


@torch.no_grad()
def nearest_points(queries: Tensor, xyz: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """The `count` points nearest to every query, in no order.

    Where two are equally far, the first in order is taken; where there are fewer than `count`, the nearest is
    repeated. Distances are sums of squared differences in float32 or better, CHUNK of them at a time.

    Args:
        queries: (B, S, 3).
        xyz: (B, N, 3).
        mask: (B, N) bool, True = keep, with at least one True: masked points, and points that are not finite,
            are near to nothing.

    Returns:
        Indices (B, S, count).
    """
    planes = _planes(xyz)
    if torch.compiler.is_exporting():  # for any number of clouds and points
        return _nearest(_planes(queries), planes, count, mask)
    step = max(1, CHUNK // (xyz.shape[0] * max(xyz.shape[1], count)))
    return torch.cat([_nearest(part, planes, count, mask) for part in _planes(queries).split(step, 2)], 1)


def _nearest(queries: Tensor, planes: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """queries (B, 3, S), planes (B, 3, N) -> indices (B, S, count)."""
    x, y, z = ((queries[:, i, :, None] - planes[:, i, None]).square() for i in range(3))
    distance = (x + y + z).nan_to_num(nan=math.inf, posinf=math.inf)
    if mask is not None:
        distance = distance.masked_fill(~mask[:, None], math.inf)
    distance = F.pad(distance, (0, max(0, count - distance.shape[2])), value=math.inf)
    last = distance.topk(count, largest=False).values[..., -1:]
    # topk leaves open which of several equal ones it takes, so it is asked again with unequal numbers.
    points = distance.shape[2]
    order = torch.arange(points, dtype=torch.int32, device=distance.device)
    index = (((distance < last).int() + (distance <= last)) * points - order).topk(count).indices
    missing = distance.gather(2, index).isinf()
    return distance.argmin(2, keepdim=True).where(missing, index)


def _planes(xyz: Tensor) -> Tensor:
    """(B, N, 3) -> (B, 3, N), contiguous, in float32 or better."""
    return xyz.mT.to(torch.promote_types(xyz.dtype, torch.float32)).contiguous()


def taken(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C), index (B, ...) -> (B, ..., C)."""
    batch = torch.arange(x.shape[0], device=x.device)  # len would be one number in a graph
    return x[batch.view(-1, *(1,) * (index.ndim - 1)), index]
