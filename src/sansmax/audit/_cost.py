"""What a module computes and keeps, counted."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ._subject import Refused, Subject

__all__ = ["flops_of", "growth", "largest_tensor", "many_tokens"]

LIMIT = 2**27  # bytes of one tensor
MANY = 4096


class _Largest(TorchDispatchMode):
    """Notes the largest storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def largest_tensor(call: Callable[[], Tensor]) -> int:
    """Bytes of the largest tensor that a call makes."""
    with _Largest() as largest:
        call()
    return largest.bytes


def flops_of(call: Callable[[], Tensor]) -> int:
    """What torch counts: products, convolutions and scaled_dot_product_attention."""
    # In its other CPU kernels it counts nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def growth(counts: list[int]) -> float:
    """The exponent of N in counts at N, 2 N and 4 N, constants left out: 1 linear, 2 quadratic."""
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    return math.log2(second / first) if first > 0 and second > 0 else 0.0


def many_tokens(subject: Subject) -> int:
    """MANY tokens, or fewer where they are refused or one tensor would pass LIMIT; 0: no more than now."""
    n = subject.settings.tokens
    module = subject.module()
    try:
        sizes = [largest_tensor(lambda t=t: subject.value(module, subject.input(1, t))) for t in (n, 4 * n)]
    except Refused:
        return 0
    exponent = max(math.log2(sizes[1] / sizes[0]) / 2, 1.0)
    tokens = MANY
    while tokens > 4 * n and sizes[1] * (tokens / (4 * n)) ** exponent > LIMIT:
        tokens //= 2
    while tokens > 4 * n and subject.refusal(tokens):
        tokens //= 2
    return max(tokens, 4 * n)
