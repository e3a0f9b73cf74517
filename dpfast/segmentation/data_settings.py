"""The settings of data: what images there are, and how they are made ready."""

from __future__ import annotations

from typing import Annotated, Literal

from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.formats import FORMATS
from dpfast.segmentation.settings_file import Count, Fraction, Positive, Seed, Table

with needs_extra("dpfast train"):
    from pydantic import Field, model_validator

__all__ = ["DataSettings", "ImageData", "NiftiData", "PhantomData", "PublicData"]

Spacing = Annotated[list[Positive], Field(min_length=3, max_length=3)]
Window = Annotated[list[float], Field(min_length=2, max_length=2)]


class PhantomData(Table):
    """Images that are drawn; see `phantom_records` and `look_records`.

    Attributes:
      look: what they are like; all but ellipses have one image a patient and a column "site".
      spatial_dims, slices_per_patient: of ellipses.
      sites: of the other looks, each with its own contrast, noise, spacing and prevalence.
    """

    kind: Literal["phantoms"]
    look: Literal["ellipses", "brain", "kidney", "retina", "skin"] = "ellipses"
    patients: Count = 800
    spatial_dims: Literal[2, 3] = 2
    slices_per_patient: Count = 1
    sites: Count = 1
    seed: Seed = 0
    validation_fraction: Fraction = 0.2

    @model_validator(mode="after")
    def _check(self) -> PhantomData:
        others = {"sites"} if self.look == "ellipses" else {"spatial_dims", "slices_per_patient"}
        idle = sorted(others & self.model_fields_set)
        if idle:
            raise ValueError(f"{', '.join(idle)} has no effect with look {self.look!r}")
        return self


class ImageData(Table):
    """A folder of pictures and masks; see `image_records` and `SegmentationTask`."""

    kind: Literal["images"]
    path: str
    patient_column: str | None = None
    image_size: Annotated[list[Count], Field(min_length=2, max_length=2)]
    labels: Literal["foreground", "classes"] = "foreground"
    num_classes: Annotated[int, Field(ge=2)] = 2
    fit: Literal["resize", "crop_or_pad"] = "resize"
    dark_background: bool = False
    cache: bool = True
    validation_fraction: Fraction = 0.2


class NiftiData(Table):
    """A folder of NIfTI volumes; classes and channels are those of its dataset.json, if any.

    Attributes:
      spacing: in mm; None: every volume's own.
      window: intensities are cut off at these.
    """

    kind: Literal["nifti"]
    path: str
    patient_column: str | None = None
    image_size: Annotated[list[Count], Field(min_length=3, max_length=3)]
    num_classes: Annotated[int, Field(ge=2)] | None = None
    in_channels: Count | None = None
    fit: Literal["resize", "crop_or_pad"] = "crop_or_pad"
    dark_background: bool = False
    spacing: Spacing | None = None
    window: Window | None = None
    cache: bool = True
    validation_fraction: Fraction = 0.2


class PublicData(Table):
    """A public data set as it was published; see `dpfast.segmentation.formats`.

    Attributes:
      path: the folder that it was unpacked to.
      spacing: of volumes in mm; None: every volume's own.
      window: intensities are cut off at these; None: as the format has it.
    """

    kind: Literal[
        "brats", "covid_ct", "duke_oct", "ham10000", "isic2018", "kits19", "kits23", "lgg"
    ]
    path: str
    image_size: Annotated[list[Count], Field(min_length=2, max_length=3)]
    fit: Literal["resize", "crop_or_pad"] = "resize"
    spacing: Spacing | None = None
    window: Window | None = None
    cache: bool = True
    validation_fraction: Fraction = 0.2

    @model_validator(mode="after")
    def _check(self) -> PublicData:
        dims = FORMATS[self.kind].spatial_dims
        if len(self.image_size) != dims:
            raise ValueError(f"image_size must be {dims} numbers with kind {self.kind!r}")
        if dims == 2 and self.spacing is not None:
            raise ValueError(f"spacing has no effect with kind {self.kind!r}, which has pictures")
        return self


DataSettings = PhantomData | ImageData | NiftiData | PublicData
