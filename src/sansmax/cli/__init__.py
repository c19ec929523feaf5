"""The command line: one file a command, found by its name.

A command is a file of this folder with a function `main`: its typed arguments are the flags, its docstring is
the help, and the first line of the file's docstring is what the list of commands says. Heavy imports belong
inside the function. A command whose flags depend on its arguments has a function `run(arguments)` instead.
"""

import ast
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .. import _find

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a user's error, 130 after Ctrl-C."""
    # Not list(...): once sansmax.cli.list is imported, that name is the command.
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    traceback = arguments[:1] == ["--traceback"]
    command, *rest = arguments[traceback:] or ["--help"]
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            code = _run(command, rest)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as stop:
        print(f"\nsansmax: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; keep the interpreter from writing the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        if traceback:
            raise
        print(f"sansmax: {_sentence(error)}", file=sys.stderr)
        return 2


def _run(command: str, arguments: Sequence[str]) -> int:
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    _find.pick("commands", command, _find.names(__name__))
    import tyro

    module = _find.load(__name__, command)
    try:
        if hasattr(module, "run"):
            return module.run(arguments)
        code = tyro.cli(
            module.main, args=arguments, prog=f"sansmax {command}", config=(tyro.conf.FlagCreatePairsOff,)
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    return code if isinstance(code, int) else 0


def _overview() -> str:
    width = max(map(len, _find.names(__name__)))
    lines = [f"  {name:<{width}}  {_summary(name)}" for name in _find.names(__name__)]
    return "\n".join(
        [
            "Attention without softmax, in linear time.",
            "",
            "usage: sansmax COMMAND [--flag value ...]",
            "",
            *lines,
            "",
            "sansmax COMMAND --help lists the flags; sansmax --traceback COMMAND shows where an error arose.",
        ]
    )


def _summary(name: str) -> str:
    """The first line of the file's docstring, read without importing the file."""
    text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error) or type(error).__name__
