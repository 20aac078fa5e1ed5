"""Tables and sweeps of both methods: train and score variants over seeds, tables of each study.

Run:    python extras/study.py table4 table5 --data data/toy --jobs 2
        python extras/study.py cpews3 cpews4 cpews5 --data data/toy --jobs 2
Writes: OUT/DATA/FLAGS/sSEED/ (a run folder), OUT/DATA/STUDY-SPLIT.md: scores and differences;
        OUT/DATA/STUDY-SPLIT.csv: every score of every seed, as in docs/results.csv
Studies share the runs of equal flags, and what is done is skipped: a killed job, another seed or a
new variant (one line of STUDIES) costs only what is missing.
"""
import argparse
import csv
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support.files import UserError, atomic, read_text, write_lines
from support.flags import number
from support.processes import launch

# study -> rows: name, the paper's mIoU, flags of train_cls.py, flags of make_pseudo.py; where the
# first ones begin with "cpews", both are flags of extras/cpews/train.py
STUDIES = {
    "table4": [("baseline", 65.2, "--class-tokens none --context none", ""),
               ("+ class tokens", 67.1, "--context none", ""),
               ("+ context", 67.8, "--class-tokens none", ""), ("both", 69.5, "", "")],
    "modules": [("baseline", "-", "--class-tokens none --context none", ""), ("both", "-", "", "")],
    "table5": [("average pooling", 67.7, "--pool avg", ""), ("max pooling", 68.1, "--pool max", ""),
               ("top-K pooling", 69.5, "", "")],
    "top-k": [("K = 1", "-", "--pool max", ""),  # this row and the last one are those of table5
              *((f"K = {k}", "-", f"--top-k {k}", "") for k in (2, 4, 6, 9, 12, 16, 24, 36)),
              ("K = N", "-", "--pool avg", "")],
    "top-k-photo": [("K = 1", "-", "--pool max", ""),
                    *((f"K = {k}", "-", f"--top-k {k}", "") for k in (6, 12, 24, 36, 50, 72, 100)),
                    ("K = N", "-", "--pool avg", "")],
    "stem": [("convolutional", "-", "", ""), ("linear", "-", "--backbone vit_toy_linear", "")],
    "class-tokens": [(t, "-", f"--class-tokens {t}" * (t != "soft"), "")
                     for t in ("none", "soft", "all", "append")],
    "context": [(c, "-", f"--context {c}" * (c != "hv"), "")
                for c in ("none", "hv", "raster", "conv", "pool")],
    "choose": [(f"K {k} rate {lr} epochs {n}", "-", "--class-tokens none --context none "
                f"--top-k {k} --lr {lr} --epochs {n}", "--crf none")  # read by extras/choose.py
               for k in (6, 24, 50, 100) for lr in ("1e-4", "3e-4", "1e-3", "3e-3")
               for n in (1, 2, 4)],
    "max-norm": [("with", "-", "", ""), ("without", "-", "", "--no-max-norm")],
    "size-toy": [(f"{s}x{s}", "-", "", f"--size {s}") for s in (64, 96, 144, 192)],
    "cpews2": [("decoder", "69.8 val, 71.4 test", "cpews", ""),
               ("decoder, CRF", "72.6 test", "cpews", "--crf")],
    "cpews3": [(f"{u} updates", paper, "cpews" + f" --pool-updates {u}" * (u > 0), "")
               for u, paper in ((0, 64.5), (1, "-"), (2, 61.5), (5, 45.5))],
    "cpews4": [("cls + seg", "-", "cpews --ism-weight 0 --pdl-weight 0 --ssl-weight 0", ""),
               ("+ ISM", "-", "cpews --pdl-weight 0 --ssl-weight 0", ""),
               ("+ PDL", "-", "cpews --ssl-weight 0", ""), ("+ SSL", "-", "cpews", ""),
               ("+ SSL at 0.05, U = N", "-", "cpews --ssl-weight 0.05 --ssl-pool all", "")],
    "ssl": [("no SSL", "-", "cpews --ssl-weight 0", "")] + [
        (f"U: {pool} at {weight}", "-", f"cpews --ssl-pool {pool} --ssl-weight {weight}", "")
        for pool, weight in (("unshared", 0.001), ("unshared", 0.003), ("unshared", 0.01),
                             ("all", 0.003))],
    "cpews5": [(f"block {a}", "-", "cpews" + f" --aux-block {a}" * (a != 3), "")
               for a in (2, 3, 4)],
    "cpews-fig3": [(name, "-", "cpews" + f" --backbone {name}" * (name != "ViT-B"), "")
                   for name in ("ViT-B", "deit_base_patch16_224.fb_in1k")],
    "cpews-head": [("E3", "-", "cpews --ism-from 100", ""),  # of --iterations 100: without ISM
                   ("--head softmax", "-", "cpews --ism-from 0 --head softmax --cam-high 0.1 "
                    "--cam-low 0.02 --cam-threshold 0.03", "")],
    "cpews5-voc": [(f"block {a}", "-", "cpews" + f" --aux-block {a}" * (a != 10), "")
                   for a in (8, 10, 12)],
}
METHODS = {  # training, its checkpoint, what makes masks of a split, {column: folder of masks}
    "cls": ("train_cls.py", "cls.pt", "make_pseudo.py --split", {"BPM": "bpm", "CRF": "pseudo"}),
    "cpews": ("extras/cpews/train.py", "cpews.pt", "extras/cpews/train.py --predict",
              {"cam": "cam", "pseudo": "pseudo", "pred": "pred"})}
CSV = "data method variant split seed metric value".split()  # its columns; values are in %
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t at 95 %, df 1 to 9


def parse_args(argv=None):
    """What to compare, on what, how often."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("studies", nargs="+", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    add("--data", type=Path, required=True, help="data set folder")
    add("--out", type=Path, default=Path("runs/study"), help="for runs and tables")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one run for each")
    add("--split", default="val", help="compare on val; report on test once")
    add("--full", action="store_true", help="train and score DeepLabv2 as well")
    add("--flags", default="", help='more flags of every stage: --flags="--preset voc --workers 8"')
    add("--cls-flags", default="", help="more flags of train_cls.py, for every variant")
    add("--cpews-flags", default="", help="more flags of extras/cpews/train.py, likewise")
    add("--seg-flags", default="", help="more flags of train_seg.py, with --full")
    add("--method", default="", help="what the column `method` of the .csv says, as the backbone")
    add("--tokens", type=Path, help="folder of the patch tokens of a frozen backbone, from which "
        "stages 1 and 2 of all rows of CPF-CTE start")
    add("--jobs", type=number(int, 1, 64), default=1, help="runs at a time; they share CPU and GPU")
    return parser.parse_args(argv)


def folder_name(flags):
    """'--top-k 4' -> 'top-k_4': the same flags are the same run, whatever study asks for them."""
    return "_".join(word.removeprefix("--") for word in flags.split()) or "default"


def call(args, run, script, *flags):
    """Run one of the scripts; its output goes to RUN/out.txt, its last line into an error."""
    words = [sys.executable, ROOT / script, "--data", args.data, "--run", run, *flags]
    command = [*map(str, words), *shlex.split(args.flags)]
    env = {"OMP_NUM_THREADS": str(os.cpu_count() // args.jobs or 1), "OMP_WAIT_POLICY": "passive",
           **os.environ}
    log = run / "out.txt"
    with open(log, "a") as file:
        print(shlex.join(command), file=file, flush=True)
        code = subprocess.call(command, stdout=file, stderr=file, env=env)
    if code:
        last = log.read_text().splitlines()[-1]
        raise UserError(f"{script} ended with code {code} ({log}): {last}")


def columns_of(results, prefix):
    """{column: %} of one score: parts or objects found, background called object, contours."""
    (background, *rest), *objects = rows = results["confusion"]
    whole = sum(row[c] for c, row in enumerate(rows) if c) / max(1, sum(map(sum, objects)))
    parts = results.get("part_recall") or {"object": whole}
    return {f"{prefix}{part} found": 100 * recall for part, recall in parts.items()} | {
        f"{prefix}background called object": 100 * sum(rest) / (background + sum(rest)),
        f"{prefix}boundary IoU": 100 * results["boundary_miou"]}


def of_stage(run, stage, step):
    """{epoch or iteration: line} of a stage in RUN/log.jsonl, of its last training alone."""
    path, lines = run / "log.jsonl", {}
    if not path.is_file():
        raise UserError(f"{path} not found: run train_cls.py first")
    for line in map(json.loads, read_text(path).splitlines()):
        if line["stage"] == stage and step in line:  # a new training replaces what came later
            lines = {number: old for number, old in lines.items() if number < line[step]}
            lines[line[step]] = line
    return lines


def run_deeplab(args, run, method, mask_flags, seed, kept):
    """Train DeepLabv2 on the masks of the training split; what its results.json says."""
    seg, masks = run, []
    if method == "cls":
        call(args, run, "make_pseudo.py", *mask_flags.split(), *kept)
    else:  # RUN/pred is the decoder's: DeepLabv2 has a folder of its own
        seg, masks = run / "deeplab", ["--masks", run / "pseudo"]
        seg.mkdir(exist_ok=True)
        splits = [split for split in ("trainaug", "train")
                  if (args.data / f"ImageSets/Segmentation/{split}.txt").is_file()]
        call(args, run, "extras/cpews/train.py", "--predict", splits[0], *mask_flags.split())
    flags = ["--seed", seed, "--resume", *masks, *shlex.split(args.seg_flags)]
    call(args, seg, "train_seg.py", *flags)
    call(args, seg, "evaluate.py", "--split", args.split)
    return json.loads((seg / "results.json").read_text())


def run_variant(args, train_flags, mask_flags, seed):
    """Train (unless that is done), make masks, score them; return {column of the table: %}."""
    method = "cpews" if train_flags.startswith("cpews") else "cls"
    train, checkpoint, write, columns = METHODS[method]
    trained = args.out / args.data.resolve().name / folder_name(train_flags) / f"s{seed}"
    run = trained / folder_name(mask_flags) if mask_flags else trained
    note = run / f"scores-{args.split}.json"
    more = {"cls": args.cls_flags, "cpews": args.cpews_flags}[method]
    flags = shlex.split(more) + train_flags.removeprefix("cpews").split()
    kept = ["--tokens", args.tokens] * (args.tokens is not None and method == "cls")
    kept_masks = kept * ("--size" not in mask_flags)  # tokens are of one size
    shared = re.sub(r"--workers[ =]\d+", "", args.flags)  # results do not depend on these
    settings = [str(args.data.resolve()), flags + shlex.split(shared), shlex.split(args.seg_flags)]
    saved = json.loads(note.read_text()) if note.is_file() else {}
    same = 3 if args.full and "DeepLabv2" in saved.get("scores", ()) else 2  # masks know no stage 3
    if saved and saved["settings"][:same] != settings[:same]:
        raise UserError(f"{note} is of other data or flags: choose another --out")
    if saved and ("DeepLabv2" in saved["scores"] or not args.full):
        return saved["scores"]
    run.mkdir(parents=True, exist_ok=True)
    call(args, trained, train, "--seed", seed, "--resume", *flags, *kept)
    if mask_flags and not (run / checkpoint).is_symlink():
        (run / checkpoint).symlink_to(f"../{checkpoint}")
    call(args, run, *write.split(), args.split, *mask_flags.split(), *kept_masks)
    if "--crf none" in mask_flags:
        columns = {name: masks for name, masks in columns.items() if masks != "pseudo"}
    results = {}
    for masks in columns.values():
        call(args, run, "evaluate.py", "--split", args.split, "--masks", run / masks)
        results[masks] = json.loads((run / masks / "results.json").read_text())
    scores = {column: 100 * results[masks]["miou"] for column, masks in columns.items()}
    for masks, prefix in (("bpm", ""), ("cam", "cam: "), ("pred", "pred: ")):
        scores |= columns_of(results[masks], prefix) if masks in results else {}
    for epoch in [*of_stage(trained, "train_cls", "epoch").values()][-1:]:
        if epoch.get("val_map") is not None:
            scores["val mAP"] = 100 * epoch["val_map"]
        scores["loss x100"] = 100 * epoch["loss"]  # of Eq. (9)
    if args.full:
        results["deeplab"] = run_deeplab(args, run, method, mask_flags, seed, kept_masks)
        scores["DeepLabv2"] = 100 * results["deeplab"]["miou"]
        scores |= columns_of(results["deeplab"], "DeepLabv2: ")
    write_lines(note, [json.dumps(dict(settings=settings, scores=scores, results=results))])
    print(f"{run}  " + "  ".join(f"{name} {scores[name]:.1f}" for name in columns), flush=True)
    return scores


def cells(runs, scores):
    """For each score its mean over the runs, one a seed, and its standard deviation."""
    found = []
    for score in scores:
        values = [run[score] for run in runs]
        found += [f"{statistics.mean(values):.1f}",
                  f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""]
    return found


def gain(runs, others, scores):
    """For each score the mean difference between runs of the same seed, and its 95 % interval."""
    found = []
    for score in scores:
        gains = [run[score] - other[score] for run, other in zip(runs, others)]
        mean, n = statistics.mean(gains), len(gains)
        half = T95[min(n, 10) - 2] / n ** 0.5 * statistics.stdev(gains) if n > 1 else 0
        found += [f"{mean:+.1f}" if any(gains) else "",
                  f"{mean - half:+.1f} to {mean + half:+.1f}" if half else ""]
    return found


def markdown(heads, lines):
    """A table's lines."""
    text = [f"| {' | '.join(map(str, line))} |" for line in (heads, *lines)]
    return [text[0], "|---" * len(heads) + "|", *text[1:]]


def tables(rows, results):
    """The masks' mIoU with the gain of the last step, what they find, all gains of a few rows.

    results: for each row a list of dictionaries of scores, one a seed.
    """
    names = [name for name in results[0][0] if all(name in seed for row in results for seed in row)]
    masks = [name for name in ("BPM", "CRF", "cam", "pseudo", "pred", "DeepLabv2") if name in names]
    found = [name for name in names if name not in masks]
    last = next(name for name in ("DeepLabv2", "pred", "BPM") if name in masks)

    def _heads(scores, second):
        return [head for score in scores for head in (score, second)]

    source = "paper (decoder, VOC)" if "pred" in masks else "paper (DeepLabv2, VOC val)"
    lines = markdown(
        ["variant", source, "seeds", *_heads(masks, "sd"), f"gain in {last}", "95 % interval"],
        [[name, paper, len(runs), *cells(runs, masks), *gain(runs, results[0], [last])]
         for (name, paper, *_), runs in zip(rows, results)])
    if found:
        lines += ["", *markdown(["variant", *_heads(found, "sd")], [
            [name, *cells(runs, found)] for (name, *_), runs in zip(rows, results)])]
    if len(rows) <= 12:
        lines += ["", *markdown(["difference", *_heads(names, "95 % interval")], [
            [f"{rows[i][0]} against {rows[j][0]}", *gain(results[i], results[j], names)]
            for i in range(len(rows)) for j in range(i)])]
    return lines


def main(args):
    jobs = {}  # one thread does all inference variants of one training: they share cls.pt
    for seed in args.seeds:
        for _, _, cls, pseudo in sum((STUDIES[study] for study in args.studies), []):
            jobs.setdefault((cls, seed), {})[pseudo] = None
    with ThreadPoolExecutor(args.jobs) as pool:
        scores = dict(zip(jobs, pool.map(lambda job: {
            flags: run_variant(args, job[0], flags, job[1]) for flags in jobs[job]}, jobs)))
    for study in args.studies:
        rows = STUDIES[study]
        results = [[scores[cls, seed][pseudo] for seed in args.seeds] for _, _, cls, pseudo in rows]
        lines = tables(rows, results)
        name = f"{args.data.resolve().name}/{study}-{args.split}{'-full' * args.full}"
        write_lines(args.out / f"{name}.md", lines)
        raw = [[args.data.resolve().name, args.method, variant, args.split, seed, metric,
                f"{value:.2f}"] for (variant, *_), runs in zip(rows, results)
               for seed, run in zip(args.seeds, runs) for metric, value in run.items()]
        with atomic(args.out / f"{name}.csv") as path, path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([CSV, *raw])
        print(f"\n{study} on {args.data}, {args.split}:", *lines, sep="\n")


if __name__ == "__main__":
    launch(main, parse_args())
