"""A generator and its discriminator as copies in two processes: either rests in the other's updates."""

import json
import math
from dataclasses import replace

import torch
from forked import run_recipe, together

from sansmax import recipes
from sansmax.tasks import _features, generation
from sansmax.train.recipe import Data


def test_two_processes_hold_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(_features, "EPOCHS", 1)
    words = {"epochs": 1, "device": "cpu", "log_every": 1, "d_steps": 2, "data": Data(num_samples=224)}
    recipe = replace(recipes.recipe("generation_sima"), out=str(tmp_path / "two"), **words)
    together(2, compared, recipe)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train"] * 7 + ["eval"]
    assert all(math.isfinite(line["loss"]) for line in lines[:-1])


def compared(recipe):
    """A run whose weights are the same in both processes, and not those that it began with."""
    build, made = generation.build, []

    def noted(*words):
        network = build(*words)
        made.append((network, [p.detach().clone() for p in network.parameters()]))
        return network

    generation.build = noted
    run_recipe(recipe)
    ((network, before),) = made
    for half in (network.generator, network.discriminator):
        assert not torch.equal(half.blocks[0].conv1.bias, torch.zeros_like(half.blocks[0].conv1.bias))
    for parameter, old in zip(network.parameters(), before, strict=True):
        both = [torch.empty_like(old) for _ in range(2)]
        torch.distributed.all_gather(both, parameter.detach().contiguous())
        assert torch.equal(*both)
