"""What a network makes of the held-out samples."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..tasks._task import Batch, Task

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    task: Task,
    made: Accelerator,
    batch_size: int = 256,
    between: Callable[[], Any] = lambda: None,
) -> Tensor:
    """The task's verdicts on all held-out samples, in their order, on every process.

    Args:
        batch_size: samples of one forward pass.
        between: called after every batch.

    Raises:
        ValueError: there are no held-out samples, or the network gives something else than the task asks.
    """
    network.eval()
    rows: list[Tensor] = []
    for batch, wanted in _batches(network, task, made, batch_size):
        with made.autocast():
            outputs = task.outputs(network, batch)
        if wanted:
            rows.append(task.verdict(outputs, batch))
        between()
    parts = gather_object(rows) if made.num_processes > 1 else rows
    if not parts:
        raise ValueError(
            f"data: expected held-out {task.unit} that can be read, got none; check data.root and "
            "data.val_split"
        )
    verdicts = torch.cat(parts)
    return verdicts[verdicts[:, 0].argsort(stable=True)]


def _batches(
    network: nn.Module, task: Task, made: Accelerator, batch_size: int
) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, and whether they count. Where weights are gathered from all processes (FSDP),
    one that has no more goes on with the first while another has."""
    given = task.val_batches(made.process_index, made.num_processes, batch_size)
    batches = (batch for batch in given if len(batch))
    together = isinstance(network, FSDPModule) and made.num_processes > 1
    spare = None
    while True:
        batch = next(batches, None)
        going: Any = torch.tensor(float(batch is not None), device=made.device)
        if not (made.reduce(going) if together else going):
            return
        spare = batch or spare or next(iter(task.val_batches(0, 1, 1)))
        yield spare, batch is not None
