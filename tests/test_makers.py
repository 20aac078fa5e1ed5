"""The makers of data sets: beetles, VOC, COCO, one's own; each from a tiny copy of its layout."""
import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import data
from conftest import contents
from data import Folder
from datasets import make
from datasets import beetles, coco as coco_maker, voc as voc_maker
from support.files import UserError
from support.masks import read_image, read_mask, save_mask


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def xml(root, image_id, *names):
    """Annotations/ID.xml as VOC's, of objects with a part each."""
    objects = "".join(f"<object><name>{n}</name><difficult>1</difficult><part><name>head</name>"
                      "</part></object>" for n in names)
    path = root / f"Annotations/{image_id}.xml"
    write(path, f"<annotation>{objects}</annotation>")


# --- beetles -----------------------------------------------------------------------------------

def test_the_scenes_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for split in range(3):
        for index in range(20):
            _, mask, parts = beetles.toy_scene(split, index)
            digest.update(mask.tobytes() + parts.tobytes())
    assert digest.hexdigest()[:16] == "04b9edf999845a6b"


def test_a_beetle_is_the_pair_of_pattern_and_head_and_cooccur_changes_the_background_alone():
    for index in range(40):
        image, mask, parts = beetles.toy_scene(0, index)
        assert ((parts > 0) == ((mask > 0) & (mask < 255))).all()
        for label in np.setdiff1d(mask, [0, 255]):
            assert (mask == label).sum() >= beetles.MIN_VISIBLE
            head = image[(mask == label) & (parts == 2)]
            if len(head):
                red = beetles.TOY_CLASSES[label].endswith("red")
                assert (head[:, 0].mean() > head[:, 1].mean()) == red
        textured, same_mask, same_parts = beetles.toy_scene(0, index, 0.5)
        assert np.array_equal(mask, same_mask) and np.array_equal(parts, same_parts)
        assert np.array_equal(image[parts > 0], textured[parts > 0])
        assert 0.05 < (textured < image).any(-1)[mask == 0].mean() < 0.6


@pytest.mark.parametrize("probability, expected", [(0.0, 1 / 4), (0.5, 5 / 8), (1.0, 1)])
def test_cooccur_is_the_probability_of_the_preferred_texture(monkeypatch, probability, expected):
    chosen, preferred = [], []
    monkeypatch.setattr(beetles, "toy_texture", lambda name, rng: chosen.append(name) or
                        np.zeros((96, 96), bool))
    for index in range(400):
        _, mask, _ = beetles.toy_scene(0, index, probability)
        shown = np.setdiff1d(mask, 0)  # one beetle's scenes: the pattern, and not the head
        preferred.append(beetles.TEXTURES[(shown[0] - 1) // 2] if len(shown) == 1 else None)
    kept = [name == best for name, best in zip(chosen, preferred) if best]
    assert len(kept) > 100 and abs(np.mean(kept) - expected) < 0.1


def test_the_command_makes_a_prefix_of_what_more_images_would_be(toy, tmp_path, capsys):
    make.main(make.parse_args(["toy", "--root", str(tmp_path), "--num", "3", "2", "1"]))
    assert "9 classes with background; test 1, train 3, val 2" in capsys.readouterr().out
    for path in (tmp_path / "JPEGImages").iterdir():
        assert path.read_bytes() == (toy / "JPEGImages" / path.name).read_bytes()


# --- VOC ---------------------------------------------------------------------------------------

@pytest.fixture
def voc(tmp_path):
    """VOC's layout with 2 + 1 images, and SBD's two lists, which overlap val."""
    root, sbd = tmp_path / "voc", tmp_path / "sbd/benchmark_RELEASE/dataset"
    for image_id, *names in (("a1", "dog", "person", "dog"), ("a2", "tvmonitor"), ("v1", "cat"),
                             ("s1", "sofa"), ("s2", "bus")):
        xml(root, image_id, *names)
    lists = root / "ImageSets/Segmentation"
    for path, ids in ((lists / "train.txt", "a1\na2\n"), (lists / "val.txt", "v1\n"),
                      (sbd / "train.txt", "s1\na1\n"), (sbd / "val.txt", "s2\nv1\n")):
        write(path, ids)
    return root, tmp_path / "sbd"


def test_voc_labels_and_trainaug_from_xml_and_sbd(voc):
    root, sbd = voc
    voc_maker.make_voc(root, sbd, counts={"train": 2, "val": 1, "trainaug": 4})
    folder = Folder(root)
    assert folder.ids("trainaug") == ["a1", "a2", "s1", "s2"]
    assert (root / "image_labels.txt").read_text().splitlines() == [
        "a1 dog person", "a2 tvmonitor", "s1 sofa", "s2 bus", "v1 cat"]
    assert folder.image_labels("a1").nonzero().flatten().tolist() == [0, 12, 15]
    assert len(folder.classes) == 21 and (root / "preset.txt").read_text() == "voc\n"


def test_voc_counts_are_checked_and_sbd_is_optional(voc, capsys):
    root, sbd = voc
    with pytest.raises(UserError, match="train has 2 images, expected 1464.*data.py labels --root"):
        voc_maker.make_voc(root, sbd)
    with pytest.raises(UserError, match="trainaug has 4 images, expected 10582"):
        voc_maker.make_voc(root, sbd, counts={"train": 2, "val": 1, "trainaug": 10582})
    assert not (root / "image_labels.txt").exists()
    voc_maker.make_voc(root, counts={"train": 2, "val": 1})
    assert "2 images of train" in capsys.readouterr().out
    (root / "Annotations/a2.xml").write_text("<annotation>")
    with pytest.raises(UserError, match="a2.xml"):
        voc_maker.make_voc(root, counts={"train": 2, "val": 1})


def test_a_download_that_fails_says_what_to_fetch_by_hand(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr("torchvision.datasets.VOCSegmentation.__init__", refuse)
    with pytest.raises(UserError, match="no route to host.*VOCtrainval_11-May-2012.tar"):
        voc_maker.download_voc(tmp_path, tmp_path / "sbd")


# --- MS COCO -----------------------------------------------------------------------------------

COUNTS = {"train": (5, 4), "val": (3, 2)}


def test_coco_labels_links_splits_and_masks_of_polygons_rle_and_crowds(coco, capsys):
    coco_maker.make_coco(coco, counts=COUNTS)
    folder, (first, second) = Folder(coco), [f"COCO_val2014_{i:012d}" for i in (101, 102)]
    assert "train: 5 images, 4 with an object" in capsys.readouterr().out
    assert len(folder.classes) == 81
    assert [folder.classes[i] for i in (1, 10, 80)] == ["person", "traffic_light", "toothbrush"]
    assert folder.ids("val") == [first, second]
    assert folder.ids("train") == [f"COCO_train2014_{i:012d}" for i in (1, 2, 3, 4)]  # 5 has none
    assert folder.image_labels(first).nonzero().flatten().tolist() == [0, 1, 10, 80]
    assert folder.image_labels(second).nonzero().flatten().tolist() == [0, 1]  # a crowd counts
    for image_id in folder.ids("train") + folder.ids("val"):
        path = folder.image_path(image_id)
        assert path.is_symlink() and not path.readlink().is_absolute()
        assert read_image(path).size == (48, 32)
    expected = np.zeros((32, 48), np.uint8)
    expected[20:30, 2:22] = 255           # the crowd, an uncompressed RLE, at the bottom
    expected[4:28, 4:20] = 1              # a person, a polygon, over the crowd
    expected[8:16, 8:16] = 10             # a traffic light, smaller, over the person
    expected[2:6, 30:40] = 80             # a toothbrush, a compressed RLE
    assert np.array_equal(read_mask(folder.mask_path(first), 81, (48, 32)), expected)
    assert (read_mask(folder.mask_path(second), 81) == 255).all()
    train = folder.mask_path("COCO_train2014_000000000001")
    assert not train.exists()
    coco_maker.make_coco(coco, train_masks=True, counts=COUNTS)
    assert train.is_file()


def test_what_is_wrong_with_coco_is_named(coco):
    with pytest.raises(UserError, match="has 5 images, 4 with an object; expected 82783 and 82081"):
        coco_maker.make_coco(coco)
    (coco / "train2014/COCO_train2014_000000000002.jpg").unlink()
    with pytest.raises(UserError, match="000000000002.jpg not found: unpack train2014.zip again"):
        coco_maker.make_coco(coco, counts=COUNTS)
    assert not (coco / "image_labels.txt").exists()
    path, no_coco = coco / "annotations/instances_train2014.json", "is no COCO instances file"
    whole = json.loads(path.with_name("instances_val2014.json").read_text())
    whole["images"].append(dict(id=1, file_name="x.jpg", height=1, width=1))
    entry = dict(image_id=1, category_id=1, area=1, iscrowd=0)  # without its segmentation
    entries = [entry, *(entry | dict(segmentation=[]) | odd
                        for odd in (dict(category_id=12), dict(image_id=77)))]
    for content, words in (("{", no_coco), ("[]", no_coco), ('{"images": []}', "has 0 images"),
                           *((json.dumps(whole | dict(annotations=[odd])), no_coco)
                             for odd in entries)):
        path.write_text(content)
        with pytest.raises(UserError, match=f"instances_train2014.json {words}"):
            coco_maker.make_coco(coco, counts=COUNTS)


def test_odd_shapes_of_coco():
    def mask(shape):
        index = COCO()
        thing = dict(id=1, image_id=7, category_id=3, area=1, iscrowd=0, segmentation=shape)
        index.dataset = dict(images=[dict(id=7, height=8, width=8)], annotations=[thing],
                             categories=[dict(id=3, name="thing")])
        index.createIndex()
        return coco_maker.coco_mask(index, 7, {3: 2})

    for nothing in ([], [[3.0, 3.0]], [[0.0, 0.0, 4.0, 4.0]]):  # no polygon has an area
        assert not mask(nothing).any()
    square = [0.0, 0.0, 4.0, 0.0, 4.0, 4.0, 0.0, 4.0]
    assert np.array_equal(mask([square, [6.0, 6.0]]), np.pad(np.full((4, 4), 2), (0, 4)))
    with pytest.raises(UserError, match="image 7 is .*, the size of its RLE"):
        mask(dict(size=[4, 4], counts=[0, 16]))


def test_coco_archives_are_fetched_once_and_checked(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive",
                        lambda url, root, md5, remove_finished: fetched.append((url, len(md5))))
    coco_maker.download_coco(tmp_path)
    coco_maker.download_coco(tmp_path)
    assert [length for _, length in fetched] == [32] * 3
    assert fetched[0][0] == "http://images.cocodataset.org/zips/train2014.zip"


# --- one's own data ---------------------------------------------------------------------------

@pytest.fixture
def root(tmp_path):
    """Three images, a.jpg, b.PNG and c.jpeg, and nothing else."""
    for name in ("a.jpg", "b.PNG", "c.jpeg"):
        (tmp_path / "JPEGImages").mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "JPEGImages" / name)
    return tmp_path


def made(root):
    make.main(make.parse_args(["labels", "--root", str(root)]))
    return (root / "image_labels.txt").read_text().splitlines()


def mask(root, image_id, *values):
    pixels = np.zeros((6, 8))
    pixels.flat[:len(values)] = values
    save_mask(root / f"SegmentationClass/{image_id}.png", pixels)


def instances(root, images, annotations, categories, name="instances.json"):
    """annotations/instances.json as COCO's; annotations: pairs of an image and a class."""
    write(root / "annotations" / name, json.dumps(dict(
        images=[dict(id=k, file_name=file) for k, file in images.items()],
        annotations=[dict(image_id=i, category_id=c) for i, c in annotations],
        categories=[dict(id=k, name=n) for k, n in categories.items()])))


def test_boxes_of_xml_bring_names_and_their_order(root, capsys):
    xml(root, "a", "dog", "traffic light", "dog")
    path = root / "Annotations/a.xml"
    path.write_text(path.read_text().replace(
        "<annotation>", '<annotation xmlns="http://x/voc">'))
    path.rename(path.with_suffix(".XML"))
    xml(root, "b")
    xml(root, "stranger", "unicorn")  # no such image
    assert made(root) == ["a dog traffic_light", "b background"]
    assert (root / "classes.txt").read_text().split() == ["background", "dog", "traffic_light"]
    told = capsys.readouterr().out
    assert "from Annotations/: 2 of 3 images, 1 of them show no object" in told
    assert "note: c and 0 more have nothing in Annotations/" in told and "no split yet" in told


def test_json_of_coco_keeps_the_order_of_its_categories(root):
    instances(root, {1: "train\\a.jpg", 2: "x/b.PNG", 9: "gone.jpg"},
              [(1, 7), (1, 3), (9, 3), (99, 7)], {7: "cat", 3: "hot dog"})  # 99 is not listed
    instances(root, {5: "c.jpeg"}, [(5, 4)], {4: "ant", 3: "hot dog"}, name="more.json")
    write(root / "annotations/captions.json", '{"images": [], "annotations": []}')
    write(root / "annotations/panoptic.json", json.dumps(dict(
        images=[dict(id=1, file_name="a.jpg")], annotations=[dict(segments_info=[])],
        categories=[])))
    assert made(root) == ["a hot_dog cat", "b background", "c ant"]
    assert (root / "classes.txt").read_text().split() == ["background", "hot_dog", "cat", "ant"]


def test_masks_need_the_names_and_are_counted(root, capsys):
    mask(root, "a", 2, 2, 255)
    mask(root, "c", 1, 2)
    (root / "SegmentationClass/c.png").rename(root / "SegmentationClass/c.PNG")
    with pytest.raises(UserError, match="classes.txt not found: masks are numbers"):
        made(root)
    (root / "classes.txt").write_text("background\ndog\ncat\n")
    assert made(root) == ["a cat", "c dog cat"]
    assert "     2  cat                            2\n" in capsys.readouterr().out
    labels = data.Folder(root).image_labels("a")
    assert labels.tolist() == [1, 0, 1]


def test_masks_that_are_numbered_otherwise_than_the_boxes_say_are_told(root, capsys):
    for image_id, name, number in (("a", "ant", 2), ("b", "bee", 1), ("c", "cat", 3)):
        xml(root, image_id, name)
        mask(root, image_id, number)
    assert made(root) == ["a ant", "b bee", "c cat"]
    assert "note: the masks of 2 of 3 images, as a, hold a class that Annotations/ does not n" in (
        told := capsys.readouterr().out)
    assert "     3  cat                            1       1\n" in told


@pytest.mark.parametrize("spoil, words", [
    (lambda root: shutil.rmtree(root / "JPEGImages"), "JPEGImages has no .jpg, .jpeg or .png"),
    (lambda root: (root / "JPEGImages/a.jpg").rename(root / "JPEGImages/a (1).jpg"),
     r"'a \(1\)' has a blank"),
    (lambda root: write(root / "image_labels.txt", "a ant\n"), "is there already: move it"),
    (lambda root: write(root / "Annotations/a.xml", "<half"), "a.xml cannot be read .*UTF-8"),
    (lambda root: write(root / "Annotations/a.xml", '<?xml version="1.0" encoding="gb2312"?><x/>'),
     "a.xml cannot be read .*UTF-8"),
    (lambda root: write(root / "Annotations/a.xml", "<list><item><name>cat</name></item></list>"),
     "names no object"),
    (lambda root: xml(root, "a", " "), "a.xml has an object without a name"),
    (lambda root: write(root / "classes.txt", "background\ncat\n"),
     "classes.txt does not have ant, which Annotations/ names"),
    (lambda root: shutil.rmtree(root / "Annotations"), "has no Annotations/.*annotations/.*Segm"),
    (lambda root: (root / "Annotations/a.xml").rename(root / "Annotations/z.xml"),
     "Annotations names no object on any image"),
    (lambda root: (shutil.rmtree(root / "Annotations"),
                   instances(root, {1: "a.jpg"}, [(1, 8)], {})),
     "instances.json is no file of COCO instances"),
    (lambda root: (shutil.rmtree(root / "Annotations"),
                   instances(root, {1: "train/a.jpg", 2: "val/a.jpg"}, [(1, 7)], {7: "cat"})),
     "names val/a.jpg and train/a.jpg: two images cannot share"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_is_told_and_nothing_is_written(root, spoil, words):
    xml(root, "a", "ant")
    spoil(root)
    before = contents(root)
    with pytest.raises(UserError, match=words):
        made(root)
    assert contents(root) == before
