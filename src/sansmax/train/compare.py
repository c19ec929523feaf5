"""The comparison: a small network, trained with every mechanism on the same images, measured and reported."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .. import __version__, layers
from ..bench import measure
from ..bench.report import render
from ..bench.sweep import crossover, sweep
from ..tasks._data import Images, load_images
from ..tasks._data.batches import InMemory
from ..tasks.classification import Classification
from ._config import (
    BASELINE,
    CompareConfig,
    augmentation,
    check_continues,
    checked,
    completed,
    network,
    recipe,
    settings,
)
from ._gallery import gallery
from .checkpoint import prepare_folder, read_json, write_json, write_text
from .loop import train

__all__ = ["CompareConfig", "compare"]

Records = dict[str, dict[str, Any]]


def compare(config: CompareConfig, console: Console | None = None) -> dict[str, Any]:
    """Trains and measures every mechanism; returns what it writes to `out`/results.json.

    A mechanism's figures are written to `out`/<mechanism>.json as soon as it is trained; a second call with
    the same `out` goes on behind the last one that was finished. `out`/report.html shows all of it.

    Args:
        console: where progress is shown; None is silent.

    Raises:
        ValueError, OSError: a setting, the data or the folder will not do; one sentence says what to do.
        KeyboardInterrupt: its text says what is finished and how to go on.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    console = console or Console(quiet=True)
    command = config.command()
    config = checked(config)
    folder = Path(config.out).expanduser()
    records: Records = {}
    try:
        prepare_folder(folder)
        with console.status("reading the images"):
            images = load_images(config.data, config.img_size)
        config = completed(config, images)
        if images.skipped:
            first = "{path}: {reason}".format(**images.skipped[0])
            _say(console, f"skipped {len(images.skipped)} unreadable images, the first {first}")
        check_continues(folder, settings(config, images))
        records |= {name: _record(folder, name) for name in config.mechanisms}
        _train_all(config, images, folder, records, console)
        _measure_all(config, images, folder, records, console)
        results = {
            "sansmax": __version__,
            "commit": measure.commit(),
            "command": command,
            "machine": measure.machine(),
            "versions": measure.versions(),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - clock, 1),
            "config": dataclasses.asdict(config),
            "data": {
                "name": images.name,
                "classes": images.classes,
                "train": len(images.train_labels),
                "val": len(images.val_labels),
                "split": images.split,
                "skipped": images.skipped,
            },
            "mechanisms": _summaries(config, records),
        }
        write_json(folder / "results.json", results)
        write_text(folder / "report.html", render(results, gallery(images, results)))
    except KeyboardInterrupt:
        done = [name for name in records if _trained(records[name], config.seeds)]
        todo = [name for name in config.mechanisms if name not in done]
        raise KeyboardInterrupt(
            f"interrupted: {len(done)} of {len(config.mechanisms)} mechanisms are finished and kept in "
            f"{folder}; the same command goes on with {todo[0] if todo else 'the measurements'}"
        ) from None
    return results


def _record(folder: Path, mechanism: str) -> dict[str, Any]:
    """What is known of a mechanism: its traits, and the figures in its file."""
    traits = layers.mechanism(mechanism).traits
    told = {name: getattr(traits, name) for name in ("title", "paper", "exp_free", "computes", "cost")}
    return {"runs": [], **(read_json(folder / f"{mechanism}.json") or {}), **told}


def _trained(record: dict[str, Any], seeds: Iterable[int]) -> bool:
    return set(seeds) <= {run["seed"] for run in record["runs"]}


def _train_all(
    config: CompareConfig, images: Images, folder: Path, records: Records, console: Console
) -> None:
    assert config.epochs is not None
    task = _task(config, images)
    todo = [
        (name, seed)
        for name, record in records.items()
        for seed in config.seeds
        if seed not in {run["seed"] for run in record["runs"]}
    ]
    if todo and (kept := sum(len(record["runs"]) for record in records.values())):
        _say(console, f"{folder} holds {kept} finished runs; going on with {todo[0][0]}")
    with _progress(console) as progress:
        bar = progress.add_task("", total=len(todo) * config.epochs)
        for name, seed in todo:
            record = records[name]
            progress.update(bar, description=name)
            with _in_words(name):
                model = network(config, images, name, seed)
                if "flops" not in record:
                    record["params"] = sum(p.numel() for p in model.parameters())
                    record["flops"] = measure.count_flops(model, _one_image(task).cpu())
                outcome = train(
                    model, task, recipe(config, images, seed), on_epoch=lambda *_: progress.advance(bar)
                )
            record["runs"].append(
                {
                    "seed": seed,
                    "accuracy": 100 * outcome.score,
                    "train_seconds": outcome.train_seconds,
                    "images_per_s": outcome.images_per_s,
                    "curve": [
                        {"epoch": p["epoch"], "loss": p["loss"], "accuracy": 100 * p["top1"]}
                        for p in outcome.curve
                    ],
                    "predictions": outcome.predictions,
                }
            )
            write_json(folder / f"{name}.json", record)
            which = f"{name} (seed {seed})" if len(config.seeds) > 1 else name
            _say(console, f"{which:<28} {100 * outcome.score:5.1f} %  {outcome.train_seconds:6.1f} s")


@contextmanager
def _in_words(mechanism: str) -> Iterator[None]:
    """Says which mechanism it was; full memory becomes a sentence."""
    try:
        yield
    except ValueError as error:
        words = str(error).replace("--optim.lr or --optim.clip", "--lr")
        raise ValueError(f"{mechanism}: {words}") from None
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise ValueError(
            f"{mechanism}: expected a batch that fits into memory, got {str(error).splitlines()[0]!r}; lower "
            f"--batch-size or --img-size"
        ) from None


def _measure_all(
    config: CompareConfig, images: Images, folder: Path, records: Records, console: Console
) -> None:
    """Latency and memory of one image, all mechanisms in turn; then the sweep over token counts."""
    if not all("latency_ms" in record for record in records.values()):
        with console.status("measuring latency and memory"), torch.inference_mode():
            image = _one_image(_task(config, images))
            models = {name: network(config, images, name).to(config.device).eval() for name in records}
            calls = {name: _call(model, image) for name, model in models.items()}
            seconds = measure.interleaved(calls, seconds=0.4 * len(calls), device=config.device)
            for name, call in calls.items():
                records[name]["latency_ms"] = measure.spread(seconds[name], 1e3)
                records[name]["peak_memory_mb"] = measure.peak_memory(call, config.device) / 1e6
                write_json(folder / f"{name}.json", records[name])
    if not config.sweep:
        return
    modules = network(config, images, BASELINE).modules()
    mixer = next(module for module in modules if isinstance(module, layers.Mixer))
    todo = [name for name, record in records.items() if "sweep" not in record]
    with _progress(console) as progress:
        for name in progress.track(todo, description="latency against tokens"):
            limit = records[BASELINE]["sweep"][-1]["tokens"] if name != BASELINE else None
            records[name]["sweep"] = sweep(
                name, dim=mixer.dim, num_heads=mixer.num_heads, device=config.device, max_tokens=limit
            )
            write_json(folder / f"{name}.json", records[name])


def _task(config: CompareConfig, images: Images) -> Classification:
    augment = augmentation(images)
    return Classification(InMemory(images, augment, torch.device(config.device)), augment)


def _one_image(task: Classification) -> Tensor:
    """(1, C, size, size) on the device."""
    return next(task.val_batches(0, 1, 1)).images


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _call(model: nn.Module, image: Tensor) -> Callable[[], Tensor]:
    return lambda: model(image)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
        speed_estimate_period=120,
    )


def _summaries(config: CompareConfig, records: Records) -> Records:
    """The records, with the statistics over the asked seeds and the crossover."""
    summaries = {}
    for name, record in records.items():
        runs = [run for run in record["runs"] if run["seed"] in config.seeds]
        accuracies = [run["accuracy"] for run in runs]
        points = record.get("sweep", []) if config.sweep else []
        summaries[name] = {
            **record,
            "runs": runs,
            "accuracy": {
                "mean": statistics.fmean(accuracies),
                "min": min(accuracies),
                "max": max(accuracies),
                "std": statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
            },
            "images_per_s": statistics.fmean(run["images_per_s"] for run in runs),
            "sweep": points,
            "crossover_tokens": crossover(points, records[BASELINE].get("sweep", [])),
        }
    return summaries
