"""SOFT: the published outputs, fixed landmarks, tables of another size, any mechanism in its pyramid."""

import re

import pytest
import timm
import torch

import sansmax
from sansmax import layers
from sansmax.bench.measure import count_flops
from sansmax.models import load_published

SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 5},
    "aft_local": {"factor_dim": 5, "window": 4},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}


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
