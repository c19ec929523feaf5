"""SimA: the published outputs, one head, nano networks that train."""

import pytest
import timm
import torch

from sansmax.models import load_published
from sansmax.models._xcit import DoubleFourierPositions


def test_one_head():
    """The paper's single-head form, in both attentions."""
    model = timm.create_model("sima_nano_12_p16", num_heads=1, depth=1)
    assert model.blocks[0].attn.num_heads == model.cls_attn_blocks[0].attn.num_heads == 1


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
    double = timm.create_model(case.config["factory"], num_classes=classes, pos_dtype=torch.float64).double()
    load_published(double.eval(), state)
    with torch.inference_mode():
        assert error(double(x), case.outputs["logits_pos64"]) < 1e-11


def test_nano_trains():
    """The published nano networks write in place into what the backward pass needs."""
    model = timm.create_model("sima_nano_12_p16", img_size=32, num_classes=3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_fourier_positions_in_double(golden, error):
    case = golden("sima/pos_fourier")
    positions = DoubleFourierPositions(hidden_dim=32, dim=48).double()
    positions.load_state_dict(case.state_dict())
    assert error(positions(2, 5, 7), case.outputs["out_pos64"]) < 1e-14
    with pytest.raises(ValueError, match=r"pos_dtype must be torch.float32 or.*got torch.float16"):
        timm.create_model("sima_nano_12_p16", pos_dtype=torch.float16)
