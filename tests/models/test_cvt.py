"""CvT and SimA-CvT against the published structure, written out below; and timm's interface."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

import sansmax
from sansmax import layers, models
from sansmax.bench.measure import count_flops
from sansmax.models import load_published
from sansmax.models._cvt import CvT

NETWORKS = {"sima_cvt_13": (1, 2, 10), "sima_cvt_21": (1, 4, 16)}
# Summed from the published structure below; microsoft/cvt-13 and cvt-21 in transformers 5.23 have as many.
PARAMETERS = {"sima_cvt_13": 19_997_480, "sima_cvt_21": 31_622_696}
SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 5},
    "aft_local": {"factor_dim": 5, "window": 4},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}
# Our keys in the published ones; q, k and v are one layer here and three there.
THEIRS = (
    (r"^cls_token", "stage2.cls_token"),
    (r"^stages\.(\d)\.embed\.", r"stage\1.patch_embed."),
    (r"^stages\.(\d)\.", r"stage\1."),
    (r"\.conv_proj\.", ".conv_proj_"),
    (r"\.attn\.mixer\.", ".attn."),
)


def small(mechanism="sima", **words):
    """A network of the same wiring that builds and runs in a moment; no two sizes are equal."""
    own = {"embed_dims": (12, 20, 30), "depths": (1, 1, 2), "num_heads": (1, 2, 3), "num_classes": 5}
    torch.manual_seed(0)
    options = {"mechanism": mechanism, "mechanism_args": SMALL.get(mechanism), "img_size": (48, 64)}
    return timm.create_model("sima_cvt_13", **{**own, **options, **words})


def disturbed(model):
    """`model` in float64 with no number left at 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.double().state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.3)
    return model.eval()


def published_keys(state):
    theirs = {}
    for key, value in state.items():
        for ours, published in THEIRS:
            key = re.sub(ours, published, key)
        if ".qkv." in key:
            theirs |= {key.replace("qkv", f"proj_{p}"): t for p, t in zip("qkv", value.chunk(3), strict=True)}
        else:
            theirs[key] = value
    return theirs


def published_forward(state, x, heads, mechanism):
    """The logits of the published network in evaluation, from its own key names, one image size for all."""

    def get(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(name, tokens):
        return F.layer_norm(tokens, tokens.shape[-1:], *get(name), eps=1e-5)

    def project(name, part, image, front):
        at, stride = f"{name}.conv_proj_{part}", 1 if part == "q" else 2
        y = F.conv2d(image, state[f"{at}.conv.weight"], None, stride, padding=1, groups=image.shape[1])
        statistics = state[f"{at}.bn.running_mean"], state[f"{at}.bn.running_var"]
        y = F.batch_norm(y, *statistics, *get(f"{at}.bn"), eps=1e-5)
        return F.linear(torch.cat([front, y.flatten(2).mT], 1), *get(f"{name}.proj_{part}"))

    for i, h in enumerate(heads):
        kernel, stride, padding = ((7, 4, 2), (3, 2, 1), (3, 2, 1))[i]
        weight, bias = get(f"stage{i}.patch_embed.proj")
        assert weight.shape[-2:] == (kernel, kernel)
        x = F.conv2d(x, weight, bias, stride, padding)
        batch, width, rows, columns = x.shape
        x = norm(f"stage{i}.patch_embed.norm", x.flatten(2).mT)
        prefix = 0
        if f"stage{i}.cls_token" in state:
            prefix, token = 1, state[f"stage{i}.cls_token"]
            x = torch.cat([token.repeat(batch, 1, 1), x], 1)
        for j in range(len({key.split(".")[2] for key in state if key.startswith(f"stage{i}.blocks.")})):
            block = f"stage{i}.blocks.{j}"
            y = norm(f"{block}.norm1", x)
            image = y[:, prefix:].mT.reshape(batch, width, rows, columns)
            q, k, v = (
                project(f"{block}.attn", part, image, y[:, :prefix]).reshape(batch, -1, h, width // h)
                for part in "qkv"
            )
            if mechanism == "softmax":
                weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(width**-0.5).softmax(-1)
            else:
                q, k = q / q.abs().sum(1, keepdim=True), k / k.abs().sum(1, keepdim=True)
                weights = torch.einsum("bnhd,bmhd->bhnm", q, k)
            y = torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(batch, -1, width)
            x = x + F.linear(y, *get(f"{block}.attn.proj"))
            y = F.linear(norm(f"{block}.norm2", x), *get(f"{block}.mlp.fc1"))
            x = x + F.linear(y * torch.sigmoid(1.702 * y), *get(f"{block}.mlp.fc2"))
        if i < len(heads) - 1:
            x = x.mT.reshape(batch, width, rows, columns)
    return F.linear(norm("norm", x)[:, 0], *get("head"))


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters(name):
    total, channels = 0, 3
    for kernel, width, depth in zip((7, 3, 3), (64, 192, 384), NETWORKS[name], strict=True):
        embedding = kernel * kernel * channels * width + width + 2 * width
        projections = 3 * (9 * width + 2 * width) + 4 * (width * width + width)
        block = projections + 2 * 2 * width + 8 * width * width + 5 * width
        total, channels = total + embedding + depth * block, width
    total += 384 + 2 * 384 + 1001 * 384 + (1000 - 384)  # class token, norm, head
    assert total == PARAMETERS[name]
    with torch.device("meta"):
        networks = [timm.create_model(name), sansmax.create_model(name, "softmax")]
    for model in networks:
        assert all(p.is_meta for p in model.parameters())
        assert sum(p.numel() for p in model.parameters()) == total
        assert [len(stage.blocks) for stage in model.stages] == list(NETWORKS[name])
    assert name in models.networks()


@pytest.mark.parametrize(("name", "printed"), [("sima_cvt_13", 4.5), ("sima_cvt_21", 7.1)])
def test_multiply_adds(name, printed):
    """Of CvT as its authors print them, at 224 px; and SimA's are fewer by what the mixing saves."""
    with torch.device("meta"):
        x = torch.empty(1, 3, 224, 224)
        softmax, sima = (count_flops(sansmax.create_model(name, m), x) // 2 for m in ("softmax", "sima"))
    assert softmax / 1e9 == pytest.approx(printed, rel=0.02)
    sizes = zip(NETWORKS[name], (64, 192, 384), (3136, 784, 197), (784, 196, 50), strict=True)
    assert softmax - sima == sum(depth * width * (2 * n * m - 64 * (n + m)) for depth, width, n, m in sizes)


@pytest.mark.parametrize("mechanism", ["sima", "softmax"])
@pytest.mark.parametrize("size", [(48, 64), (37, 70), (99, 3)])
def test_the_published_structure(mechanism, size, error):
    model = disturbed(small(mechanism))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    want = published_forward(published_keys(model.state_dict()), x, (1, 2, 3), mechanism)
    with torch.inference_mode():
        assert error(model(x), want) < 1e-12
        assert error(model.float()(x.float()), want) < 5e-5


def test_checkpoints_of_the_authors(tmp_path):
    source = disturbed(small("softmax"))
    state = published_keys(source.state_dict())
    assert {"stage0.patch_embed.proj.weight", "stage2.cls_token", "stage1.blocks.0.attn.proj_q.bias"} <= set(
        state
    )
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "cvt.pth")
    x = torch.randn(1, 3, 48, 64, dtype=torch.float64)
    for checkpoint in (tmp_path / "cvt.pth", source.state_dict()):
        for mechanism in ("softmax", "sima", "xnorm"):
            options = {"mechanism_args": {"gamma": False}} if mechanism == "xnorm" else {}
            twin = load_published(small(mechanism, **options).double().eval(), checkpoint)
            assert torch.equal(twin(x), source(x)) == (mechanism == "softmax")
    del state["stage2.blocks.1.attn.proj_k.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(stages\.2\.blocks\.1\.attn\.mixer\.qkv\.weight\)"):
        load_published(twin, state)
    with pytest.raises(ValueError, match="missing"):
        load_published(small("aft_simple"), source.state_dict())


@pytest.mark.parametrize("mechanism", ["sima", "softmax", "soft"])
def test_timms_interface(mechanism):
    model = small(mechanism, drop_path_rate=0.1).eval()
    x = torch.randn(3, 3, 48, 64)
    want = model(x)
    assert want.shape == (3, 5)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), want)
    torch.testing.assert_close(model(x[:1]), want[:1], rtol=1e-4, atol=1e-5)
    shapes = [(3, 12, 12, 16), (3, 20, 6, 8), (3, 30, 3, 4)]
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == shapes
    torch.testing.assert_close(final, model.forward_features(x))
    assert final.shape == (3, 13, 30)
    tokens = model.forward_intermediates(x, [0, 2], output_fmt="NLC", intermediates_only=True, norm=True)
    assert [tuple(t.shape) for t in tokens] == [(3, 192, 12), (3, 12, 30)]
    torch.testing.assert_close(tokens[1], final[:, 1:])
    features = small(mechanism, features_only=True, out_indices=(0, 1, 2)).eval()
    assert [tuple(m.shape) for m in features(x)] == shapes
    assert features.feature_info.reduction() == [4, 8, 16]
    assert features.feature_info.channels() == [12, 20, 30]
    torch.testing.assert_close(features(x)[2], maps[2])
    first = small(mechanism, features_only=True, out_indices=(0,)).eval()
    assert len(first.model.stages) == 1
    torch.testing.assert_close(first(x)[0], maps[0])

    assert model.no_weight_decay() == {"cls_token"}
    assert set(model.group_matcher()) == {"stem", "blocks"}
    assert list(model.mixers()) == [
        f"stages.{i}.blocks.{j}.attn.mixer" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1))
    ]
    assert model.get_classifier() is model.head
    assert model.pretrained_cfg["first_conv"] == "stages.0.embed.proj"
    model.reset_classifier(7, "avg")
    pooled = model(x)
    torch.testing.assert_close(pooled, model.head(model.forward_features(x)[:, 1:].mean(1)))
    model.prune_intermediate_layers([1])
    assert len(model.stages) == 2
    assert small(mechanism, in_chans=1).eval()(torch.randn(1, 1, 48, 64)).shape == (1, 5)
    headless = small(mechanism, num_classes=0).eval()
    assert torch.equal(headless(x), headless.forward_features(x)[:, 0])


def test_layers_decay_along_the_depth():
    model = small("aft_full")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    first, last = (model.stages[i].blocks[-1].mlp.fc1.weight for i in (0, 2))
    assert scale[id(model.stages[0].embed.proj.weight)] < scale[id(first)] < scale[id(last)]
    assert scale[id(model.head.weight)] == 1
    tables = {key for key, _ in model.named_parameters() if "bias_u" in key or "bias_v" in key}
    assert len(tables) == 8
    assert model.no_weight_decay() == tables | {"cls_token"}


# What a mechanism cannot train: the queries of the last block's patch tokens, which nobody reads behind the
# class token; a shift of all keys, which cancels in softmax, and of all queries of a learned memory, where
# no class token passes by the shift.
LAST = "stages.2.blocks.1.attn"
SHIFTS = [f"stages.{i}.blocks.0.attn.conv_proj" for i in (0, 1)]
READ_BY_PATCHES = {f"{LAST}.conv_proj.q.{p}" for p in ("conv.weight", "bn.weight", "bn.bias")}
IDLE = {
    "softmax": READ_BY_PATCHES | {f"{at}.k.bn.bias" for at in SHIFTS},
    "xnorm": READ_BY_PATCHES,
    "external": {f"{at}.x.bn.bias" for at in SHIFTS},
    "external_multihead": {f"{at}.x.bn.bias" for at in SHIFTS},
    "soft": {f"{LAST}.mixer.conv.weight"},
    "soft_norm": {f"{LAST}.mixer.conv.weight"},
    "aft_conv": {f"{LAST}.mixer.{p}" for p in ("w", "gamma", "beta")},
}


@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_any_mechanism_trains(mechanism):
    model = disturbed(small(mechanism)).train()
    x, y = torch.randn(4, 3, 48, 64, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    assert F.cross_entropy(model(x), y) < loss
    sizes = {k: 0.0 if p.grad is None else p.grad.abs().max().item() for k, p in model.named_parameters()}
    assert all(torch.isfinite(torch.tensor(size)) for size in sizes.values())
    idle = {key for key, size in sizes.items() if size < 1e-13 * max(sizes.values())}
    unused = {f"{k}.{p}" for k, layer in model.mixers().items() for p in layer.unused}
    assert idle == IDLE.get(mechanism, set()) | (unused & set(sizes))
    convolutions = model.stages[0].blocks[0].attn.conv_proj
    strides = {key: f.conv.stride[0] for key, f in convolutions.items()}
    assert strides == ({"q": 1, "k": 2, "v": 2} if mechanism in ("sima", "softmax", "xnorm") else {"x": 1})
    model.eval()
    for size in ((50, 33), (3, 9)):
        assert torch.isfinite(model(torch.randn(1, 3, *size, dtype=torch.float64))).all()


@pytest.mark.parametrize("mechanism", ["soft", "aft_conv", "external"])
def test_one_convolution_in_front_of_the_others(mechanism):
    model = disturbed(small(mechanism))
    attention = model.stages[2].blocks[0].attn
    x = torch.randn(2, 1 + 5 * 7, 30, dtype=torch.float64)
    image = x[:, 1:].mT.unflatten(-1, (5, 7))
    tokens = torch.cat([x[:, :1], attention.conv_proj["x"](image).flatten(2).mT], 1)
    torch.testing.assert_close(attention(x, grid=(5, 7)), attention.mixer(tokens, grid=(5, 7)))
    assert attention.conv_proj["x"].conv.groups == 30


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        ("sima", {"qkv_bias": False, "token_scale": 9}),
        ("sima", {"qk_norm": True, "scale_norm": True, "norm_layer": torch.nn.LayerNorm}),
        ("xnorm", {"attn_dim": 18}),
        ("softmax", {"num_heads": 1, "proj_bias": False}),
    ],
)
def test_options_of_the_layers(mechanism, options):
    """Behind convolutions that change nothing stands the layer itself (softmax: with one head, whose scale is
    that of the whole width)."""
    attention = disturbed(small(mechanism, mechanism_args=options)).stages[2].blocks[0].attn
    for f in attention.conv_proj.values():
        torch.nn.init.dirac_(f.conv.weight, groups=30)
        f.conv.stride = (1, 1)
        f.bn = torch.nn.Identity()
    x = torch.randn(2, 1 + 5 * 7, 30, dtype=torch.float64)
    torch.testing.assert_close(attention(x, grid=(5, 7)), attention.mixer(x))


def test_grad_checkpointing_changes_nothing():
    plain = small().train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 48, 64)
    for model in (plain, saving):
        model(x).square().sum().backward()
    for (key, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=key)
    for (key, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    assert plain.stages[0].blocks[0].attn.conv_proj["q"].bn.momentum == 0.1
    assert torch.equal(saving.eval()(x), plain.eval()(x))


def test_any_size():
    model = small().eval()
    for size in ((3, 3), (4, 35), (33, 70), (224, 30)):
        x = torch.randn(2, 3, *size)
        assert torch.isfinite(model(x)).all()
        grids = [((size[0] + 1) // 4, (size[1] + 1) // 4)]
        for _ in range(2):
            grids.append(tuple(-(-side // 2) for side in grids[-1]))
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == grids
    with pytest.raises(ValueError, match="at least 3 x 3 pixels, got 2 x 9; enlarge it"):
        model(torch.randn(1, 3, 2, 9))
    with pytest.raises(ValueError, match="got 2 x 2"):
        small(img_size=2)


def test_dropouts():
    x = torch.randn(2, 3, 48, 64)
    model = small("softmax", attn_drop_rate=0.5).train()
    assert not torch.equal(model(x), model(x))
    # A single token has a single key, whose weight of 1 is dropped or doubled.
    attention = small("softmax", attn_drop_rate=0.5).stages[0].blocks[0].attn.eval()
    tokens, bias = torch.randn(1, 1, 12), attention.mixer.proj.bias
    want = attention(tokens, (1, 1)) - bias
    attention.mixer.train()
    found = [(attention(tokens, (1, 1)) - bias) / want for _ in range(20)]
    assert {round(ratio.mean().item(), 3) for ratio in found} == {0, 2}
    with pytest.raises(ValueError, match="SimA: attn_drop must be 0"):
        small(attn_drop_rate=0.1)

    model = small(depths=(2, 2, 3), drop_path_rate=0.1, proj_drop_rate=0.2, drop_rate=0.3)
    rates = [[getattr(b.drop_path, "drop_prob", 0.0) for b in stage.blocks] for stage in model.stages]
    assert rates[:2] == [[0, 0]] * 2
    assert rates[2] == pytest.approx([0, 0.05, 0.1])
    block = model.stages[1].blocks[0]
    assert (block.attn.mixer.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.2, 0.2, 0.2)
    assert model.head_drop.p == 0.3


def test_start():
    """Truncated normal of deviation 0.02 in linear layers and the class token, as published."""
    torch.manual_seed(0)
    model = CvT(mechanism="aft_full", embed_dims=(64, 256), depths=(1, 1), num_heads=1, mlp_ratio=3)
    block = model.stages[1].blocks[0]
    for weight in (model.cls_token, block.mlp.fc1.weight, block.attn.mixer.qkv.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert block.mlp.fc1.weight.shape == (768, 256)
    assert not any(layer.bias.any() for layer in (block.mlp.fc1, block.attn.mixer.qkv, model.head))
    # The table of another length that it was drawn for would be smoother.
    assert block.attn.mixer.bias_u.shape == (785, 128)
    assert block.attn.mixer.bias_u.std().item() == pytest.approx(0.01, rel=0.02)


def test_heads():
    """The paper's single-head form is a word; a number holds for all stages."""
    model = small(num_heads=1)
    assert [mixer.num_heads for mixer in model.mixers().values()] == [1] * 4
    assert model.eval()(torch.randn(1, 3, 48, 64)).shape == (1, 5)
    one = CvT(embed_dims=(8, 12), depths=(1, 1), num_heads=(2, 3), num_classes=4, dtype=torch.float64)
    assert one(torch.randn(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 4)
    with pytest.raises(ValueError, match="num_heads must divide the width 12"):
        small(num_heads=5)
