"""sansmax bench: checked before it is timed, saved with its origin, compared with an earlier file."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sansmax import cli
from sansmax.bench import cases, ceilings, changes, models, ops, speed

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FORMS = {
    "median_ms", "low_ms", "high_ms", "samples", "peak_mb", "gflops", "mb_at_least", "share", "bound", "error"
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "COPY_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "_last_cache", lambda: 0)
    monkeypatch.setattr(ceilings, "LARGEST_SIDE", 256)


def bench(*arguments):
    return cli.main(["bench", *map(str, arguments), "--device", "cpu", "--seconds", "0"])


TINY = ("--tokens", 15, "--heads", 3, "--dim", 8)


def test_operators_agree_with_their_published_form_before_they_are_timed(tmp_path, capsys):
    out = tmp_path / "new" / "ops.json"
    assert bench("ops", *TINY, "--batch", 2, "--out", out) == 0
    saved = json.loads(out.read_text())
    assert [(r["op"], r["pass"]) for r in saved["rows"]] == [
        *itertools.product(ops.OPERATORS, ("forward", "forward+backward"))
    ]
    for row in saved["rows"]:
        assert row["error"] <= row["budget"] <= 1e-3
        assert list(row["forms"]) == ["sansmax", "published", "sdpa"]
        for form in row["forms"].values():
            assert set(form) == FORMS
            assert 0 < form["low_ms"] <= form["median_ms"] <= form["high_ms"]
            assert form["peak_mb"] > 0
            assert form["share"] > 0
        assert row["speedup"]["sdpa"]["low"] <= row["speedup"]["sdpa"]["high"]
        assert set(row["ceilings"]) == {"copy_gb_per_s", "matmul_gflop_per_s"}
    assert {"commit", "command", "started", "seconds", "settings", "sansmax"} <= set(saved)
    assert set(saved["clock_mhz"]) == {"start", "end"}
    assert saved["command"][0] == "sansmax"
    assert saved["machine"]["cpu"]
    assert saved["versions"]["torch"]
    assert [path.name for path in out.parent.iterdir()] == ["ops.json"]
    assert "aft_simple" in capsys.readouterr().out


def test_causal_forms_agree_too(tmp_path):
    out = tmp_path / "ops.json"
    assert bench("ops", *TINY, "--causal", "--out", out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["op"] for row in rows} == set(ops.OPERATORS) - {"soft", "external"}
    assert all(row["causal"] and list(row["forms"]) == ["sansmax", "published", "sdpa"] for row in rows)


def test_soft_on_a_published_grid_meets_its_published_form(tmp_path):
    out = tmp_path / "layers.json"
    assert bench("layers", "soft", "--tokens", 196, "--heads", 2, "--dim", 16, "--out", out) == 0
    for row in json.loads(out.read_text())["rows"]:
        assert row["error"] <= row["budget"]
        assert list(row["forms"]) == ["sansmax", "timm", "published"]


def test_what_a_pass_moves_and_computes():
    x, weight = torch.zeros(3, 5), torch.zeros(5, 7)
    form = cases.Form(torch.mm, (x, weight), None, 2 * 3 * 5 * 7)
    # 15 + 35 numbers in, 21 out; their gradients; two moments read and written and the new weights.
    assert cases.work(form, "forward", 4 * 21) == (4 * 71, 210)
    assert cases.work(form, "forward+backward", 4 * 21) == (8 * 71, 630)
    assert cases.work(form, "train", 4 * 21) == (8 * 71 + 20 * 35, 630)
    rates = ceilings.Ceilings({}, moved=100, flops=30).rates({"copy": 2.0, "matmul": 3.0})
    assert rates == {"copy": 50.0, "matmul": 10.0}
    assert ceilings.share(100, 10, 4.0, rates) == {"share": 0.5, "bound": "memory"}
    assert ceilings.share(100, 40, 4.0, rates) == {"share": 1.0, "bound": "compute"}


def test_a_wrong_result_has_no_speed(monkeypatch, tmp_path, capsys):
    right = ops.OPERATORS["sima"]
    wrong = {
        "output": replace(right, ours=lambda s, x, **w: right.ours(s, x, **w) * 1.001),
        # The output is right, the gradient is not.
        "gradient": replace(right, ours=lambda s, x, **w: right.ours(s, x.detach() + 0 * x, **w)),
        "right": right,
    }
    monkeypatch.setattr(ops, "OPERATORS", {**wrong, "softmax": ops.OPERATORS["softmax"]})
    out, page = tmp_path / "ops.json", tmp_path / "ops.md"
    assert bench("ops", "output", "gradient", "right", *TINY, "--out", out, "--markdown", page) == 1
    rows = json.loads(out.read_text())["rows"]
    assert ["forms" in row for row in rows] == [False, False, True, False, True, True]
    assert [row["wrong"] for row in rows] == [True, True, False, True, False, False]
    assert "sansmax is wrong: off by" in rows[0]["notes"][0]
    assert "sansmax is wrong: off by" in capsys.readouterr().out
    table = page.read_text()
    assert table.count("| wrong |") == 3
    assert "gradient, 15, 1, 3, 8, auto, float32, forward+backward: sansmax is wrong" in table


def test_others_that_are_slow_or_wrong_or_too_large_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "TOO_SLOW", 0.0)
    out = tmp_path / "ops.json"
    assert bench("ops", "softmax", *TINY, "--passes", "forward", "--out", out) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert list(row["forms"]) == ["sansmax"]
    assert [note.partition(":")[0] for note in row["notes"]] == [
        "published was left out",
        "sdpa was left out",
    ]
    monkeypatch.setattr(cases, "TOO_SLOW", 10.0)
    monkeypatch.setattr(cases, "free_memory", lambda device: 1000)
    assert bench("ops", "softmax", *TINY, "--passes", "forward", "--out", out) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert list(row["forms"]) == ["sansmax", "sdpa"]
    assert "published was left out: it needs" in row["notes"][1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_a_budget_of_its_own(dtype, tmp_path):
    out = tmp_path / "ops.json"
    assert bench("ops", "sima", "xnorm", "external", *TINY, "--dtype", dtype, "--out", out) == 0
    for row in json.loads(out.read_text())["rows"]:
        assert 1e-5 < row["error"] <= row["budget"] < 0.1


def test_layers_and_networks_are_timed_beside_timms(monkeypatch, tmp_path, capsys):
    out, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    words = ("--passes", "forward", "forward+backward", "train", "--out", out, "--plot", picture)
    assert bench("layers", "soft", "aft_full", "--tokens", 60, "--heads", 3, "--dim", 48, *words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["layer"] for row in rows] == ["soft"] * 3 + ["aft_full"] * 3
    assert all(list(row["forms"]) == ["sansmax", "timm"] for row in rows)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    words = ("--img-size", 32, "--passes", "forward", "--out", out)
    assert bench("networks", "vit_mini", "--mechanism", "sima", *words) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["network"], row["mechanism"], row["img_size"]) == ("vit_mini", "sima", 32)
    assert list(row["forms"]) == ["sansmax", "vit_mini"]
    # No speed is given for a wrong result.
    monkeypatch.setitem(cases.TOLERANCES, "network", ({"float32": (0.0, 0.0)}, {"float32": (0.0, 0.0)}))
    assert bench("networks", "vit_mini", "--mechanism", "sima", *words) == 1
    assert "forms" not in json.loads(out.read_text())["rows"][0]


def test_the_twin_of_a_network():
    assert models.twin("sima_tiny_24_p8") == "xcit_tiny_24_p8_224"
    assert models.twin("sima_deit_tiny_p16") == "deit_tiny_patch16_224"
    assert models.twin("soft_tiny") == "deit_small_patch16_224"
    assert models.twin("vit_base_patch16_224") == "vit_base_patch16_224"


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(speed, "compiler_refusal", lambda device: "there is no g++")
    assert bench("ops", "sima", *TINY, "--passes", "forward", "--compile") == 0
    out, err = capsys.readouterr()
    assert "it does not work here: there is no g++" in err
    assert "+c " not in out.partition("x: times")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ops", "simaa"), "unknown name 'simaa' in operators"),
        (("ops", "soft", "--causal"), "unknown name 'soft' in causal operators"),
        (("layers", "simaa"), "unknown name 'simaa' in layers"),
        (("networks", "sima_nano"), "unknown name 'sima_nano' in networks"),
        (("networks", "pct_cls"), "expected one that takes images, got pct_cls"),
        (("networks", "soft_tiny", "--against", "deit_tin"), "unknown name 'deit_tin'"),
        (("ops", "--tokens", 0), "tokens: expected whole numbers of at least 1, got [0]"),
        (("ops", "--passes", "train"), "passes: an operator has no parameters to train"),
        (("ops", "--out", "figures.txt"), "out: expected a file that ends in .json"),
        (("ops", "--plot", "figures.svg"), "plot: expected a file that ends in .png"),
        (("ops", "--compare", "no-such-file.json"), "No such file or directory: no-such-file.json"),
    ],
)
def test_a_users_error_is_one_sentence(arguments, words, capsys):
    assert bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


@pytest.fixture
def saved(tmp_path):
    out = tmp_path / "old.json"
    assert bench("ops", "sima", *TINY, "--out", out) == 0
    return out


def test_a_slow_row_is_found(saved, tmp_path, capsys):
    capsys.readouterr()
    assert cli.main(["bench", "changes", str(saved), str(saved)]) == 0
    out = capsys.readouterr().out
    assert out.count("1.00x") == 2
    assert "SLOWER" not in out
    record = json.loads(saved.read_text())
    new = tmp_path / "new.json"

    def judged(fail_over=0.1, **factors):
        changed = copy.deepcopy(record)
        own = changed["rows"][1]["forms"]["sansmax"]
        for key, factor in factors.items():
            own[key] *= factor
        changed["versions"]["torch"] = "9.9"
        new.write_text(json.dumps(changed))
        code = cli.main(["bench", "changes", str(saved), str(new), "--fail-over", str(fail_over)])
        return code, capsys.readouterr().out

    own = record["rows"][1]["forms"]["sansmax"]
    spread = own["high_ms"] / own["low_ms"]
    times = ("median_ms", "low_ms", "high_ms")
    code, out = judged(**dict.fromkeys(times, 1.2 * spread))
    assert code == 1
    assert out.count("SLOWER") == 1
    assert f"another version: torch {record['versions']['torch']} -> 9.9" in out
    # Within the quartiles, or within what is allowed.
    assert judged(median_ms=1.2)[0] == 0
    assert judged(fail_over=0.3, **dict.fromkeys(times, 1.2 * spread))[0] == 0
    assert judged(peak_mb=1.2)[0] == 1
    assert judged(peak_mb=1.05)[0] == 0


def test_a_run_is_compared_with_an_earlier_one(saved, capsys):
    record = json.loads(saved.read_text())
    for row in record["rows"]:
        for key in ("median_ms", "low_ms", "high_ms"):
            row["forms"]["sansmax"][key] *= 1e-6
    saved.write_text(json.dumps(record))
    assert bench("ops", "sima", *TINY, "--compare", saved) == 1
    assert capsys.readouterr().out.count("SLOWER") == 2
    for row in record["rows"]:
        for key in ("median_ms", "low_ms", "high_ms"):
            row["forms"]["sansmax"][key] *= 1e12
    saved.write_text(json.dumps(record))
    assert bench("ops", "sima", *TINY, "--compare", saved) == 0


def test_older_files_are_read(tmp_path):
    record = json.loads((RESULTS / "networks-cpu.json").read_text())
    times = {"median_ms": 0.69, "low_ms": 0.68, "high_ms": 0.71, "samples": 200, "peak_mb": 0.44}
    record["settings"] = {"batch": 1, "heads": 6, "dim": 64, "dtype": "float32", "device": "cpu"}
    record["rows"] = [{"op": "softmax", "tokens": 196, "pass": "forward", "fused": times, "sdpa": times}]
    (tmp_path / "ops.json").write_text(json.dumps(record))
    operators = changes.read(tmp_path / "ops.json")
    assert len(operators.rows) == 1
    key, own = next(iter(operators.rows.items()))
    assert dict(key) == {
        "op": "softmax",
        "tokens": 196,
        "batch": 1,
        "heads": 6,
        "dim": 64,
        "backend": "auto",
        "dtype": "float32",
        "device": "cpu",
        "pass": "forward",
    }
    assert own == times
    record["settings"] = {"batch": 1, "dtype": "float32", "device": "cpu"}
    record["rows"] = [
        {"network": name, "size": size, "gmacs": 2.1, **times}
        for name in ("soft_tiny", "deit_small_patch16_224")
        for size in (224, 384)
    ]
    (tmp_path / "networks.json").write_text(json.dumps(record))
    networks = changes.read(tmp_path / "networks.json")
    assert len(networks.rows) == 4
    about = {"network": "soft_tiny", "mechanism": None, "img_size": 224, "batch": 1}
    about |= {"dtype": "float32", "device": "cpu", "pass": "forward"}
    assert about in [dict(key) for key in networks.rows]
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="expected figures of `sansmax bench`"):
        changes.read(tmp_path / "x.json")
