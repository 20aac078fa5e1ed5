"""CPEWS: its network, labels, prototypes and losses (docs/CPEWS.md: E1 to E12, E14, E15).

train.py trains it. Legend: B batch, S side of a crop, O object classes, C = O + 1,
h x w patch grid, N = h * w, D width; F and A are `features` and `aux`, M = W F is `raw`.
"""
from collections import defaultdict
from dataclasses import dataclass
from heapq import nlargest

import torch
import torch.nn.functional as F
from torch import nn

from extras.cpews.par import refine
from model import pool_by_place, pool_patches
from support.backbones import Network, Normalise, create_backbone
from support.files import UserError, read_text
from support.masks import IGNORE


# --- the network -------------------------------------------------------------------------------
@dataclass(frozen=True)
class CPEWSConfig:
    """Everything that rebuilds a CPEWS; saved in cpews.pt."""
    num_classes: int    # C, background included
    backbone: str       # any plain ViT of timm
    aux_block: int      # a, counted from 1
    fov_dilation: int   # of the decoder
    head: str = "max"   # max | softmax: how tokens become scores, E3


def resized(maps, size):
    """(B, c, h, w) -> (B, c, *size), bilinear."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def unflipped(maps, size):
    """Maps (2B, c, h, w) of images and of the same flipped -> (2, B, c, *size), flipped back."""
    plain, flipped = resized(maps, size).chunk(2)
    return torch.stack([plain, flipped.flip(-1)])


class CPEWS(Network):
    """A ViT with two image classifiers, W and W', and a decoder: images -> classes of pixels."""

    def __init__(self, config, pretrained=False, weights=None):
        super().__init__()
        self.config, self.scales, self.amp, self.cell = config, [1.0], False, 1
        self.backbone = create_backbone(config.backbone, "plain ViT of timm", pretrained, weights,
                                        num_classes=0, dynamic_img_size=True)
        if config.aux_block > len(self.backbone.blocks):
            raise UserError(f"--aux-block {config.aux_block}: {config.backbone} has "
                            f"{len(self.backbone.blocks)} blocks")
        self.normalise = Normalise(self.backbone)
        self.patch = self.backbone.patch_embed.feat_ratio()
        D, C, dilation = self.backbone.embed_dim, config.num_classes, config.fov_dilation
        self.classifier, self.aux_classifier = (nn.Linear(D, C - 1, bias=False) for _ in range(2))
        hidden, wide = min(512, D), dict(padding=dilation, dilation=dilation, bias=False)
        self.decoder = nn.Sequential(  # LargeFOV
            nn.Conv2d(D, hidden, 3, **wide), nn.ReLU(), nn.Conv2d(hidden, hidden, 3, **wide),
            nn.ReLU(), nn.Conv2d(hidden, C, 1, bias=False))
        if config.head == "softmax":  # no random start decides which side is the object
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.aux_classifier.weight)

    def train_encoder(self, learns):
        """Let the ViT learn, or freeze it; its position embedding never learns."""
        self.backbone.requires_grad_(learns)
        if self.backbone.pos_embed is not None:
            self.backbone.pos_embed.requires_grad_(False)
        self.train()

    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] -> F and A (B, D, h, w) float32."""
        vit, a = self.backbone, self.config.aux_block
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            images = self.normalise(images)
            tokens, (aux,) = vit.forward_intermediates(images, indices=[a - 1])   # E1
            tokens = vit.fc_norm(tokens)[:, vit.num_prefix_tokens:]
            features = tokens.transpose(1, 2).reshape(aux.shape)                  # E2: F
            aux = features if a == len(vit.blocks) else aux                       # E2: A
        return features.float(), aux.float()

    def scores(self, features, aux, start=False):
        """E3: z and z' (B, O), from the largest value of each channel. --head softmax, ours: logits
        (B, C) of CPF-CTE's s, where background's map is 0; start: as in its first steps."""
        if self.config.head == "max":
            return (self.classifier(features.amax(dim=(2, 3))),
                    self.aux_classifier(aux.amax(dim=(2, 3))))
        K = max(1, features[0, 0].numel() // 10)
        Ys = [F.pad(raw, (0, 0, 0, 0, 1, 0)).softmax(dim=1).permute(0, 2, 3, 1)  # Eq. (7)
              for raw in self.maps(features, aux)]
        return [(pool_by_place(Y) if start else pool_patches(Y, top_k=K)).logit(1e-6) for Y in Ys]

    def segment(self, features):
        """E5: the decoder's logits (B, C, h, w)."""
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.amp):
            return self.decoder(features).float()

    def maps(self, features, aux):
        """The raw maps M = W F and M' = W' A, (B, O, h, w) each."""
        pairs = (self.classifier, features), (self.aux_classifier, aux)
        return [torch.einsum("od,bdhw->bohw", head.weight, layer) for head, layer in pairs]

    def encodings(self, images, scales):
        """{scale: encode of images, sides rounded to patches, and of the same flipped (2B)}."""
        outputs = {}
        for scale in scales:
            sides = [max(1, round(side * scale / self.patch)) for side in images.shape[2:]]
            scaled = resized(images, [side * self.patch for side in sides])
            outputs[scale] = self.encode(torch.cat([scaled, scaled.flip(-1)]))
        return outputs

    def layers(self, images, scales):
        """F and A (B, D, h, w), their mean over scales and flips, on the grid of scale 1."""
        grid = [max(1, round(side / self.patch)) for side in images.shape[2:]]
        outputs = zip(*self.encodings(images, scales).values())
        return [torch.cat([unflipped(maps, grid) for maps in each]).mean(dim=0) for each in outputs]

    def cams(self, encodings, image_labels, size):
        """E6: cam and cam' (B, O, *size) in [0, 1] of images with labels (B, O), each encoded."""
        total = 0
        for layers in encodings:
            raw = torch.cat(self.maps(*layers), dim=1)
            total += unflipped(raw, size).amax(dim=0).relu()
        total = total - total.amin(dim=(2, 3), keepdim=True)
        cams = total / (total.amax(dim=(2, 3), keepdim=True) + 1e-5)
        return [cam * image_labels[..., None, None] for cam in cams.chunk(2, dim=1)]

    def decoded(self, encodings, size):
        """Logits (B, C, *size): image and flipped image summed, the maximum over scales."""
        logits = (unflipped(self.segment(features), size) for features, _ in encodings)
        return torch.stack([both.sum(dim=0) for both in logits]).amax(dim=0)

    def forward(self, images):
        """[logits (B, C, H, W)] of images in [0, 1], at the model's scales."""
        return [self.decoded(self.encodings(images, self.scales).values(), images.shape[2:])]


# --- ISM: the intermediate layer tells which final tokens belong together ----------------------
def token_labels(aux_cam, inside, size, high, low):
    """E7: classes (B, h, w) of tokens from cam' (B, O, S, S); 255 if unsure or not inside."""
    value, best = resized(aux_cam, size).max(dim=1)
    labels = torch.where(value > high, best + 1, torch.where(value > low, IGNORE, 0))
    inside = F.interpolate(inside[:, None].float(), size, mode="nearest-exact")[:, 0]
    return labels.masked_fill(inside == 0, IGNORE)


def ism_loss(features, labels):
    """E8: |cos| of tokens F_i, F_j is to be 1 where their labels (B, h, w) agree, else 0."""
    unit, labels = F.normalize(features.flatten(2), dim=1), labels.flatten(1)
    similarity, known = (unit.transpose(1, 2) @ unit).abs(), labels != IGNORE  # (B, N, N), (B, N)
    itself = torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    pairs = known[:, :, None] & known[:, None] & ~itself
    same = labels[:, :, None] == labels[:, None]
    alike, apart = ((similarity * chosen).sum() / (chosen.sum() + 1)
                    for chosen in (pairs & same, pairs & ~same))
    return (1 - alike) / 2 + apart / 2


# --- CPM: prototypes of each class, and of what is mistaken for it -----------------------------
def region_features(raw, features, threshold, floor=1e-4):
    """E9: f (B, O, D), the mean F of each class's region, and the regions (B, O, h, w), boolean.

    Where no score of a class is positive, its region is empty and its f is 0.
    """
    best = raw.detach().amax(dim=(2, 3), keepdim=True)
    regions = raw.detach().relu() / (best + floor) > threshold
    sums = torch.einsum("bohw,bdhw->bod", regions.type_as(features), features)
    return sums / (regions.sum(dim=(2, 3))[..., None] + 1e-5), regions


def superclasses(folder):
    """The number of each object class's superclass, by superclasses.txt; None if there is none."""
    path = folder.root / "superclasses.txt"
    if not path.is_file():
        return None
    members = [line.split()[1:] for line in read_text(path).splitlines()]
    if sorted(sum(members, [])) != sorted(folder.classes[1:]):
        raise UserError(f"{path}: a line is 'SUPERCLASS CLASS CLASS ...', and each object class of "
                        "classes.txt stands in one of them")
    return [[name in names for names in members].index(True) for name in folder.classes[1:]]


def first_centres(points, K, seed):
    """k-means++: K of the points (n, D), each drawn by its squared distance to those before."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(points), (), generator=generator).item()]
    while len(chosen) < K:
        distance = torch.cdist(points, points[chosen]).amin(dim=1).square() + 1e-12
        chosen.append(torch.multinomial(distance, 1, generator=generator).item())
    return points[chosen]


def k_means(points, centres, iterations=10):
    """Lloyd's iterations from these centres (K, D); a centre without points stays where it is."""
    for _ in range(iterations):
        nearest = F.one_hot(torch.cdist(points, centres).argmin(dim=1), len(centres)).float()
        means = nearest.T @ points / nearest.sum(dim=0).clamp(min=1)[:, None]
        centres = torch.where(nearest.any(dim=0)[:, None], means, centres)
    return centres


def make_pools(regions, groups, K, seed, look_further=False):
    """E10: {"P", "N", "U"}, for each class a tensor (at most K, D), in one pass over the images.

    regions yields for each image f (O, D), whether the class has a region (O,), the classifier's
    scores z (O,) and the image labels (O,), all on the CPU; groups: superclasses(). U is what of N
    shares no superclass; with look_further, not in the paper, the K best of all that share none.
    """
    positive, negative, apart = defaultdict(list), defaultdict(list), defaultdict(list)
    for n, (f, exists, z, image_labels) in enumerate(regions):
        shown = {group for group, y in zip(groups or (), image_labels) if y}
        for c in exists.nonzero().flatten().tolist():
            if image_labels[c]:
                positive[c].append(f[c].clone())
                continue
            alone = groups is None or groups.count(groups[c]) > 1 and groups[c] not in shown
            other = (z[c].item(), -n, f[c:c + 1].clone(), alone)
            negative[c] = nlargest(K, [*negative[c], other])
            apart[c] = nlargest(K, apart[c] + [other] * alone)
    pools, none = dict(P=[], N=[], U=[]), f.new_zeros(0, f.shape[1])
    for c in range(len(f)):
        P = torch.stack(positive[c]) if positive[c] else none
        pools["P"].append(k_means(P, first_centres(P, K, seed)) if len(P) > K else P)
        pools["N"].append(torch.cat([none, *(of for *_, of, _ in negative[c])]))
        apart_c = apart[c] if look_further else [other for other in negative[c] if other[-1]]
        pools["U"].append(torch.cat([none, *(of for *_, of, _ in apart_c)]))
    return pools


# --- PDL and SSL: near the own prototypes, away from what is mistaken for the class ------------
def prototype_distances(f, present, pools):
    """d(f_c, mean of P_c) and d(f_c, nearest of N_c), (n, 2), of n regions of f (B, O, D).

    present (B, O): the class is in the image and has a region; without P_c or N_c it drops out.
    """
    rows = [f.new_zeros(0, 2)]
    for b, c in present.nonzero().tolist():
        P, N = pools["P"][c].to(f), pools["N"][c].to(f)
        if len(P) and len(N):
            d = ((f[b, c] - torch.cat([P.mean(0)[None], N])).square().mean(dim=1) + 1e-4).sqrt()
            rows.append(torch.stack([d[0], d[1:].amin()])[None])
    return torch.cat(rows)


def pdl_loss(distances, temperature):
    """E11: mean of -log sim to the own prototypes and -log(1 - sim) to the nearest negative one."""
    near, far = (distances / temperature + 0.1).T  # sim = exp(-near), exp(-far)
    return (near - (-torch.expm1(-far)).log()).sum() / max(1, len(near))


def false_scores(raw, features, regions, image_labels, pools):
    """E12: the scores M_c(i), (n,), of region tokens that lie nearer to U_c than to P_c."""
    scores = [raw.new_zeros(0)]
    for b, c in image_labels.nonzero().tolist():
        P, U = pools["P"][c].to(raw), pools["U"][c].to(raw)
        if len(P) and len(U):
            tokens = features[b].detach().flatten(1).T                         # (N, D)
            wrong = torch.cdist(tokens, P).amin(dim=1) > torch.cdist(tokens, U).amin(dim=1)
            scores.append(raw[b, c].flatten()[wrong & regions[b, c].flatten()])
    return torch.cat(scores)


def ssl_loss(scores):
    """E12: the mean of false_scores; it lowers them until their tokens leave the region."""
    return scores.sum() / max(1, len(scores))


# --- the segmentation branch -------------------------------------------------------------------
@torch.no_grad()
def pixel_labels(cam, images, image_labels, inside, high, low, dilations):
    """E14: (B, H, W) from cam (B, O, H, W): 0 background, 255 where unsure or not inside (B, H, W).

    images (B, 3, H, W), image_labels (B, O); high and low are beta_h and beta_l.
    """
    present, size = F.pad(image_labels, (1, 0), value=1), cam.shape[2:]    # (B, C), background is
    most = int(present.sum(dim=1).max())
    here, classes = (part[:, :most, None, None]
                     for part in present.sort(dim=1, descending=True, stable=True))
    half, runs = [max(1, side // 2) for side in size], []
    for beta in (high, low):  # each image has only its own classes' maps refined
        maps = torch.take_along_dim(F.pad(cam, (0, 0, 0, 0, 1, 0), value=beta), classes, dim=1)
        runs.append(resized(maps, half).masked_fill(here == 0, -torch.inf).softmax(dim=1))
    refined = resized(refine(resized(images, half), torch.cat(runs, dim=1), dilations), size)  # E13
    sure, maybe = (  # max's indices: on a CPU argmax over the classes is several times slower
        torch.take_along_dim(classes, maps.max(dim=1, keepdim=True).indices, dim=1)[:, 0]
        for maps in refined.chunk(2, dim=1))
    labels = torch.where(sure > 0, sure, torch.where(maybe > 0, IGNORE, 0))
    return labels.masked_fill(~inside, IGNORE)


def seg_loss(logits, labels):
    """E15: half the mean cross-entropy of background pixels and half that of foreground ones."""
    losses = F.cross_entropy(resized(logits, labels.shape[1:]), labels, ignore_index=IGNORE,
                             reduction="none")
    kinds = labels == 0, (labels > 0) & (labels != IGNORE)
    return sum((losses * kind).sum() / kind.sum().clamp(min=1) for kind in kinds) / 2
