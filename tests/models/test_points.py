"""PCT: sampling against loops, attention against its equation, networks against the published structure."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import sansmax
from sansmax import layers
from sansmax.models import _sampling, load_published
from sansmax.models._points import OffsetAttention, OffsetBlock
from sansmax.models._sampling import farthest_points, nearest_points

NETWORKS = ["pct_cls", "pct_ea_cls", "pct_partseg", "pct_ea_partseg"]
SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 5},
    "aft_local": {"factor_dim": 5, "window": 4},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}
ORDERLESS = [name for name, layer in layers.mechanisms().items() if not layer.traits.needs]
every = pytest.mark.parametrize("name", NETWORKS)


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


@every
def test_timms_interface(name):
    model = small(name).eval()
    points = cloud(3, 20, 3)
    want = run(model, points)
    parts = "partseg" in name
    assert want.shape == ((3, 5, 20) if parts else (3, 5))
    features = model.forward_features(points)
    assert features.shape == (3, 20 if parts else 7, 24)
    head = (features, torch.arange(3)) if parts else (features,)
    torch.testing.assert_close(model.forward_head(*head), want)
    before = model.forward_head(*head, pre_logits=True)
    assert before.shape == ((3, 10, 20) if parts else (3, 10))
    logits = model.get_classifier()(before.mT).mT if parts else model.get_classifier()(before)
    torch.testing.assert_close(logits, want)
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (24, 10, 5)

    model.reset_classifier(9)
    assert run(model, points).shape[1] == model.num_classes == 9
    model.reset_classifier(0)
    torch.testing.assert_close(run(model, points), before)
    assert run(small(name, num_classes=0, in_chans=6).eval(), cloud(1, 8, 6)).shape[1] == 10
    assert len(model.mixers()) == (2 if "_ea_" in name else 0)
    assert model.no_weight_decay() == set()

    groups = model.group_matcher()
    assert set(groups) >= {"stem", "blocks"}
    assert set(model.group_matcher(coarse=True)) == {"stem", "blocks"}
    depths = timm.models.group_parameters(model, groups)
    head_only = [k for k, _ in model.named_parameters() if k.startswith(("hidden", "head", "label"))]
    assert sorted(depths[len(depths) - 1]) == sorted(head_only)
    assert depths[0]
    assert all(key.startswith("embed") for key in depths[0])

    cfg = timm.create_model(name).pretrained_cfg
    assert (cfg["num_classes"], cfg["classifier"]) == ((50 if parts else 40), "head")
    assert not {"input_size", "mean", "std", "crop_pct", "interpolation"} & set(cfg)
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Linear)
    assert timm.create_model(name).head_drop.p == 0.5


def test_pooling():
    model, points = small("pct_cls").eval(), cloud(2, 20, 3)
    features = model.forward_features(points)

    def behind(x):
        return model.head(model.hidden[1](model.hidden[0](x)))

    for pool, want in (("max", features.max(1).values), ("avg", features.mean(1)), ("", features)):
        model.reset_classifier(5, pool)
        torch.testing.assert_close(model(points), behind(want))


@every
def test_training_reaches_every_parameter_and_checkpointing_changes_nothing(name):
    points, results = cloud(4, 20, 3), []
    for checkpointing in (False, True):
        model = small(name, drop_rate=0.2, proj_drop_rate=0.1).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        (run(model, points).movedim(1, -1) * torch.arange(5.0)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        # What a batch norm follows needs no bias, in training.
        idle = [k for k, p in model.named_parameters() if not p.grad.abs().max() > 1e-6]
        assert all(k.endswith("bias") for k in idle)
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_any_mechanism_in_classification(mechanism):
    model = small("pct_cls", mechanism=mechanism, mechanism_args=SMALL.get(mechanism))
    points, label = cloud(4, 20, 3), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(points), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    mixers = model.mixers()
    assert len(mixers) == (0 if mechanism == "softmax" else 2)
    assert all(type(mixer) is layers.mechanism(mechanism) for mixer in mixers.values())
    unused = {f"{k}.{p}" for k, layer in mixers.items() for p in (*layer.unused, "w")}
    idle = {k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle <= unused
    assert model.no_weight_decay() == {f"{k}.{p}" for k, m in mixers.items() for p in m.no_weight_decay()}
    model.eval()
    torch.testing.assert_close(model(points)[1:2], model(points[1:2]), rtol=1e-4, atol=1e-5)


def test_a_mechanism_is_in_the_offset_form():
    model = small("pct_ea_cls", mechanism="sima", mechanism_args={"num_heads": 2}).eval()
    block, x = model.blocks[0], cloud(2, 9, 16)
    inside = block.trans.norm(
        (x - block.attn(x)).flatten(0, 1) @ block.trans.fc.weight.mT + block.trans.fc.bias
    )
    torch.testing.assert_close(block(x), x + inside.view(2, 9, 16).relu())
    assert block.attn.num_heads == 2
    with_drop = small("pct_ea_cls", proj_drop_rate=0.3)
    assert {mixer.proj_drop.p for mixer in with_drop.mixers().values()} == {0.3}
    assert all(isinstance(mixer.proj, nn.Identity) for mixer in with_drop.mixers().values())


@pytest.mark.parametrize("mechanism", ORDERLESS)
def test_parts_of_permuted_points_with_any_mechanism_that_needs_no_order(mechanism):
    model = small("pct_partseg", mechanism=mechanism, num_categories=0).double().eval()
    points = cloud(2, 13, 3, dtype=torch.float64)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    want = model(points)
    torch.testing.assert_close(model(points[:, order]), want[..., order], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model(points[1:]), want[1:], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(model(points[:, :-1]), want[..., :-1])  # the points do meet


@pytest.mark.parametrize("name", ["pct_cls", "pct_ea_cls"])
def test_classes_do_not_depend_on_the_order_behind_the_first_point(name):
    model = small(name).double().eval()
    points = cloud(2, 23, 3, dtype=torch.float64)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0)) + 1
    want = model(points)
    permuted = torch.cat([points[:, :1], points[:, order]], 1)
    torch.testing.assert_close(model(permuted), want, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(model(points.flip(1)), want, rtol=1e-6)  # another start
    torch.testing.assert_close(model(points[1:]), want[1:], rtol=1e-9, atol=1e-10)


def padded(points, mask, filler):
    """points (B, n, C) at the True places of mask (B, N), n in every row."""
    out = torch.full((*mask.shape, points.shape[-1]), filler, dtype=points.dtype)
    return out.masked_scatter(mask[..., None], points)


@pytest.mark.parametrize("words", [{}, {"mechanism": "sima"}, {"num_samples": ()}])
@every
def test_a_padded_point_changes_nothing(name, words):
    if "partseg" in name and words == {"num_samples": ()}:
        words = {"mechanism": "xnorm"}
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[0, [0, 1, 8, 17]], mask[1, [3, 4, 5, 11]] = False, False
    points = cloud(2, 14, 3, dtype=torch.float64)
    for training in (False, True):
        alone, among = small(name, **words).double(), small(name, **words).double()
        want = run(alone.train(training), points)
        filled = padded(points, mask, math.nan).requires_grad_()
        got = run(among.train(training), filled, mask=mask)
        if "partseg" in name:
            assert not got.mT[~mask].any()
            got = got.mT[mask].view(2, 14, 5).mT
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        got.square().sum().backward()
        want.square().sum().backward()
        assert not filled.grad[~mask].any()
        for (key, p), q in zip(among.named_parameters(), alone.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-8 * max(1, q.grad.abs().max()), key
        for p, q in zip(among.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(p, q)


@every
def test_clouds_of_unequal_numbers_of_points(name):
    model = small(name).double().eval()
    points = cloud(3, 16, 3, dtype=torch.float64)
    counts = torch.tensor([16, 5, 1])
    mask = torch.arange(16) < counts[:, None]
    got = run(model, points, mask=mask)
    for b, count in enumerate(counts):
        label = {"label": torch.tensor([b])} if "partseg" in name else {}
        want = model(points[b : b + 1, :count], **label)
        torch.testing.assert_close(got[b : b + 1, ..., : want.shape[-1]], want, rtol=1e-9, atol=1e-10)
    empty = run(model, torch.full_like(points, math.nan), mask=torch.zeros_like(mask))
    origin = run(model, torch.zeros_like(points[:, :1]))
    torch.testing.assert_close(empty, torch.zeros_like(empty) if "partseg" in name else origin)
    mask[1] = False
    run(model.train(), points, mask=mask).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_other_channels_do_not_choose_points():
    model, seen = small("pct_cls", in_chans=5).eval(), []
    model.stages[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    points = cloud(2, 20, 5)
    model(points)
    assert torch.equal(seen[0], points[..., :3])


@every
def test_dropout_in_the_head(name):
    model = small(name, drop_rate=1.0).train()
    out = run(model, cloud(3, 20, 3))
    if "partseg" in name:
        torch.testing.assert_close(out, out[:1, :, :1].expand_as(out))  # all points are dropped alike
        assert not torch.equal(out[0, :, 0], model.head.bias)  # only in front of the second layer
    else:
        assert torch.equal(out, model.head.bias.expand_as(out))


def test_few_points_are_repeated():
    """As many neighbours and samples as asked for, of the points that there are."""
    model = small("pct_cls").eval()
    for count in (1, 3, 8):
        points = cloud(2, count, 3)
        xyz, x = model.stages[0](points, cloud(2, count, 4, seed=5))
        assert x.shape == (2, 11, 8)
        assert torch.equal(xyz[:, count:], points[:, :1].expand(-1, 11 - count, -1))
        assert model(points).isfinite().all()
    one = cloud(2, 1, 3)
    torch.testing.assert_close(model(one.expand(-1, 6, -1)), model(one))


def test_gradients_flow_through_features_and_not_through_the_choice():
    model = small("pct_cls", in_chans=5).double().eval()
    points = cloud(2, 23, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: model(p)[:, :2], points, eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every
def test_half_precision(error, name, dtype):
    model = small(name).train()
    points = cloud(3, 40, 3)
    with torch.autocast("cpu", dtype=dtype):
        out = run(model, points)
        assert out.dtype == dtype
        out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.inference_mode():
        want = run(model, points)
        with torch.autocast("cpu", dtype=dtype):
            assert error(run(model, points).float(), want) < 0.1
        model.to(dtype)
        assert error(run(model, points.to(dtype)).float(), want) < 0.2


@pytest.mark.parametrize("name", ["pct_cls", "pct_ea_cls", "pct_ea_partseg"])
def test_ten_thousand_points(name):
    model = small(name).eval()
    with torch.inference_mode():
        out = run(model, cloud(1, 10_000, 3))
    assert out.isfinite().all()


def test_devices_and_dtypes():
    for name in NETWORKS:
        with torch.device("meta"):
            model = small(name, num_samples=(5, 3)) if "partseg" not in name else small(name)
            assert run(model, torch.empty(2, 9, 3)).shape[:2] == (2, 5)
        model = small(name, device="meta", dtype=torch.float64)
        assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
        model.reset_classifier(7)
        assert model.head.weight.is_meta


def test_refusals():
    points = cloud(2, 9, 3)
    model, parts = small("pct_cls"), small("pct_partseg")
    for run_it, message in (
        (lambda: model(points.mT), r"PCT: points must have shape \(B, N, 3\), got \(2, 3, 9\); .* points.mT"),
        (lambda: model(points[:, :0]), r"points must have shape \(B, N, 3\), got \(2, 0, 3\)"),
        (lambda: model(points, torch.ones(2, 8, dtype=torch.bool)), r"mask must have shape .* \(2, 9\)"),
        (lambda: parts(points), r"PCTPartSeg: label must be integers \(2,\) or one-hot \(2, 3\).*got None"),
        (lambda: parts(points, torch.zeros(2)), r"label must be .*got torch.float32 \(2,\)"),
        (lambda: parts(points, torch.zeros(2, 4)), r"label must be .*got torch.float32 \(2, 4\)"),
        (
            lambda: small("pct_partseg", num_categories=0)(points, torch.tensor([0, 1])),
            "label must be None with num_categories=0",
        ),
        (lambda: model.reset_classifier(3, "median"), "global_pool must be max, avg or empty, got 'median'"),
        (lambda: parts.reset_classifier(3, "max"), "global_pool must be None"),
        (lambda: small("pct_cls", features_only=True), "features_only must be False because points"),
        (lambda: small("pct_cls", in_chans=2), "in_chans must be at least 3"),
        (lambda: small("pct_cls", embed_dim=18), "embed_dim a multiple of 4, got"),
        (lambda: small("pct_cls", num_samples=(5, 0)), "num_samples at least 1"),
        (lambda: small("pct_cls", pretrained=True), "pretrained must be False because no weights"),
        (
            lambda: small("pct_cls", mechanism_args={"num_heads": 2}),
            "mechanism_args must be empty for 'softmax', offset attention here",
        ),
        (lambda: small("pct_cls", mechanism="simaa"), "did you mean 'sima'"),
        *(
            (
                lambda mechanism=mechanism: small("pct_partseg", mechanism=mechanism),
                f"points have no order and may be any number, got '{mechanism}'; use one of aft_simple, ",
            )
            for mechanism in set(layers.mechanisms()) - set(ORDERLESS)
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run_it()
    with pytest.raises(TypeError, match="points must be floating point"):
        model(points.long())
