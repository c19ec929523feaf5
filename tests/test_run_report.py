"""The report of a run and of several: figures that are right, runs in any state, nothing unescaped."""

import base64
import io
import json
import math

import numpy as np
from PIL import Image

from sansmax.bench._evaluation import Evaluation

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
                "loss": 0.2 + 2 * math.exp(-done / 4) + 0.1 * math.sin(9 * step),
                "lr": 1e-3 * math.cos(1.5 * done / epochs),
                "grad_norm": 1 + math.exp(-done),
                "images_per_s": 900 + 40 * math.sin(step),
                "data_wait": 0.08 + 0.04 * math.cos(step),
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
