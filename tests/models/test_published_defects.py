"""Defects of the published networks that ours do not inherit; each test names one."""

import pytest
import timm
import torch
from torch import nn

from sansmax import models

BLOCKS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "img_size": 32}
STAGES = {"embed_dims": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": 64}
STAGES["num_classes"] = 3
SMALL = {
    "sima_nano_12_p16": BLOCKS,  # SimA and XCiT: an in-place write in the class attention block
    "sima_tiny_12_p16": BLOCKS,
    "xvit_u_p16": {**BLOCKS, "attn_dim": 16},
    "eamlp_7": BLOCKS,
    "soft_tiny": STAGES,
    "soft_norm_tiny": STAGES,
    "eanet_resnet50": {"depths": (1, 1, 1, 1), "num_classes": 3, "channels": (8, 8, 8, 8), "embed_dim": 16},
}
every = pytest.mark.parametrize("name", SMALL)


def small(name):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name])


@every
def test_training_mode_returns_logits_alone(name):
    """SimA's networks return (logits, logits) in training, for a distillation that is off."""
    size = SMALL[name].get("img_size", 33)
    out = small(name).train()(torch.randn(2, 3, size, size))
    assert isinstance(out, torch.Tensor)
    assert out.shape[:2] == (2, 3)


@every
def test_every_parameter_trains(name):
    """SimA's nano networks cannot: they write in place into what the backward pass needs."""
    model, size = small(name).train(), SMALL[name].get("img_size", 33)
    model(torch.randn(2, 3, size, size)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@every
def test_batch_norms_are_plain(name):
    """SimA, XCiT and EANet hard-wire SyncBatchNorm, which fails without a process group on some devices."""
    model = small(name)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules()) == norms


@every
def test_an_image_does_not_depend_on_its_batch_mates(name):
    """SOFT's step size for Newton's method, and its norm, are taken over the whole batch."""
    model, size = small(name).eval().double(), SMALL[name].get("img_size", 33)
    x = torch.randn(3, 3, size, size, dtype=torch.float64)
    x[1:] *= torch.tensor([1e-2, 1e2]).view(2, 1, 1, 1)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batchwise", [False, True])
@pytest.mark.parametrize("name", ["soft_tiny", "soft_norm_tiny"])
def test_newtons_step_size_is_the_images_own(name, batchwise):
    """Published: one of the whole batch, kept as a parity mode; seen where Newton has not converged."""
    options = {"mechanism_args": {"batchwise": batchwise, "iterations": 2}, "inverse": "norm"}
    torch.manual_seed(0)
    model = timm.create_model(name, **STAGES, **options).eval().double()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    x[1] *= 1e2
    alone = torch.allclose(model(x)[:1], model(x[:1]), rtol=1e-9, atol=1e-11)
    assert alone != batchwise


@pytest.mark.parametrize("name", ["eamlp_7", "eanet_resnet50"])
def test_memories_are_two_parameters_that_start_equal(name):
    """The published memories are one storage on the CPU: a checkpoint's M_v then overwrites its M_k."""
    layer = next(layer for layer in small(name).mixers().values() if hasattr(layer, "tie"))
    assert torch.equal(layer.memory_k, layer.memory_v)
    assert layer.memory_k.untyped_storage().data_ptr() != layer.memory_v.untyped_storage().data_ptr()
    model, state = small(name), {k: t + 1 for k, t in small(name).state_dict().items()}
    models.load_published(model, state)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


def test_other_than_three_channels():
    """SimA's and XCiT's stems ignore in_chans."""
    assert timm.create_model("sima_nano_12_p16", **BLOCKS, in_chans=5)(torch.randn(1, 5, 32, 32)).shape == (
        1,
        3,
    )


def test_double_and_half_precision():
    """SimA's Fourier table is float32 and its network fails in any other precision."""
    model = timm.create_model("sima_nano_12_p16", **BLOCKS).eval()
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype)(torch.randn(1, 3, 32, 32, dtype=dtype)).dtype == dtype
