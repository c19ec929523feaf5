"""The structure of the house: what imports what, what an import costs, what is public."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sansmax
from sansmax import _find

SOURCE = Path(sansmax.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Each floor may import the floors that stand before it; adapt, bench, audit and export stand beside tasks.
FLOORS = ["ops", "layers", "models", "tasks", "train", "recipes", "cli"]
BESIDE = {name: {"ops", "layers", "models", "tasks"} for name in ("adapt", "audit", "bench", "maps", "tiles")}
BESIDE["export"] = BESIDE["bench"] | {"bench", "maps"}  # it measures, and its page shows maps
ALLOWED = {floor: set(FLOORS[: i + 1]) | (set(BESIDE) if i > 3 else set()) for i, floor in enumerate(FLOORS)}
ALLOWED |= {name: allowed | {name} for name, allowed in BESIDE.items()}


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imported(path: Path) -> set[str]:
    """Absolute module names that a file imports, at any depth, except under TYPE_CHECKING."""
    package = ["sansmax", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path):
    floor = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if floor not in ALLOWED:
        return
    upward = {
        name
        for name in imported(path)
        if name.startswith("sansmax.") and name.split(".")[1] in {*FLOORS, *BESIDE} - ALLOWED[floor]
    }
    assert not upward, f"{floor} must not import {sorted(upward)}"


@pytest.mark.parametrize("path", sorted((SOURCE / "ops").rglob("*.py")), ids=relative)
def test_operators_import_torch_only(path):
    outside = {
        name.split(".")[0]
        for name in imported(path)
        if name.split(".")[0] not in {*sys.stdlib_module_names, "torch", "triton", "sansmax"}
    }
    assert not outside


@pytest.mark.parametrize("kernel", [p for p in FILES if p.name in ("fused.py", "triton.py")], ids=relative)
def test_kernels_do_not_import_the_body_they_are_checked_against(kernel):
    assert not {name for name in imported(kernel) if name.rpartition(".")[2] == "reference"}


def test_import_is_free_and_silent():
    heavy = [
        "triton",
        "timm",
        "torchvision",
        "onnx",
        "matplotlib",
        "accelerate",
        "torchmetrics",
        "sklearn",
        "rich",
        "jinja2",
        "tyro",
    ]
    code = f"""
import sys, torch
before = set(sys.modules)
import sansmax
print(sorted(set({heavy}) & (set(sys.modules) - before)))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


@pytest.mark.parametrize("name", sansmax.__all__)
def test_public_names_exist_and_are_documented(name):
    public = getattr(sansmax, name)
    assert inspect.getdoc(public)


def test_every_operator_has_an_example_and_a_layer_has_traits():
    from sansmax.layers import _contract

    for name in _find.names("sansmax.layers"):
        module = _find.load("sansmax.layers", name)
        mixers = [
            c
            for c in vars(module).values()
            if inspect.isclass(c) and issubclass(c, _contract.Mixer) and c.__module__ == module.__name__
        ]
        assert len(mixers) == 1, f"{name} must hold exactly one mechanism"
        assert mixers[0].traits.paper


def test_an_unknown_name_lists_all_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown name 'simaa' in layers: .*aft_conv.*did you mean 'sima'\?"
    ):
        _find.load("sansmax.layers", "simaa")
    assert _find.pick("layers", "aft-conv", ["aft_conv"]) == "aft_conv"


def test_no_path_of_a_machine_and_no_leftovers():
    for path in FILES:
        text = path.read_text()
        assert "/root/" not in text, path
        assert "/home/" not in text, path
        assert "TODO" not in text, path
