"""One step of a causal network as a graph: fifty tokens in a row give what the network gives."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from sansmax import layers
from sansmax.export import export_model
from sansmax.models import Decoder

CAUSAL = [name for name, layer in layers.mechanisms().items() if layer.traits.causal]
OPTIONS = {
    "aft_local": {"window": 5, "factor_dim": 3},
    "aft_conv": {"kernel_size": 4},
    "sima": {"token_scale": 16},
}
GROWING = {"aft_full", "softmax"}
TOKENS = 11


def decoder(mechanism, **words):
    torch.manual_seed(0)
    own = {"max_tokens": 60, "embed_dim": 12, "depth": 1, "num_heads": 2}
    net = Decoder(TOKENS, mechanism=mechanism, mechanism_args=OPTIONS.get(mechanism), **own | words)
    for parameter in net.parameters():  # the first logits of new weights hardly depend on the past
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def streamed(folder, tokens):
    """Logits (B, T, V) by a consumer who has the folder alone."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    batched = {one.name for one in session.get_inputs() if one.shape[:1] == ["batch"]}
    with np.load(folder / "start.npz") as start:
        state = {
            name: np.repeat(x, len(tokens), 0) if name in batched else x for name, x in dict(start).items()
        }
    names = [one.name for one in session.get_outputs()]
    logits = []
    for token in tokens.T:
        made = dict(zip(names, session.run(None, {"token": token, **state}), strict=True))
        logits.append(made.pop("logits"))
        state = {"state" + name.removeprefix("next"): x for name, x in made.items()}
    return torch.from_numpy(np.stack(logits, 1))


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_fifty_tokens(mechanism, tmp_path, error):
    net = decoder(mechanism)
    report = export_model(net, tmp_path / "out", format="onnx")
    assert report["free"] == (["batch", "past"] if mechanism in GROWING else ["batch"])
    assert [row["batch"] for row in report["differences"]] == [1, 3]
    assert report["exponentials"]["ONNX"].keys() <= {"Exp", "Sigmoid", "Softmax"}
    assert layers.mechanism(mechanism).traits.exp_free == (not report["exponentials"]["ONNX"])
    tokens = torch.randint(TOKENS, (2, 57), generator=torch.Generator().manual_seed(4))
    want = net(tokens).detach()
    assert error(streamed(tmp_path / "out", tokens.numpy()), want) < 2e-5
    assert want.std(1).min() > 0.02


def test_the_program_of_a_stream_and_its_card(tmp_path):
    report = export_model(decoder("softmax"), tmp_path / "out", format="program", latency=0.05)
    assert {row["graph"] for row in report["differences"]} == {"torch.export"}
    assert [row["batch"] for row in report["differences"]] == [1, 3]
    card = (tmp_path / "out/README.md").read_text()
    for words in (
        "One call is one token.",
        "at most 60 tokens",
        "over 50 tokens in a row",
        "`state_0_k` | float32 (batch, 2, past, 6)",
    ):
        assert words in card
    assert list(report["latency"][0]["milliseconds"]) == ["PyTorch"]
    assert json.loads((tmp_path / "out/report.json").read_text())["facts"] == {
        "tokens": TOKENS,
        "longest": 60,
    }


@pytest.mark.parametrize("window", [0, 1, 5, 41])
@pytest.mark.parametrize("factor_dim", [None, 3])
def test_a_state_of_one_shape_gives_the_same(window, factor_dim, error):
    torch.manual_seed(0)
    layer = layers.AFTLocal(6, 2, window=window, max_tokens=23, factor_dim=factor_dim).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 23, 6, dtype=torch.float64)
    want = layer(x, is_causal=True)
    state = layer.fixed_state(3)
    sizes = [t.shape for t in state]
    for t in range(23):
        y, state = layer.step(x[:, t], state)
        assert error(y, want[:, t]) < 1e-12
        assert [t.shape for t in state] == sizes
