"""extras/resample.py: bootstrap intervals against hand calculations."""
import numpy as np
import pytest

import resample
from support.files import UserError
from support.masks import save_mask


def confusion(right, wrong):
    """One class beside background, which nobody takes for it: IoU right / (right + wrong)."""
    return np.array([[1, 0, 0], [wrong, right, 0]])


def test_images_that_are_all_alike_leave_no_doubt():
    first = np.tile(confusion(5, 5), (2, 6, 1, 1))
    second = np.tile(confusion(10, 0), (2, 6, 1, 1))
    gain = 100 * (1 - (1 / 6 + 1 / 2) / 2)  # background 1 / (1 + 5)
    assert np.allclose(resample.intervals(first, second, 50), gain)


def test_two_images_by_hand():
    """The gain is d where image 0 is drawn twice (1 in 4), 0 where image 1 is (1 in 4)."""
    first = np.stack([confusion(0, 8), confusion(8, 0)])[None]
    second = np.stack([confusion(8, 0), confusion(8, 0)])[None]
    low, high = resample.intervals(first, second, 400)[0]
    assert low == 0 and high == pytest.approx(100 * (1 - (1 / 9) / 2))


def test_seeds_that_differ_widen_the_second_interval_alone():
    first = np.tile(confusion(5, 5), (4, 6, 1, 1))
    second = np.stack([np.tile(confusion(k, 10 - k), (6, 1, 1)) for k in (4, 5, 6, 9)])
    images, both = resample.intervals(first, second, 400)
    assert images[0] == pytest.approx(images[1]) and both[0] < images[0] < both[1]


def test_the_command_reads_the_runs_that_both_have(toy, tmp_path, capsys):
    ids = (toy / "ImageSets/Segmentation/val.txt").read_text().split()
    for name in ("a/s0", "a/s1", "b/s0"):
        for image_id in ids:
            save_mask(tmp_path / name / f"bpm/{image_id}.png", np.zeros((96, 96)))
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--data", str(toy)]
    resample.main(resample.parse_args(words))
    told = capsys.readouterr().out
    assert f"bpm on val ({len(ids)} images), 1 seeds: " in told
    assert "gain +0.0; 95 % over images +0.0 to +0.0, over images and seeds +0.0 to +0.0" in told
    with pytest.raises(UserError, match="share no sSEED/pred"):
        resample.main(resample.parse_args([*words, "--masks", "pred"]))
