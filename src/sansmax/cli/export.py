"""A trained network as ONNX, torch.export program and 8 bits, checked, with a card."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..train.recipe import Data

NO_DATA = Data(root="", split="validation")


def main(
    what: Annotated[str, tyro.conf.Positional],
    /,
    out: Path | None = None,
    web: Path | None = None,
    beside: str = "",
    format: Literal["onnx", "program", "both"] = "both",
    img_size: tuple[int, ...] = (),
    opset: int | None = None,
    optimize: bool = True,
    untrained: bool = False,
    require_exp_free: bool = False,
    int8: bool = False,
    calibration: str = "",
    calibration_images: int = 128,
    int8_method: Literal["minmax", "entropy", "percentile"] = "minmax",
    int8_keep: tuple[Literal["products", "sums", "head"], ...] = ("products", "sums"),
    data: Data = NO_DATA,
    latency: float = 4.0,
) -> None:
    """Writes WHAT as graphs into the new folder OUT, with a model card; nothing is kept that differs from
    PyTorch. With --web instead, a page that runs it in a browser.

    Of a run of characters or pixels it is one step, with the state as inputs and outputs.

    Args:
        what: a run folder, a .safetensors file, name=checkpoint, or a name of timm with weights.
        out: a folder that does not exist yet, for model.onnx, model.pt2, model.int8.onnx, README.md and
            report.json.
        web: a folder that does not exist yet, for a page to be served by any web server, as python -m
            http.server does.
        beside: with --web, a trained network with softmax for the comparison (default: the same network with
            softmax, for its time alone).
        format: onnx, program (torch.export) or both.
        img_size: sides of the images; the first is traced, and all are checked and timed (default: the one
            the network was trained with).
        opset: of ONNX, 18 to 23 (default: PyTorch's).
        optimize: fold BatchNorm and LayerScale into the weights beside them.
        untrained: WHAT is a name, and the weights are random.
        require_exp_free: refuse a graph that has an exponential or a softmax.
        int8: a graph in 8 bits too; needs calibration.
        calibration: an image, a folder with all below it, a .tar or shards, of the kind that the network will
            see.
        calibration_images: how many of them at most, equally far apart.
        int8_method: how the range of an activation is chosen.
        int8_keep: what stays in float: products of two activations, sums of two, the head.
        data: labelled images, on which accuracy is measured before and after; with --int8 an empty root
            stands for the held-out images of the run.
        latency: seconds of measurement at each size; 0 for none.
    """
    from ..export import export_model
    from ..train.trained import module_of

    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise ValueError(
                f"export: expected {package} to be installed, got {error}; pip install sansmax[onnx]"
            ) from None
    if (out is None) == (web is None) or (beside and web is None):
        raise ValueError(
            "out, web: expected a folder for graphs or one for a page, and --beside with a page alone, got "
            f"{'both' if out and web else 'another choice'}; give --out FOLDER or --web FOLDER"
        )
    if web is not None:
        told = _page(what, web, beside, untrained)
        print(told)
        return
    assert out is not None
    if min((1, *img_size)) < 1 or calibration_images < 1 or latency < 0:
        raise ValueError(
            "img_size, calibration_images, latency: expected numbers above 0; leave them out if unsure"
        )
    if int8 != bool(calibration):
        raise ValueError(
            f"int8: expected --int8 and --calibration together, got {'one' if int8 else 'the other'} alone; "
            "give both or none"
        )
    sizes = [(side, side) for side in img_size]
    words: dict[str, Any] = {}
    if module_of(what):
        if int8 or data.root:
            raise ValueError(
                f"int8, data.root: expected a network that classifies images, got a run of another task at "
                f"{what}; leave them out"
            )
        model, about = _of_run(what, sizes)
    else:
        model, about, words = _of_network(
            what, sizes, untrained, calibration, calibration_images, int8_method, int8_keep, data
        )
    report = export_model(
        model,
        out,
        format=format,
        img_size=sizes,
        opset=opset,
        optimize=optimize,
        require_exp_free=require_exp_free,
        latency=latency,
        about=about,
        **words,
    )
    for line in _told(out, report):
        print(line)


def _page(what: str, web: Path, beside: str, untrained: bool) -> str:
    from functools import partial

    from ..export.web import Shown, export_web, free_size
    from ..train.network import Network, build, load_network

    def shown(network: Network) -> Shown:
        made = partial(
            build,
            network.made["model"],
            network.made["mechanism"],
            img_size=network.img_size,
            num_classes=network.num_classes,
            in_chans=network.in_chans,
            **network.made["model_args"],
        )
        model = free_size(network.model, made)
        labels = network.labels() if network.num_classes else []
        return Shown(model, network.name, labels, network.img_size, network.crop, network.mean, network.std)

    given = load_network(what, untrained=untrained)
    if not given.num_classes:
        raise ValueError(
            f"web: expected a network with classes, got {given.name}, which has none; give another"
        )
    about = export_web(shown(given), web, shown(load_network(beside)) if beside else None)
    sizes = about["main"]["sizes"]
    some = f"{sizes[0]} to {sizes[-1]} px" if len(sizes) > 1 else f"{sizes[0]} px alone"
    reason = about["main"].get("why_no_map", "")
    return (
        f"{web}: {given.name} at {some}{f'; no attention map, because {reason}' if reason else ''}; "
        f"python -m http.server -d {web}"
    )


def _of_run(what: str, sizes: list[tuple[int, int]]) -> tuple[Any, dict[str, Any]]:
    from ..export import of_run
    from ..train.trained import load_trained

    return of_run(load_trained(what), sizes[0] if sizes else None)


def _of_network(
    what: str,
    sizes: list[tuple[int, int]],
    untrained: bool,
    calibration: str,
    most: int,
    method: str,
    keep: tuple[str, ...],
    data: Data,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A classifier: what is exported, what is told of it, and further words of export_model."""
    from ..export import Int8, images
    from ..train.evaluate import evaluate, open_labelled
    from ..train.network import load_network
    from ..train.predict import some_inputs

    network = load_network(what, img_size=sizes[0][0] if sizes else None, untrained=untrained)
    side = network.img_size
    about = {
        "name": network.name,
        "task": "classification",
        "classes": network.labels() if network.num_classes else [],
        "weights": "random" if untrained else network.fingerprint,
        "preprocessing": {
            "size": f"the shorter side to {int(side / network.crop)} pixels, then the centre {side} x {side}",
            "crop": network.crop,
            "interpolation": network.interpolation,
            "channels": "red, green, blue" if network.in_chans == 3 else "grey",
            "values": "from 0 to 1, then (value - mean) / std",
            "mean": network.mean,
            "std": network.std,
        },
    }
    words: dict[str, Any] = {}
    if calibration:
        inputs, skipped = some_inputs(network, calibration, most)
        words["int8"] = Int8(inputs, method, keep, skipped)
    if data.root or (calibration and (Path(what).expanduser() / "recipe.json").is_file()):
        data, split = open_labelled(what, data, network)

        def measured(module: Any) -> dict[str, Any]:
            found = evaluate(network.with_outputs_of(module), split, workers=data.workers or 0, device="cpu")
            return {key: found[key] for key in ("images", "top1", "top5", "loss") if found[key] is not None}

        words["evaluate"] = measured
    return images(network.model, network.in_chans, (side, side)), about, words


def _told(out: Path, report: dict[str, Any]) -> list[str]:
    """What the command prints."""
    lines = [
        f"{out}: {report['about']['name']}, {', '.join(report['bytes'])}; free: {', '.join(report['free'])}"
    ]
    for graph, found in report["exponentials"].items():
        some = ", ".join(f"{n} {name}" for name, n in found.items())
        total = sum(report["operators"][graph].values())
        lines.append(f"{graph}: {total} operators, {some or 'no exponential, no softmax'}")
    worst = max(report["differences"], key=lambda row: row["error"] / row["budget"])
    if skipped := (report["int8"] or {}).get("skipped"):
        lines.append(f"calibration: {len(skipped)} unreadable images, listed in {out / 'report.json'}")
    lines.append(
        f"largest error {worst['error']:.1e} of the largest output, PyTorch's own {worst['pytorch']:.1e}, "
        f"allowed {worst['budget']:.1e}"
    )
    for name, found in report["accuracy"].items():
        lines.append(f"{name}: top-1 {100 * found['top1']:.2f} % of {found['images']:,} images")
    for row in report["latency"]:
        size = "x".join(map(str, row["size"])) or "one token"
        times = ", ".join(f"{name} {one['median']:.3g}" for name, one in row["milliseconds"].items())
        lines.append(f"milliseconds, {size}, threads {row['threads']}: {times}")
    return lines
