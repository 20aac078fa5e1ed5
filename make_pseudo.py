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
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Folder, Images, batch_of
from evaluate import iou_per_class, score_masks, write_all
from model import build, upsample
from support.crf import PROB_FLOOR, add_crf_flags, constants_of, crf_settings, dense_crf
from support.run import (DataError, claim, digest, join_processes, load_checkpoint, log, parse,
                         positive, run, stage_parser)

STAGE = "make_pseudo"


def parse_args(argv=None):
    """The flags of stage 2."""
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--split", help="split whose images get masks; their image labels are used")
    add("--size", type=positive, help="the network sees SIZE x SIZE: the paper's is higher "
        "than in training (Sec. 0.4.2)")
    add("--batch-size", type=positive, default=8, help="images of one forward pass")
    add("--max-norm", action=argparse.BooleanOptionalAction, default=True,
        help="divide each class's map by its own maximum before the argmax (ViT-PCM)")
    add_crf_flags(parser, default="auto")
    add("--overwrite", action="store_true", help="delete RUN/bpm and RUN/pseudo and start anew")
    return parse(parser, STAGE, argv)


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


# --- the stage ---------------------------------------------------------------------------------


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
                log(args.run, STAGE, masks=name, split=args.split, image_labels_used=True,
                         num_images=scored, miou=float(np.nanmean(iou_per_class(confusion))))


if __name__ == "__main__":
    run(main, parse_args())
