"""`dpfast predict`: label maps of images, by the model of a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

__all__ = ["predict"]


def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    images: Annotated[
        list[Path], typer.Argument(help="Files, folders of files, or folders of patients.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the label maps.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    site: Annotated[
        str | None, typer.Option(help="Whose sizes, where sites measured their own.")
    ] = None,
) -> None:
    """Write a label map for each image: NIfTI with the image's header, or PNG.

    The classes have the values that the training's label maps had. A label map that is there
    already is not replaced.
    """
    try:
        # Here, since the packages of the extra may be missing.
        from dpfast.segmentation.prediction import find_images, write_prediction
        from dpfast.segmentation.prediction import predict as predict_image

        task, model, morphology, data_format = _load(run, device, site)
        found = find_images(images, task.spatial_dims, data_format)
        output.mkdir(parents=True, exist_ok=True)
        for image in track(found, "predicting", console=Console(stderr=True), transient=True):
            classes = predict_image(
                model, task, image.source, name=image.name, morphology=morphology
            )
            print(write_prediction(output, image, classes, task))
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        print(f"dpfast predict: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _load(run: Path, device: str, site: str | None) -> tuple[Any, Any, Any, Any]:
    """Task, model, morphology and the data's format."""
    import torch

    from dpfast.segmentation.data_settings import PublicData
    from dpfast.segmentation.formats import FORMATS
    from dpfast.segmentation.models import build_model
    from dpfast.segmentation.run_morphology import RunMorphology
    from dpfast.segmentation.task import SegmentationTask
    from dpfast.segmentation.training import pick_device

    for name in ("settings.toml", "report.json", "model.pt"):
        if not (run / name).is_file():
            raise ValueError(f"{run} must be the folder of a finished run, got no {name} in it")
    settings = _settings(run / "settings.toml")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    try:
        task = SegmentationTask.from_dict(report["task"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run / 'report.json'} must say what the task was, got {error}") from None
    chosen = settings.model
    model = build_model(chosen.name, task, chosen.arguments, weights_seed=chosen.weights_seed)
    model.load_state_dict(torch.load(run / "model.pt", map_location="cpu", weights_only=True))
    about = report["morphology"]
    if "sites" in about:
        if site not in about["sites"]:
            raise ValueError(
                f"--site must name one of {', '.join(about['sites']) or 'no site'}: each has "
                f"measured its own sizes, got {site!r}"
            )
        about = about["sites"][site]
    elif site is not None:
        raise ValueError(f"--site has no effect on {run}, where all sites do the same")
    morphology = RunMorphology.from_report(about, task.num_classes)
    data = settings.data
    data_format = FORMATS[data.kind] if isinstance(data, PublicData) else None
    return task, model.to(pick_device(device)), morphology, data_format


def _settings(file: Path) -> Any:
    """Of either kind of run."""
    text = file.read_text(encoding="utf-8")
    if any(line.strip() == "[federation]" for line in text.splitlines()):
        from dpfast.federated.settings import load_federated_settings

        return load_federated_settings(file)
    from dpfast.segmentation.settings import load_settings

    return load_settings(file)
