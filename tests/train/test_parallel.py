"""Several processes, copies and shares of the network: the same losses as one process."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from forked import run_recipe, start, tiny, together
from test_resume import lines

from sansmax.tasks._data.draws import Part
from sansmax.train.run import run


def even(out, **changes):
    """Without dropout and drop-path, whose masks belong to a process."""
    args = {key: value for key, value in tiny(out).model_args.items() if key != "drop_rate"}
    return tiny(out, drop_path=0.0, model_args=args, **changes)


def losses(folder):
    return torch.tensor([line["loss"] for line in lines(folder)], dtype=torch.float64)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "one"
    together(1, run_recipe, even(folder))
    return folder


@pytest.mark.parametrize(
    "changes", [{}, {"parallel": "fsdp"}, {"accumulate": 2}], ids=["ddp", "fsdp", "accumulated"]
)
def test_two_processes_or_pieces_train_as_one(one, tmp_path, changes):
    folder = tmp_path / "two"
    together(1 if "accumulate" in changes else 2, run_recipe, even(folder, **changes))
    assert len(losses(one)) == 22
    assert (losses(folder) - losses(one)).abs().max() < 1e-5
    mine, theirs = (safetensors.torch.load_file(f / "weights.safetensors") for f in (folder, one))
    assert mine.keys() == theirs.keys()
    assert max((mine[k] - theirs[k]).abs().max().item() for k in mine) < 1e-4


@pytest.mark.parametrize(("first", "second"), [("fsdp", 1), ("ddp", 1), ("ddp", "fsdp")])
def test_a_run_goes_on_with_other_processes(one, tmp_path, first, second, capfd):
    folder = tmp_path / "changed"
    half = even(folder, parallel=first, save_every=5)
    children = start(2, interrupted_run, half, 7)
    for child in children:
        child.join(60)
    assert len(lines(folder)) == 7
    if second == 1:
        together(1, run_recipe, replace(half, parallel="ddp", resume=True))
    else:
        together(2, run_recipe, replace(half, parallel="fsdp", resume=True))
    assert len(lines(folder)) == 22
    assert (losses(folder) - losses(one)).abs().max() < 1e-5


def interrupted_run(recipe, updates):
    """Leaves with a saved state after so many updates."""
    from sansmax.train import loop

    told = loop.parallel.agreed
    count = [0]

    def stop(*arguments):
        count[0] += 1
        mean_loss, norm, asked = told(*arguments)
        return mean_loss, norm, asked or count[0] == updates

    loop.parallel.agreed = stop
    run(recipe)


def test_an_update_is_dealt_out_whole_and_pairs_stay_together():
    batch = torch.arange(24)
    for pieces, world in [(1, 1), (2, 1), (1, 2), (3, 2), (2, 2)]:
        parts = [Part(24, pieces, rank, world).rows(batch, m) for rank in range(world) for m in range(pieces)]
        assert torch.equal(torch.cat(parts).sort().values, batch)
        for part in parts:
            assert torch.equal(part + part.flip(0), torch.full_like(part, 23))


@pytest.mark.parametrize(("size", "pieces"), [(10, 2), (6, 2), (3, 2)])
def test_a_batch_that_cannot_be_dealt_out_is_refused(size, pieces):
    with pytest.raises(
        ValueError, match=f"batch_size: expected a multiple of {2 * pieces}, .* got {size}; change it"
    ):
        Part(size, pieces)


def test_settings_that_need_more_are_refused(tmp_path):
    for changes, words in [
        ({"parallel": "fsdp"}, "parallel: expected several processes for fsdp, got one; start with torchrun"),
        ({"precision": "fp16"}, "precision: expected fp32 or bf16 on the CPU, .* got fp16; use bf16"),
        ({"accumulate": 3}, "accumulate: expected a divisor of the batch size 128, got 3"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(tiny(tmp_path / "x", **changes))
