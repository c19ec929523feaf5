"""The layers against the published modules' outputs, in float64 and both backends."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from sansmax import layers

MECHANISMS = layers.mechanisms()


@pytest.fixture(params=["reference", "fused"])
def backend(request, monkeypatch):
    monkeypatch.setenv("SANSMAX_BACKEND", request.param)


def loaded(layer, state):
    layer.double().load_state_dict(state)
    return layer.eval()


def gradients(layer, x, cotangent):
    """The gradient of sum(out * cotangent) with respect to x; those of the parameters stay in them."""
    (grad,) = torch.autograd.grad((layer(x) * cotangent).sum(), x, retain_graph=True)
    (layer(x) * cotangent).sum().backward()
    return grad


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", ["attn_qk_order", "attn_kv_order", "attn_single_head_nobias", "attn_eps"])
def test_golden_sima(case, golden, error):
    case = golden(f"sima/{case}")
    config = case.config
    layer = MECHANISMS["sima"](config["dim"], config["num_heads"], config["qkv_bias"])
    loaded(layer, case.state_dict())
    x = case.inputs()["x"].requires_grad_()
    assert error(layer(x), case.outputs["out"]) <= 1e-9
    if "ctx_x1e8" in case.outputs:
        assert error(layer.mix(x, None, None, False, None) * 1e8, case.outputs["ctx_x1e8"]) <= 1e-9
        return
    assert error(layer.mix(x, None, None, False, None), case.outputs["ctx"]) <= 1e-9
    cotangent = case.fill("input:cotangent", case.outputs["out"].shape)
    assert error(gradients(layer, x, cotangent), case.outputs["grad_x"]) <= 1e-9
    if "grad_qkv_weight" in case.outputs:
        assert error(layer.qkv.weight.grad, case.outputs["grad_qkv_weight"]) <= 1e-9


@pytest.mark.usefixtures("backend")
def test_golden_sima_deit_block(golden, error):
    case = golden("sima/deit_block")
    block = timm.models.vision_transformer.Block(
        64, 4, qkv_bias=True, init_values=1.0, norm_layer=nn.LayerNorm, attn_layer=MECHANISMS["sima"]
    )
    names = {"gamma1": "ls1.gamma", "gamma2": "ls2.gamma"}
    loaded(block, {names.get(key, key): value for key, value in case.state_dict().items()})
    assert error(block(case.inputs()["x"]), case.outputs["out"]) <= 1e-9


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", ["xnorm_n49_d32_h4", "xnorm_n5_d48_h3", "binorm_n36_d24_e16_h2"])
def test_golden_xnorm(case, golden, error):
    case = golden(f"xvit/{case}")
    config = case.config
    layer = MECHANISMS["xnorm"](
        config["dim"],
        config["num_heads"],
        qkv_bias=True,
        attn_dim=config["embed_dim"],
        gamma=config["gamma"],
    )
    loaded(layer, case.state_dict())
    assert error(layer(case.inputs()["x"]), case.outputs["out"]) <= 1e-9


SOFT_NAMES = {
    "W_q": "q",
    "W_v": "v",
    "attn.Qlandmark_op": "landmark",
    "attn.Qnorm_act.0": "landmark_norm",
    "attn.conv": "conv",
    "ff": "proj",
}


def soft_layer(case, prefix, inverse):
    config = case.config
    name = "soft_norm" if inverse == "norm" else "soft"
    options = {} if inverse == "norm" else {"inverse": inverse}
    layer = MECHANISMS[name](
        config["dim"],
        config["num_heads"],
        qkv_bias=True,
        ratio=config["ratio"],
        conv_size=config["conv_size"],
        batchwise=True,
        grid=(config["H"], config["W"]),
        num_prefix_tokens=0,
        **options,
    )
    state = {}
    for key, value in case.state_dict().items():
        stem, _, kind = key.removeprefix(prefix).rpartition(".")
        if stem in SOFT_NAMES:
            state[f"{SOFT_NAMES[stem]}.{kind}"] = value
    return loaded(layer, state)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("case", "inverse"),
    [
        ("plain", "plain"),
        ("plain_smooth", "plain"),
        ("norm", "norm"),
        ("norm_smooth", "norm"),
        ("2021", "release2021"),
    ],
)
def test_golden_soft(case, inverse, golden, error):
    case = golden(f"soft/soft_attention_{case}")
    layer, x = soft_layer(case, "", inverse), case.inputs()["x"]
    assert error(layer(x), case.outputs["out"]) <= 1e-9
    q = layer.q(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) * layer.head_dim**-0.25
    landmarks = layer.landmarks(q, case.config["H"], case.config["W"])
    assert error(landmarks, case.outputs["landmarks"]) <= 1e-9
    layer.conv = None  # it dominates the output
    attention = layer.mix(x, None, None, False, None).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
    assert error(attention, case.outputs["attn"]) <= 1e-9


@pytest.mark.usefixtures("backend")
def test_golden_soft_block(golden, error):
    case = golden("soft/soft_block_plain")
    layer, x, state = soft_layer(case, "att.mha.", "plain"), case.inputs()["x"], case.state_dict()

    def linear(key, y):
        return F.linear(y, state[f"att.{key}.weight"], state[f"att.{key}.bias"])

    def norm(key, y):
        return F.layer_norm(y, (64,), state[f"att.{key}.weight"], state[f"att.{key}.bias"])

    y = norm("norm1", x + layer(x))
    out = norm("norm2", y + linear("ff2", F.gelu(linear("ff1", y), approximate="tanh")))
    assert error(out, case.outputs["out"]) <= 1e-9


EA_NAMES = {
    "conv1.weight": "query.weight",
    "conv1.bias": "query.bias",
    "linear_0.weight": "memory_k",
    "linear_1.weight": "memory_v",
    "conv2.0.weight": "proj.weight",
}


def ea_value(key, value):
    """A published tensor in the layout of ours."""
    value = value.reshape(value.shape[:2]) if key in EA_NAMES and value.ndim > 2 else value
    return value.T if key == "linear_1.weight" else value


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "case",
    ["ea_conv_c32_5x7", "ea_conv_c512_6x5", "ea_conv_c16_peaked", "ea_conv_c32_grads", "ea_conv_c32_train"],
)
def test_golden_external(case, golden, error):
    case = golden(f"external_attention/{case}")
    layer = MECHANISMS["external"](case.config["c"], qkv_bias=True, proj_bias=False, block=True)
    state = case.state_dict()
    loaded(
        layer, {EA_NAMES.get(key, key.replace("conv2.1", "bn")): ea_value(key, v) for key, v in state.items()}
    )
    image = case.inputs()["x"]
    x = image.flatten(2).mT.requires_grad_()
    layer.train("running_mean" in case.outputs)
    y = layer(x)
    assert error(y.mT.unflatten(2, image.shape[2:]), case.outputs["out"]) <= 1e-9
    if layer.training:
        assert error(layer.bn.running_mean, case.outputs["running_mean"]) <= 1e-9
        assert error(layer.bn.running_var, case.outputs["running_var"]) <= 1e-9
    if "grad.x" in case.outputs:
        grad = gradients(layer, x, case.inputs()["cotangent"].flatten(2).mT)
        assert error(grad.mT.unflatten(2, image.shape[2:]), case.outputs["grad.x"]) <= 1e-9
        for key in ("conv1.weight", "linear_0.weight", "linear_1.weight", "conv2.0.weight"):
            got = layer.get_parameter(EA_NAMES[key]).grad
            assert error(got, ea_value(key, case.outputs[f"grad.{key}"])) <= 1e-9


@pytest.mark.usefixtures("backend")
def test_golden_external_without_projections(golden, error):
    case = golden("external_attention/xmu_ea_d24_s8")
    layer = MECHANISMS["external"](24, memory=8, query_proj=False, out_proj=False, eps=0.0)
    state = case.state_dict()
    loaded(layer, {"memory_k": state["mk.weight"], "memory_v": state["mv.weight"].T})
    assert error(layer(case.inputs()["x"]), case.outputs["out"]) <= 1e-9


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", ["mea_d64_h4", "mea_d32_h1", "eamlp_block_d48_h3"])
def test_golden_external_multihead(case, golden, error):
    case = golden(f"external_attention/{case}")
    state, config, x = case.state_dict(), case.config, case.inputs()["x"]
    layer = MECHANISMS["external_multihead"](
        config["dim"], config["num_heads"], qkv_bias=True, dead_bias=True
    )
    stem = "attn." if "attn.proj.weight" in state else ""
    names = {"trans_dims": "query", "proj": "proj"}
    own = {
        f"{new}.{kind}": state[f"{stem}{old}.{kind}"]
        for old, new in names.items()
        for kind in ("weight", "bias")
    }
    own["memory_k"], own["memory_k_bias"] = state[f"{stem}linear_0.weight"], state[f"{stem}linear_0.bias"]
    own["memory_v"], own["memory_v_bias"] = state[f"{stem}linear_1.weight"].T, state[f"{stem}linear_1.bias"]
    loaded(layer, own)
    if stem:
        x = F.layer_norm(x, (48,), state["norm1.weight"], state["norm1.bias"])
    assert error(layer(x), case.outputs["attn_out" if stem else "out"]) <= 1e-9
