"""The generator and the discriminator: shapes, spectral norms, mechanisms, whose gradients an update has."""

import copy

import pytest
import torch
from torch import nn

from sansmax import layers, recipes
from sansmax.models import GAN
from sansmax.models._gan import Turn, normed
from sansmax.tasks import generation
from sansmax.train import optim
from sansmax.train.recipe import Optim

SMALL = {"img_size": 16, "in_chans": 3, "num_classes": 5, "latent_dim": 7}
# Generator, discriminator.
COUNTS = {
    "cifar10": [4_304_387, 1_055_105],
    "sagan_cifar10": [4_566_788, 1_120_770],
    "eagan_cifar10": [4_468_484, 1_104_386],
    "tiny_imagenet": [13_366_915, 19_747_521],
    "sagan_tiny_imagenet": [13_432_580, 19_763_970],
    "eagan_tiny_imagenet": [13_416_196, 19_763_970],
}
SIZES = {"widths": (12, 20, 8), "discriminator_widths": (8, 12, 20), "halvings": 2}


def small(mechanism="sima", **changes) -> GAN:
    torch.manual_seed(0)
    return GAN(**{**SMALL, **SIZES, "mechanism": mechanism, "attention_after": 1, **changes})


def turn(network: GAN, count: int = 3, own: bool = True, seed: int = 1) -> Turn:
    """Of the discriminator, or of the generator."""
    chance = torch.Generator().manual_seed(seed)
    kinds = network.discriminator.embed.num_embeddings if network.discriminator.embed else 0
    labels, wanted = (torch.randint(kinds, (count,), generator=chance) if kinds else None for _ in range(2))
    noise = torch.randn(count, network.generator.latent_dim, generator=chance)
    images = torch.rand(count, 3, 16, 16, generator=chance) * 2 - 1
    return Turn(images, labels, noise, wanted) if own else Turn(None, None, noise, wanted)


def largest(module: nn.Module) -> float:
    """Singular value of its weight."""
    return torch.linalg.matrix_norm(module.weight.flatten(1), 2).item()


def test_sizes():
    network, seen = small(), turn(small())
    fakes = network.generator(seen.noise, seen.wanted)
    assert fakes.shape == (3, 3, 16, 16)
    assert fakes.abs().max() <= 1
    assert network(seen).shape == (6,)
    assert network(turn(network, own=False)).shape == (3,)
    plain = small(num_classes=0)
    assert plain(turn(plain)).shape == (6,)
    assert not any(isinstance(module, nn.Embedding) for module in plain.modules())


def test_the_published_variants_have_this_many_parameters():
    counts = {}
    for name in ("sagan_cifar10", "eagan_cifar10", "sagan_tiny_imagenet", "eagan_tiny_imagenet"):
        recipe = recipes.recipe(name).checked()
        for mechanism in (recipe.mechanism, None):
            with torch.device("meta"):
                words = {"img_size": recipe.img_size, "num_classes": 10 if "cifar" in name else 200}
                network = GAN(**words, **recipe.model_args, mechanism=mechanism)
            halves = (network.generator, network.discriminator)
            counts[name if mechanism else name[6:]] = [sum(p.numel() for p in m.parameters()) for m in halves]
    assert counts == COUNTS


@pytest.mark.parametrize("mechanism", layers.mechanisms())
def test_every_mechanism_mixes_and_learns(mechanism):
    network = small(mechanism)
    seen = turn(network)
    started = copy.deepcopy(network).eval()(seen)
    for part in (network.generator, network.discriminator):
        part.attention.gamma.data.fill_(0.5)
        for parameter in part.attention.mixer.parameters():
            parameter.data += 0.1 * (not parameter.any())  # gains that begin at 0 hide others' gradients
    assert not torch.allclose(copy.deepcopy(network).eval()(seen), started)
    for own, part in ((True, network.discriminator), (False, network.generator)):
        network.zero_grad()
        network(turn(network, own=own)).square().sum().backward()
        mixer = part.attention.mixer
        for name, parameter in mixer.named_parameters():
            assert name in mixer.unused or torch.isfinite(parameter.grad).all(), name
            assert name in mixer.unused or parameter.grad.abs().sum() > 0, name
        assert part.attention.gamma.grad.abs() > 0


def test_gamma_begins_at_zero_so_that_attention_begins_as_nothing():
    network, seen = small("softmax").eval(), turn(small())
    before = network(seen)
    for part in (network.generator, network.discriminator):
        nn.init.normal_(part.attention.mixer.proj.bias)
    assert torch.equal(network(seen), before)


def test_no_attention():
    network = small(None)
    assert isinstance(network.generator.attention, nn.Identity)
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in small().parameters())


def test_largest_singular_values_are_one():
    network = small("external").train()
    for _ in range(30):
        network(turn(network))
    network.eval()
    names = {name for name, module in network.named_modules() if module in set(normed(network))}
    assert {"generator.stem", "generator.blocks.1.norm2.gain", "discriminator.embed"} <= names
    assert {"generator.attention.mixer.query", "discriminator.attention.mixer.proj"} <= names
    plain = (nn.Linear, nn.Conv2d, nn.Embedding)
    assert names == {name for name, module in network.named_modules() if isinstance(module, plain)}
    for name, module in network.named_modules():
        if name in names:
            assert largest(module) == pytest.approx(1, abs=0.02), name


def test_averaged_singular_vectors_are_found_again():
    network = small("xnorm").train()
    with torch.no_grad():
        for norm in (module.parametrizations.weight for module in normed(network)):
            for vector in norm.buffers():
                vector.mul_(0.6)  # as the mean of vectors that turn
    network.eval()
    for module in normed(network):
        assert largest(module) == pytest.approx(1, abs=0.02)
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train().eval()
    assert all(torch.equal(kept[name], tensor) for name, tensor in network.state_dict().items())


def test_half_precision_divides_by_the_same_singular_values():
    network, seen = small("sima"), turn(small())
    twin = copy.deepcopy(network)
    network(seen)
    with torch.autocast("cpu", torch.bfloat16):
        scores = twin(seen)
    assert torch.isfinite(scores).all()
    for name, vector in network.discriminator.named_buffers():
        if name.endswith(("_u", "_v")):
            assert torch.equal(vector, twin.discriminator.get_buffer(name)), name


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb", "lion", "sgd", "nadamw", "rmsproptf", "adopt"])
def test_an_update_leaves_the_other_network_bit_for_bit(name):
    network = small("aft_conv").train()
    words = {"opt": name, "lr": 1e-2, "lr_batch": None, "weight_decay": 0.1}
    recipe = generation.Recipe(optim=Optim(**words), d_lr_scale=3.0)
    optimizer = optim.optimizer(network, recipe)
    for update in range(6):
        own = update % 2 == 0
        rests = network.generator if own else network.discriminator
        learns = network.discriminator if own else network.generator
        resting = {k: p.clone() for k, p in rests.named_parameters()}
        learning = {k: p.clone() for k, p in learns.named_parameters()}
        state = copy.deepcopy([optimizer.state[p] for p in rests.parameters() if p in optimizer.state])
        network(turn(network, own=own, seed=update)).square().mean().backward()
        assert all(p.grad is None for p in rests.parameters())
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(p, resting[k]) for k, p in rests.named_parameters())
        moved = [not torch.equal(p, learning[k]) for k, p in learns.named_parameters() if "skip.bias" in k]
        assert all(moved) or (name == "adopt" and update < 2)  # whose first step moves nothing
        after = [optimizer.state[p] for p in rests.parameters() if p in optimizer.state]
        for a, b in zip(state, after, strict=True):
            assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a), name


def test_the_discriminator_has_a_rate_of_its_own():
    network = small(discriminator_lr_scale=4.0)
    first, second = network.parameter_groups(0.25)
    assert [g["lr_scale"] for g in (first, second)] == [1.0, 4.0]
    assert [g["weight_decay"] for g in (first, second)] == [0.25, 0.25]
    both = {id(p) for g in (first, second) for p in g["params"]}
    assert both == {id(p) for p in network.parameters()}
    assert {id(p) for p in second["params"]} == {id(p) for p in network.discriminator.parameters()}


def test_weights_of_classes_mix_their_rows():
    network = small().eval()
    noise, labels = torch.randn(4, 7), torch.tensor([0, 3, 3, 2])
    whole = nn.functional.one_hot(labels, 5).float()
    assert torch.allclose(network.generator(noise, labels), network.generator(noise, whole), atol=1e-6)
    mixed = network.generator(noise, whole * 0.5 + 0.1)
    assert not torch.allclose(mixed, network.generator(noise, labels), atol=1e-3)


def test_the_projection_of_a_class_is_added():
    network, images = small().eval(), torch.rand(4, 3, 16, 16)
    labels = torch.tensor([1, 4, 0, 2])
    score, projected = network.discriminator.parts(images)
    assert projected.shape == (4, 5)
    want = score + projected[torch.arange(4), labels]
    assert torch.equal(network.discriminator(images, labels), want)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_size": 24}, "widths: expected as many numbers as 4, 8, 16, ... 24"),
        ({"widths": (8, 8)}, "got 2; change it or the size"),
        ({"halvings": 4}, "halvings: expected 1 to 3 of 3 blocks at 16 px, got 4"),
        ({"attention_after": 3}, "attention_after: expected 1 to 2, got 3"),
        ({"discriminator_attention_after": 0}, "discriminator_attention_after: expected 1 to 3, got 0"),
        ({"mechanism": "softmx"}, "did you mean 'softmax'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        small(**changes)
