"""Images and masks, and how they become batches; test_hostile.py has the folder."""
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Folder, LabelledImages
from support.files import UserError
from support.masks import read_image, read_mask, save_mask

EVERY = list(data.AUGMENT)


# --- images ------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpegs_of_every_mode_become_rgb(tmp_path, mode):
    picture = Image.new("RGB", (8, 8), (120, 120, 120)).convert(mode)
    picture.save(tmp_path / "a.jpg")
    image = read_image(tmp_path / "a.jpg")
    assert image.mode == "RGB" and abs(image.getpixel((4, 4))[1] - 120) < 4


def test_images_come_as_decoded_and_resized_as_pillow_resizes(toy):
    folder = Folder(toy)
    ids = folder.ids("val")
    image_id, image, resized = data.Images(folder, ids, 48)[2]
    assert image_id == ids[2]
    with Image.open(folder.image_path(image_id)) as picture:
        assert np.array_equal(image, np.array(picture))
        expected = np.array(picture.resize((48, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(resized.permute(1, 2, 0), expected)


# --- masks -------------------------------------------------------------------------------------

def test_mask_round_trip_keeps_numbers_and_shows_vocs_colours(tmp_path):
    mask = np.array([[0, 1, 20], [255, 15, 2]], np.uint8)
    colours = [[[0, 0, 0], [128, 0, 0], [0, 64, 128]],
               [[224, 224, 192], [192, 128, 128], [0, 128, 0]]]
    save_mask(tmp_path / "m.png", mask)
    assert np.array_equal(read_mask(tmp_path / "m.png", 21, (3, 2)), mask)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P" and np.array(image.convert("RGB")).tolist() == colours


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
    with pytest.raises(UserError, match="--batch-size 4"):
        next(data.batches(3, 4, 0, 0, 1))
    with pytest.raises(UserError, match="multiple of 3 ranks"):
        next(data.batches(9, 4, 0, 0, 1, 0, 3))


# --- augmentation ------------------------------------------------------------------------------

def augmented(name, image, draws):
    results = []
    for draw in range(draws):
        with data.seeded(0, draw):
            results.append(data.AUGMENT[name](image))
    return results


@pytest.mark.parametrize("name, change", [
    ("flip", lambda image: image.flip(2)), ("vflip", lambda image: image.flip(1)),
    ("transpose", lambda image: image.transpose(1, 2))])
@pytest.mark.parametrize("side", [8, 9])
def test_each_augmentation_does_what_its_name_says(name, change, side):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    results, changed = augmented(name, image, 40), change(image)
    assert all(torch.equal(r, image) or torch.equal(r, changed) for r in results)
    assert 10 < sum(torch.equal(r, changed) for r in results) < 30


def test_jitter_scales_brightness_by_up_to_three_tenths():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    found = [result.float().mean().item() for result in augmented("jitter", grey, 200)]
    assert 69 <= min(found) < 85 and 115 < max(found) <= 131


def test_augmentation_is_a_function_of_seed_and_draw_alone(toy):
    folder = Folder(toy)
    ids = folder.ids("val")

    def images(seed, draws):
        dataset = LabelledImages(folder, ids, 48, EVERY, seed)
        return [dataset[0, draw][0] for draw in draws]

    first = images(5, range(8))
    before = torch.get_rng_state()
    again = images(5, range(7, -1, -1))[::-1]
    assert torch.equal(torch.get_rng_state(), before)  # of dropout, for example
    assert all(map(torch.equal, first, again))
    assert len({image.numpy().tobytes() for image in first}) == 8
    assert not any(map(torch.equal, first, images(6, range(8))))


def test_without_augmentation_training_sees_the_resized_image(toy):
    folder = Folder(toy)
    ids = folder.ids("val")
    image, labels = LabelledImages(folder, ids, 48)[3, 77]
    assert torch.equal(image, data.Images(folder, ids, 48)[3][2])
    assert torch.equal(labels, folder.image_labels(ids[3]))
