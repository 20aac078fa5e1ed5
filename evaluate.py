"""Stage 4 of 4: predict with DeepLabv2 and score, score any folder of masks, or segment a photo.

Run:    python evaluate.py --data data/toy --run runs/toy [--crf]
        python evaluate.py --data data/toy --masks runs/toy/pseudo --split train
        python evaluate.py --run runs/toy --image photo.jpg --out photo.png
        python evaluate.py --data data/VOC2012 --run runs/voc --crf --split test --export
Reads:  RUN/seg.pt, JPEGImages/, SegmentationClass/; Parts/ where there is one
Writes: RUN/pred/ID.png, RUN/results.json, RUN/figure.png; with --masks DIR/results.json alone;
        with --image the palette mask OUT and OUT's name + _overlay.png; with --export RUN/results/,
        what VOC's test server takes, and no score
"""
import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from data import IGNORE, Folder, Images
from model import build, upsample
from support.crf import add_crf_flags, constants_of, crf_settings, dense_crf
from support.run import (DataError, atomic, claim, digest, in_parallel, join_processes, load_checkpoint,
                         parse, run, stage_parser, write_lines)

IGNORE_POLICY = "pixels whose truth is 255 are left out; a predicted 255 is a miss"
CHUNK, MAX_CLASSES = 16, 21  # classes upsampled at once; classes that the CRF is over, at most
EXPORT = "results/VOC2012/Segmentation/comp6_test_cls"  # where VOC's server looks for ID.png
CELL, ROWS = 150, 6  # the figure: pixels a side of one picture, and how many images


def parse_args(argv=None):
    """The flags of stage 4."""
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--split", help="split to predict and score")
    add("--masks", type=Path, help="score this folder of ID.png instead of predicting")
    add("--image", type=Path, help="segment this one photo instead")
    add("--out", type=Path, help="where --image writes its mask")
    add("--export", action="store_true", help=f"write RUN/{EXPORT}/ID.png for VOC's test server "
        "and do not score; --split test")
    add_crf_flags(parser, default="none")
    args = parse(parser, "evaluate", argv, needed=())
    if args.image and not (args.run and args.out):
        parser.error("--image needs --run and --out")
    if args.image and (args.out.suffix != ".png" or args.out.resolve() == args.image.resolve()):
        parser.error("--out is the mask's name: a .png, and not the photo's own")
    if args.export and (args.masks or args.image):
        parser.error("--export writes the predictions of --run: leave --masks and --image out")
    if not args.image and not (args.data and (args.run or args.masks)):
        parser.error("--data and --run (or --masks) are needed")
    return args


# --- prediction --------------------------------------------------------------------------------

@torch.no_grad()
def predict_logits(model, image, device, amp):
    """(H, W, 3) uint8 -> the multi-scale maximum of DeepLabv2's logits, (C, H/8, W/8) on device."""
    model.eval()
    images = torch.as_tensor(image, device=device).permute(2, 0, 1)[None] / 255
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        return model(images)[-1][0]


def upsampled_argmax(logits, height, width):
    """Logits (C, h, w) -> (height, width) uint8 on their device, the best class of each pixel.

    A few classes at a time: 81 classes of a 960x960 image would be 300 MB at once.
    """
    mask = torch.zeros(height, width, dtype=torch.uint8, device=logits.device)
    best = torch.full_like(mask, -torch.inf, dtype=logits.dtype)
    for first in range(0, len(logits), CHUNK):
        value, label = upsample(logits[first:first + CHUNK], height, width).max(dim=0)
        mask = torch.where(value > best, (label + first).byte(), mask)
        best = torch.maximum(best, value)
    return mask


def predict(logits, image, crf=None):
    """Logits (C, h, w) of an image (H, W, 3) uint8 -> mask (H, W) uint8; crf as in crf_settings.

    The CRF is over the classes that are best somewhere (at most the MAX_CLASSES with most pixels):
    a class that is nowhere best hardly gains a pixel, but costs as much time and memory as another.
    """
    logits, (H, W) = torch.as_tensor(logits), image.shape[:2]
    mask = upsampled_argmax(logits, H, W)
    if crf is None:
        return mask.cpu().numpy()
    pixels = mask.flatten().bincount(minlength=len(logits))
    most = pixels.sort(descending=True, stable=True).indices[:MAX_CLASSES]
    present = most[pixels[most] > 0].sort().values
    probs = upsample(logits[present], H, W).softmax(dim=0)
    return present[dense_crf(image, probs, **crf).argmax(0)].byte().cpu().numpy()


def prediction_jobs(model, folder, ids, args, device, out, crf):
    """Run the network over the images and yield (arguments of predictions, paths) of each."""
    loader = DataLoader(Images(folder, ids), batch_size=None, num_workers=args.workers)
    for index, image in loader:
        logits = predict_logits(model, image, device, args.amp)
        yield (logits, image, crf), [out / f"{ids[index]}.png"]


def predictions(logits, image, crf):
    """[predict(...)]: an image's masks as write_all takes them."""
    return [predict(logits, image, crf)]


# --- scores ------------------------------------------------------------------------------------

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


def confusion_of(mask_path, truth_path, num_classes):
    """One image's confusion matrix; runs in a worker process."""
    truth = data.read_mask(truth_path, num_classes)
    mask = data.read_mask(mask_path, num_classes, size=truth.shape[::-1])
    return confusion_matrix(mask, truth, num_classes)


def score_masks(folder, ids, directory, workers=0):
    """(confusion (C, C + 1), images scored): directory's masks against those that folder has."""
    C = len(folder.classes)
    jobs = [(directory / f"{i}.png", folder.mask_path(i), C) for i in ids
            if folder.mask_path(i).is_file()]
    return sum(in_parallel(confusion_of, jobs, workers), np.zeros((C, C + 1), np.int64)), len(jobs)


def save_masks(masks, paths):
    """Write each mask; runs in a worker process."""
    for mask, path in zip(masks, paths):
        data.save_mask(path, mask)


def compute_and_save(compute, inputs, paths):
    """Write the masks compute(*inputs); runs in a worker process."""
    save_masks(compute(*inputs), paths)


def write_all(compute, jobs, workers, device, crf):
    """Write the masks compute(*inputs) of every (inputs, paths) job; yields after each job.

    On a GPU this process computes and the workers write; on a CPU the workers do both.
    """
    if device.type == "cuda" and (crf is None or crf["backend"] == "torch"):
        jobs = ((compute(*inputs), paths) for inputs, paths in jobs)
        return in_parallel(save_masks, jobs, workers)
    jobs = ((compute, [x.cpu().numpy() if torch.is_tensor(x) else x for x in inputs], paths)
            for inputs, paths in jobs)  # arrays: tensors do not travel well to other processes
    return in_parallel(compute_and_save, jobs, workers)


def part_recall(folder, ids, directory):
    """{part name: share of its pixels whose prediction is the true class}, from Parts/."""
    names = (folder.root / "Parts/names.txt").read_text().split()
    found, total = np.zeros(len(names) + 1), np.zeros(len(names) + 1)
    for image_id in ids:
        truth = data.read_mask(folder.mask_path(image_id), len(folder.classes))
        mask = data.read_mask(directory / f"{image_id}.png", len(folder.classes))
        parts = data.read_mask(folder.root / "Parts" / f"{image_id}.png", len(names) + 1)
        total += np.bincount(parts.ravel(), minlength=len(total))
        found += np.bincount(parts[mask == truth], minlength=len(total))
    return {name: found[i] / max(total[i], 1) for i, name in enumerate(names, 1)}


def git_commit():
    """The commit of this code, or None outside a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                              capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def score(folder, split, directory, about, workers):
    """Print the table of directory's masks on the split; return the results that are written."""
    ids = folder.ids(split)
    confusion, scored = score_masks(folder, ids, directory, workers)
    if not scored:
        raise DataError(f"no ground truth to score: {folder.root}/SegmentationClass has none of "
                        f"the masks of {split}")
    iou = iou_per_class(confusion)
    results = dict(about, split=split, num_images=scored, miou=float(np.nanmean(iou)),
                   iou={n: None if np.isnan(v) else float(v) for n, v in zip(folder.classes, iou)},
                   pixel_accuracy=float(np.trace(confusion) / confusion.sum()),
                   ignore_policy=IGNORE_POLICY, git_commit=git_commit(),
                   confusion=confusion.tolist())
    if (folder.root / "Parts/names.txt").is_file():
        results["part_recall"] = part_recall(folder, ids, directory)
    print(f"{'class':24s}   IoU %")
    for name, value in zip(folder.classes, iou):
        print(f"{name:24s}  {100 * value:6.2f}")
    for name, value in results.get("part_recall", {}).items():
        print(f"{'recall of part ' + name:24s}  {100 * value:6.2f}")
    word = {True: "yes", False: "no", None: "unknown"}
    print(f"mIoU {100 * results['miou']:.2f} %  pixel accuracy "
          f"{100 * results['pixel_accuracy']:.2f} %  | {about['checkpoint'] or about['masks']} "
          f"on {split} ({scored:,} images), CRF: {word[about['crf']]}, image labels used at "
          f"inference: {word[about['image_labels_used']]}, 255 ignored")
    return results


# --- pictures ----------------------------------------------------------------------------------

def colour(mask):
    """(H, W) class numbers -> PIL RGB in VOC's colours."""
    return Image.fromarray(data.voc_palette()[mask])


def legend(names, width):
    """A strip of colour patches with class names; names is {class number: name}."""
    font, x, y, places = ImageFont.load_default(13), 8, 6, []
    for number, name in names.items():
        length = 30 + int(font.getlength(name))
        if x + length > width and x > 8:
            x, y = 8, y + 20
        places.append((x, y, number, name))
        x += length
    strip = Image.new("RGB", (width, y + 24), "white")
    draw = ImageDraw.Draw(strip)
    for x, y, number, name in places:
        fill = tuple(data.voc_palette()[number].tolist())
        draw.rectangle((x, y + 1, x + 14, y + 15), fill, "black")
        draw.text((x + 19, y), name, "black", font)
    return strip


def stack(pictures):
    """PIL images of one width, one below the other."""
    sheet = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures)), "white")
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet


def grid(title, headings, rows):
    """One sheet: a title, a heading for each column, rows of PIL images fitted to square cells."""
    step = CELL + 6
    sheet = Image.new("RGB", (step * len(headings) + 6, 46 + step * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 4), title, "black", ImageFont.load_default(13))
    for column, heading in enumerate(headings):
        draw.text((8 + step * column, 25), heading, "black", ImageFont.load_default(15))
        for row, pictures in enumerate(rows):
            resample = Image.Resampling.LANCZOS if column == 0 else Image.Resampling.NEAREST
            fitted = ImageOps.contain(pictures[column], (CELL, CELL), resample)
            sheet.paste(fitted, (6 + step * column, 46 + step * row))
    return sheet


def save_picture(picture, path):
    """Write a PNG, atomically."""
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")


def draw_figure(model, folder, args, device, crf):
    """RUN/figure.png: evenly spaced images that have pseudo masks, stage by stage."""
    bpm, pseudo = args.run / "bpm", args.run / "pseudo"
    ids = [path.stem for path in sorted(bpm.glob("*.png"))
           if folder.mask_path(path.stem).is_file() and (pseudo / path.name).is_file()]
    if not ids:
        print(f"no figure.png: {folder.root} has no ground truth of images with pseudo masks")
        return
    C, rows, seen = len(folder.classes), [], {0}
    for image_id in ids[::max(1, len(ids) // ROWS)][:ROWS]:
        image = data.read_image(folder.image_path(image_id))
        paths = folder.mask_path(image_id), bpm / f"{image_id}.png", pseudo / f"{image_id}.png"
        masks = [data.read_mask(path, C, image.size) for path in paths]
        pixels = np.array(image)
        masks.append(predict(predict_logits(model, pixels, device, args.amp), pixels, crf))
        seen.update(*(np.unique(mask).tolist() for mask in masks))
        rows.append([image, *map(colour, masks)])
    names = {k: "ignore" if k == IGNORE else folder.classes[k] for k in sorted(seen)}
    sheet = grid("Training images, evenly spaced, not chosen. BPM and pseudo masks know the image "
                 "labels; DeepLabv2 does not.",
                 ["image", "ground truth", "BPM (Eq. 10)", "pseudo (CRF)",
                  "DeepLabv2" + (" + CRF" if crf else "")], rows)
    save_picture(stack([sheet, legend(names, sheet.width)]), args.run / "figure.png")
    print(f"written: {args.run}/figure.png")


# --- the stage ---------------------------------------------------------------------------------

def segment_photo(args, model, classes, device, crf):
    """Write the mask and the overlay of --image."""
    image = ImageOps.exif_transpose(data.read_image(args.image))
    pixels = np.array(image)
    mask = predict(predict_logits(model, pixels, device, args.amp), pixels, crf)
    data.save_mask(args.out, mask)
    blend = Image.blend(image, colour(mask), 0.6)
    overlay = Image.composite(blend, image, Image.fromarray((mask > 0).astype(np.uint8) * 255))
    zoom = max(1, -(-480 // overlay.width))  # a small photo is enlarged, so that the legend fits
    size = zoom * overlay.width, zoom * overlay.height
    overlay = overlay.resize(size, Image.Resampling.NEAREST)
    names = {k: classes[k] for k in np.unique(mask).tolist()}
    path = args.out.with_name(f"{args.out.stem}_overlay.png")
    save_picture(stack([overlay, legend(names, overlay.width)]), path)
    print(f"{args.out} and {path}: {', '.join(names.values())}")


def main(args):
    if args.masks and not args.image:
        note = args.masks / "settings.json"
        made = json.loads(note.read_text()) if note.is_file() else {}
        about = dict(checkpoint=None, masks=str(args.masks), crf=made.get("crf"),
                     image_labels_used=made.get("image_labels_used"), seed=made.get("seed"))
        results = score(Folder(args.data), args.split, args.masks, about, args.workers)
        write_lines(args.masks / "results.json", [json.dumps(results)])
        return
    device, _, _ = join_processes()
    crf = crf_settings(args, device)
    checkpoint = load_checkpoint(args.run / "seg.pt", "seg")
    model = build(checkpoint).to(device)
    if args.image:
        segment_photo(args, model, checkpoint["classes"], device, crf)
        return

    # --- predict ---
    folder = Folder(args.data)
    if checkpoint["classes"] != folder.classes:
        raise DataError(f"{args.run}/seg.pt has other classes than {args.data}/classes.txt")
    ids, pred = folder.ids(args.split), args.run / "pred"
    about = dict(checkpoint=str(args.run / "seg.pt"), masks=str(pred), crf=crf is not None,
                 image_labels_used=False, seed=checkpoint["args"]["seed"])
    settings = about | dict(data=str(args.data.resolve()), seg=digest(args.run / "seg.pt"),
                            constants=constants_of(crf) or None)
    note = pred / "settings.json"
    if not note.is_file() or json.loads(note.read_text()) != settings:
        claim(pred, settings, overwrite=True)  # else a killed run goes on where it stopped
    todo = [i for i in ids if not (pred / f"{i}.png").is_file()]
    jobs, began = prediction_jobs(model, folder, todo, args, device, pred, crf), time.time()
    for _ in tqdm(write_all(predictions, jobs, args.workers, device, crf), total=len(todo),
                  desc=f"predict {args.split}", disable=None):
        pass
    print(f"evaluate  {len(todo):,} of {len(ids):,} images were still to do, "
          f"{time.time() - began:.0f} s, CRF by {crf['backend'] if crf else 'nobody'}")

    if args.export:
        for path in (args.run / EXPORT).glob("*.png"):
            path.unlink()  # of another split
        for image_id in ids:
            with atomic(args.run / EXPORT / f"{image_id}.png") as temporary:
                shutil.copyfile(pred / f"{image_id}.png", temporary)
        print(f"written: {len(ids):,} masks of {args.split}, CRF: {'yes' if crf else 'no'}; upload "
              f"the archive of `tar czf results.tgz -C {args.run} results`")
        return

    # --- score ---
    results = score(folder, args.split, pred, about, args.workers)
    write_lines(args.run / "results.json", [json.dumps(results)])
    print(f"written: {pred}, {args.run}/results.json")
    draw_figure(model, folder, args, device, crf)


if __name__ == "__main__":
    run(main, parse_args())
