"""CPEWS, the second method: a ViT trained end to end from image labels (E1 to E15, docs/CPEWS.md).

Run:    python extras/cpews/train.py --data data/toy --run runs/cpews
        python extras/cpews/train.py --data data/toy --run runs/cpews --predict test [--crf]
Reads:  JPEGImages/, image_labels.txt, classes.txt, the splits, superclasses.txt if there is one;
        the ground truth only to score
Writes: RUN/cpews.pt every --save-every steps, RUN/log.jsonl; with --predict RUN/cam/ID.png and
        RUN/pseudo/ID.png, which know the image labels, and RUN/pred/ID.png, the decoder's, which
        does not

B batch, S side of a crop, O object classes, C = O + 1, h x w patch grid, D width.
"""
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import Folder, Images, MaskedImages, loader, training_batches
from evaluate import confusion_matrix, miou, predict, score_masks
from extras.cpews.model import (CPEWS, CPEWSConfig, false_scores, ism_loss,
                                make_pools, pdl_loss, pixel_labels, prototype_distances,
                                region_features, seg_loss, ssl_loss, superclasses, token_labels)
from support.checkpoints import (MAY_CHANGE_ON_RESUME, check_finite, check_loss, finite_mean_loss,
                                 open_checkpoint, restore, save_checkpoint)
from support.crf import add_crf_flags, crf_settings
from support.files import UserError, file_hash, log, logged, progress
from support.flags import common_flags
from support.inference import load_model
from support.masks import (IGNORE, claim_folders, export, read_mask, read_settings, save_mask,
                           unfinished)
from support.processes import join_processes, launch, map_in_workers, place, wrap_for_training
from support.scores import boundary_iou, mean_average_precision

WEIGHT_DECAY, POLY_POWER, CENTRE_STEPS = 0.01, 0.9, 10
MASK_FLAGS = "cam_scales cam_threshold cam_high cam_low par_dilations scales".split()


def parse_args(argv=None):
    """The flags of training; --predict takes cpews.pt's, but for those of masks."""
    flags = common_flags(__doc__, trains=True)
    add = flags.add
    add("--predict", None, "split whose masks to write and score, instead of training")
    add("--export", False, "with --predict: write RUN/results/, what VOC's test server takes, and "
        "do not score")
    add("--train-split", "trainaug", "split to train on; train where DATA has no trainaug",
        voc_small="train")
    add("--val-split", "val", "split that scores the network at every save; none: no score")
    add("--val-images", 100, "images of the val split to score, from its first")
    add("--backbone", "vit_base_patch16_224.orig_in21k_ft_in1k", "any plain ViT of timm (or "
        "vit_toy), E1", toy="vit_toy", photo="vit_lite0")
    add("--crop", 448, "S, side of the random crop in pixels", toy=96, photo=320, low=1)
    add("--rescale", [0.5, 2.0], "range of the random rescaling", toy=[1.0, 1.0],
        photo=[1.0, 1.75], nargs=2, low=0.01, high=100)
    add("--jitter", True, "change brightness, contrast and saturation at random", toy=False)
    add("--batch-size", 4, "images of one step", toy=16, photo=16, low=1)
    add("--iterations", 20000, "steps after the warm-up", coco=80000, toy=300, photo=500, low=1)
    add("--warm-up", 2000, "steps with the losses of E4 alone; then come the pools, E10", toy=500,
        photo=400)
    add("--freeze-warm-up", True, "the ViT does not learn in the warm-up", toy=False)
    add("--ism-from", 0, "step after the warm-up from which on ISM learns, E8; until then pixel "
        "labels come from the auxiliary maps", coco=12000, photo=250)
    add("--seg-from", 2000, "likewise for the decoder, E15", coco=8000, toy=0, photo=0)
    add("--save-every", 1000, "steps between two checkpoints", coco=5000, toy=500, photo=450, low=1)
    add("--lr", 6e-5, "AdamW's rate for the ViT", toy=1e-3, photo=1e-4, low=1e-9, high=10)
    add("--head-lr", 10.0, "the other layers' rate, times --lr", toy=1.0, photo=50.0, high=1000)
    add("--lr-warm-up", 1500, "steps over which a layer's rate rises linearly once it learns",
        toy=100, photo=100)
    add("--aux-block", 10, "a, the block that A is the output of, E2", toy=3, photo=1, low=1)
    add("--head", "max", "scores, E3, of each channel's largest value; softmax, not in the paper: "
        "CPF-CTE's, Eq. (7) to (9), which wants lower thresholds", choices=("max", "softmax"))
    add("--fov-dilation", 5, "of the decoder's two 3x3 convolutions, E5", toy=1, photo=1, low=1)
    add("--cam-scales", [1.0, 0.5, 1.5], "input scales of the class maps, E6", toy=[1.0],
        photo=[1.5], nargs="+", low=0.01, high=100)
    add("--cam-high", 0.7, "foreground is above it, E7, E14", coco=0.65, toy=0.6, photo=0.5, high=1)
    add("--cam-low", 0.25, "background is below it; between: unsure", toy=0.45, photo=0.3, high=1)
    add("--cam-threshold", 0.5, "background's score in cam/", coco=0.45, toy=0.6, high=1)
    add("--mask-threshold", 0.1, "tau, E9: a region's least score over the largest", high=1)
    add("--prototypes", 10, "K, E10: of a class, at most, positive and negative ones", low=1)
    add("--pool-cam", "aux", "maps whose regions make the pools, E10: main is M, aux is M'",
        toy="main", choices=("main", "aux"))
    add("--pool-updates", 0, "how often training makes the pools anew, Table 3")
    add("--ssl-pool", "filtered", "U, E10: those of N that show no relative; all: U = N; unshared, "
        "not in the paper: the K best of all negatives that show none",
        choices=("filtered", "unshared", "all"))
    add("--temperature", 13.0, "T, E11", low=1e-3, high=1e6)
    add("--ism-weight", 0.2, "of ISM's loss, E8; 0 leaves it out", high=1e6)
    add("--pdl-weight", 0.12, "of PDL, E11; 0 leaves it out", high=1e6)
    add("--ssl-weight", 1.5e-4, "of SSL, E12; 0 leaves it out", high=1e6)
    add("--seg-weight", 0.1, "of the decoder's loss, E15; 0 leaves it out", high=1e6)
    add("--par-dilations", [1, 2, 4, 8, 12, 24], "distances of PAR's neighbours, E13, in pixels "
        "of the image at half size", toy=[1, 2, 4], photo=[1, 2, 4, 8], nargs="+", low=1, high=1000)
    add("--scales", [1.0, 1.25, 1.5], "input scales of the prediction, which takes their maximum",
        toy=[1.0], photo=[1.5], nargs="+", low=0.01, high=100)
    add_crf_flags(add, "none", sxy=121.0, srgb=5.0)
    return checked(flags, argv)


def checked(flags, argv):
    """The arguments, where they go together."""
    args = flags.parse(argv)
    if args.rescale[0] > args.rescale[1]:
        flags.error("--rescale: the smaller number comes first")
    if not args.predict:
        if args.export:
            flags.error("--export writes predictions: --predict names their split")
        return args
    args.given = {*vars(flags.parser.parse_args(argv))}
    for name in args.given - {"predict", "export", *MASK_FLAGS, *MAY_CHANGE_ON_RESUME}:
        if not name.startswith("crf"):
            flags.error(f"--{name.replace('_', '-')} is for training: cpews.pt has its own")
    return args


# --- training ----------------------------------------------------------------------------------
class Crops(MaskedImages):
    """(index, draw) -> image (3, S, S) uint8, where it shows the photo (S, S), labels (O,)."""

    def __init__(self, folder, ids, args, fill):
        self.labels = torch.stack([folder.image_labels(i)[1:] for i in ids])
        super().__init__(folder, ids, None, args.crop, args.rescale, args.seed, fill, args.jitter)

    def mask(self, index, size):
        """Zeros: what the crop adds around the photo is IGNORE."""
        return Image.new("L", size)

    def __getitem__(self, item):
        image, mask = super().__getitem__(item)
        return image, mask != IGNORE, self.labels[item[0]]


def check(folder, ids, args):
    """End, before anything is done, where a class or label is missing or the thresholds cross."""
    if len(folder.classes) == 1:
        raise UserError(f"{args.data}/classes.txt names no class but background: nothing to learn")
    for image_id in ids:
        folder.image_labels(image_id)
    if args.cam_low > args.cam_high:
        raise UserError("--cam-low is to lie below --cam-high, which cpews.pt may have set")


def photo(image, device):
    """(H, W, 3) uint8, as decoded -> (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(image).to(device).permute(2, 0, 1)[None] / 255


@torch.no_grad()
def image_regions(model, folder, ids, args, device):
    """What E10's make_pools takes of every image, whole: f, whether it exists, z, image labels."""
    which = 1 if args.pool_cam == "aux" else 0
    images = loader(Images(folder, ids), args, device, batch_size=None, collate_fn=tuple)
    for image_id, image, _ in progress(images, "prototypes", len(ids)):
        layers = model.layers(photo(image, device), args.cam_scales)
        raw, z = model.maps(*layers)[which], model.scores(*layers)[which]
        f, regions = region_features(raw, layers[0], args.mask_threshold, floor=1e-5)
        found = f, regions.any(dim=(2, 3)), z[:, -f.shape[1]:]  # not the softmax head's background
        yield *(each[0].cpu() for each in found), folder.image_labels(image_id)[1:]


def new_pools(model, folder, ids, groups, args, device):
    """E10 with the network as it is; how many prototypes there are goes to the log."""
    if groups is None and args.ssl_pool != "all":
        print(f"{folder.root} has no superclasses.txt: SSL takes all negative prototypes for false")
    regions = image_regions(model.eval(), folder, ids, args, device)
    pools = make_pools(regions, groups, args.prototypes, args.seed, args.ssl_pool == "unshared")
    log(args.run, "cpews", **{name: sum(map(len, pools[name])) for name in pools})
    if args.ssl_weight and not any(map(len, pools["U"])):
        print("note: SSL does nothing, as U is empty: see --ssl-pool", flush=True)
    return pools


def parameter_groups(model, args):
    """AdamW's groups, ViT and rest; first: the step from which on it learns and warms up."""
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    return [dict(params=[*model.backbone.parameters()], base_lr=args.lr,
                 first=args.warm_up * args.freeze_warm_up),
            dict(params=others, base_lr=args.head_lr * args.lr, first=0)]


def rate(step, total, lr_warm_up, first=0):
    """The factor on a learning rate: linear from 1e-6 to 1 after step first, then poly decay."""
    risen = max(0, step - first) / lr_warm_up if lr_warm_up else 1
    return 1 - (1 - risen) * (1 - 1e-6) if risen < 1 else (1 - step / total) ** POLY_POWER


def batch_losses(model, encode, batch, pools, args, t):
    """Of step t after the warm-up: {name: weighted loss} and {name: what the log tells}."""
    images, inside, y = batch
    features, aux = encode(images)                                            # E1, E2
    z, aux_z = model.scores(features, aux, t + args.warm_up < CENTRE_STEPS)   # E3
    target = F.pad(y, (1, 0), value=1.0)[:, -z.shape[1]:]  # softmax: all images show background
    losses = dict(cls=F.multilabel_soft_margin_loss(z, target),               # E4
                  aux=F.multilabel_soft_margin_loss(aux_z, target))
    seen = dict(z=z[:, -y.shape[1]:], y=y)
    ism, decoder = (weight > 0 and t >= max(0, first) for weight, first in (
        (args.ism_weight, args.ism_from), (args.seg_weight, args.seg_from)))
    if ism or decoder:
        model.eval()  # labels come from the network as it predicts
        with torch.no_grad():
            encodings = model.encodings(images, args.cam_scales).values()
            cam, aux_cam = model.cams(encodings, y, images.shape[2:])         # E6
        model.train()
    if ism:
        labels = token_labels(aux_cam, inside, aux.shape[2:], args.cam_high, args.cam_low)  # E7
        losses["ism"] = args.ism_weight * ism_loss(features, labels)          # E8
    if pools:
        raw, _ = model.maps(features, aux)
        f, regions = region_features(raw, features, args.mask_threshold)      # E9
        distances = prototype_distances(f, regions.any(dim=(2, 3)) & (y > 0), pools)
        scores = false_scores(raw, features, regions, y, pools)
        losses["pdl"] = args.pdl_weight * pdl_loss(distances, args.temperature)     # E11
        losses["ssl"] = args.ssl_weight * ssl_loss(scores)                    # E12
        seen |= dict(zip(("near", "far"), distances.T))
        seen["false"] = len(scores) / regions[y > 0].sum().clamp(min=1)
    if decoder:
        cam = cam if t >= args.ism_from else aux_cam
        labels = pixel_labels(cam, images, y, inside, args.cam_high, args.cam_low,  # E13, E14
                              args.par_dilations)
        losses["seg"] = args.seg_weight * seg_loss(model.segment(features), labels)  # E5, E15
        seen["labelled"] = (labels != IGNORE).float().mean()
    return losses, seen


def summary(history):
    """{name: number} of a round's {name: tensors}: of distances the median, else the mean."""
    whole = {name: torch.cat(torch.atleast_1d(parts)).cpu() for name, parts in history.items()}
    z, y = (F.pad(whole.pop(name), (1, 0)) for name in "zy")
    return dict(train_map=mean_average_precision(z, y), **{
        name: (values.median() if name in ("near", "far") else values.mean()).item()
        for name, values in whole.items() if len(values)})


def build(args, device, inputs):
    """(path, checkpoint or None, network, optimizer), as they start or as cpews.pt has them."""
    path, checkpoint = open_checkpoint(args, "cpews", args.warm_up + args.iterations, **inputs)
    torch.manual_seed(args.seed)
    config = CPEWSConfig(len(inputs["classes"]), args.backbone, args.aux_block, args.fov_dilation,
                         args.head)
    pretrained, weights = (False, None) if checkpoint else (args.pretrained, args.weights)
    model = CPEWS(config, pretrained, weights).to(device)
    if args.crop % model.patch:
        raise UserError(f"--crop {args.crop} is no multiple of a patch's {model.patch} pixels")
    model.scales, model.amp = args.scales, args.amp
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True,
                                  weight_decay=WEIGHT_DECAY)
    restore(path, checkpoint, model=model, optimizer=optimizer)
    return path, checkpoint, model, optimizer


def train(args, device):
    """Warm-up, pools, main loop; RUN/cpews.pt after every round."""
    # --- data ---
    folder = Folder(args.data)
    ids = folder.ids(args.train_split)
    groups = None if args.ssl_pool == "all" else superclasses(folder)
    val_ids = [] if args.val_split == "none" else folder.ids(args.val_split)[:args.val_images]
    check(folder, [i for i in val_ids if folder.mask_path(i).is_file()], args)

    # --- model ---
    inputs = dict(classes=folder.classes, ids=ids, labels=folder.labels_hash(), superclasses=groups)
    path, checkpoint, model, optimizer = build(args, device, inputs)
    done, pools = (checkpoint["step"], checkpoint["pools"]) if checkpoint else (0, None)

    # --- train: in rounds, each of which ends with a save ---
    fill = tuple((255 * model.normalise.mean).round().int().flatten().tolist())
    crops, encode = Crops(folder, ids, args, fill), wrap_for_training(model.encode, args, 1)
    total, parts = args.warm_up + args.iterations, args.pool_updates + 1
    renewals = {args.warm_up + args.iterations * u // parts for u in range(parts)}
    for first in range(done, total, args.save_every):
        last = min(first + args.save_every, total)
        began, history = time.time(), defaultdict(list)
        for step, *batch in training_batches(crops, args, device, first, last, f"to step {last}"):
            if step in renewals and (args.pdl_weight or args.ssl_weight):
                pools = new_pools(model, folder, ids, groups, args, device)             # E10
            if step in (done, *renewals):
                model.train_encoder(step >= args.warm_up or not args.freeze_warm_up)
            losses, seen = batch_losses(model, encode, batch, pools, args, step - args.warm_up)
            loss = sum(losses.values())
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate(step, total, args.lr_warm_up, group["first"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, value in dict(loss=loss, **losses, **seen).items():
                history[name].append(value.detach())
            check_loss(history["loss"][-1], step + 1, path)

        # --- save, score, log ---
        totals = torch.stack(history.pop("loss"))
        loss = finite_mean_loss(totals.sum(), len(totals), 1, model, f"before step {last}", path)
        speed = len(totals) * args.batch_size / (time.time() - began)
        save_checkpoint(path, "cpews", model, args, **inputs, step=last, pools=pools,
                        optimizer=optimizer.state_dict())
        with logged(args.run, "cpews", step=last, of=total, loss=loss, **summary(history),
                    images_s=speed) as line:
            line.update(validate(model, folder, val_ids, args, device))


# --- masks -------------------------------------------------------------------------------------
@torch.no_grad()
def run_network(model, folder, ids, args, device, constants, labelled=True):
    """The network over the images: yields the arguments of image_masks."""
    model.eval()
    images = loader(Images(folder, ids), args, device, batch_size=None, collate_fn=tuple)
    for image_id, image, _ in images:
        whole, masks = photo(image, device), None
        encoded = model.encodings(whole, {*args.cam_scales, *args.scales})
        logits = model.decoded([encoded[s] for s in args.scales], whole.shape[2:])[0]
        check_finite(logits, model)
        if labelled:
            y = folder.image_labels(image_id)[None, 1:].to(device)
            cam, aux = model.cams([encoded[s] for s in args.cam_scales], y, whole.shape[2:])
            last = cam if args.ism_from < args.iterations else aux  # as in training's last step
            pseudo = pixel_labels(last, whole, y, whole[:, 0] >= 0, args.cam_high, args.cam_low,
                                  args.par_dilations)
            cams = F.pad(torch.cat([cam, aux]), (0, 0, 0, 0, 1, 0), value=args.cam_threshold)
            masks = torch.cat([cams.max(dim=1).indices, pseudo]).byte().cpu().numpy()
        yield masks, logits if device.type == "cuda" else logits.cpu().numpy(), image, constants


def image_masks(masks, logits, image, constants):
    """{name: mask (H, W) uint8}: pred and, where the image has labels, cam, pseudo, aux (W')."""
    known = {} if masks is None else dict(zip(("cam", "aux", "pseudo"), masks))
    return known | dict(pred=predict(logits, image, constants))


def validate(model, folder, ids, args, device):
    """{"val_cam": mIoU, ...} of the masks of those ids that have a ground truth, if any has."""
    C, confusions = len(folder.classes), defaultdict(int)
    ids = [i for i in ids if folder.mask_path(i).is_file()]
    for image_id, job in zip(ids, run_network(model, folder, ids, args, device, None)):
        truth = read_mask(folder.mask_path(image_id), C, job[2].shape[1::-1])
        for name, mask in image_masks(*job).items():
            confusions[name] += confusion_matrix(mask, truth, C)
    model.train()
    scores = {f"val_{name}": miou(confusion) for name, confusion in confusions.items()}
    return dict(scores, val_images=len(ids)) if ids else {}


def write_masks(args, device):
    """Write RUN/pred of a split, and RUN/cam and RUN/pseudo where its image labels are known."""
    # --- the network, with the arguments of its training where none are given ---
    model, checkpoint = load_model(args.run / "cpews.pt", "cpews", CPEWSConfig, CPEWS)
    vars(args).update({name: value for name, value in checkpoint["args"].items()
                       if name not in {"export", *args.given, *MAY_CHANGE_ON_RESUME}})
    model.scales, model.amp = args.scales, args.amp
    constants = crf_settings(args, device)
    constants = constants and constants | dict(gaussian_compat=1)
    folder = Folder(args.data, checkpoint)
    ids = folder.ids(args.predict)
    unlabelled = [i for i in ids if folder.label_numbers(i) is None]
    if unlabelled:
        print(f"note: {folder.root}/image_labels.txt has no line for {len(unlabelled):,} of "
              f"{len(ids):,} images, as {unlabelled[0]}: RUN/cam and RUN/pseudo are left out")
    check(folder, ids if not unlabelled else (), args)

    # --- what is there already ---
    made = dict({name: getattr(args, name) for name in MASK_FLAGS}, seed=args.seed,
                cpews=file_hash(args.run / "cpews.pt"), data=str(args.data.resolve()))
    outputs = {args.run / "pred": made | dict(
        image_labels_used=False, crf=constants is not None,
        constants=constants and constants | dict(backend=None))}  # any backend
    if not unlabelled:
        known = made | dict(labels=folder.labels_hash(), image_labels_used=True, crf=False)
        outputs = {args.run / "cam": known, args.run / "pseudo": known} | outputs
    changed = {out: its for out, its in outputs.items() if read_settings(out) != its}
    todo = ids if args.overwrite else unfinished(ids, outputs, args.workers)

    # --- masks and their scores ---
    jobs = run_network(model.to(device), folder, todo, args, device, constants, not unlabelled)
    results = map_in_workers(image_masks, jobs, 0 if device.type == "cuda" else args.workers)
    results = progress(claim_folders(results, changed, args.overwrite), args.predict, len(todo))
    for masks, image_id in zip(results, todo):
        for out in outputs:
            save_mask(out / f"{image_id}.png", masks[out.name])
    if args.export:
        return export(args.run, args.predict, ids, constants)
    for out, settings in outputs.items():
        confusion, about = score_masks(folder, ids, out, args.workers)
        if about["num_images"]:
            contours = boundary_iou(folder, ids, out, args.workers)
            log(args.run, "cpews", masks=out.name, split=args.predict, **about,
                miou=miou(confusion), boundary_miou=float(np.nanmean(contours)),
                crf=settings["crf"], image_labels_used=settings["image_labels_used"])


def main(args):
    if place()[1] > 1:
        raise UserError("extras/cpews/train.py is one process: call it without torchrun")
    device, _, _ = join_processes(args.device)
    if args.predict:
        write_masks(args, device)
    else:
        train(args, device)


if __name__ == "__main__":
    launch(main, parse_args())
