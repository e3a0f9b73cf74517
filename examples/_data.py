"""Images and label maps of one fixed size, from a folder or made as phantoms.

Nothing is learnt from the data set as a whole: every image is resized or cropped,
inverted and scaled by rules that look at that image alone, and a record goes to the
training or the validation part by a hash of its own name. Adding or removing one
record therefore changes no other record.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

IMAGE_SIZE = (96, 96)
VOLUME_SIZE = (32, 48, 32)
PHANTOM_SIZES = {2: (64, 64), 3: (24, 24, 24)}
VALIDATION_SHARE = 5  # one record in five is held out

FloatArray = NDArray[np.float32]
LabelArray = NDArray[np.int64]


@dataclass(frozen=True)
class Record:
    """One privacy unit: an image and its label map, both of shape (*spatial,)."""

    name: str
    image: FloatArray
    label: LabelArray


@dataclass(frozen=True)
class SegmentationData:
    """Training and held-out records, stacked.

    Attributes:
      images, validation_images: float32, shape (N, 1, *spatial).
      labels, validation_labels: int64, shape (N, *spatial), 0 = background.
      num_classes: background included.
      privacy_unit: what one record is.
    """

    name: str
    privacy_unit: str
    num_classes: int
    images: Tensor
    labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor

    @property
    def num_records(self) -> int:
        """Number of training records, a public figure."""
        return self.images.shape[0]


def load_folder(path: Path, dims: int) -> SegmentationData:
    """Read a data set folder: microscopy images (dims=2) or MR volumes (dims=3).

    Args:
      path: for dims=2 `images/*.png` and `masks/*.png` of the same names, any value
        above 0 being foreground; for dims=3 `images/*.nii.gz` and `labels/*.nii.gz`
        with the classes 0, 1, 2 and one file per subject.
      dims: 2 or 3.

    Raises:
      ValueError: no such folder, no images, a missing or unreadable file, a wrong label.
    """
    if not path.is_dir():
        raise ValueError(f"--data must be a folder, got {path}")
    labels, pattern = ("masks", "*.png") if dims == 2 else ("labels", "*.nii.gz")
    files = sorted((path / "images").glob(pattern))
    if not files:
        raise ValueError(f"--data must hold images/{pattern} with --dims {dims}, got {path}")
    for file in files:
        if not (path / labels / file.name).is_file():
            raise ValueError(f"--data must hold {labels}/{file.name}, got none in {path}")
    read = _read_micrograph if dims == 2 else _read_volume
    return _split(
        path.resolve().name,
        "one image" if dims == 2 else "one subject",
        2 if dims == 2 else 3,
        (_read_pair(read, file, path / labels / file.name) for file in files),
    )


def make_phantoms(count: int, dims: int, seed: int) -> SegmentationData:
    """Draw ellipses under uneven light and noise, with small bright specks to be ignored.

    In 2D the ellipses are bright (two classes); in 3D they are bright or dark (three).
    """
    rng = np.random.default_rng(seed)
    contrasts = (1.0,) if dims == 2 else (1.0, -1.0)
    size = PHANTOM_SIZES[dims]
    records = (_phantom(f"phantom-{i:05d}", size, contrasts, rng) for i in range(count))
    return _split(f"phantoms ({dims}D)", "one image", 1 + len(contrasts), records)


def _split(
    name: str, privacy_unit: str, num_classes: int, records: Iterable[Record]
) -> SegmentationData:
    parts: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        if record.label.min() < 0 or record.label.max() >= num_classes:
            raise ValueError(
                f"labels must lie in 0..{num_classes - 1}, got others in {record.name}"
            )
        parts[_is_held_out(record.name)].append(record)
    if not all(parts):
        raise ValueError(
            f"a training and a validation record are needed at least, "
            f"got {len(parts[0])} and {len(parts[1])}"
        )
    stacked = [
        (
            torch.from_numpy(np.stack([record.image[np.newaxis] for record in part])),
            torch.from_numpy(np.stack([record.label for record in part])),
        )
        for part in parts
    ]
    return SegmentationData(name, privacy_unit, num_classes, *stacked[0], *stacked[1])


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0


def _read_pair(read: Callable[[Path, Path], Record], image_file: Path, label_file: Path) -> Record:
    try:
        return read(image_file, label_file)
    except (OSError, EOFError, ImageFileError) as error:
        raise ValueError(f"--data must hold readable files, got {image_file}: {error}") from error


def _read_micrograph(image_file: Path, mask_file: Path) -> Record:
    height, width = IMAGE_SIZE
    with Image.open(image_file) as picture:
        gray = picture.convert("L")
    with Image.open(mask_file) as picture:
        foreground = Image.fromarray(np.asarray(picture) > 0)
    if gray.size != foreground.size:
        raise ValueError(
            f"an image and its mask must be of one size, "
            f"got {gray.size} and {foreground.size} in {image_file.name}"
        )
    pixels = np.asarray(gray.resize((width, height), Image.Resampling.BOX), dtype=np.float32)
    mask = foreground.resize((width, height), Image.Resampling.NEAREST)
    return Record(
        image_file.stem, standardise(dark_background(pixels)), np.asarray(mask).astype(np.int64)
    )


def _read_volume(image_file: Path, label_file: Path) -> Record:
    image = _read_nifti(image_file)
    label = _read_nifti(label_file)
    if image.shape != label.shape or image.ndim != 3:
        raise ValueError(
            f"an image and its labels must be 3D and of one shape, "
            f"got {image.shape} and {label.shape} in {image_file.name}"
        )
    # Scaled before the padding, whose zeros are then the mean intensity.
    return Record(
        image_file.name.removesuffix(".nii.gz"),
        centre(standardise(image), VOLUME_SIZE),
        centre(np.rint(label), VOLUME_SIZE).astype(np.int64),
    )


def _read_nifti(file: Path) -> FloatArray:
    volume: Any = nibabel.load(file)
    return np.asarray(volume.dataobj, dtype=np.float32)


def dark_background(gray: FloatArray) -> FloatArray:
    """Invert an image whose background is bright, as stained tissue is.

    Most pixels are background, so the median lies on the background's side of the range.
    """
    low, median, high = np.percentile(gray, (1, 50, 99))
    return -gray if median - low > high - median else gray


def standardise(image: FloatArray) -> FloatArray:
    """Scale one image to mean 0 and standard deviation 1; a constant image becomes 0."""
    wide = image.astype(np.float64)
    scaled: FloatArray = ((wide - wide.mean()) / max(wide.std(), 1e-6)).astype(np.float32)
    return scaled


def centre(volume: FloatArray, size: tuple[int, ...]) -> FloatArray:
    """Crop or zero-pad every axis about its middle to the given size."""
    result = np.zeros(size, dtype=volume.dtype)
    source, target = [], []
    for have, want in zip(volume.shape, size, strict=True):
        common = min(have, want)
        source.append(slice((have - common) // 2, (have - common) // 2 + common))
        target.append(slice((want - common) // 2, (want - common) // 2 + common))
    result[tuple(target)] = volume[tuple(source)]
    return result


def _phantom(
    name: str, size: tuple[int, ...], contrasts: tuple[float, ...], rng: np.random.Generator
) -> Record:
    dims = len(size)
    # Coordinates in [-1, 1], shape (dims, *size).
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in size), indexing="ij"))
    image = np.zeros(size)
    label = np.zeros(size, dtype=np.int64)
    for index, contrast in enumerate(contrasts):
        for _ in range(rng.integers(1, 4)):
            inside = _ellipsoid(grid, rng.uniform(0.15, 0.4, dims), rng)
            image[inside] = contrast * rng.uniform(0.7, 1.3)
            label[inside] = index + 1
    for _ in range(rng.integers(2, 6)):
        speck = _ellipsoid(grid, np.full(dims, 2.0 / min(size)), rng)
        image[speck & (label == 0)] = rng.uniform(1.0, 2.0)
    slope = rng.normal(0.0, 0.3, dims)
    light = np.exp(np.tensordot(slope, grid, axes=1))
    shade = np.tensordot(rng.normal(0.0, 0.2, dims), grid, axes=1)
    noisy = image * light + shade + rng.normal(0.0, rng.uniform(0.2, 0.5), size)
    return Record(name, standardise(noisy.astype(np.float32)), label)


def _ellipsoid(
    grid: NDArray[np.float64], radii: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.bool_]:
    dims = grid.shape[0]
    rotation, _ = np.linalg.qr(rng.normal(size=(dims, dims)))
    middle = rng.uniform(-0.7, 0.7, size=(dims,) + (1,) * dims)
    turned = np.tensordot(rotation, grid - middle, axes=1) / radii.reshape(-1, *(1,) * dims)
    inside: NDArray[np.bool_] = (turned**2).sum(axis=0) <= 1.0
    return inside
