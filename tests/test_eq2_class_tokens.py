"""Eq. (2), p'_i = [p_i ; t(i)]: class token enhancement against loops."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from conftest import classifier

B, C, h, w = 2, 5, 3, 4
pytestmark = pytest.mark.eq2


def test_soft_tokens_by_loops():
    model = classifier(class_tokens="soft")
    width = model.class_tokens.shape[1]
    nn.init.normal_(model.enhance_proj.weight)
    P = torch.randn(B, h, w, width)
    T, W, b = (x.detach().numpy() for x in (model.class_tokens, model.enhance_proj.weight,
                                            model.enhance_proj.bias))
    with torch.no_grad():
        result = model.enhance(P).numpy()
    for index in np.ndindex(B, h, w):
        p = P[index].numpy()
        score = np.array([np.exp(p @ t / math.sqrt(width)) for t in T])
        t_i = sum(a * t for a, t in zip(score / score.sum(), T))
        np.testing.assert_allclose(result[index], W @ np.concatenate([p, t_i]) + b, atol=1e-3)


def test_all_tokens_are_only_a_constant_bias():
    model = classifier(class_tokens="all")
    width = model.class_tokens.shape[1]
    nn.init.normal_(model.enhance_proj.weight, std=0.1)
    P = torch.randn(B, h, w, width)
    with torch.no_grad():
        added = model.enhance(P) - P @ model.enhance_proj.weight[:, :width].T
    assert added[0, 0, 0].abs().max() > 0.1
    torch.testing.assert_close(added, added[:1, :1, :1].expand_as(added), atol=1e-4, rtol=0)


@pytest.mark.parametrize("class_tokens", ["soft", "all"])
def test_training_starts_as_the_model_without_class_tokens(class_tokens):
    model = classifier(class_tokens=class_tokens)
    P = torch.randn(B, h, w, model.class_tokens.shape[1])
    torch.testing.assert_close(model.enhance(P), P)


def test_append_and_none_leave_the_patch_tokens_alone():
    P = torch.randn(B, h, w, 128)
    assert torch.equal(classifier(class_tokens="append").enhance(P), P)
    assert not hasattr(classifier(class_tokens="none"), "class_tokens")
