"""Segmentation under differential privacy."""

from dpfast.segmentation.losses import PerSampleLoss, per_sample_loss
from dpfast.segmentation.metrics import (
    ClassScores,
    class_scores,
    mean_foreground_dice,
    validation_dice,
)
from dpfast.segmentation.phantoms import phantom_records, phantom_task
from dpfast.segmentation.records import (
    DatasetDescription,
    Record,
    image_records,
    nifti_records,
    read_dataset_json,
    split_by_patient,
)
from dpfast.segmentation.task import Labels, SegmentationTask, make_dataset

__all__ = [
    "ClassScores",
    "DatasetDescription",
    "Labels",
    "PerSampleLoss",
    "Record",
    "SegmentationTask",
    "class_scores",
    "image_records",
    "make_dataset",
    "mean_foreground_dice",
    "nifti_records",
    "per_sample_loss",
    "phantom_records",
    "phantom_task",
    "read_dataset_json",
    "split_by_patient",
    "validation_dice",
]
