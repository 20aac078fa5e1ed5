"""Backbones: timm's, with weights from the hub or a file, and the small ones of the beetles."""
import logging
import os
import urllib.request
from contextlib import contextmanager
from functools import partial

import huggingface_hub.constants as hub
import timm
from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem

from support.run import DataError


def ask_hub(name):
    """Say that the hub is asked for weights; where it cannot be reached, use its cache only."""
    print(f"weights of {name}: from timm's hub, or its cache on this machine", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        urllib.request.urlopen(hub.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        hub.HF_HUB_OFFLINE = True  # else it is asked ten times, for over a minute


@contextmanager
def missing_weights():
    """Yield a list that gets the names of weights which timm misses: it only logs them."""
    names, logger = [], logging.getLogger("timm.models._builder")

    def _note(record):
        kind, _, rest = record.getMessage().partition(" keys (")
        names.extend(rest.split(")")[0].split(", ") if kind == "Missing" else [])
        return kind not in ("Missing", "Unexpected")

    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(_note)
    try:
        yield names
    finally:
        logger.removeFilter(_note)
        logger.setLevel(level)


def create_backbone(name, kind, pretrained, weights=None, **kwargs):
    """A timm model: with the hub's ImageNet weights, with those of a file, or with random ones."""
    if not timm.is_model(name.split(".")[0]):
        raise DataError(f"timm has no model {name!r}: see timm.list_models('*{name[:5]}*')")
    if weights is not None and not os.path.isfile(weights):
        raise DataError(f"{weights} not found: --weights takes a local copy of the timm weights")
    overlay = {"pretrained_cfg_overlay": dict(file=str(weights))} if weights else {}
    if pretrained and not weights:
        ask_hub(name)
    try:
        with missing_weights() as missing:
            model = timm.create_model(name, pretrained=pretrained or bool(weights), **overlay,
                                      **kwargs)
        classifier = timm.get_pretrained_cfg(name).classifier or "no classifier"
        missing = [weight for weight in missing if not weight.startswith(classifier)]
        if missing:
            lack = f"{len(missing)} of its weights are not there, as {missing[0]}"
            if 2 * len(missing) > len(model.state_dict()):
                raise ValueError(lack)
            print(f"note: {name}: {lack}; they start at random")
        if "ViT" in kind and not hasattr(model, "fc_norm"):  # Swin takes the same arguments
            raise NotImplementedError
        return model
    except (TypeError, NotImplementedError, AssertionError):  # it does not take these arguments
        raise DataError(f"--backbone {name} does not fit this stage, which needs a {kind}")
    except Exception as error:  # hub, network, file format: many types, one consequence
        if not (pretrained or weights):
            raise
        reason = f"{type(error).__name__} {error}".splitlines()[0][:120]
        raise DataError(f"no weights for {name} from {weights or 'the hub'} ({reason}): pass "
                        "--weights FILE with a local copy, or --no-pretrained for random ones")


# --- small networks, registered with timm: the toy preset's, and two to pretrain ----------------
NO_WEIGHTS = dict(url="", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
default_cfgs = generate_default_cfgs({  # where timm looks for them
    **{name: NO_WEIGHTS | dict(classifier="head", fixed_input_size=True)
       for name in ("vit_toy", "vit_toy_linear", "vit_small_photo")},
    **{name: NO_WEIGHTS | dict(classifier="fc") for name in ("resnet_toy", "resnet_small_photo")}})


def _vit(name, pretrained, **kwargs):
    return build_model_with_cfg(VisionTransformer, name, pretrained,
                                pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def vit_toy_linear(pretrained=False, **kwargs):
    """timm's ViT at 96x96: patch 8, width 128, depth 4."""
    size = dict(img_size=96, patch_size=8, embed_dim=128, depth=4, num_heads=2, mlp_ratio=2)
    return _vit("vit_toy_linear", pretrained, **size | kwargs)


@register_model
def vit_toy(pretrained=False, **kwargs):
    """vit_toy_linear with 3x3 convolutions of stride 2 instead of its linear projection.

    They learn textures faster (Xiao et al. 2021).
    """
    stem = ConvStem(depth=4, channels=(32, 64, 128, 128), stride=(2, 2, 2, 1),
                    kernel_size=(3, 3, 3, 1))
    embed = dict(patch_size=1, embed_layer=partial(HybridEmbed, backbone=stem, proj=False))
    return vit_toy_linear(pretrained, **embed | kwargs)


@register_model
def vit_small_photo(pretrained=False, **kwargs):
    """A hybrid at 64x64: a ResNet of two stages makes patches of 8, then a ViT of four blocks.

    Width 192, mean of the patches, no class token.
    """
    resnet = timm.create_model("resnet18d", features_only=True, out_indices=[2], stem_width=16,
                               channels=(64, 192, 1, 1))
    size = dict(img_size=64, patch_size=1, embed_dim=192, depth=4, num_heads=3, mlp_ratio=3,
                embed_layer=partial(HybridEmbed, backbone=resnet, proj=False),
                class_token=False, global_pool="avg")
    return _vit("vit_small_photo", pretrained, **size | kwargs)


@register_model
def resnet_toy(pretrained=False, **kwargs):
    """timm's ResNet with one basic block a stage and few channels."""
    size = dict(block=BasicBlock, layers=(1, 1, 1, 1), channels=(32, 64, 64, 96),
                stem_type="deep", stem_width=16, zero_init_last=False)
    return build_model_with_cfg(ResNet, "resnet_toy", pretrained, **size | kwargs)


@register_model
def resnet_small_photo(pretrained=False, **kwargs):
    """timm's ResNet-18 with half the channels and a deep stem."""
    size = dict(block=BasicBlock, layers=(2, 2, 2, 2), channels=(32, 64, 128, 256),
                stem_type="deep", stem_width=32)
    return build_model_with_cfg(ResNet, "resnet_small_photo", pretrained, **size | kwargs)
