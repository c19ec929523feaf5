"""Networks of one stride with features of four, under segmentation_models_pytorch and torchvision."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from sansmax import models
from sansmax.models._four_scales import FourScales

BLOCKS = {"embed_dim": 32, "depth": 4, "num_heads": 2}
# Each family, small.
FAMILIES = {
    "sima_tiny_12_p16_pyramid": BLOCKS,
    "sima_nano_12_p8_pyramid": BLOCKS,
    "sima_deit_tiny_p16_pyramid": BLOCKS,
    "xvit_u_p16_pyramid": {**BLOCKS, "attn_dim": 16},
    "eamlp_7_pyramid": BLOCKS,
    "aft_full_tiny_p16_pyramid": BLOCKS,
    "aft_conv_tiny_p16_k11_h32_pyramid": {
        **BLOCKS,
        "mechanism_args": {"kernel_size": 3, "num_heads": 8},
    },
    "vit_tiny_p16_pyramid": BLOCKS,
    "soft_tiny": {"embed_dims": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
}
every = pytest.mark.parametrize("name", FAMILIES)


def make(name, **words):
    torch.manual_seed(0)
    own = FAMILIES.get(name) or FAMILIES[f"{name}_pyramid"]
    return timm.create_model(name, **{**own, "img_size": 64, **words})


def test_every_network_of_one_stride_has_the_form():
    registered = set(timm.list_models())
    several = ("soft", "sima_cvt", "eanet")
    expected = [name for name in models.networks() if not name.startswith(several) and "pct" not in name]
    assert len(expected) >= 45
    assert {f"{name}_pyramid" for name in expected} <= registered


@every
def test_features(name):
    channels = [32, 32, 64, 64] if name == "soft_tiny" else [32] * 4
    features = make(name, features_only=True).eval()
    assert features.feature_info.channels() == channels
    for height, width in ((64, 64), (64, 128), (32, 96)):
        got = features(torch.randn(2, 3, height, width))
        shapes = [(2, c, height // s, width // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]
        assert [tuple(y.shape) for y in got] == shapes
    assert all(y.shape[0] == 1 for y in features(torch.randn(1, 3, 50, 33)))
    two = make(name, features_only=True, out_indices=(1, 2)).eval()
    assert [tuple(y.shape[2:]) for y in two(torch.randn(1, 3, 64, 64))] == [(8, 8), (4, 4)]
    sum(y.square().mean() for y in features.train()(torch.randn(2, 3, 64, 64))).backward()
    weights = [(k, p) for k, p in features.named_parameters() if k.startswith("model.necks")]
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in weights)


@every
def test_scales_are_the_blocks_of_the_trunk(name):
    """Stride 16 is a block's own output where patches have 16 pixels, and the trunk classifies as before."""
    if name == "soft_tiny":
        return
    model, x = make(name, num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    trunk = make(name.removesuffix("_pyramid") if "vit_tiny" not in name else name, num_classes=5).eval()
    models.load_published(model, trunk.state_dict())
    assert torch.equal(model(x), trunk(x))
    assert isinstance(model, FourScales)
    assert model.taken == [0, 1, 2, 3]
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    if "vit_tiny" not in name:
        same = (2, 2) if "p16" in name or "eamlp" in name else (1, 1)
        _, blocks = trunk.forward_intermediates(x)
        torch.testing.assert_close(maps[same[0]], blocks[same[1]])
    (tokens,) = model.forward_intermediates(x, [2], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(tokens, maps[2].flatten(2).mT)
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")
    assert "necks" in model.group_matcher()
    model.prune_intermediate_layers([1])
    assert (len(model.blocks), len(model.necks)) == (2, 2)


def test_patches_of_14_pixels_are_refused():
    with pytest.raises(ValueError, match=r"patch_size must be a power of 2 .* got 14"):
        timm.create_model("vit_tiny_p16_pyramid", patch_size=14, img_size=56)


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        ("Unet", "sima_tiny_12_p16_pyramid"),
        ("Unet", "aft_full_tiny_p16_pyramid"),
        ("Unet", "vit_tiny_p16_pyramid"),
        ("UPerNet", "soft_tiny"),
        ("UPerNet", "eamlp_7_pyramid"),
        ("FPN", "xvit_u_p16_pyramid"),
        ("FPN", "sima_nano_12_p8_pyramid"),
        # DPT takes networks of one stride and makes its own.
        ("DPT", "sima_tiny_12_p16"),
        ("DPT", "xvit_u_p16"),
        ("DPT", "eamlp_7"),
        ("DPT", "aft_conv_tiny_p16_k11_h32"),
        ("DPT", "vit_tiny_p16_pyramid"),
    ],
)
def test_decoders_of_segmentation_models(decoder, name):
    torch.manual_seed(0)
    own = FAMILIES.get(name) or FAMILIES[f"{name}_pyramid"]
    words = {key: value for key, value in own.items() if key != "depth"}  # smp's own word
    if name == "aft_conv_tiny_p16_k11_h32":
        words["decoder_readout"] = "ignore"  # it has no class token
    model = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, classes=4, img_size=64, **words).eval()
    x = torch.randn(2, 3, 64, 96)
    out = model(x)
    assert out.shape == (2, 4, 64, 96)
    torch.testing.assert_close(model(x[:1]), out[:1], rtol=1e-3, atol=1e-4)
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("detector", "name"),
    [
        ("RetinaNet", "sima_tiny_12_p16_pyramid"),
        ("RetinaNet", "xvit_u_p16_pyramid"),
        ("RetinaNet", "aft_conv_tiny_p16_k11_h32_pyramid"),
        ("MaskRCNN", "soft_tiny"),
        ("MaskRCNN", "eamlp_7_pyramid"),
        ("MaskRCNN", "aft_full_tiny_p16_pyramid"),
    ],
)
def test_detectors_of_torchvision(detector, name):
    torch.manual_seed(0)
    extra = LastLevelP6P7(16, 16) if detector == "RetinaNet" else None
    backbone = models.FPNBackbone(name, 16, extra_blocks=extra, **FAMILIES[name], img_size=64)
    size = {"min_size": 64, "max_size": 96}
    if detector == "RetinaNet":
        sizes = tuple((side, 2 * side) for side in (8, 16, 32, 64, 128, 256))
        anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
        model = RetinaNet(backbone, 3, anchor_generator=anchors, **size)
    else:
        model = MaskRCNN(backbone, 3, **size)
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 75)]
    targets = [
        {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        }
        for image in images
    ]
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    body = backbone.body
    assert any(p.grad is not None and p.grad.any() for p in body.parameters())
    found = model.eval()(images)
    assert len(found) == 2
    assert found[0]["boxes"].shape[1] == 4
