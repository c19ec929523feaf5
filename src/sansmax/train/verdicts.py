"""What a network makes of the held-out images, and figures of it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..tasks._data.batches import Batch

__all__ = ["evaluate", "scores"]


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    task: Any,
    made: Accelerator,
    batch_size: int = 256,
    between: Callable[[], Any] = lambda: None,
) -> Tensor:
    """The task's verdicts on all held-out images, one row each, in their order, on every process.

    Args:
        batch_size: images of one forward pass.
        between: called after every batch.

    Raises:
        ValueError: there are no held-out images, or the network gives no logits.
    """
    network.eval()
    rows: list[Tensor] = []
    for batch, wanted in _batches(network, task, made, batch_size):
        with made.autocast():
            outputs = network(batch.images)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise ValueError(
                f"model: expected logits (B, classes) in evaluation, got "
                f"{tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__}; choose "
                "a network that classifies images"
            )
        if wanted:
            rows.append(task.verdict(outputs, batch))
        between()
    parts = gather_object(rows) if made.num_processes > 1 else rows
    if not parts:
        raise ValueError(
            "data: expected held-out images that can be read, got none; check data.root and data.val_split"
        )
    verdicts = torch.cat(parts)
    return verdicts[verdicts[:, 0].argsort(stable=True)]


def _batches(
    network: nn.Module, task: Any, made: Accelerator, batch_size: int
) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, and whether they count. Where weights are gathered from all processes (FSDP),
    one that has no more goes on with the first while another has."""
    given = task.val_batches(made.process_index, made.num_processes, batch_size)
    batches = (batch for batch in given if len(batch.images))
    together = isinstance(network, FSDPModule) and made.num_processes > 1
    spare = None
    while True:
        batch = next(batches, None)
        going: Any = torch.tensor(float(batch is not None), device=made.device)
        if not (made.reduce(going) if together else going):
            return
        spare = batch or spare or next(iter(task.val_batches(0, 1, 1)))
        yield spare, batch is not None


def scores(verdicts: Tensor, classes: int) -> dict[str, float]:
    """top1, top5 (where there are more than five classes) and the mean cross-entropy of verdicts."""
    labels, top = verdicts[:, 1:2], verdicts[:, 4 : 4 + (verdicts.shape[1] - 4) // 2]
    found = {"top1": (top[:, :1] == labels).double().mean().item()}
    if classes > 5:
        found["top5"] = (top == labels).any(1).double().mean().item()
    return {**found, "loss": verdicts[:, 2].mean().item()}
