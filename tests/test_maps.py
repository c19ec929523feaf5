"""Attention maps against the explicit N x N matrix, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sansmax
from sansmax import layers, maps
from sansmax.cli import main

GRID = (3, 5)
NAMES = list(layers.mechanisms())
OPTIONS = {
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
    "sima": {"token_scale": 9},
    "aft_local": {"window": 4, "factor_dim": None},
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 3},
}


def made(name: str, prefix: int = 1) -> layers.Mixer:
    torch.manual_seed(3)
    layer = layers.mechanism(name)(12, 3, qkv_bias=True, dtype=torch.float64, **OPTIONS.get(name, {}))
    layer.set_input(GRID, prefix)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return layer.eval()


def tokens(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def explicit(name: str, layer: layers.Mixer, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A (B, H or C, N, N), written out."""
    kept = mask.double()[:, None, :, None]
    if name in ("softmax", "sima", "xnorm"):
        q, k, v = layer.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        if name == "softmax":
            logits = (q @ k.mT / 2).masked_fill(~mask[:, None, None], -math.inf)
            return logits.softmax(-1) * kept
        q, k, v = q * kept, k * kept, v * kept
        if name == "sima":
            scale = mask.double().sum(1)[:, None, None, None] / layer.token_scale
            return F.normalize(q, p=1, dim=2) @ F.normalize(k, p=1, dim=2).mT * scale
        columns = torch.einsum("bhnd,bhne->bhde", k, v).norm(dim=2)
        a = torch.einsum("h,bhnd,bhmd->bhnm", layer.gamma**2, F.normalize(q, dim=-1), k)
        return a * (1 / columns).mean(-1)[..., None, None]
    if name.startswith("soft"):
        q = layer.q(x).unflatten(-1, (3, 4)).transpose(1, 2) * 4**-0.25 * kept
        marks = layer.landmarks(q[:, :, 1:], *GRID)

        def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (-(a[..., :, None, :] - b[..., None, :, :]).square().sum(-1) / 2).exp()

        p = kernel(q, marks) * kept
        a = kernel(marks, marks)
        z = sansmax.newton_inverse(a, inverse=layer.inverse, iterations=20, batchwise=False)
        if name == "soft_norm":
            root = a.sum(-1).rsqrt()
            z = root[..., None] * z * root[..., None, :]
        return p @ z @ p.mT
    if name.startswith("external"):
        heads = layer.query(x)
        heads = heads[:, None] if name == "external" else heads.unflatten(-1, (12, -1)).transpose(1, 2)
        logits = heads @ (layer.memories[0] if name == "external" else layer.memory_k).mT
        a = logits.masked_fill(~mask[:, None, :, None], -math.inf).softmax(2)
        a = a / (layer.eps + a.sum(-1, keepdim=True))
        return torch.einsum("bhns,bhms->bhnm", a, a / a.sum(2, keepdim=True))
    k = layer.qkv(x)[..., 12:24] if name != "aft_conv" else layer.qkv(x)[..., 12:15]
    count = x.shape[1]
    position = torch.arange(count)
    if name == "aft_conv":
        w = x.new_zeros(3, count, count)
        for n in range(15):
            for m in range(15):
                down, right = m // 5 - n // 5 + 1, m % 5 - n % 5 + 1
                if 0 <= down < 3 and 0 <= right < 3:
                    w[:, 1 + n, 1 + m] = layer.kernel()[:, down, right]
        w, k = w.repeat_interleave(4, 0), k.repeat_interleave(4, -1)
    elif name == "aft_full":
        w = layer.bias_u @ layer.bias_v.mT
    elif name == "aft_local":
        w = layer.bias.masked_fill((position[:, None] - position).abs() >= 4, 0)
    else:
        w = x.new_zeros(count, count)
    logits = (k.mT[:, :, None] + w).masked_fill(~mask[:, None, None], -math.inf)
    return logits.softmax(-1) * kept


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_products_are_those_of_the_explicit_matrix(name, masked):
    layer, x = made(name), tokens(16)
    mask = torch.ones(2, 16, dtype=torch.bool)
    if masked:
        mask[0, [2, 7, 15]] = False
        mask[1, 9:] = False
    given = mask if masked else None
    holding = x.masked_fill(~mask[..., None], 9e9)  # whatever it holds
    with torch.no_grad():
        a = explicit(name, layer, x.masked_fill(~mask[..., None], 0), mask)
        for query in (0, 3, 15):
            row = layer.map_row(holding, query, mask=given, grid=GRID)
            torch.testing.assert_close(row, a[:, :, query], rtol=1e-9, atol=1e-12)
        rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        rows = rows * mask
        product = layer.map_product(holding, rows, mask=given, grid=GRID)
    torch.testing.assert_close(product, torch.einsum("bn,bhnm->bhm", rows, a), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["softmax", "sima", "aft_simple", "aft_full", "aft_local", "aft_conv"])
def test_the_map_is_what_the_layer_mixes_with(name):
    layer, x = made(name), tokens(16)
    q, _, v = layer.channels(x) if name.startswith("aft") else layer.qkv(x).chunk(3, -1)
    with torch.no_grad():
        rows = torch.stack([layer.map_row(x, n, grid=GRID) for n in range(16)], 2)  # (B, H or C, N, N)
        if name.startswith("aft"):
            mixed = q.sigmoid() * torch.einsum("bcnm,bmc->bnc", rows, v)
        else:
            mixed = torch.einsum("bhnm,bmhd->bnhd", rows, v.unflatten(-1, (3, 4))).flatten(2)
        torch.testing.assert_close(layer.proj(mixed), layer(x, grid=GRID), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_one_token_and_inference_mode(name):
    layer = layers.mechanism(name)(12, 3, dtype=torch.bfloat16, **OPTIONS.get(name, {})).eval()
    layer.set_input((1, 1))
    with torch.inference_mode():
        row = layer.map_row(torch.randn(1, 1, 12, dtype=torch.bfloat16) * 30, 0, grid=(1, 1))
    assert row.isfinite().all()
    assert row.shape[0] == row.shape[2] == 1


def net(name: str, **words) -> torch.nn.Module:
    torch.manual_seed(0)
    return sansmax.create_model("vit_mini", name, img_size=(12, 20), num_classes=4, **words).eval().double()


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_a_network(name):
    model, image = net(name), torch.randn(3, 12, 20, dtype=torch.float64)
    weights = sansmax.attention_map(model, image, (2, -1), heads=True)
    seen = {}
    layer = model.blocks[-1].attn
    layer.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    with torch.no_grad():
        model(image[None])
        expected = layer.map_row(seen["x"], 1 + 2 * 5 + 4, grid=GRID)[0, :, 1:].unflatten(-1, GRID)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(sansmax.attention_map(model, image, (2, 4), layer="blocks.3.attn"), weights.mean(0))
    assert sansmax.attention_map(model, image).shape == GRID  # the class token's


@pytest.mark.parametrize("name", ["softmax", "sima", "xnorm", "soft", "aft_conv", "external"])
def test_rollout_is_the_product_of_explicit_matrices(name):
    model, image = net(name), torch.randn(1, 3, 12, 20, dtype=torch.float64)
    inputs = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model(image)
        weights = torch.zeros(16, dtype=torch.float64)
        weights[1 + 5 + 2] = 1
        for block, x in zip(reversed(model.blocks[:3]), reversed(inputs[:3]), strict=True):
            a = torch.stack([block.attn.map_row(x, n, grid=GRID)[0].mean(0) for n in range(16)])
            step = weights @ a
            weights = weights + step / step.abs().sum()
            weights = weights / weights.abs().sum()
    found = maps.attention_rollout(model, image, (1, 2), layer=2)
    torch.testing.assert_close(found, weights[1:].unflatten(0, GRID), rtol=1e-9, atol=1e-12)


def test_softmax_rollout_is_abnar_and_zuidemas():
    model, image = net("softmax"), torch.randn(1, 3, 12, 20, dtype=torch.float64)
    inputs = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model(image)
        product = torch.eye(16, dtype=torch.float64)
        for block, x in zip(model.blocks, inputs, strict=True):
            a = torch.stack([block.attn.map_row(x, n)[0].mean(0) for n in range(16)])
            product = (a + torch.eye(16)) / 2 @ product
    torch.testing.assert_close(maps.attention_rollout(model, image).flatten(), product[0, 1:])


@pytest.mark.parametrize(("trunk", "grid"), [("soft_tiny", (4, 6)), ("sima_nano_12_p16", (4, 6))])
def test_other_trunks(trunk, grid):
    model = sansmax.create_model(trunk, img_size=64, num_classes=3).eval()
    image = torch.randn(3, 64, 96)
    weights = sansmax.attention_map(model, image, (1, 2), layer=5)
    assert weights.shape == grid
    assert weights.isfinite().all()
    assert maps.attention_rollout(model, image, (1, 2), layer=5).abs().sum() <= 1 + 1e-5


def test_memory_and_time_grow_with_the_tokens_not_their_square():
    layer = layers.SimA(12, 3).eval()
    row = layer.map_row(torch.randn(1, 300_000, 12), 7)  # a matrix would take 3 x 335 GiB
    assert row.shape == (1, 3, 300_000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"query": (3, 0)}, r"query: expected a place in the grid of 3 rows and 5 columns .* got \(3, 0\)"),
        ({"query": (0, 0), "layer": 4}, "layer: expected a number below 4 or one of blocks.0.attn"),
        ({"query": (0, 0), "layer": "head"}, "layer: expected .* got 'head'"),
        ({"image": torch.zeros(2, 3, 12, 20)}, r"expected one image .* got \(2, 3, 12, 20\)"),
    ],
)
def test_refusals(words, message):
    words = {"image": torch.zeros(3, 12, 20, dtype=torch.float64), **words}
    with pytest.raises(ValueError, match=message):
        sansmax.attention_map(net("sima"), **words)


def test_refusals_of_networks():
    image = torch.zeros(3, 12, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match="has no class token, got none; give a place in its grid of 3 x 5"):
        sansmax.attention_map(net("sima", class_token=False), image)
    with pytest.raises(ValueError, match="expected a network that calls layers of sansmax, got Conv2d"):
        sansmax.attention_map(torch.nn.Conv2d(3, 4, 1).double(), image, (0, 0))


def test_the_command_writes_a_picture_or_says_why_not(tmp_path, capsys):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(sansmax.create_model("sima_nano_12_p16").state_dict(), tmp_path / "own.safetensors")
    what, out = f"sima_nano_12_p16={tmp_path / 'own.safetensors'}", tmp_path / "new" / "map.png"
    Image.linear_gradient("L").save(tmp_path / "image.png")
    (tmp_path / "text.png").write_text("no picture")
    words = ["map", what, str(tmp_path / "image.png"), "--img-size", "48", "--out", str(out)]
    assert main([*words, "--side", "96"]) == 0
    with Image.open(out) as made:
        assert made.size == (96, 96)
        assert made.getpixel((32, 32)) == (0, 255, 0)  # the middle of 3 x 3 tokens
    assert "map of row 1, column 1 over 3 x 3 tokens" in capsys.readouterr().out
    assert main([*words, "--query", "2", "0", "--rollout", "--layer", "blocks.5.attn"]) == 0
    assert "rollout of row 2, column 0" in capsys.readouterr().out
    words[2] = str(tmp_path / "text.png")
    assert main(words) == 2
    assert "image: expected a picture that can be read" in capsys.readouterr().err


def test_overlays_frame_the_query_and_colour_the_largest_weights():
    weights = torch.zeros(3, 5)
    weights[2, 4], weights[0, 0] = 1.0, -1.0
    image = Image.new("RGB", (100, 60), (128, 128, 128))
    made = maps.overlay(image, weights, (0, 4))
    red, blue, plain = made.getpixel((90, 50)), made.getpixel((10, 10)), made.getpixel((50, 30))
    assert red[0] > red[2] + 50
    assert blue[2] > blue[0] + 50
    assert max(plain) - min(plain) < 10
    assert made.getpixel((80, 0)) == (0, 255, 0)
    assert made.size == image.size
    plain = maps.overlay(image, weights.abs())
    assert sum(plain.getpixel((90, 50))) > sum(plain.getpixel((50, 30)))
    assert maps.overlay(image, torch.zeros(3, 5)).size == image.size
