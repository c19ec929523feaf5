"""Single layers and ViT trunks from the state dicts of others, and tables of another image size."""

import pytest
import timm
import torch
from torch import nn

import sansmax
from sansmax import layers
from sansmax.models import load_published

DIM = 24


def linear(state, name, outputs, inputs=DIM, bias=True):
    state[f"{name}.weight"] = torch.randn(outputs, inputs)
    if bias:
        state[f"{name}.bias"] = torch.randn(outputs)


def test_multihead_file(golden, error):
    case = golden("external_attention/mea_d64_h4")
    layer = layers.ExternalAttentionMultihead(64, 4, qkv_bias=True).double()
    load_published(layer, case.state_dict())
    assert error(layer(case.inputs()["x"]), case.outputs["out"]) < 1e-9
    kept = layers.ExternalAttentionMultihead(64, 4, qkv_bias=True, dead_bias=True).double()
    load_published(kept, case.state_dict())
    assert torch.equal(kept.memory_k_bias, case.state_dict()["linear_0.bias"])


def test_eanets_module(golden, error):
    case = golden("external_attention/ea_conv_c32_5x7")
    layer = layers.ExternalAttention(32, qkv_bias=True, proj_bias=False, block=True).double().eval()
    load_published(layer, case.state_dict())
    x = case.inputs()["x"]
    assert error(layer(x.flatten(2).mT).mT.unflatten(-1, x.shape[2:]), case.outputs["out"]) < 1e-9


def test_external_attention_of_the_collection(golden, error):
    case = golden("external_attention/xmu_ea_d24_s8")
    layer = layers.ExternalAttention(DIM, memory=8, eps=0.0, query_proj=False, out_proj=False).double()
    load_published(layer, case.state_dict())
    assert error(layer(case.inputs()["x"]), case.outputs["out"]) < 1e-9


def naive_aft(x, q, k, v, w, out):
    """Y_t = sigmoid(q_t) sum exp(k_t' + w_tt') v_t' / sum exp(k_t' + w_tt'), in float64."""
    q, k, v = (x @ state.double().mT + bias.double() for state, bias in (q, k, v))
    weights = (k[:, None] + w.double()[None, :, :, None]).exp()
    y = q.sigmoid() * (weights * v[:, None]).sum(2) / weights.sum(2)
    return y if out is None else y @ out[0].double().mT + out[1].double()


@pytest.mark.parametrize(
    ("names", "bias", "out"),
    [
        (("to_q", "to_k", "to_v"), "wbias", "project"),
        (("query", "key", "value"), "pos_bias", "output"),
        (("fc_q", "fc_k", "fc_v"), "position_biases", None),
    ],
)
def test_unofficial_aft(names, bias, out):
    torch.manual_seed(0)
    state, tokens = {bias: torch.randn(7, 7)}, 7
    for name in (*names, *([out] if out else [])):
        linear(state, name, DIM)
    if bias == "pos_bias":
        state["local_mask"] = torch.ones(7, 7).tril().bool()
    layer = layers.AFTFull(DIM, qkv_bias=True, max_tokens=7, factor_dim=None, out_proj=out is not None)
    load_published(layer.double(), state)
    x = torch.randn(2, tokens, DIM, dtype=torch.float64)
    pairs = [(state[f"{n}.weight"], state[f"{n}.bias"]) for n in names]
    project = None if out is None else (state[f"{out}.weight"], state[f"{out}.bias"])
    torch.testing.assert_close(layer(x), naive_aft(x, *pairs, state[bias], project))


def test_unofficial_aft_simple_has_no_bias_to_load():
    state = {}
    for name in ("to_q", "to_k", "to_v", "project"):
        linear(state, name, DIM)
    layer = load_published(layers.AFTSimple(DIM, qkv_bias=True), state)
    assert torch.equal(layer.qkv.weight[DIM : 2 * DIM], state["to_k.weight"])
    with pytest.raises(ValueError, match=r"1 unexpected \(wbias\)"):
        load_published(layer, {**state, "wbias": torch.zeros(7, 7)})


def test_unofficial_ufo_attention_warns_that_it_is_another_function():
    state = {"gamma": torch.randn(1, 3, 1, 1)}
    for name in ("fc_q", "fc_k", "fc_v", "fc_o"):
        linear(state, name, DIM)
    layer = layers.XNorm(DIM, 3, qkv_bias=True)
    with pytest.warns(UserWarning, match="normalises K\\^T V over the other axis"):
        load_published(layer, state)
    assert torch.equal(layer.gamma, state["gamma"].flatten())
    assert torch.equal(layer.qkv.weight[2 * DIM :], state["fc_v.weight"])
    # Another width per head than ours does not fit, and the message says which tensor.
    linear(state, "fc_q", 30)
    with (
        pytest.warns(UserWarning, match="other axis"),
        pytest.raises(ValueError, match=r"of another shape \(qkv.weight \(78, 24\) for \(72, 24\)"),
    ):
        load_published(layer, state)


def test_soft_attention(golden, error):
    case = golden("soft/soft_block_plain")
    prefix = "att.mha."
    state = {k.removeprefix(prefix): v for k, v in case.state_dict().items() if k.startswith(prefix)}
    layer = layers.SOFT(64, 2, qkv_bias=True, ratio=2, conv_size=3)
    load_published(layer.double(), state)
    assert torch.equal(layer.q.weight, state["W_q.weight"])
    assert torch.equal(layer.conv.weight, state["attn.conv.weight"])


def test_our_own_layers_pass_as_they_are():
    for name, layer in layers.mechanisms().items():
        source, twin = (layer(DIM, 2 if name != "aft_conv" else 8) for _ in range(2))
        load_published(twin, source.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sima_deit_tiny_p16", "aft_full_tiny_p16", "aft_conv_tiny_p16_k11_h32"])
@pytest.mark.parametrize("table", [128, None])
def test_a_checkpoint_of_another_image_size(name, table):
    own = {"aft_full_tiny_p16": {"factor_dim": table}}.get(name)
    if own is None and table is None:
        own = {} if "conv" not in name else {"num_heads": 8}
    words = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3, "mechanism_args": own}
    if "conv" in name:
        words["mechanism_args"] = {"num_heads": 8}
    torch.manual_seed(0)
    source = timm.create_model(name, img_size=64, **words).eval()
    target = timm.create_model(name, img_size=(96, 48), **words).eval()
    load_published(target, source.state_dict())
    x = torch.randn(2, 3, 96, 48)
    torch.testing.assert_close(target(x), source(x))
    square = timm.create_model(name, img_size=64, **words).eval()
    assert torch.equal(load_published(square, source.state_dict())(x), source(x))


@pytest.mark.parametrize("name", ["soft_tiny", "xvit_u_p16", "vibid_u_p16_pyramid"])
def test_our_own_positions_of_another_image_size(name):
    words = {"embed_dim": 32, "attn_dim": 16, "depth": 1, "num_heads": 4}
    if name == "soft_tiny":
        words = {"embed_dims": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    torch.manual_seed(0)
    source = timm.create_model(name, img_size=64, num_classes=3, **words).eval()
    target = timm.create_model(name, img_size=(90, 30), num_classes=3, **words).eval()
    load_published(target, source.state_dict())
    x = torch.randn(2, 3, 90, 30)
    torch.testing.assert_close(target(x), source(x))
    # As many patches as a square has, yet no square.
    wide = timm.create_model(name, img_size=(64, 256), num_classes=3, **words)
    twin = timm.create_model(name, img_size=(64, 256), num_classes=3, **words)
    load_published(twin, wide.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(wide.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError, match="of another shape"):
        load_published(source, target.state_dict())


def test_positions_for_a_network_without_them_are_named():
    words = {"embed_dim": 32, "attn_dim": 16, "depth": 1, "num_heads": 4, "img_size": 32}
    source = timm.create_model("xvit_u_p16", **words)
    target = timm.create_model("xvit_u_p16", positions="none", **words)
    with pytest.raises(ValueError, match=r"1 unexpected \(pos_embed.table\)"):
        load_published(target, source.state_dict())


def refuses(model, state, key):
    """No tensor under `key` that does not fit, and no lack of it, is anything but a named mismatch."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for t in (None, *map(torch.zeros, ((), 5, (2, 3), (1, 0, 32), (1, 7, 32), (2, 3, 4, 5)))):
        wrong = {k: v for k, v in state.items() if k != key} | ({} if t is None else {key: t})
        with pytest.raises(ValueError, match=r"got \d+ (missing|unexpected|of another shape) \("):
            load_published(model, wrong)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("case", "model", "keys"),
    [
        (
            "soft/soft_tiny_224",
            "soft_tiny",
            ("pos_embed2", "block4.0.attn.q.weight", "block4.0.attn.kv.weight"),
        ),
        (
            "external_attention/eanet_r50_s16_65",
            "eanet_resnet50",
            ("linu.linear_0.weight", "linu.linear_1.weight"),
        ),
        (
            "external_attention/mea_d64_h4",
            layers.ExternalAttentionMultihead(64, 4, qkv_bias=True),
            ("linear_0.weight", "linear_1.weight", "trans_dims.weight"),
        ),
    ],
)
def test_published_tensors_of_wrong_shapes_are_named(golden, case, model, keys):
    state = golden(case).state_dict()
    if isinstance(model, str):
        model = timm.create_model(model, num_classes=19 if "eanet" in model else 1000)
    load_published(model, state)
    for key in keys:
        refuses(model, state, key)


def test_tables_of_wrong_shapes_are_named():
    words = {"embed_dim": 32, "depth": 1, "num_heads": 4, "img_size": 64}
    for name in ("aft_full_tiny_p16", "eamlp_7", "xvit_u_p16"):
        model = timm.create_model(name, **words, **({"attn_dim": 16} if "xvit" in name else {}))
        for key in model.state_dict():
            if "pos_embed" in key or "bias_" in key:
                refuses(model, model.state_dict(), key)
    layer = layers.AFTFull(DIM, qkv_bias=True, max_tokens=7, factor_dim=None)
    state = {"wbias": torch.randn(7, 7)}
    for name in ("to_q", "to_k", "to_v", "project"):
        linear(state, name, DIM)
    for key in ("wbias", "to_q.weight", "to_k.bias"):
        refuses(layer, state, key)


def test_published_parts_that_do_not_fit_are_named():
    cvt = timm.create_model("sima_cvt_13", embed_dims=(8, 8, 8), depths=(1, 1, 1), num_heads=1)
    parts = {f"stage0.blocks.0.attn.proj_{part}.weight": torch.zeros(2, i) for i, part in enumerate("qkv")}
    with pytest.raises(ValueError, match=r"3 unexpected \(stages.0.blocks.0.attn.proj_q.weight, "):
        load_published(cvt, parts)
    t2t = timm.create_model("eamlp_7", embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"1 unexpected \(tokens_to_token.attention.weight\)"):
        load_published(t2t, {"tokens_to_token.attention.weight": torch.zeros(1)})


def test_class_attention_of_xcit():
    model = sansmax.create_model("xcit_nano_12_p16_224", depth=1, embed_dim=32, num_heads=4, num_classes=3)
    state = model.state_dict()
    for key in [key for key in state if key.startswith("cls_attn") and ".attn.q." in key]:
        parts = [state.pop(key.replace(".q.", f".{part}.")) for part in "qkv"]
        state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    state = {key.replace("pos_embed.", "pos_embeder."): value.clone() for key, value in state.items()}
    twin = sansmax.create_model("xcit_nano_12_p16_224", depth=1, embed_dim=32, num_heads=4, num_classes=3)
    load_published(twin, state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    refuses(twin, state, "cls_attn_blocks.1.attn.qkv.weight")


def test_a_table_that_is_no_square_is_named():
    words = {"embed_dim": 32, "depth": 1, "num_heads": 4}
    source = timm.create_model("sima_deit_tiny_p16", img_size=(32, 48), **words)
    target = timm.create_model("sima_deit_tiny_p16", img_size=64, **words)
    with pytest.raises(ValueError, match=r"of another shape \(pos_embed \(1, 7, 32\) for \(1, 17, 32\)\)"):
        load_published(target, source.state_dict())


def test_layer_scale_of_sima_deit():
    words = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32}
    source, twin = (timm.create_model("sima_deit_tiny_p16", **words) for _ in range(2))
    for block in source.blocks:
        nn.init.normal_(block.ls1.gamma)
    state = {
        key.replace("ls1.gamma", "gamma1").replace("ls2.gamma", "gamma2"): value
        for key, value in source.state_dict().items()
    }
    assert "blocks.0.gamma1" in state
    load_published(twin, state)
    assert torch.equal(twin.blocks[1].ls1.gamma, source.blocks[1].ls1.gamma)
