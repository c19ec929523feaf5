"""sansmax which: a network's cost from one block, and where each mechanism begins to pay, in words."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import sansmax
from sansmax import cli
from sansmax.bench import blocks, measure
from sansmax.bench import which as bench_which
from sansmax.bench.which import Question, which, words
from sansmax.bench.which_table import ask


def took(**milliseconds):
    """What time_size gives, with softmax at 10 ms an image."""
    rows = {"softmax": 10.0, **milliseconds}
    return {
        name: {"skipped": ms}
        if isinstance(ms, str)
        else {
            "ms_per_image": dict.fromkeys(("median", "low", "high"), ms),
            "faster": dict.fromkeys(("median", "low", "high"), 10.0 / ms),
            "peak_mb": 1.0,
            "batch": 8,
        }
        for name, ms in rows.items()
    }


def test_words_where_each_begins_to_pay():
    found = {
        224: took(sima=12.0, xnorm=9.0, soft=20.0, external=5.0, aft_full="no time"),
        512: took(sima=9.8, xnorm=4.0, soft=15.0, external=20.0, aft_full="no time"),
        1024: took(sima=2.0, xnorm=1.0, soft=11.0, external=5.0, aft_full=30.0),
    }
    assert words(found) == [
        "sima: from 1024 px (begins between 512 and 1024 px)",
        "xnorm: from 224 px, the smallest measured",
        "soft: does not pay up to 1024 px",
        "external: at 224, 1024 px, not at 512 px",
        "aft_full: does not pay up to 1024 px",
        "softmax is the fastest nowhere from 224 to 1024 px",
    ]
    found = {224: took(sima=12.0), 512: took(sima=9.8), 1024: took(sima=2.0)}
    assert words(found)[-1] == "stay with softmax up to 512 px"
    assert words({224: took(sima=12.0), 512: took(sima=9.8)})[-1] == (
        "stay with softmax up to 512 px, the largest measured"
    )
    assert words({224: took(sima="no time")})[0] == "sima: not compared"
    assert "larger --budget" in words({224: took(sima="no time")})[-1]


def test_one_lucky_round_is_not_faster():
    found = {224: took(sima=9.0)}
    found[224]["sima"]["faster"]["low"] = 0.9
    assert words(found)[0] == "sima: does not pay up to 224 px"


def test_stay_with_softmax_and_the_file(tmp_path, capsys):
    asked = []

    def timing(question, size, seconds, before):
        asked.append((size, round(seconds), sorted(before)))
        return took(sima=20.0)

    out = tmp_path / "which.json"
    ask("vit_mini", (64, 32), 8, ("sima",), False, 50.0, "float32", "cpu", out, Console(), timing)
    # A larger image gets a larger share, and what the smaller ones left over.
    assert asked == [(32, 10, []), (64, 50, [32])]
    text = capsys.readouterr().out
    assert "vit_mini, 64 px, batch 8, evaluation" in text
    assert text.endswith(
        "sima: does not pay up to 64 px\nstay with softmax up to 64 px, the largest measured\n"
    )
    saved = json.loads(out.read_text())
    assert [(row["img_size"], row["mechanism"]) for row in saved["rows"]] == [
        (size, name) for size in (32, 64) for name in ("softmax", "sima")
    ]
    assert saved["words"][-1] == "stay with softmax up to 64 px, the largest measured"
    assert saved["settings"]["network"] == "vit_mini"
    assert {"machine", "commit", "versions", "command", "clock_mhz", "started"} <= set(saved)


@pytest.mark.parametrize("train", [False, True])
def test_a_tiny_network_in_seconds(train, tmp_path, capsys):
    out = tmp_path / "which.json"
    arguments = ["--img-size", "16", "24", "--batch", "3", "--budget", "8", "--device", "cpu"]
    arguments += ["--mechanisms", "sima", "aft_full", "--out", str(out), *["--train"] * train]
    assert cli.main(["which", "vit_mini", *arguments]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["mechanism"] for row in rows] == ["softmax", "sima", "aft_full"] * 2
    for row in rows:
        assert row["ms_per_image"]["low"] <= row["ms_per_image"]["median"] <= row["ms_per_image"]["high"]
        assert row["peak_mb"] > 0
    assert all(row["faster"]["median"] == 1 for row in rows if row["mechanism"] == "softmax")
    assert "times faster" in capsys.readouterr().out


def test_what_cannot_be_built_or_afforded_is_told():
    question = Question("vit_mini", 2, ("softmax", "sima"))
    (found,) = which(question, (16,), 1e-6).values()
    assert [row["skipped"].partition(";")[0] for row in found.values()] == ["the time is used up"] * 2
    network = sansmax.create_model("vit_mini", img_size=16)
    piece = blocks.Pieces(network, torch.zeros(2, 3, 16, 16), train=False)
    assert "samples would take" in bench_which._probed(piece, 2, question, left=1e-9)["skipped"]
    assert words({16: found})[0] == "sima: not compared"
    before = {64: took(sima=1.0, aft_full=1.0)}
    assert bench_which._too_large("sima", 256, before, free_mb=15.9) == (
        "it may need 0.0 GB and 0.0 GB are free"
    )
    assert bench_which._too_large("sima", 256, before, free_mb=16.1) == ""
    assert bench_which._too_large("aft_full", 256, before, free_mb=255) != ""
    assert bench_which._too_large("softmax", 256, before, free_mb=16.1) == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["vit_minny"], "unknown name 'vit_minny' in trunks"),
        (["vit_mini", "--mechanisms", "simaa"], "unknown name 'simaa' in mechanisms"),
        (["vit_mini", "--batch", "0"], "img_size, batch, budget: expected"),
        (["vit_mini", "--out", "which.txt"], "out: expected a file that ends in .json"),
        (["xvit_u_p16", "--img-size", "32"], "XViT: mechanism must be linear"),
    ],
)
def test_a_users_error_is_one_sentence(arguments, sentence, capsys):
    assert cli.main(["which", *arguments, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


TRUNKS = {
    "vit_mini": [4],
    "xcit_nano_12_p16_224": [12, 2],
    "sima_cvt_13": [2, 10],
    "soft_tiny": [2, 3, 2],
    "eamlp_7": [7],
    "xvit_u_p16": [12, 2],
    "sima_nano_12_p16_pyramid": [12, 2],
}


@pytest.mark.parametrize("trunk", TRUNKS)
def test_blocks_are_found_taken_out_and_put_back(trunk):
    network = sansmax.create_model(trunk, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    piece = blocks.Pieces(network, x, train=False)
    assert piece.counts == TRUNKS[trunk]
    want = network(x)
    ran = []
    for group in piece.groups:
        for block in network.get_submodule(group.container)[group.start : group.start + group.count]:
            block.register_forward_hook(lambda *_, at=group: ran.append(at))
    for call, expected in zip(piece.calls().values(), [[], *([g] for g in piece.groups)], strict=True):
        ran.clear()
        call()
        assert ran == expected
    torch.testing.assert_close(network(x), want, rtol=0, atol=0)


class Slow(nn.Module):
    """A block whose time is told by a clock that it moves itself."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.attn, self.clock, self.seconds = nn.Identity(), clock, seconds

    def forward(self, x):
        self.clock[0] += self.seconds
        return x


def test_the_time_of_a_network_is_that_of_its_pieces(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 3, 1), *(Slow(clock, 0.5) for _ in range(5))),
        nn.Sequential(Slow(clock, 7.0)),
        nn.ModuleList([]),
        nn.Sequential(*(Slow(clock, 2.0) for _ in range(3))),
    )
    network[2].forward = lambda x: x
    x = torch.zeros(1, 3, 2, 2)
    piece = blocks.Pieces(network, x, train=False)
    samples = measure.interleaved(piece.calls(), seconds=0, rounds=2, warmup=0)
    assert piece.seconds(samples) == pytest.approx([5 * 0.5 + 7.0 + 3 * 2.0] * 2)
    # Built with fewer blocks than it stands for.
    shallow = blocks.Pieces(network, x, train=False, counts=[50, 30])
    assert shallow.seconds(samples) == pytest.approx([25.0 + 7.0 + 60.0] * 2)


@pytest.mark.parametrize("train", [False, True])
def test_the_memory_of_a_network_is_that_of_its_pieces(train):
    torch.manual_seed(0)
    network = sansmax.create_model("vit_mini", "sima", img_size=32, depth=6)
    piece = blocks.Pieces(network, torch.randn(3, 3, 32, 32), train)
    piece.whole()
    whole = measure.peak_memory(piece.whole)
    assert piece.memory("cpu") == pytest.approx(whole, rel=0.15)
