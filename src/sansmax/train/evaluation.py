"""What a network makes of the held-out images, and figures of it."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from .guard import Interrupted, Signals

__all__ = ["evaluate", "scores"]


@torch.inference_mode()
def evaluate(
    network: nn.Module, task, made: Accelerator, batch_size: int = 256, signals: Signals | None = None
) -> Tensor:
    """The task's verdicts on all held-out images, one row each, in their order, on every process.

    Args:
        batch_size: images of one forward pass.
        signals: leaves with Interrupted once one has come.
    """
    network.eval()
    rows = [torch.empty(0, 4, dtype=torch.float64)]
    for batch in task.val_batches(made.process_index, made.num_processes, batch_size):
        with made.autocast():
            outputs = network(batch.images)
        rows.append(task.verdict(outputs, batch))
        if signals is not None and signals.name:
            raise Interrupted(f"interrupted by {signals.name} during an evaluation, which will be repeated")
    rows = [some for some in rows if len(some)]
    parts = gather_object([torch.cat(rows)] if rows else []) if made.num_processes > 1 else [torch.cat(rows)]
    verdicts = torch.cat(parts)
    return verdicts[verdicts[:, 0].argsort(stable=True)]


def scores(verdicts: Tensor) -> dict[str, float]:
    """top1, top5 (where there are more than five classes) and the mean cross-entropy of verdicts."""
    labels, top = verdicts[:, 1:2], verdicts[:, 4 : 4 + (verdicts.shape[1] - 4) // 2]
    found = {"top1": (top[:, :1] == labels).double().mean().item()}
    if top.shape[1] == 5:
        found["top5"] = (top == labels).any(1).double().mean().item()
    return {**found, "loss": verdicts[:, 2].mean().item()}
