"""Stage 2 of 4: pseudo masks from the patch classifier: upsample, argmax (Eq. 10), dense CRF.

Run:    python make_pseudo.py --data data/toy --run runs/toy
        torchrun --nproc-per-node=2 -- make_pseudo.py --data data/VOC2012 --run runs/voc
Reads:  RUN/cls.pt, JPEGImages/, image_labels.txt, the split; a mask only to score at the end
Writes: RUN/bpm/ID.png     baseline pseudo masks: argmax of the upsampled maps (Eq. 10)
        RUN/pseudo/ID.png  the same after the CRF: what stage 3 trains on
Result: mIoU 57.2 (sd 0.9, 5 seeds) and 69.2 (1.2) on train of the beetles, 25 s on two Xeon cores
A killed run goes on where it stopped: masks that are already written are skipped.
"""
import torch

from data import Folder, Images, as_input, loader
from evaluate import miou, score_masks
from model import upsample
from support.checkpoints import check_finite
from support.crf import add_crf_flags, crf_settings, dense_crf
from support.files import file_hash, log, open_run
from support.flags import common_flags, number
from support.inference import load_model, slide
from support.masks import unfinished, write_masks
from support.processes import join_processes, launch, map_in_workers
from support.tokens import add_tokens_flag, keep_tokens, learning_blocks


def parse_args(argv=None):
    """The flags of stage 2."""
    flags = common_flags(__doc__)
    add = flags.add
    add("--split", "trainaug", "split whose images get masks; train where DATA has no trainaug",
        voc_small="train")
    add("--size", None, "the network sees SIZE x SIZE (default: cls.pt's training size times "
        "--size-ratio)", type=number(int, 1, 10**5))
    add("--size-ratio", 2.5, "inference over training size; ViT-PCM: 960 for 384", toy=1.0,
        photo=1.0, low=0.1, high=100)
    add("--batch-size", 8, "images of one forward pass", low=1)
    add("--max-norm", True, "divide each class's map by its own maximum (ViT-PCM)")
    add_crf_flags(add, "auto")
    add_tokens_flag(add)
    add("--overwrite", False, "replace the masks in RUN/bpm and, with a CRF, in RUN/pseudo")
    args = flags.parse(argv)
    if args.tokens and args.window:
        flags.error("--tokens are of whole images: leave --window out")
    return args


def class_maps(patch_probs, image_labels, max_norm=True):
    """Y (h, w, C), labels (C,) -> class numbers (P,) and maps (P, h, w) of the P present classes.

    The training images' labels are known, so absent classes are zeroed: here, left out. Each map is
    divided by its own maximum, as in ViT-PCM, and the classes are renormalised at every patch.
    """
    present = image_labels.nonzero().flatten()
    maps = patch_probs[..., present].permute(2, 0, 1)  # (P, h, w)
    if max_norm:
        maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-5)
    return present, maps / maps.sum(dim=0, keepdim=True).clamp(min=1e-5)


def pseudo_masks(image, present, maps, crf):
    """One image's masks, (H, W) uint8: the BPM and, with a CRF, the refined one.

    image (H, W, 3) uint8, as it was decoded; present (P,) and maps (P, h, w) as class_maps
    gives them, arrays or tensors: the work is done where the maps lie.
    """
    present, maps = torch.as_tensor(present).byte(), torch.as_tensor(maps)
    probs = upsample(maps, *image.shape[:2])                     # (P, H, W)
    bpm = present[probs.argmax(0)].cpu().numpy()                 # Eq. (10)
    if crf is None:
        return [bpm]
    refined = dense_crf(image, probs, **crf)                     # Sec. 0.3.4
    return [bpm, present[refined.argmax(0)].cpu().numpy()]


@torch.no_grad()
def classify_patches(model, dataset, args, device, crf):
    """Run the patch classifier over the images; yields the arguments of pseudo_masks."""
    for items in loader(dataset, args, device, batch_size=args.batch_size, collate_fn=list):
        image_ids, originals, images = zip(*items)
        images = as_input(torch.stack(images), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            Y = slide(model, images, model.cell, args.window, args.stride)  # Eq. (1) to (7)
        check_finite(Y, model)
        for image_id, image, Y_i in zip(image_ids, originals, Y):
            image_labels = dataset.folder.image_labels(image_id).to(device)
            present, maps = class_maps(Y_i, image_labels, args.max_norm)
            if device.type != "cuda":  # arrays travel well to worker processes
                present, maps = present.cpu().numpy(), maps.cpu().numpy()
            yield image, present, maps, crf


def main(args):
    device, rank, world = join_processes(args.device)

    # --- model and data ---
    model, checkpoint = load_model(args.run / "cls.pt", "cls")
    open_run(args.run)
    model, train_args = model.to(device), checkpoint["args"]
    if args.size is None:
        args.size = max(1, round(args.size_ratio * train_args["size"] / model.cell)) * model.cell
    folder = Folder(args.data, checkpoint)
    if rank == 0 and checkpoint["epoch"] < train_args["epochs"]:
        print(f"note: cls.pt is of epoch {checkpoint['epoch']} of {train_args['epochs']}")
    ids = folder.ids(args.split)
    for image_id in ids:
        folder.image_labels(image_id)  # a missing label is reported now

    # --- what is there already ---
    crf = crf_settings(args, device)
    made_with = dict(
        cls=file_hash(args.run / "cls.pt"), data=str(args.data.resolve()), size=args.size,
        labels=folder.labels_hash(), window=args.window, stride=args.stride,
        max_norm=args.max_norm, image_labels_used=True, seed=train_args["seed"])
    outputs = {args.run / "bpm": made_with | dict(crf=False)}
    if crf:
        outputs[args.run / "pseudo"] = made_with | dict(crf=True) | crf | dict(backend=None)
    my_ids = ids[rank::world]
    todo = my_ids if args.overwrite else unfinished(my_ids, outputs, args.workers)

    # --- masks ---
    dataset = Images(folder, todo, args.size)
    if args.tokens:
        keep_tokens(dataset, model, learning_blocks(train_args), args, device)
    jobs = classify_patches(model, dataset, args, device, crf)
    results = map_in_workers(pseudo_masks, jobs, 0 if device.type == "cuda" else args.workers)
    write_masks(results, todo, outputs, args.overwrite, crf, len(my_ids))

    # --- score: the last two rows of Table 1 ---
    if rank == 0:
        rows = ("BPM, CPF-CTE w/o CRF in Table 1", "CRF, CPF-CTE in Table 1")
        for out, name in zip(outputs, rows):
            confusion, about = score_masks(folder, ids, out, args.workers, name == rows[0])
            if about["num_images"]:
                log(args.run, "make_pseudo", masks=name, split=args.split, image_labels_used=True,
                    **about, miou=miou(confusion))


if __name__ == "__main__":
    launch(main, parse_args())
