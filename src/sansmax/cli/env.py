"""What a bug report needs: versions, processor, GPU, commit."""

import json as json_module


def main(json: bool = False) -> None:
    """Prints the versions and the machine that sansmax runs on.

    Args:
        json: print one JSON object instead of a table.
    """
    from sansmax.bench.measure import commit, machine, versions

    found = {**versions(), "commit": commit(), **machine()}
    if json:
        print(json_module.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), "-" if value is None else str(value))
    Console().print(table)
