"""The settings of `dpfast train`: one TOML file, every name and type checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dpfast.morphology.dp_morph import OPERATION_NAMES, check_operation, check_size
from dpfast.privacy import NoisyHistogram, PercentilePaper, PrivateQuantile
from dpfast.privacy.thresholds import Threshold
from dpfast.segmentation._extras import needs_extra
from dpfast.segmentation.data_settings import DataSettings, ImageData, PublicData
from dpfast.segmentation.formats import FORMATS
from dpfast.segmentation.settings_file import (
    Count,
    Fraction,
    Percentile,
    Positive,
    Seed,
    Table,
    read_settings,
)

with needs_extra("dpfast train"):
    from pydantic import Field, PlainValidator, model_validator

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AdaptiveMorphology",
    "FixedMorphology",
    "ModelSettings",
    "MorphologySettings",
    "NoMorphology",
    "OptimizerSettings",
    "OutputSettings",
    "PrivacySettings",
    "Settings",
    "TrainingSettings",
    "load_settings",
]


class ModelSettings(Table):
    """A network; see `build_model`."""

    name: Literal["unet", "dynunet", "segresnet"] = "unet"
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights_seed: Seed = 0


class OptimizerSettings(Table):
    """By which steps the weights are trained, and where.

    Attributes:
      device: "auto" is CUDA where there is a device.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _check_momentum(self) -> Self:
        if self.optimizer != "sgd" and "momentum" in self.model_fields_set:
            raise ValueError(f"momentum has no effect with optimizer {self.optimizer!r}")
        return self


class TrainingSettings(OptimizerSettings):
    """How the weights are trained.

    Attributes:
      averaging: decay of the running average of the weights, which is what is evaluated and kept;
        0 keeps the last weights. It is post-processing and costs no privacy.
    """

    epochs: Count
    averaging: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95


class FixedThreshold(Table):
    """The threshold is max_grad_norm throughout."""

    kind: Literal["fixed"]

    def build(self) -> Threshold | None:
        """What PrivacyEngine takes."""
        return None


class PrivateQuantileThreshold(Table):
    """See `dpfast.PrivateQuantile`."""

    kind: Literal["private_quantile"]
    target_percentile: Percentile = 50.0
    learning_rate: Positive = 0.2
    count_noise: Positive | None = None
    lower: Positive | None = None
    upper: Positive | None = None

    def build(self) -> Threshold | None:
        """What PrivacyEngine takes."""
        return PrivateQuantile(**self.model_dump(exclude={"kind"}))


class HistogramThreshold(Table):
    """See `dpfast.NoisyHistogram`."""

    kind: Literal["histogram"]
    target_percentile: Percentile = 50.0
    num_bins: Annotated[int, Field(ge=2)] = 40
    bin_noise: Positive | None = None
    memory: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    lower: Positive | None = None
    upper: Positive | None = None

    def build(self) -> Threshold | None:
        """What PrivacyEngine takes."""
        return NoisyHistogram(**self.model_dump(exclude={"kind"}))


class PercentilePaperThreshold(Table):
    """See `dpfast.PercentilePaper`: no guarantee, epsilon is infinite."""

    kind: Literal["percentile_paper"]
    percentile: Annotated[float, Field(ge=0.0, le=100.0)] = 50.0

    def build(self) -> Threshold | None:
        """What PrivacyEngine takes."""
        return PercentilePaper(self.percentile)


ThresholdSettings = (
    FixedThreshold | PrivateQuantileThreshold | HistogramThreshold | PercentilePaperThreshold
)
# Without privacy only these mean anything.
_OF_EVERY_RUN = {"private", "expected_batch_size", "physical_batch_size"}


class PrivacySettings(Table):
    """What is promised and by which mechanism; see `PrivacyEngine.make_private`.

    Attributes:
      private: False trains without any protection, for comparison.
      target_epsilon: of the whole run; the noise follows. Or `noise_multiplier`, and epsilon
        follows.
      target_delta: at which epsilon is stated, below 1 over the number of units.
      expected_batch_size: units in a step, on average.
      physical_batch_size: images processed at once; None: all of a step.
    """

    private: bool = True
    target_epsilon: Positive | None = None
    target_delta: Fraction | None = None
    noise_multiplier: Positive | None = None
    max_grad_norm: Positive | None = None
    clipping: Literal["flat", "automatic", "auto_v", "normalized", "psac"] = "flat"
    mechanism: Literal["gaussian", "laplace"] = "gaussian"
    threshold: Annotated[ThresholdSettings, Field(discriminator="kind")] = FixedThreshold(
        kind="fixed"
    )
    privacy_unit: Literal["sample", "patient"] = "sample"
    max_samples_per_unit: Count | None = None
    expected_batch_size: Count
    physical_batch_size: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> PrivacySettings:
        if not self.private:
            idle = sorted(self.model_fields_set - _OF_EVERY_RUN)
            if idle:
                raise ValueError(f"{', '.join(idle)} must not be given with private = false")
            return self
        if self.target_delta is None:
            raise ValueError("target_delta must be given, below 1 over the number of units")
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("one of target_epsilon and noise_multiplier must be given")
        paper = isinstance(self.threshold, PercentilePaperThreshold)
        if paper and self.max_grad_norm is not None:
            raise ValueError("max_grad_norm has no effect with threshold percentile_paper")
        if not paper and self.max_grad_norm is None:
            raise ValueError("max_grad_norm must be given")
        if self.privacy_unit == "sample" and self.max_samples_per_unit is not None:
            raise ValueError("max_samples_per_unit has no effect with privacy_unit 'sample'")
        return self


def _operation(value: Any) -> str:
    try:
        return check_operation("morphology", value)
    except (TypeError, ValueError):
        raise ValueError(f"must be one of {', '.join(OPERATION_NAMES)}") from None


def _size(value: Any) -> int | tuple[int, ...]:
    try:
        return check_size("morphology", "size", value)
    except (TypeError, ValueError):
        raise ValueError("must be a whole number >= 1, or one for each of 2 or 3 axes") from None


Operation = Annotated[str, PlainValidator(_operation)]
Size = Annotated[int | tuple[int, ...], PlainValidator(_size)]
AtPrediction = Literal["scores", "class_maps", "nothing"]


class NoMorphology(Table):
    """The loss sees the network's scores."""

    kind: Literal["none"]


class ClassMorphology(Table):
    """What is done to one class."""

    operation: Operation
    size: Size


class FixedMorphology(Table):
    """The loss sees the scores after `dpfast.DPMorph`, whose settings are public.

    Attributes:
      per_class: by the class's number, for classes with operations and sizes of their own.
      all_channels: the background's scores are changed as well, as in the code published with
        the paper.
      at_prediction: what the operation is applied to when the network is used: its "scores", as in
        training, where the network leaves to the operation what that does; the predicted
        "class_maps"; or "nothing", as in that code.
    """

    kind: Literal["fixed"]
    operation: Operation = "closing"
    size: Size = 3
    per_class: dict[Annotated[str, Field(pattern="^[1-9][0-9]*$")], ClassMorphology] = Field(
        default_factory=dict
    )
    footprint: Literal["box", "ellipse", "cross"] = "box"
    all_channels: bool = False
    at_prediction: AtPrediction = "scores"

    @model_validator(mode="after")
    def _check(self) -> FixedMorphology:
        if self.all_channels and self.at_prediction == "class_maps":
            raise ValueError(
                "at_prediction must not be 'class_maps' with all_channels: in a class map the "
                "background follows from the other classes"
            )
        return self


class AdaptiveMorphology(Table):
    """The same with sizes from the training masks, by `dpfast.morphology.adapt`.

    Attributes:
      noise_multiplier: of the measurement, whose cost is part of epsilon.
      at_prediction: see `FixedMorphology`.
    """

    kind: Literal["adaptive"]
    noise_multiplier: Positive
    operation: Operation = "opening_closing"
    fixed_size: Count = 3
    kappa: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    max_octaves: Annotated[float, Field(gt=0.0, le=15.0)] = 6.0
    footprint: Literal["box", "ellipse", "cross"] = "box"
    at_prediction: AtPrediction = "scores"


MorphologySettings = NoMorphology | FixedMorphology | AdaptiveMorphology


class OutputSettings(Table):
    """The run folder."""

    folder: str


class Settings(Table):
    """All tables of the file. Paths start at the folder in which the command is run."""

    data: Annotated[DataSettings, Field(discriminator="kind")]
    model: ModelSettings = ModelSettings()
    training: TrainingSettings
    privacy: PrivacySettings
    morphology: Annotated[MorphologySettings, Field(discriminator="kind")] = NoMorphology(
        kind="none"
    )
    output: OutputSettings

    @model_validator(mode="after")
    def _check(self) -> Settings:
        data, by_patient = self.data, self.privacy.privacy_unit == "patient"
        if by_patient and isinstance(data, ImageData) and data.patient_column is None:
            raise ValueError("privacy_unit 'patient' needs data.patient_column, of index.csv")
        if by_patient and isinstance(data, PublicData) and not FORMATS[data.kind].has_patients:
            raise ValueError(
                f"privacy_unit 'patient' needs data that say whose an image is, and {data.kind!r} "
                "does not"
            )
        measured = isinstance(self.morphology, AdaptiveMorphology)
        if measured and not (self.privacy.private and self.privacy.privacy_unit == "patient"):
            raise ValueError(
                "morphology.kind 'adaptive' needs privacy.private = true and privacy_unit "
                "'patient', whose masks it measures"
            )
        return self


def load_settings(path: Path) -> Settings:
    """Read the settings of `dpfast train`; see `read_settings`."""
    return read_settings(path, Settings)
