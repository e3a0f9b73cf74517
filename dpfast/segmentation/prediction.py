"""Predicted label maps of images, in the geometry of their files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.formats import Format
from dpfast.segmentation.reading import read_image
from dpfast.segmentation.records import IMAGE_SUFFIXES, NIFTI_SUFFIXES, ImageSource
from dpfast.segmentation.run_folder import write_atomically
from dpfast.segmentation.run_morphology import RunMorphology
from dpfast.segmentation.task import SegmentationTask

__all__ = ["ImageFiles", "find_images", "predict", "write_prediction"]

_OVERLAP = 0.5
_WHITE = 255


@dataclass(frozen=True)
class ImageFiles:
    """An image to be predicted.

    Attributes:
      name: of what is written.
      files: one, or one for each channel.
    """

    name: str
    files: tuple[Path, ...]

    @property
    def source(self) -> ImageSource:
        """As a record has it."""
        return self.files[0] if len(self.files) == 1 else self.files


def find_images(
    paths: Iterable[Path], spatial_dims: int, data_format: Format | None = None
) -> list[ImageFiles]:
    """Images by their files or folders.

    Args:
      paths: files, folders of files, and where the format has a folder for each patient, such
        folders or a folder of them.
      spatial_dims: 2: pictures; 3: NIfTI volumes.
      data_format: of the data that the model was trained on.

    Raises:
      ValueError: a path without an image, or two images of one name.
    """
    function = "find_images"
    suffixes: Sequence[str] = IMAGE_SUFFIXES if spatial_dims == 2 else NIFTI_SUFFIXES
    found: dict[str, ImageFiles] = {}
    for path in paths:
        for each in _images_of(path, suffixes, data_format):
            if each.name in found:
                raise ValueError(
                    f"{function}: images must have names of their own, got {each.files[0]} and "
                    f"{found[each.name].files[0]}"
                )
            found[each.name] = each
    if not found:
        raise ValueError(f"{function}: paths must name an image, got none")
    return list(found.values())


def _images_of(path: Path, suffixes: Sequence[str], data_format: Format | None) -> list[ImageFiles]:
    function = "find_images"
    if not path.is_dir():
        if not path.is_file() or _stem(path, suffixes) is None:
            raise ValueError(
                f"{function}: {path} must be a file that ends in {', '.join(suffixes)}, or a folder"
            )
        return [ImageFiles(str(_stem(path, suffixes)), (path,))]
    if data_format is not None and data_format.case_files:
        own = data_format.case_image(path)
        if own is not None:
            return [ImageFiles(path.name, own)]
        cases = [each for each in sorted(path.iterdir()) if each.is_dir()]
        images = [(case.name, data_format.case_image(case)) for case in cases]
        whole = [ImageFiles(name, files) for name, files in images if files is not None]
        if whole:
            return whole
    files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    named = [(file, _stem(file, suffixes)) for file in files if file.is_file()]
    single = [ImageFiles(stem, (file,)) for file, stem in named if stem is not None]
    if not single:
        raise ValueError(f"{function}: {path} must hold images, {', '.join(suffixes)}, got none")
    return single


def _stem(file: Path, suffixes: Sequence[str]) -> str | None:
    suffix = next((each for each in suffixes if file.name.lower().endswith(each)), None)
    return None if suffix is None else file.name[: -len(suffix)]


def predict(
    model: nn.Module,
    task: SegmentationTask,
    source: ImageSource,
    *,
    name: str = "image",
    morphology: RunMorphology | None = None,
) -> NDArray[np.int64]:
    """Predict an image's label map.

    The image is made ready as in training, except that fit "crop_or_pad" crops nothing: windows of
    the task's size slide over it, half a window at a time. The classes' probabilities are brought
    back to the image's own grid, linearly, and the largest wins. What lies outside of what the
    network saw is background.

    Args:
      model: on its device; is used as in evaluation.
      task: that it was trained for.
      source: as a record has it.
      name: of the image, for messages.
      morphology: of the run that trained the model; it is applied on the task's grid.

    Returns:
      Class numbers, of the image's shape (*spatial,).

    Raises:
      ValueError: the image cannot be read or does not fit the task.
    """
    with needs_extra("predict"):
        from monai.data.meta_tensor import MetaTensor
        from monai.inferers.utils import sliding_window_inference
        from monai.transforms.compose import Compose
        from monai.transforms.utils import convert_applied_interp_mode
    preparation: Any = Compose(task.preparation(("image",), crop=False))
    image = read_image(task, source, name)
    prepared: Any = preparation({"image": MetaTensor(image)})["image"]
    device = next(model.parameters()).device
    batch = prepared.as_tensor()[None].to(device, torch.float32)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if task.fit == "crop_or_pad":
                scores: Any = sliding_window_inference(
                    batch, task.image_size, 1, model, overlap=_OVERLAP, mode="gaussian"
                )
            else:
                scores = model(batch)
    finally:
        model.train(was_training)
    probabilities: Any = MetaTensor(_probabilities(scores.float(), morphology), meta=prepared.meta)
    linear = "bilinear" if task.spatial_dims == 2 else "trilinear"
    probabilities.applied_operations = convert_applied_interp_mode(
        prepared.applied_operations, mode=linear, align_corners=False
    )
    if prepared.applied_operations:
        probabilities = preparation.inverse({"image": probabilities})["image"]
    classes = probabilities.as_tensor().argmax(0)
    found: NDArray[np.int64] = classes.numpy().astype(np.int64)
    return found


def _probabilities(scores: torch.Tensor, morphology: RunMorphology | None) -> torch.Tensor:
    """Of each class at each place, on the CPU; 0 or 1 where class maps are what is refined."""
    if morphology is None or morphology.at_prediction != "class_maps":
        changed = scores if morphology is None else morphology.scores(scores)
        return changed[0].softmax(0).cpu()
    classes = morphology.class_maps(scores)[0, 0].cpu()
    return torch.nn.functional.one_hot(classes, scores.shape[1]).movedim(-1, 0).float()


def write_prediction(
    folder: Path, image: ImageFiles, classes: NDArray[np.int64], task: SegmentationTask
) -> Path:
    """Write a label map: a volume as NIfTI with its image's header and affine, a picture as PNG.

    It has the values that the training's label maps have; where those are masks, 255 is class 1.

    Args:
      folder: for `NAME.nii.gz` or `NAME.png`; it must be there.
      image: where the header is.
      classes: of the image's own shape.
      task: what the classes are.

    Returns:
      The file.

    Raises:
      ValueError: a file of that name is there already.
    """
    values = (0, _WHITE) if task.labels == "foreground" else task.class_values
    kind = np.uint8 if min(values) >= 0 and max(values) <= np.iinfo(np.uint8).max else np.int32
    label = np.asarray(values, dtype=kind)[classes]
    path = folder / f"{image.name}{'.png' if task.spatial_dims == 2 else '.nii.gz'}"
    if path.exists():
        raise ValueError(f"write_prediction: {path} must not be there yet")
    if task.spatial_dims == 2:
        with needs_extra("write_prediction"):
            from PIL import Image
        picture = Image.fromarray(label)
        write_atomically(path, lambda file: picture.save(file, format="PNG"))
        return path
    with needs_extra("write_prediction"):
        import gzip

        import nibabel
    original: Any = nibabel.load(image.files[0])
    header = original.header.copy()
    header.set_data_dtype(kind)
    header.set_slope_inter(1.0, 0.0)
    header["cal_min"] = header["cal_max"] = 0.0  # of the image's intensities
    make: Any = nibabel.Nifti1Image
    volume = make(label, original.affine, header)
    content = gzip.compress(volume.to_bytes(), mtime=0)
    write_atomically(path, lambda file: file.write(content))
    return path
