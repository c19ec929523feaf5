"""The published networks by name: exact parameter counts, the authors' outputs, timm's interface."""

import argparse

import pytest
import timm
import torch

import sansmax
from sansmax.models import load_published

# Exact, from the published code.
PARAMETERS = {
    "sima_nano_12_p16": 3_053_176,
    "sima_tiny_12_p16": 6_716_224,
    "sima_small_12_p16": 26_253_208,
    "sima_tiny_24_p16": 12_116_800,
    "sima_small_24_p16": 47_671_192,
    "sima_medium_24_p16": 84_395_560,
    "sima_large_24_p16": 189_095_752,
    "sima_nano_12_p8": 3_048_968,
    "sima_tiny_12_p8": 6_706_456,
    "sima_small_12_p8": 26_212_936,
    "sima_tiny_24_p8": 12_107_032,
    "sima_small_24_p8": 47_630_920,
    "sima_medium_24_p8": 84_323_432,
    "sima_large_24_p8": 188_932_264,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    "case", ["sima_nano_12_p16", "sima_nano_12_p16_96x64", "sima_tiny_12_p16", "sima_tiny_12_p16_160"]
)
def test_sima_golden(golden, error, case):
    case = golden(f"sima/{case}")
    state = case.state_dict()
    classes = len(state["head.weight"])
    model = timm.create_model(case.config["factory"], num_classes=classes).eval()
    x = case.inputs()["x"]
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-9)):
        load_published(model.to(dtype), {"model": state})
        with torch.inference_mode():
            assert error(model(x.to(dtype)), case.outputs["logits"]) < tolerance


def test_nano_trains():
    """The published nano networks write in place into what the backward pass needs."""
    model = timm.create_model("sima_nano_12_p16", img_size=32, num_classes=3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_checkpoints_of_the_authors(tmp_path):
    words = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("sima_nano_12_p16", **words).eval()
    x = torch.randn(1, 3, 33, 47)
    want = model(x)
    path = tmp_path / "checkpoint.pth"
    state = {f"module.{k.replace('pos_embed.', 'pos_embeder.')}": v for k, v in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1)}, path)
    twin = timm.create_model("sima_nano_12_p16", **words).eval()
    assert torch.equal(load_published(twin, path)(x), want)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(load_published(twin, own)(x), want)

    before = {k: v.clone() for k, v in twin.state_dict().items()}
    del own["cls_token"], own["head.bias"]
    own["head.weight"] = torch.zeros(4, 32)
    own["extra"] = torch.zeros(1)
    with pytest.raises(
        ValueError,
        match=r"2 missing \(cls_token, head.bias\); 1 unexpected \(extra\); 1 of another shape "
        r"\(head.weight \(4, 32\) for \(3, 32\)\)",
    ):
        load_published(twin, own)
    assert all(torch.equal(before[k], v) for k, v in twin.state_dict().items())

    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"expected a readable checkpoint .* may be cut off"):
        load_published(twin, path)
    with pytest.raises(FileNotFoundError, match="expected a file"):
        load_published(twin, tmp_path / "none.pth")
    torch.save({"model": state, "callback": Evil()}, path)
    with pytest.raises(ValueError, match="weights_only reader refuses"):
        load_published(twin, path)
    assert not Evil.ran
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        load_published(twin, {"epoch": 3})


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def test_no_weights_are_hosted():
    with pytest.raises(ValueError, match=r"pretrained must be False .* sansmax.load_published"):
        timm.create_model("sima_nano_12_p16", pretrained=True)
    assert sansmax.load_published is load_published
