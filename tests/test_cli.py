"""The command line's frame: commands by file name, one sentence and exit code 2 for a user's error."""

import json
import os
import runpy
import subprocess
import sys
import warnings
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from sansmax import _find, cli

COMMANDS = _find.names("sansmax.cli")


@pytest.fixture
def command(monkeypatch):
    """command(main) makes `sansmax probe` run `main`."""

    def install(main):
        load, names = _find.load, _find.names
        monkeypatch.setattr(
            _find,
            "names",
            lambda package: [*names(package), "probe"] if package == "sansmax.cli" else names(package),
        )
        monkeypatch.setattr(
            _find,
            "load",
            lambda package, name: SimpleNamespace(main=main) if name == "probe" else load(package, name),
        )

    return install


def raising(error):
    def main() -> None:
        """Raises."""
        raise error

    return main


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed_with_a_line_each(arguments, capsys):
    assert cli.main(arguments) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == COMMANDS
    assert all(summary.endswith(".") for _, summary in lines)
    assert {"compare", "env", "list"} <= set(COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["evn"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "'evn'" in err
    assert "did you mean 'env'?" in err


@pytest.mark.parametrize("arguments", [["env", "--jsn"], ["list", "extra"]])
def test_wrong_flags_exit_with_2(arguments, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert arguments[1].lstrip("-") in out + err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_exits_with_0(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: sansmax {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ValueError("compare: epochs must be at least 1, got 0; use 1"),
            "compare: epochs must be at least 1, got 0; use 1",
        ),
        (TypeError("no"), "no"),
        (FileNotFoundError(2, "No such file or directory", "photos"), "No such file or directory: photos"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_users_error_is_one_sentence(error, sentence, command, capsys):
    command(raising(error))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr() == ("", f"sansmax: {sentence}\n")


def test_a_bug_and_a_request_keep_their_traceback(command):
    command(raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["probe"])
    command(raising(ValueError("for the user")))
    with pytest.raises(ValueError, match="for the user"):
        cli.main(["--traceback", "probe"])


def test_interrupting_exits_with_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr() == ("", "\nsansmax: interrupted\n")
    command(raising(KeyboardInterrupt("3 of 5 are kept")))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr() == ("", "\nsansmax: 3 of 5 are kept\n")


def test_exit_codes_of_commands_are_kept_and_their_warnings_are_not(command, capsys):
    def main() -> int:
        """Warns."""
        warnings.warn("a library's complaint", stacklevel=1)
        return 3

    command(main)
    assert cli.main(["probe"]) == 3
    assert capsys.readouterr() == ("", "")


def test_list_tells_the_traits_of_every_mechanism(capsys):
    from sansmax import layers

    assert cli.main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {name: asdict(layers.mechanism(name).traits) for name in _find.names("sansmax.layers")}
    assert len(found) >= 11
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in found)


def test_list_shows_each_feature_in_its_column(capsys):
    cli.main(["list"])
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    columns = ("causal", "cross", "mask", "streaming", "exp-free")
    assert tuple(head[1:6]) == columns
    cells = {
        row[0]: dict(zip(columns, row[1:6], strict=True)) for row in rows if row[0] in ("softmax", "soft")
    }
    yes = {"causal": "yes", "cross": "yes", "mask": "yes", "streaming": "yes", "exp-free": "-"}
    assert cells["softmax"] == yes
    assert cells["soft"] == yes | {"causal": "-", "cross": "-", "streaming": "-"}


def test_env_tells_versions_and_machine(capsys):
    import torch

    import sansmax

    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sansmax"] == sansmax.__version__
    assert found["torch"] == torch.__version__.partition("+")[0]
    keys = "python torchvision timm accelerate triton cuda gpu cpu cores torch_threads system commit"
    assert set(keys.split()) <= set(found)
    assert cli.main(["env"]) == 0
    assert found["cpu"][:20] in capsys.readouterr().out


def test_a_fresh_process_loads_nothing_heavy_before_the_command_and_survives_a_closed_pipe():
    code = (
        "import sys, sansmax.cli; sys.stdin.read(); code = sansmax.cli.main([]); "
        "heavy = {'timm', 'torchvision', 'matplotlib', 'sklearn', 'accelerate', 'tyro', 'rich'}; "
        "print('heavy:', sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen([sys.executable, "-c", code], text=True, env=buffered, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == "heavy: []\n"
    assert process.returncode == 1


def test_the_module_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sansmax", "no-such-command"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("sansmax", run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("sansmax: unknown name 'no-such-command'")
