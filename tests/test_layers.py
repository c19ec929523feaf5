"""Every layer against the contract (found by file name), and against the published modules."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sansmax
from sansmax import layers

MECHANISMS = layers.mechanisms()
CAUSAL = [name for name, layer in MECHANISMS.items() if layer.traits.causal]
# Small options, so that tables, memories and kernels differ in size from everything else.
SMALL = {
    "aft_conv": {"kernel_size": 3},
    "aft_full": {"factor_dim": 5},
    "aft_local": {"factor_dim": 5, "window": 4},
    "external": {"memory": 7},
    "external_multihead": {"coef": 2, "memory": 7},
    "soft": {"landmarks": 4},
    "soft_norm": {"landmarks": 4},
}
SEQUENCE = {"aft_conv": {"kernel_dims": 1}}  # options of the causal form
DIM, HEADS, GRID, PREFIX = 24, 3, (3, 5), 1
TOKENS = PREFIX + GRID[0] * GRID[1]

every = pytest.mark.parametrize("name", MECHANISMS)


def make(name, *, told=True, dtype=torch.float64, random=True, **options):
    """The layer with every parameter away from its initial value; `told` its grid."""
    torch.manual_seed(0)
    words = {"qkv_bias": True, **SMALL.get(name, {}), **options}
    layer = MECHANISMS[name](DIM, HEADS, **words).to(dtype)
    if told:
        layer.set_input(GRID, PREFIX)
    if random:
        for parameter in layer.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def tokens(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@every
def test_gradients_reach_every_parameter(name):
    layer = make(name)
    x = tokens(2, TOKENS, DIM).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    (y * tokens(*y.shape, seed=2)).sum().backward()
    assert x.grad.abs().min() > 0
    dead = [key for key, p in layer.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert dead == list(layer.unused)


@every
def test_masked_tokens_change_nothing_and_get_no_gradient(name):
    layer = make(name)
    keep = torch.ones(2, TOKENS, dtype=torch.bool)
    keep[0, [4, 11, 12]] = keep[1, [0, 7]] = False
    x = tokens(2, TOKENS, DIM)
    outputs = []
    for filling in (0.0, 1e30, float("nan")):
        layer.zero_grad()
        given = torch.where(keep[..., None], x, filling).requires_grad_()
        y = layer(given, mask=keep)
        assert y.isfinite().all()
        (y * tokens(*y.shape, seed=2)).sum().backward()
        assert (given.grad[~keep] == 0).all()
        assert given.grad[keep].abs().min() > 0
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        outputs.append(y[keep])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], layer(x)[keep])
    assert torch.equal(layer(x, attn_mask=keep[:, None, None])[keep], outputs[0])
    assert layer(x, mask=torch.zeros_like(keep)).isfinite().all()


@every
def test_an_output_never_depends_on_its_batch_mates(name):
    layer = make(name)
    x = tokens(3, TOKENS, DIM) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    together = layer(x)
    for i in range(3):
        torch.testing.assert_close(layer(x[i : i + 1])[0], together[i], rtol=1e-9, atol=1e-12)


@every
def test_one_token_and_any_square_number_of_tokens(name):
    layer = make(name, told=False)
    for n in (1, 2, 4, 10, 16):  # with and without a class token
        assert layer(tokens(2, n, DIM)).isfinite().all()


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_and_streaming(name):
    layer = make(name, told=False, **SEQUENCE.get(name, {}))
    x = tokens(2, 13, DIM)
    y = layer(x, is_causal=True)
    later = x.clone()
    later[:, 8:] = 300 * tokens(2, 5, DIM, seed=3)
    torch.testing.assert_close(layer(later, is_causal=True)[:, :8], y[:, :8], rtol=1e-9, atol=1e-12)
    assert (layer(later, is_causal=True)[:, 8:] - y[:, 8:]).abs().max() > 1e-3
    assert layer.traits.streaming
    state = layer.init_state(2)
    for t in range(13):
        out, state = layer.step(x[:, t], state)
        torch.testing.assert_close(out, y[:, t], rtol=1e-9, atol=1e-11)
        numbers = sum(part.numel() for part in flat(state) if isinstance(part, torch.Tensor)) // 2
        assert numbers <= layer.state_size(t + 1)
    assert numbers == layer.state_size(13)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 24\)"):
        layer.step(x, state)


def flat(state):
    return [leaf for part in state for leaf in flat(part)] if isinstance(state, tuple | list) else [state]


@every
def test_what_a_layer_cannot_do_is_refused_with_what_to_use(name):
    layer, x = make(name), tokens(2, TOKENS, DIM)
    if not layer.traits.causal:
        with pytest.raises(ValueError, match=r"is_causal must be False because .*; use "):
            layer(x, is_causal=True)
        for call in (
            lambda: layer.init_state(2),
            lambda: layer.step(x[:, 0], None),
            lambda: layer.state_size(3),
        ):
            with pytest.raises(ValueError, match="there is no streaming form; use "):
                call()
    if not layer.attention_map:
        with pytest.raises(ValueError, match=r"attn_drop must be 0 .* use proj_drop"):
            make(name, attn_drop=0.1)
    if name != "softmax":
        for wrong in (torch.ones(TOKENS, TOKENS, dtype=torch.bool), torch.zeros(2, 1, 1, TOKENS)):
            with pytest.raises(ValueError, match="attn_mask must be a bool key mask"):
                layer(x, attn_mask=wrong)
        with pytest.raises(ValueError, match="whether its first axis is the batch"):
            layer(tokens(TOKENS, TOKENS, DIM), attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool))
    with pytest.raises(TypeError, match="depth"):
        make(name, depth=3)
    if "heads" not in name and layer.num_heads > 1:
        with pytest.raises(ValueError, match="num_heads must divide"):
            MECHANISMS[name](DIM, 5)
    with pytest.raises(ValueError, match=r"x must have shape \(B, N, 24\), got \(2, 16, 23\)"):
        layer(x[..., 1:])
    with pytest.raises(TypeError, match="x must be floating point"):
        layer(x.long())
    with pytest.raises(ValueError, match="mask must have shape"):
        layer(x, mask=torch.ones(2, TOKENS + 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        layer(x, mask=torch.ones(2, TOKENS))
    with pytest.raises(ValueError, match="set_input needs grid"):
        layer.set_input((0, 3))


@every
def test_cross_attention(name):
    layer, x, context = make(name), tokens(2, TOKENS, DIM), tokens(2, 9, DIM, seed=4)
    if not layer.traits.cross:
        with pytest.raises(ValueError, match=r"context must be None because .*; use Softmax, SimA or XNorm"):
            layer(x, context=context)
        return
    y = layer(x, context=context)
    assert y.shape == x.shape
    torch.testing.assert_close(layer(x, context=x), layer(x), rtol=1e-9, atol=1e-12)
    # A context as long as x: its mask must not touch the queries.
    keep = torch.ones(2, TOKENS, dtype=torch.bool)
    keep[:, 9:] = False
    padded = torch.cat((context, torch.full((2, TOKENS - 9, DIM), float("nan"), dtype=x.dtype)), 1)
    torch.testing.assert_close(layer(x, context=padded, mask=keep), y, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="not defined with context"):
        layer(x, context=context, is_causal=True)
    with pytest.raises(ValueError, match="context must have shape"):
        layer(x, context=context[..., 1:])


@every
def test_half_precision_and_autocast(name):
    wide = make(name, random=False)
    x = tokens(2, TOKENS, DIM)
    want = wide(x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        got = copy.deepcopy(wide).to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
    layer = copy.deepcopy(wide).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x.float())
    assert (got.double() - want).abs().max() <= 0.1 * want.abs().max()
    got.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@every
def test_compiles_in_one_graph(name):
    layer = make(name, dtype=torch.float32)
    keep = torch.ones(2, TOKENS, dtype=torch.bool)
    keep[0, 3] = False
    x = tokens(2, TOKENS, DIM, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=keep), layer(x, mask=keep), rtol=1e-4, atol=1e-5)


@every
def test_a_training_step_changes_every_parameter(name):
    layer = make(name, dtype=torch.float32)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(tokens(2, TOKENS, DIM, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    for key, value in layer.named_parameters():
        assert value.isfinite().all()
        if key not in layer.unused:
            assert not torch.equal(value, before[key]), key


@every
def test_state_dict_round_trip(name):
    layer, other = make(name), make(name)
    with torch.no_grad():
        other.reset_parameters()
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(layer.state_dict())
    x = tokens(2, TOKENS, DIM)
    assert torch.equal(layer(x), other(x))
    assert layer.no_weight_decay() <= {key for key, _ in layer.named_parameters()}


@every
def test_flops_count_what_torch_counts(name):
    layer = make(name)
    # Torch 2.10 counts nothing in SDPA's other kernel for CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer(tokens(1, TOKENS, DIM))
    # torch counts products and convolutions only; AFT's sums are counted by the operator as well.
    ratio = layer.flops(TOKENS) / counter.get_total_flops()
    assert 0.95 < ratio < 1.6 if "aft" in name else 0.95 < ratio < 1.05


@every
def test_softmax_weights_load_where_the_names_agree(name):
    source = make("softmax")
    layer = make(name, **({"gamma": False} if name == "xnorm" else {}))
    if name in ("softmax", "sima", "xnorm", "aft_simple"):
        layer.load_state_dict(source.state_dict())
    else:
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict(source.state_dict())


@every
def test_norms_and_output_options(name):
    words = {"norm_layer": nn.LayerNorm, "scale_norm": True, "proj_bias": False}
    layer = make(name, **words)
    assert layer.proj.bias is None
    assert layer.norm.weight.shape == (layer.attn_dim,)
    if layer.no_qk_norm:
        with pytest.raises(ValueError, match=r"qk_norm must be False because .*; use scale_norm"):
            make(name, qk_norm=True, **words)
    else:
        layer = make(name, qk_norm=True, **words)
        assert layer.q_norm.weight.shape == (DIM // HEADS,)
    assert layer(tokens(2, TOKENS, DIM)).isfinite().all()
    with pytest.raises(ValueError, match="need a norm_layer"):
        make(name, scale_norm=True)


@every
def test_timm_takes_the_layer_by_class_and_by_name(name):
    words = {"img_size": 32, "depth": 1, "embed_dim": DIM, "num_heads": HEADS, "num_classes": 7}
    x = tokens(2, 3, 32, 32, dtype=torch.float32)
    for attn_layer in (layers.mechanism(name), name):
        model = timm.create_model("vit_tiny_patch16_224", attn_layer=attn_layer, **words)
        assert type(model.blocks[0].attn) is layers.mechanism(name)
        assert model(x).shape == (2, 7)


def test_softmax_is_timms_attention_whatever_the_mask():
    layer = make("softmax", qk_norm=True, norm_layer=nn.LayerNorm)
    theirs = timm.layers.Attention(DIM, HEADS, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm).double()
    theirs.load_state_dict(layer.state_dict())
    x, n = tokens(2, 7, DIM), 7
    allowed = tokens(2, 1, n, n, seed=5) > -0.5
    allowed |= torch.eye(n, dtype=torch.bool)
    added = tokens(n, n, seed=6)
    for mask in (None, allowed, allowed[0, 0], added):
        torch.testing.assert_close(layer(x, attn_mask=mask), theirs(x, attn_mask=mask))
    past = torch.ones(n, n, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, is_causal=True), theirs(x, attn_mask=past))
    # In combination: each removes what it removes.
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[0, 0] = False
    both = allowed & keep[:, None, None] & past
    dark = ~both.any(-1).squeeze(1)
    assert dark.any()
    got = layer(x, attn_mask=allowed, is_causal=True, mask=keep)
    want = theirs(torch.where(keep[..., None], x, 0), attn_mask=both)
    torch.testing.assert_close(got[~dark], want[~dark])
    torch.testing.assert_close(got[dark], layer.proj.bias.expand_as(got[dark]))
    layer.attn_drop.p = 0.5
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("name", ["external", "external_multihead"])
def test_external_attention_drops_from_its_map(name):
    layer, x = make(name, attn_drop=0.5), tokens(2, TOKENS, DIM)
    plain = make(name)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    # A map that is dropped whole leaves the biases alone; on average dropout changes nothing.
    torch.manual_seed(0)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - plain(x)).abs().max() < 0.2 * plain(x).abs().max()
    keep = torch.arange(TOKENS).expand(2, TOKENS) < TOKENS - 3
    other = torch.where(keep[..., None], x, 9.0)
    torch.manual_seed(1)
    got = layer(x, mask=keep)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(other, mask=keep)[keep], got[keep])


def test_sima_token_scale_undoes_the_token_count():
    scaled, plain = make("sima", token_scale=7), make("sima")
    x = tokens(2, 7, DIM)
    twice = torch.cat((x, x), 1)
    torch.testing.assert_close(scaled(x), plain(x))
    torch.testing.assert_close(scaled(twice)[:, :7], scaled(x))
    bias = plain.proj.bias
    torch.testing.assert_close(plain(twice)[:, :7] - bias, (plain(x) - bias) / 2)
    # Masked tokens do not count, and the causal form counts what it has seen.
    keep = torch.arange(14).expand(2, 14) < 7
    torch.testing.assert_close(scaled(twice, mask=keep)[:, :7], scaled(x))
    causal = scaled(x, is_causal=True)
    for n in (1, 4, 7):
        torch.testing.assert_close(causal[:, n - 1], scaled(x[:, :n])[:, -1])
    torch.testing.assert_close(scaled(twice, mask=keep, is_causal=True)[:, :7], causal)
    state = scaled.init_state(2)
    for t in range(7):
        y, state = scaled.step(x[:, t], state)
        torch.testing.assert_close(y, causal[:, t])
    torch.testing.assert_close(scaled(x, context=twice), scaled(x))  # the queries count, not the keys
    # The count is as exact as the values.
    double, x = make("sima", token_scale=9).double(), x.double()
    everything = torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(double(x, mask=everything), double(x), rtol=1e-13, atol=1e-15)
    with pytest.raises(ValueError, match="token_scale must be None or"):
        make("sima", token_scale=0)


@pytest.mark.parametrize("factor_dim", [5, None])
@pytest.mark.parametrize("name", ["aft_full", "aft_local"])
def test_position_biases_follow_the_grid(name, factor_dim):
    layer = make(name, factor_dim=factor_dim)
    tables = [layer.get_parameter(key).detach().clone() for key in layer.position_tables]
    x, large = tokens(2, TOKENS, DIM), tokens(2, 1 + 4 * 7, DIM, seed=7)
    want = layer(large, grid=(4, 7))  # resampled on the way
    resized = copy.deepcopy(layer)
    resized.set_input((4, 7), 1)
    torch.testing.assert_close(resized(large), want)
    assert all(resized.get_parameter(key).requires_grad for key in layer.position_tables)
    assert resized.max_tokens == 29
    for key, table in zip(layer.position_tables, tables, strict=True):
        new = resized.get_parameter(key)
        columns = slice(0, 1) if factor_dim is None else slice(None)
        assert torch.equal(new[:1, columns], table[:1, columns])  # the class token keeps its row
        layer.get_parameter(key).data.fill_(0.3)
    down = torch.arange(3.0, dtype=torch.float64)[:, None].expand(GRID).flatten()  # the row of each patch
    ramp = copy.deepcopy(layer)
    ramp.get_parameter(layer.position_tables[0]).data[1:] = down[:, None]
    ramp.set_input((4, 7), 1)
    patches = ramp.get_parameter(layer.position_tables[0])[1:, 0].unflatten(0, (4, 7))
    torch.testing.assert_close(patches, patches[:, :1].expand(4, 7))
    assert (patches.diff(dim=0) > 0.5).all()
    layer.set_input((9, 2), 1)
    for key in layer.position_tables:  # a constant stays constant
        torch.testing.assert_close(layer.get_parameter(key), torch.full_like(layer.get_parameter(key), 0.3))
    with pytest.raises(ValueError, match=r"16 tokens cannot be laid out: the grid is \(9, 2\)"):
        layer(x)
    layer.set_input((9, 2), 0)
    assert layer.max_tokens == 18
    layer.set_input((9, 2), 3)
    assert (layer.get_parameter(layer.position_tables[0])[:3] == 0).all()

    layer = make(name, told=False, factor_dim=factor_dim, max_tokens=13)
    long = tokens(2, 14, DIM)
    prefix = layer(long[:, :13], is_causal=True)[:, :9]
    torch.testing.assert_close(layer(long[:, :9], is_causal=True), prefix)  # shorter sequences crop
    with pytest.raises(
        ValueError, match=r"at most max_tokens=13 tokens, got 14; build the layer with a larger"
    ):
        layer(long)
    assert make(name, factor_dim=factor_dim, told=False, grid=(3, 4), num_prefix_tokens=2).max_tokens == 14


def test_grids_are_known_inferred_or_asked_for():
    layer = make("soft", told=False)
    x = tokens(2, 17, DIM)
    assert torch.equal(layer(x), layer(x, grid=(4, 4)))  # one class token, four by four patches
    assert not torch.allclose(layer(x), layer(x, grid=(2, 8)))
    with pytest.raises(
        ValueError, match=r"15 tokens cannot be laid out: no grid is known and there are 0 or 1"
    ):
        layer(x[:, :15])
    with pytest.raises(ValueError, match=r"17 tokens cannot be laid out: the grid is \(3, 5\)"):
        layer(x, grid=(3, 5))
    told = make("soft", told=False, grid=(3, 5), num_prefix_tokens=2)
    assert told.layout(17, None) == (3, 5, 2)
    with pytest.raises(ValueError, match="there are 2 prefix tokens"):
        told(x[:, 1:])


@pytest.mark.parametrize("options", [{"landmarks": 4}, {"ratio": 2}])
def test_soft_takes_prefix_and_masked_tokens_out_of_landmarks_and_convolution(options):
    layer = make("soft", told=False, grid=(4, 5), num_prefix_tokens=2, conv_size=3, **options)
    x, keep = tokens(2, 22, DIM), torch.ones(2, 22, dtype=torch.bool)
    keep[0, [0, 9]] = keep[1, 21] = False

    def heads(linear):
        y = linear(x).masked_fill(~keep[..., None], 0)
        return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, N, D)

    q, v = heads(layer.q) * layer.head_dim**-0.25, heads(layer.v)
    images = q[:, :, 2:].unflatten(2, (4, 5)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    if "landmarks" in options:
        images = F.adaptive_avg_pool2d(images, 2)
    landmarks = layer.landmark(images).flatten(2).mT.unflatten(0, (2, HEADS))
    y = sansmax.soft(q, v, F.gelu(layer.landmark_norm(landmarks)), mask=keep)
    for head in range(HEADS):
        for channel in range(DIM // HEADS):
            image = v[:, head, 2:, channel].unflatten(1, (1, 4, 5))
            near = F.conv2d(image, layer.conv.weight[head : head + 1], padding=1)
            y[:, head, 2:, channel] += near.flatten(1)
    torch.testing.assert_close(layer(x, mask=keep), layer.proj(y.transpose(1, 2).flatten(2)))


def test_soft_keeps_its_landmark_count_or_its_stride():
    fixed, strided = make("soft", told=False, landmarks=9), make("soft", told=False, ratio=2)
    sizes = ((4, 5), (13, 7), (2, 9))
    assert [fixed.landmark_grid(*size) for size in sizes] == [(3, 3), (3, 3), (2, 3)]
    assert [strided.landmark_grid(*size) for size in sizes] == [(2, 2), (6, 3), (1, 4)]
    for layer in (fixed, strided):
        q = tokens(2, HEADS, 20, DIM // HEADS)
        count = torch.Size(layer.landmark_grid(4, 5)).numel()
        assert layer.landmarks(q, 4, 5).shape == (2, HEADS, count, DIM // HEADS)
    with pytest.raises(ValueError, match="at least ratio=2 rows and columns"):
        strided(tokens(2, 7, DIM), grid=(1, 7))
    for wrong in ({"landmarks": 50}, {"landmarks": 0}, {"ratio": 0}):
        with pytest.raises(ValueError, match="landmarks must be a square number or ratio"):
            make("soft", **wrong)
    with pytest.raises(ValueError, match="conv_size must be odd, got 4; use 5"):
        make("soft", conv_size=4)


def test_aft_conv_kernel_and_its_refusals(golden, error):
    layer = MECHANISMS["aft_conv"](DIM, HEADS)
    assert layer.qkv.out_features == 2 * DIM + HEADS
    assert layer.w.std() > 0.5
    assert (layer.kernel() == 0).all()  # training begins with a gated global average
    for wrong in ({"kernel_size": 4}, {"kernel_size": 1}, {"kernel_dims": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            make("aft_conv", **wrong)
    with pytest.raises(ValueError, match="a kernel over a grid has no past"):
        make("aft_conv")(tokens(2, TOKENS, DIM), is_causal=True)
    for unbiased in (True, False):
        case = golden(f"aft/aft_conv2d_reparam_{'unbiased' if unbiased else 'biased'}")
        layer = MECHANISMS["aft_conv"](6, 3, kernel_size=3, unbiased=unbiased).double()
        given = case.inputs()
        layer.load_state_dict(
            {"w": given["w_raw"], "gamma": given["gamma"], "beta": given["beta"]}, strict=False
        )
        assert error(layer.kernel(), case.outputs["w"]) <= 1e-12


def test_external_memories_start_equal_and_can_be_tied():
    layer = make("external", random=False)
    assert torch.equal(layer.memory_k, layer.memory_v)
    assert layer.memory_k is not layer.memory_v
    tied = make("external", tie=True)
    assert [key for key, _ in tied.named_parameters() if "memory" in key] == ["memory"]
    layer.load_state_dict(
        {
            **{key: value for key, value in tied.state_dict().items() if key != "memory"},
            "memory_k": tied.memory,
            "memory_v": tied.memory,
        }
    )
    x = tokens(2, 5, DIM)
    torch.testing.assert_close(layer(x), tied(x))
    with pytest.raises(ValueError, match="memory must be at least 1 row"):
        make("external", memory=0)
    with pytest.raises(ValueError, match="coef and memory must be at least 1"):
        make("external_multihead", coef=0)
