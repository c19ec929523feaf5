"""Any trunk with any mechanism, and softmax in them as timm has it."""

import pytest
import timm
import torch

import sansmax
from sansmax import layers

SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 5},
    "aft_local": {"factor_dim": 5, "window": 4},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}


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


@pytest.mark.parametrize("mechanism", layers.mechanisms())
@pytest.mark.parametrize("trunk", ["vit", "deit", "xcit", "cvt", "pyramid", "t2t"])
def test_families(trunk, mechanism):
    """The bare names of the trunks are their small networks."""
    depth = {"pyramid": {"depths": (1,) * 4}, "cvt": {"depths": (1,) * 3}}.get(trunk, {"depth": 1})
    with torch.device("meta"):
        model = sansmax.create_model(trunk, mechanism, img_size=64, num_classes=3, **depth)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 3)
    kinds = {type(layer) for layer in model.mixers().values()}
    assert layers.mechanism(mechanism) in kinds or (trunk, mechanism) == ("xcit", "softmax")


def test_families_are_softmax_unless_told():
    with torch.device("meta"):
        for trunk in ("vit", "deit", "cvt", "pyramid"):
            kinds = {type(layer) for layer in sansmax.create_model(trunk).mixers().values()}
            assert kinds == {layers.Softmax}
    with pytest.raises(ValueError, match=r"unknown name 'pyramide' .* did you mean 'pyramid'\?"):
        sansmax.create_model("pyramide")


def test_softmax_in_deit_is_timms_own_network():
    words = {"img_size": 48, "num_classes": 7, "depth": 2, "embed_dim": 48}
    for name in ("deit_tiny_patch16_224", "vit_tiny_patch16_224"):
        ours = sansmax.create_model(name, **words).eval()
        theirs = timm.create_model(name, **words).eval()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, 48, 48)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1])


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
