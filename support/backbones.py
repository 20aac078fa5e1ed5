"""Backbones: timm's, with weights from the hub or a file, and the small ones of the beetles."""
import logging
import os
import re
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub.constants as hub
import timm
import torch
from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from data import seeded
from support.checkpoints import MADE_BY
from support.files import UserError, lack


def ask_hub(name):
    """Say that the hub is asked for weights; where it cannot be reached, use its cache only."""
    print(f"weights of {name}: from timm's hub, or its cache on this machine")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        urllib.request.urlopen(hub.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        hub.HF_HUB_OFFLINE = True  # else it is asked ten times, for over a minute


@contextmanager
def odd_weights():
    """Yield {"Missing": names, "Unexpected": names} of weights: timm only logs them."""
    names, logger = {"Missing": [], "Unexpected": []}, logging.getLogger("timm.models._builder")

    def _note(record):
        kind, _, rest = record.getMessage().partition(" keys (")
        names.get(kind, []).extend(rest.split(")")[0].split(", "))
        return kind not in names

    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(_note)
    try:
        yield names
    finally:
        logger.removeFilter(_note)
        logger.setLevel(level)


def stacks(name):
    """{"stages", "stages.3.blocks"} for stages.3.blocks.0.weight: whose parts have numbers."""
    return {name[:number.start()] for number in re.finditer(r"\.\d+(?=\.)", name)}


def check_weights(name, model, missing, unexpected):
    """Refuse a file of another network or depth; a note where a weight outside its blocks lacks."""
    own = model.state_dict()
    own_stacks = set().union(*map(stacks, own))
    lacks = [key for key in missing if stacks(key)]
    more = [key for key in unexpected if stacks(key) & own_stacks]
    few = f"{len(missing)} of its weights are not there, as {missing[0]}" if missing else ""
    if 2 * len(missing) > len(own):
        raise ValueError(few)
    if lacks or more:
        raise ValueError("it is of another depth or kind: it has " + (
            f"no {lacks[0]}" if lacks else f"{more[0]}, which this network has not"))
    if few:
        print(f"note: {name}: {few}; they start at random")


SIGNS = (  # what a file holds that begins so, in small letters
    ("a pointer of Git LFS: fetch the file itself, as with git lfs pull", b"version https://git-"),
    ("a web page: download the file itself", b"<"),
    ("text (JSON), not weights: download the file itself", b"{", b"["),
    ("an archive: unpack it", b"\x1f\x8b", b"bzh", b"\xfd7z"))


def looks_like(path):
    """What a file of --weights is instead of weights, and the way out; None if nobody knows."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "empty: copy it again"
    for what, *starts in SIGNS:
        if head.lstrip().lower().startswith(tuple(starts)):
            return what
    if head[8:9] == b"{" and path.suffix != ".safetensors":
        return "a safetensors file: give its name the ending .safetensors"
    try:
        script = MADE_BY[torch.load(path, map_location="cpu", weights_only=True)["kind"]]
        return f"a checkpoint of {script}: --run takes its folder, --weights timm's file"
    except Exception:  # zip, pickle and torch each have their own
        return None


def create_backbone(name, kind, pretrained, weights=None, **kwargs):
    """A timm model: with the hub's ImageNet weights, with those of a file, or with random ones."""
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no model {name!r}: see timm.list_models('*{name[:5]}*')")
    if weights is not None and not os.path.isfile(weights):
        what = "is a folder" if os.path.isdir(weights) else "not found"
        raise UserError(f"{weights} {what}: --weights takes a local copy of the timm weights")
    overlay = {"pretrained_cfg_overlay": dict(file=str(weights))} if weights else {}
    if pretrained and not weights:
        ask_hub(name)
    try:
        with odd_weights() as odd:
            model = timm.create_model(name, pretrained=pretrained or bool(weights), **overlay,
                                      **kwargs)
        classifier = timm.get_pretrained_cfg(name).classifier or "no classifier"
        missing = [weight for weight in odd["Missing"] if not weight.startswith(classifier)]
        check_weights(name, model, missing, odd["Unexpected"])
        if "ViT" in kind and not hasattr(model, "fc_norm"):  # Swin takes the same arguments
            raise NotImplementedError
        return model
    except (TypeError, NotImplementedError, AssertionError):  # it does not take these arguments
        raise UserError(f"--backbone {name} does not fit this stage, which needs a {kind}")
    except Exception as error:  # hub, network, file format: many types, one consequence
        if lack(error) or not (pretrained or weights):
            raise
        told = " ".join(str(error).removeprefix("Error(s) in loading state_dict for ").split())
        reason = f"{type(error).__name__} {told}"[:120]
        if "weights_only" in told:
            reason = "it holds more than tensors: save the network's state_dict() alone"
        sizes = re.search(r"size mismatch for (\S+):.*?Size\((.*?)\).*?Size\((.*?)\)", told)
        if sizes:
            reason = "its {} is {}, here it is {}".format(*sizes.groups())
        if weights:
            known = looks_like(Path(weights))
            file = timm.get_pretrained_cfg(name).hf_hub_id or name
            raise UserError(f"no weights for {name} from {weights}"
                            + (f": it is {known}" if known else
                               f" ({reason}): --weights takes the file of {file}"))
        raise UserError(f"no weights for {name} from the hub ({reason}): pass --weights FILE with "
                        "a local copy, or --no-pretrained for random ones")


class Normalise(nn.Module):
    """Images in [0, 1] -> the mean and standard deviation that the backbone's weights expect."""

    def __init__(self, backbone):
        super().__init__()
        config = backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    def forward(self, images):
        return (images - self.mean) / self.std


class Network(nn.Module):
    """nn.Module whose batch norms keep their statistics where they do not learn."""

    def train(self, mode=True):
        """As nn.Module's."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def freeze_batch_norm(self):
        """Keep the statistics and scales of every batch norm, which are ImageNet's."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)


def initialise(module):
    """Initialise the head's linear maps and LSTMs as Keras, ViT-PCM's framework, does.

    torch's own start makes the first outputs of LSTM and classifier several times smaller, and a
    model trained from scratch then predicts nothing but class frequencies for many epochs.
    """
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("weight_hh"):
            nn.init.orthogonal_(parameter)
        elif isinstance(module, nn.Conv2d) and name == "weight":
            nn.init.dirac_(parameter, module.groups)  # each patch as it is
        elif name.startswith("weight"):
            nn.init.xavier_uniform_(parameter)
        elif name.startswith("bias"):
            nn.init.zeros_(parameter)
        if name.startswith("bias_ih"):  # order of the gates: input, forget, cell, output
            nn.init.ones_(parameter[module.hidden_size:2 * module.hidden_size])


def patch_grid(vit, height, width):
    """(h, w) of the patches of an image of that many pixels."""
    patch = vit.patch_embed.feat_ratio(False)
    if height % patch[0] or width % patch[1]:
        raise UserError(f"--size {height} is no multiple of the {patch[0]} pixels of a patch")
    return height // patch[0], width // patch[1]


# --- networks of ours, registered with timm: the hybrid of preset photo, the small ones of toy ---
BARE = dict(url="", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
default_cfgs = generate_default_cfgs({  # where timm looks for them
    "vit_lite0": BARE | dict(classifier="head", hf_hub_id="timm/tf_efficientnet_lite0.in1k"),
    **{name: BARE | dict(classifier="head", fixed_input_size=True)
       for name in ("vit_toy", "vit_toy_linear")},
    "resnet_toy": BARE | dict(classifier="fc")})


def _vit(name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs):
    return build_model_with_cfg(VisionTransformer, name, pretrained,
                                pretrained_filter_fn=pretrained_filter_fn, **kwargs)


def _into_hybrid(state, model):
    """The weights of a CNN -> those of the ViT whose patches it makes; the rest as it starts."""
    home = "patch_embed.backbone."
    if "conv_stem.weight" not in state:  # a file of the hybrid itself
        return state
    blocks = {name: w for name, w in model.state_dict().items() if not name.startswith(home)}
    return blocks | {home + name: weight for name, weight in state.items()}


@register_model
def vit_lite0(pretrained=False, **kwargs):
    """A hybrid: tf_efficientnet_lite0 makes patches of 32 pixels, then a ViT of two blocks.

    Its weights are tf_efficientnet_lite0's, of ImageNet-1k; the blocks start as the identity, with
    the same weights for every --seed, as those of the CNN are.
    """
    cnn = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(-1,))
    embed = partial(HybridEmbed, backbone=cnn, proj=False, feature_size=14, feature_ratio=32)
    size = dict(img_size=448, patch_size=1, embed_dim=320, depth=2, num_heads=5, mlp_ratio=2,
                init_values=1e-5, class_token=False, pos_embed="none", embed_layer=embed,
                global_pool="avg")
    with seeded(0, 0):
        return _vit("vit_lite0", pretrained, _into_hybrid, **size | kwargs)


@register_model
def vit_toy_linear(pretrained=False, **kwargs):
    """timm's ViT at 96x96: patch 8, width 128, depth 4."""
    size = dict(img_size=96, patch_size=8, embed_dim=128, depth=4, num_heads=2, mlp_ratio=2)
    return _vit("vit_toy_linear", pretrained, **size | kwargs)


@register_model
def vit_toy(pretrained=False, **kwargs):
    """Patches by 3x3 convolutions of stride 2, which learn textures faster (Xiao et al. 2021)."""
    stem = ConvStem(depth=4, channels=(32, 64, 128, 128), stride=(2, 2, 2, 1),
                    kernel_size=(3, 3, 3, 1))
    embed = dict(patch_size=1, embed_layer=partial(HybridEmbed, backbone=stem, proj=False))
    return vit_toy_linear(pretrained, **embed | kwargs)


@register_model
def resnet_toy(pretrained=False, **kwargs):
    """timm's ResNet with one basic block a stage and few channels."""
    size = dict(block=BasicBlock, layers=(1, 1, 1, 1), channels=(32, 64, 64, 96),
                stem_type="deep", stem_width=16, zero_init_last=False)
    return build_model_with_cfg(ResNet, "resnet_toy", pretrained, **size | kwargs)
