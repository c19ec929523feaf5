"""Trains one small network with every mechanism on the same images; what each reaches and costs."""

import sys


def main(
    data: str = "digits",
    mechanisms: tuple[str, ...] = (),
    trunk: str = "vit_mini",
    epochs: int | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
    batch_size: int = 48,
    lr: float = 2e-3,
    seeds: tuple[int, ...] = (1,),
    device: str = "auto",
    out: str = "sansmax-compare",
    sweep: bool = True,
) -> int:
    """Trains one small network with every mechanism on the same images, evaluates and measures it.

    Writes OUT/results.json and OUT/report.html and prints the table. After an interruption the same command
    continues with the next mechanism.

    Args:
        data: digits (scikit-learn's, no download) or the path of an image folder, laid out as
            FOLDER/<class>/*.jpg or FOLDER/train/<class>/*.jpg with FOLDER/val/<class>/*.jpg.
        mechanisms: names from `sansmax list` (default: all); softmax, the yardstick, is always among them.
        trunk: vit_mini or a Vision Transformer of timm, such as vit_tiny_patch16_224.
        epochs: passes over the training images (default: 14 for digits, 30 for a folder).
        img_size: side of the square images (default: 8 for digits, 64 for a folder).
        patch_size: side of a patch (default for vit_mini: 2 for digits, 8 for a folder).
        batch_size: images an update.
        lr: highest learning rate.
        seeds: how many seeds (3 stands for 0 1 2), or several seeds themselves.
        device: auto, cpu or cuda.
        out: folder of the results.
        sweep: also measure latency and memory against the number of tokens.
    """
    from rich.console import Console

    from sansmax.bench.report import table
    from sansmax.train.compare import CompareConfig, compare

    if len(seeds) == 1:
        if seeds[0] < 1:
            raise ValueError(f"seeds: expected a count of at least 1, got {seeds[0]}; leave it out if unsure")
        seeds = tuple(range(seeds[0]))
    config = CompareConfig(
        data, mechanisms, trunk, epochs, img_size, patch_size, batch_size, lr, seeds, device, out, sweep
    )
    try:
        results = compare(config, Console(stderr=True))
    except KeyboardInterrupt as stop:
        print(f"sansmax: {stop}", file=sys.stderr)
        return 130
    console = Console()
    console.print(table(results))
    console.print(
        f"{out}/report.html shows it with plots and pictures", highlight=False, markup=False, soft_wrap=True
    )
    return 0
