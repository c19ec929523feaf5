"""Where a network works."""

import os

import torch

__all__ = ["pick_device"]


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda; under torchrun each process takes a GPU of its own.

    Raises:
        ValueError: another word, or cuda where PyTorch sees no GPU.
    """
    there = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not there):
        raise ValueError(
            f"device: expected auto, cpu or, where PyTorch sees a GPU, cuda, got {name!r}; leave it out"
        )
    if name == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
