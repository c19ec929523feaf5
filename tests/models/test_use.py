"""Networks as users of timm handle them: compiled, exported, drawn anew, made with unusual words."""

import copy
import pickle

import pytest
import timm
import torch
from torch.export import Dim, export

import sansmax
from sansmax import layers

SIZE = (64, 64)
BLOCKS = {"embed_dim": 32, "depth": 1, "num_heads": 4}
STAGES = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
# One network of every trunk: name, mechanism, words.
TRUNKS = {
    "vit": ("sima_deit_tiny_p16", None, BLOCKS),
    "xcit": ("sima_nano_12_p16", None, BLOCKS),
    "xvit": ("xvit_u_p16", None, {**BLOCKS, "attn_dim": 16}),
    "cvt": ("sima_cvt_13", None, {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": 2}),
    "pyramid": ("soft_tiny", "sima", STAGES),
    "t2t": ("eamlp_7", None, BLOCKS),
    "four scales": ("vit_tiny_p16_pyramid", "xnorm", BLOCKS),
}
every = pytest.mark.parametrize("trunk", TRUNKS)
graphs = pytest.mark.parametrize("trunk", ["vit", "xcit", "cvt", "pyramid", "t2t"])
# Any batch and width: with the height too, symbols take four times as long.
ANY = ({0: Dim.AUTO, 3: Dim.AUTO},)


def make(trunk, **words):
    name, mechanism, own = TRUNKS[trunk]
    torch.manual_seed(0)
    return sansmax.create_model(name, mechanism, **{**own, "num_classes": 5, "img_size": SIZE, **words})


def images(batch, *size):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@graphs
def test_one_graph(trunk):
    torch._dynamo.reset()
    model, x = make(trunk).eval(), images(2, *SIZE)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@graphs
def test_exports_for_any_batch_and_size(trunk):
    """Traced at another size than img_size's, and run at that size and on both sides of the traced one."""
    model = make(trunk).eval()
    program = export(model, (images(2, 64, 112),), dynamic_shapes=ANY).module()
    for batch, width in ((1, 64), (3, 80), (2, 192)):
        x = images(batch, 64, width)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


class Image(torch.nn.Module):
    """A layer on the pixels of an image."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(2).mT, grid=(x.shape[2], x.shape[3]))


def on_image(mechanism, **words):
    torch.manual_seed(0)
    layer = layers.mechanism(mechanism)(16, 2, **words)
    layer.set_input((4, 4))
    return Image(layer).eval()


def test_a_layer_on_a_grid_compiles_for_all_grids():
    torch._dynamo.reset()
    layer = on_image("aft_full")
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((4, 6), (6, 8)):
            x = torch.randn(2, 16, *size)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mechanism", ["aft_conv", "soft"])
def test_layers_export_for_one_image_and_run_with_gradients_on(mechanism):
    layer = on_image(mechanism, **({"landmarks": 4} if mechanism == "soft" else {"kernel_size": 3}))
    if mechanism == "aft_conv":
        layer.requires_grad_(False)  # torch.cond warns of gradients
    program = export(layer, (torch.randn(2, 16, 4, 6),), dynamic_shapes=({0: Dim("batch", min=1)},)).module()
    for batch in (1, 3):
        x = torch.randn(batch, 16, 4, 6)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)


def test_sima_exports_for_lengths_at_which_another_order_is_cheaper():
    class Op(torch.nn.Module):
        def forward(self, x):
            return sansmax.sima(x, x, x)

    program = export(Op(), (torch.randn(2, 1, 50, 16),), dynamic_shapes=({2: Dim("tokens")},)).module()
    for tokens in (4, 200):
        x = torch.randn(2, 1, tokens, 16)
        torch.testing.assert_close(program(x), sansmax.sima(x, x, x))


def test_a_table_of_positions_exports_for_its_own_grid_too():
    layer = on_image("aft_full")
    program = export(layer, (torch.randn(2, 16, 4, 7),), dynamic_shapes=ANY).module()
    for width in (3, 4, 8):
        x = torch.randn(2, 16, 4, width)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)


@every
def test_features_alone_train_all_their_parameters(trunk):
    if trunk == "xcit":
        model = sansmax.create_model(
            "xcit", "sima", features_only=True, out_indices=[-1], img_size=SIZE, **BLOCKS
        )
    else:
        model = make(trunk, features_only=True, out_indices=[-1])
    maps = model.train()(images(2, *SIZE))
    assert [y.shape[1] for y in maps] == model.feature_info.channels()
    sum(y.square().mean() for y in maps).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # for DDP
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(images(1, *SIZE))


def spreads(model):
    return {k: p.detach().std().item() for k, p in model.named_parameters() if p.numel() > 500}


@pytest.mark.parametrize("name", ["eamlp_7", "t2t_ea_14", "aft_full_tiny_p16", "sima_deit_tiny_p16"])
def test_a_network_from_the_meta_device_is_drawn_as_published(name):
    words = {**BLOCKS, "num_classes": 5, "img_size": SIZE}
    model = timm.create_model(name, device="meta", **words).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert spreads(model) == pytest.approx(spreads(timm.create_model(name, **words)), rel=0.3)
    assert model(images(1, *SIZE)).isfinite().all()


@pytest.mark.parametrize("trunk", ["cvt", "pyramid"])
def test_unknown_pooling_is_refused(trunk):
    with pytest.raises(ValueError, match=r"global_pool must be 'token', 'avg' or '' \(none\), got 'max'"):
        make(trunk, global_pool="max")
    model = make(trunk)
    with pytest.raises(ValueError, match="got 'map'; use 'token'"):
        model.reset_classifier(3, "map")
    assert (model.num_classes, model.global_pool) == (5, "token")


def test_xvit_has_no_attention_map_to_drop_from():
    with pytest.raises(ValueError, match="attn_drop_rate must be 0 because 'xnorm'"):
        make("xvit", attn_drop_rate=0.1)
    name, _, words = TRUNKS["xvit"]
    model, x = sansmax.create_model(name, "external", attn_drop_rate=0.5, **words), images(2, *SIZE)
    assert not torch.equal(model(x), model(x))


def test_one_number_of_heads_for_the_pyramid():
    model = sansmax.create_model("pyramid", "sima", **{**STAGES, "num_heads": 1})
    assert {layer.num_heads for layer in model.mixers().values()} == {1}


def test_no_image_is_refused_for_its_number():
    with pytest.raises(ValueError, match=r"got \(0, 256, 16\); every size must be at least 1"):
        make("pyramid")(torch.zeros(0, 3, *SIZE))


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "vit_small_patch16_224", "xcit_small_12_p16_224"])
def test_softmax_twins_are_timms_to_the_bit(name):
    words = {"depth": 1, "img_size": 64}
    ours, theirs = sansmax.create_model(name, **words).eval(), timm.create_model(name, **words).eval()
    theirs.load_state_dict(ours.state_dict())
    x = images(2, *SIZE)
    assert torch.equal(ours(x), theirs(x))
