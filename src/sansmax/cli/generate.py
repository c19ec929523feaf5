"""Samples of a trained network that makes some: text, pictures."""

import functools
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """sansmax generate RUN [--flag value ...]: the flags are those of the run's task."""
    import tyro

    from .. import _find, tasks
    from ..train.trained import load_trained, module_of

    what = next(iter(arguments), "")
    if what in ("", "-h", "--help"):
        print("usage: sansmax generate RUN [--flag value ...]\n\nRUN --help lists the flags of its task.")
        return 0
    module = module_of(what)
    if module is None or not hasattr(module, "generate"):
        names = _find.names(tasks.__name__)
        makers = [name for name in names if hasattr(_find.load(tasks.__name__, name), "generate")]
        raise ValueError(
            f"network: expected a run of {' or '.join(makers)}, which generate samples, got {what}; give the "
            "folder of such a run"
        )
    function = functools.partial(module.generate, load_trained(what))
    tyro.cli(
        function, args=arguments[1:], prog=f"sansmax generate {what}", config=(tyro.conf.FlagCreatePairsOff,)
    )
    return 0
