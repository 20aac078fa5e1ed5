"""The two networks: CPF-CTE, the patch classifier (Sec. 0.3), and DeepLabv2, trained on its masks.

Legend: B batch, C classes with background, h x w patch grid, N = h * w patches, D width, K top-k;
cell: how many pixels of the image are one of the output. Read CPFCTE.forward first: Eq. (1) to (7).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.backbones import Network, Normalise, create_backbone, initialise, patch_grid


# --- CPF-CTE -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ClassifierConfig:
    """Everything that rebuilds a CPFCTE; saved in cls.pt."""
    num_classes: int              # C, background included
    backbone: str                 # any plain ViT of timm
    class_tokens: str = "soft"    # soft | all | append | none: t(i), patch i's class token, Eq. (2)
    context: str = "hv"           # hv | raster: the BiLSTM's lines; conv | pool | none
    dropout: float = 0.2          # before the BiLSTM and before the classifier; ViT-PCM's value


# --- Eq. (3) to (6): the CF-BiLSTM of Sec. 0.3.3, and what --context has in its place -------------
class RowsAndColumns(nn.Module):
    """--context hv: one BiLSTM reads every row, another every column; (B, h, w, D) -> the same."""

    def __init__(self, D, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        # two LSTMs, rows and columns, of two directions each: 4 times D/4 numbers
        self.lstms = nn.ModuleList(nn.LSTM(D, D // 4, batch_first=True, bidirectional=True)
                                   for _ in range(2))
        self.proj = nn.Linear(D, D)  # W_o, b_o

    def forward(self, tokens, class_tokens=None):                            # (B, h, w, D)
        tokens = self.dropout(tokens)
        rows = scan(self.lstms[0], tokens, class_tokens)                     # (B, h, w, D/2)
        columns = scan(self.lstms[1], tokens.transpose(1, 2), class_tokens)  # (B, w, h, D/2)
        hidden = torch.cat([rows, columns.transpose(1, 2)], dim=-1)          # (B, h, w, D)
        return self.proj(hidden)                                             # Eq. (6)


class RowMajor(nn.Module):
    """--context raster: one BiLSTM reads all patches, row after row."""

    def __init__(self, D, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.lstms = nn.ModuleList([nn.LSTM(D, D // 2, batch_first=True, bidirectional=True)])
        self.proj = nn.Linear(D, D)

    def forward(self, tokens, class_tokens=None):
        line = self.dropout(tokens).flatten(1, 2)[:, None]                   # (B, 1, N, D)
        hidden = scan(self.lstms[0], line, class_tokens)                     # (B, 1, N, D)
        return self.proj(hidden.view(tokens.shape))                          # Eq. (6)


class Convolution(nn.Module):
    """--context conv, not in the paper: a depthwise 7x7, without recurrence."""

    def __init__(self, D, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Conv2d(D, D, 7, padding=3, groups=D)
        self.proj = nn.Linear(D, D)

    def forward(self, tokens, class_tokens=None):
        mixed = self.mix(self.dropout(tokens).permute(0, 3, 1, 2))
        return self.proj(F.gelu(mixed).permute(0, 2, 3, 1))


class LineMeans(nn.Module):
    """--context pool, not in the paper: each patch beside the means of its row and column."""

    def __init__(self, D, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Linear(3 * D, D)
        self.proj = nn.Linear(D, D)

    def forward(self, tokens, class_tokens=None):
        tokens = self.dropout(tokens)
        lines = [tokens.mean(side, keepdim=True).expand_as(tokens) for side in (1, 2)]
        return self.proj(F.gelu(self.mix(torch.cat([tokens, *lines], dim=-1))))


CONTEXTS = {"hv": RowsAndColumns, "raster": RowMajor, "conv": Convolution, "pool": LineMeans}


def scan(lstm, lines, class_tokens=None):
    """Let lstm read each of the lines (B, lines, steps, D) with the same weights.

    Eq. (3): f_i = LSTM_f(p'_i, f_(i-1)). Eq. (4): b_i = LSTM_b(p'_i, b_(i+1)).
    Eq. (5): [f_i ; b_i], which is what torch's bidirectional LSTM gives.
    class_tokens (C, D) lead every line, where --class-tokens append asks for them.
    """
    B, number, steps, D = lines.shape
    sequence = lines.reshape(B * number, steps, D)
    if class_tokens is not None:
        sequence = torch.cat([class_tokens.expand(len(sequence), -1, -1), sequence], dim=1)
    with torch.autocast(sequence.device.type, enabled=False):  # cuDNN's LSTM would be float16
        hidden, _ = lstm(sequence.float())                     # Eq. (3) to (5)
    return hidden[:, -steps:].reshape(B, number, steps, -1)


class CPFCTE(Network):
    """Context Patch Fusion with Class Token Enhancement: images -> classes of their patches."""

    def __init__(self, config, pretrained=False, weights=None):
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config.backbone, "plain ViT of timm", pretrained, weights,
                                        num_classes=0, dynamic_img_size=True)
        self.normalise, self.cell = Normalise(self.backbone), self.backbone.patch_embed.feat_ratio()
        D, C = self.backbone.embed_dim, config.num_classes
        if config.class_tokens != "none":
            self.class_tokens = nn.Parameter(torch.randn(C, D))  # T, of unit variance as P is
        if config.class_tokens in ("soft", "all"):
            self.enhance_proj = nn.Linear(D + (D if config.class_tokens == "soft" else C * D), D)
        if config.context != "none":
            self.context = CONTEXTS[config.context](D, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(D, C, bias=False)  # W_c
        self.initialise_head(pretrained or weights)
        self.blocks_left = 0  # last blocks that kept tokens (--tokens) still have to pass

    def initialise_head(self, pretrained):
        """Initialise as Keras does; Eq. (2) starts by ignoring the class tokens. With a pretrained
        backbone W_c starts at zero, so that no random start decides (docs/PHOTOGRAPHS.md).
        """
        for name, module in self.named_children():
            if name != "backbone":
                module.apply(initialise)
        if self.config.class_tokens in ("soft", "all"):
            nn.init.eye_(self.enhance_proj.weight)
        if pretrained:
            nn.init.zeros_(self.classifier.weight)

    def forward(self, images):
        """Images (B, 3, H, W) in [0, 1] -> Y (B, h, w, C) float32: each patch's probabilities.

        In their place: the tokens (B, n, D) that --tokens has of them (support/tokens.py).
        """
        tokens = self.patch_tokens(images)                     # Eq. (1)       (B, h, w, D)
        tokens = self.enhance(tokens)                          # Eq. (2)       (B, h, w, D)
        tokens = self.fuse(tokens)                             # Eq. (3) - (6) (B, h, w, D)
        logits = self.classifier(self.dropout(tokens))         #               (B, h, w, C)
        return logits.float().softmax(dim=-1)                  # Eq. (7)

    def patch_tokens(self, images):
        """Eq. (1): P = ViT(x), the normed patch tokens (B, h, w, D); its own [CLS] is dropped."""
        vit = self.backbone
        if images.ndim == 3:  # kept tokens of square images: run the blocks that are left
            tokens = images
            if self.blocks_left:
                tokens = vit.norm(vit.blocks[-self.blocks_left:](images))
            h = w = math.isqrt(tokens.shape[1] - vit.num_prefix_tokens)
        else:
            h, w = patch_grid(vit, *images.shape[-2:])
            tokens = vit.forward_features(self.normalise(images))
        return vit.fc_norm(tokens)[:, vit.num_prefix_tokens:].unflatten(1, (h, w))

    def enhance(self, tokens):
        """Eq. (2): [p_i ; t(i)], then a linear map back to D: p'_i, (B, h, w, D)."""
        if self.config.class_tokens == "soft":
            t = self.class_attention(tokens) @ self.class_tokens            # (B, h, w, D)
        elif self.config.class_tokens == "all":  # after the linear map a constant vector, a bias
            t = self.class_tokens.flatten().expand(*tokens.shape[:-1], -1)  # (B, h, w, C D)
        else:  # none, or append: fuse() puts the class tokens before the BiLSTM's lines
            return tokens
        return self.enhance_proj(torch.cat([tokens, t.to(tokens.dtype)], dim=-1))

    def class_attention(self, tokens):
        """a = softmax_c(p_i . t_c / sqrt(D)), (B, h, w, C): the weight of each token in t(i)."""
        # not in the paper ("its corresponding class token"): nobody knows a patch's class
        return (tokens @ self.class_tokens.T / tokens.shape[-1] ** 0.5).softmax(dim=-1)

    def fuse(self, tokens):
        """Eq. (3) to (6), CF-BiLSTM, or what --context has in its place."""
        if self.config.context == "none":
            return tokens
        appended = self.class_tokens if self.config.class_tokens == "append" else None
        return self.context(tokens, appended)

    def set_trainable_blocks(self, blocks):
        """Let the head, the last `blocks` transformer blocks and the final norm learn.

        0 freezes the backbone; more than it has trains all of it, embeddings included.
        """
        vit = self.backbone
        vit.requires_grad_(blocks > len(vit.blocks))
        for module in [*vit.blocks[-blocks:], vit.norm, vit.fc_norm] if blocks else []:
            module.requires_grad_(True)


def pool_patches(patch_probs, pool="topk", top_k=6):
    """Eq. (8), Table 5: Y (B, h, w, C) -> image scores s (B, C)."""
    Y = patch_probs.flatten(1, 2)  # (B, N, C)
    K = {"max": 1, "avg": Y.shape[1], "topk": min(top_k, Y.shape[1])}[pool]
    # ties at the K-th place share the places left: K = 3 weighs 5, 4, 4, 4 with 1, 2/3, 2/3, 2/3
    least = Y.topk(K, dim=1).values[:, -1:]
    above, equal = Y > least, Y == least
    share = (K - above.sum(1, keepdim=True)) / equal.sum(1, keepdim=True)
    return ((above + share * equal) * Y).sum(dim=1) / K  # Eq. (8): mean of the K largest scores


def border_and_centre(h, w):
    """Two bool masks (h, w): border, the outer eighth; centre, 3/16 or more from every side."""
    rows, columns = ((torch.arange(side) + 0.5) / side for side in (h, w))
    depth = torch.minimum(torch.minimum(rows, 1 - rows)[:, None],
                          torch.minimum(columns, 1 - columns))
    return depth <= max(1 / 8, depth.min()), depth >= min(3 / 16, depth.max())


def pool_by_place(patch_probs):
    """s (B, C) of the first --centre-steps: background's mean over the border of Y (B, h, w, C),
    every other class's over the centre."""
    # not in the paper: Eq. (8) and (9) alone let chance decide which side of an image is the object
    border, centre = border_and_centre(*patch_probs.shape[1:3])
    return torch.cat([patch_probs[:, border, :1].mean(1), patch_probs[:, centre, 1:].mean(1)], 1)


def classification_loss(scores, image_labels):
    """Eq. (9): binary cross-entropy between s and y, (B, C) each, mean over classes and images."""
    s, y = scores.float().clamp(1e-6, 1 - 1e-6), image_labels
    return -(y * s.log() + (1 - y) * (1 - s).log()).mean()


def upsample(maps, height, width):
    """Maps (n, h, w) -> (n, height, width), bilinear; maps that sum to one still do."""
    return F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]


# --- DeepLabv2 ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class SegmenterConfig:
    """Everything that rebuilds a DeepLabv2; saved in seg.pt."""
    num_classes: int
    backbone: str                      # any CNN of timm that can keep the output stride
    rates: tuple = (6, 12, 18, 24)     # ASPP's dilations
    scales: tuple = (1.0, 0.75, 0.5)   # of the input; the first is the reference
    output_stride: int = 8             # pixels of the image to one of the logits


class DeepLabv2(Network):
    """DeepLabv2: a dilated CNN, ASPP with summed branches, the maximum over input scales."""

    def __init__(self, config, pretrained=False, weights=None):
        super().__init__()
        self.config = config
        self.backbone = create_backbone(
            config.backbone, f"CNN of timm that keeps output stride {config.output_stride}",
            pretrained, weights, features_only=True, output_stride=config.output_stride,
            out_indices=(-1,))
        self.normalise, self.cell = Normalise(self.backbone), config.output_stride
        channels = self.backbone.feature_info.channels()[-1]
        self.aspp = nn.ModuleList(
            nn.Conv2d(channels, config.num_classes, 3, padding=rate, dilation=rate)
            for rate in config.rates)
        for conv in self.aspp:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest in

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> the logits of each scale, then their maximum."""
        one_pixel = 1.001 / min(images.shape[-2:])  # no side gets shorter than that
        scaled = [images if scale == 1 else F.interpolate(
            images, scale_factor=max(scale, one_pixel), mode="bilinear", align_corners=False)
            for scale in self.config.scales]
        pyramid = [self.logits(each) for each in scaled]
        resized = [F.interpolate(logits, pyramid[0].shape[-2:], mode="bilinear",
                                 align_corners=False) for logits in pyramid]
        return [*pyramid, torch.stack(resized).amax(dim=0)]

    def logits(self, images):
        """One scale: (B, 3, H, W) -> (B, C, H/stride, W/stride) float32."""
        features = self.backbone(self.normalise(images))[-1]
        return sum(conv(features) for conv in self.aspp).float()
