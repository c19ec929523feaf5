"""The published networks by name: exact parameter counts, the authors' outputs, timm's interface."""

import argparse
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

import sansmax
from sansmax import cli, layers, models
from sansmax.bench.measure import count_flops
from sansmax.bench.networks import row
from sansmax.models import load_published

# Exact, from the published code.
PARAMETERS = {
    "sima_nano_12_p16": 3_053_176,
    "sima_tiny_12_p16": 6_716_224,
    "sima_small_12_p16": 26_253_208,
    "sima_tiny_24_p16": 12_116_800,
    "sima_small_24_p16": 47_671_192,
    "sima_medium_24_p16": 84_395_560,
    "sima_large_24_p16": 189_095_752,
    "sima_nano_12_p8": 3_048_968,
    "sima_tiny_12_p8": 6_706_456,
    "sima_small_12_p8": 26_212_936,
    "sima_tiny_24_p8": 12_107_032,
    "sima_small_24_p8": 47_630_920,
    "sima_medium_24_p8": 84_323_432,
    "sima_large_24_p8": 188_932_264,
    "aft_full_tiny_p16": 6_322_600,
    "aft_full_small_p16": 22_655_848,
    "aft_conv_tiny_p16_k11_h32": 5_356_072,
    "aft_conv_tiny_p16_k11_h192": 5_962_792,
    "aft_conv_small_p16_k11_h16": 20_298_088,
    "aft_conv_small_p16_k11_h384": 22_541_416,
    "aft_conv_small_p16_k15_h384": 23_020_648,
}
# Millions, counted on the published code.
SOFT = {"tiny": 13.07, "small": 38.86, "small_24m": 24.11, "medium": 45.81, "large": 64.70, "huge": 87.11}
# Millions of parameters and 10^9 multiply-adds at 224 px, as printed.
XVIT = {
    "u": (5.72, 1.01),
    "tiny": (10.24, 1.89),
    "small": (20.81, 3.71),
    "medium": (37.53, 6.97),
    "base": (64.05, 11.93),
}
NETWORKS = [
    name for module in ("sima", "xvit", "aft", "external") for name in timm.list_models(module=module)
]
SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 5},
    "aft_local": {"factor_dim": 5, "window": 4},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("size", XVIT)
def test_xvit_has_the_printed_size(size):
    parameters, multiply_adds = XVIT[size]
    for family in ("xvit", "vibid"):
        model = timm.create_model(f"{family}_{size}_p16")
        gammas = sum(p.numel() for k, p in model.named_parameters() if k.endswith("attn.gamma"))
        assert (gammas > 0) == (family == "xvit")
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    assert count_flops(model, torch.randn(1, 3, 224, 224)) / 2e9 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize("size", SOFT)
@pytest.mark.parametrize("mechanism", ["soft", "soft_norm"])
def test_soft_has_the_published_size(mechanism, size):
    with torch.device("meta"):
        model = timm.create_model(f"{mechanism}_{size}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == SOFT[size]


@pytest.mark.parametrize(
    ("case", "name", "words"),
    [
        ("soft_tiny_224", "soft_tiny", {}),
        ("soft_tiny_160x192", "soft_tiny", {}),
        ("soft_tiny_2021_224", "soft_tiny", {"inverse": "release2021"}),
        ("soft_norm_tiny_224", "soft_norm_tiny", {}),
    ],
)
def test_soft_golden(golden, error, case, name, words):
    case = golden(f"soft/{case}")
    parity = {"mechanism_args": {"batchwise": True}} if words or "norm" in name else {}
    model = timm.create_model(name, **words, **parity).eval()
    state, x = case.state_dict(), case.inputs()["x"]
    outputs = {k: v for k, v in case.outputs.items() if k.endswith("mean") or k in ("logits", "features")}
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-9)):
        load_published(model.to(dtype), {"state_dict_ema": state, "state_dict": {}})
        with torch.inference_mode():
            tokens, maps = model.forward_intermediates(x.to(dtype), output_fmt="NLC")
            got = {"features": tokens[:, 0], "logits": model(x.to(dtype))}
            # The mean over the last stage's tokens counts the class token.
            got |= {f"stage{i + 1}_mean": y.mean(1) for i, y in enumerate(maps[:3])}
        for key in got:
            assert error(got[key], outputs[key]) < tolerance, key


def small_soft(name, **words):
    own = {"embed_dims": (32, 32, 64, 64), "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)}
    torch.manual_seed(0)
    return timm.create_model(name, **{**own, "num_classes": 5, "img_size": (64, 96), **words})


@pytest.mark.parametrize("name", [name for name in models.networks() if name.startswith("soft")])
def test_timms_interface_of_the_pyramid(name):
    model = small_soft(name, drop_path_rate=0.1).eval()
    x = torch.randn(2, 3, 64, 96)
    want = model(x)
    assert want.shape == (2, 5)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), want)
    torch.testing.assert_close(model(x[:1]), want[:1], rtol=1e-3, atol=1e-4)
    shapes = [(2, 32, 16, 24), (2, 32, 8, 12), (2, 64, 4, 6), (2, 64, 2, 3)]
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == shapes
    assert final.shape == (2, 7, 64)
    tokens = model.forward_intermediates(x, [1, 3], output_fmt="NLC", intermediates_only=True, norm=True)
    assert [tuple(t.shape) for t in tokens] == [(2, 96, 32), (2, 6, 64)]
    features = small_soft(name, features_only=True, out_indices=(0, 1, 2, 3)).eval()
    assert [tuple(m.shape) for m in features(x)] == shapes
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), want)
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.no_weight_decay() == {"cls_token"}
    assert set(model.group_matcher()) == {"stem", "blocks"}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) > 3
    model.eval()
    (early,) = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, model.forward_intermediates(x, [0], stop_early=True)[1][0])
    for size in ((64, 96), (33, 70), (224, 32)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    model.prune_intermediate_layers([1])
    assert len(model.stages) == 2
    assert small_soft(name, in_chans=1)(torch.randn(1, 1, 64, 96)).shape == (1, 5)
    assert small_soft(name, num_classes=0)(x).shape == (2, 64)


def test_fixed_landmarks_are_linear_in_the_pixels():
    def cost(side, **words):
        model = timm.create_model("soft_tiny", img_size=side, num_classes=0, depths=(1, 1, 1, 1), **words)
        return count_flops(model, torch.randn(1, 3, side, side))

    # Stage 4 is softmax in the published networks, and quadratic.
    fixed = [cost(side, landmarks=49, softmax_free=True) for side in (224, 448)]
    assert fixed[1] < 4.05 * fixed[0]
    strided = [cost(side) for side in (224, 448)]
    assert strided[1] > 4.3 * strided[0]
    softmax_free = small_soft("soft_tiny", softmax_free=True)
    assert not any(isinstance(m, layers.Softmax) for m in softmax_free.modules())
    assert softmax_free(torch.randn(1, 3, 64, 96)).shape == (1, 5)
    with pytest.raises(ValueError, match="inverse and landmarks belong to mechanism 'soft'"):
        timm.create_model("soft_tiny", mechanism="sima", landmarks=49)


def test_positions_of_another_size_are_resampled():
    source = small_soft("soft_tiny", img_size=64)
    state = {}
    for key, value in source.state_dict().items():
        for ours, theirs in THEIRS:
            key = re.sub(ours, theirs, key)
        state[key] = value
    for key in [key for key in state if ".qkv." in key]:
        value = state.pop(key)
        state[key.replace("qkv", "q")], state[key.replace("qkv", "kv")] = value.split([64, 128])
    target = load_published(small_soft("soft_tiny", img_size=(64, 96)), state).eval()
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(target(x), source.eval()(x))


# Our keys of SOFT in the published ones.
THEIRS = (
    (r"^stages\.3\.(.*)$", r"stages.4.\1"),
    (r"^stages\.2\.(.*)$", r"stages.3.\1"),
    (r"^stages\.1\.(.*)$", r"stages.2.\1"),
    (r"^stages\.0\.(.*)$", r"stages.1.\1"),
    (r"^stages\.(\d)\.embed\.", r"patch_embed\1.proj."),
    (r"^stages\.(\d)\.pos_embed$", r"pos_embed\1"),
    (r"^stages\.([123])\.blocks\.(\d+)\.attn\.(q|v)\.", r"block\1.\2.att.mha.W_\3."),
    (r"^stages\.([123])\.blocks\.(\d+)\.attn\.proj\.", r"block\1.\2.att.mha.ff."),
    (r"^stages\.([123])\.blocks\.(\d+)\.attn\.landmark\.", r"block\1.\2.att.mha.attn.Qlandmark_op."),
    (r"^stages\.([123])\.blocks\.(\d+)\.attn\.landmark_norm\.", r"block\1.\2.att.mha.attn.Qnorm_act.0."),
    (r"^stages\.([123])\.blocks\.(\d+)\.attn\.conv\.", r"block\1.\2.att.mha.attn.conv."),
    (r"^stages\.([123])\.blocks\.(\d+)\.mlp\.fc(1|2)\.", r"block\1.\2.att.ff\3."),
    (r"^stages\.([123])\.blocks\.(\d+)\.norm", r"block\1.\2.att.norm"),
    (r"^stages\.4\.blocks\.", r"block4."),
)


def small(name, **words):
    """A network of the same wiring that builds and runs in a moment."""
    heads = 2 if "mechanism" in words or "xvit" in name or "vibid" in name or "sima" in name else 4
    own = {"embed_dim": 32, "depth": 2, "num_heads": heads, "num_classes": 5, "img_size": (48, 64)}
    if "xvit" in name or "vibid" in name:
        own["attn_dim"] = 16
    if "aft_conv" in name:
        own["mechanism_args"] = {"kernel_size": 3, "num_heads": 8}
    torch.manual_seed(0)
    return timm.create_model(name, **{**own, **words})


@pytest.mark.parametrize("name", NETWORKS)
def test_timms_interface(name):
    model = small(name, drop_path_rate=0.1).eval()
    x = torch.randn(2, 3, 48, 64)
    want = model(x)
    assert want.shape == (2, 5)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), want)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)

    grid = tuple(-(-side // (8 if name.endswith("p8") else 16)) for side in (48, 64))
    final, maps = model.forward_intermediates(x, indices=[0, 1])
    assert [tuple(m.shape) for m in maps] == [(2, 32, *grid)] * 2
    tokens = model.forward_intermediates(x, indices=1, output_fmt="NLC", intermediates_only=True)
    assert [tuple(m.shape) for m in tokens] == [(2, grid[0] * grid[1], 32)]
    assert len(final) == 2
    features = small(name, features_only=True, out_indices=(0, 1)).eval()
    assert [tuple(m.shape) for m in features(x)] == [(2, 32, *grid)] * 2
    assert features.feature_info.channels() == [32, 32]

    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), want)
    model.train()
    model(x).square().sum().backward()
    model.set_grad_checkpointing(False)
    mixers = model.mixers()
    unused = {f"{k}.{p}" for k, layer in mixers.items() for p in layer.unused}
    # Raw kernels of AFT-conv get no gradient while their spread, gamma, is 0.
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    idle = {k for k, p in trained.items() if p.grad is None or not p.grad.any()}
    assert idle <= unused | {f"{k}.w" for k in mixers}
    names = {key for key, _ in model.named_parameters()}
    own = {f"{k}.{p}" for k, layer in mixers.items() for p in layer.no_weight_decay()}
    assert own <= names & model.no_weight_decay()
    assert set(model.group_matcher()) >= {"stem", "blocks"}

    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model.eval()(x).shape == (2, 7)
    model.prune_intermediate_layers([0])
    assert len(model.blocks) == 1
    assert small(name, in_chans=1)(torch.randn(1, 1, 48, 64)).shape == (1, 5)
    assert small(name, num_classes=0)(x).shape == (2, 32)
    cfg = model.pretrained_cfg
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["num_classes"] == 1000


@pytest.mark.parametrize("name", NETWORKS)
def test_any_image_size(name):
    model = small(name).eval()
    for height, width in ((48, 64), (50, 33), (16, 16), (96, 30)):
        assert model(torch.randn(1, 3, height, width)).shape == (1, 5)
    if isinstance(model, models.ViT):
        x = torch.randn(1, 3, 32, 80)
        want = model(x)
        model.set_input_size((32, 80))
        torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("mechanism", layers.mechanisms())
@pytest.mark.parametrize("trunk", ["xcit_nano_12_p16_224", "sima_nano_12_p16", "sima_deit_tiny_p16"])
def test_any_trunk_with_any_mechanism(trunk, mechanism):
    torch.manual_seed(0)
    model = sansmax.create_model(
        trunk,
        mechanism,
        mechanism_args=SMALL.get(mechanism),
        embed_dim=32,
        num_heads=4,
        depth=2,
        num_classes=5,
        img_size=(48, 64),
    )
    x, y = torch.randn(4, 3, 48, 64), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    assert torch.nn.functional.cross_entropy(model(x), y) < loss
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    unused = {f"{k}.{p}" for k, layer in model.mixers().items() for p in (*layer.unused, "w")}
    # The class token of a ViT's last block reads no convolution: that block's may be idle.
    idle = {k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {k for k in idle if "blocks.1.attn" not in k or "xcit" in trunk} <= unused


@pytest.mark.parametrize("softmax_free", [False, True])
@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_the_pyramid_with_any_mechanism(mechanism, softmax_free):
    own = {"embed_dims": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    torch.manual_seed(0)
    model = sansmax.create_model(
        "soft_tiny",
        mechanism,
        mechanism_args={} if "soft" in mechanism else SMALL.get(mechanism),
        softmax_free=softmax_free,
        num_classes=5,
        img_size=(64, 96),
        **own,
    )
    x = torch.randn(2, 3, 64, 96)
    model(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    unused = {f"{k}.{p}" for k, layer in model.mixers().items() for p in (*layer.unused, "w")}
    # The class token of the last block reads no convolution: that block's may be idle.
    idle = {k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {k for k in idle if "stages.3.blocks.0.attn" not in k} <= unused
    assert model.eval()(torch.randn(1, 3, 70, 50)).shape == (1, 5)


def test_softmax_in_the_xcit_trunk_is_timms_own_network():
    words = {"img_size": 48, "num_classes": 7, "depth": 2}
    ours = sansmax.create_model("xcit_tiny_12_p16_224", **words).eval()
    theirs = timm.create_model("xcit_tiny_12_p16_224", **words).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(ValueError, match="mechanism_args must be empty for 'softmax'"):
        sansmax.create_model("xcit_tiny_12_p16_224", mechanism_args={"qk_norm": True}, **words)
    with pytest.raises(ValueError, match="pretrained must be False because timm's weights"):
        sansmax.create_model("xcit_tiny_12_p16_224", "sima", pretrained=True)


def test_checkpoints_of_an_xcit_with_another_mechanism(tmp_path):
    words = {"embed_dim": 32, "num_heads": 2, "depth": 1, "num_classes": 3}
    source = sansmax.create_model("xcit_nano_12_p16_224", "xnorm", **words).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    words["checkpoint_path"] = str(tmp_path / "weights.pt")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(sansmax.create_model("xcit_nano_12_p16_224", "xnorm", **words).eval()(x), source(x))


def test_one_head():
    """The paper's single-head form, in both attentions."""
    model = timm.create_model("sima_nano_12_p16", num_heads=1, depth=1)
    assert model.blocks[0].attn.num_heads == model.cls_attn_blocks[0].attn.num_heads == 1


@pytest.mark.parametrize(
    "case", ["sima_nano_12_p16", "sima_nano_12_p16_96x64", "sima_tiny_12_p16", "sima_tiny_12_p16_160"]
)
def test_sima_golden(golden, error, case):
    case = golden(f"sima/{case}")
    state = case.state_dict()
    classes = len(state["head.weight"])
    model = timm.create_model(case.config["factory"], num_classes=classes).eval()
    x = case.inputs()["x"]
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-9)):
        load_published(model.to(dtype), {"model": state})
        with torch.inference_mode():
            assert error(model(x.to(dtype)), case.outputs["logits"]) < tolerance


def test_nano_trains():
    """The published nano networks write in place into what the backward pass needs."""
    model = timm.create_model("sima_nano_12_p16", img_size=32, num_classes=3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_checkpoints_of_the_authors(tmp_path):
    words = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("sima_nano_12_p16", **words).eval()
    x = torch.randn(1, 3, 33, 47)
    want = model(x)
    path = tmp_path / "checkpoint.pth"
    state = {f"module.{k.replace('pos_embed.', 'pos_embeder.')}": v for k, v in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1)}, path)
    twin = timm.create_model("sima_nano_12_p16", **words).eval()
    assert torch.equal(load_published(twin, path)(x), want)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(load_published(twin, own)(x), want)

    before = {k: v.clone() for k, v in twin.state_dict().items()}
    del own["cls_token"], own["head.bias"]
    own["head.weight"] = torch.zeros(4, 32)
    own["extra"] = torch.zeros(1)
    with pytest.raises(
        ValueError,
        match=r"2 missing \(cls_token, head.bias\); 1 unexpected \(extra\); 1 of another shape "
        r"\(head.weight \(4, 32\) for \(3, 32\)\)",
    ):
        load_published(twin, own)
    assert all(torch.equal(before[k], v) for k, v in twin.state_dict().items())

    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"expected a readable checkpoint .* may be cut off"):
        load_published(twin, path)
    with pytest.raises(FileNotFoundError, match="expected a file"):
        load_published(twin, tmp_path / "none.pth")
    torch.save({"model": state, "callback": Evil()}, path)
    with pytest.raises(ValueError, match="weights_only reader refuses"):
        load_published(twin, path)
    assert not Evil.ran
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        load_published(twin, {"epoch": 3})


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def test_no_weights_are_hosted():
    with pytest.raises(ValueError, match=r"pretrained must be False .* sansmax.load_published"):
        timm.create_model("sima_nano_12_p16", pretrained=True)
    assert sansmax.load_published is load_published


def test_convert(tmp_path, capsys):
    source = timm.create_model("sima_nano_12_p16", num_classes=3)
    state = {k.replace("pos_embed.", "pos_embeder."): v for k, v in source.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    arguments = ["convert", str(tmp_path / "in.pth"), str(out), "--model"]
    assert cli.main([*arguments, "sima_nano_12_p16"]) == 0
    assert "sima_nano_12_p16, 371 tensors" in capsys.readouterr().out
    twin = timm.create_model("sima_nano_12_p16", num_classes=3, checkpoint_path=str(out)).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(twin(x), source.eval()(x))
    written = out.read_bytes()

    for model, message in (
        ("sima_tiny_12_p16", "of another shape (cls_token (1, 1, 128) for (1, 1, 192)"),
        ("xvit_u_p16", "unexpected"),
        ("sima_nano_12_p61", "did you mean 'sima_nano_12_p16'?"),
    ):
        assert cli.main([*arguments, model]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert out.read_bytes() == written
    assert cli.main([*arguments[:2], str(tmp_path / "out.pth"), "--model", "sima_nano_12_p16"]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]


def test_the_table_of_networks_is_true():
    page = Path(__file__).parents[1] / "docs" / "networks.md"
    rows = {line.split("`")[1]: line for line in page.read_text().splitlines() if line.startswith("| `")}
    assert list(rows) == models.networks()
    for name in (
        "sima_nano_12_p16",
        "soft_tiny",
        "xvit_u_p16",
        "aft_full_tiny_p16",
        "aft_conv_tiny_p16_k11_h32",
    ):
        assert rows[name] == row(name), "write it anew: python -m sansmax.bench.networks > docs/networks.md"
    for name, parameters in PARAMETERS.items():
        assert f" {parameters:,} " in rows[name]
