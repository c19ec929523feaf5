"""Exported networks: ONNX Runtime and the program give PyTorch's outputs, and what is told of them holds."""

import json
import os

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import sansmax
from sansmax import _find
from sansmax.export import _census, _runtime, export_model, images, point_clouds, softmax_twin
from sansmax.models._xcit import XCiT

MECHANISMS = _find.names("sansmax.layers")
# Traced with free sides; the others, to save time, with fixed ones.
FREE = ("aft_conv", "sima")
GATE = {"Exp", "Sigmoid"}
HAVE = {
    "aft_conv": GATE,
    "aft_full": GATE,
    "aft_local": GATE,
    "aft_simple": GATE,
    "external": {"Softmax"},
    "external_multihead": {"Softmax"},
    "sima": set(),
    "soft": {"Exp"},
    "soft_norm": {"Exp"},
    "softmax": {"Softmax"},
    "xnorm": set(),
}


def network(mechanism, **words):
    torch.manual_seed(0)
    own = {"embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 7, "img_size": (20, 28)}
    return sansmax.create_model("vit_mini", mechanism, **own | words).eval()


def ran(path, *inputs):
    """By a consumer who has the file alone."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {one.name: x.numpy() for one, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


def image(batch, height, width, seed=7):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "mechanism",
    [pytest.param(m, marks=pytest.mark.slow) if m in ("aft_full", "aft_local") else m for m in MECHANISMS],
)
def test_every_mechanism(mechanism, tmp_path, error):
    free = mechanism in FREE
    net = network(mechanism, dynamic_img_size=free)
    report = export_model(net, tmp_path / "out", format="onnx", img_size=[(20, 28)])
    assert report["free"] == (["batch", "height", "width"] if free else ["batch"])
    assert report["inputs"] == {"image": f"float32 (batch, 3, {'height, width' if free else '20, 28'})"}
    sizes = {(20, 28), (52, 92)} if free else {(20, 28)}
    assert {(row["batch"], *row["size"]) for row in report["differences"]} == {
        (batch, *size) for batch in (1, 3) for size in sizes
    }
    assert set(report["exponentials"]["ONNX"]) == HAVE[mechanism]
    assert sansmax.layers.mechanism(mechanism).traits.exp_free == (not HAVE[mechanism])
    # Neither a size nor a batch that anything was tried with.
    for x in (image(5, 24, 36), image(2, 40, 16)) if free else (image(5, 20, 28),):
        assert error(ran(tmp_path / "out/model.onnx", x)[0], net(x)) < 5e-6


def test_what_lies_in_the_folder(tmp_path, error):
    net = network("sima")
    about = {"name": "mine", "classes": ["a", "b"], "preprocessing": {"mean": [0.5]}}
    report = export_model(net, tmp_path / "out", img_size=[(20, 28)], about=about, opset=18)
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "model.onnx", "model.pt2", "report.json"]
    assert json.loads(json.dumps(report)) == json.loads((tmp_path / "out/report.json").read_text())
    assert report["free"] == ["batch"]
    assert {row["graph"] for row in report["differences"]} == {"ONNX", "torch.export"}
    x = image(4, 20, 28)
    assert error(torch.export.load(tmp_path / "out/model.pt2").module()(x), net(x)) < 1e-6
    card = (tmp_path / "out/README.md").read_text()
    for words in (
        "# mine",
        "1 SimA",
        "torch.export: no exponential, no softmax.",
        "| layer_norm | 3 |",
        "a, b",
    ):
        assert words in card
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    found = session.get_modelmeta().custom_metadata_map
    assert found["name"] == "mine"
    assert json.loads(found["classes"]) == ["a", "b"]
    assert json.loads(found["preprocessing"]) == {"mean": [0.5]}
    assert session.get_inputs()[0].shape == ["batch", 3, 20, 28]
    assert onnx.load(tmp_path / "out/model.onnx").opset_import[0].version == 18 == report["opset"]
    for path in (tmp_path / "out").iterdir():
        assert b"_vit.py" not in path.read_bytes(), "no file tells where the source lies"


def norms_away_from_identity(net):
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    for name, parameter in net.named_parameters():
        if "gamma" in name:
            nn.init.normal_(parameter, 0.5, 0.3, generator=generator)
    return net.eval()


def test_xcit_is_folded_and_has_no_exponential_with_sima_alone(tmp_path, error):
    words = {
        "img_size": 48,
        "patch_size": 16,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 3,
        "cls_attn_layers": 1,
    }
    words |= {"num_classes": 7, "eta": 0.5}
    torch.manual_seed(0)
    net = norms_away_from_identity(XCiT(mechanism="sima", **words))
    report = export_model(net, tmp_path / "out", format="onnx", img_size=[48], require_exp_free=True)
    assert report["free"] == ["batch", "height", "width"]
    assert report["operators"]["ONNX"]["BatchNormalization"] == 1  # behind an activation
    assert report["opset"] == 20
    x = image(2, 64, 80)
    assert error(ran(tmp_path / "out/model.onnx", x)[0], net(x)) < 1e-5


def test_exponentials_are_refused_where_none_is_wanted(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"require_exp_free: expected a graph without exponentials, got 1 scaled_dot_product_attention;",
    ):
        export_model(
            network("softmax"), tmp_path / "out", format="program", img_size=[(20, 28)], require_exp_free=True
        )
    assert not os.listdir(tmp_path)


def test_a_graph_that_differs_is_not_kept(tmp_path, monkeypatch):
    forward = _runtime.Session.forward
    monkeypatch.setattr(_runtime.Session, "forward", lambda self, *x: forward(self, *x) * (1 + 1e-4))
    with pytest.raises(
        ValueError, match=r"expected outputs of the ONNX graph within .* got 1\.\de-04 for a batch"
    ):
        export_model(images(nn.Conv2d(3, 2, 3), 3, (5, 7)), tmp_path / "out", format="onnx")
    assert not os.listdir(tmp_path)


class Counting(nn.Module):
    """Free by its shape, but of another network at other sizes."""

    def forward(self, x):
        return (
            x.mean((2, 3))
            if torch.compiler.is_exporting()
            else x.mean((2, 3)) * (1 + 1e-3 * (x.shape[2] - 5))
        )


def test_an_axis_that_is_free_by_its_shape_alone_is_fixed(tmp_path):
    report = export_model(images(Counting(), 3, (5, 7)), tmp_path / "out", format="program", optimize=False)
    assert report["free"] == ["batch"]
    assert report["inputs"] == {"image": "float32 (batch, 3, 5, 7)"}


class Branching(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"format": "onxx"}, r"format: expected onnx, program, both, got 'onxx'"),
        ({"opset": 12}, r"opset: expected 18 to 23, got 12; leave it out"),
        (
            {"img_size": [(20, 28), (24, 28)]},
            r"img_size: expected sizes that the network takes, got 24x28 \(.*\); leave",
        ),
        (
            {"model": Branching()},
            r"export: expected a network that torch.export can write down, got .*; choose",
        ),
        ({"model": nn.Flatten(), "img_size": ()}, r"img_size: expected a size, got none, and Flatten has no"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, sentence, tmp_path):
    words = {"model": network("sima"), "img_size": [(20, 28)], "optimize": False, "format": "program"} | words
    with pytest.raises(ValueError, match=sentence) as told:
        export_model(words.pop("model"), tmp_path / "out", **words)
    assert "\n" not in str(told.value)
    assert not os.listdir(tmp_path)


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"out: expected a new folder, got .* which exists; name another"
    ):
        export_model(network("sima"), tmp_path, img_size=[(20, 28)])
    assert os.listdir(tmp_path) == ["notes"]


def test_exponentials_are_those_of_the_standard():
    """Of the operators that ONNX defines by others, exactly those with an exponential inside."""
    found = set()
    for schema in onnx.defs.get_all_schemas():
        if schema.has_function and any(node.op_type == "Exp" for node in schema.function_body.node):
            found.add(schema.name)
    assert {"Softmax", "LogSoftmax"} & found or found
    assert found <= {name for name in found if _census.exponentials({name: 1})}
    assert not _census.exponentials({"Erf": 3, "Gelu": 1, "MatMul": 5, "Expand": 2, "expand": 1})
    assert _census.exponentials({"_softmax": 2, "exp_": 1, "scaled_dot_product_attention": 1, "sigmoid": 1})


def test_a_census_looks_into_branches_and_functions():
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Exp", ["x"], ["y"])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3])],
    )
    choice = onnx.helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    call = onnx.helper.make_node("own", ["z"], ["w"], domain="mine")
    own = onnx.helper.make_function(
        "mine",
        "own",
        ["a"],
        ["b"],
        [onnx.helper.make_node("Softmax", ["a"], ["b"])],
        [onnx.helper.make_opsetid("", 20)],
    )
    graph = onnx.helper.make_graph([choice, call], "graph", [], [])
    model = onnx.helper.make_model(graph, functions=[own])
    assert _census.of_onnx(model) == {"Exp": 2, "If": 1, "Softmax": 1}


def test_the_twin_is_the_same_network_with_softmax():
    net = XCiT(
        mechanism="sima", img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=3, num_classes=7
    )
    twin = softmax_twin(net.eval())
    assert [type(block.attn).__name__ for block in twin.blocks] == ["Softmax", "Softmax"]
    assert [type(block.attn).__name__ for block in net.blocks] == ["SimA", "SimA"]
    assert [block.attn.num_heads for block in twin.blocks] == [3, 3]
    assert twin(image(2, 32, 48)).shape == (2, 7)
    assert softmax_twin(network("softmax")) is None


@pytest.mark.slow
def test_point_clouds(tmp_path, error):
    words = {"embed_dim": 16, "num_features": 24, "head_dims": (14, 10), "num_classes": 5, "depth": 1}
    net = sansmax.create_model("pct_ea_cls", **words, num_samples=(5, 3), num_neighbors=4).eval()
    report = export_model(point_clouds(net, 3, 41), tmp_path / "out", format="onnx")
    assert report["free"] == ["batch", "points"]
    x = torch.randn(2, 29, 3, generator=torch.Generator().manual_seed(3))
    assert error(ran(tmp_path / "out/model.onnx", x)[0], net(x)) < 1e-5
