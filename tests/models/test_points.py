"""Point networks: timm's interface, any mechanism, padding, few and many points, dtypes, refusals."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from clouds import cloud, run, small
from torch import nn

from sansmax import layers

NETWORKS = ["pct_cls", "pct_ea_cls", "pct_partseg", "pct_ea_partseg"]
SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 5},
    "aft_local": {"factor_dim": 5, "window": 4},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}
ORDERLESS = [name for name, layer in layers.mechanisms().items() if not layer.traits.needs]
every = pytest.mark.parametrize("name", NETWORKS)


@every
def test_timms_interface(name):
    model = small(name).eval()
    points = cloud(3, 20, 3)
    want = run(model, points)
    parts = "partseg" in name
    assert want.shape == ((3, 5, 20) if parts else (3, 5))
    features = model.forward_features(points)
    assert features.shape == (3, 20 if parts else 7, 24)
    head = (features, torch.arange(3)) if parts else (features,)
    torch.testing.assert_close(model.forward_head(*head), want)
    before = model.forward_head(*head, pre_logits=True)
    assert before.shape == ((3, 10, 20) if parts else (3, 10))
    logits = model.get_classifier()(before.mT).mT if parts else model.get_classifier()(before)
    torch.testing.assert_close(logits, want)
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (24, 10, 5)

    model.reset_classifier(9)
    assert run(model, points).shape[1] == model.num_classes == 9
    model.reset_classifier(0)
    torch.testing.assert_close(run(model, points), before)
    assert run(small(name, num_classes=0, in_chans=6).eval(), cloud(1, 8, 6)).shape[1] == 10
    assert len(model.mixers()) == (2 if "_ea_" in name else 0)
    assert model.no_weight_decay() == set()

    groups = model.group_matcher()
    assert set(groups) >= {"stem", "blocks"}
    assert set(model.group_matcher(coarse=True)) == {"stem", "blocks"}
    depths = timm.models.group_parameters(model, groups)
    head_only = [k for k, _ in model.named_parameters() if k.startswith(("hidden", "head", "label"))]
    assert sorted(depths[len(depths) - 1]) == sorted(head_only)
    assert depths[0]
    assert all(key.startswith("embed") for key in depths[0])

    cfg = timm.create_model(name).pretrained_cfg
    assert (cfg["num_classes"], cfg["classifier"]) == ((50 if parts else 40), "head")
    assert not {"input_size", "mean", "std", "crop_pct", "interpolation"} & set(cfg)
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Linear)
    assert timm.create_model(name).head_drop.p == 0.5


def test_pooling():
    model, points = small("pct_cls").eval(), cloud(2, 20, 3)
    features = model.forward_features(points)

    def behind(x):
        return model.head(model.hidden[1](model.hidden[0](x)))

    for pool, want in (("max", features.max(1).values), ("avg", features.mean(1)), ("", features)):
        model.reset_classifier(5, pool)
        torch.testing.assert_close(model(points), behind(want))


@every
def test_training_reaches_every_parameter_and_checkpointing_changes_nothing(name):
    points, results = cloud(4, 20, 3), []
    for checkpointing in (False, True):
        model = small(name, drop_rate=0.2, proj_drop_rate=0.1).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        (run(model, points).movedim(1, -1) * torch.arange(5.0)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        # What a batch norm follows needs no bias, in training.
        idle = [k for k, p in model.named_parameters() if not p.grad.abs().max() > 1e-6]
        assert all(k.endswith("bias") for k in idle)
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_any_mechanism_in_classification(mechanism):
    model = small("pct_cls", mechanism=mechanism, mechanism_args=SMALL.get(mechanism))
    points, label = cloud(4, 20, 3), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(points), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    mixers = model.mixers()
    assert len(mixers) == (0 if mechanism == "softmax" else 2)
    assert all(type(mixer) is layers.mechanism(mechanism) for mixer in mixers.values())
    unused = {f"{k}.{p}" for k, layer in mixers.items() for p in (*layer.unused, "w")}
    idle = {k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle <= unused
    assert model.no_weight_decay() == {f"{k}.{p}" for k, m in mixers.items() for p in m.no_weight_decay()}
    model.eval()
    torch.testing.assert_close(model(points)[1:2], model(points[1:2]), rtol=1e-4, atol=1e-5)


def test_a_mechanism_is_in_the_offset_form():
    model = small("pct_ea_cls", mechanism="sima", mechanism_args={"num_heads": 2}).eval()
    block, x = model.blocks[0], cloud(2, 9, 16)
    inside = block.trans.norm(
        (x - block.attn(x)).flatten(0, 1) @ block.trans.fc.weight.mT + block.trans.fc.bias
    )
    torch.testing.assert_close(block(x), x + inside.view(2, 9, 16).relu())
    assert block.attn.num_heads == 2
    with_drop = small("pct_ea_cls", proj_drop_rate=0.3)
    assert {mixer.proj_drop.p for mixer in with_drop.mixers().values()} == {0.3}
    assert all(isinstance(mixer.proj, nn.Identity) for mixer in with_drop.mixers().values())


@pytest.mark.parametrize("mechanism", ORDERLESS)
def test_parts_of_permuted_points_with_any_mechanism_that_needs_no_order(mechanism):
    model = small("pct_partseg", mechanism=mechanism, num_categories=0).double().eval()
    points = cloud(2, 13, 3, dtype=torch.float64)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    want = model(points)
    torch.testing.assert_close(model(points[:, order]), want[..., order], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model(points[1:]), want[1:], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(model(points[:, :-1]), want[..., :-1])  # the points do meet


@pytest.mark.parametrize("name", ["pct_cls", "pct_ea_cls"])
def test_classes_do_not_depend_on_the_order_behind_the_first_point(name):
    model = small(name).double().eval()
    points = cloud(2, 23, 3, dtype=torch.float64)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0)) + 1
    want = model(points)
    permuted = torch.cat([points[:, :1], points[:, order]], 1)
    torch.testing.assert_close(model(permuted), want, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(model(points.flip(1)), want, rtol=1e-6)  # another start
    torch.testing.assert_close(model(points[1:]), want[1:], rtol=1e-9, atol=1e-10)


def padded(points, mask, filler):
    """points (B, n, C) at the True places of mask (B, N), n in every row."""
    out = torch.full((*mask.shape, points.shape[-1]), filler, dtype=points.dtype)
    return out.masked_scatter(mask[..., None], points)


@pytest.mark.parametrize("words", [{}, {"mechanism": "sima"}, {"num_samples": ()}])
@every
def test_a_padded_point_changes_nothing(name, words):
    if "partseg" in name and words == {"num_samples": ()}:
        words = {"mechanism": "xnorm"}
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[0, [0, 1, 8, 17]], mask[1, [3, 4, 5, 11]] = False, False
    points = cloud(2, 14, 3, dtype=torch.float64)
    for training in (False, True):
        alone, among = small(name, **words).double(), small(name, **words).double()
        want = run(alone.train(training), points)
        filled = padded(points, mask, math.nan).requires_grad_()
        got = run(among.train(training), filled, mask=mask)
        if "partseg" in name:
            assert not got.mT[~mask].any()
            got = got.mT[mask].view(2, 14, 5).mT
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        got.square().sum().backward()
        want.square().sum().backward()
        assert not filled.grad[~mask].any()
        for (key, p), q in zip(among.named_parameters(), alone.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-8 * max(1, q.grad.abs().max()), key
        for p, q in zip(among.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(p, q)


@every
def test_clouds_of_unequal_numbers_of_points(name):
    model = small(name).double().eval()
    points = cloud(3, 16, 3, dtype=torch.float64)
    counts = torch.tensor([16, 5, 1])
    mask = torch.arange(16) < counts[:, None]
    got = run(model, points, mask=mask)
    for b, count in enumerate(counts):
        label = {"label": torch.tensor([b])} if "partseg" in name else {}
        want = model(points[b : b + 1, :count], **label)
        torch.testing.assert_close(got[b : b + 1, ..., : want.shape[-1]], want, rtol=1e-9, atol=1e-10)
    empty = run(model, torch.full_like(points, math.nan), mask=torch.zeros_like(mask))
    origin = run(model, torch.zeros_like(points[:, :1]))
    torch.testing.assert_close(empty, torch.zeros_like(empty) if "partseg" in name else origin)
    mask[1] = False
    run(model.train(), points, mask=mask).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_other_channels_do_not_choose_points():
    model, seen = small("pct_cls", in_chans=5).eval(), []
    model.stages[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    points = cloud(2, 20, 5)
    model(points)
    assert torch.equal(seen[0], points[..., :3])


@every
def test_dropout_in_the_head(name):
    model = small(name, drop_rate=1.0).train()
    out = run(model, cloud(3, 20, 3))
    if "partseg" in name:
        torch.testing.assert_close(out, out[:1, :, :1].expand_as(out))  # all points are dropped alike
        assert not torch.equal(out[0, :, 0], model.head.bias)  # only in front of the second layer
    else:
        assert torch.equal(out, model.head.bias.expand_as(out))


def test_few_points_are_repeated():
    """As many neighbours and samples as asked for, of the points that there are."""
    model = small("pct_cls").eval()
    for count in (1, 3, 8):
        points = cloud(2, count, 3)
        xyz, x = model.stages[0](points, cloud(2, count, 4, seed=5))
        assert x.shape == (2, 11, 8)
        assert torch.equal(xyz[:, count:], points[:, :1].expand(-1, 11 - count, -1))
        assert model(points).isfinite().all()
    one = cloud(2, 1, 3)
    torch.testing.assert_close(model(one.expand(-1, 6, -1)), model(one))


def test_gradients_flow_through_features_and_not_through_the_choice():
    model = small("pct_cls", in_chans=5).double().eval()
    points = cloud(2, 23, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: model(p)[:, :2], points, eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every
def test_half_precision(error, name, dtype):
    model = small(name).train()
    points = cloud(3, 40, 3)
    with torch.autocast("cpu", dtype=dtype):
        out = run(model, points)
        assert out.dtype == dtype
        out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.inference_mode():
        want = run(model, points)
        with torch.autocast("cpu", dtype=dtype):
            assert error(run(model, points).float(), want) < 0.1
        model.to(dtype)
        assert error(run(model, points.to(dtype)).float(), want) < 0.2


@pytest.mark.parametrize("name", ["pct_cls", "pct_ea_cls", "pct_ea_partseg"])
def test_ten_thousand_points(name):
    model = small(name).eval()
    with torch.inference_mode():
        out = run(model, cloud(1, 10_000, 3))
    assert out.isfinite().all()


def test_devices_and_dtypes():
    for name in NETWORKS:
        with torch.device("meta"):
            model = small(name, num_samples=(5, 3)) if "partseg" not in name else small(name)
            assert run(model, torch.empty(2, 9, 3)).shape[:2] == (2, 5)
        model = small(name, device="meta", dtype=torch.float64)
        assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
        model.reset_classifier(7)
        assert model.head.weight.is_meta


def test_refusals():
    points = cloud(2, 9, 3)
    model, parts = small("pct_cls"), small("pct_partseg")
    for run_it, message in (
        (lambda: model(points.mT), r"PCT: points must have shape \(B, N, 3\), got \(2, 3, 9\); .* points.mT"),
        (lambda: model(points[:, :0]), r"points must have shape \(B, N, 3\), got \(2, 0, 3\)"),
        (lambda: model(points, torch.ones(2, 8, dtype=torch.bool)), r"mask must have shape .* \(2, 9\)"),
        (lambda: parts(points), r"PCTPartSeg: label must be integers \(2,\) or one-hot \(2, 3\).*got None"),
        (lambda: parts(points, torch.zeros(2)), r"label must be .*got torch.float32 \(2,\)"),
        (lambda: parts(points, torch.zeros(2, 4)), r"label must be .*got torch.float32 \(2, 4\)"),
        (
            lambda: small("pct_partseg", num_categories=0)(points, torch.tensor([0, 1])),
            "label must be None with num_categories=0",
        ),
        (lambda: model.reset_classifier(3, "median"), "global_pool must be max, avg or empty, got 'median'"),
        (lambda: parts.reset_classifier(3, "max"), "global_pool must be None"),
        (lambda: small("pct_cls", features_only=True), "features_only must be False because points"),
        (lambda: small("pct_cls", in_chans=2), "in_chans must be at least 3"),
        (lambda: small("pct_cls", embed_dim=18), "embed_dim a multiple of 4, got"),
        (lambda: small("pct_cls", num_samples=(5, 0)), "num_samples at least 1"),
        (lambda: small("pct_cls", pretrained=True), "pretrained must be False because no weights"),
        (
            lambda: small("pct_cls", mechanism_args={"num_heads": 2}),
            "mechanism_args must be empty for 'softmax', offset attention here",
        ),
        (lambda: small("pct_cls", mechanism="simaa"), "did you mean 'sima'"),
        *(
            (
                lambda mechanism=mechanism: small("pct_partseg", mechanism=mechanism),
                f"points have no order and may be any number, got '{mechanism}'; use one of aft_simple, ",
            )
            for mechanism in set(layers.mechanisms()) - set(ORDERLESS)
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run_it()
    with pytest.raises(TypeError, match="points must be floating point"):
        model(points.long())
