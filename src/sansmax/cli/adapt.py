"""Replaces softmax attention in a trained network, lets it learn again, and writes a receipt."""

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Sequence
from typing import Any


def run(arguments: Sequence[str]) -> int:
    """sansmax adapt NETWORK MECHANISM [--flag value ...]: another attention in a network that is trained.

    NETWORK is a run folder, a .safetensors file, name=checkpoint, or a name of timm with weights; MECHANISM
    is one that `sansmax list` knows. Every new layer learns from the old one; then the whole network learns
    from the original, as `sansmax train` would with the same flags, which begin as NETWORK's own run had
    them. OUT holds that run, receipt.json and receipt.md: errors of the layers, accuracy before and after,
    speed and memory, and which layers are worth keeping.
    """
    import tyro
    from rich.console import Console

    from ..layers import mechanism
    from ..train.adapt import Adapt, adapt, recipe_of
    from ..train.guard import Interrupted
    from ..train.network import load_network
    from ..train.receipt import markdown
    from ..train.recipe import Recipe

    named = [a for a in arguments[:2] if not a.startswith("-")]
    if len(named) == 1:
        raise ValueError(
            f"mechanism: expected a network and a mechanism, got {named[0]} alone; add one that "
            "`sansmax list` knows, such as sima"
        )
    what, kind = named or ("NETWORK", "MECHANISM")
    base: Any = Recipe()
    if named:
        mechanism(kind)
        base = recipe_of(load_network(what), what)
    elif not {"-h", "--help"} & set(arguments):
        raise ValueError(
            "network: expected a network and a mechanism, got none; write `sansmax adapt RUN sima`, and see "
            "`sansmax adapt --help`"
        )

    @dataclasses.dataclass(frozen=True)
    class Flags(Adapt, Recipe):
        """Of two fields `keep`, the first is meant; of states the run keeps its usual number."""

        model: tyro.conf.Fixed[str] = ""
        mechanism: tyro.conf.Fixed[str | None] = None
        model_args: tyro.conf.Fixed[dict[str, Any]] = dataclasses.field(default_factory=dict)
        weights: tyro.conf.Fixed[str] = ""

    chosen = tyro.cli(
        Flags,
        default=Flags(**vars(base) | vars(Adapt())),
        args=arguments[len(named) :],
        prog=f"sansmax adapt {what} {kind}",
        description=inspect.getdoc(run),
    )
    how = Adapt(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Adapt)})
    own = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(Recipe)}
    following = Recipe(**own | {"keep": base.keep})
    command = shlex.join(["sansmax", "adapt", *arguments])
    try:
        receipt = adapt(what, kind, how, following, Console(stderr=True), command)
    except Interrupted as stop:
        print(f"sansmax: {stop}", file=sys.stderr)
        return 143 if str(stop).startswith("interrupted by SIGTERM") else 130
    print(markdown(receipt), end="")
    return 0
