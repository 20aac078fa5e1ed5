"""Data: one folder layout for every data set, and how its images, labels and masks become batches.

Run:    python data.py toy --root data/toy                            (12 s, nothing is downloaded)
        python data.py voc --root data/VOC2012 [--sbd DIR] [--download]
        python data.py coco --root data/COCO2014 [--train-masks] [--download]
        python data.py labels --root data/mine        (image_labels.txt, from boxes or masks)
Writes: ROOT/JPEGImages/ID.jpg                    the images, RGB
        ROOT/SegmentationClass/ID.png             palette masks to score: 0 background, 255 ignore
        ROOT/ImageSets/Segmentation/SPLIT.txt     one id a line
        ROOT/classes.txt                          one class name a line, background first
        ROOT/image_labels.txt                     "ID name name ...": all that training is told
        ROOT/preset.txt, superclasses.txt         the stages' defaults; which classes are alike
        ROOT/Parts/ID.png, Parts/names.txt        toy only: 1 body, 2 head
Any folder like that is a data set; only preset.txt and Parts/ tell the stages which one it is.
"""
import hashlib
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

from support.files import UserError, first_file, progress, read_text
from support.masks import IGNORE, mask_in, read_image, read_mask
from support.names import ENDINGS, check_classes, line_id, without_ending
from support.processes import ignore_interrupts, launch

AUGMENT = {  # of stage 1; the paper names none, the jitter's strength is ours
    "flip": v2.RandomHorizontalFlip(), "vflip": v2.RandomVerticalFlip(),
    "transpose": v2.RandomApply([v2.RandomRotation((90, 90)), v2.RandomVerticalFlip(1)]),
    "jitter": v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)}


# --- the folder --------------------------------------------------------------------------------
class Folder:
    """A data set folder: its class names, splits, image labels, images and masks."""

    def __init__(self, root, checkpoint=None):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{root} not found: make it with data.py (python data.py --help)")
        where, self.classes = self.root / "classes.txt", [*self._lines("classes.txt").values()]
        check_classes(self.classes, where)
        if checkpoint and checkpoint["classes"] != self.classes:
            raise UserError(f"{where} has other classes than the checkpoint was trained on")

    def _lines(self, name):
        """{number: line} of a text file, without those that are blank."""
        path = self.root / name
        if not path.is_file():
            inside = self.root / "VOC2012"  # of VOCdevkit
            cure = f"pass --data {inside}" if inside.is_dir() else "run data.py, or write it"
            raise UserError(f"{path} not found: {cure} (docs/DATA.md)")
        lines = {k: line.strip() for k, line in enumerate(read_text(path).splitlines(), 1)
                 if line.strip()}
        if not lines:
            raise UserError(f"{path} is empty")
        return lines

    def ids(self, split):
        """The ids of ImageSets/Segmentation/SPLIT.txt, in its order."""
        name = f"ImageSets/Segmentation/{split}.txt"
        lines, where = self._lines(name), self.root / name
        ids = [self._id(line_id(line, f"{where}, line {k}")) for k, line in lines.items()]
        if len(set(ids)) < len(ids):
            twice = next(image_id for image_id in ids if ids.count(image_id) > 1)
            raise UserError(f"{where} lists {twice} twice")
        return ids

    def _id(self, name):
        """A name without .jpg or .png, unless the ID itself ends so."""
        short = without_ending(name)
        return name if short == name or self.image_path(name).is_file() else short

    @cached_property
    def _labels(self):
        """{id: names} of image_labels.txt."""
        labels = {}
        for name, *names in map(str.split, self._lines("image_labels.txt").values()):
            image_id = self._id(name)
            if image_id in labels:
                raise UserError(f"{self.root}/image_labels.txt has two lines for {image_id}")
            labels[image_id] = names
        return labels

    def image_labels(self, image_id):
        """(C,) float32, 1 for each class that image_labels.txt names; background is always 1."""
        names, where = self._labels.get(image_id), self.root / "image_labels.txt"
        if not names:
            raise UserError(f"{where}: no label for {image_id}: add '{image_id} NAME ...', with "
                            "'background' where it shows no object")
        labels = torch.zeros(len(self.classes))
        labels[0] = 1
        for name in names:
            if name not in self.classes:
                raise UserError(f"{where}: {image_id} has {name!r}, which is not in classes.txt")
            labels[self.classes.index(name)] = 1
        return labels

    def label_numbers(self, image_id):
        """{numbers of the object classes} in the image's labels; None where it has no line."""
        if (self.root / "image_labels.txt").is_file() and image_id in self._labels:
            return {*self.image_labels(image_id)[1:].nonzero().flatten().add(1).tolist()}

    def labels_hash(self):
        """A short hash of all image labels."""
        facts = sorted((image_id, sorted(names)) for image_id, names in self._labels.items())
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def image_path(self, image_id):
        """JPEGImages/ID.jpg, or .jpeg, or .png, or those in capitals."""
        return first_file(self.root / f"JPEGImages/{image_id}{end}" for end in ENDINGS)

    def mask_path(self, image_id):
        """SegmentationClass/ID.png, the ground truth: for scoring, never for training."""
        return mask_in(self.root / "SegmentationClass", image_id)


# --- what the stages see -----------------------------------------------------------------------
class Images(Dataset):
    """Stages 2 to 4: index -> id, image (H, W, 3) uint8 as decoded, resized (3, S, S) uint8.

    S is 1 where nobody reads resized; keep_tokens() (support/tokens.py) puts tokens in its place.
    """
    tokens = None

    def __init__(self, folder, ids, size=1):
        self.folder, self.ids, self.size = folder, ids, size
        for image_id in ids:  # a missing image is reported before any work
            if not folder.image_path(image_id).is_file():
                raise UserError(f"{folder.image_path(image_id)} not found: add it, or take it out "
                                "of the split")
        self.resize = v2.Resize((size, size), v2.InterpolationMode.BICUBIC)  # PIL -> PIL
        self.as_tensor = v2.PILToTensor()

    def __len__(self):
        return len(self.ids)

    def read(self, index):
        """PIL RGB."""
        return read_image(self.folder.image_path(self.ids[index]))

    def __getitem__(self, index):
        image, image_id = self.read(index), self.ids[index]
        if self.tokens is None:
            return image_id, np.array(image), self.as_tensor(self.resize(image))
        return image_id, np.array(image), self.tokens[image_id]


def sub_seed(seed, number):
    """A seed from --seed and a number; numbers above a million reach those of the next --seed."""
    return seed * 1_000_003 + number


@contextmanager
def seeded(seed, number):
    """Torch's random numbers of this block are a function of seed and number alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(sub_seed(seed, number))  # leaves CUDA's alone
        yield


class LabelledImages(Images):
    """Stage 1: (index, draw) -> image (3, S, S) uint8 or kept tokens (n, D), labels (C,)."""

    def __init__(self, folder, ids, size, augment=(), seed=0):
        self.seed, self.labels = seed, torch.stack([folder.image_labels(i) for i in ids])
        super().__init__(folder, ids, size)
        self.augment = v2.Compose([AUGMENT[name] for name in augment] or [v2.Identity()])

    def __getitem__(self, item):
        index, draw = item
        if self.tokens is not None:
            return self.tokens[self.ids[index]], self.labels[index]
        with seeded(self.seed, draw):
            image = self.augment(self.resize(self.read(index)))  # PIL's jitter is the faster one
            return self.as_tensor(image), self.labels[index]


class MaskedImages(Images):
    """Stage 3: (index, draw) -> image (3, S, S) uint8, mask (S, S) int64, cut out at random."""

    def __init__(self, folder, ids, masks, crop, rescale, seed, fill, jitter=False):
        super().__init__(folder, ids)
        self.masks, self.rescale, self.seed = masks, rescale, seed
        # what lies outside the image is filled with the pixel mean, and ignored
        self.change = v2.Compose([
            AUGMENT["jitter"] if jitter else v2.Identity(),
            v2.RandomCrop(crop, pad_if_needed=True, fill={Image.Image: fill, Mask: IGNORE}),
            v2.RandomHorizontalFlip(), v2.PILToTensor()])
        for image_id in ids:
            if masks and not mask_in(masks, image_id).is_file():
                raise UserError(f"{masks}/{image_id}.png not found: run make_pseudo.py first, on "
                                "this split and with a CRF, or pass --masks")

    def mask(self, index, size):
        """A PIL image; size: the (width, height) that it must have."""
        path = mask_in(self.masks, self.ids[index])
        return Image.fromarray(read_mask(path, len(self.folder.classes), size))

    def __getitem__(self, item):
        index, draw = item
        image = self.read(index)
        mask = self.mask(index, image.size)
        with seeded(self.seed, draw):
            scale = torch.empty(()).uniform_(*self.rescale).item()
            size = [max(1, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BILINEAR)
            mask = Mask(np.array(mask.resize(size, Image.Resampling.NEAREST)))
            image, mask = self.change(image, mask)
        return image, mask.long()


def loader(dataset, args, device, **options):
    """DataLoader with the workers that the flags ask for."""
    return DataLoader(dataset, num_workers=args.workers, pin_memory=device.type == "cuda",
                      worker_init_fn=ignore_interrupts, **options)


def as_input(images, device):
    """On the device: uint8 images divided by 255, or kept tokens as float32."""
    images = images.to(device, non_blocking=True)
    return images / 255 if images.dtype == torch.uint8 else images.float()


def batches(num_images, batch_size, seed, start, stop, rank=0, world=1):
    """batch_sampler of stages 1 and 3: this rank's (index, draw) pairs of steps start to stop.

    Every pass over the images is one seeded shuffle; its incomplete last batch is dropped. `draw`
    numbers all samples ever drawn and seeds their augmentation, so what a step sees depends on
    seed and step alone: not on the number of workers or ranks, nor on where a run was interrupted.
    """
    if num_images < batch_size:
        raise UserError(f"{num_images} images cannot fill --batch-size {batch_size}: lower it")
    if batch_size % world:
        raise UserError(f"--batch-size {batch_size} is not a multiple of {world} ranks")
    steps_per_epoch = num_images // batch_size
    for step in range(start, stop):
        if step == start or step % steps_per_epoch == 0:
            generator = torch.Generator().manual_seed(sub_seed(seed, step // steps_per_epoch))
            order = torch.randperm(num_images, generator=generator).tolist()
        first = step % steps_per_epoch * batch_size
        places = range(rank, batch_size, world)  # of this rank in the batch
        yield [(order[first + place], step * batch_size + place) for place in places]


def training_batches(dataset, args, device, first, last, what, rank=0, world=1):
    """Yield (step, images, targets ...) of steps first to last - 1, on the device; show a bar."""
    sampler = batches(len(dataset), args.batch_size, args.seed, first, last, rank, world)
    loaded = loader(dataset, args, device, batch_sampler=sampler)
    bar = progress(loaded, what, last - first, rank > 0)
    for step, (images, *targets) in enumerate(bar, first):
        yield step, as_input(images, device), *(of.to(device, non_blocking=True) for of in targets)


if __name__ == "__main__":  # make such a folder
    from datasets.make import main, parse_args
    launch(main, parse_args())
