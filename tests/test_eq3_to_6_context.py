"""Eq. (3) to (6), CF-BiLSTM: context fusion against an LSTM's textbook equations."""
import math

import numpy as np
import pytest
import torch

from model import CONTEXTS, CPFCTE, ClassifierConfig, scan

B, C, h, w, D = 2, 5, 3, 4, 8


def eq3_to_6(test):
    """Mark a test for make check EQ=3, 4, 5 and 6."""
    for number in range(3, 7):
        test = getattr(pytest.mark, f"eq{number}")(test)
    return test


def lstm_by_hand(lstm, line, suffix):
    """(steps, D) -> (steps, H): the LSTM's textbook equations, one step at a time."""
    W, U, b, c = (getattr(lstm, f"{name}_l0{suffix}").detach().numpy()
                  for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hidden = cell = np.zeros(U.shape[1])
    outputs = []
    for x in line if not suffix else line[::-1]:
        i, f, g, o = np.split(W @ x + b + U @ hidden + c, 4)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        cell = f * cell + i * np.tanh(g)
        hidden = o * np.tanh(cell)
        outputs.append(hidden)
    return np.array(outputs if not suffix else outputs[::-1])


def both_ways(lstm, line):
    return np.concatenate([lstm_by_hand(lstm, line, ""), lstm_by_hand(lstm, line, "_reverse")], 1)


def fusion(context):
    torch.manual_seed(0)
    return CONTEXTS[context](D, dropout=0.2).eval()


def assert_eq6(fuse, tokens, hidden, *more):
    """The module's output is W_o h + b_o of the hidden states (B, h, w, D) found by hand."""
    W_o, b_o = fuse.proj.weight.detach().numpy(), fuse.proj.bias.detach().numpy()
    result = fuse(tokens, *more).detach().numpy()
    np.testing.assert_allclose(result, hidden @ W_o.T + b_o, atol=1e-5)


@eq3_to_6
def test_hv_is_one_bilstm_per_row_and_one_per_column():
    fuse, tokens = fusion("hv"), torch.randn(B, h, w, D)
    hidden = np.zeros((B, h, w, D))
    for b in range(B):
        for row in range(h):
            hidden[b, row, :, :D // 2] = both_ways(fuse.lstms[0], tokens[b, row].numpy())
        for column in range(w):
            hidden[b, :, column, D // 2:] = both_ways(fuse.lstms[1], tokens[b, :, column].numpy())
    assert_eq6(fuse, tokens, hidden)


@eq3_to_6
def test_raster_is_one_bilstm_over_the_row_major_sequence():
    fuse, tokens = fusion("raster"), torch.randn(B, h, w, D)
    hidden = [both_ways(fuse.lstms[0], image.reshape(h * w, D).numpy()) for image in tokens]
    assert_eq6(fuse, tokens, np.reshape(hidden, (B, h, w, D)))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_conv_is_a_depthwise_7x7_with_zeros_around():
    fuse, tokens = fusion("conv"), torch.randn(B, h, w, D)
    kernel, bias = fuse.mix.weight.detach().numpy()[:, 0], fuse.mix.bias.detach().numpy()
    around = np.pad(tokens.numpy(), ((0, 0), (3, 3), (3, 3), (0, 0)))
    hidden = np.array([[[[(kernel[d] * around[b, y:y + 7, x:x + 7, d]).sum() + bias[d]
                          for d in range(D)] for x in range(w)] for y in range(h)]
                       for b in range(B)])
    assert_eq6(fuse, tokens, gelu(hidden))


def test_pool_gives_a_patch_the_means_of_its_row_and_of_its_column():
    fuse, tokens = fusion("pool"), torch.randn(B, h, w, D)
    A, a = fuse.mix.weight.detach().numpy(), fuse.mix.bias.detach().numpy()
    P, hidden = tokens.numpy(), np.zeros((B, h, w, D))
    for b, y, x in np.ndindex(B, h, w):
        joined = np.concatenate([P[b, y, x], P[b, :, x].mean(0), P[b, y].mean(0)])
        hidden[b, y, x] = gelu(A @ joined + a)
    assert_eq6(fuse, tokens, hidden)


@eq3_to_6
def test_appended_tokens_lead_every_line_and_are_dropped():
    fuse, tokens, class_tokens = fusion("hv"), torch.randn(1, h, w, D), torch.randn(C, D)
    hidden = np.zeros((1, h, w, D))
    for row in range(h):
        line = torch.cat([class_tokens, tokens[0, row]]).numpy()
        hidden[0, row, :, :D // 2] = both_ways(fuse.lstms[0], line)[C:]
    for column in range(w):
        line = torch.cat([class_tokens, tokens[0, :, column]]).numpy()
        hidden[0, :, column, D // 2:] = both_ways(fuse.lstms[1], line)[C:]
    assert_eq6(fuse, tokens, hidden, class_tokens)


@eq3_to_6
def test_the_lstms_run_in_float32_under_autocast():
    fuse, tokens = fusion("hv"), torch.randn(1, h, w, D)
    exact = scan(fuse.lstms[0], tokens)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = scan(fuse.lstms[0], tokens)
        assert fuse(tokens).dtype == torch.bfloat16  # Eq. (6) is under autocast
    assert torch.equal(hidden, exact)


def test_the_head_starts_as_keras_does():
    model = CPFCTE(ClassifierConfig(C, "vit_toy"))
    H = model.context.lstms[0].hidden_size
    for name, parameter in model.context.lstms.named_parameters():
        if "weight_hh" in name:  # (4H, H), orthonormal columns
            torch.testing.assert_close(parameter.T @ parameter, torch.eye(H), atol=1e-5, rtol=0)
        elif "weight_ih" in name:  # Glorot's bound
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
        else:  # the forget gate starts open, all else at zero
            expected = torch.zeros(4 * H)
            expected[H:2 * H] = "bias_ih" in name
            assert torch.equal(parameter, expected)
    assert not model.context.proj.bias.any()
