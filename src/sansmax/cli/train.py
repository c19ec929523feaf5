"""Trains a network on images, or for another task: a recipe or your own settings; resumes exactly."""

import sys
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """sansmax train [RECIPE] [--field value ...]: RECIPE is a name that `sansmax train --recipes` lists.

    Every field of the recipe is a flag; its value there is the default. `sansmax train RECIPE --help` shows
    them, with what the recipe costs and should reach.
    """
    import tyro
    from accelerate import PartialState
    from rich.console import Console

    from .. import recipes
    from ..train.guard import Interrupted
    from ..train.recipe import Recipe
    from ..train.run import run

    if arguments[:1] == ["--recipes"]:
        print("\n".join(recipes.names()))
        return 0
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    base = recipes.recipe(name) if name else Recipe()
    about = recipes.describe(name) if name else (run.__doc__ or "")
    chosen = tyro.cli(
        type(base),
        default=base,
        args=arguments[1:] if name else arguments,
        prog=f"sansmax train{f' {name}' if name else ' [RECIPE]'}",
        description=about,
    )
    try:
        outcome = run(chosen, Console(stderr=True), chosen.command(name, base))
    except Interrupted as stop:
        print(f"sansmax: {stop}", file=sys.stderr)
        return 143 if str(stop).startswith("interrupted by SIGTERM") else 130
    if PartialState().is_main_process:
        print(f"{chosen.out}: {outcome.words}")
    return 0
