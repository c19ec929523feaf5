"""EANet: the authors' outputs, exact sizes, timm's interface on a dense network, checkpoints."""

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from torch import nn

import sansmax
from sansmax import layers
from sansmax.bench.measure import count_flops
from sansmax.models import load_published
from sansmax.models._eanet import DilatedResNet, EANet
from sansmax.ops.external import external_map

# With 21 classes; the published code's own count.
PARAMETERS = {"eanet_resnet50": 34_846_933, "eanet_resnet101": 53_839_061}
SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 5},
    "aft_local": {"factor_dim": 5, "window": 4},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}
TINY = {
    "depths": (1, 1, 1, 1),
    "stem_width": 8,
    "channels": (8, 12, 16, 20),
    "embed_dim": 32,
    "head_hidden_size": 24,
    "num_classes": 5,
    "img_size": (64, 48),
}
# Our keys in the published ones.
THEIRS = (
    (r"^backbone\.conv1\.", "extractor.0."),
    (r"^backbone\.bn1\.", "extractor.1."),
    (r"^backbone\.layer1\.", "extractor.4."),
    (r"^backbone\.layer2\.", "extractor.5."),
    (r"^backbone\.layer3\.", "extractor.6."),
    (r"^backbone\.layer4\.", "extractor.7."),
    (r"^neck\.0\.", "fc0.conv."),
    (r"^neck\.1\.", "fc0.bn."),
    (r"^neck\.3\.attn\.query\.", "linu.conv1."),
    (r"^neck\.3\.attn\.memory_k$", "linu.linear_0.weight"),
    (r"^neck\.3\.attn\.memory_v$", "linu.linear_1.weight"),
    (r"^neck\.3\.attn\.proj\.", "linu.conv2.0."),
    (r"^neck\.3\.bn\.", "linu.conv2.1."),
    (r"^head\.0\.", "fc1.0.conv."),
    (r"^head\.1\.", "fc1.0.bn."),
    (r"^fc\.", "fc2."),
)


def small(name="eanet_resnet50", **words):
    """A network of the same wiring that builds and runs in a moment."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **words})


def published(model):
    """The network's weights as the authors' code would have saved them."""
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in THEIRS:
            key = re.sub(ours, theirs, key)
        if key in ("linu.conv1.weight", "linu.conv2.0.weight"):
            value = value[..., None, None]
        elif key.startswith("linu.linear"):
            value = (value.mT if "linear_1" in key else value)[..., None]
        state[key] = value.clone()
    return state


@pytest.fixture(scope="module")
def drawn():
    """A small network whose norms, memories and biases all differ from what a new one holds."""
    model = small()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.mul_(torch.rand_like(value) + 0.5)
                value.add_(0.1 * torch.randn_like(value) if value.ndim == 1 else 0)
            else:
                value.fill_(7)
    return model.eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_size(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert all(t.is_meta for t in model.state_dict().values())
    with torch.device("meta"):
        assert all(t.is_meta for t in timm.create_model(name).state_dict().values())
    assert model.pretrained_cfg["num_classes"] == model.num_classes == 21
    assert model.pretrained_cfg["input_size"] == (3, 513, 513)
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 3
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()


def test_published_cost():
    with torch.device("meta"):
        model = timm.create_model("eanet_resnet101")
        multiply_adds = count_flops(model, torch.empty(1, 3, 513, 513)) / 2
    assert multiply_adds == pytest.approx(237e9, rel=0.005)


@pytest.mark.parametrize(
    ("layers", "depths"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3))]
)
def test_the_backbone_is_the_deep_stem_resnet(layers, depths):
    """timm's resnet50s and so on, so that their ImageNet weights load."""
    ours = EANet(depths=depths, device="meta").backbone.state_dict()
    theirs = timm.create_model(f"resnet{layers}s", num_classes=0, device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("output_stride", "layer3", "layer4"),
    [
        (8, [(1, 1), (1, 2), (1, 2)], [(1, 2), (1, 8), (1, 16)]),
        (16, [(2, 1), (1, 1)], [(1, 1), (1, 4), (1, 8)]),
    ],
)
def test_published_strides_and_dilations(output_stride, layer3, layer4):
    net = DilatedResNet((1, 1, len(layer3), 3), output_stride=output_stride, device="meta")
    for layer, expected in ((net.layer3, layer3), (net.layer4, layer4)):
        convs = [block.conv2 for block in layer]
        assert [(c.stride[0], c.dilation[0]) for c in convs] == expected
        assert all(c.padding == c.dilation == c.dilation[::-1] for c in convs)
        assert layer[0].downsample[0].stride == convs[0].stride
    assert [block.conv2.dilation[0] for block in net.layer1] == [1]


@pytest.mark.parametrize("case", ["eanet_r101_s8_65", "eanet_r50_s16_65"])
def test_golden(golden, error, case):
    case = golden(f"external_attention/{case}")
    state, x, config = case.state_dict(), case.inputs()["x"], case.config
    model = timm.create_model(
        f"eanet_resnet{config['n_layers']}",
        num_classes=config["n_classes"],
        output_stride=config["stride"],
        device="meta",
    )
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    count = sum(value.numel() for key, value in state.items() if not key.endswith(buffers))
    assert sum(p.numel() for p in model.parameters()) == count
    model.to_empty(device="cpu").eval()
    seen = {}
    attn = model.neck[3].attn
    attn.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    model.fc.register_forward_hook(lambda *call: seen.update(fc2=call[2]))
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-9)):
        load_published(model.to(dtype), {"net": state, "step": 45_000})
        with torch.inference_mode():
            seen["out_s4"] = model(x.to(dtype))[:, :, ::4, ::4]
            seen["attn"] = external_map(attn.query(seen["tokens"]), attn.memory_k).mT
        for key, want in case.outputs.items():
            assert error(seen[key], want) < tolerance, (key, dtype)


def test_timms_interface():
    model = small(drop_path_rate=0.1).eval()
    x = torch.randn(2, 3, 64, 96)
    want = model(x)
    assert want.shape == (2, 5, 64, 96)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 8, 12)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size, 8, 12)
    logits = model.forward_head(features)
    # align_corners: the corners of the map are those of the image.
    torch.testing.assert_close(want[..., ::63, ::95], logits[..., ::7, ::11])
    size = (17, 9)
    resized = F.interpolate(logits, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(model(x, size=size), resized)
    torch.testing.assert_close(model(x[:1]), want[:1], rtol=1e-4, atol=1e-5)

    channels, strides = [16, 32, 48, 64, 80, 32], [2, 4, 8, 8, 8, 8]
    shapes = [(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)]
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == shapes
    assert final is maps[-1]
    torch.testing.assert_close(final, features)
    last, (stem, second) = model.forward_intermediates(x, [2, 0], stop_early=True)
    assert torch.equal(last, maps[2])
    assert torch.equal(stem, maps[0])
    assert torch.equal(second, maps[2])
    (final,) = model.forward_intermediates(x, 1, intermediates_only=True)
    assert torch.equal(final, maps[-1])
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    for info, y in zip(model.feature_info, maps, strict=True):
        hooked = {}
        handle = model.get_submodule(info["module"]).register_forward_hook(
            lambda *call, hooked=hooked: hooked.update(y=call[2])
        )
        model(x)
        handle.remove()
        torch.testing.assert_close(hooked["y"], y)
    for indices in ((0,), (1, 4), (3, 5)):
        pyramid = small(features_only=True, out_indices=indices).eval()
        load_into = pyramid.model.load_state_dict(model.state_dict(), strict=False)
        assert not load_into.missing_keys
        assert pyramid.feature_info.channels() == [channels[i] for i in indices]
        assert pyramid.feature_info.reduction() == [strides[i] for i in indices]
        for got, i in zip(pyramid(x), indices, strict=True):
            torch.testing.assert_close(got, maps[i])
        assert any(isinstance(m, layers.Mixer) for m in pyramid.modules()) == (5 in indices)

    groups = group_parameters(model, model.group_matcher())
    assert groups[0] == ["backbone.conv1.0.weight", *(k for k in groups[0] if "conv1.0.w" not in k)]
    assert all(key.startswith("backbone") for i in range(len(groups) - 1) for key in groups[i])
    assert not any(key.startswith("backbone") for key in groups[len(groups) - 1])
    assert len(groups) == 1 + 4 + 1 == len(group_parameters(model, model.group_matcher(coarse=True)))
    assert model.no_weight_decay() == set()
    assert small(mechanism="aft_full").no_weight_decay() == {"neck.3.attn.bias_u", "neck.3.attn.bias_v"}

    assert model.get_classifier() is model.fc
    model.reset_classifier(7)
    assert model(x).shape == (2, 7, 64, 96)
    with pytest.raises(ValueError, match="global_pool must be None because every pixel gets a class"):
        model.reset_classifier(7, "avg")
    model.prune_intermediate_layers([1])
    assert model.num_features == model.head_hidden_size == 32
    assert model(x).shape == (2, 32, 64, 96)
    assert small(num_classes=0).eval()(x).shape == (2, 24, 64, 96)


def test_training_returns_logits_and_reaches_every_parameter():
    model = small(drop_rate=0.0, num_classes=3).train()
    x, labels = torch.randn(4, 3, 33, 41), torch.randint(3, (4, 33, 41))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = model.neck[3].bn.running_mean.clone()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    # The query's bias cancels in the softmax over the tokens.
    assert {k for k, g in gradients.items() if not g.abs().max() > 1e-9} <= {"neck.3.attn.query.bias"}
    assert not torch.equal(before, model.neck[3].bn.running_mean)
    optimizer.step()
    assert F.cross_entropy(model(x), labels) < loss

    model = small(drop_rate=0.0, num_classes=3).train()
    model.set_grad_checkpointing()
    F.cross_entropy(model(x), labels).backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key], msg=key)
    # The second forward pass of a block is counted too.
    assert model.backbone.layer4[0].bn1.num_batches_tracked == 2
    assert model.neck[1].num_batches_tracked == 1


@pytest.mark.parametrize("output_stride", [8, 16])
def test_any_image_size(output_stride, drawn, error):
    model = load_published(small(output_stride=output_stride), drawn.state_dict()).eval()
    for height, width in ((65, 65), (50, 33), (7, 96), (1, 1)):
        x = torch.randn(2, 3, height, width)
        grid = (-(-height // output_stride), -(-width // output_stride))
        assert model.forward_features(x).shape[2:] == grid
        out = model(x)
        assert out.shape == (2, 5, height, width)
        assert error(model(x[1:]), out[1:]) < 1e-5


def test_input_channels_and_dtype():
    model = small(in_chans=1, dtype=torch.float64).eval()
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64, torch.int64}
    model.reset_classifier(2)
    assert model(torch.randn(1, 1, 33, 20, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_any_mechanism(mechanism):
    torch.manual_seed(0)
    model = sansmax.create_model(
        "eanet_resnet50",
        mechanism,
        mechanism_args=SMALL.get(mechanism),
        **TINY,
    )
    (mixer,) = model.mixers().values()
    assert type(mixer) is layers.mechanism(mechanism)
    assert mixer.grid == ((8, 6) if mixer.traits.needs else None)
    model(torch.randn(2, 3, 64, 48)).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # Raw kernels of AFT-conv get no gradient while their spread, gamma, is 0.
    unused = {f"neck.3.attn.{p}" for p in (*mixer.unused, "w")}
    assert {k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()} <= unused
    assert model.eval()(torch.randn(1, 3, 50, 70)).shape == (1, 5, 50, 70)


def test_external_attention_is_the_layer_with_the_published_module_around_it(drawn):
    """bn(proj) + input, ReLU: what ExternalAttention(block=True) computes on tokens."""
    layer = layers.ExternalAttention(32, block=True, qkv_bias=True, proj_bias=False).eval()
    block = drawn.neck[3]
    state = {f"bn.{k}": v for k, v in block.bn.state_dict().items()}
    layer.load_state_dict(block.attn.state_dict() | state)
    x = torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(block(x), layer(x.flatten(2).mT).mT.unflatten(-1, (5, 7)))


def test_published_initialisation():
    model = small(embed_dim=512, stem_width=64, channels=(64, 128, 256, 512))
    attn = model.neck[3].attn
    convs = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    for conv in (*convs, attn.query, attn.proj):
        std = math.sqrt(2 / (conv.weight.shape[0] * conv.weight[0, 0].numel()))
        assert conv.weight.std().item() == pytest.approx(std, rel=0.05)
    assert attn.memory_k.std().item() == pytest.approx(0.0625, rel=0.05)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 + 3 * 4 + 4 + 3
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    # Tables are drawn in the size of the grid.
    attn = small(mechanism="aft_full", img_size=257).neck[3].attn
    assert attn.bias_u.shape == (33 * 33, 128)
    assert attn.bias_u.std().item() == pytest.approx(0.01, rel=0.05)


def test_the_memories_are_two_parameters(drawn):
    """The published constructor gives both memories one storage, so that on the CPU load_state_dict turns
    linear_0 into linear_1 transposed, without a word, and an optimiser steps both twice."""
    model = small()
    attn = model.neck[3].attn
    assert torch.equal(attn.memory_k, attn.memory_v)  # they start equal, as published
    state = published(drawn)
    first, second = state["linu.linear_0.weight"], state["linu.linear_1.weight"]
    assert not torch.equal(first, second.transpose(0, 1))
    load_published(model, state)
    assert torch.equal(attn.memory_k, first[..., 0])
    assert torch.equal(attn.memory_v, second[..., 0].mT)
    with torch.no_grad():
        attn.memory_v.add_(1)
    assert torch.equal(attn.memory_k, first[..., 0])


def test_checkpoints_of_the_authors(drawn, tmp_path):
    x = torch.randn(1, 3, 33, 47)
    want = drawn(x)
    state = published(drawn)
    assert len(state) == len(drawn.state_dict())
    path = tmp_path / "final.pth"
    torch.save({"net": {f"module.{k}": v for k, v in state.items()}, "step": 3}, path)
    twin = load_published(small().eval(), path)
    assert torch.equal(twin(x), want)
    assert twin.neck[1].num_batches_tracked == 7
    # Written before batch norms counted.
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    twin = load_published(small().eval(), old)
    assert torch.equal(twin(x), want)
    assert twin.neck[1].num_batches_tracked == 0
    assert torch.equal(load_published(small().eval(), drawn.state_dict())(x), want)

    with pytest.raises(
        ValueError, match=r"2 of another shape \(fc.weight \(5, 24, 1, 1\) for \(3, 24, 1, 1\)"
    ):
        load_published(small(num_classes=3), state)
    with pytest.raises(ValueError, match=r"missing \(neck.3.attn.qkv.weight"):
        load_published(small(mechanism="sima"), state)
    del state["fc0.bn.running_var"], state["extractor.0.1.weight"]
    with pytest.raises(ValueError, match=r"2 missing \(backbone.conv1.1.weight, neck.1.running_var\)"):
        load_published(small(), state)


def test_checkpoints_of_a_backbone_alone(drawn, tmp_path):
    def same(net):
        want = drawn.backbone.state_dict()
        return all(torch.equal(value, want[key]) for key, value in net.backbone.state_dict().items())

    own = {k: v for k, v in drawn.backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    imagenet = own | {"fc.weight": torch.zeros(1000, 80), "fc.bias": torch.zeros(1000)}
    path = tmp_path / "resnet50-ebb6acbb.pth"
    torch.save(imagenet, path, _use_new_zipfile_serialization=False)
    model = small()
    for key, value in model.backbone.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(7)
    head = model.neck[0].weight.clone()
    load_published(model.backbone, path)
    assert same(model)
    assert torch.equal(model.neck[0].weight, head)

    emanet = {k: v for k, v in published(drawn).items() if not k.startswith("linu")}
    emanet |= {"emau.mu": torch.zeros(1, 512, 64), "emau.conv1.weight": torch.zeros(512, 512, 1, 1)}
    with pytest.raises(
        ValueError, match=r"got EMANet's expectation-maximisation unit .*model.backbone, checkpoint"
    ):
        load_published(small(), emanet)
    model = small()
    load_published(model.backbone, {"net": emanet})
    assert same(model)

    torchvision = timm.create_model("resnet50", num_classes=0, device="meta").state_dict()
    with pytest.raises(ValueError, match=r"1 unexpected \(conv1.weight\)|unexpected \(conv1.weight, layer"):
        load_published(model.backbone, torchvision)
    del own["layer4.0.bn3.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(layer4.0.bn3.weight\)"):
        load_published(model.backbone, own)


def test_synchronised_batch_norm_is_torchs(drawn):
    x = torch.randn(2, 3, 33, 41)
    want = drawn(x)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(load_published(small(), drawn.state_dict())).eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 22
    torch.testing.assert_close(model(x), want)
    assert torch.equal(load_published(small().eval(), model.state_dict())(x), want)


def test_refusals():
    with pytest.raises(ValueError, match="output_stride must be 8 or 16, got 32; 8 is published"):
        EANet(output_stride=32)
    with pytest.raises(ValueError, match="pretrained must be False"):
        timm.create_model("eanet_resnet50", pretrained=True)
