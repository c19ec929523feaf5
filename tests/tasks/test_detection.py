"""Detection: figures, rows, views, runs, results, and what may be wrong with the data."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from faster_coco_eval import mask as codes
from object_scenes import RUN, annotation, both, coco, content, data_of, voc
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from street_scenes import picture
from torchvision.models.detection.roi_heads import paste_masks_in_image

from sansmax import cli, recipes
from sansmax.tasks import detection
from sansmax.tasks._data.object_views import fitting, view
from sansmax.tasks._data.objects import Truth, open_objects
from sansmax.tasks._detections import Found, agreement, ap_of, found_in, from_rows, to_rows
from sansmax.tasks._object_files import Journal
from sansmax.tasks._recipes.detection import Recipe
from small_task import interrupted

CPU = torch.device("cpu")


# Figures.


def boxed(count, generator, sides=(8, 90)):
    low, high = sides
    corner = generator.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + generator.uniform(low, high, (count, 2))], 1)


def code_of(box, size):
    mask = np.zeros(size, np.uint8)
    x1, y1, x2, y2 = np.round(box).astype(int)
    mask[y1:y2, x1:x2] = 1
    return codes.encode(np.asfortranarray(mask))


def scenes(seed=0, size=(151, 157)):
    """Objects in seven images, with crowds, one image with none; and what was found near them and not."""
    rng, truths, found = np.random.default_rng(seed), {}, {}
    for i in range(7):
        count = 0 if i == 3 else int(rng.integers(2, 6))
        boxes, labels = boxed(count, rng), rng.integers(0, 3, count)
        crowd = rng.random(count) < 0.2
        masks = [code_of(box, size) for box in boxes]
        areas = np.array([float(codes.area(mask)) for mask in masks])
        truths[i] = Truth(boxes, labels, crowd, areas, masks)
        near = boxes + rng.normal(0, 3, boxes.shape)
        boxes = np.concatenate([near, boxed(2, rng)]).clip(0, 150)
        labels = np.concatenate([labels, rng.integers(0, 3, 2)])
        scores = rng.random(len(boxes))
        found[i] = Found(boxes, labels, scores, [code_of(box, size) for box in boxes])
    found[5] = Found(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), [])
    return truths, found, size


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_cocos(kind, capsys):
    """Those of pycocotools, COCO's own evaluation, from files that are written here."""
    truths, found, size = scenes()
    ours, each = ap_of([(i, t, size) for i, t in truths.items()], found.items(), 4, kind)
    known, results = COCO(), []
    known.dataset = {
        "images": [{"id": i, "height": size[0], "width": size[1]} for i in truths],
        "categories": [{"id": i} for i in range(4)],
        "annotations": [],
    }
    for i, truth in truths.items():
        for box, label, crowd, area, mask in zip(*vars(truth).values(), strict=True):
            one = {"id": len(known.dataset["annotations"]) + 1, "image_id": i, "category_id": int(label)}
            one |= {"bbox": [*box[:2], *(box[2:] - box[:2])], "area": area, "iscrowd": int(crowd)}
            known.dataset["annotations"].append(one | {"segmentation": mask})
        for box, label, score, mask in zip(*vars(found[i]).values(), strict=True):
            told = {"segmentation": mask} if kind == "segm" else {"bbox": [*box[:2], *(box[2:] - box[:2])]}
            results.append({"image_id": i, "category_id": int(label), "score": score} | told)
    known.createIndex()
    evaluation = COCOeval(known, known.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 0.1 < ours["map"] < 0.9
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    want = {name: value for name, value in zip(names, evaluation.stats, strict=False) if value >= 0}
    assert "map_large" not in want
    assert ours == pytest.approx(want)
    precision = evaluation.eval["precision"][:, :, :, 0, 2].mean((0, 1)).tolist()
    assert each[:3] == pytest.approx(precision[:3])
    assert each[3] is None


def test_an_image_with_nothing_found_counts():
    truths, found, size = scenes()
    told = [(i, t, size) for i, t in truths.items()]
    all_of_them, _ = ap_of(told, found.items(), 3, "bbox")
    without, _ = ap_of(
        [one for one in told if one[0] != 5], ((i, f) for i, f in found.items() if i != 5), 3, "bbox"
    )
    assert all_of_them["map"] < without["map"]
    nothing, each = ap_of(told, (), 4, "bbox")
    assert nothing["map"] == 0
    assert each == [0, 0, 0, None]


def test_rows_hold_everything():
    _, found, _ = scenes()
    rows = torch.cat([to_rows(i, one) for i, one in found.items()])
    assert rows.dtype == torch.float64
    shuffled = rows[rows[:, 0].argsort(descending=True, stable=True)]
    back = dict(from_rows(shuffled[shuffled[:, 0].argsort(stable=True)]))
    assert back.keys() == found.keys()
    for i, one in found.items():
        assert np.array_equal(back[i].boxes, one.boxes)
        assert np.array_equal(back[i].labels, one.labels)
        assert np.array_equal(back[i].scores, one.scores)
        assert [m["counts"] for m in back[i].masks or []] == [m["counts"] for m in one.masks]
    long = np.zeros((301, 307), np.uint8)
    long[::2, ::3] = 1
    mask = codes.encode(long.copy(order="F"))
    assert len(mask["counts"]) > 1000
    ((_, one),) = from_rows(to_rows(9, Found(np.ones((1, 4)), np.array([2]), np.array([0.5]), [mask])))
    assert np.array_equal(codes.decode(one.masks[0]), long)


def test_what_is_found_is_told_in_the_pixels_of_the_file():
    output = {
        "boxes": torch.tensor([[10.0, 4.0, 30.0, 24.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.75]),
        "masks": torch.rand(1, 1, 28, 28),
    }
    found = found_in(output, (40, 60), (80, 180))
    assert found.boxes.tolist() == [[30, 8, 90, 48]]
    inside = paste_masks_in_image(output["masks"], torch.tensor([[30.0, 8, 90, 48]]), (80, 180))[0, 0] > 0.5
    assert np.array_equal(codes.decode(found.masks[0]), inside.numpy())


def test_agreement_by_hand():
    truth = Truth(
        np.array([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 90, 90]]),
        np.array([0, 1, 1]),
        np.array([False, False, True]),
        np.ones(3),
    )
    boxes = np.array([[0.0, 0, 10, 9], [1, 0, 10, 10], [20, 20, 30, 30]])
    found = Found(boxes, np.array([0, 0, 0]), np.array([0.9, 0.8, 0.7]))
    assert agreement(truth, found) == pytest.approx(2 / 5)  # one pair, two objects, three detections
    none = Found(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    empty = Truth(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool), np.zeros(0))
    assert agreement(truth, none) == 0
    assert agreement(empty, none) == 1
    assert agreement(empty, found) == 0


# Data.


def test_sizes_of_the_short_and_the_long_side():
    assert fitting((480, 640), 800, 1333) == (800, 1067)
    assert fitting((640, 480), 800, 1333) == (1067, 800)
    assert fitting((300, 900), 800, 1333) == (444, 1333)


def test_a_view_moves_boxes_and_masks_with_the_image(tmp_path):
    """Objects are the only dark places: where a mask says so, the view is dark."""
    train, _ = open_objects(data_of(both(tmp_path)), True)
    seen = set()
    for seed in range(16):
        pixels, target = view(train.read(0), train.truth(0), (61, 90), 200, 0.5, seed)
        assert target["masks"].shape == (2, *pixels.shape[1:])
        seen.add((min(pixels.shape[1:]), bool(target["boxes"][0, 0] > target["boxes"][1, 0])))
        for box, mask, category in zip(target["boxes"], target["masks"], (3, 8), strict=True):
            inside = mask.bool()
            height, width = pixels.shape[1:]
            rows, columns = inside.nonzero().T
            edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (edges - box).abs().max() < 1.6, (edges, box)
            middle = pixels[:, int(box[1] + 3) : int(box[3] - 3), int(box[0] + 3) : int(box[2] - 3)]
            grey = torch.tensor([0.485, 0.456, 0.406]) + middle.mean((1, 2)) * torch.tensor(
                [0.229, 0.224, 0.225]
            )
            torch.testing.assert_close(grey, torch.full((3,), 20 * category / 255), atol=0.02, rtol=0)
            assert inside.any()
            assert 0 <= box[0] < box[2] <= width
            assert 0 <= box[1] < box[3] <= height
    assert seen == {(61, False), (61, True), (90, False), (90, True)}
    again, _ = view(train.read(0), train.truth(0), (61, 90), 200, 0.5, 15)
    assert torch.equal(again, pixels)


def test_polygons_codes_counts_and_crowds_are_read(tmp_path):
    train, val = open_objects(data_of(both(tmp_path)), True)
    assert train.classes == ["3 cat", "7 dog", "8 ice cream"]
    assert (len(train), len(val)) == (6, 6)
    first, crowded, nothing = train.truth(0), train.truth(2), train.truth(3)
    assert first.boxes.tolist() == [[3, 4, 20, 25], [25, 9, 44, 30]]
    assert first.labels.tolist() == [0, 2]
    drawn = codes.decode(first.masks[0])
    assert drawn.sum() == 17 * 21
    assert drawn[4:25, 3:20].all()
    assert crowded.crowd.tolist() == [True, False]
    assert codes.decode(crowded.masks[0])[:, 5:9].all()
    assert len(nothing.boxes) == 0
    _, target = view(train.read(2), crowded, (41,), 41, 0.0, 0)
    assert target["labels"].tolist() == [1]  # a crowd is not learned
    _, target = view(train.read(3), nothing, (32,), 60, 1.0, 0)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape[0] == 0


@pytest.mark.parametrize(("folder", "suffix"), [("", "2017"), ("images", ""), ("images", "2017")])
def test_folders_of_coco(tmp_path, folder, suffix):
    for split in ("train", "val"):
        coco(tmp_path, split=split, folder=folder, suffix=suffix)
    train, _ = open_objects(data_of(tmp_path), False)
    assert train.read(4).shape == (33, 60, 3)
    assert train.truth(0).masks is None


def test_segments_are_masks_where_there_are_no_polygons(tmp_path):
    root = both(tmp_path, masks=False)
    with pytest.raises(ValueError, match="data: expected a segmentation of every object for mask_rcnn"):
        open_objects(data_of(root), True)
    for split in ("train", "val"):
        values = np.zeros((37, 50), np.uint8)
        values[2:9, 3:14], values[20:31, 5:9], values[33:, :] = 1, 2, 3
        (root / "segments" / split).mkdir(parents=True)
        Image.fromarray(values).save(root / "segments" / split / "a.png")
        parts = [
            {"index": 1, "category_id": 8, "isthing": 1, "iscrowd": 0},
            {"index": 2, "category_id": 3, "isthing": 1, "iscrowd": 1},
            {"index": 3, "category_id": 184, "isthing": 0, "iscrowd": 0},
            {"index": 4, "category_id": 3, "isthing": 1, "iscrowd": 0},
        ]
        told = {"annotations": [{"image_id": 13, "file_name": "a.png", "segments": parts}]}
        (root / "annotations" / f"segments_{split}.json").write_text(json.dumps(told))
    train, _ = open_objects(data_of(root), True)
    assert len(train) == 1
    truth = train.truth(0)
    assert truth.boxes.tolist() == [[3, 2, 14, 9], [5, 20, 9, 31]]
    assert truth.labels.tolist() == [2, 0]
    assert truth.crowd.tolist() == [False, True]
    assert truth.areas.tolist() == [77, 44]
    assert train.skipped() == [{"path": "train/000000000003.png, segment 4", "reason": "it has no pixel"}]
    plain, _ = open_objects(data_of(root), False)
    assert len(plain) == 6


def test_voc(tmp_path):
    voc(tmp_path / "VOCdevkit" / "VOC2012")
    train, val = open_objects(data_of(tmp_path), False)
    assert train.classes[11] == "12 dog"
    assert len(train.classes) == 20
    assert train.truth(0).boxes.tolist() == [[3, 5, 20, 30], [21, 2, 40, 33]]  # VOC counts from 1
    assert train.truth(0).labels.tolist() == [11, 14]
    assert val.truth(0).crowd.tolist() == [False, True]
    masked, _ = open_objects(data_of(tmp_path / "VOCdevkit"), True)
    truth = masked.truth(0)
    assert codes.decode(truth.masks[1])[2:33, 21:40].all()
    assert truth.areas.tolist() == [17 * 25, 19 * 31]
    (tmp_path / "VOCdevkit/VOC2012/SegmentationObject/a_1.png").unlink()
    with pytest.raises(
        ValueError, match=r"data: expected a picture of the objects at .*a_1.png for mask_rcnn"
    ):
        open_objects(data_of(tmp_path), True)


def test_objects_that_cannot_be_used_are_left_out_and_listed(tmp_path):
    def change(told):
        boxes = [
            [-5, -7, 30, 20],
            [49, 3, 9, 9],
            [60, 5, 4, 4],
            [8, 8, 0, 5],
            [1, 2, 3],
            [1, 2, float("nan"), 4],
        ]
        for i, box in enumerate(boxes):
            told["annotations"].append(
                {"id": 100 + i, "image_id": 10, "category_id": 3, "bbox": box, "iscrowd": 0}
            )

    train, _ = open_objects(data_of(both(tmp_path, masks=False, change=change)), False)
    assert train.truth(0).boxes[2:].tolist() == [[0, 0, 25, 13], [49, 3, 50, 12]]
    assert train.truth(0).areas[2:].tolist() == [25 * 13, 9]
    left_out = {entry["path"].rpartition(" ")[2]: entry["reason"] for entry in train.skipped()}
    assert list(left_out) == ["102", "103", "104", "105"]
    assert "has no area in the image of 50x37" in left_out["102"]
    assert "not four finite numbers" in left_out["104"]
    assert train.skipped()[0]["path"] == "train/000000000000.png, object 102"


def change_of(path, value):
    """A change of the annotations: the last of `path` gets the value."""

    def change(told):
        *way, last = path
        for step in way:
            told = told[step]
        told[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("annotations", 0, "category_id"), 4, "data: expected a category that .* lists, got 4 of object 1"),
        (("annotations", 0, "image_id"), 99, "data: expected images that .* lists, got image 99 of object 1"),
        (
            ("categories",),
            [],
            "data: expected categories with a whole number each, all different, .* got none",
        ),
        (("categories", 1, "id"), 3, "data: expected categories with a whole number each, all different"),
        (("images", 2, "width"), None, "data: expected images with file_name, height and width"),
        (("annotations",), {}, "data: expected lists of images, annotations and categories"),
    ],
)
def test_a_file_that_is_not_cocos_is_refused(tmp_path, path, value, words):
    with pytest.raises(ValueError, match=words):
        open_objects(data_of(both(tmp_path, change=change_of(path, value))), False)


def test_folders_that_are_not_as_they_must_be_are_refused(tmp_path):
    for root, words in [
        (tmp_path / "none", "data.root: expected a folder, got nothing"),
        (tmp_path, "data.root: expected .*instances_train.json, got no .json there"),
    ]:
        with pytest.raises(OSError, match=words):
            open_objects(data_of(root), False)
    root = both(tmp_path)
    (root / "annotations" / "instances_train.json").write_text("{")
    with pytest.raises(ValueError, match=r"data: expected COCO's JSON in .*; fetch it again"):
        open_objects(data_of(root), False)
    coco(root, change=change_of(("categories", 0, "name"), "fish"))
    with pytest.raises(
        ValueError, match=r"data.val_split: expected the categories of train, got 3 cat, 3 fish"
    ):
        open_objects(data_of(root), False)
    voc(tmp_path / "VOC2012", lambda text: text.replace("dog", "dragon"))
    with pytest.raises(ValueError, match=r"data: expected one of VOC's 20 classes in .*, got 'dragon'"):
        open_objects(data_of(tmp_path / "VOC2012"), False)
    empty = both(tmp_path / "empty", change=change_of(("annotations",), []))
    with pytest.raises(
        ValueError, match=r"data.split: expected images with objects in coco train, got none in 6"
    ):
        detection.open_task(replace(RUN, data=data_of(empty)), CPU)


def test_settings_that_cannot_be_are_refused():
    for words, changes in [
        ("anchor_sizes: expected 5 sides", {"anchor_sizes": (8, 16)}),
        ("short_sides: expected a whole number of at least 1, got 0", {"short_sides": ()}),
        ("parallel: expected ddp with detection", {"parallel": "fsdp"}),
        ("detector: expected one of retinanet, faster_rcnn, mask_rcnn", {"detector": "yolo"}),
        ("detector_args: expected a JSON object", {"detector_args": 3}),
        ("hflip: expected a share from 0 to 1, got 2", {"hflip": 2.0}),
    ]:
        with pytest.raises(ValueError, match=words):
            replace(RUN, **changes).checked()


# Runs.


def test_a_run_its_report_its_figures_and_its_results(tmp_path, capsys):
    outside = annotation(99, 15, 3, (70, 70, 80, 80), [[70, 70, 80, 70, 80, 80]])
    root = both(tmp_path, change=lambda told: told["annotations"].append(dict(outside)))
    (root / "train" / "000000000003.png").unlink()
    (root / "val" / "000000000004.png").write_bytes(b"no image")
    proposals = {f"rpn_{kind}_nms_top_n_{part}": 30 for kind in ("pre", "post") for part in ("train", "test")}
    recipe = replace(RUN, detector="mask_rcnn", detector_args={**proposals, "box_score_thresh": 0.0})
    from sansmax.train.run import run

    folder = tmp_path / "run"
    outcome = run(replace(recipe, data=data_of(root), batch_size=3, out=str(folder)))
    skipped = {entry["path"]: entry["reason"] for entry in json.loads((folder / "skipped.json").read_text())}
    assert skipped.pop("train/000000000005.png, object 99").startswith(
        "its box, x 70 to 80, y 70 to 80, has no"
    )
    assert skipped.pop("val/000000000005.png, object 99")
    assert skipped == {
        "train/000000000003.png": "No such file or directory",
        "val/000000000004.png": "cannot identify image file",
    }
    titles = [one["title"] for one in json.loads((folder / "pictures.json").read_text())]
    assert titles == ["mAP, % of every class", "mask mAP, % of every class", "Truth, and what was found"]
    assert {i for i, _ in from_rows(outcome.verdicts)} == {0, 1, 2, 3, 5}

    out = tmp_path / "figures.json"
    assert cli.main(["eval", str(folder), "--out", str(out), "--device", "cpu"]) == 0
    told = json.loads(out.read_text())
    assert told["figures"]["map"] == pytest.approx(json.loads((folder / "recipe.json").read_text())["best"])
    assert (
        set(told["details"]["map"]) == set(told["details"]["mask_map"]) == {"3 cat", "7 dog", "8 ice cream"}
    )
    assert told["details"]["objects"] == {"3 cat": 2, "7 dog": 2, "8 ice cream": 1}
    assert "mask mAP50" in (printed := capsys.readouterr().out)
    assert "5 images" in printed

    picture(root / "val" / "more" / "one.jpg", 60, 41)
    found = tmp_path / "found" / "results.json"
    command = [
        "predict",
        str(folder),
        str(root / "val"),
        "--out",
        str(found),
        "--device",
        "cpu",
        "--score",
        "0",
    ]
    assert cli.main([*command, "--pictures", str(tmp_path / "drawn")]) == 0
    assert "in 6 images, 1 unreadable" in capsys.readouterr().out
    results = json.loads(found.read_text())
    assert {entry["category_id"] for entry in results} <= {3, 7, 8}
    assert {entry["image_id"] for entry in results} == {0, 1, 2, 3, 5, "more/one.jpg"}
    one = results[0]
    assert (one["file_name"], one["segmentation"]["size"]) == ("000000000000.png", [37, 50])
    x, y, width, height = one["bbox"]
    assert min(x, y) >= 0
    assert x + width <= 50.001
    assert y + height <= 37.001
    assert json.loads(found.with_suffix(".skipped.json").read_text()) == [
        {"path": "000000000004.png", "reason": "cannot identify image file"}
    ]
    with Image.open(tmp_path / "drawn" / "more" / "one.jpg.png") as image:
        assert image.size == (41 * 6, 60 * 6)
    alone = tmp_path / "alone.json"
    assert (
        cli.main(
            [
                *command[:2],
                str(root / "val" / "000000000000.png"),
                "--out",
                str(alone),
                "--score",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    first = [entry for entry in results if entry["image_id"] == 0]
    assert [e["score"] for e in json.loads(alone.read_text())] == pytest.approx(
        [e["score"] for e in first], abs=1e-4
    )
    assert cli.main([*command[:2], str(root / "val" / "000000000004.png"), "--out", str(alone)]) == 2
    assert "expected an image that can be read" in capsys.readouterr().err


def test_results_go_on_where_they_were_left(tmp_path):
    out = tmp_path / "new" / "results.json"
    with Journal(out, "one network") as journal:
        journal.add("a", [{"score": 0.5}])
        journal.add("b", None, "no image")
    assert not out.exists()
    partial = out.with_name(".results.json.partial")
    partial.write_bytes(partial.read_bytes() + b'{"name": "c", "ent')  # killed while it wrote
    with Journal(out, "one network") as journal:
        assert journal.done == {"a", "b"}
        journal.add("c", [])
        journal.add("d", [{"score": 0.25}])
        assert journal.finish() == (2, [{"path": "b", "reason": "no image"}])
    assert json.loads(out.read_text()) == [{"score": 0.5}, {"score": 0.25}]
    assert sorted(path.name for path in out.parent.iterdir()) == ["results.json", "results.skipped.json"]
    with Journal(out, "one network") as journal:
        journal.add("a", [])
    with Journal(out, "another network") as journal:
        assert journal.done == set()
        journal.add("a", [])
        journal.finish()
    assert json.loads(out.read_text()) == []


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_a_run_goes_on_exactly(tmp_path, detector):
    from sansmax.train.run import run

    data = data_of(both(tmp_path))
    recipe = replace(RUN, detector=detector, data=data, batch_size=2, epochs=2, log_every=1, save_every=1)
    whole = run(replace(recipe, out=str(tmp_path / "whole")))
    with interrupted(detection, 1, 1):
        run(replace(recipe, out=str(tmp_path / "cut")))
    rest = run(replace(recipe, out=str(tmp_path / "cut"), resume=True))
    assert rest.curve == whole.curve
    assert torch.equal(rest.verdicts, whole.verdicts)


def test_the_commands_of_the_page_and_of_the_recipes_are_understood():
    names = [name for name in recipes.names() if isinstance(recipes.recipe(name), Recipe)]
    texts = [(Path(__file__).parents[2] / "docs" / "detection.md").read_text(encoding="utf-8")]
    texts += list({recipes.describe(name): None for name in names})
    lines = [
        line.strip()
        for text in texts
        for line in text.splitlines()
        if line.strip().startswith("sansmax train ")
    ]
    assert len(lines) >= 6
    for line in lines:
        _, _, name, *flags = shlex.split(line, comments=True)
        tyro.cli(Recipe, default=recipes.recipe(name), args=flags).checked()


def test_small_sets_are_the_first_of_a_shuffle(tmp_path):
    assert len(content(True)["images"]) == 6
    train, val = open_objects(data_of(both(tmp_path), num_samples=2, val_samples=3), False)
    assert (len(train), len(val)) == (2, 3)
    assert {train.name(0), train.name(1)} < {f"train/{i:012}.png" for i in range(6)}
    same, again = open_objects(data_of(tmp_path / "coco", val_split="train", val_samples=3), False)
    assert [again.name(i) for i in range(3)] != [same.name(i) for i in range(3)]
    assert all(again.name(i).startswith("train/") for i in range(3))


def constant_boxes(train, val):
    """mAP50 of what needs no picture: in each quarter a box of the mean size, as every class by its share."""
    truths = [train.truth(i) for i in range(len(train))]
    boxes = np.concatenate([truth.boxes for truth in truths])
    side = (boxes[:, 2:] - boxes[:, :2]).mean(0)
    share = np.bincount(np.concatenate([truth.labels for truth in truths])) / len(boxes)
    middles = np.array([[16, 16], [48, 16], [16, 48], [48, 48]])
    each = np.concatenate([middles - side / 2, middles + side / 2], 1)
    count = len(share)
    found = Found(np.tile(each, (count, 1)), np.arange(count).repeat(4), share.repeat(4))
    told = [(i, val.truth(i), val.size(i)) for i in range(len(val))]
    return ap_of(told, [(i, found) for i in range(len(val))], count, "bbox")[0]["map_50"]


@pytest.mark.slow
def test_digits_are_found_beyond_their_places(tmp_path):
    """Two epochs of the small recipe; all of it reaches far more (docs/detection.md)."""
    from sansmax.train.run import run

    recipe = recipes.recipe("detection_sima")
    data = replace(recipe.data, val_samples=60)
    optim = replace(recipe.optim, warmup=0.2)
    out = run(replace(recipe, data=data, optim=optim, epochs=2, device="cpu", out=str(tmp_path / "run")))
    baseline = constant_boxes(*open_objects(data, False))
    assert 0 < baseline < 0.08
    assert out.curve[-1]["map_50"] > 2 * baseline
