"""Small files in the layouts that public data sets really have."""

import csv

import numpy as np


def picture(path, array):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def volume(path, array, affine=None):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def blob(size):
    label = np.zeros(size, dtype=np.uint8)
    label[tuple(slice(side // 4, side // 2) for side in size)] = 1
    return label


def isic2018(path, count=3):
    rng = np.random.default_rng(0)
    for number in range(count):
        name = f"ISIC_{number:07d}"
        colour = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        picture(path / "ISIC2018_Task1-2_Training_Input" / f"{name}.jpg", colour)
        mask = path / "ISIC2018_Task1_Training_GroundTruth" / f"{name}_segmentation.png"
        picture(mask, 255 * blob((30, 40)))
    (path / "ISIC2018_Task1-2_Training_Input" / "ATTRIBUTION.txt").write_text("whose")
    return path


def ham10000(path, count=4):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        name = f"ISIC_{24306 + number:07d}"
        part = path / f"HAM10000_images_part_{1 + number % 2}"
        picture(part / f"{name}.jpg", rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        mask = path / "HAM10000_segmentations_lesion_tschandl" / f"{name}_segmentation.png"
        picture(mask, 255 * blob((30, 40)))
        # Two images of each lesion.
        rows.append(
            {
                "lesion_id": f"HAM_{number // 2:07d}",
                "image_id": name,
                "dx": "nv",
                "dataset": ("rosendahl", "vidir_modern")[number // 2 % 2],
            }
        )
    table(path / "HAM10000_metadata", rows)
    return path


def kits(path, *, label="segmentation.nii.gz", root="data", cases=3):
    rng = np.random.default_rng(0)
    # Slices first, as KiTS has them: the axes are not those of RAS.
    affine = np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]], float)
    for number in range(cases):
        case = path / root / f"case_{number:05d}"
        scan = rng.normal(0, 200, (6, 16, 20)).astype(np.float32)
        volume(case / "imaging.nii.gz", scan, affine)
        truth = blob((6, 16, 20))
        truth[3, 10, 12] = 2
        volume(case / label, truth, affine)
    return path


def brats(path, *, ending=".nii.gz", below="MICCAI_BraTS2020_TrainingData", names=True):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(1, 4):
        name = f"BraTS20_Training_{number:03d}"
        case = path / below / name
        for kind in ("t1", "t1ce", "t2", "flair"):
            scan = rng.normal(100, 10, (12, 12, 8)).astype(np.float32)
            volume(case / f"{name}_{kind}{ending}", scan)
        truth = blob((12, 12, 8))
        truth[6:8, 6:8, 4], truth[8, 8, 4] = 2, 4
        volume(case / f"{name}_seg{ending}", truth)
        rows.append(
            {
                "Grade": "HGG",
                "BraTS_2019_subject_ID": f"BraTS19_{('CBICA', 'TCIA01')[number % 2]}_AAB_1",
                "BraTS_2020_subject_ID": name,
            }
        )
    if names:
        table(path / below / "name_mapping.csv", rows)
    return path


def lgg(path):
    rng = np.random.default_rng(0)
    for patient in ("TCGA_CS_4941_19960909", "TCGA_HT_7602_19951103"):
        for number in (1, 2, 10):
            case = path / "kaggle_3m" / patient
            scan = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            picture(case / f"{patient}_{number}.tif", scan)
            picture(case / f"{patient}_{number}_mask.tif", 255 * blob((24, 24)))
    return path


def covid_ct(path, *, kaggle=False):
    rng = np.random.default_rng(0)
    images, labels, ending = (
        ("ct_scans", "lung_and_infection_mask", ".nii")
        if kaggle
        else ("COVID-19-CT-Seg_20cases", "Lung_and_Infection_Mask", ".nii.gz")
    )
    for source, number in (("coronacases", "001"), ("radiopaedia", "10_85902_1")):
        middle = "_org_" if kaggle and source == "coronacases" else "_"
        scan = rng.normal(-500, 200, (16, 16, 6)).astype(np.float32)
        volume(path / images / f"{source}{middle}{number}{ending}", scan)
        truth = blob((16, 16, 6))
        truth[9, 9, 2], truth[10, 10, 2] = 2, 3
        volume(path / labels / f"{source}_{number}{ending}", truth)
    return path


def duke_oct(path, subjects=2):
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    depth, width, scans = 60, 40, 5
    for number in range(1, subjects + 1):
        layers = np.full((8, width, scans), np.nan)
        fluid = np.zeros((depth, width, scans))
        # Two annotated scans, between columns 5 and 34, with a gap.
        for scan in (1, 3):
            layers[:, 5:35, scan] = np.arange(10, 50, 5)[:, None]
            layers[2, 20, scan] = np.nan
            fluid[27:29, 10:14, scan] = 1
        images = rng.integers(0, 255, (depth, width, scans), dtype=np.uint8)
        file = path / "2015_BOE_Chiu" / f"Subject_{number:02d}.mat"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"images": images, "manualLayers1": layers, "manualFluid1": fluid}
        savemat(file, {**content, "automaticLayersDME": layers})
    return path
