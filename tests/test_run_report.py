"""The report of a run and of several: figures that are right, runs in any state, nothing unescaped."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torchmetrics.functional.classification import binary_calibration_error

from sansmax import cli
from sansmax.bench import runs
from sansmax.bench._evaluation import Evaluation, agreement, refusal
from sansmax.bench.run_report import read_run, render_run, render_runs, table

EVIL = "<script>alert('&')</script>"
CLASSES = [EVIL, 'a "quoted" & name', "\N{CAT FACE} caf\u00e9", "line\nbreak " + "long" * 30]


def evaluation(labels, predicted, probability=0.5, classes=CLASSES) -> Evaluation:
    """An evaluation with these predictions; the other places of the top hold the next classes."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    count = len(classes)
    top = (predicted[:, None] + np.arange(min(5, count))) % count
    first = np.broadcast_to(np.asarray(probability, np.float32), labels.shape)
    rest = (1 - first) / max(1, count - 1)
    probabilities = np.stack([first, *[rest] * (top.shape[1] - 1)], axis=1).astype(np.float32)
    truth = np.where(labels == predicted, first, rest).astype(np.float32)
    return Evaluation(labels, top, probabilities, truth, classes)


def drawn(seed: int, images: int = 100, classes=CLASSES, share: float = 0.8) -> Evaluation:
    """Random labels, of which `share` are predicted right."""
    draw = np.random.default_rng(seed)
    labels = np.arange(images) % len(classes)
    wrong = (labels + draw.integers(1, len(classes), images)) % len(classes)
    right = draw.random(images) < share
    return evaluation(labels, np.where(right, labels, wrong), draw.beta(6, 1 + 2 * ~right), classes)


def metrics(
    epochs: int, top: float = 0.8, classes=CLASSES, seconds: float = 30.0, every: int = 8
) -> list[dict]:
    lines = []
    for step in range(1, epochs * every + 1):
        done = step / every
        lines.append(
            {
                "kind": "train",
                "update": 10 * step,
                "epoch": done,
                "loss": 0.2 + 2 * math.exp(-done / 4) + 0.1 * math.sin(step**2),
                "lr": 1e-3 * math.cos(1.5 * done / epochs),
                "grad_norm": 1 + math.exp(-done),
                "images_per_s": 900 + 40 * math.sin(step**2),
                "data_wait": 0.08 + 0.04 * math.cos(step**2),
                "seconds": seconds * done,
                "skipped_steps": min(2, step // 20),
            }
        )
        if step % every == 0:
            share = top * (1 - math.exp(-done / 2))
            lines.append(
                {
                    "kind": "eval",
                    "update": 10 * step,
                    "epoch": int(done),
                    "top1": share,
                    **({"top5": min(1.0, share + 0.15)} if len(classes) > 5 else {}),
                    "loss": 0.5 + math.exp(-done / 3),
                    "seconds": seconds * done,
                }
            )
    return lines


def write_run(
    folder,
    *,
    classes=CLASSES,
    epochs: int = 12,
    lines: list[dict] | None = None,
    evaluated: Evaluation | None = None,
    gallery: bool = True,
    recipe: dict | None = None,
    **info,
):
    """A run folder as `sansmax train` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "sansmax": "0.2.0",
        "commit": "0123456789abcdef",
        "command": f"sansmax train --data.root '{EVIL}' --epochs {epochs}",
        "recipe": {
            "model": "vit_mini",
            "mechanism": None,
            "model_args": {},
            "epochs": epochs,
            "batch_size": 64,
            "data": {"root": EVIL},
            "augment": {"scale": [0.08, 1.0]},
            "optim": {"opt": "adamw", "lr": 5e-4},
            "out": str(folder),
            **(recipe or {}),
        },
        "classes": classes,
        "data": {"name": EVIL, "train": 400, "val": 100, "split": "every fifth image of a class"},
        "network": {
            "name": "vit_mini",
            "params": 452_000,
            "flops": 31_400_000,
            "img_size": 32,
            "mean": [0.5],
            "std": [0.25],
            "in_chans": 1,
        },
        "machine": {"cpu": "A processor", "cores": 2, "gpu": None},
        "versions": {"python": "3.12.1", "torch": "2.15.0", "triton": None},
        "started": "2026-01-02T03:04:05+00:00",
        **info,
    }
    (folder / "recipe.json").write_text(json.dumps(content))
    lines = metrics(epochs, classes=classes) if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated is not None:
        arrays = {name: getattr(evaluated, name) for name in ("labels", "top", "probabilities", "truth")}
        np.savez(folder / "evaluation.npz", **arrays)
    if gallery:
        (folder / "gallery.json").write_text(json.dumps(pictures(classes)))
        (folder / "skipped.json").write_text(json.dumps([{"path": f"{EVIL}.jpg", "reason": EVIL}]))
    return folder


def pictures(classes=CLASSES, count: int = 6) -> list[dict]:
    found = []
    for i in range(2 * count):
        file = io.BytesIO()
        Image.fromarray(np.add.outer(np.arange(32), np.arange(32) * i).astype(np.uint8)).save(file, "PNG")
        found.append(
            {
                "png": base64.b64encode(file.getvalue()).decode(),
                "name": f"{EVIL}/{i}.jpg",
                "truth": classes[i % len(classes)],
                "predicted": classes[(i + (i < count)) % len(classes)],
                "probability": 0.93,
                "truth_probability": 0.02 if i < count else 0.93,
                "kind": "worst" if i < count else "best",
            }
        )
    return found


@pytest.fixture
def run(tmp_path):
    return read_run(write_run(tmp_path / "a run", evaluated=drawn(0)))


def balanced(html: str) -> None:
    void, opened = {"meta", "img", "br", "path", "use", "rect"}, []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                opened.append(tag)

        def handle_endtag(self, tag):
            if tag not in void:
                assert opened.pop() == tag

    Parser().feed(html)
    assert opened == []


def test_calibration_error_by_hand():
    # Bins of 1/15: 0.50 and 0.52 are in (7/15, 8/15], 0.95 and 1.0 in (14/15, 1].
    probability = [0.50, 0.52, 0.95, 1.0]
    found = evaluation([0, 0, 0, 0], [0, 1, 0, 0], probability)
    bins = {round(b.low * 15): b for b in found.reliability() if b.images}
    assert {i: (b.images, b.accuracy) for i, b in bins.items()} == {7: (2, 0.5), 14: (2, 1.0)}
    assert [b.confidence for b in bins.values()] == pytest.approx([0.51, 0.975])
    # 2/4 |0.5 - 0.51| + 2/4 |1 - 0.975|
    assert found.calibration_error() == pytest.approx(0.0175)


def test_calibration_error_is_that_of_torchmetrics_inside_bins():
    found = drawn(3, 400)
    confidence = torch.from_numpy(found.probabilities[:, 0].copy())
    expected = binary_calibration_error(confidence, torch.from_numpy(found.right).long(), n_bins=15)
    assert found.calibration_error() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(("probability", "error"), [(0.0, 0.5), (1.0, 0.5), (0.5, 0.0)])
def test_calibration_error_of_the_ends(probability, error):
    assert evaluation([0, 0], [0, 1], probability).calibration_error() == pytest.approx(error)


def test_confusions_are_counted():
    labels, predicted = [0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 0, 2, 1, 1, 1]
    found = evaluation(labels, predicted)
    assert found.confusions() == [(2, 1, 3), (0, 1, 2), (1, 0, 1)]
    shown, matrix = found.confusion_matrix()
    assert shown == [0, 1, 2, 3]
    assert matrix.tolist() == [[1, 2, 0, 0, 0], [1, 1, 0, 0, 0], [0, 3, 1, 0, 0], [0, 0, 0, 0, 0]]
    # Class 1 takes part in 6 mistakes, class 2 and 0 in 3 each, the first of equals is shown.
    shown, matrix = found.confusion_matrix(limit=2)
    assert shown == [0, 1]
    assert matrix.tolist() == [[1, 2, 0], [1, 1, 0]]
    shown, matrix = found.confusion_matrix(limit=1)
    assert (shown, matrix.tolist()) == ([1], [[1, 1]])


def test_classes_come_worst_first_with_what_they_are_taken_for():
    found = evaluation([0, 0, 1, 1, 3], [0, 2, 2, 2, 3], 0.7).by_class()
    assert [(c.name, c.images, c.right, c.predicted, c.taken_for, c.taken) for c in found] == [
        (CLASSES[1], 2, 0, 0, CLASSES[2], 2),
        (CLASSES[0], 2, 1, 1, CLASSES[2], 1),
        (CLASSES[3], 1, 1, 1, None, 0),
    ]
    assert [c.probability for c in found] == pytest.approx([0.1, 0.4, 0.7])


def test_agreement_by_hand():
    labels = [0] * 12
    first = evaluation(labels, [0] * 8 + [1] * 4)
    second = evaluation(labels, [0, 0, 0, 1, 1, 1, 1, 2, 0, 1, 1, 2])
    found = agreement(first, second)
    # Both on 3, the first alone on 5, the second alone on 1, neither on 3, of which 2 get the same answer.
    assert found[:5] == pytest.approx((3 / 12, 5 / 12, 1 / 12, 3 / 12, 5 / 12))
    # Binomial(6, 1/2): 2 (1 + 6) / 64.
    assert found.p == pytest.approx(14 / 64)
    assert agreement(second, first).p == found.p
    assert agreement(first, first).p == 1
    one_each = evaluation([0, 0], [0, 1]), evaluation([0, 0], [1, 0])
    assert agreement(*one_each).p == 1


def test_agreement_is_refused_for_other_classes_and_other_images():
    ten = [f"class {i}" for i in range(10)]
    assert refusal(drawn(0), drawn(1)) is None
    assert refusal(drawn(0), None) == "not evaluated"
    assert refusal(drawn(0), drawn(0, classes=ten)) == "other classes (4 and 10)"
    assert refusal(drawn(0), drawn(0, 96)) == "other images (100 and 96)"
    renamed = [*CLASSES[:3], "another"]
    assert refusal(drawn(0), drawn(0, classes=renamed)) == "other classes (4 and 4)"


def test_headline_figures_are_those_of_the_files(tmp_path):
    lines = metrics(3)
    evals = [line for line in lines if line["kind"] == "eval"]
    for line, top1 in zip(evals, (0.25, 0.751, 0.5), strict=True):
        line |= {"top1": top1, "top5": top1 + 0.1}
    found = read_run(write_run(tmp_path / "r", epochs=3, lines=lines))
    assert found.finished
    html = render_run(found)
    assert "<b>75.1 %</b><small>best, after epoch 2; 50.0 % after epoch 3</small>" in html
    assert "<b>85.1 %</b><small>best, after epoch 2; 60.0 % after epoch 3</small>" in html
    assert "<b>1.50 min</b>" in html
    assert "<small>skipped steps</small><b>1</b>" in html
    assert "<small>unreadable images</small><b>1</b>" in html
    assert "452 k parameters, 31.4 M FLOPs" in html


def test_page_is_balanced_and_needs_no_network(run):
    other = read_run(write_run(run.folder.parent / "other", evaluated=drawn(1)))
    for html in (render_run(run), render_runs([run, other])):
        balanced(html)
        assert not re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?\s*(?:https?:)?//""", html)
        assert "@import" not in html
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids)) > 20
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)
        assert not re.findall(r"#[0-9a-f]{6}", html.partition("</style>")[2])


def test_words_from_outside_are_escaped(run):
    for html in (render_run(run), render_runs([run, run])):
        assert "<script" not in html
        assert '"quoted"' not in html
        assert "&lt;script&gt;" in html
        assert not re.search(r"\bon\w+=", html)
    html = render_run(run)
    assert html.count("&lt;script&gt;") > 30
    assert "a &#34;quoted&#34; &amp; name" in html
    assert "\N{CAT FACE} caf\u00e9" in html
    assert "sansmax train --data.root &#39;&lt;script&gt;" in html


def test_a_picture_that_is_not_base64_cannot_leave_its_attribute(run):
    run.gallery[0]["png"] = base64.b64encode(b'"><script>').decode()
    assert "<script" not in render_run(run)


@pytest.mark.parametrize("lines", [0, 1, 5])
def test_a_run_without_an_evaluation_yet(lines, tmp_path):
    folder = write_run(tmp_path / "killed", lines=metrics(1)[:lines], gallery=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "update": 60, "epo')
    found = read_run(folder)
    assert (len(found.train), len(found.evals), found.best, found.evaluation) == (lines, 0, None, None)
    html = render_run(found)
    assert "There is no evaluation yet." in html
    assert "of 12, going on or stopped" in html
    assert "<h2>Worst pictures</h2>" not in html
    balanced(html)
    render_runs([found, found])
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).train == []


def test_lines_written_again_by_a_resumed_run_count_once(tmp_path):
    folder = write_run(tmp_path / "r", lines=[])
    lines = [{"kind": "train", "update": u, "epoch": u / 10, "loss": loss} for u, loss in LOSSES]
    text = "\n".join(map(json.dumps, lines))
    (folder / "metrics.jsonl").write_text(text.replace('"loss": 5', '"loss": NaN') + "\n[1]\nnull\n{}\n")
    found = read_run(folder)
    assert [(line["update"], line.get("loss")) for line in found.train] == [(10, 1), (20, 4), (30, None)]
    assert "nan" not in render_run(found).lower().replace("finance", "")


LOSSES = [(10, 1), (20, 2), (30, 3), (20, 4), (30, 5)]


def test_recipe_marks_what_differs_from_the_defaults(run):
    defaults = json.loads(json.dumps(run.info["recipe"])) | {"epochs": 300, "model_args": {}}
    html = render_run(run, defaults)
    changed = html.partition("What differs from the defaults")[2].partition("</table>")[0]
    assert re.findall(r'scope="row"[^>]*>([^<]+)<', changed) == ["epochs"]
    assert re.findall(r"<td[^>]*>([^<]+)<", changed) == ["12", "300"]
    everything = html.partition("those that differ in bold")[2]
    assert everything.count('class="changed"') == 1
    assert "optim.lr" in everything
    assert "What differs" not in render_run(run)


def test_many_classes_are_folded(tmp_path):
    many = [f"class {i:03d}" for i in range(61)]
    html = render_run(read_run(write_run(tmp_path / "r", classes=many, evaluated=drawn(0, 610, many, 0.5))))
    assert "the 30 classes with the most mistakes of 61" in html
    assert "41 more classes" in html
    head = html.partition('<table class="matrix">')[2].partition("</thead>")[0]
    assert head.count("<span>") == 31
    assert "all others" in head
    perfect = write_run(tmp_path / "perfect", classes=many, evaluated=drawn(0, 610, many, 1.1))
    assert "0 mistakes of 0 kinds" in render_run(read_run(perfect))


def test_comparison_lists_only_what_differs(tmp_path):
    same = {"evaluated": drawn(0)}
    first = write_run(tmp_path / "first", **same)
    second = write_run(
        tmp_path / "second",
        recipe={"optim": {"opt": "adamw", "lr": 1e-3}, "model_args": {"depth": 3}, "resume": True},
        **(same | {"machine": {"cpu": "Another", "cores": 2, "gpu": None}}),
    )
    records = [read_run(first), read_run(second)]
    recipes, others = runs.differences(records)
    assert recipes == [("optim.lr", (5e-4, 1e-3)), ("model_args.depth", (None, 3))]
    assert others == [("machine.cpu", ("A processor", "Another"))]
    html = render_runs(records)
    listed = html.partition("<h2>What differs</h2>")[2].partition("<h2>")[0]
    rows = re.findall(r'scope="row"[^>]*>([^<]+)<', listed)
    assert rows == ["optim.lr", "model_args.depth", "machine.cpu"]
    assert "Nothing in the recipes." in render_runs([records[0], records[0]])


def test_comparison_shows_runs_of_other_classes_without_agreement(tmp_path):
    ten = [f"class {i}" for i in range(10)]
    records = [
        read_run(write_run(tmp_path / "x" / "run", evaluated=drawn(0))),
        read_run(write_run(tmp_path / "y" / "run", evaluated=drawn(1))),
        read_run(write_run(tmp_path / "z", classes=ten, evaluated=drawn(1, classes=ten))),
    ]
    html = render_runs(records)
    assert html.count("other classes (4 and 10)") == 2
    assert "<h1>3 training runs</h1>" in html
    assert all(f"{i} {name}" in html for i, name in enumerate(("x/run", "y/run", "z"), 1))
    shares = agreement(records[0].evaluation, records[1].evaluation)
    assert f"<td>{100 * shares.both:.1f}</td><td>{100 * shares.first:.1f}</td>" in html
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(table(records))
    text = console.export_text()
    assert "x/run" in text
    assert text.count("452 k") == 3


def sansmax(*arguments) -> int:
    return cli.main(["report", *map(str, arguments)])


def test_command_writes_the_page_of_one_run_beside_it(tmp_path, capsys):
    folder = write_run(tmp_path / "r", evaluated=drawn(0))
    assert sansmax(folder) == 0
    assert "79.8" in capsys.readouterr().out
    assert "What differs from the defaults" in (folder / "report.html").read_text(encoding="utf-8")
    assert sansmax(folder, folder, "--out", tmp_path / "new" / "page.html") == 0
    assert "<h2>The command</h2>" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")


def test_command_compares_the_runs_of_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_run(tmp_path / "all" / name, evaluated=drawn(0))
    (tmp_path / "all" / "no run").mkdir()
    assert sansmax("all") == 0
    assert "<h1>2 training runs</h1>" in (tmp_path / "sansmax-report.html").read_text(encoding="utf-8")
    assert "sansmax-report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: f.rename(f.with_name("away")), "got nothing at"),
        (lambda f: (f / "recipe.json").unlink(), "got a folder without one at"),
        (lambda f: (f / "recipe.json").write_text('{"recipe": '), "expected JSON, got"),
        (lambda f: (f / "recipe.json").write_text("[]"), "expected a JSON dict, got list"),
        (lambda f: (f / "recipe.json").write_text("{}"), "got no 'sansmax'"),
        (lambda f: (f / "evaluation.npz").write_bytes(b"PK\3\4 half"), "a file that cannot be read"),
        (lambda f: (f / "gallery.json").write_text("[{"), "gallery.json: expected JSON"),
        (lambda f: np.savez(f / "evaluation.npz", labels=np.zeros(3)), "a file that cannot be read"),
    ],
)
def test_what_is_no_run_is_told_in_one_sentence(make, sentence, tmp_path, capsys):
    folder = write_run(tmp_path / "r", evaluated=drawn(0))
    make(folder)
    assert sansmax(folder) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sansmax: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_an_evaluation_of_other_shapes_or_classes_is_refused():
    right = drawn(0)
    arrays = {name: getattr(right, name) for name in ("labels", "top", "probabilities", "truth")}
    for name, array in {
        "labels": right.labels[:-1],
        "top": right.top + 4,
        "truth": right.truth[:, None],
    }.items():
        with pytest.raises(ValueError, match=r"^evaluation\.npz: expected labels"):
            Evaluation(**(arrays | {name: array}), classes=CLASSES)


def test_command_refuses_no_run_and_a_page_of_another_kind(tmp_path, capsys):
    folder = write_run(tmp_path / "r")
    assert sansmax(folder, "--out", tmp_path) == 2
    assert "expected a file that ends in .html" in capsys.readouterr().err
    assert sansmax() == 2
