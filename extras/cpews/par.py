"""PAR, pixel-adaptive refinement (E13 of docs/CPEWS.md): class maps move to the image's edges.

Every pixel takes, ten times, a weighted mean of 8 neighbours at each of several distances. Weights
say how alike the two colours are, in units of the neighbourhood's own spread, and a little how near
the neighbour is. From AFA (Ru et al., CVPR 2022). model.py calls refine.
"""
import torch
import torch.nn.functional as F

DIRECTIONS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
SHARPNESS, PLACE_WEIGHT, EPSILON = 0.3, 0.01, 1e-8


def shifted(maps, dilations):
    """Views of maps (B, c, H, W) at the J = 8 len(dilations) neighbours, border repeated."""
    H, W = maps.shape[-2:]
    margin = max(dilations)
    padded = F.pad(maps, [margin] * 4, mode="replicate")
    for dilation in dilations:
        for y, x in DIRECTIONS:
            top, left = margin + dilation * y, margin + dilation * x
            yield padded[..., top:top + H, left:left + W]


def weights(images, dilations):
    """w (B, J, H, W) of E13, which sum to 1.01 at every pixel; images (B, 3, H, W), any range."""
    J = len(DIRECTIONS) * len(dilations)
    mean = sum(shifted(images, dilations)) / J
    std = (sum((near - mean) ** 2 for near in shifted(images, dilations)) / (J - 1)).sqrt()
    spread = SHARPNESS * (std + EPSILON)
    colour = torch.stack([-(((near - images) / spread) ** 2).mean(dim=1)
                          for near in shifted(images, dilations)], dim=1)
    distance = torch.tensor([dilation * (y * y + x * x) ** 0.5 for dilation in dilations
                             for y, x in DIRECTIONS], device=images.device)
    place = -(distance / (SHARPNESS * (distance.std() + EPSILON))) ** 2
    return colour.softmax(dim=1) + PLACE_WEIGHT * place.softmax(dim=0)[:, None, None]


@torch.no_grad()
def refine(images, maps, dilations, iterations=10):
    """E13: maps (B, c, H, W) refined by images (B, 3, H, W); every sum grows by 1.01^iterations."""
    affinity = weights(images, dilations).unsqueeze(2).unbind(dim=1)  # J times (B, 1, H, W)
    for _ in range(iterations):
        refined = torch.zeros_like(maps)
        for weight, near in zip(affinity, shifted(maps, dilations)):
            refined.addcmul_(weight, near)  # a stack of J shifted maps would need J times as much
        maps = refined
    return maps
