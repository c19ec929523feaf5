"""The report: the same figures on page and terminal, a verdict that holds, nothing unescaped."""

import base64
import io
import itertools
import math
import random
import re
import struct
import zlib
from html.parser import HTMLParser

import pytest
from rich.console import Console

from sansmax.bench import _plots, _summary, report

NAMES = [
    *("softmax", "sima", "soft", "soft_norm", "xnorm", "external", "external_multihead"),
    *("aft_full", "aft_local", "aft_simple", "aft_conv"),
]


def png(size: int, value: int) -> bytes:
    """A grey square."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + bytes((value + 9 * x * y) % 256 for x in range(size)) for y in range(size))
    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def made_up(names=NAMES, seeds: int = 3, epochs: int = 12) -> dict:
    """Results as compare writes them; softmax 98 %, the others a little less and linear in the tokens."""
    draw = random.Random(0)
    mechanisms = {}
    for index, name in enumerate(names):
        top = 98.0 - 0.3 * index if name != "aft_simple" else 91.0
        runs = []
        for seed in range(seeds):
            final = top + draw.uniform(-0.4, 0.4)
            curve = [
                {
                    "epoch": e + 1,
                    "loss": 0.1 + 2.2 * math.exp(-(e + 1) / (2.5 + 0.1 * index)) + draw.uniform(0, 0.05),
                    "accuracy": final - 80 * math.exp(-(e + 1) / (1.5 + 0.1 * index)),
                }
                for e in range(epochs)
            ]
            runs.append(
                {
                    "seed": seed,
                    "accuracy": final,
                    "train_seconds": 20.0 + index,
                    "images_per_s": 3100.0 - 90 * index,
                    "curve": curve,
                    "predictions": [],
                }
            )
        accuracies = [run["accuracy"] for run in runs]
        linear = name != "softmax"
        sweep = [
            {
                "tokens": n,
                "latency_ms": (0.25 + 0.03 * index + n * (7e-4 + 1e-4 * index))
                if linear
                else 0.12 + n * 5e-4 + n * n * 7e-6,
                "memory_mb": n * (0.004 + 4e-4 * index) if linear else n * 0.003 + n * n * 1e-6,
            }
            for n in (64, 121, 256, 529, 1024, 2116, 4096, 8281, 16384)
            if not (name == "aft_full" and n > 4096)
        ]
        mechanisms[name] = {
            "title": f"Title of {name}",
            "paper": "Somebody and Another, A paper with a long title that wraps, 2021 (arXiv 2105.14103)",
            "exp_free": name in ("sima", "xnorm"),
            "computes": "queries and keys divided by their l1 norm over the tokens, then plain products",
            "cost": "min(N D^2, N^2 D)" if linear else "N^2 D",
            "params": 452_000 + 3_777 * index,
            "flops": 31_400_000 + 977_000 * index,
            "runs": runs,
            "accuracy": {
                "mean": sum(accuracies) / seeds,
                "min": min(accuracies),
                "max": max(accuracies),
                "std": 0.3,
            },
            "images_per_s": 3100.0 - 90 * index,
            "latency_ms": {"median": 1.41 + 0.17 * index, "low": 1.3, "high": 2.9},
            "peak_memory_mb": 1.9 + 0.11 * index,
            "sweep": sweep,
            "crossover_tokens": None if name in ("softmax", "aft_conv") else 180 + 37 * index,
        }
    return {
        "sansmax": "0.1.0",
        "commit": "0123456789abcdef+dirty",
        "command": ["sansmax", "compare", "--data", "my photos"],
        "machine": {
            "cpu": "A processor",
            "cores": 2,
            "torch_threads": 2,
            "memory_gib": 7.8,
            "gpu": None,
            "system": "Linux",
        },
        "versions": {"python": "3.12.1", "torch": "2.15.0", "triton": None},
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 471.3,
        "config": {
            "data": None,
            "trunk": "vit_mini",
            "mechanisms": list(names),
            "epochs": epochs,
            "img_size": 32,
            "seeds": list(range(seeds)),
            "device": "cpu",
            "batch_size": 64,
        },
        "data": {
            "name": "digits",
            "classes": [str(i) for i in range(10)],
            "train": 1437,
            "val": 360,
            "split": "every fifth image of a class, seed 0",
            "skipped": [],
        },
        "mechanisms": mechanisms,
    }


def page(results, gallery=()):
    return report.render(results, gallery)


def on_terminal(results, width=140) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(report.table(results))
    return console.export_text()


def test_page_and_terminal_show_the_same_figures():
    results = made_up()
    html, text = page(results), on_terminal(results)
    rows = _summary.rows(results)
    assert [row.name for row in rows][:2] == ["softmax", "sima"]
    assert sorted(row.name for row in rows) == sorted(NAMES)
    for row in rows:
        assert row.crossover in html
        assert (
            row.crossover.removesuffix(" tokens").replace("about ", "~").replace("never up to ", ">") in text
        )
        for cell in row.cells:
            assert cell.text in html
            assert cell.text in text
            assert cell.note in html
            assert cell.note in text


def test_figures_are_those_of_the_results():
    results = made_up(("softmax", "sima"), seeds=2)
    results["mechanisms"]["sima"] |= {
        "params": 123_456,
        "flops": 9_876_543,
        "images_per_s": 1550.0,
        "latency_ms": {"median": 0.7049, "low": 0.7, "high": 0.71},
        "peak_memory_mb": 19.0,
        "accuracy": {"mean": 96.25, "min": 95.04, "max": 97.46, "std": 1.2},
    }
    sima = _summary.rows(results)[1]
    assert [cell.text for cell in sima.cells] == ["96.2", "123 k", "9.88 M", "1,550", "0.705", "19.0"]
    times = "\N{MULTIPLICATION SIGN}"
    ratios = [f"{times}{x}" for x in ("0.27", "0.31", "0.50", "0.50", "10")]
    assert [cell.note for cell in sima.cells] == ["95.0\N{EN DASH}97.5", *ratios]
    assert [cell.best for cell in sima.cells] == [False, False, False, False, True, False]
    assert [cell.bar for cell in sima.cells] == pytest.approx([0, 0, 0, 0.5, 0.7049 / 1.41, 1.0])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.2, "1.20"), (9.996, "10.0"), (999.6, "1,000"), (123456, "123,000")],
)
def test_numbers_have_three_figures(value, text):
    assert _summary.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999"), (1000, "1.00 k"), (5.72e6, "5.72 M"), (2.5e9, "2.50 G")]
)
def test_counts_have_units(value, text):
    assert _summary.count(value) == text


def said(results) -> dict[str, str]:
    return dict(_summary.verdict(results))


def test_verdict_tells_who_is_better_by_more_than_chance():
    results = made_up(("softmax", "sima", "soft", "xnorm"), seeds=2)
    for name, mean in {"softmax": 90.0, "sima": 89.0, "soft": 97.0, "xnorm": 80.0}.items():
        results["mechanisms"][name]["accuracy"]["mean"] = mean
    # 2 sqrt(2 * 0.9 * 0.1 / 360) = 4.5 points.
    assert said(results)["Accuracy"] == (
        "The highest is soft with 97.0 %; softmax has 90.0 %. With 360 validation images a difference "
        "below 4.5 points can be chance: 1 of 3 cannot be told from softmax; better: soft (97.0 %); "
        "worse: xnorm (80.0 %)."
    )
    results["data"]["val"] = 360_000
    assert "none is level with softmax" in said(results)["Accuracy"]


def test_verdict_tells_where_softmax_wins_and_where_not():
    results = made_up(("softmax", "sima", "xnorm"))
    cost, length = (said(results)[subject] for subject in ("Cost at this size", "With more tokens"))
    assert "Inference: none beats softmax (1.41 ms) by 5 %, the nearest is sima (1.58 ms)." in cost
    assert "Memory: none beats softmax (1.90 MB) by 5 %, the nearest is sima (2.01 MB)." in cost
    assert length.startswith("2 of 2 layers become faster than softmax: sima (about 220 tokens) and xnorm")
    assert "At 16,384 tokens, the most that softmax was measured with, sima takes" in length
    results["mechanisms"]["xnorm"]["latency_ms"]["median"] = 0.5
    results["mechanisms"]["sima"]["images_per_s"] = 3200.0
    for name in ("sima", "xnorm"):
        results["mechanisms"][name]["crossover_tokens"] = None
    cost, length = (said(results)[subject] for subject in ("Cost at this size", "With more tokens"))
    assert "Inference: 1 of 2 beat softmax (1.41 ms) by 5 % or more, most xnorm (0.500 ms)." in cost
    assert "Training: none beats softmax (3,100 images/s) by 5 %, the nearest is sima (3,200" in cost
    assert "Never faster than softmax in the measured range: sima and xnorm." in length
    assert "become faster" not in length


def test_verdict_without_softmax_or_with_little_compares_nothing():
    results = made_up(("sima", "xnorm"), seeds=1)
    assert list(said(results)) == ["Accuracy"]
    assert "softmax" not in said(results)["Accuracy"]
    assert "trained once" in said(results)["Accuracy"]
    results["config"]["mechanisms"] = ["sima", "xnorm", "soft"]
    assert said(results)["Not finished"] == "soft."
    for some in (results, made_up(("softmax",)), made_up(())):
        assert "<h2>The figures</h2>" in page(some)


def test_what_failed_or_was_not_measured_is_a_dash():
    results = made_up(("softmax", "sima", "xnorm"))
    broken = results["mechanisms"]["sima"]
    broken["accuracy"] = dict.fromkeys(("mean", "min", "max", "std"), math.nan)
    broken["runs"][0]["curve"][3]["loss"] = math.nan
    broken |= {"sweep": [], "images_per_s": None, "peak_memory_mb": None, "crossover_tokens": None}
    row = _summary.rows(results)[2]
    assert row.name == "sima"
    assert [row.cells[i].text for i in (0, 3, 5)] == ["\N{EN DASH}"] * 3
    assert row.crossover == "\N{EN DASH}"
    assert said(results)["Not finished"] == "sima."
    assert "nan" not in page(results).lower().replace("finance", "")


def test_page_needs_no_network_and_its_ids_are_unique():
    html = page(made_up(), [{"png": png(8, 3), "truth": "3", "predictions": {"sima": "3"}}])
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", html)
    assert "@import" not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_page_is_balanced_html():
    void = {"meta", "img", "br", "path", "use", "rect"}
    opened = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                opened.append(tag)

        def handle_endtag(self, tag):
            if tag not in void:
                assert opened.pop() == tag

    Parser().feed(
        page(made_up(), [{"png": png(8, 3), "truth": "3", "predictions": {"sima": "1", "soft": "3"}}])
    )
    assert opened == []


def test_words_from_outside_are_escaped():
    evil = "<script>alert('&')</script>"
    results = made_up((*NAMES[:2], evil))
    results["command"][-1] = evil
    results["config"]["data"] = evil
    results["data"] |= {"name": evil, "classes": [evil, "b"], "skipped": [{"path": evil, "reason": evil}]}
    results["mechanisms"]["sima"] |= {"title": evil, "cost": f"N^2 {evil}"}
    html = page(results, [{"png": png(8, 3), "truth": evil, "predictions": {"sima": evil + "!"}}])
    assert "<script" not in html
    assert "N<sup>2</sup> &lt;script" in html
    assert html.count("&lt;script&gt;") >= 12


def test_gallery_marks_the_mistakes():
    picture = {
        "png": png(8, 3),
        "truth": "cat",
        "predictions": {"softmax": "cat", "sima": "dog", "xnorm": "cat"},
    }
    right = {"png": png(97, 3), "truth": "cow", "predictions": {"softmax": "cow"}}
    html = page(made_up(NAMES[:2]), [picture, right])
    assert html.count("picture wrong") == 1
    assert "<span>sima</span><b>dog</b>" in html
    assert "2 of 3 right" in html
    assert "all 1 right" in html
    assert html.count('class="pixels"') == 1
    assert base64.b64encode(png(97, 3)).decode() in html
    assert "<h2>Predictions</h2>" not in page(made_up(NAMES[:2]))


def test_plots_take_their_colours_from_the_page_and_ring_each_crossover():
    mechanisms = made_up()["mechanisms"]
    sweeps = {name: m["sweep"] for name, m in mechanisms.items()}
    crossovers = {name: m["crossover_tokens"] for name, m in mechanisms.items()}
    svg = _plots.cost(sweeps, "latency_ms", "latency, ms", crossovers)
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    assert all(f"var(--{_plots.name_variable(name)})" in svg for name in NAMES)
    assert svg.count("stroke-width: 1.6") >= sum(c is not None for c in crossovers.values()) == 9
    # At the smallest count there is no crossing: faster throughout.
    assert "stroke-width: 1.6" not in _plots.cost(sweeps, "latency_ms", "latency, ms", {"sima": 64})
    assert svg == _plots.cost(sweeps, "latency_ms", "latency, ms", crossovers)


def test_styles_differ_and_do_not_depend_on_who_takes_part():
    styles = _plots.styles([*NAMES, "a_sixth", "a_seventh"])
    for field in ("light", "dark", "marker"):
        assert len({getattr(style, field) for style in styles.values()}) == len(styles)
    assert _plots.styles(["sima", "a_seventh"])["sima"] == styles["sima"]


def test_labels_never_touch():
    draw = random.Random(1)
    for size in (1, 2, 7, 11, 19):
        for scale in (1.0, 0.1, 0.0):
            wanted = {str(i): 0.5 + scale * draw.uniform(-0.7, 0.7) for i in range(size)}
            placed = _plots._apart(wanted, 0.05)
            assert sorted(placed, key=lambda n: placed[n]) == sorted(wanted, key=lambda n: wanted[n])
            heights = sorted(placed.values())
            assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(heights))
            assert -1e-9 <= heights[0] <= heights[-1] <= 1 + 1e-9
    far = {"a": 0.1, "b": 0.9}
    assert _plots._apart(far, 0.05) == pytest.approx(far)
