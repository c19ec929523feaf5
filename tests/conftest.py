"""Where golden cases come from: beside the checkout (../shared/golden) or $SANSMAX_GOLDEN."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several processes share the cores

# The first backward decides on autograd's threads. Behind torch.export it would start some, for devices of
# its pretended tensors, and a forked process, of which there are some here, could compute no gradient.
torch.ones(1, requires_grad=True).sum().backward()

GOLDEN = Path(os.environ.get("SANSMAX_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


@pytest.fixture(scope="session")
def golden():
    """`golden("sima/attn_eps")` -> case with .state_dict(), .inputs() and .outputs as float64 tensors."""
    if not (GOLDEN / "golden.py").is_file():
        pytest.skip(f"no golden cases at {GOLDEN}; set SANSMAX_GOLDEN to their folder")
    spec = importlib.util.spec_from_file_location("golden", GOLDEN / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["golden"] = reader  # dataclasses look their module up there
    spec.loader.exec_module(reader)

    def load(path: str):
        folder, name = path.split("/")
        return GoldenCase(reader.load_case(name, GOLDEN / folder))

    return load


class GoldenCase:
    """A golden case with tensors in place of arrays."""

    def __init__(self, case):
        self.config, self.notes = case.config, case.notes
        self.state_dict = lambda: {k: _tensor(v) for k, v in case.state_dict().items()}
        self.inputs = lambda: {k: _tensor(v) for k, v in case.inputs().items()}
        self.outputs = {k: _tensor(v) for k, v in case.outputs.items()}
        self.fill = lambda key, shape: _tensor(_fill(case, key, shape))


def _fill(case, key, shape):
    import sys

    return sys.modules["golden"].fill(key, shape)


def _tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute difference over the largest entry of `want`; inf when `got` is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    scale = want.abs().max().item() or 1.0
    return (got.double() - want.double()).abs().max().item() / scale


@pytest.fixture(scope="session")
def error():
    return relative_error
