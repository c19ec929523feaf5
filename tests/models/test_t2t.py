"""EAMLP and T2T-ViT with External Attention: sizes, the authors' outputs and keys, any image size."""

import math

import pytest
import timm
import torch

import sansmax
from sansmax import layers, models
from sansmax.bench.measure import count_flops
from sansmax.models._t2t import TokensToToken, sinusoid_positions

# Millions of parameters and 10^9 multiply-adds at 224 px, counted on the published code.
EAMLP = {
    "eamlp_7": (6.15, 1.47),
    "eamlp_10": (8.54, 2.01),
    "eamlp_12": (10.14, 2.37),
    "eamlp_14": (29.88, 6.45),
    "eamlp_19": (54.56, 11.60),
    "eamlp_24": (89.46, 18.82),
    "eamlp_t_14": (29.88, 6.45),
    "eamlp_t_19": (54.56, 11.60),
    "eamlp_t_24": (89.46, 18.82),
}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


def small(name="eamlp_7", **words):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, "num_classes": 10, "img_size": 64, **words})


@pytest.mark.parametrize("name", EAMLP)
def test_size_as_published(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        cost = count_flops(model, torch.empty(1, 3, 224, 224)) / 2e9
    parameters, multiply_adds = EAMLP[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    assert round(cost, 2) == multiply_adds


def test_golden(golden, error):
    case = golden("external_attention/eamlp_tiny_64px")
    state, x = case.state_dict() | {"pos_embed": case.outputs["pos_embed"]}, case.inputs()["x"]
    model = small()
    assert error(model.pos_embed, state["pos_embed"]) < 1e-7
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-9)):
        models.load_published(model.to(dtype), {"state_dict": state}).eval()
        with torch.inference_mode():
            x_in = x.to(dtype)
            got = {
                "tokens": model.patch_embed(x_in).flatten(1, 2),
                "final_norm": model.forward_features(x_in),
                "out": model(x_in),
            }
        for key in got:
            assert error(got[key], case.outputs[key]) < tolerance, key


def test_golden_soft_splits(golden, error):
    case = golden("external_attention/eamlp_t2t_module_64px")
    state = {f"tokens_to_token.{key}": value for key, value in case.state_dict().items()}
    renamed = models.T2T.published_state(small(), state)
    module = TokensToToken(64, embed_dim=32).double().eval()
    module.load_state_dict({key.removeprefix("patch_embed."): value for key, value in renamed.items()})
    assert error(module(case.inputs()["x"]), case.outputs["out"]) < 1e-9


def theirs(model, performer=True):
    """The published keys of our network."""
    state = {}
    first, second = ("linear_0", "linear_1") if performer else ("linear_1", "linear_2")
    for key, value in model.state_dict().items():
        if key.startswith("patch_embed.token_layers."):
            number, _, rest = key.removeprefix("patch_embed.token_layers.").partition(".")
            rest = rest.replace("query.", "attn.q_linear.")
            rest = rest.replace("attn.memory_v_bias", f"attn.{second}.bias")
            rest = rest.replace("attn.memory_k", f"attn.{first}.weight")
            rest = rest.replace("attn.memory_v", f"attn.{second}.weight")
            key = f"tokens_to_token.attention{int(number) + 1}.{rest}"
        else:
            for ours, published in (
                ("patch_embed.proj.", "tokens_to_token.project."),
                ("attn.query.", "attn.trans_dims."),
                ("attn.memory_k_bias", "attn.linear_0.bias"),
                ("attn.memory_v_bias", "attn.linear_1.bias"),
                ("attn.memory_k", "attn.linear_0.weight"),
                ("attn.memory_v", "attn.linear_1.weight"),
            ):
                key = key.replace(ours, published)
        state[key] = (
            value.mT
            if key.endswith((f"{second}.weight", "linear_1.weight"))
            and (key.startswith("blocks") or f"{second}." in key)
            else value
        )
    return state


@pytest.mark.parametrize("name", ["eamlp_7", "eamlp_t_14"])
def test_the_authors_checkpoints(name):
    source, x = small(name).eval(), torch.randn(1, 3, 64, 64)
    for parameter in source.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = theirs(source, performer="_t_" not in name)
    assert "tokens_to_token.attention1.attn.q_linear.weight" in state
    twin = models.load_published(small(name).eval(), {"state_dict": state})
    assert torch.equal(twin(x), source(x))
    # A network without a place for the dead bias gives the same logits.
    plain = models.load_published(small(name, mechanism_args={"dead_bias": False}).eval(), state)
    torch.testing.assert_close(plain(x), source(x))
    # Positions of another size are resampled.
    larger = models.load_published(small(name, img_size=(96, 64)).eval(), state)
    x = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(larger(x), source(x))
    del state["blocks.0.attn.proj.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(blocks.0.attn.proj.weight\)"):
        models.load_published(twin, state)


def test_loading_does_not_corrupt_the_memories():
    """The published constructor makes M_k and M_v one storage: loading then overwrites M_k with M_v."""
    model = small()
    layer = model.patch_embed.token_layers[0].attn
    assert torch.equal(layer.memory_k, layer.memory_v)
    assert layer.memory_k.data_ptr() != layer.memory_v.data_ptr()
    state = {key: torch.randn_like(value) for key, value in theirs(model).items()}
    models.load_published(model, state)
    prefix = "tokens_to_token.attention1.attn."
    assert torch.equal(layer.memory_k, state[f"{prefix}linear_0.weight"])
    assert torch.equal(layer.memory_v, state[f"{prefix}linear_1.weight"].mT)


def test_training_returns_logits_and_drops_in_the_token_layers():
    model = small().train()
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 10)
    assert not torch.equal(model.patch_embed(x), model.patch_embed(x))
    transformer = small("eamlp_t_14").train()
    assert torch.equal(transformer(x), transformer(x))
    model(x).square().sum().backward()
    assert model.pos_embed.grad is None
    # What is the same for all tokens in front of a softmax over them cancels: norm1's bias and the query's.
    unused = {f"{k}.{p}" for k, layer in model.mixers().items() for p in (*layer.unused, "memory_k_bias")}
    unused |= {f"blocks.{i}.norm1.bias" for i in range(2)}
    idle = {k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12}
    assert idle <= unused | {"pos_embed"}


@pytest.mark.parametrize("size", [(64, 64), (65, 70), (16, 48), (100, 31), (3, 3)])
def test_any_image_size(size):
    model = small().eval()
    x = torch.randn(2, 3, *size)
    want = model(x)
    assert want.shape == (2, 10)
    fixed = small(dynamic_img_size=False).eval()
    fixed.set_input_size(size)
    torch.testing.assert_close(fixed(x), want)
    grid = fixed.patch_embed.grid_size
    (features,) = model.forward_intermediates(x, 1, intermediates_only=True)
    assert features.shape == (2, 32, *grid)
    torch.testing.assert_close(model(x[:1]), want[:1], rtol=1e-4, atol=1e-5)


def test_sizes_and_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the image must be 64 x 64, as the network was built"):
        small(dynamic_img_size=False)(torch.randn(1, 3, 48, 64))
    with pytest.raises(ValueError, match="at least 3 x 3, got 2 x 9"):
        small()(torch.randn(1, 3, 2, 9))
    with pytest.raises(ValueError, match="patch_size must be 16"):
        small(patch_size=8)


def test_positions_are_a_fixed_table():
    table = sinusoid_positions(5, 6)
    assert table[0, 3, 4].item() == pytest.approx(math.sin(3 / 10000 ** (4 / 6)), rel=1e-14)
    assert table[0, 3, 5].item() == pytest.approx(math.cos(3 / 10000 ** (4 / 6)), rel=1e-14)
    model = small()
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model.pos_embed[0].double(), sinusoid_positions(17, 32)[0], rtol=0, atol=1e-7)
    model.set_input_size((96, 64))
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_any_mechanism_in_blocks_and_token_layers(mechanism):
    own = {"aft_conv": {"kernel_size": 3}, "aft_full": {"factor_dim": 5}, "aft_local": {"window": 3}}
    own |= {name: {"landmarks": 4} for name in ("soft", "soft_norm")}
    args = own.get(mechanism)
    for tokens in ({}, {"token_mechanism": mechanism, "token_args": args}):
        model = sansmax.create_model(
            "eamlp_7", mechanism, mechanism_args=args, num_classes=4, img_size=(32, 48), **SMALL, **tokens
        )
        x, y = torch.randn(4, 3, 32, 48), torch.arange(4)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert model.eval()(torch.randn(1, 3, 50, 35)).shape == (1, 4)


def test_t2t_ea_has_external_attention_in_the_token_layers_alone():
    model = timm.create_model("t2t_ea_14", **SMALL, num_classes=4, img_size=64)
    kinds = [type(layer).__name__ for layer in model.mixers().values()]
    assert kinds == ["ExternalAttention"] * 2 + ["Softmax"] * 2
    assert model.blocks[0].attn.qkv.bias is None
