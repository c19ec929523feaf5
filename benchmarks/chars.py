"""Bits per character with every causal mechanism: one network, recipe, seed and budget; memory and speed.

    python benchmarks/chars.py --root FOLDER --out results/chars-cpu.json

FOLDER holds train.*, valid.* and test.*. What is finished is kept: the same command goes on. Each run has a
process of its own, whose largest resident set is the training's memory.
"""

import dataclasses
import json
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro

from sansmax.bench import measure
from sansmax.models import Decoder
from sansmax.tasks._recipes.chars import Recipe, TextData
from sansmax.tasks.chars import build
from sansmax.train.checkpoint import read_json, write_json
from sansmax.train.recipe import Optim

WINDOWS = (1, 8, 32, 128)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "aft_simple": ("aft_simple", {}),
    **{f"aft_local, window {s}": ("aft_local", {"window": s, "factor_dim": 64}) for s in WINDOWS},
    "aft_conv, kernel 32": ("aft_conv", {"kernel_size": 32}),
    "sima": ("sima", {"token_scale": 64}),
    "xnorm": ("xnorm", {}),
    "softmax": ("softmax", {}),
}


def recipe(name: str, root: str, out: str, words: dict[str, Any]) -> Recipe:
    """Of one of RUNS."""
    mechanism, options = RUNS[name]
    return Recipe(
        mechanism=mechanism,
        model_args={"depth": 3, "embed_dim": 128, "num_heads": 4, "mechanism_args": options},
        tokens=256,
        dropout=0.0,
        epochs=4,
        batch_size=16,
        data=TextData(
            root=root, val_split="test", val_bytes=words["test_bytes"], sequences=words["sequences"]
        ),
        optim=Optim(
            lr=3e-3, lr_batch=None, weight_decay=0.1, clip=1.0, per="update", warmup=0.2, min_lr=1e-5
        ),
        out=out,
        seed=words["seed"],
        resume=True,
    )


def train_one(name: str, root: str, out: str, words: dict[str, Any]) -> dict[str, Any]:
    """A run, its decoding, and what it took."""
    from sansmax.train.run import run
    from sansmax.train.trained import evaluate_run, load_trained

    def resident() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    made, libraries = recipe(name, root, out, words), resident()
    outcome = run(made)
    memory = resident()
    trained = load_trained(out)
    slid = dataclasses.replace(made, stride=made.tokens // 2)
    network: Any = trained.model
    return {
        "bpc": outcome.score,
        "context": 0,
        "bpc_stride_half": evaluate_run(trained, slid)[1]["bpc"],
        "curve": outcome.curve,
        "train_rss_gib": memory,
        "libraries_rss_gib": libraries,
        "state_bytes": 4 * sum(layer.state_size(made.tokens) for layer in network.mixers()),
        "params": sum(p.numel() for p in network.parameters()),
    }


def speeds(seconds: float) -> dict[str, dict[str, Any]]:
    """Training: tokens a second, forward and backward of 16 sequences of 256. Decoding: microseconds for a
    token behind 200. Forms in turn."""
    chance = torch.Generator().manual_seed(0)
    batch = torch.randint(256, (16, 256), generator=chance)
    networks = {
        name: build(recipe(name, "", "", {"test_bytes": 1, "sequences": 1, "seed": 0}), []) for name in RUNS
    }

    def learn(network: Decoder) -> None:
        logits = network(batch)
        F.cross_entropy(logits.flatten(0, 1), batch.flatten()).backward()

    @torch.inference_mode()
    def states(network: Decoder) -> Any:
        state = network.eval().init_state()
        for token in batch[0, :200]:
            state = network.step(token[None], state)[1]
        return state

    @torch.inference_mode()
    def decode(network: Decoder, state: Any) -> None:
        network.step(batch[0, :1], state)

    learned = measure.interleaved({k: lambda n=n: learn(n) for k, n in networks.items()}, seconds=seconds)
    behind = {k: states(n) for k, n in networks.items()}
    calls = {k: lambda k=k: decode(networks[k], behind[k]) for k in networks}
    decoded = measure.interleaved(calls, seconds=seconds)
    return {
        name: {
            "tokens_per_s": measure.spread([batch.numel() / t for t in learned[name]]),
            "decode_us": measure.spread(decoded[name], 1e6),
        }
        for name in networks
    }


def main(
    root: str,
    out: str = "chars.json",
    runs: str = "runs",
    names: tuple[str, ...] = (),
    sequences: int = 3200,
    test_bytes: int = 200_000,
    seed: int = 0,
    seconds: float = 40.0,
) -> None:
    """Trains, scores the first `test_bytes` test bytes and writes the table.

    Args:
        root: folder of the text.
        names: of RUNS (default: all).
        sequences: of 256 bytes, in each of four epochs.
        seconds: for either of the two speeds.
    """
    found: dict[str, Any] = read_json(Path(out)) or {"rows": {}}
    words = {"sequences": sequences, "test_bytes": test_bytes, "seed": seed}
    for name in names or RUNS:
        if name in found["rows"]:
            continue
        folder = f"{runs}/{''.join(c if c.isalnum() else '_' for c in name)}"
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found["rows"][name] = row = pool.apply(train_one, (name, root, folder, words))
        plain = recipe(name, Path(root).name, "", words).to_json()
        found |= {"recipe": plain, "settings": words, "commit": measure.commit()}
        found |= {"machine": measure.machine(), "versions": measure.versions()}
        write_json(Path(out), found)
        print(name, json.dumps({k: v for k, v in row.items() if k != "curve"}), flush=True)
    found["speed"] = speeds(seconds)
    write_json(Path(out), found)


if __name__ == "__main__":
    tyro.cli(main)
