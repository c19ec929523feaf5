"""Segmentation: networks under decoders, EANet's published training, weights to begin with."""

import json
from dataclasses import replace

import pytest
import torch
from street_scenes import FPN, RUN, SMALL, data_of, streets
from torch import nn

from sansmax import layers, recipes
from sansmax.bench.measure import count_flops
from sansmax.models._dense import Dense
from sansmax.models._eanet import EANet
from sansmax.tasks import segmentation
from sansmax.tasks._recipes.segmentation import Recipe
from sansmax.train import optim


@pytest.fixture
def folder(tmp_path):
    return streets(tmp_path)


# Networks.


@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_every_mechanism_has_its_recipes(mechanism):
    for family, classes in (("segmentation", 11), ("camvid", 11)):
        recipe = recipes.recipe(f"{family}_{mechanism}").checked()
        assert Recipe.from_json(recipe.to_json()) == recipe
        network = segmentation.build(recipe, [""] * classes).eval()
        found = {type(m) for m in network.modules() if isinstance(m, layers.Mixer)}
        assert len(found) == 1
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert network(x).shape == (1, 11, 64, 64)
        assert network(x[:, :, :50, :37]).shape == (1, 11, 50, 37)


@pytest.mark.parametrize("mechanism", ["soft", "aft_full"])
def test_a_crop_that_no_stride_divides_has_the_tables_of_what_is_seen(mechanism):
    recipe = replace(recipes.recipe(f"camvid_{mechanism}"), crop_size=(72, 100))
    network = segmentation.build(recipe, ["a", "b", "c"])
    assert {m.grid for m in network.modules() if isinstance(m, layers.Mixer)} == {
        (24, 32),
        (12, 16),
        (6, 8),
        (3, 4),
    }
    seen = segmentation.build(replace(recipe, crop_size=(96, 128)), ["a", "b", "c"])
    small, large = torch.zeros(1, 3, 72, 100), torch.zeros(1, 3, 96, 128)
    assert count_flops(network, small) == count_flops(seen, large)


@pytest.mark.parametrize(
    ("model", "decoder", "words", "args"),
    [
        ("sima_tiny_12_p16_pyramid", "fpn", {"embed_dim": 32, "depth": 4, "num_heads": 2}, FPN),
        (
            "xvit_u_p16_pyramid",
            "upernet",
            {"embed_dim": 32, "depth": 4, "num_heads": 2, "attn_dim": 16},
            {"decoder_channels": 8},
        ),
        (
            "vit_tiny_p16_pyramid",
            "upernet",
            {"embed_dim": 32, "depth": 4, "num_heads": 2},
            {"decoder_channels": 8},
        ),
        ("resnet18", "fpn", {}, FPN),
    ],
)
def test_networks_under_decoders(model, decoder, words, args):
    recipe = replace(RUN, model=model, mechanism=None, decoder=decoder, model_args=words, decoder_args=args)
    network = segmentation.build(recipe, ["a", "b", "c"])
    assert isinstance(network, Dense)
    out = network(torch.randn(2, 3, 48, 64))
    assert out.shape == (2, 3, 48, 64)
    out.square().mean().backward()
    assert all(p.grad is not None for p in network.decoder.parameters())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "eanet_resnet50"}, "decoder: expected none with eanet_resnet50"),
        ({"decoder": ""}, "decoder: expected fpn or upernet with soft_tiny"),
        (
            {"model": "sima_tiny_12_p16"},
            "strides 4, 8, 16 and 32, got sima_tiny_12_p16 .*use sima_tiny_12_p16_pyramid",
        ),
        ({"model": "resnet18"}, "mechanism: expected none with resnet18"),
        ({"model": "nosuch", "mechanism": None}, "model: expected a name of timm or sansmax, got 'nosuch'"),
        ({"decoder_args": {"colour": 3}}, "model_args, decoder_args: expected words"),
    ],
)
def test_networks_that_do_not_fit(changes, match):
    changes = {"model_args": {} if "model" in changes else SMALL, **changes}
    with pytest.raises(ValueError, match=match):
        segmentation.build(replace(RUN, **changes), ["a", "b"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rescale": (2.0, 0.5)}, "rescale: expected two rising"),
        ({"stride": 9}, "stride: expected at most the window"),
        ({"window": 4, "stride": 9}, "stride: expected at most the window's side 4"),
        ({"scales": ()}, "scales: expected a number above 0"),
        ({"crop_size": (0, 4)}, "crop_size: expected a whole number"),
        ({"hflip": 2.0}, "hflip: expected a share"),
        ({"loss": "all"}, "loss: expected one of pixels, labelled"),
    ],
)
def test_settings_that_cannot_be(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(RUN, **changes).checked()


# EANet's recipe.


def eanet(**words):
    small = {
        "depths": [1, 1, 1, 1],
        "stem_width": 8,
        "channels": [8, 12, 16, 20],
        "embed_dim": 32,
        "head_hidden_size": 24,
    }
    recipe = recipes.recipe("eanet_voc_resnet50")
    return replace(recipe, model_args=small, device="cpu", **words)


def test_the_published_groups_and_rates():
    recipe = eanet()
    network = segmentation.build(recipe, [""] * 21)
    assert isinstance(network, EANet)
    optimizer = optim.optimizer(network, recipe)
    assert type(optimizer) is torch.optim.SGD
    convs, norms, biases = optimizer.param_groups
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0, 0.0]
    assert [g["nesterov"] for g in optimizer.param_groups] == [False] * 3
    kinds = {id(p): m for m in network.modules() for p in m.parameters(recurse=False)}
    named = {id(p): name for name, p in network.named_parameters()}
    assert all(isinstance(kinds[id(p)], nn.BatchNorm2d) and p.ndim == 1 for p in norms["params"])
    assert all(named[id(p)].endswith("bias") for p in biases["params"])
    assert {named[id(p)] for p in convs["params"]} >= {
        "neck.3.attn.memory_k",
        "neck.3.attn.memory_v",
        "fc.weight",
    }
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(named)
    schedule = optim.schedule(optimizer, recipe, 661)
    total = 68 * 661
    for update in (0, 10, 22_470, 44_940):
        schedule.step(update)
        want = 9e-3 * (1 - update / total) ** 0.9
        rates = [g["lr"] for g in optimizer.param_groups]
        assert rates == pytest.approx([want, want, 2 * want], rel=1e-6)
    with pytest.raises(ValueError, match="layer_decay: expected none with eanet_resnet50"):
        optim.optimizer(network, replace(recipe, optim=replace(recipe.optim, layer_decay=0.9)))


def test_the_rates_are_the_published_ones(golden):
    """45,000 updates, changed every tenth."""
    case = golden("external_attention/eanet_poly_lr")
    recipe = eanet(epochs=45)
    optimizer = optim.optimizer(segmentation.build(recipe, [""] * 21), recipe)
    schedule = optim.schedule(optimizer, recipe, 1000)
    for update, want in zip(case.inputs()["iters"].tolist(), case.outputs["lr"].tolist(), strict=True):
        schedule.step(update - update % recipe.optim.hold)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(want, rel=1e-9)


def test_the_rate_stands_still_between_its_changes(folder, tmp_path):
    from sansmax.train.run import run

    data, out = data_of(folder, ignore=11), str(tmp_path / "run")
    recipe = eanet(data=data, crop_size=(33, 33), epochs=3, batch_size=3, log_every=1, out=out)
    run(replace(recipe, optim=replace(recipe.optim, hold=4)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates == pytest.approx([9e-3] * 4 + [9e-3 * (1 - 4 / 6) ** 0.9] * 2, rel=1e-5)


def test_weights_of_the_backbone(tmp_path):
    recipe = eanet(weights=str(tmp_path / "resnet.pth"))
    donor = segmentation.build(recipe, ["a", "b"])
    with torch.no_grad():
        for p in donor.parameters():
            p.normal_()
    state = {k: v for k, v in donor.backbone.state_dict().items() if "num_batches" not in k}
    torch.save(state | {"fc.weight": torch.zeros(1000, 80), "fc.bias": torch.zeros(1000)}, recipe.weights)
    network = segmentation.build(recipe, ["a", "b", "c"])
    segmentation.load_weights(network, recipe)
    assert torch.equal(network.backbone.layer4[0].conv2.weight, donor.backbone.layer4[0].conv2.weight)
    torch.save(donor.state_dict(), recipe.weights)
    segmentation.load_weights(network, recipe)
    assert torch.equal(network.neck[0].weight, donor.neck[0].weight)
    assert network.fc.out_channels == 3
    torch.save({"x": torch.zeros(2)}, recipe.weights)
    with pytest.raises(ValueError, match="missing"):
        segmentation.load_weights(network, recipe)


def test_weights_of_a_classifier(tmp_path):
    from sansmax import create_model

    donor = create_model("soft_tiny", "sima", num_classes=4, img_size=64, **SMALL)
    torch.save(donor.state_dict(), tmp_path / "classifier.pt")
    recipe = replace(RUN, weights=str(tmp_path / "classifier.pt"))
    network = segmentation.build(recipe, ["a", "b"])
    segmentation.load_weights(network, recipe)
    own = {k.removeprefix("model."): v for k, v in network.encoder.state_dict().items()}
    assert all(torch.equal(v, donor.state_dict()[k]) for k, v in own.items())
