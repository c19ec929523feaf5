"""Farthest points and nearest neighbours, against loops."""

import pytest
import torch
from clouds import cloud, farthest_by_loops, nearest_by_loops, small
from torch.utils._python_dispatch import TorchDispatchMode

from sansmax.models import _sampling
from sansmax.models._sampling import farthest_points, nearest_points


def clouds():
    """Random points, a lattice full of ties, points near the origin, copies; shuffled masks."""
    lattice = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    near = cloud(27, 3) * torch.where(torch.arange(27) % 3 > 0, 1.0, 0.01)[:, None]
    copies = cloud(4, 3).repeat(7, 1)[:27]
    xyz = torch.stack([cloud(27, 3, seed=2), lattice, near, copies, near * 0.001]).double()
    mask = torch.rand(5, 27, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[:, 0] = torch.tensor([True, False, True, False, False])
    return xyz, mask


@pytest.mark.parametrize("skip_origin", [False, True])
@pytest.mark.parametrize("count", [1, 9, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_farthest_points_are_those_of_the_loops(masked, count, skip_origin):
    xyz, mask = clouds()
    got = farthest_points(xyz, count, mask if masked else None, skip_origin=skip_origin)
    keep = (mask if masked else torch.ones_like(mask)).tolist()
    for points, row, kept in zip(xyz.tolist(), got.tolist(), keep, strict=True):
        assert row == farthest_by_loops(points, count, kept, skip_origin)


@pytest.mark.parametrize("count", [1, 5, 31])
@pytest.mark.parametrize("masked", [False, True])
def test_nearest_points_are_those_of_the_loops(monkeypatch, masked, count):
    xyz, mask = clouds()
    queries = torch.cat([xyz[:, 3:10], cloud(5, 6, 3, dtype=torch.float64)], 1)
    got = nearest_points(queries, xyz, count, mask if masked else None)
    monkeypatch.setattr(_sampling, "CHUNK", 300)  # two queries at a time
    assert torch.equal(nearest_points(queries, xyz, count, mask if masked else None), got)
    keep = (mask if masked else torch.ones_like(mask)).tolist()
    for b in range(5):
        for query, row in zip(queries[b].tolist(), got[b].tolist(), strict=True):
            assert sorted(row) == nearest_by_loops(query, xyz[b].tolist(), count, keep[b])


def test_sampling_in_half_precision_is_that_of_float32():
    xyz = cloud(2, 50, 3).half()
    assert torch.equal(farthest_points(xyz, 20), farthest_points(xyz.float(), 20))
    near = nearest_points(xyz[:, :5], xyz, 6).sort().values
    assert torch.equal(near, nearest_points(xyz[:, :5].float(), xyz.float(), 6).sort().values)


def test_sampling_in_compiled_and_exported_programs():
    xyz, mask = clouds()
    torch.library.opcheck(
        _sampling._farthest_points_node, (xyz, 4, mask, False), test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(
        _sampling._farthest_points_node, (xyz, 4, None, True), test_utils=("test_schema", "test_faketensor")
    )
    model = small("pct_cls", num_samples=(4, 3), depth=1).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    program = torch.export.export(model, (cloud(2, 20, 3),))
    assert not [node for node in program.graph.nodes if "sansmax" in str(node.target)]
    with torch.no_grad():
        for count in (20, 12, 17):
            torch.testing.assert_close(compiled(cloud(2, count, 3)), model(cloud(2, count, 3)))
        torch.testing.assert_close(program.module()(cloud(2, 20, 3)), model(cloud(2, 20, 3)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_points_that_are_not_finite_are_as_if_they_were_masked(bad):
    xyz, mask = clouds()
    broken = xyz.masked_fill(~mask[..., None], bad)
    for count in (1, 9, 40):
        assert torch.equal(farthest_points(broken, count), farthest_points(xyz, count, mask))
        near = nearest_points(xyz[:, :4], broken, count).sort().values
        assert torch.equal(near, nearest_points(xyz[:, :4], xyz, count, mask).sort().values)
    nothing = torch.full((2, 5, 3), bad)
    assert not farthest_points(nothing, 3).any()
    assert nearest_points(nothing[:, :2], nothing, 7).max() < 5


@pytest.mark.parametrize("points", [1, 2])
def test_one_point_and_fewer_points_than_are_asked_for(points):
    xyz = cloud(3, points, 3)
    assert farthest_points(xyz, 6)[:, :points].sort().values.tolist() == [[*range(points)]] * 3
    assert not farthest_points(xyz, 6)[:, points:].any()
    near = nearest_points(xyz[:, :1], xyz, 6)
    assert near.shape == (3, 1, 6)
    assert sorted(near[0, 0].tolist()) == [0] * (7 - points) + [*range(1, points)]


def test_memory_grows_with_the_points_and_not_with_their_square():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    xyz = cloud(1, 20_000, 3)
    with Largest() as seen:
        nearest_points(xyz[:, :1000], xyz, 8)
    assert seen.size <= _sampling.CHUNK
    with Largest() as seen:
        _sampling._farthest_points(xyz, 8, None, False)
    assert seen.size <= 3 * 20_000
