"""Stage 2 of 4: pseudo masks from the patch classifier: upsample, argmax (Eq. 10), dense CRF.

Run:    python make_pseudo.py --data data/toy --run runs/toy
        torchrun --nproc-per-node=2 -- make_pseudo.py --data data/VOC2012 --run runs/voc
Reads:  RUN/cls.pt, JPEGImages/, image_labels.txt; a mask only to score at the very end
Writes: RUN/bpm/ID.png     baseline pseudo masks: argmax of the upsampled maps (Eq. 10)
        RUN/pseudo/ID.png  the same after the CRF: what stage 3 trains on
A killed run goes on where it stopped: masks that are already written are skipped.
Where there is a GPU, it computes masks and CRF; else the worker processes do, which write them.
"""
import argparse
import hashlib
import json
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import starmap

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from data import DataError, Folder
from extras import crf as torch_crf
from model import build, join_processes, load_checkpoint

try:
    import pydensecrf.densecrf as densecrf
except ImportError:  # it has no binary wheels and needs a C++ compiler
    densecrf = None

STAGE = "make_pseudo"
PROB_FLOOR = 1e-5  # the CRF's unary energy is -log(p): keeps it finite


def add_crf_flags(parser, default):
    """--crf and the CRF's constants, as flags; crf_settings(args, device) reads them."""
    add = parser.add_argument
    add("--crf", nargs="?", choices=("auto", "torch", "pydensecrf", "none"), const="auto",
        default=default, help="who computes the dense CRF: torch is extras/crf.py, equal up to "
        "rounding; auto, or no word: pydensecrf, if installed, on a CPU, else torch")
    add("--crf-iterations", type=int, default=10, help="mean-field iterations")
    add("--crf-sxy", type=data.deviation, default=67, help="bilateral kernel: deviation in pixels")
    add("--crf-srgb", type=data.deviation, default=3,
        help="bilateral kernel: deviation in RGB levels")
    add("--crf-compat", type=float, default=4, help="bilateral kernel: weight of its Potts term")


def crf_backend(name, device):
    """The backend that `--crf name` means on a device: "torch" or "pydensecrf"."""
    if name == "pydensecrf" and densecrf is None:
        raise DataError("pydensecrf is not installed (`pip install pydensecrf2` needs a C++ "
                        "compiler): --crf torch gives the same labels")
    if name == "auto":
        return "pydensecrf" if device.type == "cpu" and densecrf else "torch"
    return name


def crf_settings(args, device):
    """The keyword arguments of dense_crf that the flags set, or None for --crf none."""
    return None if args.crf == "none" else dict(
        backend=crf_backend(args.crf, device), iterations=args.crf_iterations,
        bilateral_sxy=args.crf_sxy, bilateral_srgb=args.crf_srgb,
        bilateral_compat=args.crf_compat)


def constants_of(crf):
    """What of crf_settings decides about the masks: all but who computes them."""
    return {name: value for name, value in (crf or {}).items() if name != "backend"}


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
    add_crf_flags(parser, default="auto")
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


def dense_crf(image, probs, *, backend="auto", iterations=10, gaussian_sxy=1, gaussian_compat=3,
              bilateral_sxy=67, bilateral_srgb=3, bilateral_compat=4):
    """Mean field in a fully connected CRF (Kraehenbuehl & Koltun 2011).

    image (H, W, 3) uint8 RGB, as it was decoded; probs (C, H, W) float32, summing to one over C.
    Arrays or tensors; backend torch computes where probs lie, auto as --crf auto says. Returns
    refined probabilities (C, H, W) float32, of the kind that probs are. sxy are in pixels, srgb in
    levels of 0 to 255; the defaults are ViT-PCM's.
    """
    C, H, W = probs.shape
    if C == 1:
        return probs
    unary = -torch.as_tensor(probs).clamp(min=PROB_FLOOR).log()
    if crf_backend(backend, unary.device) == "torch":
        Q = torch_crf.mean_field(
            torch.as_tensor(image, device=unary.device), unary, iterations=iterations,
            gaussian_sxy=gaussian_sxy, gaussian_compat=gaussian_compat,
            bilateral_sxy=bilateral_sxy, bilateral_srgb=bilateral_srgb,
            bilateral_compat=bilateral_compat)
    else:
        crf = densecrf.DenseCRF2D(W, H, C)
        crf.setUnaryEnergy(unary.flatten(1).cpu().contiguous().numpy())
        crf.addPairwiseGaussian(sxy=gaussian_sxy, compat=gaussian_compat)
        crf.addPairwiseBilateral(sxy=bilateral_sxy, srgb=bilateral_srgb, compat=bilateral_compat,
                                 rgbim=torch.as_tensor(image).cpu().contiguous().numpy())
        Q = torch.tensor(np.asarray(crf.inference(iterations)), device=unary.device).view(C, H, W)
    return Q if torch.is_tensor(probs) else Q.numpy()


def masks_of(image, present, maps, crf):
    """[bpm, and with a CRF the pseudo mask] of an image, (H, W) uint8; Eq. (10).

    image (H, W, 3) uint8, as it was decoded; present and maps as present_probs gives them; crf as
    crf_settings gives it. The work is done where the maps lie.
    """
    present, maps = torch.as_tensor(present).byte(), torch.as_tensor(maps)
    probs = upsample(maps, *image.shape[:2])
    masks = [present[probs.argmax(0)]]  # Eq. (10)
    if crf is not None:
        masks.append(present[dense_crf(image, probs, **crf).argmax(0)])
    return [mask.cpu().numpy() for mask in masks]


def in_parallel(function, jobs, workers):
    """Yield function(*job) in order, from worker processes, while jobs are still being made."""
    if workers == 0:
        yield from starmap(function, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = deque()
        for job in jobs:
            pending.append(pool.submit(function, *job))
            if len(pending) > 8 * workers:  # bounds the memory that waiting jobs hold
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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


# --- the stage ---------------------------------------------------------------------------------

class Images(Dataset):
    """index -> index, image (H, W, 3) uint8."""

    def __init__(self, folder, ids):
        self.folder, self.ids = folder, ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image = data.read_image(self.folder.image_path(self.ids[index]))
        return index, torch.from_numpy(np.array(image))


def batch_of(items, size):
    """collate_fn of a loader of Images: indices, images (B, 3, size, size), images as they are."""
    indices, originals = zip(*items)
    resized = [Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BICUBIC)
               for image in originals]
    return indices, torch.stack([data.to_tensor(image) for image in resized]), originals


@torch.no_grad()
def mask_jobs(model, folder, ids, args, device, outputs, crf):
    """Run the network over the images and yield (arguments of masks_of, paths) of each."""
    loader = DataLoader(Images(folder, ids), args.batch_size, num_workers=args.workers,
                        collate_fn=partial(batch_of, size=args.size),
                        pin_memory=device.type == "cuda")
    for indices, images, originals in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            patch_probs = model(images.to(device, non_blocking=True) / 255)
        for index, original, Y in zip(indices, originals, patch_probs):
            labels = folder.image_labels(ids[index]).to(device)
            present, maps = present_probs(Y, labels, args.max_norm)
            yield (original, present, maps, crf), [out / f"{ids[index]}.png" for out in outputs]


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


def confusion_of(mask_path, truth_path, num_classes):
    """One image's confusion matrix; runs in a worker process."""
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
    crf = crf_settings(args, device)
    outputs = [args.run / "bpm"] + ([args.run / "pseudo"] if crf else [])
    if rank == 0:
        settings = dict(cls=digest(args.run / "cls.pt"), data=str(args.data.resolve()),
                        size=args.size, max_norm=args.max_norm, image_labels_used=True,
                        seed=checkpoint["args"]["seed"])
        for out, constants in zip(outputs, (dict(crf=False), dict(crf=True) | constants_of(crf))):
            claim(out, settings | constants, args.overwrite)
    if world > 1:
        dist.barrier()
    mine = ids[rank::world]
    todo = [i for i in mine if not all((out / f"{i}.png").is_file() for out in outputs)]

    # --- masks ---
    jobs, began = mask_jobs(model, folder, todo, args, device, outputs, crf), time.time()
    for _ in tqdm(write_all(masks_of, jobs, args.workers, device, crf), total=len(todo),
                  desc=f"masks of {args.split}", disable=None if rank == 0 else True):
        pass
    if world > 1:
        dist.barrier()

    # --- score: the last two rows of Table 1 ---
    if rank == 0:
        print(f"{STAGE}  {len(todo):,} of {len(mine):,} images were still to do, "
              f"{time.time() - began:.0f} s, CRF by {crf['backend'] if crf else 'nobody'}")
        rows = ("BPM, CPF-CTE w/o CRF in Table 1", "CRF, CPF-CTE in Table 1")
        for out, name in zip(outputs, rows):
            confusion, scored = score_masks(folder, ids, out, args.workers)
            if scored:
                data.log(args.run, STAGE, masks=name, split=args.split, image_labels_used=True,
                         num_images=scored, miou=float(np.nanmean(data.iou_per_class(confusion))))


if __name__ == "__main__":
    data.run(main, parse_args())
