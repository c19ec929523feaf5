"""What timm's own model tests ask of a network, of every registered image classifier, small."""

import copy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from sansmax import models

NETWORKS = [name for name in models.networks() if not name.startswith(("eanet", "pct"))]
every = pytest.mark.parametrize("name", NETWORKS)
SIZE = (48, 64)


def small(name, **words):
    """A network of the same wiring that builds and runs in a moment."""
    torch.manual_seed(0)
    if name.startswith("soft"):
        own = {"embed_dims": (32, 32, 64, 64), "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)}
    elif "cvt" in name:
        own = {"embed_dims": (16, 32, 48), "depths": (1, 1, 2), "num_heads": (1, 2, 3)}
    else:
        own = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    if name.startswith(("xvit", "vibid")):
        own["attn_dim"] = 16
    if "aft_conv" in name:
        own["mechanism_args"] = {"kernel_size": 3, "num_heads": 8}
    return timm.create_model(name, **{**own, "num_classes": 5, "img_size": SIZE, **words})


def images(channels=3, size=SIZE):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


@every
def test_logits_features_and_head(name):
    model, x = small(name).eval(), images()
    want = model(x)
    assert want.shape == (2, 5)
    assert want.isfinite().all()
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), want)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model(x[:1]), want[:1], rtol=1e-3, atol=1e-4)  # no image depends on another
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), want)

    assert model.num_classes == 5
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    assert small(name, num_classes=0).eval()(x).shape == pooled.shape


@every
def test_intermediates_and_features(name):
    model, x = small(name).eval(), images()
    info = model.feature_info
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(maps) == len(info)
    for y, level in zip(maps, info, strict=True):
        grid = tuple(-(-side // level["reduction"]) for side in SIZE)
        assert tuple(y.shape) == (2, level["num_chs"], *grid)
    last = len(info) - 1
    for indices, expected in ((1, [last]), ([0], [0]), ([0, -1], [0, last]), (None, range(last + 1))):
        got = model.forward_intermediates(x, indices=indices, intermediates_only=True, stop_early=True)
        assert all(torch.equal(y, maps[i]) for y, i in zip(got, expected, strict=True))
    tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(t, y.flatten(2).mT) for t, y in zip(tokens, maps, strict=True))
    normed = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    assert torch.equal(normed[0], maps[-1]) == isinstance(model.norm, torch.nn.Identity)  # fc_norm then
    with pytest.raises((ValueError, AssertionError), match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")

    features = small(name, features_only=True, out_indices=(0, -1)).eval()
    assert features.feature_info.channels() == [info[0]["num_chs"], info[last]["num_chs"]]
    assert features.feature_info.reduction() == [info[0]["reduction"], info[last]["reduction"]]
    got = features(x)
    assert [y.shape for y in got] == [maps[0].shape, maps[-1].shape]
    model.prune_intermediate_layers([0])
    assert len(getattr(model, "stages", None) or model.blocks) == 1
    (pruned,) = model.forward_intermediates(x, [0], intermediates_only=True)
    assert torch.equal(pruned, maps[0])


@every
def test_training(name):
    model, x = small(name), images()
    want = model.train()(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    loss = model(x).square().sum()
    loss.backward()
    mixers = model.mixers()
    unused = {f"{k}.{p}" for k, layer in mixers.items() for p in layer.unused}
    # Raw kernels of AFT-conv get no gradient while their spread, gamma, is 0.
    unused |= {f"{k}.w" for k in mixers}
    for key, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, key
            assert p.grad.isfinite().all(), key
            assert p.grad.any() or key in unused, key
        else:
            assert key == "pos_embed" or key in unused, key
    names = {key for key, _ in model.named_parameters()}
    own = {f"{k}.{p}" for k, layer in mixers.items() for p in layer.no_weight_decay()}
    assert own <= names & model.no_weight_decay()
    assert set(model.group_matcher(coarse=True)) >= {"stem", "blocks"}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) > 2
    trained = sum(p.requires_grad for p in model.parameters())
    assert sum(len(group["params"]) for group in groups) == trained
    assert sum(len(g["params"]) for g in param_groups_weight_decay(model, 0.1)) == trained


@every
def test_construction(name):
    rates = {"drop_rate": 0.5, "drop_path_rate": 0.5, "proj_drop_rate": 0.5}
    model, x = small(name, **rates).train(), images()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    for channels in (1, 4):
        assert small(name, in_chans=channels).eval()(images(channels)).shape == (2, 5)
    assert small(name, dtype=torch.float64)(images().double()).dtype == torch.float64
    with torch.device("meta"):
        model = small(name, num_classes=1000)
    assert all(p.is_meta for p in model.parameters())
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["crop_pct"] in (0.875, 0.9, 1.0)
    assert not cfg["fixed_input_size"]
    assert cfg["num_classes"] == len(state[f"{cfg['classifier']}.weight"]) == 1000
    first = cfg.get("first_conv")
    assert state[f"{first}.weight"].shape[1] == 3 if first else "eamlp" in name or "t2t" in name


@every
def test_any_image_size(name):
    model = small(name).eval()
    least = 32 if name.startswith("soft") else 3 if "cvt" in name or "eamlp" in name or "t2t" in name else 1
    for size in (SIZE, (50, 33), (least, least), (96, 35)):
        assert model(images(size=size)).shape == (2, 5)
    if isinstance(model, models.ViT):
        x = images(size=(32, 80))
        want = model(x)
        model.set_input_size((32, 80))
        torch.testing.assert_close(model(x), want)
