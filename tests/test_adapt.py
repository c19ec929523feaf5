"""Swapped layers learn what the old ones did."""

import pytest
import torch
from torch import nn

import sansmax
from sansmax import layers
from sansmax.adapt.distil import layer_errors, recover_layers

NAMES = [name for name in layers.mechanisms() if name != "softmax"]


def teacher() -> nn.Module:
    torch.manual_seed(0)
    model = sansmax.create_model("vit_mini", "softmax", img_size=(12, 20), num_classes=4, depth=2).eval()
    for block in model.blocks:  # sharper maps than a new network's
        nn.init.normal_(block.attn.qkv.weight, std=0.12)
    return model


def batches(seed: int, count: int = 4):
    def once():
        for number in range(count):
            yield torch.randn(8, 3, 12, 20, generator=torch.Generator().manual_seed(seed + number))

    return once


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_alone_brings_every_layer_nearer(name):
    model, report = sansmax.swap(teacher(), name)
    found = recover_layers(report, batches(0), batches(0), updates=0)
    assert [one.name for one in found] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(one.after < one.before for one in found)
    assert all(one.after < 1.0 for one in found)
    # It is the least of all: any other proj does worse on the images it was found with.
    least = layer_errors(report, batches(0)())
    with torch.no_grad():
        for one in report.swapped:
            one.after.proj.weight.mul_(1.02)
    assert all(value > least[key] for key, value in layer_errors(report, batches(0)()).items())
    assert all(isinstance(block.attn, layers.mechanism(name)) for block in model.blocks)


def test_gradients_bring_them_nearer_still_and_change_nothing_else():
    model = teacher()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    image = torch.randn(2, 3, 12, 20)
    expected = model(image)
    model, report = sansmax.swap(model.train(), "sima")
    closed = recover_layers(report, batches(0), batches(100, 2), updates=0)
    learned = recover_layers(report, batches(0), batches(100, 2), updates=60, lr=3e-3)
    assert all(b.after < 0.9 * a.after for a, b in zip(closed, learned, strict=True))
    assert model.training
    assert all(block.attn.training for block in model.blocks)
    for key, value in model.state_dict().items():
        if ".attn." not in key:
            assert torch.equal(value, kept[key]), key
    assert torch.equal(report.undo().eval()(image), expected)  # the old layers too are as they were
    report.redo()
    assert isinstance(model.blocks[0].attn, layers.SimA)


def test_the_error_is_zero_for_the_old_layer_and_one_for_its_mean():
    model, report = sansmax.swap(teacher(), "sima")
    for one in report.swapped:
        one.after.__class__, one.after.forward = nn.Module, one.before.forward
    assert max(layer_errors(report, batches(5)()).values()) < 1e-10
    model, report = sansmax.swap(teacher(), "sima")
    recover_layers(report, batches(5), batches(5), updates=0)
    with torch.no_grad():
        for one in report.swapped:
            one.after.proj.weight.zero_()
    seen = []
    report.undo().blocks[0].attn.register_forward_hook(lambda *given: seen.append(given[-1]))
    for images in batches(5)():
        model(images)
    report.redo()
    with torch.no_grad():
        report.swapped[0].after.proj.bias.copy_(torch.cat(seen).mean((0, 1)))
    assert layer_errors(report, batches(5)())["blocks.0.attn"] == pytest.approx(1.0, abs=1e-5)


def test_refusals():
    _, report = sansmax.swap(teacher(), "sima")
    with pytest.raises(ValueError, match="batches: expected images, got none"):
        recover_layers(report, batches(0, 0), batches(0, 0))
    with pytest.raises(ValueError, match=r"lr: expected finite losses, got .* lower it from 1e"):
        recover_layers(report, batches(0), batches(9, 1), updates=40, lr=1e30)
    assert isinstance(report._model.blocks[0].attn, layers.SimA)  # nothing is left half-way
