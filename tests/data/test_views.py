"""Views, erasing, mixing and the losses, against numbers worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sansmax.tasks._data.batches import Batch
from sansmax.tasks._data.draws import draw, order
from sansmax.tasks._data.settings import Augment
from sansmax.tasks._data.views import Mixing, erase, views
from sansmax.tasks.classification import Classification, Teacher

BLACK = torch.zeros(3, 1, 1)
STILL = Augment(scale=(1.0, 1.0), hflip=0.0)


def chance(area=0.5, ratio=0.5, x=0.5, y=0.5, mirror=0.9):
    return torch.tensor([[area], [ratio], [x], [y], [mirror]])


def ramp(height, width):
    """Three channels: the row, the column, one."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.ones_like(rows)]).float()[None]


def seen(augment, height=12, width=20, **numbers):
    return views(ramp(height, width), augment, chance(**numbers), BLACK)[0]


def test_nothing_asked_nothing_changed():
    assert (seen(STILL) - ramp(12, 20)[0]).abs().max() < 1e-4


def test_mirrored():
    view = seen(Augment(scale=(1.0, 1.0), hflip=0.5), mirror=0.49)
    assert (view - ramp(12, 20)[0].flip(-1)).abs().max() < 1e-4
    assert (seen(Augment(scale=(1.0, 1.0), hflip=0.5), mirror=0.5) - ramp(12, 20)[0]).abs().max() < 1e-4


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, 1.0), (1.0, 0.0)])
def test_shifted_by_at_most_a_share_of_the_side(x, y):
    # A quarter of 12 rows is 3, of 20 columns 5: so far the view looks beyond the edge.
    view = seen(Augment(scale=(1.0, 1.0), hflip=0.0, shift=0.25), x=x, y=y)
    down, across = round((2 * y - 1) * 3), round((2 * x - 1) * 5)
    expected = torch.zeros(3, 12, 20)
    source = ramp(12, 20)[0]
    rows, columns = range(max(0, -down), 12 - max(0, down)), range(max(0, -across), 20 - max(0, across))
    for row in rows:
        for column in columns:
            expected[:, row, column] = source[:, row + down, column + across]
    assert (view - expected).abs().max() < 1e-3


def test_cropped_to_the_area_and_ratio_asked():
    # A quarter of the area, square in shares of the sides: 6 of 12 rows, 10 of 20 columns.
    view = seen(Augment(scale=(0.25, 0.25), ratio=(1.0, 1.0), hflip=0.0))
    assert view[0, 0, 0] == pytest.approx(3 - 0.25, abs=1e-3)
    assert view[0, -1, 0] == pytest.approx(8 + 0.25, abs=1e-3)
    assert view[1, 0, 0] == pytest.approx(5 - 0.25, abs=1e-3)
    assert view[1, 0, -1] == pytest.approx(14 + 0.25, abs=1e-3)
    # Four times as wide as high: 3 of 12 rows, all 20 columns.
    wide = seen(Augment(scale=(0.25, 0.25), ratio=(4.0, 4.0), hflip=0.0), y=1.0)
    assert wide[0, 0, 0] == pytest.approx(9 - 0.375, abs=1e-3)
    assert wide[0, 8, 0] == pytest.approx(9 - 0.375 + 2, abs=1e-3)
    assert (wide[1, 5] - torch.arange(20)).abs().max() < 1e-3


def test_crops_lie_inside_and_have_areas_between_those_asked():
    count = 500
    images = ramp(32, 32).expand(count, -1, -1, -1)
    numbers = torch.rand(5, count, generator=torch.Generator().manual_seed(0))
    crops = views(images, Augment(scale=(0.3, 0.6), ratio=(0.5, 2.0), hflip=0.5), numbers, BLACK)
    inner = crops[:, :, 1:-1, 1:-1]
    assert (inner[:, 2] - 1).abs().max() < 1e-5  # nothing of the outside
    height = (inner[:, 0, -1, 0] - inner[:, 0, 0, 0]) / 29
    width = (inner[:, 1, 0, -1] - inner[:, 1, 0, 0]) / 29
    area, ratio = height * width.abs(), width.abs() / height
    assert 0.29 < area.min() < 0.32
    assert 0.58 < area.max() < 0.61
    assert 0.49 < ratio.min() < 0.55
    assert 1.85 < ratio.max() < 2.05
    assert (width < 0).float().mean() == pytest.approx(0.5, abs=0.07)


def test_erasing_fills_the_boxes_and_nothing_else():
    images = torch.full((3, 2, 6, 7), 9.0)
    boxes = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [5, 6, 1, 1]])
    erased = erase(images, boxes, 3, 11)
    expected = torch.zeros(3, 6, 7, dtype=torch.bool)
    expected[0, 1:4, 2:6] = True
    expected[2, 5, 6] = True
    assert torch.equal((erased != 9).all(1), expected)
    assert torch.equal((erased != 9).any(1), expected)
    assert (images == 9).all()
    assert torch.equal(erase(images, boxes, 3, 11), erased)
    assert not torch.equal(erase(images, boxes, 3, 12), erased)
    noise = erase(torch.zeros(1, 3, 64, 64), torch.tensor([[0, 0, 64, 64]]), 3, 11)
    assert noise.mean().abs() < 0.03
    assert noise.std() == pytest.approx(1, abs=0.03)


def drawn(seed, update):
    """numpy, as Mixing begins it."""
    return np.random.RandomState(draw(seed, "mix", update))


IMAGES = torch.arange(4.0)[:, None, None, None].expand(4, 2, 6, 8)
LABELS = torch.tensor([0, 2, 1, 1])


def test_mixup_by_hand():
    images, targets = Mixing(Augment(mixup=0.8, smoothing=0.3), 3)(IMAGES.clone(), LABELS, 5, 7)
    numpy = drawn(5, 7)
    numpy.rand()  # whether to mix
    share = numpy.beta(0.8, 0.8)
    # Image i is mixed with 3 - i; of 0.3 every class has 0.1.
    one_hot = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]])
    for i in range(4):
        assert images[i, 1, 2, 3].item() == pytest.approx(share * i + (1 - share) * (3 - i), abs=1e-5)
        assert targets[i].tolist() == pytest.approx(
            share * one_hot[i] + (1 - share) * one_hot[3 - i], abs=1e-6
        )


def test_cutmix_by_hand():
    for update in range(20):
        images, targets = Mixing(Augment(cutmix=1.0, smoothing=0.0), 3)(IMAGES.clone(), LABELS, 5, update)
        numpy = drawn(5, update)
        numpy.rand()
        side = np.sqrt(1 - numpy.beta(1.0, 1.0))
        height, width = int(6 * side), int(8 * side)
        row, column = numpy.randint(0, 6), numpy.randint(0, 8)
        top, bottom = max(0, row - height // 2), min(6, row + (height + 1) // 2)
        left, right = max(0, column - width // 2), min(8, column + (width + 1) // 2)
        inside = torch.zeros(6, 8, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        share = 1 - inside.float().mean().item()
        for i in range(4):
            assert torch.equal(images[i, 0], torch.where(inside, 3.0 - i, float(i)))
        assert targets[1].tolist() == pytest.approx([0, 1 - share, share], abs=1e-6)
        assert targets[0].tolist() == pytest.approx([share, 1 - share, 0], abs=1e-6)


def test_mixing_depends_on_the_update_alone():
    mixing = Mixing(Augment(mixup=0.8, cutmix=1.0), 3)
    np.random.seed(1)
    before = np.random.rand()
    first = mixing(IMAGES.clone(), LABELS, 5, 7)
    np.random.seed(1)
    assert np.random.rand() == before
    second = mixing(IMAGES.clone(), LABELS, 5, 7)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    state = np.random.get_state()[1].tolist()
    mixing(IMAGES.clone(), LABELS, 5, 8)
    assert np.random.get_state()[1].tolist() == state
    several = [mixing(IMAGES.clone(), LABELS, 5, update)[0] for update in range(30)]
    cut = sum(bool((x[0] == x[0].round()).all()) for x in several)
    assert 8 < cut < 22
    never = Mixing(Augment(mixup=0.8, mix_prob=0.0, smoothing=0.0), 3)(IMAGES.clone(), LABELS, 5, 7)
    assert torch.equal(never[0], IMAGES)
    assert torch.equal(never[1], nn.functional.one_hot(LABELS, 3).float())


def task(augment, teacher=None, classes=3):
    source = SimpleNamespace(classes=["a"] * classes, train_size=8, val_size=0, train=lambda *_: iter(()))
    return Classification(source, augment, teacher)


LOGITS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.0, -0.5]])
ANSWERS = torch.tensor([2, 1])


def logs(rows):
    values = np.asarray(rows, dtype=np.float64)
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def test_the_loss_with_smoothed_labels_by_hand():
    told = logs(LOGITS)
    plain = -(told[0, 2] + told[1, 1]) / 2
    smooth = 0.7 * plain - 0.3 * told.mean()
    assert task(Augment(smoothing=0.0)).loss(LOGITS, ANSWERS).item() == pytest.approx(plain, rel=1e-6)
    assert task(Augment(smoothing=0.3)).loss(LOGITS, ANSWERS).item() == pytest.approx(smooth, rel=1e-6)
    # Mixed targets are smoothed already.
    shares = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    mixed = -(told * shares.numpy()).sum() / 2
    assert task(Augment(smoothing=0.3)).loss(LOGITS, shares).item() == pytest.approx(mixed, rel=1e-6)
    # bfloat16 logits are summed in float32.
    half = task(Augment(smoothing=0.0)).loss(LOGITS.bfloat16(), ANSWERS)
    assert half.item() == pytest.approx(plain, rel=1e-6)


OPINION = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.5]])


class Constant(nn.Module):
    def forward(self, images):
        assert not self.training
        return OPINION


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_distillation_by_hand(kind, outputs):
    teacher = Teacher(Constant(), kind, alpha=0.4, tau=2.0)
    learner = task(Augment(smoothing=0.0), teacher)
    second = LOGITS if outputs == 1 else LOGITS.flip(0) * 0.7
    _, targets = learner._changed(Batch(torch.zeros(2, 3, 4, 4), ANSWERS, torch.zeros(2, 4), ANSWERS), 0, 0)
    got = learner.loss(LOGITS if outputs == 1 else (LOGITS, second), targets)
    base = -(logs(LOGITS)[0, 2] + logs(LOGITS)[1, 1]) / 2
    if kind == "hard":
        taught = -(logs(second)[0, 0] + logs(second)[1, 1]) / 2
    else:
        student, master = logs(second / 2), logs(OPINION / 2)
        taught = 4 * (np.exp(master) * (master - student)).sum() / 2
    assert got.item() == pytest.approx(0.6 * base + 0.4 * taught, rel=1e-5)


def test_a_verdict_by_hand():
    batch = Batch(torch.zeros(2, 3, 4, 4), ANSWERS, torch.zeros(2, 4), torch.tensor([7, 2 * 10**9 + 1]))
    verdict = task(Augment()).verdict(LOGITS, batch)
    told = logs(LOGITS)
    assert verdict.shape == (2, 4 + 2 * 3)
    assert verdict[:, :2].tolist() == [[7, 2], [2 * 10**9 + 1, 1]]
    assert verdict[:, 2].tolist() == pytest.approx([-told[0, 2], -told[1, 1]], rel=1e-6)
    assert verdict[:, 3].tolist() == pytest.approx([np.exp(told[0, 2]), np.exp(told[1, 1])], rel=1e-6)
    assert verdict[:, 4:7].tolist() == [[2, 0, 1], [0, 1, 2]]
    assert verdict[0, 7:].tolist() == pytest.approx(np.exp(told[0, [2, 0, 1]]).tolist(), rel=1e-6)


def test_the_order_of_an_epoch():
    assert sorted(order(7, 1, 2).tolist()) == list(range(7))
    assert order(7, 1, 2).tolist() == order(7, 1, 2).tolist() != order(7, 1, 3).tolist()
    assert order(7, 1, 2).repeat_interleave(3)[:7].tolist() == order(7, 1, 2, 3).tolist()
    assert draw(0, "a", 1) != draw(0, "a1") != draw(1, "a", 1)
