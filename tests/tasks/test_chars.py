"""Bytes: splits, windows, learning, going on, generation."""

import csv
import gzip
import json
import lzma
import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sansmax import layers
from sansmax.cli import main
from sansmax.models import Decoder
from sansmax.tasks import chars
from sansmax.tasks._data.draws import Part
from sansmax.tasks._data.sampling import Sampler, Stream
from sansmax.tasks._data.text import Text, read_text
from sansmax.tasks._recipes.chars import Recipe, TextData
from sansmax.train.recipe import Optim
from sansmax.train.recipe import Recipe as Images
from sansmax.train.run import run

CAUSAL = [name for name, layer in layers.mechanisms().items() if layer.traits.causal]
CPU = torch.device("cpu")
TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2}
OPTIONS = {"aft_local": {"window": 5, "factor_dim": 4}, "aft_full": {"factor_dim": 4}}
OPTIONS["aft_conv"] = {"kernel_size": 4}


def tiny(out="", **changes) -> Recipe:
    optim = Optim(lr=1e-2, lr_batch=None, per="update", warmup=0.0, min_lr=0.0)
    words = {"mechanism": "aft_simple", "model_args": TINY, "tokens": 16, "dropout": 0.1, "epochs": 2}
    words |= {"batch_size": 8, "device": "cpu", "log_every": 1, "optim": optim}
    return Recipe(**words | {"out": str(out)} | changes)


def task(train: bytes, val: bytes, **changes) -> chars.Chars:
    parts = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, val))
    return chars.Chars(Text("text", "split", *parts), tiny(**changes), CPU)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A file of words in which a byte says much about the next two."""
    generator = np.random.default_rng(0)
    words = [b"abra", b"cadabra", b"simsala", b"bim", b"hocus", b"pocus", b"fidibus"]
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_bytes(b" ".join(words[i] for i in generator.integers(0, len(words), 4000)))
    return path


@pytest.mark.parametrize(
    ("count", "tokens", "stride"),
    [(100, 16, 16), (100, 16, 5), (17, 16, 3), (18, 16, 1), (9, 16, 16), (2, 16, 4)],
)
def test_every_held_out_byte_but_the_first_counts_once_behind_enough_others(count, tokens, stride):
    content = bytes(np.random.default_rng(1).integers(0, 256, count, dtype=np.uint8))
    found = task(bytes(100), content, tokens=tokens, stride=stride)
    seen = []
    for batch in found.val_batches(0, 1, 3):
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        for row, (values, scored) in enumerate(zip(batch.targets, batch.scored, strict=True)):
            places = scored.nonzero()[:, 0]
            seen += values[scored].tolist()
            if batch.positions[row]:
                assert places[0] + 1 >= tokens - stride
    assert bytes(seen) == content[1:]
    shares = [sum(int(b.scored.sum()) for b in found.val_batches(rank, 3, 2)) for rank in range(3)]
    assert sum(shares) == count - 1


def test_bits_per_character_is_the_mean_over_all_windows():
    content = bytes(np.random.default_rng(2).integers(97, 123, 83, dtype=np.uint8))
    found = task(bytes(100), content, tokens=16, stride=4)
    torch.manual_seed(0)
    network = chars.build(tiny(tokens=16), []).eval()
    batches = list(found.val_batches(0, 1, 4))
    got = found.scores(torch.cat([found.verdict(network(b.inputs), b) for b in batches]))
    nats = []
    for t in range(1, len(content)):  # the window in which byte t counts, worked out by hand
        number = max(0, -(-(t - 16) // 4))
        start = min(4 * number, len(content) - 17)
        window = torch.tensor(list(content[start:t]))[None]
        nats.append(F.cross_entropy(network(window)[:, -1], torch.tensor([content[t]])).item())
    assert got["loss"] == pytest.approx(np.mean(nats), rel=1e-6)
    assert got["bpc"] == pytest.approx(np.mean(nats) / math.log(2), rel=1e-6)
    # The same network sees as much or more behind a smaller stride: other windows, another figure.
    assert task(bytes(100), content, tokens=16, stride=16).val_size == 6


def test_an_epoch_shows_every_byte_once_and_the_next_another_cut():
    content = bytes(range(256)) * 5
    found = task(content, bytes(40), batch_size=4)
    part = Part(4, seed=3)
    epochs = []
    for epoch in (0, 1):
        batches = list(found.train_batches(epoch, 0, part))
        assert len(batches) == found.train_size // 4
        starts = [int(row[0]) for inputs, _ in batches for row in inputs]
        assert len(set(starts)) > 1
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (4, 16)
            assert torch.equal((inputs + 1) % 256, targets)
        epochs.append(torch.cat([inputs for inputs, _ in batches]))
    assert not torch.equal(*epochs)
    later = list(found.train_batches(1, 5, part))
    assert torch.equal(torch.cat([inputs for inputs, _ in later]), epochs[1][20:])
    pieces = list(found.train_batches(1, 0, Part(4, 2, 0, 1, 3)))
    assert sorted(map(tuple, torch.cat([x for x, _ in pieces]).tolist())) == sorted(
        map(tuple, epochs[1].tolist())
    )


def test_enwik8_and_other_files_have_their_splits(tmp_path):
    path = tmp_path / "enwik8"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    text = read_text(TextData(root=str(path)), 1024)
    assert (len(text.train), len(text.val)) == (90_000_000, 5_000_000)
    assert "90,000,000 to 95,000,000" in text.split
    assert "95,000,000 to 100,000,000" in read_text(TextData(root=str(path), val_split="test"), 1024).split
    path = tmp_path / "other"
    path.write_bytes(bytes(range(200)) * 5)
    text = read_text(TextData(root=str(path)), 16)
    assert (len(text.train), len(text.val)) == (900, 50)
    text = read_text(TextData(root=str(path), splits=(100, 30, 70), val_split="test"), 16)
    assert text.train.tolist() == list(path.read_bytes()[:100])
    assert text.val.tolist() == list(path.read_bytes()[130:200])
    text = read_text(TextData(root=str(path), train_bytes=40, val_bytes=7), 16)
    assert (len(text.train), len(text.val)) == (40, 7)


def test_packed_files_and_folders_hold_the_same_bytes(tmp_path):
    content = bytes(np.random.default_rng(3).integers(0, 256, 500, dtype=np.uint8))  # not UTF-8
    (tmp_path / "plain").write_bytes(content)
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        file.write(content)
    with lzma.open(tmp_path / "a.xz", "wb") as file:
        file.write(content)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("enwik8", content)
    texts = [read_text(TextData(root=str(tmp_path / n)), 16) for n in ("plain", "a.gz", "a.xz", "a.zip")]
    assert all(torch.equal(text.train, texts[0].train) for text in texts)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.txt").write_bytes(content)
    with lzma.open(folder / "valid.txt.xz", "wb") as file:
        file.write(content[:50])
    (folder / "test.txt").write_bytes(content[50:80])
    text = read_text(TextData(root=str(folder)), 16)
    assert bytes(text.train.tolist()) == content
    assert bytes(text.val.tolist()) == content[:50]
    assert bytes(read_text(TextData(root=str(folder), val_split="test"), 16).val.tolist()) == content[50:80]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.write_bytes(b""), "expected at least 18 bytes in the split train, got 0"),
        (lambda p: p.write_bytes(bytes(20)), "expected at least 2 bytes in the split val, got 1"),
        (lambda p: None, "expected a file or a folder at"),
        (lambda p: p.mkdir(), "expected one file train.* in"),
    ],
)
def test_what_is_too_short_or_not_there_is_told(make, words, tmp_path, capsys):
    path = tmp_path / "text"
    make(path)
    assert (
        main(
            ["train", "chars_sima", "--data.root", str(path), "--tokens", "16", "--out", str(tmp_path / "x")]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gz", b"no gzip", "can be unpacked"),
        ("a.xz", b"\xfd7zXZ\0cut", "can be unpacked"),
        ("a.zip", b"PK", "unpacked"),
    ],
)
def test_a_damaged_archive_is_told(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_text(TextData(root=str(tmp_path / name)), 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mechanism": "soft"}, "expected one with a causal form"),
        ({"tokens": 1}, "tokens: expected a whole number of at least 2"),
        ({"stride": 17}, "stride: expected 1 to 16"),
        ({"model": "vit_mini"}, "model: expected decoder"),
        ({"model_args": {"width": 3}}, "model_args: expected words that the decoder takes"),
        ({"model_args": {"positions": "odd"}}, "positions: expected one of learned"),
        ({"dropout": 1.5}, "dropout: expected a share"),
        ({"data": TextData(val_split="dev")}, "data.val_split: expected val or test"),
        ({"data": TextData(splits=(1, 2))}, "data.splits: expected three sizes"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(tiny(tmp_path / "x", **changes))


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_ten_thousand_streamed_logits_are_the_parallel_ones(mechanism):
    count = 2000 if mechanism in ("aft_full", "softmax") else 10_000  # these two grow with the square
    torch.manual_seed(0)
    words = {"mechanism": mechanism, "mechanism_args": OPTIONS.get(mechanism), "positions": "sinusoidal"}
    network = Decoder(16, count, 16, 1, 2, **words).eval()
    with torch.inference_mode():
        for name, parameter in network.named_parameters():
            if "bias_" in name or "gamma" in name:  # of positions: they begin near 0
                parameter.normal_(std=0.5)
        tokens = torch.randint(16, (1, count))
        parallel, exact = network(tokens), network.double()(tokens)
        network.float()
        state, streamed = network.init_state(), []
        for token in tokens[0]:
            logits, state = network.step(token[None], state)
            streamed.append(logits)
    spread = exact.std()
    budget = 4 * (parallel - exact).abs().max() / spread + 1e-6
    assert (torch.stack(streamed, 1) - exact).abs().max() / spread < budget
    assert state.tokens == count
    if mechanism not in ("aft_full", "softmax"):
        sizes = [leaf.numel() for leaf in _tensors(state)]
        assert sum(sizes) <= 16 * 16 * 3 + 200


def _tensors(state):
    for part in state if isinstance(state, tuple) else ():
        yield from [part] if isinstance(part, torch.Tensor) else _tensors(part)


def test_a_limited_network_begins_anew_from_half_of_its_positions():
    torch.manual_seed(0)
    network = Decoder(256, 12, 16, 1, 2, mechanism="aft_simple").eval()
    stream = Stream(network, CPU)
    content = bytes(np.random.default_rng(4).integers(0, 256, 40, dtype=np.uint8))
    stream.feed(content[:12])
    with torch.inference_mode():
        for count in range(13, 41):
            stream.feed(content[count - 1 : count])
            used = 7 + (count - 13) % 6  # six of before and those since
            window = torch.tensor(list(content[count - used : count]))[None]
            torch.testing.assert_close(stream.logits, network(window)[:, -1])
    with pytest.raises(ValueError, match=r"prompt: expected at most 12 bytes, .* got 13"):
        Stream(network, CPU).feed(bytes(13))
    with pytest.raises(ValueError, match="expected at most 12, for which positions are learned, got 13"):
        network(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_a_saved_state_goes_on_bit_for_bit(mechanism, tmp_path):
    torch.manual_seed(0)
    words = {"mechanism": mechanism, "mechanism_args": OPTIONS.get(mechanism)}
    network = Decoder(256, 24, 16, 2, 2, **words).eval()
    sampler = Sampler(top_k=50)
    whole = Stream(network, CPU, seed=5)
    whole.feed(b"abra")
    want = [whole.next(sampler) for _ in range(60)]
    first = Stream(network, CPU, seed=5)
    first.feed(b"abra")
    begun = [first.next(sampler) for _ in range(31)]
    first.save(tmp_path / "state.safetensors")
    second = Stream(network, CPU, seed=99)
    second.load(tmp_path / "state.safetensors")
    assert begun + [second.next(sampler) for _ in range(29)] == want
    other = Stream(Decoder(256, 24, 8, 2, 2, **words).eval(), CPU)
    with pytest.raises(ValueError, match="state: expected what --save-state wrote with this network"):
        other.load(tmp_path / "state.safetensors")


def test_samplers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]]).expand(20_000, -1)
    shares = logits[0].softmax(0)

    def found(**words):
        return Sampler(**words)(logits, generator).bincount(minlength=4) / len(logits)

    torch.testing.assert_close(found(), shares, atol=0.012, rtol=0)
    torch.testing.assert_close(found(temperature=2.0), (logits[0] / 2).softmax(0), atol=0.012, rtol=0)
    assert found(temperature=0.0).tolist() == [0, 1, 0, 0]
    two = torch.tensor([0, 3.0, 2.0, 0]).softmax(0) * 0 + torch.tensor([0, 1 / (1 + math.exp(-1)), 0, 0])
    two[2] = 1 - two[1]
    torch.testing.assert_close(found(top_k=2), two, atol=0.012, rtol=0)
    torch.testing.assert_close(found(top_p=0.8), two, atol=0.012, rtol=0)  # 0.64 + 0.24
    assert found(top_p=0.6).tolist() == [0, 1, 0, 0]
    assert found(top_k=9).gt(0).all()
    for words in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match=next(iter(words))):
            Sampler(**words)


def bigram_bits(train: bytes, val: bytes) -> float:
    """Bits per character of counted pairs, one added to each."""
    counts = np.ones((256, 256))
    np.add.at(counts, (np.frombuffer(train[:-1], np.uint8), np.frombuffer(train[1:], np.uint8)), 1)
    shares = counts / counts.sum(1, keepdims=True)
    return float(-np.log2(shares[list(val[:-1]), list(val[1:])]).mean())


def test_a_small_run_learns_more_than_pairs_of_bytes(book, tmp_path):
    data = TextData(root=str(book))
    recipe = tiny(tmp_path / "run", mechanism="aft_local", tokens=48, epochs=6, batch_size=16, data=data)
    recipe = replace(
        recipe, dropout=0.0, model_args={**TINY, "embed_dim": 32, "mechanism_args": OPTIONS["aft_local"]}
    )
    outcome = run(recipe)
    text = read_text(data, 48)
    baseline = bigram_bits(bytes(text.train.tolist()), bytes(text.val.tolist()))
    assert outcome.score < 0.75 * baseline < 0.75 * 8
    assert outcome.curve[-1]["bpc"] == outcome.score
    info = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert info["best"] == min(point["bpc"] for point in outcome.curve)
    assert (info["task"], info["unit"], info["higher"]) == ("chars", "sequences", False)
    assert info["network"]["context"] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    for words in (
        "bits per character",
        "What the context is worth",
        "Held-out bytes by surprise",
        "sequences/s",
    ):
        assert words in page


def test_going_on_repeats_every_weight(book, tmp_path, monkeypatch):
    words = {"data": TextData(root=str(book), sequences=40), "save_every": 3}
    whole = run(tiny(tmp_path / "whole", **words))
    loss, calls = chars.Chars.loss, []

    def failing(self, outputs, targets):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return loss(self, outputs, targets)

    monkeypatch.setattr(chars.Chars, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path / "part", **words))
    monkeypatch.undo()
    rest = run(tiny(tmp_path / "part", resume=True, **words))
    assert rest.curve == whole.curve
    for name in ("weights", "best"):
        first, second = ((tmp_path / f / f"{name}.safetensors").read_bytes() for f in ("whole", "part"))
        header = [json.loads(x[8 : 8 + int.from_bytes(x[:8], "little")]) for x in (first, second)]
        assert header[0].keys() == header[1].keys()
        assert (
            first[8 + int.from_bytes(first[:8], "little") :]
            == second[8 + int.from_bytes(second[:8], "little") :]
        )
    with pytest.raises(ValueError, match="tokens: expected 16, with which"):
        run(tiny(tmp_path / "part", resume=True, **{**words, "tokens": 15}))
    with pytest.raises(ValueError, match="recipe: expected one of chars"):
        run(Images(out=str(tmp_path / "part"), resume=True))


@pytest.fixture(scope="module")
def trained(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(tiny(folder, data=TextData(root=str(book), sequences=80)))
    return folder


def test_eval_scores_other_bytes_with_more_context(trained, book, capsys, tmp_path):
    assert main(["eval", str(trained), "--out", str(tmp_path / "a.json")]) == 0
    first = json.loads((tmp_path / "a.json").read_text())
    info = json.loads((trained / "recipe.json").read_text())
    assert first["figures"]["bpc"] == pytest.approx(info["best"], rel=1e-6)
    assert f"bits per character {info['best']:.4g}" in capsys.readouterr().out
    flags = ["--data.val-split", "test", "--stride", "2", "--out", str(tmp_path / "b.json")]
    assert main(["eval", str(trained), *flags]) == 0
    second = json.loads((tmp_path / "b.json").read_text())
    assert second["recipe"]["stride"] == 2
    assert "at least 14 of 16 bytes before each" in capsys.readouterr().out
    assert second["figures"]["bpc"] != first["figures"]["bpc"]
    assert main(["eval", str(trained), "--out", "a.txt"]) == 2
    assert main(["eval", str(trained), "--stride", "40"]) == 2


def test_predict_writes_the_bits_of_every_byte(trained, tmp_path, capsys):
    content = b"abra \xff\x00 cadabra simsala"
    (tmp_path / "x.bin").write_bytes(content)
    assert (
        main(
            [
                "predict",
                str(trained),
                str(tmp_path / "x.bin"),
                "--out",
                str(tmp_path / "x.csv"),
                "--stride",
                "3",
            ]
        )
        == 0
    )
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["offset"]) for row in rows] == list(range(1, len(content)))
    assert bytes(int(row["byte"]) for row in rows) == content[1:]
    mean = np.mean([float(row["bits"]) for row in rows])
    assert f"{mean:.4g} bits" in capsys.readouterr().out
    (tmp_path / "one").write_bytes(b"a")
    for source, out in (("one", "y.csv"), ("none", "y.csv"), ("x.bin", "y.txt")):
        assert main(["predict", str(trained), str(tmp_path / source), "--out", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err.count("expected") == 3


def test_generate_streams_and_goes_on(trained, tmp_path, capfdbinary):
    base = ["generate", str(trained), "--seed", "3"]
    out = [tmp_path / f"{i}.txt" for i in range(4)]
    assert main([*base, "--prompt", "abra", "--length", "90", "--out", str(out[0])]) == 0
    state = str(tmp_path / "s.safetensors")
    assert (
        main([*base, "--prompt", "abra", "--length", "40", "--out", str(out[1]), "--save-state", state]) == 0
    )
    assert main([*base, "--state", state, "--length", "50", "--out", str(out[2])]) == 0
    assert out[0].read_bytes() == out[1].read_bytes() + out[2].read_bytes()
    capfdbinary.readouterr()
    assert main([*base, "--prompt", "abra", "--length", "90"]) == 0
    assert capfdbinary.readouterr().out == out[0].read_bytes()
    assert main([*base, "--prompt", "a" * 17]) == 2
    assert b"prompt: expected at most 16 bytes" in capfdbinary.readouterr().err
    assert main([*base, "--prompt", "a", "--state", state]) == 2
    assert main([*base, "--temperature", "-1"]) == 2
    assert main(["generate", str(tmp_path)]) == 2
    assert b"expected a run of chars" in capfdbinary.readouterr().err


def test_paper_recipes():
    from sansmax import recipes

    found = {name: recipes.recipe(name) for name in recipes.names() if name.startswith("enwik8_")}
    counts = {
        name: sum(p.numel() for p in chars.build(r, []).parameters())
        for name, r in found.items()
        if "wide" in name
    }
    # 12 layers of 512: attention 4 C^2, MLP 8 C^2 each, and the factors 2 T 256.
    assert counts["enwik8_aft_local_32_wide"] == counts["enwik8_softmax_wide"] + 12 * 2 * 1024 * 256
    assert all(r.checked().epochs == 100 and r.optim.weight_decay == 0.5 for r in found.values())
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    from sansmax.train.optim import schedule

    plan = schedule(optimizer, found["enwik8_aft_simple"], 687)
    rates = []
    for update in (0, 1999, 3984, 15939):
        plan.step(update)
        rates.append(optimizer.param_groups[0]["lr"])
    warm = round(5.8 * 687)
    assert rates == pytest.approx(
        [3e-3 / warm, 3e-3 * 2000 / warm, 3e-3, 3e-3 * math.sqrt(warm / 15940)], rel=1e-3
    )
