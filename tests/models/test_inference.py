"""What optimize_for_inference folds, and that the outputs stay."""

import pytest
import timm
import torch
from timm.layers.layer_scale import LayerScale
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sansmax


def trained(name, **words):
    """A network whose norms and scales are not those of the start."""
    model = timm.create_model(name, num_classes=7, **words)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.weight, 1, 0.2, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    for key, parameter in model.named_parameters():
        if "gamma" in key or "beta" in key:
            nn.init.normal_(parameter, 0.5, 0.3, generator=generator)
    return model.eval()


def count(model, *kinds):
    return sum(isinstance(module, kinds) for module in model.modules())


NETWORKS = {
    # Left over are norms behind the activation of each local patch interaction.
    "sima_nano_12_p16": {"norms": 12, "words": {}},
    "xvit_tiny_p16": {"norms": 0, "words": {}},
    "soft_tiny": {"norms": 0, "words": {}},
    "sima_cvt_13": {"norms": 0, "words": {}},
    "sima_deit_tiny_p16": {"norms": 0, "words": {}},
    "resnet18": {"norms": 0, "words": {}},
    "eamlp_7": {"norms": 0, "words": {}},
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_stay(name, dtype, error):
    import sansmax.models  # registers the names

    size = 64 if name == "resnet18" else 96
    words = {} if name == "resnet18" else {"img_size": size}
    model = trained(name, **words).to(dtype)
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = model(image).detach()
    norms, scales = count(model, _BatchNorm), count(model, LayerScale)
    fast = sansmax.optimize_for_inference(model, example=image[:1])
    assert count(model, _BatchNorm) == norms, "the network itself stays"
    assert torch.equal(model(image), want)
    assert count(fast, LayerScale) == 0 or not scales
    assert count(fast, _BatchNorm) == NETWORKS[name]["norms"]
    assert not [key for key, _ in fast.named_parameters() if key.startswith("blocks") and "gamma1" in key]
    assert error(fast(image), want) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not fast.training


class Forked(nn.Module):
    """The norm takes what something else takes too, unseen by hooks."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Shared(nn.Module):
    """One convolution, two norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x))))


def test_a_network_that_cannot_be_folded_is_refused_or_left_alone(error):
    image = torch.randn(1, 3, 4, 4)
    forked, shared = Forked(), Shared()
    for norm in (forked.norm, shared.first, shared.second):
        norm.running_var.fill_(9)
    with pytest.raises(ValueError, match=r"Forked must stay within.*use the network as it is"):
        sansmax.optimize_for_inference(forked, example=image)
    assert count(sansmax.optimize_for_inference(shared, example=image), _BatchNorm) == 2
    with pytest.raises(ValueError, match=r"Forked has no default_cfg.*pass an input as example"):
        sansmax.optimize_for_inference(forked)


def test_half_precision_takes_float_images(error):
    model = trained("sima_nano_12_p16", img_size=64)
    image = torch.randn(1, 3, 64, 64)
    fast = sansmax.optimize_for_inference(model, example=image, dtype=torch.bfloat16)
    assert fast(image).dtype == torch.bfloat16
    assert error(fast(image), model(image)) < 0.1


@pytest.mark.parametrize(("deviation", "bounded"), [(0.5, True), (4.0, False)])
def test_kernels_of_aft_conv_are_written_down(deviation, bounded, error):
    torch.manual_seed(0)
    words = {"img_size": 20, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 7}
    model = sansmax.create_model("vit_mini", "aft_conv", **words).eval().double()
    layer = model.blocks[0].attn
    nn.init.constant_(layer.gamma, deviation)
    nn.init.constant_(layer.beta, -deviation / 4)
    image = torch.randn(2, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast = sansmax.optimize_for_inference(model, example=image)
    folded = fast.blocks[0].attn
    assert error(fast(image), model(image)) < 1e-12
    assert torch.equal(folded.w, layer.kernel())
    assert {name for name, _ in folded.named_parameters() if "." not in name} == {"w"}
    assert (folded.bounded, layer.bounded) == (bounded, False)
    assert (folded.w.amin() >= -3) == bounded
