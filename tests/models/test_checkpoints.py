"""What load_published and `sansmax convert` take, refuse and leave as it was."""

import argparse
import collections

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import sansmax
from sansmax import cli
from sansmax.models import load_published


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


def small(**words):
    own = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("sima_nano_12_p16", **own, **words)


def same(state, other):
    return all(torch.equal(state[key], other[key]) for key in state)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"_orig_mod." + key: value for key, value in state.items()},
        lambda state: {"module._orig_mod." + key: value for key, value in state.items()},
        lambda state: {"state_dict": {"model": {"_orig_mod.module." + k: v for k, v in state.items()}}},
        lambda state: {"model_ema": state},
        lambda state: {k: v[None] if v.ndim else v.reshape(1) for k, v in state.items()},
        lambda state: {k: v.squeeze() for k, v in state.items()},
    ],
)
def test_wrapped_states(wrap):
    source, model = small(), small()
    load_published(model, wrap(source.state_dict()))
    assert same(source.state_dict(), model.state_dict())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_networks(wrap):
    source, model = small(), small()
    wrapped = wrap(model)
    assert load_published(wrapped, source.state_dict()) is wrapped
    assert same(source.state_dict(), model.state_dict())


def test_a_state_that_shares_the_networks_memory():
    model = small()
    before, state = snapshot(model), {}
    for key, value in model.state_dict().items():
        other = (
            key.replace("blocks.0", "blocks.1") if "blocks.0" in key else key.replace("blocks.1", "blocks.0")
        )
        state[other if key.startswith("blocks.") else key] = value
    load_published(model, state)
    now = model.state_dict()
    assert torch.equal(now["blocks.0.attn.qkv.weight"], before["blocks.1.attn.qkv.weight"])
    assert torch.equal(now["blocks.1.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.Tensor.char, r"1 of another dtype \(norm.weight torch.int8 for torch.float32\)"),
        (lambda t: t + 0j, r"1 of another dtype \(norm.weight torch.complex64"),
        (torch.Tensor.to_sparse, r"other things under 1 of 111 keys \(norm.weight\)"),
        (lambda t: t.to("meta"), r"1 without content \(norm.weight\)"),
    ],
)
def test_tensors_that_are_no_weights(make, message):
    model, state = small(), small().state_dict()
    before = snapshot(model)
    state["norm.weight"] = make(state["norm.weight"])
    with pytest.raises(ValueError, match=message):
        load_published(model, state)
    assert same(before, model.state_dict())


def test_a_network_without_memory_is_refused():
    state = small().state_dict()
    with pytest.raises(ValueError, match="got one on the meta device"):
        load_published(small().to("meta"), state)


@pytest.mark.parametrize(("content", "got"), [({}, "nothing"), ({1: torch.zeros(1)}, "other things under 1")])
def test_no_state_dict(content, got):
    with pytest.raises(ValueError, match=f"expected a state dict of tensors in the dict.* got {got}"):
        load_published(small(), content)


def test_files_that_are_none(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match=r"got UnpicklingError: Unsupported operand 60; the file may be cut"):
        load_published(small(), path)
    torch.save({"model": small().state_dict(), "log": collections.defaultdict(list)}, path)
    with pytest.raises(ValueError, match=r"got collections\.defaultdict too, which torch's weights_only"):
        load_published(small(), path)
    for name in ("~nobody-here/x.pth", "x" * 5000):
        with pytest.raises(FileNotFoundError, match="expected a file at"):
            load_published(small(), name)
    source, model = small(), small()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "X.SAFETENSORS")
    load_published(model, tmp_path / "X.SAFETENSORS")
    assert same(source.state_dict(), model.state_dict())
    monkeypatch.setattr("os.access", lambda *_: False)  # root may read everything
    with pytest.raises(PermissionError, match="expected to be allowed to read"):
        load_published(small(), tmp_path / "X.SAFETENSORS")


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def test_no_weights_are_hosted():
    with pytest.raises(ValueError, match=r"pretrained must be False .* sansmax.load_published"):
        timm.create_model("sima_nano_12_p16", pretrained=True)
    assert sansmax.load_published is load_published


def test_convert(tmp_path, capsys):
    source = timm.create_model("sima_nano_12_p16", num_classes=3)
    state = {k.replace("pos_embed.", "pos_embeder."): v for k, v in source.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    arguments = ["convert", str(tmp_path / "in.pth"), str(out), "--model"]
    assert cli.main([*arguments, "sima_nano_12_p16"]) == 0
    assert "sima_nano_12_p16, 371 tensors" in capsys.readouterr().out
    twin = timm.create_model("sima_nano_12_p16", num_classes=3, checkpoint_path=str(out)).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(twin(x), source.eval()(x))
    written = out.read_bytes()

    for model, message in (
        ("sima_tiny_12_p16", "of another shape (cls_token (1, 1, 128) for (1, 1, 192)"),
        ("xvit_u_p16", "unexpected"),
        ("sima_nano_12_p61", "did you mean 'sima_nano_12_p16'?"),
    ):
        assert cli.main([*arguments, model]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert out.read_bytes() == written
    assert cli.main([*arguments[:2], str(tmp_path / "out.pth"), "--model", "sima_nano_12_p16"]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]


def test_convert_takes_the_classes_from_the_file(tmp_path, capsys):
    torch.save({"net": timm.create_model("eanet_resnet50", num_classes=5).state_dict()}, tmp_path / "in.pth")
    arguments = ["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors"), "--model"]
    assert cli.main([*arguments, "eanet_resnet50"]) == 0
    assert "5 classes" in capsys.readouterr().out
    timm.create_model("eanet_resnet50", num_classes=5, checkpoint_path=arguments[2])
    assert cli.main([*arguments, "pct_cls", "--img-size", "64", "64"]) == 2
    assert "img_size: expected none because pct_cls takes no images" in capsys.readouterr().err


def test_convert_on_a_full_disk_leaves_what_was_there(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(timm.create_model("sima_nano_12_p16").state_dict(), source)
    out.write_bytes(b"older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        assert cli.main(["convert", str(source), str(out), "--model", "sima_nano_12_p16"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "got 'File too large'" in err
    assert "--out" not in err
    assert out.read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 2
