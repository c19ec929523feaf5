"""The pages: their commands are understood, their Python runs, their tables are those of the files."""

import dataclasses
import functools
import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import tyro
from mkdocs.exceptions import PluginError

import sansmax
from sansmax import _find, cli
from sansmax.train import network, trained

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
MECHANISMS = sorted((DOCS / "mechanisms").glob("*.md"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, *languages: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text_of(path), re.DOTALL | re.MULTILINE)
    return [content for language, content in fences if language in languages]


def shell(path: Path) -> list[str]:
    return "\n".join(blocks(path, "", "sh", "bash")).replace("\\\n", " ").splitlines()


def quoted(path: Path) -> list[str]:
    """Commands within sentences."""
    prose = re.sub(r"^```.*?^```", "", text_of(path), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(words.split()) for words in re.findall(r"`((?:uv run )?sansmax [^`]+)`", prose)]


def commands(lines: list[str]) -> list[list[str]]:
    """The words behind `sansmax`."""
    found = []
    for line in lines:
        said = re.search(r"(?:^|\s|-m )sansmax (?=[a-z-])(.*)", line)
        if said and not re.search(r"RECIPE|COMMAND|\.\.\.|<", said[1]):
            found.append(shlex.split(re.split(r" (?:&&|\|) ", said[1])[0], comments=True))
    return found


class Understood(BaseException):
    """The arguments were parsed; nothing was run."""


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """cli.main up to the point where the command would begin its work."""
    real, subcommands = tyro.cli, tyro.extras.subcommand_cli_from_dict

    def stub(function):
        @functools.wraps(function)
        def begun(*args, **words):
            raise Understood

        return begun

    def parse(f, **words):
        if isinstance(f, functools.partial):
            f = functools.partial(stub(f.func), *f.args, **f.keywords)
        elif not isinstance(f, type):
            f = stub(f)
        chosen = real(f, **words)
        if hasattr(chosen, "checked"):
            # Of `sansmax adapt` the number of layers that stay, which may be 0.
            leave_run(tmp_path, dataclasses.replace(chosen, keep=chosen.keep or 1).checked())
        raise Understood

    def parse_sub(functions, **words):
        return subcommands({name: stub(function) for name, function in functions.items()}, **words)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tyro, "cli", parse)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", parse_sub)
    monkeypatch.setattr(trained, "load_trained", read_run)
    made = {"model": "vit_mini", "mechanism": "softmax", "model_args": {}}
    given = SimpleNamespace(made=made, img_size=8, crop=1.0)
    monkeypatch.setattr(network, "load_network", lambda *_, **__: given)


def leave_run(folder: Path, recipe) -> None:
    """What tells a run's task, so that the page's later commands on it meet the parser of that task."""
    metadata = {}
    if recipe.task != "classification":
        metadata = {"task": recipe.task, "recipe": json.dumps(recipe.to_json())}
    (folder / recipe.out).mkdir(parents=True, exist_ok=True)
    file = folder / recipe.out / "weights.safetensors"
    safetensors.torch.save_file({"none": torch.zeros(1)}, str(file), metadata)


def read_run(what: str):
    with safetensors.safe_open(Path(what) / "weights.safetensors", "pt") as content:
        told = content.metadata()
    recipe = trained.read_recipe({"task": told["task"], "recipe": json.loads(told["recipe"])})
    return SimpleNamespace(recipe=recipe)


@pytest.mark.parametrize("path", [p for p in PAGES if commands(shell(p) + quoted(p))], ids=name_of)
def test_the_commands_are_understood(path, parsed, capsys):
    for words in commands(shell(path) + quoted(path)):
        if words in (["train", "--recipes"], ["train", "--help"]) or len(words) == 1:
            _find.pick("commands", words[0], _find.names("sansmax.cli"))
            continue
        try:
            code = cli.main(words)
        except Understood:
            continue
        assert code == 0, f"{path.name}: sansmax {' '.join(words)}: {capsys.readouterr().err[-600:]}"
        assert "--help" in words, f"{path.name}: sansmax {' '.join(words)} was not parsed"


@pytest.mark.parametrize(
    "line",
    [
        "train digits_sima --data.rot x",
        "train segmentation_sima --img-sizes 3",
        "eval run --img-size small",
        "eval runs/segmentation --scale 1",
        "bench ops sima --tokenz 3",
        "map run",
        "which vit_mini --mechanism sima",
    ],
)
def test_a_wrong_command_would_be_found(line, parsed, capsys):
    with pytest.raises(Understood):
        cli.main(["train", "segmentation_sima", "--out", "runs/segmentation"])
    assert cli.main(line.split()) == 2
    capsys.readouterr()


@pytest.mark.parametrize("path", MECHANISMS, ids=name_of)
def test_the_python_of_a_mechanism_runs(path, capsys):
    found = blocks(path, "python")
    assert len(found) == 2
    for block in found:
        exec(compile(block, path.name, "exec"), {})
    promised = re.findall(r"print\(.*\)  # (.*)", "\n".join(found))
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


def test_the_tutorial_goes_through(tmp_path, monkeypatch, capsys):
    page = DOCS / "tutorial.md"
    monkeypatch.chdir(tmp_path)
    (make,) = blocks(page, "python")
    exec(make, {})
    assert len(list(Path("numerals/train").rglob("*.png"))) == 1347
    wanted = ("train digits_sima", "eval sima", "predict sima", "map sima")
    lines = {" ".join(words[:2]): words for words in reversed(commands(shell(page)))}
    short = ["--epochs", "2", "--data.num-samples", "96"]
    for start in wanted:
        words = lines[start] + (short if start.startswith("train") else [])
        assert cli.main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "predictions.csv: 450 rows, 0 of them with an error" in said
    assert "map of row 1, column 2 over 4 x 4 tokens" in said
    for file in ("sima/report.html", "figures.json", "predictions.csv", "map.png"):
        assert Path(file).is_file()


def test_every_command_and_mechanism_has_a_page():
    pages = {p.stem for p in (DOCS / "commands").glob("*.md")} - {"index"}
    assert pages == set(_find.names("sansmax.cli"))
    text = "".join(map(text_of, MECHANISMS))
    told = " ".join(re.findall(r"^<!-- supports: (.*?) -->", text, re.MULTILINE)).split()
    assert sorted(told) == _find.names("sansmax.layers")
    described = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    public = {
        name: getattr(sansmax, name) for name in sansmax.__all__ if not name.endswith(("_state", "_step"))
    }
    operators = {n for n, f in public.items() if inspect.isfunction(f) and ".ops." in f.__module__}
    assert len(operators) == 10
    assert operators <= described


def test_the_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\(([^)#:\s]+)\)", text_of(ROOT / "README.md"))
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_site_is_built_strictly_before_the_tests():
    lines = text_of(ROOT / ".ci" / "run").splitlines()
    built = [i for i, line in enumerate(lines) if "mkdocs build --strict" in line]
    tested = [i for i, line in enumerate(lines) if "uv run pytest" in line]
    assert built
    assert built[0] < tested[0]
    assert not re.search(r"\s(-q|--quiet)\b", lines[built[0]])  # warnings would not be counted


def hook(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "_hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>', 1),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/x.css">', 1),
        ("a.html", '<img alt="x" src="http://img.example/x.png">', 1),
        ("a.html", '<style>@import "https://fonts.example/x";</style>', 1),
        ("a.html", '<p style="background: url(https://img.example/x.png)">', 1),
        ("a.css", "a { background: url('https://img.example/x.png') }", 1),
        (
            "a.html",
            '<a href="https://arxiv.org/abs/2206.08898">x</a><img src="x.png"><script>1//2</script>',
            0,
        ),
        ("a.css", "a { background: url(data:image/png;base64,aaaa) }", 0),
    ],
)
def test_what_a_page_would_fetch_is_found(name, text, found):
    assert len(hook("closed").fetches(name, text)) == found


def test_a_page_that_would_fetch_stops_the_build(tmp_path):
    (tmp_path / "x.html").write_text('<img src="https://img.example/x.png">')
    with pytest.raises(PluginError, match=r"x\.html: expected nothing from another host, got <img"):
        hook("closed").on_post_build(SimpleNamespace(site_dir=str(tmp_path)))


def test_figures_are_those_of_the_file():
    figures = hook("figures")
    results = ROOT / "benchmarks" / "results"
    found = json.loads((results / "ops-cpu.json").read_text())
    row = next(r for r in found["rows"] if (r["op"], r["tokens"], r["pass"]) == ("xnorm", 1024, "forward"))
    lines = figures.table("ops xnorm", results).splitlines()
    cells = [c.strip() for c in next(x for x in lines if "| 1,024 | forward |" in x).strip("|").split("|")]
    assert float(cells[3]) == pytest.approx(row["forms"]["sansmax"]["median_ms"], rel=0.005)
    assert float(cells[5].split()[0]) == pytest.approx(row["speedup"]["sdpa"]["median"], rel=0.005)
    assert found["commit"][:7] in lines[-1]
    assert len(lines) == 2 + 6 + 2
    for words in ("ops", "ops simaa", "oops sima"):
        with pytest.raises(PluginError, match="figures: expected"):
            figures.table(words, results)


def test_an_equation_is_mathml_and_help_is_the_command_s_own():
    made = hook("equations").mathml("a_{n} = b\n\nc", "math", "equation", {}, None)
    assert made.count("<math ") == 2
    said = hook("commands").said(["convert"])
    assert "usage: sansmax convert" in said
    assert "--img-size" in said
    with pytest.raises(PluginError, match="help: expected a command of sansmax, got conwert"):
        hook("commands").said(["conwert"])
