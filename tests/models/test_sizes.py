"""Parameters and multiply-adds of the published networks, and the page of them."""

from pathlib import Path

import pytest
import timm
import torch

from sansmax import models
from sansmax.bench.measure import count_flops
from sansmax.bench.networks import row

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
    "aft_full_tiny_p16": 6_322_600,
    "aft_full_small_p16": 22_655_848,
    "aft_conv_tiny_p16_k11_h32": 5_356_072,
    "aft_conv_tiny_p16_k11_h192": 5_962_792,
    "aft_conv_small_p16_k11_h16": 20_298_088,
    "aft_conv_small_p16_k11_h384": 22_541_416,
    "aft_conv_small_p16_k15_h384": 23_020_648,
}
# Millions, counted on the published code.
SOFT = {"tiny": 13.07, "small": 38.86, "small_24m": 24.11, "medium": 45.81, "large": 64.70, "huge": 87.11}
# Millions of parameters and 10^9 multiply-adds at 224 px, as printed.
XVIT = {
    "u": (5.72, 1.01),
    "tiny": (10.24, 1.89),
    "small": (20.81, 3.71),
    "medium": (37.53, 6.97),
    "base": (64.05, 11.93),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("size", XVIT)
def test_xvit_has_the_printed_size(size):
    parameters, multiply_adds = XVIT[size]
    for family in ("xvit", "vibid"):
        model = timm.create_model(f"{family}_{size}_p16")
        gammas = sum(p.numel() for k, p in model.named_parameters() if k.endswith("attn.gamma"))
        assert (gammas > 0) == (family == "xvit")
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    assert count_flops(model, torch.randn(1, 3, 224, 224)) / 2e9 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize("size", SOFT)
@pytest.mark.parametrize("mechanism", ["soft", "soft_norm"])
def test_soft_has_the_published_size(mechanism, size):
    with torch.device("meta"):
        model = timm.create_model(f"{mechanism}_{size}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == SOFT[size]


def test_the_table_of_networks_is_true():
    page = Path(__file__).parents[2] / "docs" / "networks.md"
    rows = {line.split("`")[1]: line for line in page.read_text().splitlines() if line.startswith("| `")}
    clouds = [name for name in models.networks() if name.startswith("pct")]
    assert list(rows) == [name for name in models.networks() if name not in clouds] + clouds
    for name in (
        "sima_nano_12_p16",
        "sima_cvt_13",
        "soft_tiny",
        "eamlp_7",
        "eanet_resnet50",
        "pct_cls",
        "pct_ea_partseg",
        "xvit_u_p16",
        "aft_full_tiny_p16",
        "aft_conv_tiny_p16_k11_h32",
    ):
        assert rows[name] == row(name), "write it anew: python -m sansmax.bench.networks > docs/networks.md"
    for name, parameters in PARAMETERS.items():
        assert f" {parameters:,} " in rows[name]
