"""Stage 4 of 4: predict with DeepLabv2 and score; or score any masks; or segment a photo.

Run:    python evaluate.py --data data/toy --run runs/toy [--crf]
        python evaluate.py --data data/toy --masks runs/toy/pseudo --split train
        python evaluate.py --run runs/toy --image photo.jpg --out photo.png
        python evaluate.py --data data/VOC2012 --run runs/voc --crf --split test --export
Reads:  RUN/seg.pt, JPEGImages/, SegmentationClass/; RUN/bpm, RUN/pseudo and Parts/, if any
Writes: RUN/pred/ID.png, RUN/results.json, RUN/figure.png; with --masks results.json beside
        masks that our scripts wrote; with --image the palette mask OUT and OUT's name +
        _overlay.png; with --export RUN/results/, what VOC's test server takes, and no score
Result: mIoU 58.6 (sd 1.0, 5 seeds) on test of the beetles, without CRF, from stages 1 to 3
"""
import json
from pathlib import Path

import numpy as np
import torch

from data import Folder, Images, loader
from datasets.beetles import part_recall
from model import upsample
from support.checkpoints import check_finite
from support.crf import add_crf_flags, crf_settings, dense_crf
from support.files import UserError, file_hash, git_commit, open_run, write_lines
from support.flags import common_flags
from support.inference import load_model, slide
from support.masks import (IGNORE, export, mask_in, read_image, read_mask, read_settings,
                           unfinished, write_masks)
from support.pictures import draw_stages, segment_photo
from support.processes import join_processes, launch, map_in_workers
from support.scores import boundary_iou, note_truth

MAX_CRF_CLASSES = 21  # the CRF refines at most this many classes of an image


def parse_args(argv=None):
    """The flags of stage 4."""
    flags = common_flags(__doc__)
    add = flags.add
    add("--split", "val", "split to predict and score", toy="test")
    add("--masks", None, "score this folder of ID.png instead of predicting", type=Path)
    add("--image", None, "segment this one photo instead", type=Path)
    add("--out", None, "where --image writes its mask", type=Path)
    add("--export", False, "write RUN/results/, what VOC's test server takes, and do not score")
    add_crf_flags(add, "none")
    args = flags.parse(argv, needed=())
    if args.image and (not args.run or not args.out or args.out.suffix != ".png"
                       or args.out.resolve() == args.image.resolve()):
        flags.error("--image needs --run, and --out NAME.png that is not the photo's own")
    if args.export and (args.masks or args.image):
        flags.error("--export writes the predictions of --run: leave --masks and --image out")
    if not args.image and not (args.data and (args.run or args.masks)):
        flags.error("--data and --run (or --masks) are needed")
    return args


# --- the score ---------------------------------------------------------------------------------
def confusion_matrix(prediction, truth, num_classes):
    """(C, C + 1) int64 pixel counts: row true class, column predicted class, last column ignore.

    Pixels whose truth is 255 are left out; a predicted 255 counts as a miss of the true class.
    """
    scored = truth != IGNORE
    column = np.minimum(prediction[scored].astype(np.int64), num_classes)
    cell = truth[scored].astype(np.int64) * (num_classes + 1) + column
    counts = np.bincount(cell, minlength=num_classes * (num_classes + 1))
    return counts.reshape(num_classes, num_classes + 1)


def iou_per_class(confusion):
    """(C,) float64 TP / (TP + FP + FN); NaN for classes that the ground truth does not hold."""
    true_positive = np.diagonal(confusion).astype(float)
    union = confusion.sum(1) + confusion[:, :-1].sum(0) - true_positive
    occurs = confusion.sum(1) > 0
    return np.where(occurs, true_positive / np.maximum(union, 1), np.nan)


def miou(confusion):
    """Mean IoU over the classes that occur; None where no pixel is scored."""
    return float(np.nanmean(iou_per_class(confusion))) if confusion.any() else None


def confusion_of(folder, image_id, directory):
    """The confusion matrix of directory's mask of one image."""
    C, paths = len(folder.classes), (folder.mask_path(image_id), mask_in(directory, image_id))
    truth, mask = (read_mask(path, C) for path in paths)
    if mask.shape != truth.shape:  # one of the two is wrong: say which
        size = read_image(folder.image_path(image_id)).size
        truth, mask = (read_mask(path, C, size) for path in paths)
    return confusion_matrix(mask, truth, C)


def score_masks(folder, ids, directory, workers=0, notes=True):
    """(confusion (C, C + 1), about): directory's masks against those that folder has.

    about says what the score is over, and how many of the images that image_labels.txt knows
    (compared) have a truth with a class that it does not name (unnamed) or without one that it
    names (lacking). With notes doubtful ground truth is reported, one line a problem.
    """
    C = len(folder.classes)
    confusion = np.zeros((C, C + 1), np.int64)
    about = dict.fromkeys(("num_images", "classes_scored", "compared", "unnamed", "lacking"), 0)
    scored = [i for i in ids if folder.mask_path(i).is_file()]
    jobs = [(folder, i, directory) for i in scored]
    for image_id, of_image in zip(scored, map_in_workers(confusion_of, jobs, workers)):
        confusion += of_image
        named = folder.label_numbers(image_id)
        occurs = {*np.flatnonzero(of_image.sum(1)).tolist()} - {0}
        about["compared"] += named is not None
        about["unnamed"] += named is not None and not occurs <= named
        about["lacking"] += named is not None and not named <= occurs
    about |= dict(num_images=len(scored), classes_scored=int((confusion.sum(1) > 0).sum()))
    if scored and notes:
        note_truth(folder, {*ids} - {*scored}, confusion, about)
    return confusion, about


def report(args, folder, directory):
    """Score directory's masks: print the table, write results.json beside a settings.json."""
    ids, made_with = folder.ids(args.split), read_settings(directory)
    confusion, about = score_masks(folder, ids, directory, args.workers)
    if not about["num_images"]:
        raise UserError(f"no ground truth to score: {folder.root}/SegmentationClass has none of "
                        f"the masks of {args.split}")
    iou, contours = iou_per_class(confusion), boundary_iou(folder, ids, directory, args.workers)
    results = dict(
        {name: made_with.get(name) for name in ("checkpoint", "crf", "image_labels_used", "seed")},
        masks=str(directory), split=args.split, **about, miou=miou(confusion),
        iou=by_name(folder, iou), boundary_iou=by_name(folder, contours),
        boundary_miou=float(np.nanmean(contours)) if confusion.any() else None,
        pixel_accuracy=float(np.trace(confusion) / confusion.sum()) if confusion.any() else None,
        ignore_policy="truth 255 is left out; a predicted 255 is a miss",
        git_commit=git_commit(), confusion=confusion.tolist())
    if (folder.root / "Parts/names.txt").is_file():  # of the beetles
        results["part_recall"] = part_recall(folder, ids, directory)
    if made_with:
        write_lines((args.masks or args.run) / "results.json", [json.dumps(results)])
    print_table(results)


def by_name(folder, values):
    """{class name: value, None for NaN}."""
    return dict(zip(folder.classes, np.where(np.isnan(values), None, values).tolist()))


def print_table(results):
    """IoU of each class, their mean, and what they are over."""
    def _percent(value):
        return f"{np.nan if value is None else 100 * value:.2f}"

    print(f"{'class':24s}   IoU %   boundary IoU %")
    for name, value in results["iou"].items():
        print(f"{name:24s}  {_percent(value):>6s}  {_percent(results['boundary_iou'][name]):>6s}")
    for name, value in results.get("part_recall", {}).items():
        print(f"recall of part {name:9s}  {_percent(value):>6s}")
    confusion, word = np.array(results["confusion"]), {True: "yes", False: "no", None: "unknown"}
    missed = 100 * confusion[:, -1].sum() / max(1, confusion.sum())
    print(f"mIoU {_percent(results['miou'])} %  pixel accuracy "
          f"{_percent(results['pixel_accuracy'])} %  boundary IoU "
          f"{_percent(results['boundary_miou'])} %  | "
          f"{results['masks']} on {results['split']} "
          f"({results['num_images']:,} images, {results['classes_scored']} of "
          f"{len(results['iou'])} classes), CRF: {word[results['crf']]}, image labels used at "
          f"inference: {word[results['image_labels_used']]}, truth 255 left out, predicted 255 a "
          f"miss ({missed:.1f} % of pixels)")


# --- prediction --------------------------------------------------------------------------------
@torch.no_grad()
def predict_log_probs(model, image, device, amp, window=None, stride=None, bar=iter):
    """DeepLabv2's log-probabilities (C, h, w), on device, of an image (H, W, 3) uint8."""
    def _probabilities(images):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(images.to(device) / 255)[-1]
        check_finite(logits, model)
        return logits.permute(0, 2, 3, 1).softmax(dim=-1)

    model.eval()
    images = torch.as_tensor(image).permute(2, 0, 1)[None]
    probs = slide(_probabilities, images, model.cell, window, stride, bar)
    return probs[0].permute(2, 0, 1).clamp(min=1e-30).log()


def upsampled_argmax(maps, height, width):
    """upsample(maps, height, width).argmax(0) as uint8; one map at a time is upsampled."""
    best = upsample(maps[:1], height, width)[0]
    mask = torch.zeros((height, width), dtype=torch.uint8, device=maps.device)
    for label in range(1, len(maps)):
        values = upsample(maps[label:label + 1], height, width)[0]
        mask[values > best] = label
        best = torch.maximum(best, values)
    return mask


def predict(logits, image, crf=None):
    """Logits (C, h, w) of an image (H, W, 3) uint8 -> mask (H, W) uint8; crf: crf_settings().

    The CRF is over the classes that are best somewhere, at most the MAX_CRF_CLASSES with most
    pixels: another class hardly gains a pixel, but costs as much time and memory.
    """
    logits, (H, W) = torch.as_tensor(logits), image.shape[:2]
    mask = upsampled_argmax(logits, H, W)
    if crf is not None:
        pixels = mask.flatten().bincount(minlength=len(logits))
        most = pixels.sort(descending=True, stable=True).indices[:MAX_CRF_CLASSES]
        present = most[pixels[most] > 0].sort().values
        probs = upsample(logits[present], H, W).softmax(dim=0)
        mask = present[dense_crf(image, probs, **crf).argmax(0)].byte()
    return mask.cpu().numpy()


def segment_images(model, folder, ids, args, device, crf):
    """Run the network over the images; yields the arguments of predict."""
    for _, image, _ in loader(Images(folder, ids), args, device, batch_size=None, collate_fn=tuple):
        logits = predict_log_probs(model, image, device, args.amp, args.window, args.stride)
        yield logits if device.type == "cuda" else logits.cpu().numpy(), image, crf


def predict_split(args, model, folder, seed, device, crf):
    """Write RUN/pred/ID.png of every image of the split; seed is that of the network."""
    pred, seg = args.run / "pred", args.run / "seg.pt"
    settings = dict(checkpoint=str(seg), masks=str(pred), crf=crf is not None, seed=seed,
                    image_labels_used=False, data=str(args.data.resolve()), seg=file_hash(seg),
                    window=args.window, stride=args.stride,
                    constants=crf and crf | dict(backend=None))  # any backend
    ids, old = folder.ids(args.split), read_settings(pred)
    fresh = bool(old) and old != settings  # else a killed run goes on where it stopped
    todo = ids if fresh else unfinished(ids, {pred: settings}, args.workers,
                                        "delete them, or choose another --run")
    jobs = segment_images(model, folder, todo, args, device, crf)
    results = map_in_workers(predict, jobs, 0 if device.type == "cuda" else args.workers)
    write_masks(([mask] for mask in results), todo, {pred: settings}, fresh, crf, len(ids))


def main(args):
    if args.masks and not args.image:
        return report(args, Folder(args.data), args.masks)
    device, _, world = join_processes(args.device)
    if world > 1:
        raise UserError("evaluate.py is one process: call it without torchrun")
    crf = crf_settings(args, device)
    model, checkpoint = load_model(args.run / "seg.pt", "seg")
    model = model.to(device)

    def _segment(image, bar=iter):
        logits = predict_log_probs(model, image, device, args.amp, args.window, args.stride, bar)
        return predict(logits, image, crf)

    if args.image:
        return segment_photo(args, _segment, checkpoint["classes"])
    open_run(args.run)
    folder = Folder(args.data, checkpoint)
    predict_split(args, model, folder, checkpoint["args"]["seed"], device, crf)
    if args.export:
        return export(args.run, args.split, folder.ids(args.split), crf)
    report(args, folder, args.run / "pred")
    print(f"written: {args.run}/pred, {args.run}/results.json")
    draw_stages(args.run, folder, _segment, "DeepLabv2 + CRF" if crf else "DeepLabv2")


if __name__ == "__main__":
    launch(main, parse_args())
