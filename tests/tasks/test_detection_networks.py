"""Detectors: networks under them, padding, groups of images, precision, gradients."""

import warnings
from dataclasses import replace

import pytest
import torch
from object_scenes import RUN
from street_scenes import SMALL
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from sansmax import _find
from sansmax.models._detector import DETECTORS, Anchors, Detector, Images
from sansmax.recipes._small_pyramid import small_pyramid
from sansmax.tasks import detection

SIZES = [(50, 70), (96, 64), (33, 100), (64, 96)]  # the first and the last are one group
FEW = {  # proposals: quicker
    "rpn_pre_nms_top_n_train": 40,
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
}
OPTIONS = {"retinanet": {"score_thresh": 0.0, "topk_candidates": 30}, "faster_rcnn": FEW, "mask_rcnn": FEW}


def network(detector="retinanet", model="soft_tiny", mechanism: str | None = "sima", words=SMALL, **more):
    torch.manual_seed(0)
    made = Detector(
        detector,
        model,
        mechanism,
        num_classes=5,
        anchor_sizes=(12, 24, 48, 96, 192),
        fpn_channels=8,
        head_channels=16,
        detector_args=OPTIONS[detector],
        **{"img_size": (64, 64), **words, **more},
    )
    for name, layer in made.model.named_modules():  # else all scores are nearly the same
        if "head" in name and isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return made


def images(sizes=SIZES):
    torch.manual_seed(1)
    return [torch.randn(3, *size) for size in sizes]


def targets(sizes=SIZES):
    found = []
    for i, (height, width) in enumerate(sizes):
        box = torch.tensor([[5.0, 3.0, 31.0, 29.0], [10.0 + i, 4.0, width - 3.0, height - 2.0]])
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[:, 5:20, 12:25] = 1
        found.append({"boxes": box, "labels": torch.tensor([0, 4]), "masks": masks})
    return found


def same(found, want):
    """Each has its like, whatever the order of those of nearly one score."""
    assert found.keys() == want.keys()
    assert len(found["boxes"]) == len(want["boxes"]) > 5
    rows = [
        torch.cat([one["boxes"] / 10, one["labels"][:, None], one["scores"][:, None]], 1)
        for one in (found, want)
    ]
    nearest = torch.cdist(*rows, p=float("inf"), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 1e-3
    assert len(nearest.indices.unique()) == len(want["boxes"])
    if "masks" in want:
        torch.testing.assert_close(found["masks"], want["masks"][nearest.indices], atol=1e-3, rtol=1e-3)


BACKBONES = {
    name: ("soft_tiny", name, small_pyramid(name) | {"embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2]})
    for name in _find.names("sansmax.layers")
} | {"resnet18": ("resnet18", "external", {})}


@pytest.mark.parametrize("name", BACKBONES)
def test_an_image_gives_the_same_alone_and_beside_others(name):
    model, mechanism, words = BACKBONES[name]
    made = network("retinanet", model, mechanism, words).eval()
    given = images()
    with torch.inference_mode():
        together = made(Images(given))
        for image, found in zip(given, together, strict=True):
            same(found, made(Images([image]))[0])


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_so_with_proposals_and_masks(detector):
    made = network(detector).eval()
    given = images()
    with torch.inference_mode():
        together = made(Images(given))
        for image, found in zip(given, together, strict=True):
            same(found, made(Images([image]))[0])
            assert found["labels"].min() >= 0
            assert found["labels"].max() < 5
            height, width = image.shape[1:]
            assert found["boxes"].min() >= 0
            assert (found["boxes"] <= torch.tensor([width, height] * 2)).all()
    assert (detector == "mask_rcnn") == ("masks" in together[0])


def test_losses_of_groups_are_averaged_by_their_images():
    made = network(freeze_norm=True).train()
    given, wanted = images(), targets()
    assert made.groups(given) == [[0, 3], [1], [2]]
    losses = made(Images(given, wanted))
    sum(losses.values()).backward()
    together = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    parts = []
    for group in ([0, 3], [1], [2]):
        part = made(Images([given[i] for i in group], [wanted[i] for i in group]))
        (sum(part.values()) * len(group) / 4).backward()
        parts.append((len(group) / 4, part))
    for name, loss in losses.items():
        torch.testing.assert_close(loss, sum(share * part[name] for share, part in parts))
    for name, p in made.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, together[name], atol=1e-5, rtol=1e-4)


def test_with_norms_that_learn_a_batch_is_one_group():
    made, frozen = network(), network(freeze_norm=True)
    for one in (made, nn.SyncBatchNorm.convert_sync_batchnorm(made)):
        assert one.train().groups(images()) == [[0, 1, 2, 3]]
        assert one.eval().groups(images()) == [[0, 3], [1], [2]]
    for one in (frozen, nn.SyncBatchNorm.convert_sync_batchnorm(frozen)):
        assert one.train().groups(images()) == [[0, 3], [1], [2]]


@pytest.mark.parametrize(
    ("detector", "kind"), [*((detector, "soft_tiny") for detector in DETECTORS), ("mask_rcnn", "resnet18")]
)
def test_every_weight_is_learned(detector, kind):
    """Else DistributedDataParallel waits for its gradient."""
    model, mechanism, words = ("soft_tiny", "sima", SMALL) if kind == "soft_tiny" else BACKBONES[kind]
    made = network(detector, model, mechanism, words).train()
    losses = made(Images(images()[:2], targets()[:2]))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_without_objects_are_learned(detector):
    made = network(detector).train()
    none = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 50, 70, dtype=torch.uint8),
    }
    losses = made(Images(images()[:1], [none]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("detector", DETECTORS)
def test_in_bfloat16_boxes_stay_in_float32(detector):
    made = network(detector)
    with torch.autocast("cpu", torch.bfloat16):
        losses = made.train()(Images(images(), targets()))
        with torch.inference_mode():
            found = made.eval()(Images(images()))
            pyramid = made.model.backbone(torch.randn(1, 3, 64, 64))
    # Anchors have their dtype.
    assert {y.dtype for y in pyramid.values()} == {torch.float32}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    boxes = torch.cat([one["boxes"] for one in found])
    assert boxes.dtype == torch.float32
    assert (boxes != boxes.bfloat16().float()).any()


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_levels_and_anchors(detector):
    """On an image of 96 pixels, of which P6 has ceil(96 / 64) = 2 rows."""
    made = network(detector).eval()
    first = 8 if detector == "retinanet" else 4
    pyramid = list(made.model.backbone(torch.randn(1, 3, 96, 96)).values())
    assert [y.shape[-1] for y in pyramid] == [-(-96 // (first * 2**i)) for i in range(5)]
    generator = made.model.anchor_generator if first == 8 else made.model.rpn.anchor_generator
    assert isinstance(generator, Anchors)
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)]), pyramid)
    each = 9 if first == 8 else 3
    start = 0
    for level, y in enumerate(pyramid):
        count, stride = y.shape[-1] ** 2 * each, first * 2**level
        own = anchors[start : start + count].view(*y.shape[-2:], each, 4)
        centres = (own[..., :2] + own[..., 2:]) / 2
        torch.testing.assert_close(centres[-1, -1, 0], torch.full((2,), stride * (y.shape[-1] - 1.0)))
        sides = (own[0, 0, :, 2:] - own[0, 0, :, :2]).prod(-1).sqrt()
        assert sides.min().item() == pytest.approx(12 * 2**level, rel=0.1)
        start += count
    assert start == len(anchors)


def test_anchors_are_torchvisions_where_its_strides_are_right():
    made = network("faster_rcnn")
    own = made.model.rpn.anchor_generator
    theirs = AnchorGenerator(own.sizes, own.aspect_ratios)
    maps = [torch.zeros(1, 1, 128 // 2**i, 192 // 2**i) for i in range(2, 7)]
    batch = ImageList(torch.zeros(1, 3, 128, 192), [(128, 192)])
    torch.testing.assert_close(own(batch, maps), theirs(batch, maps))


def test_scales_of_boxes_do_not_depend_on_the_first_image():
    made = network("faster_rcnn").eval()
    with torch.inference_mode():
        made(Images(images([(33, 33)])))
    assert made.model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_frozen_norms_stay():
    made = network("retinanet", "resnet18", None, {}, freeze_norm=True).train()
    before = {k: v.clone() for k, v in made.encoder.state_dict().items() if "bn" in k}
    losses = made(Images(images()[:1], targets()[:1]))
    sum(losses.values()).backward()
    norms = [m for m in made.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(p.grad is None for m in norms for p in m.parameters())
    after = made.encoder.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    loose = network("retinanet", "resnet18", None, {}).train()
    loose(Images(images()[:1], targets()[:1]))
    assert not torch.equal(loose.encoder.state_dict()["bn1.running_mean"], before["bn1.running_mean"])


def test_the_mechanism_stands_on_the_last_map_of_a_resnet():
    made = network("mask_rcnn", "resnet18", "external", {"mechanism_args": {"memory": 7}})
    attention = made.model.backbone.attention
    assert attention.attn.memory_k.shape[0] == 7
    seen = []
    attention.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    made.eval()(Images(images([(64, 96)])))
    assert seen == [(1, 512, 2, 3)]
    plain = network("mask_rcnn", "resnet18", None, {})
    assert isinstance(plain.model.backbone.attention, nn.Identity)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": "vit_mini", "model_args": {}},
            "model: expected a network whose last features have strides 8, 16, 32",
        ),
        ({"model": "resnet18x", "mechanism": None}, "model: expected a name of timm or sansmax"),
        ({"model_args": {"dept": 3}}, "model_args, detector_args: expected words that soft_tiny"),
        ({"detector_args": {"nms": 3}}, "model_args, detector_args: expected words that soft_tiny"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(ValueError, match=words), warnings.catch_warnings():
        detection.build(replace(RUN, **changes), ["1 a"])


def test_weights_of_a_run_and_of_a_classifier(tmp_path):
    import safetensors.torch
    import timm

    recipe = replace(RUN, detector="mask_rcnn")
    whole = detection.build(recipe, ["1 a", "2 b"])
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    fresh = detection.build(recipe, ["1 a", "2 b", "3 c"])
    detection.load_weights(fresh, replace(recipe, weights=str(tmp_path / "whole.safetensors")))
    own, theirs = fresh.state_dict(), whole.state_dict()
    differ = {name for name in own if own[name].shape != theirs[name].shape}
    assert {name.split(".")[-2] for name in differ} == {"cls_score", "bbox_pred", "mask_fcn_logits"}
    assert all(torch.equal(own[name], theirs[name]) for name in own.keys() - differ)

    classifier = timm.create_model("resnet18", num_classes=3)
    safetensors.torch.save_file(classifier.state_dict(), tmp_path / "resnet.safetensors")
    plain = replace(recipe, model="resnet18", model_args={}, mechanism="external")
    made = detection.build(plain, ["1 a"])
    detection.load_weights(made, replace(plain, weights=str(tmp_path / "resnet.safetensors")))
    assert torch.equal(made.encoder.state_dict()["conv1.weight"], classifier.conv1.weight)
