"""Data: one folder layout for every data set, the presets, and the makers of such folders.

Run:    python data.py toy --root data/toy                            (12 s, nothing is downloaded)
        python data.py voc --root data/VOC2012 [--sbd DIR] [--download]
        python data.py coco --root data/COCO2014 [--train-masks] [--download]
Writes: ROOT/JPEGImages/ID.jpg                    the images, RGB
        ROOT/SegmentationClass/ID.png             palette masks to score: 0 background, 255 ignore
        ROOT/ImageSets/Segmentation/SPLIT.txt     one id a line
        ROOT/classes.txt                          one class name a line, background first
        ROOT/image_labels.txt                     "ID name name ...": all that training is told
        ROOT/preset.txt                           which row of PRESETS below the stages start from
        ROOT/Parts/ID.png, Parts/names.txt        toy only: 1 body, 2 head
Any folder like that is a data set; nothing downstream knows which one it is.
"""
import argparse
import hashlib
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import rgb_to_grayscale
from tqdm import tqdm

from support.run import DataError, atomic, probability, run

IGNORE = 255  # the mask value that is never trained on and never scored
JITTER = 0.3  # brightness, contrast and saturation change by up to this share


# --- the folder -------------------------------------------------------------------------------

class Folder:
    """A data set folder: its class names, splits, image labels, images and masks."""

    def __init__(self, root):
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root} not found: `python data.py toy --root {root}` makes one")
        self.classes = self._lines("classes.txt")
        for name in self.classes:
            if len(name.split()) != 1:
                raise DataError(f"{root}/classes.txt: {name!r} has a space: use an underscore")
        self._labels = None

    def _lines(self, name):
        path = self.root / name
        if not path.is_file():
            raise DataError(f"{path} not found: run data.py, or write it (README, 'Your own data')")
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{path} is empty")
        return lines

    def ids(self, split):
        """The ids of ImageSets/Segmentation/SPLIT.txt, in its order."""
        return [line.split()[0] for line in self._lines(f"ImageSets/Segmentation/{split}.txt")]

    def image_labels(self, image_id):
        """(C,) float32, 1 for each class that image_labels.txt names; background is always 1."""
        if self._labels is None:
            lines = map(str.split, self._lines("image_labels.txt"))
            self._labels = {image_id: names for image_id, *names in lines}
        names, where = self._labels.get(image_id), self.root / "image_labels.txt"
        if not names:
            raise DataError(f"{where}: no label for {image_id}: add '{image_id} NAME ...' "
                            f"('{image_id} {self.classes[0]}' where it shows no object)")
        labels = torch.zeros(len(self.classes))
        labels[0] = 1
        for name in names:
            if name not in self.classes:
                raise DataError(f"{where}: {image_id} has {name!r}, which is not in classes.txt")
            labels[self.classes.index(name)] = 1
        return labels

    def image_path(self, image_id):
        """JPEGImages/ID.jpg."""
        return self.root / "JPEGImages" / f"{image_id}.jpg"

    def mask_path(self, image_id):
        """SegmentationClass/ID.png, the ground truth: for scoring, never for training."""
        return self.root / "SegmentationClass" / f"{image_id}.png"


def read_image(path):
    """A PIL image in RGB; grey and CMYK files are converted, unreadable ones are named."""
    if not Path(path).is_file():
        raise DataError(f"{path} not found")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({error}): replace it, or take it out of the split")


def read_mask(path, num_classes, size=None):
    """(H, W) uint8 from a palette or grey PNG; size: the (width, height) that it must have."""
    if not Path(path).is_file():
        raise DataError(f"{path} not found")
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read ({error})")
    if mode not in ("P", "L"):
        raise DataError(f"{path} is a {mode} image: a mask is a palette or grey PNG")
    if size is not None and mask.shape != (size[1], size[0]):
        raise DataError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {size[0]}x{size[1]}")
    unknown = set(np.unique(mask).tolist()) - {*range(num_classes), IGNORE}
    if unknown:
        raise DataError(f"{path} has the value {min(unknown)}: allowed are 0 to {num_classes - 1} "
                        f"(the lines of classes.txt) and {IGNORE} (ignore)")
    return mask


@cache
def voc_palette():
    """(256, 3) uint8, VOC's colours: the bits of the class number dealt to R, G, B from the top."""
    palette = np.zeros((256, 3), np.uint8)
    for label in range(256):
        for bit in range(8):
            palette[label, bit % 3] |= (label >> bit & 1) << (7 - bit // 3)
    return palette


def save_mask(path, mask):
    """Write (H, W) class numbers as a palette PNG with VOC's colours, atomically."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def to_tensor(image):
    """PIL RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def batches(num_images, batch_size, seed, start, stop, rank=0, world=1):
    """The (index, draw) pairs of this rank's share of each training step from start to stop.

    Every pass over the images is one seeded shuffle; its incomplete last batch is dropped. `draw`
    numbers all samples ever drawn and seeds their augmentation, so what a step sees depends on
    seed and step alone: not on the number of workers or ranks, nor on where a run was interrupted.
    """
    if num_images < batch_size:
        raise DataError(f"{num_images} images cannot fill --batch-size {batch_size}: lower it")
    if batch_size % world:
        raise DataError(f"--batch-size {batch_size} is not a multiple of {world} ranks")
    a_pass = num_images // batch_size
    for step in range(start, stop):
        if step == start or step % a_pass == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step // a_pass)
            order = torch.randperm(num_images, generator=generator).tolist()
        first = step % a_pass * batch_size
        rows = range(first + rank, first + batch_size, world)
        yield [(order[row], step * batch_size + row - first) for row in rows]


# --- the stages' data sets --------------------------------------------------------------------

class LabelledImages(Dataset):
    """(index, draw) -> image (3, S, S) uint8, labels (C,), index, draw."""

    def __init__(self, folder, ids, size):
        self.folder, self.ids, self.size, self.cache = folder, ids, size, None
        self.labels = torch.stack([folder.image_labels(i) for i in ids])  # fails early, by name

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        index, draw = item
        if self.cache:  # opened anew each time: an open one would travel whole to a spawned worker
            image = torch.from_numpy(np.array(np.load(self.cache, mmap_mode="r")[index]))
        else:
            image = read_image(self.folder.image_path(self.ids[index]))
            image = to_tensor(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return image, self.labels[index], index, draw

    def in_order(self, batch_size, workers):
        """A loader of all images, one after the other."""
        chunks = torch.arange(len(self)).split(batch_size)
        return DataLoader(self, num_workers=workers, persistent_workers=workers > 0,
                          batch_sampler=[[(int(i), 0) for i in chunk] for chunk in chunks])

    def use_cache(self, split, workers, rank, world):
        """Read the images from ROOT/cache/SPLIT-SIZE-*.npy, which rank 0 writes if need be.

        The * is a fingerprint of the ids and the files' sizes in bytes: other images, other name.
        """
        paths = [self.folder.image_path(i) for i in self.ids]
        facts = [(i, path.stat().st_size if path.is_file() else 0)
                 for i, path in zip(self.ids, paths)]
        fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        path = self.folder.root / "cache" / f"{split}-{self.size}-{fingerprint}.npy"
        if rank == 0 and not path.is_file():
            for leftover in path.parent.glob(f".{split}-{self.size}-*.tmp"):
                if time.time() - leftover.stat().st_mtime > 24 * 3600:  # of a killed run
                    leftover.unlink(missing_ok=True)
            header = dict(descr="|u1", fortran_order=False,
                          shape=(len(self), 3, self.size, self.size))
            with atomic(path) as temporary, open(temporary, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for images, *_ in tqdm(self.in_order(16, workers), desc=f"cache {split}",
                                       disable=None):
                    file.write(images.numpy())
            for outdated in {*path.parent.glob(f"{split}-{self.size}-*.npy")} - {path}:
                outdated.unlink(missing_ok=True)
        if world > 1:
            dist.barrier()
        self.cache = path


def augment(images, seed, draws, names):
    """(B, 3, S, S) in [0, 1] -> the same, each changed in the named ways as its draw alone says."""
    chances = torch.stack([torch.rand(6, generator=torch.Generator().manual_seed(
        seed * 1_000_003 + draw)) for draw in draws.tolist()])
    chances = chances.to(images.device, non_blocking=True)  # nothing here waits for the GPU
    flip, vflip, transpose, *factors = chances.T.reshape(6, -1, 1, 1, 1)
    if "flip" in names:
        images = torch.where(flip < 0.5, images.flip(3), images)
    if "vflip" in names:
        images = torch.where(vflip < 0.5, images.flip(2), images)
    if "transpose" in names:
        images = torch.where(transpose < 0.5, images.transpose(2, 3), images)
    if "jitter" in names:  # not in the paper; the strength is ours
        images = jitter(images, *(1 + JITTER * (2 * factor - 1) for factor in factors))
    return images


def jitter(images, brightness, contrast, saturation):
    """torchvision's three adjustments in this order, with a factor (B, 1, 1, 1) for each image."""
    images = (images * brightness).clamp_(0, 1)
    mean = rgb_to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp_(0, 1)
    return torch.lerp(rgb_to_grayscale(images), images, saturation).clamp_(0, 1)


class MaskedImages(Dataset):
    """(index, draw) -> image (3, S, S) uint8, mask (S, S) int64, both cut out at random, index."""

    def __init__(self, folder, ids, masks, crop, rescale, seed, fill):
        self.folder, self.ids, self.masks = folder, ids, masks
        self.crop, self.rescale, self.seed, self.fill = crop, rescale, seed, fill
        for image_id in ids:
            if not (masks / f"{image_id}.png").is_file():
                raise DataError(f"{masks}/{image_id}.png not found: run make_pseudo.py first")

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        index, draw = item
        image = read_image(self.folder.image_path(self.ids[index]))
        mask = read_mask(self.masks / f"{self.ids[index]}.png", len(self.folder.classes),
                              image.size)
        rng = np.random.default_rng([self.seed, draw])
        scale = rng.uniform(*self.rescale)
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
        mask = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
        # a window of crop x crop at random; what lies outside the image is filled and ignored
        left, top = (int(rng.integers(min(0, side - self.crop), max(0, side - self.crop) + 1))
                     for side in size)
        canvas = Image.new("RGB", (self.crop, self.crop), self.fill)
        canvas.paste(image, (-left, -top))
        target = Image.new("L", (self.crop, self.crop), IGNORE)
        target.paste(mask, (-left, -top))
        pixels, labels = to_tensor(canvas), torch.from_numpy(np.array(target, dtype=np.int64))
        if rng.random() < 0.5:
            pixels, labels = pixels.flip(2), labels.flip(1)
        return pixels, labels, index


class Images(Dataset):
    """index -> index, image (H, W, 3) uint8."""

    def __init__(self, folder, ids):
        self.folder, self.ids = folder, ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image = read_image(self.folder.image_path(self.ids[index]))
        return index, torch.from_numpy(np.array(image))


def batch_of(items, size):
    """collate_fn of a loader of Images: indices, images (B, 3, size, size), images as they are."""
    indices, originals = zip(*items)
    resized = [Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BICUBIC)
               for image in originals]
    return indices, torch.stack([to_tensor(image) for image in resized]), originals


def parse_args(argv=None):
    """`toy`, `voc` or `coco`, and where to."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=("toy", "voc", "coco"))
    parser.add_argument("--root", type=Path, required=True, help="the data set folder")
    parser.add_argument("--num", type=int, nargs=3, default=(1500, 200, 200), metavar="N",
                        help="toy: images of train, val and test (default: 1500 200 200)")
    parser.add_argument("--cooccur", type=probability, metavar="P",
                        help="toy: textured backgrounds; with probability P the texture is the one "
                        "that the first beetle's class prefers, a temptation to call it a beetle")
    parser.add_argument("--sbd", type=Path, help="voc: SBD's folder; its train.txt and val.txt "
                        "make the 10,582 images of trainaug")
    parser.add_argument("--train-masks", action="store_true", help="coco: masks of train as well "
                        "as of val; only to score pseudo masks")
    parser.add_argument("--download", action="store_true", help="voc, coco: fetch the archives of "
                        "VOC 2012 and SBD, or of COCO 2014, first")
    return parser.parse_args(argv)


def main(args):
    from support.beetles import make_toy
    from support.coco import download_coco, make_coco
    from support.voc import download_voc, make_voc
    if args.dataset == "toy":
        make_toy(args.root, args.num, args.cooccur)
    elif args.dataset == "coco":
        if args.download:
            download_coco(args.root)
        make_coco(args.root, args.train_masks)
    else:
        if args.download:
            args.sbd = args.sbd or args.root / "sbd"
            download_voc(args.root, args.sbd)
        make_voc(args.root, args.sbd)
    folder = Folder(args.root)
    splits = sorted((args.root / "ImageSets/Segmentation").glob("*.txt"))
    print(f"{args.root}: {len(folder.classes)} classes with background; "
          + ", ".join(f"{path.stem} {len(folder.ids(path.stem)):,}" for path in splits))


if __name__ == "__main__":
    run(main, parse_args())
