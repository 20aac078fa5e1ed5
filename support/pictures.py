"""Pictures of masks: rows of them beside their images, and the overlay on a photo."""
import textwrap
from contextlib import suppress
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, PngImagePlugin

from support.files import UserError, atomic, progress
from support.masks import IGNORE, decode, read_image, read_mask, save_mask, voc_palette

PICTURE = "drawn by evaluate.py"  # noted in the file
GAP, LINE = 8, 20  # pixels between pictures, of a line of text


def readable_font():
    """A font of the system, which has other letters than English ones; else Pillow's own."""
    for name in ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, 13)
    return ImageFont.load_default(13)


def draw(path, rows, titles, names, about, width=1100):
    """Write rows of pictures (H, W, 3) and a legend; names {class number: name}; width: pixels."""
    side = width // len(titles) - GAP
    heights = [max(1, round(side * min(row[0].shape[0] / row[0].shape[1], 3))) for row in rows]
    font = readable_font()
    longest = max((font.getlength(name) for name in names.values()), default=0)
    columns = max(1, min(5, int(width // (longest + 40))))
    words, lines = textwrap.wrap(about, width // 8), -(-len(names) // columns)
    height = LINE * (len(words) + lines + 1) + sum(heights) + GAP * len(rows)
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    for k, line in enumerate(words):
        pen.text((width / 2, LINE * (k + 0.5)), line, "black", font, anchor="mm")
    x, y = [GAP // 2 + (side + GAP) * k for k in range(len(titles))], LINE * len(words)
    for left, title in zip(x, titles):
        while font.getlength(title) > side and len(title) > 4:
            title = f"{title[:-4]}..."
        pen.text((left + side / 2, y + LINE / 2), title, "black", font, anchor="mm")
    y += LINE
    for row, high in zip(rows, heights):
        for left, picture in zip(x, row):
            enlarged = picture.shape[1] < side
            how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            canvas.paste(Image.fromarray(picture).resize((side, high), how), (left, y))
        y += high + GAP
    for k, (number, name) in enumerate(names.items()):
        left, top = width // columns * (k % columns) + GAP, y + LINE * (k // columns)
        colour = tuple(voc_palette()[number].tolist())
        pen.rectangle((left, top + 4, left + 16, top + 16), colour, "black")
        pen.text((left + 22, top + LINE / 2), name, "black", font, anchor="lm")
    facts = PngImagePlugin.PngInfo()
    facts.add_text("Title", PICTURE)
    with atomic(path) as temporary:
        canvas.save(temporary, format="PNG", pnginfo=facts)


def draw_stages(run, folder, segment, title):
    """RUN/figure.png: evenly spaced images that have pseudo masks, stage by stage.

    segment(image) is the mask of the last column, which has the title.
    """
    bpm, pseudo = run / "bpm", run / "pseudo"
    ids = [path.stem for path in sorted(bpm.glob("*.png"))
           if folder.mask_path(path.stem).is_file() and (pseudo / path.name).is_file()]
    if not ids:
        return print(f"no figure.png: no image has masks in {bpm}, {pseudo} and a ground truth")
    C, rows, seen = len(folder.classes), [], {0}
    for image_id in (ids[k * len(ids) // 6] for k in range(6)) if len(ids) > 6 else ids:
        image = np.array(read_image(folder.image_path(image_id)))
        paths = folder.mask_path(image_id), bpm / f"{image_id}.png", pseudo / f"{image_id}.png"
        masks = [*(read_mask(path, C, image.shape[1::-1]) for path in paths), segment(image)]
        seen.update(*(np.unique(mask).tolist() for mask in masks))
        rows.append([image, *(voc_palette()[mask] for mask in masks)])
    names = {k: "ignore" if k == IGNORE else folder.classes[k] for k in sorted(seen)}
    titles = ["image", "ground truth", "BPM (Eq. 10)", "pseudo (CRF)", title]
    shapes = {row[0].shape for row in rows}
    if len(rows) == 6 and len(shapes) == 1 and shapes.pop()[1] < 128:  # small: two in a row
        rows, titles = [a + b for a, b in zip(rows[::2], rows[1::2])], 2 * titles
    draw(run / "figure.png", rows, titles, names,
         "Images that have pseudo masks, evenly spaced, not chosen. BPM and pseudo masks know the "
         "image labels; DeepLabv2 does not.")
    print(f"written: {run}/figure.png")


def segment_photo(args, segment, classes):
    """Write the mask of --image, and the photo beside itself under its mask, with outlines."""
    path = args.out.with_name(f"{args.out.stem}_overlay.png")
    if path.exists() and decode(path).info.get("Title") != PICTURE:
        raise UserError(f"{path} is in the way, and not ours to replace: choose another --out")
    image = np.array(read_image(args.image))
    mask = segment(image, bar=partial(progress, desc="windows"))
    save_mask(args.out, mask)
    names = {k: classes[k] for k in np.unique(mask).tolist()}
    thin = max(1, max(mask.shape) // 1500)  # a large photo's picture needs no more pixels
    image, mask = image[::thin, ::thin], mask[::thin, ::thin]
    grown = np.array(Image.fromarray(mask).filter(ImageFilter.MaxFilter(3)))  # 1 pixel wider
    opacity = (np.where(grown != mask, 255, 115) * (grown > 0)).astype(np.uint8)
    overlay = Image.composite(*map(Image.fromarray, (voc_palette()[grown], image, opacity)))
    draw(path, [[image, np.array(overlay)]], [args.image.name, "DeepLabv2"], names, "")
    print(f"{args.out} and {path}: {', '.join(names.values())}")
