"""Mechanisms in networks of Hugging Face's transformers."""

import copy
import warnings

import pytest
import torch
from torch import nn

import sansmax
from sansmax import layers
from sansmax.adapt import transformers as ours
from sansmax.adapt.distil import recover_layers

hf = pytest.importorskip("transformers", reason="transformers is not installed")

COMMON = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
NETWORKS = {
    "vit": (hf.ViTConfig, hf.ViTModel, {"qkv_bias": False}),
    "deit": (hf.DeiTConfig, hf.DeiTModel, {}),
    "dinov2": (hf.Dinov2Config, hf.Dinov2Model, {}),
    "dinov3": (hf.DINOv3ViTConfig, hf.DINOv3ViTModel, {"num_register_tokens": 2}),
    "siglip": (hf.SiglipVisionConfig, hf.SiglipVisionModel, {}),
}
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
names = pytest.mark.parametrize("name", ["sima", "xnorm", "aft_simple"])
networks = pytest.mark.parametrize("kind", NETWORKS)


@pytest.fixture(autouse=True)
def registered():
    assert sansmax.register_transformers() == ["sansmax:sima", "sansmax:xnorm", "sansmax:aft_simple"]
    ours._warned.update(ours.FUNCTIONS)


def network(kind, implementation="sdpa", **words):
    config, model, own = NETWORKS[kind]
    torch.manual_seed(0)
    made = model(config(**COMMON | own | words, attn_implementation=implementation)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def attentions(model):
    return [module for name, module in model.named_modules() if name.endswith(("attention", "self_attn"))]


@names
@networks
def test_the_function_is_ours_on_the_networks_own_queries(kind, name):
    """Against the operator on what the network's own projections give, in float64."""
    model = network(kind, f"sansmax:{name}").double()
    first = next(m for m in attentions(model) if hasattr(m, "q_proj"))
    seen = []
    first.register_forward_hook(lambda m, args, words, out: seen.append((args, words, out)), with_kwargs=True)
    model(IMAGE.double())
    ((args, words, out),) = seen
    x = args[0] if args else words["hidden_states"]
    heads = [
        getattr(first, f"{part}_proj")(x).unflatten(2, (3, -1)).transpose(1, 2) for part in ("q", "k", "v")
    ]
    if kind == "dinov3":
        from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

        heads[:2] = apply_rotary_pos_emb(*heads[:2], *words["position_embeddings"])
    if name == "aft_simple":
        flat = [t.transpose(1, 2).flatten(2) for t in heads]
        y = sansmax.aft_simple(*flat, backend="reference")
    else:
        y = getattr(sansmax, name)(*heads, backend="reference").transpose(1, 2).flatten(2)
    want = getattr(first, "o_proj", getattr(first, "out_proj", None))(y)
    torch.testing.assert_close(out[0], want, rtol=1e-9, atol=1e-11)


@networks
def test_modules_with_parameters_take_their_place(kind):
    for name in ("sima", "xnorm", "aft_simple", "external", "soft", "aft_conv", "softmax"):
        model = network(kind)
        before = model(IMAGE).last_hidden_state
        state = copy.deepcopy(model.state_dict())
        options = {"landmarks": 4} if name == "soft" else {}
        if kind == "dinov3" and name not in ("sima", "xnorm", "softmax"):
            with pytest.raises(ValueError, match="rotary positions turn queries and keys"):
                sansmax.swap(model, name)
            continue
        model, report = sansmax.swap(model, name, mechanism_args=options)
        assert len(report.swapped) == 2
        after = model(IMAGE).last_hidden_state
        if name == "softmax":  # the same function with the same weights
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        else:
            assert (after - before).abs().max() > 1e-3
        after.square().mean().backward()
        for one in report.swapped:
            for key, parameter in one.after.named_parameters():
                assert parameter.grad is not None, key
        again, _ = sansmax.swap(network(kind), name, mechanism_args=options)
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again(IMAGE).last_hidden_state, after)
        report.undo()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@names
def test_a_function_and_a_module_agree(name):
    """Where the module has no parameters of its own, as xnorm has without gamma."""
    model = network("vit", f"sansmax:{name}")
    want = model(IMAGE).last_hidden_state
    options = {"gamma": False} if name == "xnorm" else {}
    model, _ = sansmax.swap(network("vit"), name, mechanism_args=options)
    torch.testing.assert_close(model(IMAGE).last_hidden_state, want, rtol=1e-4, atol=1e-5)


def test_layers_learn_from_those_of_transformers():
    model, report = sansmax.swap(network("dinov2"), "sima")

    def images():
        for seed in range(4):
            yield torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))

    for one in recover_layers(report, images, images, updates=3):
        assert one.after < one.before
    assert all(isinstance(model.get_submodule(one.name), layers.SimA) for one in report.swapped)


@names
def test_padding_changes_nothing(name):
    torch.manual_seed(0)
    words = {"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = hf.BertConfig(**words, intermediate_size=32, attn_implementation=f"sansmax:{name}")
    config.attention_probs_dropout_prob = 0.0
    model = hf.BertModel(config).eval()
    tokens = torch.randint(1, 30, (2, 9))
    whole = model(tokens).last_hidden_state
    padded = torch.cat([tokens, torch.randint(1, 30, (2, 4))], 1)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[:, 9:] = 0
    for given in (mask, mask[:, None, None].bool().expand(2, 1, 13, 13)):
        got = model(padded, attention_mask=given).last_hidden_state[:, :9]
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)
    each = torch.rand(2, 1, 13, 13) > 0.5
    with pytest.raises(
        ValueError, match=f"sansmax:{name}: expected a mask of padded tokens, the same for every"
    ):
        model(padded, attention_mask=each)


@names
def test_causal_language_models(name):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        attn_implementation=f"sansmax:{name}",
    )
    model = hf.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 30, (2, 12))
    whole = model(tokens, use_cache=False).logits
    other = tokens.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 30
    torch.testing.assert_close(
        model(other, use_cache=False).logits[:, :8], whole[:, :8], rtol=1e-4, atol=1e-5
    )
    assert (model(other, use_cache=False).logits[:, 8:] - whole[:, 8:]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="set use_cache=False"):
        model.generate(tokens, max_new_tokens=2, use_cache=True, do_sample=False)
    longer = model.generate(tokens, max_new_tokens=2, use_cache=False, do_sample=False)
    assert longer.shape == (2, 14)


def test_what_cannot_be_followed_is_refused():
    words = {"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = network("vit", "sansmax:sima", attention_probs_dropout_prob=0.1).train()
    with pytest.raises(ValueError, match=r"expected attention without attention dropout of 0\.1"):
        model(IMAGE)
    config = hf.MistralConfig(
        **words,
        intermediate_size=32,
        num_key_value_heads=4,
        sliding_window=4,
        attn_implementation="sansmax:sima",
    )
    with pytest.raises(ValueError, match=r"sansmax:sima: expected .*use sdpa"):
        hf.MistralForCausalLM(config).eval()(torch.randint(0, 30, (1, 8)), use_cache=False)
    text = hf.SiglipTextModel(hf.SiglipTextConfig(**words | {"intermediate_size": 32}))
    with pytest.raises(ValueError, match="it needs a grid of tokens, and the network around it tells none"):
        sansmax.swap(text, "aft_conv")


def test_it_warns_once_that_the_function_is_another():
    ours._warned.clear()
    model = network("vit", "sansmax:xnorm")
    with pytest.warns(UserWarning, match="sansmax:xnorm is another function than softmax attention"):
        model(IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IMAGE)


def test_half_precision_and_compiled_networks():
    model = network("dinov2", "sansmax:sima")
    want = model(IMAGE).last_hidden_state
    half = network("dinov2", "sansmax:sima").to(torch.bfloat16)
    assert half(IMAGE.bfloat16()).last_hidden_state.isfinite().all()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGE).last_hidden_state, want)
