"""Stage 2 of 4: pseudo masks from the patch classifier: upsample, argmax (Eq. 10), dense CRF.

Run:    python make_pseudo.py --data data/toy --run runs/toy
        torchrun --nproc-per-node=2 -- make_pseudo.py --data data/VOC2012 --run runs/voc
Reads:  RUN/cls.pt, JPEGImages/, image_labels.txt; a mask only to score at the very end
Writes: RUN/bpm/ID.png     baseline pseudo masks: argmax of the upsampled maps (Eq. 10)
        RUN/pseudo/ID.png  the same after the CRF: what stage 3 trains on
A killed run goes on where it stopped: masks that are already written are skipped.
"""
import argparse
import hashlib
import json
import os
from collections import deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pydensecrf.densecrf as densecrf
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from data import DataError, Folder
from model import build, join_processes, load_checkpoint

STAGE = "make_pseudo"
PROB_FLOOR = 1e-5  # the CRF's unary energy is -log(p): keeps it finite


def add_crf_flags(parser):
    """The CRF's constants, as flags; crf_settings(args) hands them to dense_crf."""
    add = parser.add_argument
    add("--crf-iterations", type=int, default=10, help="mean-field iterations")
    add("--crf-sxy", type=float, default=67, help="bilateral kernel: deviation in pixels")
    add("--crf-srgb", type=float, default=3, help="bilateral kernel: deviation in RGB levels")
    add("--crf-compat", type=float, default=4, help="bilateral kernel: weight of its Potts term")


def crf_settings(args):
    """The keyword arguments of dense_crf that the flags set."""
    return dict(iterations=args.crf_iterations, bilateral_sxy=args.crf_sxy,
                bilateral_srgb=args.crf_srgb, bilateral_compat=args.crf_compat)


def parse_args(argv=None):
    """The flags of stage 2."""
    parser = data.stage_parser(__doc__)
    add = parser.add_argument
    add("--split", help="split whose images get masks; their image labels are used")
    add("--size", type=data.positive, help="the network sees SIZE x SIZE: the paper's is higher "
        "than in training (Sec. 0.4.2)")
    add("--batch-size", type=data.positive, default=8, help="images of one forward pass")
    add("--max-norm", action=argparse.BooleanOptionalAction, default=True,
        help="divide each class's map by its own maximum before the argmax (ViT-PCM)")
    add("--crf", action=argparse.BooleanOptionalAction, default=True, help="write pseudo/ as well")
    add_crf_flags(parser)
    add("--overwrite", action="store_true", help="delete RUN/bpm and RUN/pseudo and start anew")
    return data.parse(parser, STAGE, argv)


# --- from patch probabilities to masks ---------------------------------------------------------

def present_probs(patch_probs, image_labels, max_norm=True):
    """Y (h, w, C), labels (C,) -> class numbers (P,) and maps (P, h, w) of the P present classes.

    The training images' labels are known, so absent classes are zeroed: here, left out. Each map is
    divided by its own maximum, as in ViT-PCM, and the classes are renormalised at every patch.
    """
    present = image_labels.nonzero().flatten()
    maps = patch_probs[..., present].permute(2, 0, 1)  # (P, h, w)
    if max_norm:
        maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=PROB_FLOOR)
    return present, maps / maps.sum(dim=0, keepdim=True).clamp(min=PROB_FLOOR)


def upsample(maps, height, width):
    """(P, h, w) -> (P, height, width), bilinear; maps that sum to one still do."""
    return F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]


def dense_crf(image, probs, *, iterations=10, gaussian_sxy=1, gaussian_compat=3,
              bilateral_sxy=67, bilateral_srgb=3, bilateral_compat=4):
    """Mean field in a fully connected CRF (Kraehenbuehl & Koltun 2011), by pydensecrf.

    image (H, W, 3) uint8 RGB, as it was decoded; probs (C, H, W) float32, summing to one over C.
    Returns refined probabilities (C, H, W) float32. sxy are in pixels, srgb in levels of 0 to 255;
    the defaults are ViT-PCM's.
    """
    C, H, W = probs.shape
    if C == 1:
        return probs
    crf = densecrf.DenseCRF2D(W, H, C)
    unary = -np.log(np.maximum(probs, PROB_FLOOR), dtype=np.float32)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(C, -1)))
    crf.addPairwiseGaussian(sxy=gaussian_sxy, compat=gaussian_compat)
    crf.addPairwiseBilateral(sxy=bilateral_sxy, srgb=bilateral_srgb, compat=bilateral_compat,
                             rgbim=np.ascontiguousarray(image))
    return np.array(crf.inference(iterations), dtype=np.float32).reshape(C, H, W)


def write_masks(job):
    """One image's masks from its patch maps; runs in a worker process."""
    image_path, present, maps, bpm_path, pseudo_path, crf = job
    image = data.read_image(image_path)
    probs = upsample(torch.from_numpy(maps), image.height, image.width).numpy()
    if bpm_path is not None:
        data.save_mask(bpm_path, present[probs.argmax(0)])  # Eq. (10)
    if pseudo_path is not None:
        data.save_mask(pseudo_path, present[dense_crf(np.array(image), probs, **crf).argmax(0)])


def in_parallel(function, jobs, workers):
    """Yield function(job) in order, from worker processes, while jobs are still being made."""
    if workers == 0:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = deque()
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > 8 * workers:  # bounds the memory that waiting jobs hold
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# --- the stage ---------------------------------------------------------------------------------

class Images(Dataset):
    """index -> image (3, S, S) uint8, index."""

    def __init__(self, folder, ids, size):
        self.folder, self.ids, self.size = folder, ids, size

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image = data.read_image(self.folder.image_path(self.ids[index]))
        return data.to_tensor(image.resize((self.size, self.size), Image.Resampling.BICUBIC)), index


@torch.no_grad()
def mask_jobs(model, folder, ids, args, device, outputs):
    """Run the network over the images and yield write_masks's jobs."""
    loader = DataLoader(Images(folder, ids, args.size), args.batch_size, num_workers=args.workers)
    for images, indices in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            patch_probs = model(images.to(device) / 255).cpu()
        for index, Y in zip(indices.tolist(), patch_probs):
            present, maps = present_probs(Y, folder.image_labels(ids[index]), args.max_norm)
            paths = [out / f"{ids[index]}.png" if out else None for out in outputs]
            yield (folder.image_path(ids[index]), present.numpy(), maps.numpy(), *paths,
                   crf_settings(args))


def digest(path):
    """A short fingerprint of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def claim(directory, settings, overwrite):
    """Note what the masks in directory are made with; refuse to mix them with others."""
    note = directory / "settings.json"
    if overwrite and directory.is_dir():
        for path in directory.glob("*.png"):
            path.unlink()
    elif note.is_file() and json.loads(note.read_text()) != settings:
        raise DataError(f"{directory} holds masks of other data, cls.pt or flags ({note}): "
                        "--overwrite replaces them, --run writes elsewhere")
    data.write_lines(note, [json.dumps(settings)])


def confusion_of(job):
    """One image's confusion matrix; runs in a worker process."""
    mask_path, truth_path, num_classes = job
    truth = data.read_mask(truth_path, num_classes)
    mask = data.read_mask(mask_path, num_classes, size=truth.shape[::-1])
    return data.confusion_matrix(mask, truth, num_classes)


def score_masks(folder, ids, directory, workers=0):
    """(confusion (C, C + 1), images scored): directory's masks against those that folder has."""
    C = len(folder.classes)
    jobs = [(directory / f"{i}.png", folder.mask_path(i), C) for i in ids
            if folder.mask_path(i).is_file()]
    return sum(in_parallel(confusion_of, jobs, workers), np.zeros((C, C + 1), np.int64)), len(jobs)


def main(args):
    device, rank, world = join_processes()

    # --- model and data ---
    checkpoint = load_checkpoint(args.run / "cls.pt", "cls")
    model = build(checkpoint).to(device)
    folder = Folder(args.data)
    if checkpoint["classes"] != folder.classes:
        raise DataError(f"{args.run}/cls.pt has other classes than {args.data}/classes.txt")
    if rank == 0 and checkpoint["epoch"] < checkpoint["args"]["epochs"]:
        print(f"note: cls.pt is of epoch {checkpoint['epoch']} of {checkpoint['args']['epochs']}")
    ids = folder.ids(args.split)
    for image_id in ids:
        folder.image_labels(image_id)  # fails early, by name

    # --- what is there already ---
    bpm, pseudo = args.run / "bpm", args.run / "pseudo" if args.crf else None
    if rank == 0:
        settings = dict(cls=digest(args.run / "cls.pt"), data=str(args.data.resolve()),
                        size=args.size, max_norm=args.max_norm, image_labels_used=True,
                        seed=checkpoint["args"]["seed"])
        claim(bpm, settings | dict(crf=False), args.overwrite)
        if pseudo:
            claim(pseudo, settings | dict(crf=True) | crf_settings(args), args.overwrite)
    if world > 1:
        dist.barrier()
    mine = ids[rank::world]
    todo = [i for i in mine
            if not all((out / f"{i}.png").is_file() for out in (bpm, pseudo) if out)]

    # --- masks ---
    jobs = mask_jobs(model, folder, todo, args, device, (bpm, pseudo))
    for _ in tqdm(in_parallel(write_masks, jobs, args.workers), total=len(todo),
                  desc=f"masks of {args.split}", disable=None if rank == 0 else True):
        pass
    if world > 1:
        dist.barrier()

    # --- score: the last two rows of Table 1 ---
    if rank == 0:
        print(f"{STAGE}  {len(todo):,} of {len(mine):,} images were still to do")
        rows = {bpm: "BPM, CPF-CTE w/o CRF in Table 1", pseudo: "CRF, CPF-CTE in Table 1"}
        for out, name in rows.items():
            confusion, scored = score_masks(folder, ids, out, args.workers) if out else (None, 0)
            if scored:
                data.log(args.run, STAGE, masks=name, split=args.split, image_labels_used=True,
                         num_images=scored, miou=float(np.nanmean(data.iou_per_class(confusion))))


if __name__ == "__main__":
    data.run(main, parse_args())
