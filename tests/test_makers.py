"""The makers of data sets: the beetles, VOC and COCO, each from a tiny copy of its layout."""
import hashlib
import json

import numpy as np
import pytest
from pycocotools.coco import COCO

import data
from data import Folder
from datasets import beetles, coco as coco_maker, voc as voc_maker
from support.run import DataError


# --- beetles -----------------------------------------------------------------------------------

def test_the_scenes_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for split in range(3):
        for index in range(20):
            _, mask, parts = beetles.toy_scene(split, index)
            digest.update(mask.tobytes() + parts.tobytes())
    assert digest.hexdigest()[:16] == "04b9edf999845a6b"


def test_a_beetle_is_the_pair_of_pattern_and_head():
    assert len(beetles.TOY_CLASSES) == 9 and len(set(beetles.TOY_CLASSES)) == 9
    for index in range(40):
        image, mask, parts = beetles.toy_scene(0, index)
        assert ((parts > 0) == ((mask > 0) & (mask < 255))).all()
        for label in np.setdiff1d(mask, [0, 255]):
            assert (mask == label).sum() >= beetles.MIN_VISIBLE
            head = image[(mask == label) & (parts == 2)]
            if len(head):
                red = beetles.TOY_CLASSES[label].endswith("red")
                assert (head[:, 0].mean() > head[:, 1].mean()) == red


def test_cooccur_changes_the_background_and_nothing_else():
    assert np.array_equal(beetles.toy_scene(1, 3)[0], beetles.toy_scene(1, 3, None)[0])
    for index in range(5):
        plain, mask, parts = beetles.toy_scene(0, index)
        image, same_mask, same_parts = beetles.toy_scene(0, index, 0.5)
        assert np.array_equal(mask, same_mask) and np.array_equal(parts, same_parts)
        assert np.array_equal(plain[parts > 0], image[parts > 0])
        darker = (image < plain).any(-1)[mask == 0].mean()
        assert 0.05 < darker < 0.6


def test_cooccur_is_the_probability_of_the_preferred_texture(monkeypatch):
    chosen, first = [], []
    monkeypatch.setattr(beetles, "toy_texture", lambda name, rng: chosen.append(name) or
                        np.zeros((96, 96), bool))
    for index in range(200):
        shapes = np.random.default_rng([beetles.TOY_SEED, 0, index, 0])
        first.append(shapes.choice(8, size=shapes.integers(1, 4), replace=False)[0])
    for probability, expected in ((0.0, 1 / 4), (0.5, 5 / 8), (1.0, 1)):
        chosen.clear()
        for index in range(200):
            beetles.toy_scene(0, index, probability)
        kept = np.mean([beetles.TEXTURES.index(name) == label // 2  # the pattern, not the head
                        for name, label in zip(chosen, first)])
        assert abs(kept - expected) < 0.09  # 2.6 standard deviations at 5/8
    with pytest.raises(SystemExit):
        data.parse_args(["toy", "--root", "x", "--cooccur", "1.5"])


def test_beetles_of_two_kinds_are_not_mixed_in_one_folder(tmp_path):
    for root, other in ((tmp_path / "a", 0.5), (tmp_path / "b", None)):
        beetles.make_toy(root, (1, 1, 1), 0.9 if other else 0.0)
        beetles.make_toy(root, (2, 1, 1), 0.9 if other else 0.0)
        with pytest.raises(DataError, match="another --cooccur: choose another --root"):
            beetles.make_toy(root, (1, 1, 1), other)


def test_fewer_images_are_a_prefix(toy, tmp_path):
    beetles.make_toy(tmp_path / "small", (2, 1, 1))
    for path in (tmp_path / "small/JPEGImages").iterdir():
        assert path.read_bytes() == (toy / "JPEGImages" / path.name).read_bytes()


def test_the_command_makes_each_data_set(tmp_path, capsys):
    def command(*words):
        data.main(data.parse_args([*words, "--root", str(tmp_path / words[0])]))

    command("toy", "--num", "3", "2", "1")
    assert "9 classes with background; test 1, train 3, val 2" in capsys.readouterr().out
    with pytest.raises(DataError, match="voc/ImageSets/Segmentation/train.txt not found"):
        command("voc")
    with pytest.raises(DataError, match="instances_train2014.json not found"):
        command("coco")


# --- VOC ---------------------------------------------------------------------------------------

@pytest.fixture
def voc(tmp_path):
    """VOC's layout with 2 + 1 images, and SBD's two lists, which overlap val."""
    root, sbd = tmp_path / "voc", tmp_path / "sbd/benchmark_RELEASE/dataset"
    objects = {"a1": ["dog", "person", "dog"], "a2": ["tvmonitor"], "v1": ["cat"], "s1": ["sofa"],
               "s2": ["bus"]}
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    sbd.mkdir(parents=True)
    for image_id, names in objects.items():
        nodes = "".join(f"<object><name>{n}</name><difficult>1</difficult><part><name>head</name>"
                        "</part></object>" for n in names)
        (root / f"Annotations/{image_id}.xml").write_text(f"<annotation>{nodes}</annotation>")
    lists = root / "ImageSets/Segmentation"
    for path, ids in ((lists / "train.txt", "a1 a2"), (lists / "val.txt", "v1"),
                      (sbd / "train.txt", "s1 a1"), (sbd / "val.txt", "s2 v1")):
        path.write_text("\n".join(ids.split()) + "\n")
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
    with pytest.raises(DataError, match="train has 2 images, expected 1464"):
        voc_maker.make_voc(root, sbd)
    with pytest.raises(DataError, match="trainaug has 4 images, expected 10582"):
        voc_maker.make_voc(root, sbd, counts={"train": 2, "val": 1, "trainaug": 10582})
    assert not (root / "image_labels.txt").exists()
    voc_maker.make_voc(root, counts={"train": 2, "val": 1})
    assert "2 images of train" in capsys.readouterr().out
    (root / "Annotations/a2.xml").write_text("<annotation>")
    with pytest.raises(DataError, match="a2.xml"):
        voc_maker.make_voc(root, counts={"train": 2, "val": 1})
    with pytest.raises(DataError, match="train.txt not found"):
        voc_maker.make_voc(root / "elsewhere")


def test_a_download_that_fails_says_what_to_fetch_by_hand(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr("torchvision.datasets.VOCSegmentation.__init__", refuse)
    with pytest.raises(DataError, match="no route to host.*VOCtrainval_11-May-2012.tar"):
        voc_maker.download_voc(tmp_path, tmp_path / "sbd")


# --- MS COCO -----------------------------------------------------------------------------------

def test_coco_masks_from_polygons_rle_and_crowds(coco):
    coco_maker.make_coco(coco, counts={"train": (5, 4), "val": (3, 2)})
    folder = Folder(coco)
    mask = data.read_mask(folder.mask_path("COCO_val2014_000000000101"), 81, (48, 32))
    expected = np.zeros((32, 48), np.uint8)
    expected[20:30, 2:22] = 255           # the crowd, an uncompressed RLE, at the bottom
    expected[4:28, 4:20] = 1              # a person, a polygon, over the crowd
    expected[8:16, 8:16] = 10             # a traffic light, smaller, over the person
    expected[2:6, 30:40] = 80             # a toothbrush, a compressed RLE
    assert np.array_equal(mask, expected)
    assert np.array_equal(data.read_mask(folder.mask_path("COCO_val2014_000000000102"), 81),
                          np.full((32, 48), 255))


def test_coco_folder_labels_links_and_splits(coco, capsys):
    coco_maker.make_coco(coco, counts={"train": (5, 4), "val": (3, 2)})
    folder = Folder(coco)
    assert "train: 5 images, 4 with an object" in capsys.readouterr().out
    assert len(folder.classes) == 81 and folder.classes[10] == "traffic_light"
    assert folder.classes[1] == "person" and folder.classes[80] == "toothbrush"
    assert folder.ids("val") == ["COCO_val2014_000000000101", "COCO_val2014_000000000102"]
    assert folder.ids("train") == [f"COCO_train2014_{i:012d}" for i in (1, 2, 3, 4)]  # 5 has none
    labels = folder.image_labels("COCO_val2014_000000000101").nonzero().flatten().tolist()
    assert labels == [0, 1, 10, 80]
    crowd_only = folder.image_labels("COCO_val2014_000000000102").nonzero().flatten().tolist()
    assert crowd_only == [0, 1]  # a crowd is an object
    for image_id in folder.ids("train") + folder.ids("val"):
        path = folder.image_path(image_id)
        assert path.is_symlink() and not path.readlink().is_absolute()
        assert data.read_image(path).size == (48, 32)
    assert not folder.mask_path("COCO_train2014_000000000001").exists()
    coco_maker.make_coco(coco, train_masks=True, counts={"train": (5, 4), "val": (3, 2)})
    assert folder.mask_path("COCO_train2014_000000000001").is_file()


def test_what_is_wrong_with_coco_is_named(coco):
    with pytest.raises(DataError, match="has 5 images, 4 with an object; expected 82783 and 82081"):
        coco_maker.make_coco(coco)
    counts = {"train": (5, 4), "val": (3, 2)}
    (coco / "train2014/COCO_train2014_000000000002.jpg").unlink()
    with pytest.raises(DataError, match="000000000002.jpg not found: unpack train2014.zip again"):
        coco_maker.make_coco(coco, counts=counts)
    assert not (coco / "image_labels.txt").exists()
    path = coco / "annotations/instances_train2014.json"
    for content, words in (("{", "is no COCO instances file"), ("[]", "is no COCO instances file"),
                           ('{"images": []}', "has 0 images")):
        path.write_text(content)
        with pytest.raises(DataError, match=f"instances_train2014.json {words}"):
            coco_maker.make_coco(coco, counts=counts)
    for extra in ({}, {"category_id": 12}, {"image_id": 77}):
        entry = dict(image_id=1, category_id=1, area=1, iscrowd=0, segmentation=[]) | extra
        if not extra:
            entry.pop("segmentation")
        content = json.loads(path.with_name("instances_val2014.json").read_text())
        content["images"].append(dict(id=1, file_name="x.jpg", height=1, width=1))
        path.write_text(json.dumps(content | {"annotations": [entry]}))
        with pytest.raises(DataError, match="instances_train2014.json is no COCO instances file"):
            coco_maker.make_coco(coco, counts=counts)
    path.unlink()
    with pytest.raises(DataError, match="instances_train2014.json not found.*--download"):
        coco_maker.make_coco(coco, counts=counts)


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
    with pytest.raises(DataError, match="image 7 is .*, the size of its RLE"):
        mask(dict(size=[4, 4], counts=[0, 16]))


def test_coco_archives_are_fetched_once_and_checked(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive",
                        lambda url, root, md5, remove_finished: fetched.append((url, len(md5))))
    coco_maker.download_coco(tmp_path)
    coco_maker.download_coco(tmp_path)
    assert [length for _, length in fetched] == [32] * 3
    assert fetched[0][0] == "http://images.cocodataset.org/zips/train2014.zip"
