"""Measuring: order, exact memory, where a figure comes from; limits of the sweep."""

import json
import shutil
import subprocess

import pytest
import torch

from sansmax.bench import measure, sweep


class Clock:
    """Time passes only in `spend`."""

    def __init__(self, monkeypatch, module):
        self.now = 0.0
        self.calls = []
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def spend(self, name, seconds):
        def call():
            self.now += seconds
            self.calls.append(name)

        return call


def test_interleaved_takes_turns_and_reverses(monkeypatch):
    clock = Clock(monkeypatch, measure)
    samples = measure.interleaved(
        {"a": clock.spend("a", 1.0), "b": clock.spend("b", 3.0)}, rounds=3, seconds=0
    )
    assert samples == {"a": [1.0] * 3, "b": [3.0] * 3}
    assert "".join(clock.calls) == "aabb" + "ab" + "ba" + "ab"


def test_interleaved_repeats_short_calls_and_fills_its_time(monkeypatch):
    clock = Clock(monkeypatch, measure)
    samples = measure.interleaved({"a": clock.spend("a", 0.0005)}, rounds=2, seconds=0.05, max_rounds=100)
    assert samples["a"] == pytest.approx([0.0005] * 20)
    assert len(clock.calls) == 2 + 20 * (1 + 4)  # one that does not count


@pytest.mark.parametrize(("fns", "words"), [({}, "at least one"), ({"a": print}, "rounds must lie between")])
def test_interleaved_refuses(fns, words):
    with pytest.raises(ValueError, match=words):
        measure.interleaved(fns, rounds=7, max_rounds=5)


def test_spread_is_quartiles():
    assert measure.spread([5.0, 1.0, 2.0, 4.0, 3.0], 10) == {"median": 30.0, "low": 20.0, "high": 40.0}
    assert measure.spread([0.25]) == {"median": 0.25, "low": 0.25, "high": 0.25}


def test_peak_memory_is_exact():
    kept = []

    def call():
        a = torch.empty(1000, 1000)  # 4.0 MB
        b = torch.empty(500, 1000)  # 2.0 MB
        del a
        kept.append(torch.empty(700, 1000))  # 2.8 MB
        return b

    assert measure.peak_memory(call) == 6_000_000
    x = torch.empty(100, 100, requires_grad=True)
    # exp holds its result; backward makes ones of sum's gradient (expanded) times that result.
    assert measure.peak_memory(lambda: x.exp().sum().backward()) >= 80_000
    assert measure.peak_memory(lambda: None) == 0


def test_peak_memory_does_not_count_what_was_there():
    held = torch.empty(250, 1000)
    assert measure.peak_memory(lambda: held[:100].clone()) == 400_000
    with pytest.raises(ValueError, match="cpu or cuda, got meta"):
        measure.peak_memory(lambda: None, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_on_a_gpu():
    assert measure.peak_memory(lambda: torch.empty(1 << 20, device="cuda"), "cuda") == 4 << 20


def test_machine_and_versions_fit_into_json(monkeypatch):
    monkeypatch.setattr(measure, "PACKAGES", ("torch", "no-such-package"))
    machine, versions = json.loads(json.dumps([measure.machine(), measure.versions()]))
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["torch_threads"] == torch.get_num_threads()
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert versions["no-such-package"] is None
    assert 0 < measure.free_memory() < 2**50


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_is_that_of_the_package_alone(monkeypatch, tmp_path):
    package = tmp_path / "src" / "sansmax"
    (package / "bench").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(measure, "__file__", str(package / "bench" / "measure.py"))
    assert measure.commit() is None

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-qm", "another project, with the package in its environment")
    assert measure.commit() is None
    git("add", ".")
    git("commit", "-qm", "the package")
    assert measure.commit() == git("rev-parse", "HEAD")
    (tmp_path / "other").write_text("changed")
    assert measure.commit() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed")
    assert measure.commit() == git("rev-parse", "HEAD") + "+dirty"


def power_law(monkeypatch, seconds, memory=lambda n: n):
    """Replaces the measurement of a layer by laws of the tokens; time passes accordingly."""
    now = [0.0]
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: now[0])

    def measured(mechanism, side, *_):
        now[0] += 4 * seconds(side * side)
        return seconds(side * side), memory(side * side), 0

    monkeypatch.setattr(sweep, "_measure", measured)


def tokens(**words):
    return [point["tokens"] for point in sweep.sweep("softmax", **words)]


def test_sweep_ends_where_a_call_is_too_slow(monkeypatch):
    power_law(monkeypatch, lambda n: 1e-8 * n * n)
    found = sweep.sweep("softmax", seconds=60)
    assert [p["tokens"] for p in found] == [64, 121, 256, 529, 1024, 2025, 4096, 8281]
    assert found[3] == pytest.approx({"tokens": 529, "latency_ms": 529**2 * 1e-5, "memory_mb": 529e-6})


def test_sweep_ends_at_its_other_limits(monkeypatch):
    power_law(monkeypatch, lambda n: 1e-6 * n)
    assert tokens(seconds=1e9, max_tokens=1024)[-1] == 1024
    # 4 n us for each n: 64 to 2025 take 16 ms together, 4096 would end at 33 ms.
    assert tokens(seconds=0.03)[-1] == 2025
    power_law(monkeypatch, lambda n: 1e-6 * n, memory=lambda n: n * n)
    monkeypatch.setattr(sweep, "free_memory", lambda device: 2 * 600**2)
    assert tokens(seconds=1e9)[-1] == 529


@pytest.mark.parametrize("mechanism", ["softmax", "soft", "aft_full"])
def test_sweep_measures_layers_and_leaves_the_random_state_alone(mechanism):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    points = sweep.sweep(mechanism, dim=12, num_heads=3, max_tokens=121, seconds=20)
    assert [p["tokens"] for p in points] == [64, 121]
    assert all(p["latency_ms"] > 0 and p["memory_mb"] > 0 for p in points)
    assert torch.equal(torch.get_rng_state(), before)


def line(counts, milliseconds):
    return [{"tokens": n, "latency_ms": milliseconds(n)} for n in counts]


def test_crossover_is_interpolated_in_the_logarithms():
    counts = [64, 256, 1024, 4096]
    softmax = line(counts, lambda n: 1e-5 * n * n)
    # 3e-3 n = 1e-5 n^2 at 300: exact, since the ratio is a power law.
    assert sweep.crossover(line(counts, lambda n: 3e-3 * n), softmax) == 300
    assert sweep.crossover(line(counts, lambda n: 1.0 * n), softmax) is None
    assert sweep.crossover(line(counts, lambda n: 1e-9 * n), softmax) == 64
    # One lucky sample is no crossover: faster throughout is meant.
    lucky = line(counts, lambda n: 1e-9 if n == 256 else 3e-3 * n if n > 1024 else 1.1e-5 * n * n)
    assert 1024 < sweep.crossover(lucky, softmax) < 4096
    # Only common counts are compared.
    assert sweep.crossover(line([100, 9999], lambda n: 1e-9 * n), softmax) is None
