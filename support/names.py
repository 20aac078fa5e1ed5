"""Names of images and classes, as people write them in lists."""
import re
from pathlib import Path

from support.files import UserError
from support.masks import IGNORE

ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")  # of images


def line_id(line, where):
    """The name that a line of a split gives: ID, or as the field's lists have it ID.jpg, or
    /JPEGImages/ID.jpg /SegmentationClassAug/ID.png.
    """
    words = [re.sub(r"^(.*/)?(JPEGImages|SegmentationClass\w*)/", "", word)
             for word in line.split()]
    if len({without_ending(word) for word in words}) > 1:
        if words[-1] in ("1", "0", "-1"):
            raise UserError(f"{where}: {line!r} has a blank. A list of ImageSets/Main, which says "
                            "where one class shows? Take those of ImageSets/Segmentation. A name "
                            "with a blank? Rename the file")
        raise UserError(f"{where}: {line!r} has a blank: a line is one ID, and no ID has blanks")
    if Path(words[0]).name != words[0] or "\\" in words[0] or words[0].startswith("."):
        raise UserError(f"{where}: {words[0]!r} is no name of a file")
    return words[0]


def without_ending(name):
    """ID.jpg -> ID."""
    return next((name.removesuffix(end) for end in ENDINGS if name.endswith(end)), name)


def check_classes(classes, where):
    """Refuse names with spaces, a name twice, no background, or more than a mask can hold."""
    for name in classes:
        if len(name.split()) != 1 or classes.count(name) > 1:
            raise UserError(f"{where}: {name!r} has a space, or is there twice")
    if classes[0] != "background":
        raise UserError(f"{where} begins with {classes[0]!r}: class 0 is 'background'")
    if len(classes) > IGNORE:
        raise UserError(f"{where} has {len(classes)} classes: a mask can hold {IGNORE}")
