"""The ViT trunk with every mechanism (found by file name): timm's interface, any size, clear refusals."""

import copy
import pickle

import pytest
import timm
import torch

import sansmax
from sansmax import layers, models

MECHANISMS = layers.mechanisms()
SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 5},
    "aft_local": {"factor_dim": 5, "window": 4},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}
every = pytest.mark.parametrize("name", MECHANISMS)


def make(name, trunk="vit_mini", **words):
    torch.manual_seed(0)
    words = {"img_size": (24, 16), "num_classes": 5, "embed_dim": 24, "depth": 2, **words}
    model = sansmax.create_model(trunk, mechanism=name, mechanism_args=SMALL.get(name), **words)
    for layer in model.mixers().values() if isinstance(model, models.ViT) else ():
        for parameter in layer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every
@pytest.mark.parametrize("class_token", [True, False])
def test_trains_at_a_non_square_size(name, class_token):
    model = make(name, class_token=class_token, drop_path_rate=0.1)
    assert isinstance(model, models.ViT)
    assert model.global_pool == ("token" if class_token else "avg")
    assert len(model.mixers()) == 2
    for layer in model.mixers().values():
        assert type(layer) is MECHANISMS[name]
        if layer.traits.needs:
            assert (layer.grid, layer.num_prefix_tokens) == ((6, 4), int(class_token))
    x = images(3, 3, 24, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(x)
        assert logits.shape == (3, 5)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 4, 2]))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    unused = {f"{k}.{p}" for k, layer in model.mixers().items() for p in layer.unused}
    # The class token of the last block reads no convolution: that block's may be idle.
    dead = {k for k, p in model.named_parameters() if p.grad.abs().max() == 0 and "blocks.1.attn" not in k}
    assert dead <= unused
    model.eval()
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)


@every
def test_another_size(name):
    model = make(name).eval()
    before = model(images(2, 3, 24, 16))
    model.set_input_size((24, 16))
    assert torch.equal(model(images(2, 3, 24, 16)), before)
    model.set_input_size(img_size=(20, 28))
    assert model(images(2, 3, 20, 28)).shape == (2, 5)
    optimised = {id(p) for p in model.parameters()}
    assert all(id(p) in optimised for layer in model.mixers().values() for p in layer.parameters())
    dynamic = make(name, dynamic_img_size=True).eval()
    fixed = make(name).eval()
    for size in ((20, 28), (24, 16), (4, 4), (40, 8)):
        x = images(2, 3, *size)
        got = dynamic(x)
        assert got.shape == (2, 5)
        again = copy.deepcopy(fixed)
        again.set_input_size(size)
        torch.testing.assert_close(again(x), got, msg=str(size))
        (features,) = dynamic.forward_intermediates(x, 1, intermediates_only=True)
        assert features.shape == (2, 24, size[0] // 4, size[1] // 4)
    if MECHANISMS[name].traits.needs:
        with pytest.raises(ValueError, match=r"patch_drop_rate must be 0 because mechanism"):
            make(name, patch_drop_rate=0.5)
    else:
        dropped = make(name, dynamic_img_size=True, patch_drop_rate=0.5)
        assert dropped(images(2, 3, 20, 28)).shape == (2, 5)


@every
def test_timms_interface(name):
    model = make(name, reg_tokens=2).eval()
    x = images(2, 3, 24, 16)
    final, maps = model.forward_intermediates(x, indices=[0, 1])
    assert final.shape == (2, 27, 24)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 6, 4)] * 2
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    want = model(x)
    model.set_grad_checkpointing()
    model.train()
    torch.testing.assert_close(model(x), want)
    model(x).sum().backward()
    model.set_grad_checkpointing(False)
    model.eval()
    assert "pos_embed" in model.no_weight_decay()
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()} | {"dist_token"}
    assert set(model.group_matcher()) == {"stem", "blocks"}
    keep = torch.ones(2, 1, 1, 27, dtype=torch.bool)
    keep[0, ..., 5] = False
    masked = model(x, attn_mask=keep)
    torch.testing.assert_close(masked[1], want[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masked[0], want[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), want)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    pyramid = make(name, features_only=True, out_indices=(0, 1)).eval()
    assert [tuple(m.shape) for m in pyramid(x)] == [(2, 24, 6, 4)] * 2
    assert isinstance(pyramid.model, models.ViT)


@every
def test_checkpoints_round_trip(name, tmp_path):
    model = make(name).eval()
    x = images(2, 3, 24, 16)
    other = make(name, num_classes=5)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = make_plain(name, checkpoint_path=str(tmp_path / "weights.pt"))
    for twin in (other.eval(), loaded.eval()):
        assert torch.equal(twin(x), model(x))


def make_plain(name, **words):
    words = {"img_size": (24, 16), "num_classes": 5, "embed_dim": 24, "depth": 2, **words}
    return sansmax.create_model("vit_mini", name, mechanism_args=SMALL.get(name), **words)


def test_softmax_is_timms_own_network():
    words = {"img_size": 48, "num_classes": 7, "depth": 2, "reg_tokens": 1}
    ours = sansmax.create_model("vit_tiny_patch16_224", mechanism="softmax", **words).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", **words).eval()
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 48, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    for name in ("sima", "aft_simple"):
        sansmax.create_model("vit_tiny_patch16_224", name, **words).load_state_dict(theirs.state_dict())


def test_initial_values_follow_the_final_size():
    model = sansmax.create_model("vit_mini", "aft_full", img_size=64, depth=1)
    table = model.blocks[0].attn.bias_u
    assert table.shape == (257, 128)
    assert table.std().item() == pytest.approx(0.01, rel=0.02)  # a resampled one would be flatter
    assert "blocks.0.attn.bias_u" in model.no_weight_decay()
    assert make_plain("xnorm").blocks[1].attn.gamma.tolist() == [1, 1, 1]


def test_mechanism_args_override_what_the_trunk_passes():
    model = sansmax.create_model(
        "deit_tiny_patch16_224",
        "aft_conv",
        mechanism_args={"num_heads": 12, "kernel_size": 5},
        img_size=32,
        depth=1,
    )
    layer = model.blocks[0].attn
    assert (layer.num_heads, layer.w.shape) == (12, (12, 5, 5))
    with pytest.raises(TypeError, match="landmark"):
        sansmax.create_model("vit_mini", "sima", mechanism_args={"landmark": 3})


def test_vit_mini():
    model = timm.create_model("vit_mini", img_size=32)
    assert model.patch_embed.patch_size == (4, 4)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (96, 4, 3)
    assert type(model.blocks[0].attn) is timm.layers.Attention
    assert sansmax.create_model("vit_mini", img_size=8, patch_size=2).patch_embed.grid_size == (4, 4)


def test_unknown_names_and_trunks_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"unknown name 'xnrom'.*did you mean 'xnorm'"):
        sansmax.create_model("vit_mini", "xnrom")
    with pytest.raises(ValueError, match=r"unknown name 'vit_tinny_patch16_224'.*'vit_tiny_patch16_224'"):
        sansmax.create_model("vit_tinny_patch16_224", "sima")
    for trunk in ("deit_tiny_distilled_patch16_224", "vit_base_patch16_xp_224"):
        with pytest.raises(
            ValueError, match="must be timm's VisionTransformer with an attention that can be"
        ):
            sansmax.create_model(trunk, "sima", depth=1, embed_dim=24, num_heads=3)
    for name in ("external", "xnorm"):
        with pytest.raises(ValueError, match="pretrained=True needs the parameters of softmax attention"):
            sansmax.create_model("vit_tiny_patch16_224", name, pretrained=True)
