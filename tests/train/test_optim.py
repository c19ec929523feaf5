"""Optimisers, groups of weights, rates over time: timm's, against numbers by hand."""

import json
import math

import pytest
import torch

from sansmax import create_model
from sansmax.train import optim
from sansmax.train.loop import train
from small_task import digits, network, recipe


def vit(**words):
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "in_chans": 1, "num_classes": 10}
    return create_model("vit_mini", "sima", **size | words)


def by_name(model, made):
    """The group of every weight."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group for group in made.param_groups for p in group["params"]}


def test_vectors_and_what_the_network_names_do_not_decay():
    model = vit()
    groups = by_name(model, optim.optimizer(model, recipe({"weight_decay": 0.1})))
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or name in model.no_weight_decay()
        assert groups[name]["weight_decay"] == (0.0 if free else 0.1), name


def test_decay_shrinks_matrices_alone():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = optim.optimizer(model, recipe({"weight_decay": 0.1, "lr": 0.5}))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] * (0.95 if value.ndim == 2 else 1.0))


def test_rates_fall_from_the_head_to_the_first_layer():
    """Head 1, the second block and the last norm 1/2, the first block 1/4, patches, positions and class token
    1/8."""
    model = vit()
    words = recipe({"layer_decay": 0.5, "lr": 0.8, "warmup": 0.0}, epochs=4)
    made = optim.optimizer(model, words)
    rates = optim.schedule(made, words, 10)
    expected = {"head": 0.8, "norm": 0.4, "blocks.1": 0.4, "blocks.0": 0.2}
    for update, factor in [(0, 1.0), (20, 0.5), (10, (1 + math.cos(math.pi / 4)) / 2)]:
        rates.step(update)
        for name, group in by_name(model, made).items():
            base = next((rate for prefix, rate in expected.items() if name.startswith(prefix)), 0.1)
            assert group["lr"] == pytest.approx(base * factor), name


def test_the_rate_that_is_told_is_the_full_one_and_equals_the_schedule(tmp_path):
    words = recipe(
        {"layer_decay": 0.5, "lr": 1e-3, "warmup": 0.5, "warmup_lr": 1e-4, "min_lr": 1e-5}, model="vit_mini"
    )
    train(vit(), digits(), words, tmp_path)
    told = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in told if line["kind"] == "train"]
    curve = [1e-5 + (1e-3 - 1e-5) / 2 * (1 + math.cos(math.pi * t / 8)) for t in range(2, 8)]
    assert rates == pytest.approx([1e-4, 1e-4 + (1e-3 - 1e-4) / 2, *curve])


@pytest.mark.parametrize(
    ("changes", "epochs", "expected"),
    [
        # a line over two epochs, then the cosine, of which the line hides the beginning
        (
            {"warmup": 2.0, "warmup_lr": 0.1},
            4,
            [
                0.1,
                0.55,
                *(0.1 + 0.9 * (1 + math.cos(math.pi * t / 4)) / 2 for t in (2, 3)),
            ],
        ),
        ({"sched": "poly"}, 4, [0.1 + 0.9 * (1 - t / 4) ** 0.9 for t in range(4)]),
        ({"sched": "tanh"}, 2, [0.1 + 0.45 * (1 - math.tanh(-7 + 10 * t / 2)) for t in range(2)]),
        ({"sched": "step"}, 200, [0.1 ** (t // 90) for t in range(200)]),
        ({"sched": "multistep", "milestones": (2, 3)}, 5, [1.0, 1.0, 0.1, 0.01, 0.01]),
        ({"sched": "cosine"}, 1, [1.0]),
    ],
    ids=["cosine", "poly", "tanh", "step", "multistep", "one"],
)
@pytest.mark.parametrize("per", ["epoch", "update"])
def test_schedules_by_hand(changes, epochs, expected, per):
    words = recipe({"lr": 1.0, "min_lr": 0.1, "warmup": 0.0, "per": per, **changes}, epochs=epochs)
    made = optim.optimizer(network(), words)
    unit = 1 if per == "epoch" else 3
    rates = optim.schedule(made, words, 3)
    for epoch, rate in enumerate(expected):
        rates.step(epoch * unit)
        assert made.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-6), epoch


def test_with_epochs_the_rate_stands_still_in_one(tmp_path):
    train(network(), digits(), recipe({"per": "epoch", "min_lr": 0.0}, epochs=2), tmp_path)
    told = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in told if line["kind"] == "train"] == [0.01] * 4 + [0.005] * 4


def test_the_rate_grows_with_the_batch():
    words = recipe({"lr": 0.3, "lr_batch": 512}, batch_size=1024)
    assert words.lr() == optim.optimizer(network(), words).param_groups[0]["lr"] == 0.6
    assert recipe({"lr": 0.3, "lr_batch": None}, batch_size=1024).lr() == 0.3


@pytest.mark.parametrize(
    ("optimiser", "expected"),
    [
        ("adamw", {"betas": (0.5, 0.6), "fused": True}),
        ("lion", {"betas": (0.5, 0.6)}),
        ("momentum", {"momentum": 0.7}),
        ("sgdw", {"momentum": 0.7}),
    ],
)
def test_settings_reach_the_optimiser(optimiser, expected):
    betas = (0.5, 0.6) if "betas" in expected else None
    made = optim.optimizer(network(), recipe({"opt": optimiser, "betas": betas, "momentum": 0.7}))
    assert {name: made.param_groups[0][name] for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"opt": "adamww"}, r"unknown name 'adamww' in optimisers: .*; did you mean 'adamw'\?"),
        ({"opt": "fusedadam"}, "unknown name 'fusedadam' in optimisers"),
        ({"sched": "cosin"}, r"unknown name 'cosin' in schedules: .*; did you mean 'cosine'\?"),
        ({"sched": "multistepp"}, r"unknown name 'multistepp' in schedules"),
        ({"layer_decay": 0.5}, r"optim.layer_decay: expected a network with group_matcher\(\)"),
        (
            {"opt": "momentum", "betas": (0.9, 0.99)},
            "optim.betas: expected none with momentum",
        ),
        ({"opt": "sgd", "momentum": 0.0}, "optim.opt: expected settings that sgd takes, got 'Nesterov"),
        ({"betas": (0.9, 1.5)}, "optim.opt: expected settings that adamw takes, got 'Invalid beta"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        train(network(), digits(), recipe(changes))


@pytest.mark.parametrize("opt", ["adafactor", "adopt", "lamb", "lars", "muon", "nadamw", "sgdw"])
def test_other_optimisers_of_timm_go_on_exactly(opt, tmp_path):
    def crash(*_):
        raise KeyError

    words = recipe({"opt": opt, "lr": 1e-3})
    expected = train(network(), digits(), words)
    with pytest.raises(KeyError):
        train(network(), digits(), words, tmp_path, crash)
    outcome = train(network(), digits(), recipe({"opt": opt, "lr": 1e-3}, resume=True), tmp_path)
    assert outcome.curve == expected.curve
