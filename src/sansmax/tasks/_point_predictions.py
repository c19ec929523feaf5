"""Point clouds of any files, classified or cut into parts."""

import csv
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ._data._decode import reason
from ._data.draws import draw
from ._data.point_views import view
from ._data.points import KEPT, Clouds, Share, in_ball, read_share, shape_of
from ._data.points_files import SUFFIXES, need, read_cloud, write_ply
from ._data.points_sets import Item, items_of
from ._point_pictures import colours
from ._recipes.points import Recipe
from ._run import at_least
from ._task import Trained

__all__ = ["classify", "segment", "sources"]

EMPTY = Share(
    torch.empty(0, 3), torch.zeros(1, dtype=torch.int64), torch.empty(0).long(), torch.empty(0).long(), []
)


def sources(source: Path, count: int) -> Iterator[tuple[Path, Item]]:
    """The clouds of a file, or of all files below a folder, and where they are.

    Args:
        count: of points that a mesh gives.

    Raises:
        OSError: there is nothing.
    """
    suffixes = (*SUFFIXES, ".h5")
    if source.is_dir():
        files = sorted(p for p in source.rglob("*") if p.suffix.lower() in suffixes and p.name[0] != ".")
    else:
        files = [source] if source.is_file() else []
    if not files:
        raise FileNotFoundError(
            f"source: expected a cloud, or a folder with some ({', '.join(suffixes)}), got none at {source}; "
            "check the path"
        )
    for path in files:
        name = path.relative_to(source).as_posix() if source.is_dir() else path.name
        for item in _of_file(path, name, count):
            yield path, item


def _of_file(path: Path, name: str, count: int) -> list[Item]:
    try:
        if path.suffix.lower() == ".h5":
            with need("h5py", ".h5").File(path, "r") as file:
                xyz = file["data"][:]
            return items_of(name, xyz, np.zeros(len(xyz), int), None)
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                xyz = file["xyz"]
            if xyz.ndim == 3:
                return items_of(name, xyz, np.zeros(len(xyz), int), None)
    except (OSError, KeyError) as error:
        words = reason(error, path)

        def refuse() -> tuple[np.ndarray, None]:
            raise ValueError(words)

        return [Item(name, 0, refuse)]
    except Exception:  # zipfile's and numpy's, which read_cloud raises again
        pass
    return [Item(name, 0, partial(read_cloud, path, count))]


def classify(trained: Trained, source: Path, out: Path, votes: int | None, batch_size: int) -> None:
    """path, class, probability, and error where a cloud could not be used."""
    from .points import Points

    if out.suffix != ".csv":
        raise ValueError(f"out: expected a file that ends in .csv, got {out}; rename it")
    recipe = _with(trained, votes, batch_size)
    good, skipped = 0, []
    keep = max(KEPT, 2 * recipe.points)
    found = sources(source, keep)
    first = next(found)
    with torch.inference_mode(), out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("path", "class", "probability", "error"))
        found = itertools.chain([first], found)
        while some := list(itertools.islice(found, batch_size)):
            missing: list[dict[str, str]] = []
            share = read_share([item for _, item in some], keep, [0], None, missing)
            if len(share):
                task = Points(Clouds("", "", trained.classes, [], EMPTY, share, []), recipe, trained.device)
                batch = task.seen(torch.arange(len(share)))
                best, index = task.outputs(trained.model, batch).float().softmax(1).max(1)
                for name, one, chance in zip(share.names, index.tolist(), best.tolist(), strict=True):
                    table.writerow((name, trained.classes[one], f"{chance:.6f}", ""))
            table.writerows((bad["path"], "", "", bad["reason"]) for bad in missing)
            good, skipped = good + len(share), skipped + missing
    _check(good, skipped, source)
    print(f"{out}: {good + len(skipped):,} rows, {len(skipped):,} of them with an error")


def segment(
    trained: Trained, source: Path, out: Path, votes: int | None, category: str, form: str, batch_size: int
) -> None:
    """A file of each cloud: its points as they are in the source, and the part of each.

    A cloud of more points than the network was trained with is dealt out to several passes, in which every
    point is seen once.
    """
    from .points import Parts, likeliest, mean_of_passes

    recipe = _with(trained, votes, batch_size)
    shapes = list(dict.fromkeys(map(shape_of, trained.classes)))
    good, skipped = 0, []
    for path, item in sources(source, max(KEPT, 2 * recipe.points)):
        wanted = category or (shapes[0] if len(shapes) == 1 else path.resolve().parent.name)
        if wanted not in shapes:
            raise ValueError(
                f"category: expected one of {', '.join(shapes)}, got {wanted!r} for {item.name}; give "
                "--category, or put the clouds into folders of these names"
            )
        try:
            xyz, _ = item.read()
            ball = in_ball(xyz)
        except Exception as error:  # each reader has its own
            skipped.append({"path": item.name, "reason": reason(error, item.name)})
            continue
        pieces = max(1, round(len(ball) / recipe.points))
        dealt = np.random.default_rng(draw(0, "pieces", item.name)).permutation(len(ball))
        own = [torch.from_numpy(np.sort(dealt[i::pieces])) for i in range(pieces)]
        points = torch.from_numpy(ball)[torch.cat(own)]
        share = Share(
            points,
            torch.tensor([0, *map(len, own)]).cumsum(0),
            torch.full((pieces,), shapes.index(wanted)),
            torch.zeros(len(points), dtype=torch.int64),
            [item.name] * pieces,
        )
        task = Parts(Clouds("", "", shapes, trained.classes, EMPTY, share, []), recipe, trained.device)
        part = torch.empty(len(ball), dtype=torch.int64)
        with torch.inference_mode():
            for some in torch.arange(pieces).split(batch_size):
                seen = view(share, some, len(ball), None)
                passes = [task.inputs(task.scaled(seen, vote)) for vote in range(recipe.votes)]
                outputs = mean_of_passes([trained.model(inputs) for inputs in passes])
                found = likeliest(outputs, task.own[seen.labels.to(trained.device)]).cpu()
                for number, row in zip(some.tolist(), found, strict=True):
                    part[own[number]] = row[: len(own[number])]
        file = out / Path(item.name.replace("[", "/").replace("]", "")).with_suffix(f".{form}")
        file.parent.mkdir(parents=True, exist_ok=True)
        if form == "ply":
            first = trained.classes.index(next(p for p in trained.classes if shape_of(p) == wanted))
            write_ply(file, np.asarray(xyz, np.float32), part.numpy(), colours(part.numpy() - first))
        else:
            np.savez_compressed(file, xyz=xyz, part=part.numpy(), parts=np.array(trained.classes))
        good += 1
    _check(good, skipped, source)
    print(f"{out}: {good:,} clouds" + (f", {len(skipped):,} skipped" if skipped else ""))
    for bad in skipped:
        print("skipped {path}: {reason}".format(**bad))


def _with(trained: Trained, votes: int | None, batch_size: int) -> Recipe:
    at_least(1, votes=votes, batch_size=batch_size)
    return replace(trained.recipe, votes=votes or trained.recipe.votes)


def _check(good: int, skipped: list[dict[str, str]], source: Path) -> None:
    if not good:
        first = "{path}: {reason}".format(**skipped[0])
        raise ValueError(
            f"source: expected at least one cloud that can be used in {source}, got {len(skipped)} that "
            f"cannot, {first}; check the files"
        )
