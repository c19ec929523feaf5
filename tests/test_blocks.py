"""The published blocks around the layers, against the golden cases."""

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from timm.models.xcit import LPI, ConvPatchEmbed, PositionalEncodingFourier
from torch import nn

from sansmax.layers.external_multihead import ExternalAttentionMultihead
from sansmax.layers.sima import SimA
from sansmax.layers.soft import SOFT
from sansmax.layers.softmax import Softmax
from sansmax.models._pyramid import PostNormBlock
from sansmax.models._xcit import MixerXCBlock, SimAClassAttention, SimAClassAttentionBlock


def loaded(module, state):
    module.double().load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("name", ["class_attn", "class_attn_eps"])
def test_sima_class_attention(golden, error, name):
    case = golden(f"sima/{name}")
    config = case.config
    layer = loaded(
        SimAClassAttention(config["dim"], config["num_heads"], config["qkv_bias"]), case.state_dict()
    )
    x = case.inputs()["x"].requires_grad_()
    out = torch.cat([layer(x), x[:, 1:]], 1)
    assert error(out, case.outputs["out"]) < 1e-9
    if "grad_x" in case.outputs:
        (out * case.fill("input:cotangent", out.shape)).sum().backward()
        assert error(x.grad, case.outputs["grad_x"]) < 1e-9


@pytest.mark.parametrize("tokens_norm", [False, True])
def test_sima_class_attention_block(golden, error, tokens_norm):
    case = golden(f"sima/class_attn_block_{'tokens' if tokens_norm else 'cls'}_norm")
    block = SimAClassAttentionBlock(64, 4, qkv_bias=True, eta=1.0, tokens_norm=tokens_norm)
    x = case.inputs()["x"].requires_grad_()
    out = loaded(block, case.state_dict()).train()(x)
    assert error(out, case.outputs["out"]) < 1e-9
    out.sum().backward()  # the published nano models fail here


def test_class_attention_in_half_precision_at_many_tokens(error):
    torch.manual_seed(0)
    layer = SimAClassAttention(48, 3, qkv_bias=True)
    x = torch.randn(1, 4097, 48)
    want = layer.double()(x.double())
    half = layer.float()
    with torch.autocast("cpu", dtype=torch.float16):
        assert error(half(x), want) < 5e-3
    with pytest.raises(ValueError, match="num_heads must divide dim=48, got 5"):
        SimAClassAttention(48, 5)


def test_sima_block(golden, error):
    case = golden("sima/block")
    block = MixerXCBlock(64, 4, mixer=SimA(64, 4, qkv_bias=True), qkv_bias=True, eta=1.0)
    assert error(loaded(block, case.state_dict())(case.inputs()["x"], 5, 7), case.outputs["out"]) < 1e-9


def test_sima_deit_block(golden, error):
    case = golden("sima/deit_block")
    block = Block(64, 4, qkv_bias=True, init_values=1.0, norm_layer=LayerNorm, attn_layer=SimA)
    for norm in (block.norm1, block.norm2):
        norm.eps = 1e-5
    names = {"gamma1": "ls1.gamma", "gamma2": "ls2.gamma"}
    state = {names.get(key, key): value for key, value in case.state_dict().items()}
    assert error(loaded(block, state)(case.inputs()["x"]), case.outputs["out"]) < 1e-9


def test_sima_local_patch_interaction(golden, error):
    case = golden("sima/lpi")
    assert error(loaded(LPI(32), case.state_dict())(case.inputs()["x"], 5, 7), case.outputs["out"]) < 1e-9


@pytest.mark.parametrize("patch_size", [8, 16])
def test_sima_patch_embedding(golden, error, patch_size):
    case = golden(f"sima/patch_embed_p{patch_size}")
    stem = loaded(ConvPatchEmbed(patch_size=patch_size, embed_dim=64), case.state_dict())
    out, grid = stem(case.inputs()["x"])
    assert error(out, case.outputs["out"]) < 1e-9
    assert list(grid) == case.outputs["grid"].tolist()


def test_sima_fourier_positions(golden, error):
    case = golden("sima/pos_fourier")
    positions = loaded(PositionalEncodingFourier(hidden_dim=32, dim=48), case.state_dict())
    assert error(positions(2, 5, 7), case.outputs["out"]) < 1e-9


def test_soft_block(golden, error):
    case = golden("soft/soft_block_plain")
    block = PostNormBlock(64, mixer=SOFT(64, 2, qkv_bias=True, ratio=2, conv_size=3))
    names = {
        "att.mha.W_q": "attn.q",
        "att.mha.W_v": "attn.v",
        "att.mha.attn.Qlandmark_op": "attn.landmark",
        "att.mha.attn.Qnorm_act.0": "attn.landmark_norm",
        "att.mha.attn.conv": "attn.conv",
        "att.mha.ff": "attn.proj",
        "att.norm1": "norm1",
        "att.norm2": "norm2",
        "att.ff1": "mlp.fc1",
        "att.ff2": "mlp.fc2",
    }
    state = {}
    for key, value in case.state_dict().items():
        stem, _, leaf = key.rpartition(".")
        state[f"{names[stem]}.{leaf}"] = value
    assert error(loaded(block, state)(case.inputs()["x"], grid=(8, 10)), case.outputs["out"]) < 1e-9


def test_soft_stage_4_is_an_ordinary_softmax_block(golden, error):
    case = golden("soft/soft_stage4_block")
    block = Block(64, 2, qkv_bias=True, norm_layer=LayerNorm, attn_layer=Softmax)
    state = case.state_dict()
    for leaf in ("weight", "bias"):
        state[f"attn.qkv.{leaf}"] = torch.cat([state.pop(f"attn.q.{leaf}"), state.pop(f"attn.kv.{leaf}")])
    assert error(loaded(block, state)(case.inputs()["x"]), case.outputs["out"]) < 1e-9


def test_eamlp_block(golden, error):
    case = golden("external_attention/eamlp_block_d48_h3")
    block = Block(48, 3, mlp_ratio=2.0, norm_layer=nn.LayerNorm, attn_layer=ExternalAttentionMultihead)
    block.attn.query.bias = nn.Parameter(torch.zeros(192))  # always on in the published code
    names = {"trans_dims": "query", "linear_0.weight": "memory_k", "linear_1.weight": "memory_v"}
    names["linear_1.bias"] = "memory_v_bias"
    state = {}
    for key, value in case.state_dict().items():
        if key == "attn.linear_0.bias":  # cancels in the softmax over tokens
            continue
        value = value.T if key == "attn.linear_1.weight" else value
        for published, ours in names.items():
            key = key.replace(f"attn.{published}", f"attn.{ours}")
        state[key] = value
    assert error(loaded(block, state)(case.inputs()["x"]), case.outputs["out"]) < 1e-9
