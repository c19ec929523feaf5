"""python compile_kernels.py OP DTYPE CAPABILITY: compiles every kernel that an operator launches, without a
GPU.

Launches are caught: tensors on the CPU, no kernel runs, and the results are whatever memory holds. Prints one
JSON line for each kernel: {"kernel", "shared" in bytes, "registers", "spilled" in bytes}.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from sansmax.ops import _backend, operators

OPTIONS = {"num_warps", "num_stages", "num_ctas"}


def main(op: str, dtype: torch.dtype, capability: int, dim: int = 64, tokens: int = 256) -> None:
    seen = set()

    def compiled(self, *args, grid, warmup, **words):
        options = {name: words.pop(name) for name in OPTIONS & set(words)}
        values = dict(zip(self.arg_names, args, strict=False)) | words
        constant = {p.name for p in self.params if p.is_constexpr}
        constant |= {n for n, v in values.items() if isinstance(v, int) and v == 1}  # as a launch has it
        signature = {n: "constexpr" if n in constant else mangle_type(v) for n, v in values.items()}
        constants = {n: v for n, v in values.items() if n in constant}
        aligned = [["tt.divisibility", 16]]
        attributes = {
            (i,): aligned
            for i, (n, v) in enumerate(values.items())
            if n not in constant and (isinstance(v, torch.Tensor) or (isinstance(v, int) and v % 16 == 0))
        }
        key = (self.__name__, str(sorted(signature.items())), str(constants))
        if key in seen:
            return
        seen.add(key)
        source = ASTSource(self, signature, constants, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        found = {"kernel": self.__name__, "shared": kernel.metadata.shared, **assembled(kernel, capability)}
        print(json.dumps(found), flush=True)

    JITFunction.run = compiled
    _backend._triton_refusal = lambda *_: None
    module, function = operators()[op]
    forms = [{}, {"causal": True}]
    if "grid" in inspect.signature(module.example).parameters:
        forms.append({"grid": (15, (tokens - 1) // 15)})
    for form in forms:
        of_grid = form if "grid" in form else {}
        arguments, options = module.example(tokens=tokens, dim=dim, dtype=dtype, **of_grid)
        leaves = [a.requires_grad_() for a in arguments if isinstance(a, torch.Tensor)]
        options = {**options, **form}
        try:
            out = function(*arguments, **options, backend="triton")
        except (ValueError, TypeError) as error:
            print(f"{op}, causal: {error}", file=sys.stderr)
            continue
        torch.autograd.grad(out.sum(), [leaf for leaf in leaves if leaf.is_floating_point()])


def assembled(kernel, capability: int) -> dict[str, int]:
    """Registers and spilled bytes by ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        arch = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
        words = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", source, "-o", f"{folder}/out"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    numbers = {n: int(v) for v, n in re.findall(r"(\d+) (registers|bytes spill stores)", said)}
    return {"registers": numbers["registers"], "spilled": numbers.get("bytes spill stores", 0)}


if __name__ == "__main__":
    main(sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), *map(int, sys.argv[4:]))
