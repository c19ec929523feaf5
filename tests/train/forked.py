"""Runs in processes of their own, without the seconds that importing everything anew takes."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState

from sansmax.train import run as runs
from sansmax.train.recipe import Augment, Optim, Recipe


def tiny(out: Path, **changes: Any) -> Recipe:
    """Ten updates of an epoch on the digits, with chance everywhere: dropout, mixing, erasing, an average."""
    words: dict[str, Any] = {
        "mechanism": "sima",
        "model_args": {"patch_size": 4, "embed_dim": 24, "depth": 2, "class_token": False, "drop_rate": 0.1},
        "drop_path": 0.1,
        "epochs": 2,
        "batch_size": 128,
        "device": "cpu",
        "augment": Augment(
            scale=(1.0, 1.0), shift=0.1, hflip=0.0, reprob=0.3, mixup=0.5, cutmix=1.0, repeats=2
        ),
        "optim": Optim(lr=3e-3, lr_batch=None, per="update", warmup=0.5, clip=1.0, ema=0.9),
        "out": str(out),
        "log_every": 1,
        "save_every": 3,
    }
    return Recipe(**words | changes)


def start(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`count` forked processes of one group, each calling the function; they are running when this
    returns."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [
        context.Process(target=_child, args=(rank, count, port, function, arguments)) for rank in range(count)
    ]
    for child in children:
        child.start()
    return children


def together(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """The same, waited for; all must end well."""
    children = start(count, function, *arguments)
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * count


def _child(
    rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.setpgrp()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    if count > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_recipe(recipe: Recipe) -> None:
    """In a child; without the report, whose plots take longer than the run."""
    runs.artifacts.report = lambda *_: None
    runs.run(recipe)
