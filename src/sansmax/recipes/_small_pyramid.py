"""A pyramid that a CPU trains."""

from typing import Any

__all__ = ["small_pyramid"]

# What a mechanism needs on few tokens, and none of the published networks has.
OPTIONS = {
    "aft_full": {"factor_dim": 16},
    "aft_local": {"factor_dim": 16, "window": 8},
    "aft_conv": {"kernel_size": 5},
    "soft": {"landmarks": 16},
    "soft_norm": {"landmarks": 16},
}


def small_pyramid(mechanism: str) -> dict[str, Any]:
    """Words for soft_tiny: five blocks of 32 to 128 channels, all with the mechanism."""
    options = {"mechanism_args": dict(OPTIONS[mechanism])} if mechanism in OPTIONS else {}
    return {
        "embed_dims": [32, 64, 128, 128],
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 4],
        "softmax_free": True,
        **options,
    }
