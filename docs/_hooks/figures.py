"""Measured rows, read from benchmarks/results when the site is built, so that a page cannot drift from them.

A page says `<!-- figures: KIND NAME ... -->`; the names are operators, mechanisms or networks.
"""

import json
import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError

RESULTS = "benchmarks/results"
MARK = re.compile(r"^<!-- figures: (.*?) -->$", re.MULTILINE)


def on_page_markdown(markdown, page, config, files):
    results = Path(config.config_file_path).parent / RESULTS
    depth = os.path.relpath(RESULTS, Path("docs", page.file.src_uri).parent)
    return MARK.sub(lambda mark: table(mark[1], results, depth), markdown)


def table(words, results, link=RESULTS):
    """The rows of `KIND NAME ...`, and where they come from."""
    kind, *names = words.split()
    if kind not in KINDS:
        raise PluginError(f"figures: expected one of {', '.join(KINDS)}, got {kind}; name one")
    name, head, rows_of = KINDS[kind]
    found = json.loads((results / name).read_text(encoding="utf-8"))
    rows, missing = [], [*names]
    for row_name, cells in rows_of(found):
        if row_name in names:
            rows.append(cells)
            missing = [n for n in missing if n != row_name]
    if missing or not names:
        has = ", ".join(sorted({row_name for row_name, _ in rows_of(found)}))
        raise PluginError(f"figures: expected names of {has}, got {words}; {RESULTS}/{name} lacks them")
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    # An absolute path is one of the machine that measured.
    words = [Path(word).name if word.startswith("/") else word for word in found.get("command", [])]
    command = f", `{' '.join(words)}`" if words else ""
    machine, commit = found["machine"], found["commit"][:7]
    source = (
        f"{machine['cores']} cores of an {machine['cpu']}, threads: {machine['torch_threads']}, "
        f"PyTorch {found['versions']['torch']}, commit {commit}{command}: [{name}]({link}/{name})"
    )
    return "\n".join(["| " + " | ".join(map(str, line)) + " |" for line in lines]) + f"\n\n{source}\n"


def short(x):
    """Three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def times(speedup):
    return (
        f"{short(speedup['median'])} ({short(speedup['low'])} to {short(speedup['high'])})" if speedup else ""
    )


def operators(found):
    for row in found["rows"]:
        own = row["forms"]["sansmax"]
        yield (
            row["op"],
            [
                f"`{row['op']}`",
                f"{row['tokens']:,}",
                row["pass"],
                short(own["median_ms"]),
                times(row["speedup"].get("published")),
                times(row["speedup"].get("sdpa")),
                short(own["peak_mb"]),
                f"{row['error']:.1e}",
            ],
        )


def networks(found):
    for row in found["rows"]:
        sizes = [short(form["median_ms"]) for form in row["forms"].values()]
        yield row["network"], [f"`{row['network']}`", row["img_size"], *sizes]


def digits(found):
    for name, row in found["mechanisms"].items():
        longest = row["sweep"][-1]
        begins = "" if name == "softmax" else row["crossover_tokens"] or "never"
        yield (
            name,
            [
                f"`{name}`",
                f"{row['accuracy']['mean']:.1f}",
                f"{row['images_per_s']:,.0f}",
                short(row["latency_ms"]["median"]),
                f"{short(longest['latency_ms'])} at {longest['tokens']:,}",
                "64 or fewer" if begins == 64 else begins,
            ],
        )


def cifar10(found):
    for name, row in found["rows"].items():
        sizes = [f"{100 * row['sizes'][size]:.1f}" for size in ("48", "64")]
        yield (
            name.partition(",")[0],
            [
                f"{name}",
                f"{100 * row['top1']:.1f}",
                *sizes,
                f"{row.get('lr', found['recipe']['optim']['lr']):g}",
            ],
        )


def decode(found):
    for name, row in found["rows"].items():
        yield name.partition(",")[0], [name, *(short(row[n]["median"]) for n in ("100", "10000", "100000"))]


OPERATORS = [
    "operator",
    "tokens",
    "pass",
    "ms",
    "times the published form",
    "times SDPA",
    "peak MB",
    "error against float64",
]
KINDS = {
    "ops": ("ops-cpu.json", OPERATORS, operators),
    "causal": ("ops-causal-cpu.json", OPERATORS, operators),
    "networks": (
        "networks-cpu.json",
        ["network", "px", "ms", "`deit_small_patch16_224`, ms", "`xcit_small_12_p16_224`, ms"],
        networks,
    ),
    "digits": (
        "compare-digits-cpu.json",
        [
            "mechanism",
            "accuracy %",
            "training images/s",
            "network, ms",
            "one layer, ms",
            "faster from, tokens",
        ],
        digits,
    ),
    "cifar10": ("cifar10-cpu.json", ["network", "top-1 %", "48 px", "64 px", "learning rate"], cifar10),
    "decode": (
        "decode-cpu.json",
        ["operator", "ms a token after 100", "after 10,000", "after 100,000"],
        decode,
    ),
}
