"""Single layers and ViT trunks from the state dicts of others, and tables of another image size."""

import pytest
import timm
import torch
from torch import nn

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
