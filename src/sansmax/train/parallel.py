"""Processes and devices: what Accelerate is told, and how a network is copied or shared out."""

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..tasks._data.draws import Part
from . import optim
from .guard import fitting_batch
from .recipe import Run

__all__ = [
    "accelerator",
    "agreed",
    "fitting",
    "gathered",
    "last_backward",
    "load_states",
    "part",
    "placed",
    "states",
    "weights",
]

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
UNIT = 2**16  # parameters from which a block of a list of blocks is gathered and freed by itself


def accelerator(recipe: Run) -> Accelerator:
    """The device and, under torchrun or accelerate launch, the processes of this run.

    Raises:
        ValueError: the device is not there, was chosen otherwise in this process, or lacks the precision.
    """
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: expected a GPU that PyTorch sees, got none; use cpu, or check the driver with "
            "`sansmax env`"
        )
    if recipe.precision == "fp16" and (device == "cpu" or recipe.parallel == "fsdp"):
        where = "on the CPU" if device == "cpu" else "with parallel fsdp"
        raise ValueError(
            f"precision: expected fp32 or bf16 {where}, where losses cannot be scaled, got fp16; use bf16"
        )
    # A run before this one in the process may have had another precision; the processes stay.
    AcceleratorState._reset_state()
    made = Accelerator(
        cpu=device == "cpu",
        mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.partial)],
    )
    if made.device.type != device:
        raise ValueError(
            f"device: expected {device}, got {made.device.type}, to which this process is bound already; "
            "start a new process for another device"
        )
    if recipe.parallel == "fsdp" and made.num_processes == 1 and "RANK" not in os.environ:
        raise ValueError(
            "parallel: expected several processes for fsdp, got one; start with torchrun --nproc-per-node "
            "N -m sansmax train, or use ddp"
        )
    return made


def part(recipe: Run, made: Accelerator, samples: int) -> Part:
    """This process's share of an update; a set smaller than a batch is one batch.

    Raises:
        ValueError: the batch cannot be dealt out evenly, or there are not enough samples.
    """
    pieces = made.num_processes * recipe.accumulate
    paired = 2 * pieces if pieces > 1 or recipe.paired else 1
    size = min(recipe.batch_size, samples // paired * paired)
    if size < 1:
        raise ValueError(
            f"data: expected at least {paired} training samples for {made.num_processes} processes and "
            f"{recipe.accumulate} accumulated batches, got {samples}; use fewer of them"
        )
    return Part(size, recipe.accumulate, made.process_index, made.num_processes, recipe.seed)


def placed(model: nn.Module, recipe: Run, made: Accelerator) -> tuple[nn.Module, ModelEmaV3 | None]:
    """The network on its device, shared out, compiled and so on as the recipe wants, and its average."""
    model.to(made.device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if made.device.type == "cuda" and made.num_processes > 1:
        model = convert_sync_batchnorm(model)
    if recipe.checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(
                f"checkpointing: expected a network with set_grad_checkpointing(), got {recipe.model}, "
                "which has none; leave it out"
            )
        try:
            model.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
        except AssertionError as error:  # timm's networks that cannot
            raise ValueError(
                f"checkpointing: expected a network that can, got {recipe.model} ({error}); leave it out"
            ) from None
    average = optim.average(model, recipe)
    if recipe.parallel == "fsdp":
        model = sharded(model, made)
        if average:
            sharded(average.module, made)
    if recipe.compile:
        model.compile()
    return model, average


def sharded(model: nn.Module, made: Accelerator) -> nn.Module:
    """The network with every parameter shared out among all processes (FSDP2), gathered block by block."""
    mesh = init_device_mesh(made.device.type, (made.num_processes,))
    for parent in list(model.modules()):
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            for block in parent:
                if sum(p.numel() for p in block.parameters()) >= UNIT and not isinstance(block, FSDPModule):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def last_backward(model: nn.Module, made: Accelerator, last: bool) -> AbstractContextManager[Any]:
    """Gradients are exchanged between processes in the last backward pass of an update only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last else made.no_sync(model)


def agreed(made: Accelerator, loss: Tensor, norm: Any, asked: bool) -> tuple[float, float, bool]:
    """Mean loss, gradient norm, and whether a process was asked to stop, the same for all; waits for the
    device."""
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    told: Any = torch.stack([loss.float(), norm.float(), loss.new_tensor(float(asked))])
    if made.num_processes > 1:
        told = made.reduce(told, "mean")
    mean_loss, norm, stop = told.tolist()
    return mean_loss, norm, stop > 0


def gathered(made: Accelerator, entries: list[dict[str, str]]) -> list[dict[str, str]]:
    """Entries of all processes, each once (collective)."""
    everyone = gather_object(entries) if made.num_processes > 1 else entries
    return list({tuple(entry.items()): entry for entry in everyone}.values())


def fitting(network: nn.Module, task: Any, made: Accelerator, share: Part) -> int:
    """Images a process can hold, from the memory that two small batches take (GPU)."""

    def peak(count: int) -> float:
        torch.cuda.reset_peak_memory_stats()
        inputs, targets = next(task.train_batches(0, 0, Part(2 * count)))
        with made.autocast():
            outputs = network(inputs)
        task.loss(outputs, targets).backward()
        network.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated()

    if made.num_processes > 1 or share.piece < 4 or task.train_size < share.piece:
        return 0
    capacity = torch.cuda.get_device_properties(made.device).total_memory
    return 2 * fitting_batch(peak, capacity, share.piece // 2)


def weights(model: nn.Module) -> dict[str, Any]:
    """The state dict on the CPU, whole and with the network's own names however it is wrapped
    (collective)."""
    return get_model_state_dict(model, options=WHOLE)


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimiser, whole: what any number of processes can load (collective)."""
    # To tell the state of an optimiser that has none yet, PyTorch would let it take a step.
    kept = get_optimizer_state_dict(model, optimizer, options=WHOLE) if optimizer.state else {}
    return {"model": weights(model), "optimizer": kept}


def load_states(model: nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """What `states` gave, into a network wrapped in any way (collective)."""
    set_model_state_dict(model, state["model"], options=StateDictOptions(full_state_dict=True))
    if optimizer is not None and state["optimizer"]:
        # Not strict: a parameter that never had a gradient has no state, before and after.
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        for name, parameter in getattr(model, "module", model).named_parameters():
            if name not in state["optimizer"]["state"]:
                optimizer.state.pop(parameter, None)
