"""Recipes: names, commands, every field against the sources, the learning rate against numbers by hand."""

import ast
import dataclasses
import inspect
import shlex
import subprocess
import sys

import pytest
import timm
import torch
import tyro

from sansmax import _find, create_model, layers, models, recipes
from sansmax.train import optim
from sansmax.train.recipe import Recipe, read_recipe
from sansmax.train.run import FREE

NAMES = recipes.names()
# Of image classification; other tasks' own tests know their recipes.
IMAGES = [name for name in NAMES if isinstance(recipes.recipe(name), Recipe)]
FAMILIES = _find.names(recipes.__name__)

# What a run learns and how; the rest of a recipe says where it runs.
RUNNING = {name for name in FREE if "." not in name} - {"accumulate"}
DEIT = {
    "mechanism": None,
    "model_args": {},
    "weights": "",
    "img_size": 224,
    "eval_crop": 0.875,
    "drop_path": 0.1,
    "epochs": 300,
    "batch_size": 1024,
    "accumulate": 1,
    "seed": 0,
    "precision": "fp16",
    "data.root": "imagenet",
    "data.reader": "",
    "data.split": "train",
    "data.val_split": "validation",
    "data.num_samples": None,
    "data.num_classes": None,
    "data.memory": None,
    "data.workers": None,
    "data.shuffle_buffer": 4096,
    "data.download": False,
    "augment.scale": [0.08, 1.0],
    "augment.ratio": [0.75, 1.3333333333333333],
    "augment.shift": 0.0,
    "augment.hflip": 0.5,
    "augment.interpolation": "bicubic",
    "augment.color_jitter": 0.4,
    "augment.auto_augment": "rand-m9-mstd0.5-inc1",
    "augment.reprob": 0.25,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.mix_prob": 1.0,
    "augment.mix_switch": 0.5,
    "augment.smoothing": 0.1,
    "augment.repeats": 3,
    "optim.opt": "adamw",
    "optim.lr": 5e-4,
    "optim.lr_batch": 512,
    "optim.weight_decay": 0.05,
    "optim.betas": None,
    "optim.momentum": 0.9,
    "optim.clip": None,
    "optim.sched": "cosine",
    "optim.milestones": [],
    "optim.per": "epoch",
    "optim.hold": 1,
    "optim.warmup": 5,
    "optim.warmup_lr": 1e-6,
    "optim.min_lr": 1e-5,
    "optim.layer_decay": None,
    "optim.ema": 0.99996,
    "optim.evaluate_ema": False,
    "distil.teacher": "",
    "distil.kind": "hard",
    "distil.alpha": 0.5,
    "distil.tau": 1.0,
    "distil.features": 0.0,
}
T2T = {
    "eval_crop": 0.9,
    "seed": 42,
    "precision": "fp32",
    "augment.interpolation": "random",
    "augment.repeats": 1,
    "optim.evaluate_ema": True,
}
SOFT = {
    **T2T,
    "optim.lr": 1e-3,
    "optim.lr_batch": 1024,
    "optim.clip": 1.0,
    "optim.warmup": 10,
    "optim.min_lr": 5e-5,
}
VIBID = {
    "eval_crop": 1.0,
    "epochs": 400,
    "batch_size": 4096,
    "optim.clip": 0.5,
    "optim.ema": 0.0,
    "optim.evaluate_ema": True,
}
VIBID_BASE = {
    **VIBID,
    "model": "vibid_base_p16",
    "drop_path": 0.25,
    "augment.auto_augment": "rand-m12-n2-mstd0.5-inc1",
    "optim.lr": 4e-5,
}
SMALL = {
    "model": "vit_mini",
    "eval_crop": 1.0,
    "augment.scale": [1.0, 1.0],
    "augment.ratio": [1.0, 1.0],
    "augment.color_jitter": 0.0,
    "augment.auto_augment": "",
    "augment.repeats": 1,
    "optim.clip": 1.0,
    "optim.per": "update",
    "optim.ema": 0.0,
    "optim.evaluate_ema": True,
}
# What differs from DeiT's table.
TABLES = {
    "deit_tiny": {"model": "deit_tiny_patch16_224"},
    "deit_base": {"model": "deit_base_patch16_224"},
    "sima_xcit_small_12_p16": {
        "model": "sima_small_12_p16",
        "epochs": 400,
        "drop_path": 0.05,
        "eval_crop": 1.0,
    },
    "sima_xcit_nano_12_p8": {"model": "sima_nano_12_p8", "epochs": 400, "eval_crop": 1.0},
    "sima_deit_small_p16": {"model": "sima_deit_small_p16"},
    "sima_cvt_13": {
        "model": "sima_cvt_13",
        "batch_size": 2048,
        "augment.repeats": 1,
        "optim.lr": 2.5e-4,
        "optim.lr_batch": 256,
        "optim.ema": 0.0,
        "optim.evaluate_ema": True,
    },
    "soft_small_24m": {**SOFT, "model": "soft_small_24m"},
    "soft_medium": {**SOFT, "model": "soft_medium", "optim.lr": 3.5e-4},
    "soft_norm_tiny": {**SOFT, "model": "soft_norm_tiny"},
    "soft_norm_medium": {**SOFT, "model": "soft_norm_medium", "optim.lr": 4e-4},
    "soft_norm_large": {**SOFT, "model": "soft_norm_large", "optim.lr": 3.3e-4},
    "soft_huge": {**SOFT, "model": "soft_huge", "optim.lr": 2.7e-4},
    "xvit_u_p16": {
        **VIBID,
        "model": "xvit_u_p16",
        "drop_path": 0.0,
        "augment.auto_augment": "rand-m7-n2-mstd0.5-inc1",
        "optim.lr": 5e-5,
    },
    "vibid_medium_p16": {
        **VIBID,
        "model": "vibid_medium_p16",
        "drop_path": 0.15,
        "augment.auto_augment": "rand-m9-n2-mstd0.5-inc1",
        "optim.lr": 4e-5,
    },
    "vibid_base_p16": VIBID_BASE,
    "vibid_base_p16_512": {
        **VIBID_BASE,
        "img_size": 512,
        "epochs": 10,
        "batch_size": 512,
        "optim.opt": "sgd",
        "optim.lr": 0.01,
        "optim.lr_batch": None,
        "optim.weight_decay": 0.0,
        "optim.warmup": 0,
        "optim.min_lr": 0.0,
    },
    "eamlp_7": {
        **T2T,
        "model": "eamlp_7",
        "img_size": 384,
        "batch_size": 512,
        "optim.lr": 1e-3,
        "optim.lr_batch": None,
        "optim.weight_decay": 0.03,
    },
    "t2t_ea_14": {
        **T2T,
        "model": "t2t_ea_14",
        "batch_size": 512,
        "optim.lr": 1e-3,
        "optim.lr_batch": None,
        "optim.weight_decay": 0.03,
    },
    "aft_full_tiny_p16": {"model": "aft_full_tiny_p16", "precision": "fp32"},
    "aft_conv_base_p16_k25_h32": {
        "model": "aft_conv_base_p16_k25_h32",
        "precision": "fp32",
        "img_size": 384,
        "epochs": 100,
        "batch_size": 64,
    },
    "cifar10_soft": {
        **SMALL,
        "mechanism": "soft",
        "model_args": {
            "patch_size": 4,
            "embed_dim": 192,
            "depth": 6,
            "num_heads": 6,
            "class_token": False,
            "stem": "conv",
            "mechanism_args": {"landmarks": 16, "conv_size": 5},
        },
        "img_size": 32,
        "epochs": 100,
        "batch_size": 512,
        "precision": "bf16",
        "data.root": "cifar10",
        "data.reader": "torch/cifar10",
        "data.memory": True,
        "augment.shift": 0.125,
        "augment.mixup": 0.2,
        "augment.mix_prob": 0.5,
        "optim.lr": 3e-3,
    },
    "digits_xnorm": {
        **SMALL,
        "mechanism": "xnorm",
        "model_args": {"patch_size": 2, "class_token": False},
        "img_size": 8,
        "drop_path": 0.0,
        "epochs": 14,
        "batch_size": 48,
        "precision": "fp32",
        "data.root": "digits",
        "augment.shift": 0.0625,
        "augment.hflip": 0.0,
        "augment.reprob": 0.0,
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
        "optim.lr": 2e-3,
        "optim.lr_batch": None,
        "optim.warmup": 1.4,
        "optim.warmup_lr": 2e-5,
        "optim.min_lr": 0.0,
    },
}


def flat(values, prefix=""):
    """{"data": {"root": ...}} as {"data.root": ...}; model_args stays whole."""
    found = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "model_args"
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def commands(name):
    """The command lines in a run's docstring, as words."""
    lines = map(str.strip, recipes.describe(name).splitlines())
    return [shlex.split(line) for line in lines if line.startswith("sansmax train ")]


@pytest.mark.parametrize("name", TABLES)
def test_every_field_is_the_source_s(name):
    got = {key: value for key, value in flat(recipes.recipe(name).to_json()).items() if key not in RUNNING}
    assert got == DEIT | TABLES[name]


def test_the_tables_hold_every_family():
    for family in FAMILIES:
        runs = set(_find.load("sansmax.recipes", family).RUNS)
        assert set(TABLES) & runs or not runs & set(IMAGES), family


# By hand, with the peak lr * batch / lr_batch: a line from 1e-6 to the peak over the warm-up, then
# low + (peak - low) (1 + cos(pi e / epochs)) / 2.
@pytest.mark.parametrize(
    ("name", "peak", "rates"),
    [
        (
            "deit_small",
            5e-4 * 1024 / 512,
            {0: 1e-6, 1: 2.008e-4, 5: 9.993216e-4, 150: 5.05e-4, 299: 1.002714e-5},
        ),
        (
            "sima_xcit_small_12_p16",
            5e-4 * 8 * 128 / 512,
            {0: 1e-6, 1: 2.008e-4, 5: 9.996184e-4, 200: 5.05e-4, 399: 1.001527e-5},
        ),
        ("sima_deit_tiny_p16", 1e-3, {0: 1e-6, 1: 2.008e-4, 5: 9.993216e-4, 150: 5.05e-4, 299: 1.002714e-5}),
        (
            "sima_cvt_21",
            8 * 2.5e-4,
            {0: 1e-6, 1: 4.008e-4, 5: 1.998636e-3, 150: 1.005e-3, 299: 1.005456e-5},
        ),
        ("soft_tiny", 1e-3, {0: 1e-6, 1: 1.009e-4, 5: 5.005e-4, 150: 5.25e-4, 299: 5.002604e-5}),
        ("soft_medium", 3.5e-4, {0: 1e-6, 1: 3.59e-5, 5: 1.755e-4, 150: 2e-4, 299: 5.000822e-5}),
        (
            "xvit_small_p16",
            5e-5 * 4096 / 512,
            {0: 1e-6, 1: 8.08e-5, 5: 3.998497e-4, 200: 2.05e-4, 399: 1.000601e-5},
        ),
        (
            "vibid_base_p16",
            4e-5 * 4096 / 512,
            {0: 1e-6, 1: 6.48e-5, 5: 3.198805e-4, 200: 1.65e-4, 399: 1.000478e-5},
        ),
        ("vibid_medium_p16_384", 0.01, {0: 0.01, 1: 9.755283e-3, 5: 5e-3, 9: 2.447174e-4}),
        ("eamlp_7", 1e-3, {0: 1e-6, 1: 2.008e-4, 5: 9.993216e-4, 150: 5.05e-4, 299: 1.002714e-5}),
        ("aft_full_small_p16", 1e-3, {0: 1e-6, 1: 2.008e-4, 5: 9.993216e-4, 150: 5.05e-4, 299: 1.002714e-5}),
        (
            "aft_conv_base_p16_k25_h32",
            5e-4 * 64 / 512,
            {0: 1e-6, 1: 1.33e-5, 5: 6.217682e-5, 50: 3.625e-5, 99: 1.001295e-5},
        ),
    ],
)
def test_the_learning_rate_is_the_source_s(name, peak, rates):
    recipe = recipes.recipe(name)
    assert recipe.lr() == pytest.approx(peak)
    assert recipe.optim.per == "epoch"
    assert max(rates) == recipe.epochs - 1
    assert rates_of(recipe, 1251, rates) == pytest.approx(list(rates.values()), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "updates", "rates"),
    [
        # 14 epochs of 28 updates, the warm-up over 39 of them; as in `sansmax compare`.
        ("digits_sima", 28, {0: 2e-5, 39: 1.951551e-3, 196: 1e-3, 391: 3.211407e-8}),
        ("cifar10_sima", 97, {0: 1e-6, 485: 9.939057e-4, 4850: 5.05e-4, 9699: 1.0000026e-5}),
    ],
)
def test_small_runs_change_the_rate_at_every_update(name, updates, rates):
    assert rates_of(recipes.recipe(name), updates, rates) == pytest.approx(list(rates.values()), rel=1e-6)


def rates_of(recipe, updates, steps):
    """The rate in epoch (per="epoch") or update (per="update") `step`, with `updates` an epoch."""
    optimizer = optim.optimizer(torch.nn.Linear(2, 3), recipe)
    schedule = optim.schedule(optimizer, recipe, updates)
    rates = []
    for step in steps:
        schedule.step(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_names_are_unique_and_an_unknown_one_has_a_nearest():
    assert len(NAMES) == len(set(NAMES))
    with pytest.raises(ValueError, match=r"in recipes: .*did you mean 'sima_xcit_small_12_p16'\?"):
        recipes.recipe("sima_xcit_smal_12_p16")
    with pytest.raises(ValueError, match="unknown name 'digits' in recipes"):
        recipes.describe("digits")
    assert recipes.recipe("soft-norm-tiny") == recipes.recipe("soft_norm_tiny")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_right_and_comes_back_from_json(name):
    recipe = recipes.recipe(name)
    assert recipe.checked() is recipe
    assert read_recipe({"task": recipe.task, "recipe": recipe.to_json()}) == recipe
    assert name not in IMAGES or timm.is_model(recipe.model)


def test_every_classification_network_has_a_recipe():
    wanted = {name for name in models.networks() if not name.startswith(("eanet_", "pct_"))}
    wanted |= {f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
    chosen = [recipes.recipe(name).model for name in IMAGES if not name.startswith(("cifar10_", "digits_"))]
    assert set(chosen) == wanted
    finetuned = [name for name in IMAGES if name.endswith(("_384", "_512", "_768"))]
    assert len(chosen) == len(wanted) + len(finetuned)
    assert len(finetuned) == 3 * 10


@pytest.mark.parametrize("family", ["cifar10", "digits"])
def test_every_mechanism_has_a_small_run_whose_network_can_be_built(family):
    for mechanism in layers.mechanisms():
        recipe = recipes.recipe(f"{family}_{mechanism}")
        assert recipe.mechanism == mechanism
        net = create_model(
            recipe.model,
            recipe.mechanism,
            img_size=recipe.img_size,
            in_chans=2,
            num_classes=3,
            drop_path_rate=recipe.drop_path,
            **recipe.model_args,
        )
        assert net(torch.zeros(1, 2, recipe.img_size, recipe.img_size)).shape == (1, 3)
    assert sum(name.startswith(f"{family}_") for name in IMAGES) == len(layers.mechanisms())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_docstring_holds_a_command_its_cost_and_its_number(family):
    module = _find.load("sansmax.recipes", family)
    public = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
    own = [name for name in public if getattr(module, name).__module__ == module.__name__]
    assert own == module.__all__ == [family]
    name = next(iter(module.RUNS))
    text = recipes.describe(name)
    assert text.splitlines()[0] == text.splitlines()[0].strip()
    assert "\nCost: " in text
    assert "\nTo reach: " in text
    found = commands(name)
    assert found
    for _, _, run, *flags in found:
        assert run in module.RUNS
        chosen = recipes.recipe(run)
        tyro.cli(type(chosen), default=chosen, args=flags, config=(tyro.conf.FlagCreatePairsOff,))


def test_fine_tuning_asks_for_weights():
    (words,) = commands("xvit_u_p16_768")
    assert "--weights" in words
    assert "`--weights` must be given" in recipes.describe("vibid_base_p16_384")


def test_a_recipe_is_nobody_s_to_change():
    first = recipes.recipe("digits_sima")
    first.model_args["depth"] = 1
    assert "depth" not in recipes.recipe("digits_sima").model_args
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.epochs = 1


def test_the_names_are_listed_without_the_networks():
    code = "import sys; from sansmax import recipes; print([recipes.names(), 'timm' in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(run.stdout) == [NAMES, False]
    assert run.stderr == ""
