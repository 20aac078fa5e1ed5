"""The folder layout, the score, the batches, the beetles and the VOC reader."""
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index

import data
from data import Folder
import evaluate
from support import beetles, coco as coco_maker, voc as voc_maker
from support.run import DataError


# --- masks and the score -----------------------------------------------------------------------

def test_palette_is_vocs():
    palette = data.voc_palette().tolist()  # the development kit's colour map
    assert palette[0] == [0, 0, 0] and palette[1] == [128, 0, 0] and palette[2] == [0, 128, 0]
    assert palette[8] == [64, 0, 0] and palette[15] == [192, 128, 128]
    assert palette[20] == [0, 64, 128] and palette[255] == [224, 224, 192]


def test_mask_round_trip_keeps_numbers_and_shows_colours(tmp_path):
    mask = np.array([[0, 1, 20], [255, 15, 2]], np.uint8)
    data.save_mask(tmp_path / "m.png", mask)
    assert np.array_equal(data.read_mask(tmp_path / "m.png", 21, (3, 2)), mask)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P" and image.convert("RGB").getpixel((1, 1)) == (192, 128, 128)
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]  # no temporary file stays


def test_miou_by_hand_with_255_on_either_side():
    truth = np.array([[0, 0, 1, 1, 255, 1]], np.uint8)
    guess = np.array([[0, 1, 1, 255, 1, 1]], np.uint8)
    confusion = evaluate.confusion_matrix(guess, truth, 3)
    # background: TP 1, FN 1; class 1: TP 2, FP 1, the predicted 255 is a miss; class 2 is absent
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0]]
    iou = evaluate.iou_per_class(confusion)
    assert iou[:2].tolist() == [1 / 2, 2 / 4] and np.isnan(iou[2])


def test_iou_is_that_of_torchmetrics():
    truth, guess = torch.randint(0, 5, (2, 40, 50), generator=torch.Generator().manual_seed(0))
    truth[:4] = 255
    ours = evaluate.iou_per_class(evaluate.confusion_matrix(guess.numpy(), truth.numpy(), 5))
    theirs = multiclass_jaccard_index(guess, truth, 5, average="none", ignore_index=255)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_confusion_matrix_by_loops():
    rng = np.random.default_rng(0)
    truth, guess = rng.choice([0, 1, 2, 3, 255], (2, 20, 30)).astype(np.uint8)
    expected = np.zeros((4, 5), int)
    for t, g in zip(truth.ravel(), guess.ravel()):
        if t != 255:
            expected[t, g if g != 255 else 4] += 1
    assert np.array_equal(evaluate.confusion_matrix(guess, truth, 4), expected)


# --- batches -----------------------------------------------------------------------------------

def test_batches_are_whole_passes_and_do_not_depend_on_ranks_or_interruption():
    whole = list(data.batches(10, 4, seed=3, start=0, stop=6))
    for a_pass in (whole[0:2], whole[2:4], whole[4:6]):  # 10 // 4 batches, two images are left out
        indices = [index for batch in a_pass for index, _ in batch]
        assert len(set(indices)) == 8 and max(indices) < 10
    draws = [draw for batch in whole for _, draw in batch]
    assert draws == list(range(24))
    assert whole[0] != whole[2] and whole != list(data.batches(10, 4, seed=4, start=0, stop=6))
    assert list(data.batches(10, 4, 3, start=3, stop=6)) == whole[3:]
    ranks = [list(data.batches(10, 4, 3, 0, 6, rank, 2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *ranks):
        assert sorted(batch) == sorted(first + second) and len(first) == len(second) == 2


def test_batches_that_cannot_be_filled_or_shared():
    with pytest.raises(DataError, match="--batch-size 4"):
        next(data.batches(3, 4, 0, 0, 1))
    with pytest.raises(DataError, match="multiple of 3 ranks"):
        next(data.batches(9, 4, 0, 0, 1, 0, 3))


# --- images ------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpegs_of_every_mode_become_rgb(tmp_path, mode):
    picture = Image.new("RGB", (8, 8), (120, 120, 120)).convert(mode)
    picture.save(tmp_path / "a.jpg")
    image = data.read_image(tmp_path / "a.jpg")
    assert image.mode == "RGB" and abs(image.getpixel((4, 4))[1] - 120) < 4


def test_truncated_and_foreign_files_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.jpg", "text.jpg", "missing.jpg"):
        with pytest.raises(DataError, match=name):
            data.read_image(tmp_path / name)


# --- the folder --------------------------------------------------------------------------------

def test_image_labels_are_what_the_masks_show(toy):
    folder = Folder(toy)
    for image_id in folder.ids("train"):
        mask = data.read_mask(folder.mask_path(image_id), 9)
        present = set(np.unique(mask).tolist()) - {255} | {0}
        assert set(folder.image_labels(image_id).nonzero().flatten().tolist()) == present


def test_what_is_wrong_with_a_folder_is_named(toy_copy):
    with pytest.raises(DataError, match="nowhere not found"):
        Folder(toy_copy / "nowhere")
    folder = Folder(toy_copy)
    with pytest.raises(DataError, match="holdout.txt not found"):
        folder.ids("holdout")
    (toy_copy / "ImageSets/Segmentation/none.txt").write_text("\n")
    with pytest.raises(DataError, match="none.txt is empty"):
        folder.ids("none")
    (toy_copy / "image_labels.txt").write_text("a vertical_red\nb unicorn\nc\nd background\n")
    with pytest.raises(DataError, match="unicorn.*classes.txt"):
        folder.image_labels("b")
    for image_id in ("c", "z"):
        with pytest.raises(DataError, match=f"no label for {image_id}"):
            Folder(toy_copy).image_labels(image_id)
    assert Folder(toy_copy).image_labels("d").sum() == 1
    (toy_copy / "classes.txt").write_text("background\ntraffic light\n")
    with pytest.raises(DataError, match="traffic light"):
        Folder(toy_copy)


@pytest.mark.parametrize("pixels, mode, words", [
    (np.full((4, 6), 9), "L", "value 9"), (np.zeros((4, 5)), "L", "5x4, its image 6x4"),
    (np.zeros((4, 6, 3)), "RGB", "RGB image")])
def test_what_is_wrong_with_a_mask_is_named(tmp_path, pixels, mode, words):
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=words):
        data.read_mask(tmp_path / "m.png", 9, size=(6, 4))


def test_presets_give_defaults_and_flags_win(toy, tmp_path):
    import train_cls
    run = ["--run", str(tmp_path)]
    assert train_cls.parse_args(["--data", str(toy), *run]).backbone == "vit_toy"
    voc = train_cls.parse_args(["--data", str(tmp_path), *run, "--epochs", "3"])
    assert (voc.preset, voc.size, voc.epochs, voc.top_k) == ("voc", 384, 3, 6)
    assert voc.train_split == "train"  # there is no trainaug.txt in that folder
    with pytest.raises(SystemExit):
        train_cls.parse_args(["--data", str(toy), *run, "--preset", "imagenet"])


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
    chosen = []
    monkeypatch.setattr(beetles, "toy_texture", lambda name, rng: chosen.append(name) or
                        np.zeros((96, 96), bool))
    first = []
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
    for content in ("{", "[]", '{"images": []}'):
        path.write_text(content)
        with pytest.raises(DataError, match="instances_train2014.json is no COCO instances file"):
            coco_maker.make_coco(coco, counts=counts)
    for extra in ({}, {"category_id": 12}, {"image_id": 77}):
        entry = dict(image_id=1, category_id=1, area=1, iscrowd=0, segmentation=[]) | extra
        if not extra:
            entry.pop("segmentation")
        content = json.loads((coco / "annotations/instances_val2014.json").read_text())
        content["images"].append(dict(id=1, file_name="x.jpg", height=1, width=1))
        path.write_text(json.dumps(content | {"annotations": [entry]}))
        with pytest.raises(DataError, match="instances_train2014.json is no COCO instances file"):
            coco_maker.make_coco(coco, counts=counts)
    path.unlink()
    with pytest.raises(DataError, match="instances_train2014.json not found.*--download"):
        coco_maker.make_coco(coco, counts=counts)


def test_odd_shapes_of_coco():
    shapes = [[], [np.array([3.0, 3.0])], [np.array([0.0, 0.0, 4.0, 4.0])],  # nothing to fill
              [np.array([0.0, 0.0, 4.0, 0.0, 4.0, 4.0, 0.0, 4.0]), np.array([6.0, 6.0])]]
    masks = [coco_maker.coco_mask([(3, 1, False, shape)], {3: 2}, 8, 8) for shape in shapes]
    assert [int(mask.sum()) for mask in masks] == [0, 0, 0, 2 * 16]
    with pytest.raises(DataError, match="size"):
        coco_maker.coco_mask([(3, 1, False, dict(size=[4, 4], counts=[0, 16]))], {3: 2}, 8, 8)


def test_coco_archives_are_fetched_once_and_checked(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive",
                        lambda url, root, md5, remove_finished: fetched.append((url, len(md5))))
    coco_maker.download_coco(tmp_path)
    coco_maker.download_coco(tmp_path)
    assert [length for _, length in fetched] == [32] * 3
    assert fetched[0][0] == "http://images.cocodataset.org/zips/train2014.zip"


def test_worker_tracebacks_are_cut_to_the_one_line():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1
        def __getitem__(self, index):
            raise DataError("a.jpg cannot be read: replace it")
    with pytest.raises(DataError) as caught:
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert str(caught.value) == "a.jpg cannot be read: replace it"
