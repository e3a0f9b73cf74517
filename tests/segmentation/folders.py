"""Small data folders on disk, as users have them."""

import nibabel
import numpy as np
from PIL import Image


def make_image_folder(path, count=6, labels="masks"):
    """Gray and colour pictures of several sizes with instance maps, bright inside."""
    for folder in ("images", labels):
        (path / folder).mkdir(parents=True)
    for index in range(count):
        mask = np.zeros((40 + index, 60), dtype=np.uint16)
        mask[10:20, 10:30] = 300  # an instance number that 8 bits could not hold
        image = np.where(mask > 0, 200, 30).astype(np.uint8)
        colour = np.repeat(image[..., np.newaxis], 3, axis=2) if index % 2 else image
        Image.fromarray(colour).save(path / "images" / f"{index}.png")
        Image.fromarray(mask).save(path / labels / f"{index}.png")
    return path


def make_volume_folder(path, count=6, folders=("images", "labels"), channels=1):
    """Volumes with two classes of 250 voxels each, the second one brighter."""
    for folder in folders:
        (path / folder).mkdir(parents=True)
    for index in range(count):
        label = np.zeros((30, 50, 33), dtype=np.uint8)
        label[10:15, 20:25, 10:20] = 1
        label[15:20, 20:25, 10:20] = 2
        scan = label * 1000.0 + 5.0
        if channels > 1:
            scan = np.stack([scan + channel for channel in range(channels)], axis=-1)
        name = f"subject{index}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(scan, np.eye(4)), path / folders[0] / name)
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), path / folders[1] / name)
    return path
