"""Average precision, and notes on what may be wrong about a score."""
import torch


def mean_average_precision(scores, labels):
    """Mean over the object classes that occur of their average precision; (n, C) each."""
    occurs = [c for c in range(1, labels.shape[1]) if labels[:, c].any()]
    found = [average_precision(scores[:, c], labels[:, c]) for c in occurs]
    return sum(found) / len(found) if found else None


def average_precision(scores, labels):
    """Area under precision over recall: the mean, over the images that show the class, of the
    precision among all that score as high as it does; scores (n,), labels (n,).
    """
    every, positive = scores.sort().values, scores[labels > 0].sort().values
    hits, kept = (len(of) - torch.searchsorted(of, positive) for of in (positive, every))
    return (hits / kept).double().mean().item()


def note_shared(ids, val_ids):
    """Say how many images a score would be over that were trained on."""
    shared = len({*ids} & {*val_ids})
    if shared:
        print(f"note: {shared:,} of {len(val_ids):,} images of val are trained on as well: its "
              "score is too good", flush=True)


def note_truth(folder, missing, confusion, about):
    """Say in a line each what about a score may be other than it seems."""
    where, n, known = folder.root / "SegmentationClass", about["num_images"], about["compared"]
    if missing:
        print(f"note: {len(missing):,} of {len(missing) + n:,} images are not scored: {where} has "
              f"no {min(missing)}.png", flush=True)
    if not confusion[1:].any() and (about["lacking"] or not known):
        print(f"note: no class but background occurs in {where}: are its objects 255, or is it of "
              "other images?", flush=True)
    elif not known:
        print(f"note: image_labels.txt has none of the {n:,} images: truth and labels are not "
              "compared", flush=True)
    elif about["unnamed"] or about["lacking"]:
        print(f"note: the truth of {about['unnamed']:,} of {known:,} images holds a class that "
              f"their line in image_labels.txt does not name, {about['lacking']:,} lack one that "
              "it names: are the masks numbered as in classes.txt?", flush=True)
