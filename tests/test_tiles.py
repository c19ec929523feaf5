"""Images in tiles: the network's own result, whatever the sizes, and memory that does not grow."""

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import sansmax
import sansmax.models
from sansmax import layers
from sansmax.tiles import features_tiled, predict_tiled, scratch_bytes

VIT = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 8, "img_size": 40, "dynamic_img_size": True}
VIT |= {"dynamic_img_pad": True}
XCIT = {"embed_dim": 32, "num_heads": 2, "depth": 2, "eta": 0.5}
XVIT = {**XCIT, "attn_dim": 12, "img_size": 64}

NETWORKS = {
    "sima": ("sima_tiny_12_p16", None, XCIT),
    "sima, patches of 8, mean": ("sima_nano_12_p8", None, {**XCIT, "global_pool": "avg"}),
    "sima, tokens as trained": ("sima_nano_12_p8", "sima", {**XCIT, "mechanism_args": {"token_scale": 9}}),
    "xnorm": ("xvit_u_p16", None, XVIT),
    "xnorm, as xcit": ("vibid_u_p16", None, {**XVIT, "lpi": "xcit", "positions": "fourier"}),
    "aft_simple in xcit": ("sima_nano_12_p16", "aft_simple", XCIT),
    "pyramid": ("sima_nano_12_p16_pyramid", None, XCIT),
    "vit": ("sima_deit_tiny_p16", None, {**VIT, "init_values": 0.7, "reg_tokens": 2}),
    "vit, mean": ("vit_tiny_patch16_224", "xnorm", {**VIT, "class_token": False, "global_pool": "avg"}),
    "vit, mean with class token": (
        "vit_tiny_patch16_224",
        "aft_simple",
        {**VIT, "global_pool": "avg", "pool_include_prefix": True, "pre_norm": True},
    ),
    "vit, class token apart": (
        "vit_tiny_patch16_224",
        "sima",
        {**VIT, "global_pool": "avg", "no_embed_class": True, "qk_norm": True},
    ),
    "stem": ("vit_mini", "xnorm", {"stem": "conv", "img_size": 24, "embed_dim": 24, "depth": 2}),
}


def made(name, double=True, **more):
    """A network whose every part matters: weights far from 0, norms far from the identity."""
    name, mechanism, words = NETWORKS[name]
    torch.manual_seed(0)
    model = sansmax.create_model(name, mechanism, num_classes=5, **{**words, **more})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
        for key, tensor in module.named_parameters(recurse=False):
            if key in ("weight", "bias", "cls_token", "reg_token", "pos_embed", "table"):
                tensor.data += torch.randn_like(tensor) * (0.6 if tensor.ndim < 3 else 0.3)
    return (model.double() if double else model).eval()


def image(height, width, seed=1, dtype=torch.float64):
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whole(model, x):
    if getattr(model, "dynamic_img_size", True) is False:
        model.set_input_size(tuple(x.shape[-2:]))
    with torch.inference_mode():
        return model(x[None])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("height", "width", "tile"), [(104, 148, 48), (53, 31, 16), (40, 72, 1024)])
def test_the_networks_own_result(name, height, width, tile, error):
    if name == "stem":  # takes whole patches alone
        height, width = height // 4 * 4, width // 4 * 4
    model, x = made(name), image(height, width)
    found = predict_tiled(model, x, tile=tile)
    exact = whole(copy.deepcopy(model), x)
    # timm resamples positions in float32, and other tiles of them may be an ulp off.
    learned = "xnorm" in name or "vit" in name or "stem" in name
    assert error(found, exact) < (3e-6 if learned and name != "xnorm, as xcit" else 1e-12)
    other = predict_tiled(model, x.roll(5, 2), tile=tile)
    assert error(other, exact) > 1e-3  # the pixels matter


@pytest.mark.parametrize("name", ["sima", "xnorm", "vit, mean", "vit, mean with class token"])
def test_single_precision_stays_within_four_times_the_whole_networks_error(name, error):
    model, x = made(name, double=False), image(208, 180, dtype=torch.float32)
    exact = whole(copy.deepcopy(model).double(), x.double())
    assert error(predict_tiled(model, x, tile=64), exact) < 4 * error(whole(model, x), exact) + 2e-7


def test_2048_px_as_in_one_piece(error):
    model = made("sima", double=False, depth=1)
    x = image(2048, 2048, dtype=torch.float32)
    exact = whole(copy.deepcopy(model).double(), x.double())
    assert error(predict_tiled(model, x, tile=512), exact) < 4 * error(whole(model, x), exact) + 2e-7


def test_of_a_swapped_and_of_a_folded_network(error):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True, num_classes=5).eval()
    vit, _ = sansmax.swap(vit, "aft_simple")
    x = image(64, 96, dtype=torch.float32)
    assert error(predict_tiled(vit, x, tile=32), whole(vit, x)) < 1e-5
    model = made("sima", double=False)
    folded = sansmax.optimize_for_inference(model, example=x[None])
    assert error(predict_tiled(folded, x, tile=32), whole(model, x)) < 1e-5


def test_the_network_stays_as_it_is():
    model = made("sima").train()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    model.global_pool = "avg"
    x = image(64, 64)
    features = features_tiled(model, x, tile=16)
    assert features.shape == (1, 2, 32)
    assert model.training
    model.head_drop.p = 0.99
    assert torch.equal(predict_tiled(model, x, tile=16), predict_tiled(model.eval(), x, tile=16))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sima", {}),
        ("sima", {"token_scale": 7, "qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm}),
        ("sima", {"eps": 30.0}),
        ("xnorm", {"eps": 5.0}),
        ("xnorm", {"attn_dim": 6, "gamma": True}),
        ("xnorm", {"qkv_bias": True, "gamma": False}),
        ("aft_simple", {"qkv_bias": True, "qk_norm": True, "norm_layer": nn.LayerNorm}),
    ],
)
def test_layers_in_parts(name, words, error):
    torch.manual_seed(0)
    layer = layers.mechanism(name)(12, num_heads=3, **words).double()
    if name == "xnorm" and layer.gamma is not None:
        layer.gamma.data.uniform_(0.5, 2)
    x = torch.randn(2, 23, 12, dtype=torch.float64)
    sums = None
    for part in x.split([5, 1, 17], 1):
        sums = layer.token_sums(part, sums)
    found = torch.cat([layer.from_sums(part, sums) for part in x.split([11, 12], 1)], 1)
    assert error(found, layer(x)) < 1e-14


@pytest.mark.parametrize("name", ["sima", "xnorm", "aft_simple"])
@pytest.mark.parametrize("size", [1e-30, 1e3, 1e30])
def test_layers_in_parts_at_the_ends_of_float32(name, size, error):
    torch.manual_seed(0)
    layer = layers.mechanism(name)(8, num_heads=2)
    x = torch.randn(1, 12, 8) * size
    sums = layer.token_sums(x[:, 6:], layer.token_sums(x[:, :6]))
    assert error(layer.from_sums(x, sums), layer(x)) < 1e-5


@pytest.mark.parametrize(
    "name", sorted(set(sansmax._find.names("sansmax.layers")) - {"sima", "xnorm", "aft_simple"})
)
def test_other_layers_have_no_form_in_parts(name):
    layer = layers.mechanism(name)(12, num_heads=3)
    assert not layer.in_parts
    for call in (layer.token_sums, lambda x: layer.from_sums(x, None)):
        with pytest.raises(ValueError, match="there is no form in parts; use SimA, XNorm or AFTSimple"):
            call(torch.randn(1, 4, 12))


def of_softmax_in_one_block():
    model = made("vit, mean")
    model.blocks[1].attn = layers.Softmax(24, num_heads=3)
    return model


def with_a_mixing_mlp():
    model = made("vit, mean")
    model.blocks[2].mlp = timm.layers.GlobalResponseNormMlp(24, 48)
    return model


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            lambda: timm.create_model("vit_tiny_patch16_224"),
            r"got Attention at blocks\.0\.attn; use a network of SimA",
        ),
        (lambda: sansmax.create_model("vit_mini", "soft"), r"got SOFT at blocks\.0\.attn"),
        (lambda: sansmax.create_model("vit_mini", "external"), r"got ExternalAttention at blocks\.0\.attn"),
        (of_softmax_in_one_block, r"got Softmax at blocks\.1\.attn"),
        (with_a_mixing_mlp, r"got GlobalResponseNorm at blocks\.2\.mlp\.grn"),
        (lambda: sansmax.create_model("xcit_nano_12_p16_224"), r"got XCA at blocks\.0\.attn"),
        (lambda: timm.create_model("eamlp_7"), "patch embedding of convolutions .* got TokensToToken"),
        (lambda: timm.create_model("sima_cvt_13"), "a Vision Transformer or an XCiT, got CvT"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), "got VisionTransformerDistilled"),
        (lambda: made("vit, mean", global_pool="max"), "global_pool='max'"),
        (lambda: made("vit", global_pool="map"), "got AttentionPoolLatent"),
        (lambda: made("vit", block_fn=timm.models.vision_transformer.ParallelScalingBlock), "at blocks.0"),
    ],
)
def test_networks_that_are_refused(model, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        predict_tiled(model(), image(16, 16, dtype=torch.float32), tile=16)
    assert str(caught.value).startswith("predict_tiled: expected ")


@pytest.mark.parametrize(
    ("source", "words", "sentence"),
    [
        (image(32, 32), {"tile": 20}, "tile: expected a multiple of the patch of 16 pixels, got 20; use 16"),
        (image(32, 32), {"tile": 0}, "got 0; use 16"),
        (
            image(32, 32)[:2],
            {},
            r"a normalised image \(3, height, width\) .* got torch.float64 \(2, 32, 32\)",
        ),
        (
            torch.zeros(3, 32, 32, dtype=torch.uint8),
            {},
            r"floating numbers, got torch.uint8 .* give uint8 as",
        ),
        (np.zeros((32, 32, 3)), {}, r"array of uint8 \(height, width, 3\), got ndarray of float64"),
        (np.zeros((32, 32, 3), np.uint8), {"mean": (0.5,)}, "expected 3 numbers each, one a channel, got 1"),
        ([1, 2], {}, "got list of None"),
        ("no/such/image.png", {}, "an image that can be read, got no/such/image.png .*; give another"),
        (
            image(32, 32),
            {"scratch": "no/such/folder"},
            "scratch: expected a folder, got no/such/folder; make it",
        ),
    ],
)
def test_arguments_that_are_refused(source, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        predict_tiled(made("sima"), source, **{"tile": 16, **words})


class Rows:
    """An image whose rows come into being when they are read."""

    dtype = np.dtype(np.uint8)

    def __init__(self, height, width):
        self.shape, self.read = (height, width, 3), []

    def __getitem__(self, rows):
        self.read.append((rows.start, rows.stop))
        row, column = np.ogrid[rows.start : rows.stop, : self.shape[1]]
        return np.stack([row * k + column * (4 - k) + row * column // 97 for k in (1, 2, 3)], 2).astype(
            np.uint8
        )


def normalised(pixels, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    mean, std = (torch.tensor(t)[:, None, None] for t in (mean, std))
    return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std


def test_rows_are_read_from_top_to_bottom_each_once(error):
    model, rows = made("sima", double=False), Rows(150, 333)
    found = predict_tiled(model, rows, tile=48)
    starts, stops = zip(*rows.read, strict=True)
    assert starts == (0, *stops[:-1])
    assert stops[-1] == 150
    assert max(b - a for a, b in rows.read) <= 32  # a row of patches, and one more at the first
    assert error(found, whole(model, normalised(rows[0:150]))) < 1e-5
    given = predict_tiled(model, rows, tile=48, mean=(0, 0, 0), std=(1, 1, 1))
    assert error(given, whole(model, torch.from_numpy(rows[0:150]).permute(2, 0, 1) / 255)) < 1e-5


KINDS = {
    "grey.png": lambda x: Image.fromarray(x[..., 0]),
    "sixteen.png": lambda x: Image.fromarray(x[..., 0].astype(np.uint16) * 250 + x[..., 1]),
    "alpha.png": lambda x: Image.fromarray(np.concatenate([x, x[..., :1]], 2)),
    "palette.png": lambda x: Image.fromarray(x).quantize(17),
    "one.png": lambda x: Image.fromarray(x[..., 0] > 127),
    "plain.tif": lambda x: Image.fromarray(x),
    "turned.tif": lambda x: Image.fromarray(x),
    "ink.tif": lambda x: Image.fromarray(x).convert("CMYK"),
    "photo.jpg": lambda x: Image.fromarray(x).resize((330, 150)),
    "plain.webp": lambda x: Image.fromarray(x),
}


@pytest.mark.parametrize("name", KINDS)
def test_files_are_seen_as_elsewhere(name, tmp_path, error):
    from sansmax.tasks._data._decode import to_rgb

    path, words = tmp_path / name, {"lossless": True} if name.endswith("webp") else {}
    if name == "turned.tif":
        words["tiffinfo"] = {274: 6}  # Exif's orientation
    KINDS[name](Rows(90, 75)[0:90]).save(path, **words)
    model = made("sima", double=False, depth=1)
    with Image.open(path) as opened:
        seen = normalised(np.array(to_rgb(opened)))
    assert error(predict_tiled(model, path, tile=32), whole(model, seen)) < 1e-5


def test_one_channel(tmp_path, error):
    model = made("sima", double=False, in_chans=1, depth=1)
    picture = Image.fromarray(Rows(50, 70)[0:50])
    picture.save(tmp_path / "image.png")
    seen = normalised(np.array(picture.convert("L"))[..., None], (0.4,), (0.3,))
    found = predict_tiled(model, tmp_path / "image.png", tile=32, mean=(0.4,), std=(0.3,))
    assert error(found, whole(model, seen)) < 1e-5


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.tif", "none.png", "float.tif"])
def test_files_that_cannot_be_read(name, tmp_path):
    path = tmp_path / name
    if name == "float.tif":
        Image.fromarray(np.random.default_rng(0).random((40, 40), np.float32)).save(path)
    else:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(path)
        content = path.read_bytes()
        path.write_bytes(b"nothing" if name == "none.png" else content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=rf"source: expected an image that can be read, got .*{name} \(.+\); give"
    ):
        predict_tiled(made("sima", double=False), path, tile=32, scratch=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_tokens_lie_in_the_folder_named_and_nothing_is_left(tmp_path, monkeypatch):
    model, made_in = made("sima"), []
    file = sansmax.tiles._scratch.tempfile.TemporaryFile
    monkeypatch.setattr(
        sansmax.tiles._scratch.tempfile,
        "TemporaryFile",
        lambda **words: made_in.append(file(**words)) or made_in[-1],
    )
    stop = iter([None] * 20)
    with pytest.raises(RuntimeError):
        predict_tiled(model, image(96, 96), tile=16, scratch=tmp_path, progress=lambda *_: progress(stop))
    assert len(made_in) == 2
    assert all(one.closed for one in made_in)
    assert not [*tmp_path.iterdir()]
    needed = scratch_bytes(model, (96, 90))
    assert needed == 2 * 36 * 32 * 8
    assert scratch_bytes(made("vit"), (96, 90)) == 12 * 12 * 24 * 8
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(
        ValueError, match=r"scratch: expected 0\.00 GB free for the tokens, got .*; name a folder"
    ):
        predict_tiled(model, image(96, 90), tile=16, scratch=tmp_path)


def progress(stop):
    if next(stop, "end") == "end":
        raise RuntimeError


def test_progress_counts_to_the_end():
    seen = []
    predict_tiled(made("sima"), image(100, 70), tile=32, progress=lambda *pair: seen.append(pair))
    assert [done for done, _ in seen[:-1]] == list(range(1, len(seen)))
    assert {total for _, total in seen} == {seen[-1][1]}
    assert seen[-1][0] == seen[-1][1]


def peak(run):
    """MiB that the process grows by at most."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc/self/status, which tells the peak")
    Path("/proc/self/clear_refs").write_text("5")
    before = int(re.search(r"VmRSS:\s*(\d+)", status.read_text())[1])
    run()
    return (int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) - before) / 1024


def test_memory_does_not_grow_with_the_image():
    model = made("sima", double=False, embed_dim=64, depth=1)
    predict_tiled(model, Rows(512, 512), tile=256)
    small, large = (peak(lambda s=side: predict_tiled(model, Rows(s, s), tile=256)) for side in (512, 3072))
    # The pixels in float32 are 108 MiB, the tokens 9, and the stem's first layer 72.
    assert large < small + 16


def test_bfloat16_by_autocast(error):
    model, x = made("sima", double=False), image(64, 96, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, one = predict_tiled(model, x, tile=32), whole(model, x)
    exact = whole(copy.deepcopy(model).double(), x.double())
    assert error(found, exact) < 3 * error(one, exact) + 0.01
