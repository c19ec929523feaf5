"""Small attention modules, each with a defect that public implementations have, or without."""

import torch
import torch.nn.functional as F
from torch import nn


class SimA(nn.Module):
    """l1 norms over the tokens; `defect` says what is wrong."""

    def __init__(self, dim, num_heads=4, causal=False, defect=""):
        super().__init__()
        self.num_heads, self.causal, self.defect = num_heads, causal, defect
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.calls, self.kept = 0, [0]
        self.scale = nn.Parameter(torch.ones(dim)) if defect == "parameter without use" else None

    def forward(self, x, mask=None):
        batch, tokens, dim = x.shape
        if self.defect == "counts":
            self.kept[0] += 1
        if self.defect == "writes into its input":
            x.mul_(2)
        if self.defect == "view":
            x = x.view(batch * tokens, dim).view(batch, tokens, dim)
        qkv = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dtype, qkv = (
            qkv.dtype,
            qkv if self.defect == "half sums" else qkv.to(torch.promote_types(qkv.dtype, torch.float)),
        )
        if mask is not None and self.defect == "drops":  # another convention, no defect
            mask = ~mask
        if mask is not None and self.defect != "mask unused":
            qkv = qkv.masked_fill(~mask[:, None, :, None], 0)
        q, k, v = qkv
        if self.causal:
            sums = [t.abs().cumsum(-2).clamp(min=1e-12) for t in (q, k)]
            if self.defect == "future":
                sums = [s[..., -1:, :] for s in sums]
            products = (k[..., :, None] * v[..., None, :]).cumsum(-3)
            y = ((q / sums[0] / sums[1])[..., None, :] @ products).squeeze(-2)
        else:
            axis = -1 if self.defect == "axis" else -2
            if self.defect == "half sums":
                q, k = (t / t.abs().sum(axis, keepdim=True).clamp(min=1e-12) for t in (q, k))
            else:
                q, k = (F.normalize(t, p=1, dim=axis) for t in (q, k))
            y = (q @ k.mT) @ v if self.defect == "quadratic" else q @ (k.mT @ v)
        if self.defect == "dropout":
            y = F.dropout(y, 0.5)
        if self.defect == "heads into tokens":
            return self.to_out(y.reshape(batch, tokens, dim).to(dtype))
        if self.defect == "graph break" and y.sum().item() > 1e9:
            y = y * 2
        return self.to_out(y.transpose(1, 2).flatten(2).to(dtype))


class External(nn.Module):
    """Two memories; the softmax belongs to the tokens, the l1 norm to the memory."""

    def __init__(self, d_model, rows=7, axis=1):
        super().__init__()
        self.axis = axis
        self.mk, self.mv = nn.Linear(d_model, rows, bias=False), nn.Linear(rows, d_model, bias=False)

    def forward(self, queries):
        a = self.mk(queries).softmax(self.axis)
        return self.mv(a / a.sum(-1, keepdim=True))


class AFT(nn.Module):
    """AFT-full with a plain table, and the maximum of the keys that is subtracted before exp."""

    def __init__(self, dim, max_tokens=60, maximum="channel", rebuilt=False, fixed=False):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.project = nn.Linear(dim, dim)
        self.wbias = nn.Parameter(torch.zeros(max_tokens, max_tokens))
        self.maximum, self.rebuilt, self.fixed = maximum, rebuilt, fixed

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        tokens = x.shape[1]
        if self.rebuilt:
            self.wbias = nn.Parameter(torch.tensor(self.wbias.tolist(), dtype=x.dtype))
        w = self.wbias if self.fixed else self.wbias[:tokens, :tokens]
        most = {"channel": k.amax(1, keepdim=True), "batch": k.amax(), "none": 0}[self.maximum]
        weights, e = torch.exp(w), torch.exp(k - most)
        return self.project(torch.sigmoid(q) * (weights @ (e * v)) / (weights @ e))


class SOFT(nn.Module):
    """Every token is a landmark; Newton's method starts at a step of each image, or of the whole batch."""

    def __init__(self, dim, whole_batch=False):
        super().__init__()
        self.q, self.v, self.whole_batch = nn.Linear(dim, dim), nn.Linear(dim, dim), whole_batch

    def forward(self, x):
        q, v = self.q(x), self.v(x)
        a = torch.exp(-(q[:, :, None] - q[:, None]).square().sum(-1) / 2)
        rows = a.sum(-1)
        most = rows.amax() if self.whole_batch else rows.amax(-1)[:, None, None]
        z = a * 1.8 / most**2
        for _ in range(6):
            z = 2 * z - z @ a @ z
        return a @ (z @ (a @ v))


class NeedsNeighbours(nn.Module):
    """forward takes more than tokens."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, neighbours, radius):
        return self.linear(x) * radius + neighbours


class Images(nn.Module):
    """SimA on feature maps."""

    def __init__(self, in_channels):
        super().__init__()
        self.attention = SimA(in_channels, 1)

    def forward(self, x):
        return self.attention(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


class Products(nn.Module):
    """softmax attention on heads that are given."""

    def __init__(self, dim, heads):
        super().__init__()

    def forward(self, q, k, v, is_causal=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


class Plain:
    """No module."""


def not_a_module(dim):
    return dim
