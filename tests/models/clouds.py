"""Point clouds, small networks for them, and sampling by loops, that the tests share."""

import math

import torch
from torch import nn

import sansmax


def small(name, **words):
    """A network of the same wiring that builds and runs in a moment; its norms are far from the identity."""
    own = {
        "embed_dim": 16,
        "num_features": 24,
        "head_dims": (14, 10),
        "num_classes": 5,
        "depth": 2,
        "drop_rate": 0,
    }
    if "partseg" not in name:
        own |= {"num_samples": (11, 7), "num_neighbors": 4}
    elif "num_categories" not in words:
        own |= {"num_categories": 3, "label_dim": 6}
    torch.manual_seed(0)
    model = sansmax.create_model(name, **{**own, **words})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(std=0.2)
    return model


def cloud(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(model, points, **words):
    """The network's output; objects are of categories 0, 1, 2, 0, ... where it asks for them."""
    if getattr(model, "num_categories", 0):
        words["label"] = torch.arange(len(points)) % model.num_categories
    return model(points, **words)


def farthest_by_loops(points, count, keep, skip_origin):
    start = keep.index(True)
    chosen, distance = [start], [math.inf] * len(points)
    for _ in range(count - 1):
        best, index = -1.0, start
        for j, point in enumerate(points):
            if not keep[j] or (skip_origin and sum(c * c for c in point) <= 1e-3):
                continue
            d = sum((a - b) ** 2 for a, b in zip(point, points[chosen[-1]], strict=True))
            distance[j] = min(distance[j], d)
            if distance[j] > best:
                best, index = distance[j], j
        chosen.append(index)
    return chosen


def nearest_by_loops(query, points, count, keep):
    near = sorted(
        (sum((a - b) ** 2 for a, b in zip(point, query, strict=True)), j)
        for j, point in enumerate(points)
        if keep[j]
    )
    near = [j for _, j in near[:count]]
    return sorted(near + near[:1] * (count - len(near)))
