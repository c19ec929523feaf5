"""Eight bits: which layers become int8, how large the file is, and what accuracy is left."""

import onnx
import pytest
import torch
import torch.nn.functional as F

import sansmax
from sansmax.export import Int8, Session, _int8, export_model
from sansmax.export import images as images_of
from sansmax.tasks._data import load_images


@pytest.fixture(scope="module")
def digits():
    """A network that has learned the digits for some seconds; held-out images and labels."""
    data = load_images("digits", 8)
    train, held_out = (x.float().sub(80) / 95 for x in (data.train_images, data.val_images))
    torch.manual_seed(0)
    words = {"patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    net = sansmax.create_model("vit_mini", "sima", img_size=8, in_chans=train.shape[1], **words)
    steps = 160
    optim = torch.optim.AdamW(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 1e-2, steps)
    for _ in range(steps):
        index = torch.randint(len(train), (128,))
        F.cross_entropy(net(train[index]), data.train_labels[index]).backward()
        optim.step()
        optim.zero_grad()
        schedule.step()
    return net.eval(), train, held_out, data.val_labels


def test_accuracy_stays(digits, tmp_path):
    net, train, images, labels = digits

    def evaluate(module):
        with torch.inference_mode():
            return {"top1": (module(images).argmax(1) == labels).float().mean().item()}

    int8 = Int8(train[:64].split(1), "minmax")
    report = export_model(
        images_of(net, 1, (8, 8)), tmp_path / "out", format="onnx", int8=int8, evaluate=evaluate, latency=0.05
    )
    before, graph, after = (
        report["accuracy"][name]["top1"] for name in ("PyTorch", "ONNX Runtime", "ONNX Runtime, int8")
    )
    assert before > 0.85
    assert graph == before
    assert after > before - 0.03
    # Patches, qkv, proj, fc1 and fc2 of two blocks, head.
    assert report["int8"]["quantized"] == 10
    assert report["int8"]["kept"] == {"products": 4, "sums": 4}
    assert report["bytes"]["model.int8.onnx"] < 0.75 * report["bytes"]["model.onnx"]
    model = onnx.load(tmp_path / "out/model.int8.onnx")
    weights = {x.name: x for x in model.graph.initializer if x.data_type == onnx.TensorProto.INT8}
    large = [onnx.numpy_helper.to_array(x) for x in weights.values() if x.dims and len(x.dims) >= 2]
    assert len(large) == 10
    assert all(abs(x.astype(int)).max() <= 64 for x in large)  # 7 bits
    assert any(
        x.dims and x.dims[0] == 72 for x in model.graph.initializer if "scale" in x.name
    )  # qkv's channels
    assert list(report["latency"][0]["milliseconds"]) == [
        "PyTorch",
        "ONNX Runtime",
        "ONNX Runtime, int8",
        "softmax, PyTorch",
        "softmax, ONNX Runtime",
    ]
    card = (tmp_path / "out/README.md").read_text()
    assert "10 layers in int8" in card
    assert "Softmax: this network with softmax attention over all tokens in place of SimA." in card


def small(tmp_path):
    torch.manual_seed(0)
    net = sansmax.create_model(
        "vit_mini", "sima", img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2
    )
    export_model(net, tmp_path / "out", format="onnx", img_size=[8])
    return tmp_path / "out/model.onnx", net


def test_what_is_kept_and_how_ranges_are_chosen(tmp_path):
    source, net = small(tmp_path)
    x = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    outputs, layers = {}, {}
    for method in _int8.METHODS:
        for keep in ((), ("products", "sums", "head")):
            target = tmp_path / "int8.onnx"
            told = _int8.quantize(source, target, Int8(x.split(2), method, keep))
            ops = [node.op_type for node in onnx.load(target).graph.node]
            layers[keep] = told["quantized"], ops.count("DequantizeLinear")
            outputs[method, keep] = Session(target)(x)
    everything, some = layers[()], layers["products", "sums", "head"]
    assert everything[0] == some[0] + 5  # two products, two sums, the head
    assert everything[1] > some[1]
    want = net(x).detach()
    for (method, keep), got in outputs.items():
        far = ((got - want).abs().max() / want.abs().max()).item()
        assert 1e-5 < far < (0.3 if method == "minmax" else 1.0), (method, keep, far)
    assert not torch.equal(outputs["minmax", ()], outputs["percentile", ()])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            {"calibration": []},
            r"calibration: expected inputs of the network, got none; give at least one batch",
        ),
        ({"method": "minmxa"}, r"unknown name 'minmxa' in methods: .* did you mean 'minmax'\?"),
        ({"keep": ("sum",)}, r"unknown name 'sum' in kinds of int8_keep: .* did you mean 'sums'\?"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        Int8(**{"calibration": [torch.zeros(1, 3, 8, 8)]} | words)


def test_int8_needs_the_onnx_graph(tmp_path):
    with pytest.raises(ValueError, match=r"int8: expected format onnx or both, got program"):
        export_model(
            torch.nn.Flatten(), tmp_path / "out", format="program", int8=Int8([torch.zeros(1, 3, 8, 8)])
        )
