"""PCT: attention against its equation, networks against the published structure and counts."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from clouds import cloud, farthest_by_loops, nearest_by_loops, small

from sansmax.models import load_published
from sansmax.models._points import OffsetAttention, OffsetBlock

NETWORKS = ["pct_cls", "pct_ea_cls", "pct_partseg", "pct_ea_partseg"]
every = pytest.mark.parametrize("name", NETWORKS)


def offset_attention(layer, x):
    """The equation, in the published order of operations: (B, N, C) -> (B, N, C)."""
    k, v = x @ layer.qk.weight.mT, x @ layer.v.weight.mT + layer.v.bias
    attention = torch.softmax(k @ k.mT, -1)
    attention = attention / (1e-9 + attention.sum(1, keepdim=True))
    return attention.mT @ v


def test_offset_attention():
    torch.manual_seed(0)
    layer = OffsetAttention(12, dtype=torch.float64)
    x = cloud(2, 7, 12, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(layer(x), offset_attention(layer, x), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(layer, x)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, [0, 3]], mask[1, 6] = False, False
    got = layer(x, mask=mask)
    for b in range(2):
        torch.testing.assert_close(got[b, mask[b]], layer(x[b : b + 1, mask[b]])[0], rtol=1e-12, atol=1e-12)


def test_offset_attention_where_a_point_is_looked_at_by_nobody(error):
    torch.manual_seed(0)
    layer = OffsetAttention(8)
    x = cloud(1, 30, 8) * 100
    want = offset_attention(layer.double(), x.double())
    got = layer.float()(x)
    assert error(got, want) < 1e-3
    sums = torch.softmax((x @ layer.qk.weight.mT) @ (x @ layer.qk.weight.mT).mT, -1).sum(1)
    assert (sums == 0).any()
    assert not got[0, sums[0] == 0].any()
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()


def test_offset_attention_golden(golden, error):
    case = golden("external_attention/pct_sa_pos_c32")
    block = OffsetBlock(32, OffsetAttention(32)).eval()
    names = {"k_conv": "attn.qk", "v_conv": "attn.v", "trans_conv": "trans.fc", "after_norm": "trans.norm"}
    state = {}
    for key, value in case.state_dict().items():
        module, leaf = key.split(".")
        state[f"{names[module]}.{leaf}"] = value.squeeze(-1) if value.ndim == 3 else value
    x = case.inputs()["x"] + case.inputs()["xyz_embed"]
    x = x.mT
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-9)):
        block.to(dtype).load_state_dict(state)
        with torch.inference_mode():
            assert error(block(x.to(dtype)).mT, case.outputs["out"]) < tolerance
            assert error((x - block.attn(x.to(dtype))).mT, case.outputs["offset"]) < tolerance


class Published:
    """The published structure: names and shapes of the tensors, and the networks of them, cloud by cloud.

    model_new.py (pos) and model.py of PCT_Pytorch; networks/seg/pct_partseg.py of PCT (seg).
    """

    def __init__(
        self, seg=False, pos=True, width=256, features=1024, hidden=(512, 256), classes=40, kinds=16
    ):
        self.shapes, self.seg, self.pos = {}, seg, pos
        self.features = features
        stem = width if seg else width // 4
        self.layer("conv1", "bn1", 3, stem)
        self.layer("conv2", "bn2", stem, stem)
        if not seg:
            for i, c in enumerate((width // 2, width)):
                self.layer(f"gather_local_{i}.conv1", f"gather_local_{i}.bn1", c, c)
                self.layer(f"gather_local_{i}.conv2", f"gather_local_{i}.bn2", c, c)
            for i in (1,) if pos else (1, 2):
                self.layer(f"pt_last.conv{i}", f"pt_last.bn{i}", width, width)
            if pos:
                self.layer("pt_last.pos_xyz", None, 3, width, bias=True)
        for i in range(1, 5):
            block = f"{'' if seg else 'pt_last.'}sa{i}"
            self.layer(f"{block}.k_conv", None, width, width // 4)
            self.layer(f"{block}.v_conv", None, width, width, bias=True)
            self.layer(f"{block}.trans_conv", f"{block}.after_norm", width, width, bias=True)
        self.layer("conv_fuse.0", "conv_fuse.1", (4 if seg else 5) * width, features)
        if seg:
            self.layer("label_conv.0", "label_conv.1", kinds, 64)
            self.layer("convs1", "bns1", 3 * features + 64, hidden[0], bias=True)
            self.layer("convs2", "bns2", *hidden, bias=True)
            self.layer("convs3", None, hidden[1], classes, bias=True)
        else:
            self.layer("linear1", "bn6", features, hidden[0])
            self.layer("linear2", "bn7", *hidden, bias=True)
            self.layer("linear3", None, hidden[1], classes, bias=True)

    def layer(self, name, norm, inputs, outputs, bias=False):
        self.shapes[f"{name}.weight"] = (outputs, inputs) if "linear" in name else (outputs, inputs, 1)
        if bias:
            self.shapes[f"{name}.bias"] = (outputs,)
        for leaf in ("weight", "bias", "running_mean", "running_var") if norm else ():
            self.shapes[f"{norm}.{leaf}"] = (outputs,)

    @property
    def parameters(self):
        return sum(math.prod(s) for key, s in self.shapes.items() if "running" not in key)

    def fill(self):
        """Random tensors; queries have the weight of the keys, as their state dict says."""
        generator = torch.Generator().manual_seed(0)
        self.state = {}
        for key, shape in self.shapes.items():
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            if len(shape) > 1:
                x = x * 2 / math.sqrt(shape[1])
            elif key.endswith(("weight", "running_var")):
                x = 1 + 0.3 * x.tanh()
            self.state[key] = x
        for key in [key for key in self.state if "k_conv" in key]:
            self.state[key.replace("k_conv", "q_conv")] = self.state[key]
        return self

    def apply(self, x, name, norm=None, act=F.relu):
        """x (inputs, N) -> (outputs, N)."""
        s = self.state
        bias = s.get(f"{name}.bias")
        x = s[f"{name}.weight"].flatten(1) @ x + (0 if bias is None else bias[:, None])
        if norm is None:
            return x
        spread = (s[f"{norm}.running_var"] + 1e-5).sqrt()
        x = (x - s[f"{norm}.running_mean"][:, None]) / spread[:, None]
        return act(x * s[f"{norm}.weight"][:, None] + s[f"{norm}.bias"][:, None])

    def attend(self, x, block):
        queries, keys = self.apply(x, f"{block}.q_conv"), self.apply(x, f"{block}.k_conv")
        attention = torch.softmax(queries.mT @ keys, -1)
        attention = attention / (1e-9 + attention.sum(0, keepdim=True))
        gathered = self.apply(x, f"{block}.v_conv") @ attention
        return x + self.apply(x - gathered, f"{block}.trans_conv", f"{block}.after_norm")

    def group(self, xyz, x, samples, neighbors, stage):
        points = xyz.tolist()
        chosen = farthest_by_loops(points, samples, [True] * len(points), skip_origin=True)
        columns = []
        for i in chosen:
            near = nearest_by_loops(points[i], points, neighbors, [True] * len(points))
            beside = torch.cat([x[:, near] - x[:, i : i + 1], x[:, i : i + 1].expand(-1, neighbors)])
            for j in (1, 2):
                beside = self.apply(beside, f"{stage}.conv{j}", f"{stage}.bn{j}")
            columns.append(beside.max(1).values)
        return xyz[chosen], torch.stack(columns, 1)

    def logits(self, xyz, *, samples=(), neighbors=0, category=None):
        """xyz (N, 3) -> (classes,), or (classes, N) for parts."""
        x = xyz.mT
        for i in (1, 2):
            x = self.apply(x, f"conv{i}", f"bn{i}")
        for i, count in enumerate(samples):
            xyz, x = self.group(xyz, x, count, neighbors, f"gather_local_{i}")
        local = x
        if not self.seg:
            for i in (1,) if self.pos else (1, 2):
                x = self.apply(x, f"pt_last.conv{i}", f"pt_last.bn{i}")
        outputs = []
        for i in range(1, 5):
            if not self.seg and self.pos:
                x = x + self.apply(xyz.mT, "pt_last.pos_xyz")
            x = self.attend(x, f"{'' if self.seg else 'pt_last.'}sa{i}")
            outputs.append(x)

        def leaky(x):
            return torch.where(x > 0, x, 0.2 * x)

        x = torch.cat(outputs if self.seg else [*outputs, local])
        x = self.apply(x, "conv_fuse.0", "conv_fuse.1", leaky)
        if self.seg:
            label = self.apply(category[:, None], "label_conv.0", "label_conv.1", leaky)
            shared = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True), label])
            x = torch.cat([x, shared.expand(-1, x.shape[1])])
            x = self.apply(self.apply(x, "convs1", "bns1"), "convs2", "bns2")
            return self.apply(x, "convs3")
        x = x.max(1, keepdim=True).values
        x = self.apply(self.apply(x, "linear1", "bn6", leaky), "linear2", "bn7", leaky)
        return self.apply(x, "linear3")[:, 0]


def test_parameters():
    def count(name, **words):
        with torch.device("meta"):
            model = timm.create_model(name, **words)
        return sum(p.numel() for p in model.parameters())

    cls, old = Published(), Published(pos=False)
    seg = Published(seg=True, width=128, classes=50)
    assert count("pct_cls") == cls.parameters == 2_811_112
    assert count("pct_cls", pos_embed=False) == old.parameters == 2_876_136  # 2.88 M are reported
    assert count("pct_partseg") == seg.parameters == 2_446_130
    # Query layer and two memories of 64 rows in place of keys and values, four times.
    for name, network, c in (("pct_ea_cls", cls, 256), ("pct_ea_partseg", seg, 128)):
        change = (c * c + 2 * 64 * c) - (c * c // 4 + c * c + c)
        assert count(name) == network.parameters + 4 * change


@pytest.mark.parametrize("pos", [True, False])
def test_published_classification(error, pos):
    theirs = Published(pos=pos, width=16, features=24, hidden=(14, 10), classes=5).fill()
    words = {"num_samples": (13, 6), "num_neighbors": 4, "depth": 4, "pos_embed": pos, "skip_origin": True}
    model = small("pct_cls", **words).double().eval()
    xyz = cloud(2, 21, 3, dtype=torch.float64)
    xyz[:, [4, 9]] *= 0.01  # what skip_origin skips
    counters = {k.replace("mean", "var"): 0 for k in theirs.state if "running" in k}
    state = theirs.state | {
        k.replace("running_var", "num_batches_tracked"): torch.tensor(3) for k in counters
    }
    load_published(model, {"state_dict": {f"module.{k}": v for k, v in state.items()}})
    assert model.fuse.norm.num_batches_tracked == 3
    want = torch.stack([theirs.logits(x, samples=(13, 6), neighbors=4) for x in xyz])
    assert error(model(xyz), want) < 1e-9
    assert error(model.float()(xyz.float()), want) < 5e-5
    own = {k: v.clone() for k, v in model.state_dict().items()}
    twin = load_published(small("pct_cls", **words).eval(), own)
    assert torch.equal(twin(xyz.float()), model(xyz.float()))


def test_published_part_segmentation(error):
    sizes = {"width": 16, "features": 24, "hidden": (14, 10), "classes": 5, "kinds": 3}
    theirs = Published(seg=True, **sizes).fill()
    model = small("pct_partseg", depth=4, label_dim=64).double().eval()
    xyz, label = cloud(2, 19, 3, dtype=torch.float64), torch.tensor([2, 0])
    one_hot = F.one_hot(label, 3).double()
    want = torch.stack([theirs.logits(x, category=c) for x, c in zip(xyz, one_hot, strict=True)])
    # Jittor's Conv1d holds a Conv2d, and its batch norm counts nothing.
    jittor = {}
    for key, value in theirs.state.items():
        module, leaf = key.rsplit(".", 1)
        convolution = theirs.state[f"{module}.weight"].ndim == 3
        key = f"{module}.conv.{leaf}" if convolution else key
        jittor[key] = value[..., None] if value.ndim == 3 else value
    for state in (theirs.state, jittor, {k: v for k, v in jittor.items() if "k_conv" not in k}):
        for parameter in model.parameters():
            parameter.data.zero_()
        load_published(model, state)
        assert error(model(xyz, label), want) < 1e-9
        assert error(model(xyz, one_hot), want) < 1e-9
    state["sa2.q_conv.weight"] = theirs.state["sa2.q_conv.weight"] + 1
    with pytest.raises(ValueError, match=r"one weight for queries and keys of a block, got two in blocks\.1"):
        load_published(model, {**theirs.state, "sa2.q_conv.weight": state["sa2.q_conv.weight"]})
    del theirs.state["bns1.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(hidden.0.norm.weight\)"):
        load_published(model, theirs.state)
