"""Makers of data set folders: each module turns one source into what data.py reads."""
from support.files import write_lines


def write_folder(root, preset, classes, label_lines):
    """Write a folder's three readable files; image_labels.txt, the last one, completes it."""
    write_lines(root / "classes.txt", classes)
    write_lines(root / "preset.txt", [preset])
    write_lines(root / "image_labels.txt", label_lines)
