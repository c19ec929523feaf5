"""Another attention in networks that exist."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention
from torch import nn

import sansmax
from sansmax import layers
from sansmax.layers._parts import HeadsMixer

NAMES = list(layers.mechanisms())
SMALL = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 3, "num_classes": 5}


def vit(**words) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **words}).eval()


def eva(name: str = "vit_small_patch16_rope_224", **words) -> nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(name, **{**SMALL, **words}).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


IMAGE = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "softmax"])
def test_every_mechanism_takes_the_place_of_softmax(name):
    model = vit()
    before = copy.deepcopy(model.state_dict())
    model, report = sansmax.swap(model, name, mechanism_args={"landmarks": 4} if "soft" in name else None)
    assert [one.name for one in report.swapped] == [f"blocks.{i}.attn" for i in range(3)]
    assert all(type(block.attn) is layers.mechanism(name) for block in model.blocks)
    outputs = model(IMAGE)
    assert outputs.isfinite().all()
    outputs.square().mean().backward()
    after = dict(model.named_parameters())
    for one in report.swapped:
        assert ("proj.weight" in one.copied) == (name != "external_multihead")  # four times as wide
        for key in one.copied:
            shared = key if key in dict(one.before.named_parameters()) else None
            if shared:
                assert torch.equal(after[f"{one.name}.{key}"], before[f"{one.name}.{key}"])
    if name in ("sima", "aft_simple", "aft_local", "xnorm"):
        assert all("qkv.weight" in one.copied for one in report.swapped)
    # Another size, where the layer is told the grid of every image.
    other = vit(dynamic_img_size=True)
    sansmax.swap(other, name)
    assert other(torch.randn(1, 3, 40, 16)).shape == (1, 5)


@pytest.mark.parametrize("name", ["sima", "xnorm"])
@pytest.mark.parametrize(
    ("trunk", "words"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
        ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
        ("vit_small_patch16_rope_224", {}),
        ("eva02_tiny_patch14_224", {"scale_attn_inner": True}),
    ],
)
def test_only_the_scores_change(name, trunk, words):
    """The operator in place of scaled_dot_product_attention inside timm's own module gives the same."""
    model = (
        (vit if trunk.startswith("vit_tiny") else eva)(**words)
        if trunk.startswith("vit_tiny")
        else eva(trunk, **words)
    )
    reference = copy.deepcopy(model)

    def operator(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        return getattr(sansmax, name)(q, k, v)

    plain = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = operator
        expected = reference(IMAGE)
    finally:
        F.scaled_dot_product_attention = plain
    sansmax.swap(model, name)
    torch.testing.assert_close(model(IMAGE), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(IMAGE), reference(IMAGE), atol=1e-3)


@pytest.mark.parametrize(
    "attention",
    [
        AttentionRope(24, 4, num_prefix_tokens=1),
        AttentionRope(24, 4, qkv_fused=False, num_kv_heads=2, gated=True, num_prefix_tokens=2),
        AttentionRope(24, 4, attn_head_dim=5, rotate_half=False, qkv_bias=False),
        AttentionRope(24, 3, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm, rotate_half=True),
        EvaAttention(24, 4, scale_norm=False, qkv_fused=False),
        EvaAttention(24, 4, norm_layer=nn.LayerNorm, qkv_bias_separate=True, gated=True),
    ],
    ids=range(6),
)
def test_softmax_in_its_own_place_changes_nothing(attention):
    """All that timm's forms have besides the scores: joined weights, rotations, groups, norms, gates."""
    torch.manual_seed(2)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    model = nn.ModuleDict({"attn": attention}).double().eval()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    prefix = attention.num_prefix_tokens
    rope = torch.randn(9 - prefix, 2 * attention.head_dim, dtype=torch.float64)
    if attention.rotate_half or attention.head_dim % 2:
        rope = None if attention.head_dim % 2 else rope
    expected = attention(x, rope=rope)
    _, report = sansmax.swap(model, "softmax")
    assert isinstance(model["attn"], HeadsMixer)
    torch.testing.assert_close(model["attn"](x, rope=rope), expected, rtol=1e-10, atol=1e-12)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[:, 5:] = False
    torch.testing.assert_close(
        model["attn"](x, rope=rope, attn_mask=keep[:, None, None])[keep],
        attention(x, rope=rope, attn_mask=keep[:, None, None])[keep],
        rtol=1e-10,
        atol=1e-12,
    )
    assert report.undo()["attn"] is attention


def test_layers_by_pattern_and_number_undo_and_again():
    model = vit()
    expected, keys = model(IMAGE), list(model.state_dict())
    _, report = sansmax.swap(model, "aft_full", layers=["blocks.0.*", -1])
    assert [one.name for one in report.swapped] == ["blocks.0.attn", "blocks.2.attn"]
    assert report.left == ["blocks.1.attn"]
    _, again = sansmax.swap(model, "aft_full", layers=[0, 2])
    assert again.swapped == []
    assert again.already == ["blocks.0.attn", "blocks.2.attn"]
    assert report.undo() is model
    assert type(model) is timm.models.vision_transformer.VisionTransformer
    assert torch.equal(model(IMAGE), expected)
    assert list(model.state_dict()) == keys


def test_weights_go_to_a_file_and_back():
    model, other = vit(), vit()
    sansmax.swap(model, "xnorm")
    sansmax.swap(other, "xnorm")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGE), model(IMAGE))
    # sima and softmax have the same keys, so weights of one load into the other.
    plain = vit()
    sansmax.swap(other, "sima")
    plain.load_state_dict(other.state_dict())
    sansmax.swap(other, "softmax")
    torch.testing.assert_close(other(IMAGE), plain(IMAGE), rtol=1e-4, atol=1e-5)


def test_the_report_tells_what_is_kept_new_and_left():
    _, report = sansmax.swap(vit(), "external", layers=0)
    words = str(report)
    assert "blocks.0.attn: Attention -> ExternalAttention, kept proj.weight, proj.bias" in words
    assert "new " in words
    assert "memory_k" in words
    assert "blocks.1.attn: left as it is" in words


@pytest.mark.parametrize(
    ("make", "mechanism", "words", "message"),
    [
        (lambda: timm.create_model("resnet18"), "sima", {}, "in ResNet, got no attention at all"),
        (lambda: timm.create_model("xcit_nano_12_p16_224"), "sima", {}, "XCA is none of timm's Attention"),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224"),
            "sima",
            {},
            "adds a bias for every pair of positions to its scores .relative_position_bias_table",
        ),
        (
            lambda: timm.create_model("beit_base_patch16_224", embed_dim=48, depth=1, num_heads=3),
            "xnorm",
            {},
            "adds a bias for every pair of positions",
        ),
        (eva, "aft_simple", {}, "rotary positions turn queries and keys, of which it has none; use sima"),
        (vit, "sima", {"layers": "block.*"}, r"layers: expected numbers below 3 or patterns of blocks.0"),
        (vit, "sima", {"layers": 3}, "got 3; choose among them"),
        (vit, "simaa", {}, "did you mean 'sima'"),
        (
            lambda: nn.Sequential(timm.layers.attention.Attention(24, 4)),
            "aft_conv",
            {},
            "it needs a grid of tokens, and the network around it tells none",
        ),
        (
            lambda: nn.Sequential(timm.layers.attention.Attention(24, 4, dim_out=12)),
            "sima",
            {},
            "its output has another width than its input",
        ),
    ],
)
def test_refusals(make, mechanism, words, message):
    model = make()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        sansmax.swap(model, mechanism, **words)
    assert [type(m) for m in model.modules()] == before
