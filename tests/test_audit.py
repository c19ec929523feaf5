"""Each defect of public implementations is caught by the check that is for it; the same without it passes."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import audited
import sansmax
from sansmax import cli, layers
from sansmax.audit import checks

FILE = Path(audited.__file__)
DIM, TOKENS = 20, 13
SLOW = ("compiles", "exports")
QUICK = [name for name in checks() if name not in (*SLOW, "precision")]


def verdicts(factory, only=QUICK, **words):
    init = words.pop("init", {})
    width = {"d_model": DIM} if factory is audited.External else {"dim": DIM}
    found = sansmax.audit(factory, init=width | init, only=only, tokens=TOKENS, **words)
    return {verdict.name: verdict for verdict in found}


def failed(found):
    return {name for name, verdict in found.items() if verdict.passed is False}


DEFECTS = {
    "sima over the channels": (audited.SimA, {"defect": "axis"}, {}, "sima", {"equation", "token_scale"}),
    "sima's map written out": (audited.SimA, {"defect": "quadratic"}, {}, "sima", {"cost"}),
    "heads mixed with tokens": (
        audited.SimA,
        {"defect": "heads into tokens"},
        {},
        "sima",
        {"equation", "permutation", "padding", "token_scale"},
    ),
    "mask not used": (audited.SimA, {"defect": "mask unused"}, {}, "sima", {"padding"}),
    "attribute changed": (audited.SimA, {"defect": "counts"}, {}, "sima", {"purity"}),
    "dropout in evaluation": (
        audited.SimA,
        {"defect": "dropout"},
        {},
        None,
        {"batch", "determinism", "permutation", "padding", "strides"},
    ),
    "view of a view": (audited.SimA, {"defect": "view"}, {}, "sima", {"strides"}),
    "no use of a parameter": (audited.SimA, {"defect": "parameter without use"}, {}, None, {"gradients"}),
    "causal with sums over all tokens": (
        audited.SimA,
        {"defect": "future", "causal": True},
        {"causal": True},
        "sima",
        {"causality", "equation"},
    ),
    "external softmax over the memory": (
        audited.External,
        {"axis": 2},
        {"axis": 1},
        "external",
        {"equation"},
    ),
    "parameter rebuilt in forward": (audited.AFT, {"rebuilt": True}, {}, "aft_full", {"gradients", "purity"}),
    "fixed number of tokens": (
        audited.AFT,
        {"fixed": True, "max_tokens": TOKENS},
        {"max_tokens": 4 * TOKENS},
        "aft_full",
        {"lengths"},
    ),
    "one maximum of the batch": (audited.AFT, {"maximum": "batch"}, {}, "aft_full", {"batch"}),
    "newton's step of the batch": (audited.SOFT, {"whole_batch": True}, {}, None, {"batch"}),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_caught_by_its_check_and_the_twin_passes(name):
    factory, wrong, right, mechanism, caught = DEFECTS[name]
    found = verdicts(factory, init=wrong, mechanism=mechanism)
    assert failed(found) == caught, {n: found[n].reason for n in failed(found) ^ caught}
    assert all(found[check].reason for check in caught)
    twin = verdicts(factory, init=right, mechanism=mechanism)
    assert failed(twin) == set(), {n: twin[n] for n in failed(twin)}
    assert all(twin[check].passed for check in caught)


PRECISION = {
    "sums and eps in float16": (audited.SimA, {"defect": "half sums"}, {}, "float16, zero: 100% NaN"),
    "one maximum of the batch": (audited.AFT, {"maximum": "batch"}, {}, "float32, large"),
    "no maximum": (audited.AFT, {"maximum": "none"}, {}, "float32, large"),
}


@pytest.mark.parametrize("name", PRECISION)
def test_precision(name):
    factory, wrong, right, told = PRECISION[name]
    found = verdicts(factory, ["precision"], init=wrong)["precision"]
    assert found.passed is False
    assert told in found.reason
    found = verdicts(factory, ["precision"], init=right)["precision"]
    kinds = {key.partition(",")[0] for key in found.numbers} - {"many"}
    assert kinds == {"float32", "float16", "bfloat16"}
    assert not [key for key in found.numbers if key.startswith("float32") and key in found.reason]
    if factory is audited.SimA:
        assert found.passed, found.reason
        assert found.numbers["many"] == 4096


SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"max_tokens": 4 * TOKENS},
    "aft_local": {"max_tokens": 4 * TOKENS, "window": 4},
    "external_multihead": {"coef": 2, "memory": 7},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}


@pytest.mark.parametrize("name", layers.mechanisms())
def test_our_layers_pass_every_check_that_applies(name):
    words = SMALL.get(name, {})
    init = {"num_heads": 4, "qkv_bias": True, **words}
    only = [*QUICK, "precision"]
    found = verdicts(layers.mechanism(name), only, init=init, mechanism=name, reference=words)
    assert failed(found) == set(), {n: found[n] for n in failed(found)}
    traits = layers.mechanism(name).traits
    unjudged = {n for n, verdict in found.items() if verdict.passed is None}
    ordered = {"permutation", "token_scale"} if traits.needs else set()
    assert unjudged == ordered | (set() if traits.causal and name != "aft_conv" else {"causality"})
    assert found["equation"].numbers["error"] < 1e-9


@pytest.mark.parametrize("name", ["torch", "timm"])
def test_softmax_attention_of_others_passes(name):
    from timm.models.vision_transformer import Attention

    factory, init = (
        (nn.MultiheadAttention, {"embed_dim": DIM, "num_heads": 4})
        if name == "torch"
        else (Attention, {"dim": DIM, "num_heads": 4, "qkv_bias": True})
    )
    found = sansmax.audit(factory, init=init, tokens=TOKENS, mechanism="softmax", only=QUICK)
    assert all(v.passed for v in found), [v for v in found if not v.passed]
    numbers = {v.name: v.numbers for v in found}
    assert numbers["equation"]["error"] < 1e-12
    told = {
        "torch": "key_padding_mask (B, N), True = drop",
        "timm": "attn_mask (B, 1, 1, N), True = keep",
    }
    assert numbers["padding"]["mask"] == told[name]
    assert numbers["token_scale"]["ratio"] == pytest.approx(1, abs=1e-9)
    assert numbers["cost"]["flops_growth"] > 1.5


@pytest.mark.slow
def test_graphs():
    wrong = verdicts(audited.SimA, SLOW, init={"defect": "graph break"})
    assert failed(wrong) == set(SLOW)
    right = verdicts(audited.SimA, SLOW)
    assert all(v.passed for v in right.values()), right
    assert len(right["compiles"].numbers["errors"]) == 2
    assert right["exports"].numbers["any_length"]
    fixed = verdicts(audited.AFT, SLOW, init={"fixed": True, "max_tokens": TOKENS})
    assert all(f"at {TOKENS} tokens alone" in v.reason for v in fixed.values())


def test_a_mask_of_the_other_polarity_is_told_and_a_flag_overrides():
    found = verdicts(audited.SimA, ["padding"])["padding"]
    assert found.passed
    assert found.numbers["mask"] == "mask (B, N), True = keep"
    assert found.numbers["unpadded"] < 1e-12
    found = verdicts(audited.SimA, ["padding"], init={"defect": "drops"})["padding"]
    assert found.passed
    assert found.numbers["mask"] == "mask (B, N), True = drop"
    assert verdicts(audited.SimA, ["padding"], mask="drop")["padding"].passed is False


def test_a_rebuilt_parameter_is_named():
    found = verdicts(audited.AFT, ["gradients"], init={"rebuilt": True})["gradients"]
    assert found.numbers["rebuilt"] == ["wbias"]
    assert "forward replaces the parameter" in found.reason
    assert verdicts(audited.AFT, ["gradients"])["gradients"].numbers["rebuilt"] == []


def test_causality_names_the_token_and_the_place():
    init = {"causal": True, "defect": "future"}
    found = verdicts(audited.SimA, ["causality"], init=init)["causality"]
    assert found.numbers["change"] > 0.1
    assert found.numbers["output"] < found.numbers["token"]
    unclaimed = verdicts(audited.SimA, ["causality"])["causality"]
    assert unclaimed.passed is None
    assert verdicts(audited.SimA, ["causality"], causal=True)["causality"].passed is False


def test_the_size_of_the_output_by_the_number_of_tokens():
    found = verdicts(audited.SimA, ["token_scale"])["token_scale"]
    assert (found.passed, found.numbers["ratio"]) == (None, pytest.approx(1 / 4))
    found = verdicts(audited.External, ["token_scale"])["token_scale"]
    assert found.numbers["ratio"] == pytest.approx(1)


def test_what_cannot_be_mapped_is_not_checked_and_says_why():
    for mechanism, factory, missing in (
        ("xnorm", audited.External, "mk.weight has no counterpart"),
        ("aft_local", audited.AFT, "window is not known; give it as JSON with --reference"),
        ("sima", audited.AFT, "wbias has no counterpart"),
    ):
        found = verdicts(factory, ["equation"], mechanism=mechanism)["equation"]
        assert found.passed is None
        assert missing in found.reason
    words = {"reference": {"window": 0}, "mechanism": "aft_local"}
    assert verdicts(audited.AFT, ["equation"], **words)["equation"].passed is False
    found = verdicts(audited.SimA, ["equation"])["equation"]
    assert (found.passed, found.reason) == (None, "not checked: no --mechanism")


def test_layouts_give_the_same_answers():
    images = sansmax.audit(audited.Images, init={"in_channels": DIM}, layout="bchw", tokens=15, only=QUICK)
    assert not [v for v in images if v.passed is False]
    sequence = nn.MultiheadAttention(DIM, 4)
    batch = nn.MultiheadAttention(DIM, 4, batch_first=True)
    for module in (sequence, batch):
        found = sansmax.audit(module, tokens=TOKENS, mechanism="softmax", only=["batch", "equation"])
        assert all(v.passed for v in found)
    swapped = sansmax.audit(sequence, tokens=TOKENS, layout="bnc", only=["batch"])
    assert swapped[0].passed is False
    init = {"dim": DIM, "heads": 4}
    found = sansmax.audit(audited.Products, init=init, layout="bhnd", tokens=TOKENS, only=QUICK)
    assert not [v for v in found if v.passed is False]
    assert {v.name for v in found if v.passed} >= {"batch", "causality", "permutation", "lengths", "strides"}


def test_a_built_module_tells_its_own_heads():
    for module, mechanism in (
        (layers.SimA(DIM, 5), "sima"),
        (layers.AFTLocal(DIM, 5, window=3), "aft_local"),
    ):
        words = {"tokens": TOKENS, "mechanism": mechanism, "only": ["equation", "causality"]}
        causality, equation = sansmax.audit(module, **words)
        assert causality.passed
        assert equation.passed, equation
    words["mechanism"] = "sima"
    assert sansmax.audit(layers.SimA(DIM, 5), **words)[1].numbers["heads"] == 5


def test_the_module_itself_stays():
    module = audited.SimA(DIM)
    before = {key: t.clone() for key, t in module.state_dict().items()}
    state = torch.get_rng_state()
    sansmax.audit(module, dim=DIM, only=["gradients", "precision"], tokens=TOKENS)
    assert all(torch.equal(t, before[key]) for key, t in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())


def audit_command(*arguments):
    return cli.main(["audit", *arguments])


def test_the_command_prints_writes_and_exits(tmp_path, capsys):
    init = json.dumps({"dim": DIM, "defect": "axis"})
    out = tmp_path / "folder" / "audit.json"
    flags = ["--mechanism", "sima", "--tokens", str(TOKENS), "--only", "batch", "equation"]
    assert audit_command(f"{FILE}:SimA", "--init", init, *flags, "--out", str(out)) == 1
    printed = capsys.readouterr().out
    assert "not the equation of sima" in printed
    assert "1 passed, 1 failed, 0 not judged" in printed
    record = json.loads(out.read_text())
    assert [v["name"] for v in record["verdicts"]] == ["batch", "equation"]
    assert record["verdicts"][1]["numbers"]["error"] > 0.1
    assert record["settings"]["init"] == {"dim": DIM, "defect": "axis"}
    assert audit_command(f"{FILE}:SimA", "--init", json.dumps({"dim": DIM}), *flags) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no_such_package:SimA"], "expected no_such_package to be importable, got ModuleNotFoundError"),
        (["no/such.py:SimA"], "expected a file at no/such.py, got nothing"),
        (["torch.nn"], "expected module:Class"),
        ([f"{FILE}:SimB"], "which it does not have; it has AFT, External"),
        ([f"{FILE}:Plain"], "expected a subclass of torch.nn.Module"),
        ([f"{FILE}:not_a_module", "--init", '{"dim": 3}'], "to make a torch.nn.Module, got a int"),
        ([f"{FILE}:SimA", "--init", '{"width": 20}'], "expected words that SimA(dim, num_heads=4"),
        ([f"{FILE}:SimA", "--init", "dim=20"], "init: expected a JSON object, got 'dim=20'"),
        ([f"{FILE}:NeedsNeighbours", "--init", '{"dim": 20}'], "also needs neighbours, radius"),
        ([f"{FILE}:SimA", "--init", '{"dim": 20}', "--dim", "21"], "to take (3, 49, 21) (layout bnc)"),
        ([f"{FILE}:SimA", "--init", '{"dim": 20}', "--only", "batches"], "did you mean 'batch'?"),
        ([f"{FILE}:SimA", "--init", '{"dim": 20}', "--mechanism", "sina"], "did you mean 'sima'?"),
        ([f"{FILE}:SimA", "--init", '{"dim": 20}', "--tokens", "2"], "tokens: expected at least 3"),
        (
            [f"{FILE}:SimA", "--init", '{"dim": 20}', "--out", "a.txt"],
            "out: expected a file that ends in .json",
        ),
        ([f"{FILE}:SimA", "--init", '{"dim": 20}', "--only", "equation"], "expected a check that applies"),
        (["torch.nn:ReLU"], "dim: expected the input's width under a usual name"),
    ],
)
def test_a_wrong_use_is_one_sentence_and_exit_code_2(arguments, told, capsys):
    assert audit_command(*arguments) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_the_package_is_also_the_function():
    import sansmax.audit as package

    assert callable(package)
    assert math.isfinite(
        package(audited.External, init={"d_model": DIM}, only=["batch"])[0].numbers["change"]
    )
