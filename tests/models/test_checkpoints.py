"""What load_published and `sansmax convert` take, refuse and leave as it was."""

import argparse

import pytest
import timm
import torch

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
