"""`python data.py labels`: image labels of one's own data, from XML, JSON or masks."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from support.run import DataError


@pytest.fixture
def root(tmp_path):
    """Three images, a.jpg, b.PNG and c.jpeg, and nothing else."""
    for name in ("a.jpg", "b.PNG", "c.jpeg"):
        (tmp_path / "JPEGImages").mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "JPEGImages" / name)
    return tmp_path


def make(root):
    data.main(data.parse_args(["labels", "--root", str(root)]))
    return (root / "image_labels.txt").read_text().splitlines()


def xml(root, image_id, *names):
    objects = "".join(f"<object><name>{n}</name><part><name>head</name></part></object>"
                      for n in names)
    path = root / f"Annotations/{image_id}.xml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"<annotation>{objects}</annotation>")


def mask(root, image_id, *values):
    pixels = np.zeros((6, 8))
    pixels.flat[:len(values)] = values
    data.save_mask(root / f"SegmentationClass/{image_id}.png", pixels)


def instances(root, images, annotations, categories, name="instances.json"):
    path = root / "annotations" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(
        images=[dict(id=k, file_name=file) for k, file in images.items()],
        annotations=[dict(image_id=i, category_id=c) for i, c in annotations],
        categories=[dict(id=k, name=n) for k, n in categories.items()])))


def test_boxes_of_xml_bring_names_and_their_order(root, capsys):
    xml(root, "a", "dog", "traffic light", "dog")
    xml(root, "b")
    xml(root, "stranger", "unicorn")  # no such image
    assert make(root) == ["a dog traffic_light", "b background"]
    assert (root / "classes.txt").read_text().split() == ["background", "dog", "traffic_light"]
    told = capsys.readouterr().out
    assert "from Annotations/: 2 of 3 images, 1 of them show no object" in told
    assert "note: c and 0 more have nothing in Annotations/" in told and "no split yet" in told


def test_json_of_coco_keeps_the_order_of_its_categories(root, capsys):
    instances(root, {1: "a.jpg", 2: "x/b.PNG", 9: "gone.jpg"}, [(1, 7), (1, 3), (9, 3)],
              {7: "cat", 3: "hot dog"})
    instances(root, {5: "c.jpeg"}, [(5, 4)], {4: "ant", 3: "hot dog"}, name="more.json")
    (root / "annotations/captions.json").write_text('{"images": [], "annotations": []}')
    assert make(root) == ["a hot_dog cat", "b background", "c ant"]
    assert (root / "classes.txt").read_text().split() == ["background", "hot_dog", "cat", "ant"]


def test_masks_need_the_names_and_are_counted(root, capsys):
    mask(root, "a", 2, 2, 255)
    mask(root, "c", 1, 2)
    (root / "SegmentationClass/c.png").rename(root / "SegmentationClass/c.PNG")
    with pytest.raises(DataError, match="classes.txt not found: masks are numbers"):
        make(root)
    (root / "classes.txt").write_text("background\ndog\ncat\n")
    assert make(root) == ["a cat", "c dog cat"]
    assert "     2  cat                            2\n" in capsys.readouterr().out
    labels = data.Folder(root).image_labels("a")
    assert labels.tolist() == [1, 0, 1]


def test_masks_that_are_numbered_otherwise_than_the_boxes_say_are_told(root, capsys):
    for image_id, name, number in (("a", "ant", 2), ("b", "bee", 1), ("c", "cat", 3)):
        xml(root, image_id, name)
        mask(root, image_id, number)
    assert make(root) == ["a ant", "b bee", "c cat"]
    assert "note: the masks of 2 of 3 images, as a, hold a class that Annotations/ does not n" in (
        told := capsys.readouterr().out)
    assert "     3  cat                            1       1\n" in told


@pytest.mark.parametrize("spoil, words", [
    (lambda root: shutil.rmtree(root / "JPEGImages"), "JPEGImages has no .jpg, .jpeg or .png"),
    (lambda root: (root / "JPEGImages/a.jpg").rename(root / "JPEGImages/a (1).jpg"),
     r"'a \(1\)' has a blank"),
    (lambda root: (root / "image_labels.txt").write_text("a ant\n"), "is there already: move it"),
    (lambda root: (root / "Annotations/a.xml").write_text("<half"), "a.xml cannot be read .*UTF-8"),
    (lambda root: xml(root, "a", " "), "a.xml has an object without a name"),
    (lambda root: (root / "classes.txt").write_text("background\ncat\n"),
     "classes.txt does not have ant, which Annotations/ names"),
    (lambda root: shutil.rmtree(root / "Annotations"), "has no Annotations/.*annotations/.*Segm"),
    (lambda root: (root / "Annotations/a.xml").rename(root / "Annotations/z.xml"),
     "Annotations names no object on any image"),
    (lambda root: (shutil.rmtree(root / "Annotations"),
                   instances(root, {1: "a.jpg"}, [(1, 8)], {})),
     "instances.json is no file of COCO instances"),
])
def test_what_cannot_be_is_told_and_nothing_is_lost(root, spoil, words):
    xml(root, "a", "ant")
    spoil(root)
    before = {path: path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=words):
        make(root)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (root / "image_labels.txt").exists() or root / "image_labels.txt" in before


def test_capitals_namespaces_and_what_is_not_listed_are_read(root):
    for image_id in "ab":
        xml(root, image_id, "ant")
    (root / "Annotations/a.xml").rename(root / "Annotations/a.XML")
    content = (root / "Annotations/b.xml").read_text()
    (root / "Annotations/b.xml").write_text(content.replace("<annotation>",
                                                            '<annotation xmlns="http://x/voc">'))
    assert make(root) == ["a ant", "b ant"]


def test_panoptic_files_and_images_that_were_taken_out_do_no_harm(root):
    instances(root, {1: "train\\a.jpg"}, [(1, 7), (99, 7)], {7: "cat"})
    (root / "annotations/panoptic.json").write_text(json.dumps(dict(
        images=[dict(id=1, file_name="a.jpg")], annotations=[dict(segments_info=[])],
        categories=[])))
    assert make(root) == ["a cat"]


def test_two_images_of_one_name_are_not_merged(root):
    instances(root, {1: "train/a.jpg", 2: "val/a.jpg"}, [(1, 7)], {7: "cat"})
    with pytest.raises(DataError, match="names val/a.jpg and train/a.jpg: two images cannot share"):
        make(root)


def test_a_refusal_leaves_no_classes_behind(root):
    (root / "Annotations").mkdir()
    (root / "Annotations/a.xml").write_text("<list><item><name>cat</name></item></list>")
    with pytest.raises(DataError, match="names no object"):
        make(root)
    assert not (root / "classes.txt").exists()
    (root / "Annotations/a.xml").write_text(
        '<?xml version="1.0" encoding="gb2312"?><annotation></annotation>')
    with pytest.raises(DataError, match="a.xml cannot be read .*UTF-8"):
        make(root)


def test_other_counts_point_here(tmp_path):
    home = tmp_path / "ImageSets/Segmentation"
    home.mkdir(parents=True)
    for split in ("train", "val"):
        (home / f"{split}.txt").write_text("a\n")
    with pytest.raises(DataError, match="Other data: python data.py labels --root"):
        data.main(data.parse_args(["voc", "--root", str(tmp_path)]))
