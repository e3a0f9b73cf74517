"""Public data sets in the layouts that they are published in.

`FORMATS` has them by the name that settings use. Each is a module's `Format`, whose `find` goes
from the data set's folder to records; nothing is read but file names and tables of images, except
for OCT scans, which are kept in one file per patient.
"""

from __future__ import annotations

from dpfast.segmentation.formats._format import Format
from dpfast.segmentation.formats.brain import BRATS, LGG
from dpfast.segmentation.formats.covid import COVID_CT
from dpfast.segmentation.formats.kidney import KITS19, KITS23
from dpfast.segmentation.formats.retina import DUKE_OCT
from dpfast.segmentation.formats.skin import HAM10000, ISIC2018

__all__ = ["FORMATS", "Format"]

FORMATS: dict[str, Format] = {
    "brats": BRATS,
    "covid_ct": COVID_CT,
    "duke_oct": DUKE_OCT,
    "ham10000": HAM10000,
    "isic2018": ISIC2018,
    "kits19": KITS19,
    "kits23": KITS23,
    "lgg": LGG,
}
