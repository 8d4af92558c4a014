"""What all operations of `kernels.cpu` promise, whatever they compute."""

import inspect
import re

import numba as nb
import numpy as np
import pytest
from operands import IN_PLACE, KEYS, SHARED, SPENT, Numbers, call, calls, calls_from_lists

import kernels
from kernels import cpu
from kernels.cpu import conv_gradients, lstm, lstm_gradients, sparse, winograd

HELPERS = {"reference": {"dropout_threshold", "hann"}, "cpu": {"cache_is_cold"}}  # public, but not operations
threads_available = nb.config.NUMBA_NUM_THREADS


def operations(name):
    """The public functions of a rung that are operations."""
    module = kernels.rung(name)
    public = vars(module).items() if name == "reference" else ((n, getattr(module, n)) for n in module.__all__)
    return {n: f for n, f in public if inspect.isfunction(f) and not n.startswith("_") and n not in HELPERS[name]}


def test_rungs_offer_the_same_operations():
    assert operations("cpu").keys() == operations("reference").keys()
    for name, function in operations("cpu").items():
        parameters = [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]
        twin = inspect.signature(operations("reference")[name])
        assert parameters == [(p.name, p.default, p.kind) for p in twin.parameters.values()], name


def test_the_table_lists_every_operation():
    listed = set(re.findall(r"(\w+)\(", "\n".join(re.findall(r"^\|.*\|$", kernels.__doc__, re.MULTILINE))))
    assert listed | {"dropout_key"} == operations("reference").keys()


def test_unknown_rung():
    with pytest.raises(ValueError, match=r"'abacus'.*reference, cpu"):
        kernels.rung("abacus")


def test_calls_are_complete():
    assert calls().keys() | SHARED == operations("cpu").keys()


@pytest.mark.parametrize("name", calls())
def test_float64_is_refused_by_name(name):
    operands, others = calls()[name]
    for wrong in operands:
        with pytest.raises(TypeError, match=rf"\b{wrong} is float64"):
            call(name, {**operands, wrong: operands[wrong].astype(np.float64)}, others)


@pytest.mark.parametrize("name", calls())
def test_operands_stay_as_they_are(name):
    operands, others = calls()[name]
    before = {operand: value.copy() for operand, value in operands.items()}
    call(name, operands, others)
    for operand in operands.keys() - set(SPENT.get(name, ())):
        value = operands[operand]
        assert np.array_equal(value, before[operand]) == (operand not in IN_PLACE.get(name, ())), operand


WIDE = {"C": 32, "O": 32, "B": 18, "H": lstm.WIDE}  # the networks' own channels, and tdcnn's kind of LSTM


def test_wide_operands_go_by_the_algorithms_of_their_own(monkeypatch):
    """What the tests below say of WIDE, they say of these."""
    seen = []
    for module, name in (
        (winograd, "conv_relu_pool_forward"),
        (winograd, "conv3x3_forward"),
        (lstm, "_forward_by_steps"),
        (lstm_gradients, "_backward_by_steps"),
        (conv_gradients, "_dw_many_channels"),
    ):
        used = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, used=used, name=name: (seen.append(name), used(*a))[1])
    made = calls(**WIDE)
    wide = ("conv_relu_pool_forward", "conv3x3_forward", "lstm_forward", "lstm_backward", "conv_relu_pool_backward")
    for operation in wide:
        call(operation, *made[operation])
    assert seen == [*wide[:2], "_forward_by_steps", "_backward_by_steps", "_dw_many_channels"]


@pytest.mark.parametrize("name", calls())
def test_threads_change_no_bit(name):
    if threads_available < 2:
        pytest.skip("Numba has one thread on this machine")
    results = {}
    try:
        for threads in (1, 2, threads_available):
            nb.set_num_threads(threads)
            results[threads] = [
                result
                for sizes in ({}, {"C": 3, "O": 33, "B": 18}, WIDE)
                for result in call(name, *calls(**sizes)[name])
            ]
            if name.startswith("dense"):
                for product, (operands, others) in calls_from_lists().items():
                    results[threads] += call(product, operands, others, sparse)
    finally:
        nb.set_num_threads(threads_available)
    for threads, arrays in results.items():
        for ours, alone in zip(arrays, results[1], strict=True):
            np.testing.assert_array_equal(ours, alone, err_msg=f"{threads} threads")


@pytest.mark.parametrize("B", [1, 2, 3, 5, 8, 9])
def test_a_row_does_not_depend_on_its_neighbours(B):
    """Bit for bit: a prediction must not depend on the batch it was computed in."""
    make = Numbers(B)
    for channels in (20, 32):
        x, w, b = make(9, 6, 14, channels), make(3, 3, channels, 7), make(7)
        alone, together = cpu.conv_relu_pool_forward(x[:B], w, b), cpu.conv_relu_pool_forward(x, w, b)
        for ours, all_ in zip(alone, together, strict=True):
            np.testing.assert_array_equal(ours, all_[:B])
    z, wh = make(9, 3, 4 * lstm.WIDE), make(lstm.WIDE, 4 * lstm.WIDE) / np.float32(lstm.WIDE**0.5)
    for ours, all_ in zip(cpu.lstm_forward(z[:B].copy(), wh), cpu.lstm_forward(z.copy(), wh), strict=True):
        np.testing.assert_array_equal(ours, all_[:B])
    x, w, b = make(9, 300), make(300, 40), make(40)
    np.testing.assert_array_equal(cpu.dense_forward(x[:B], w, b), cpu.dense_forward(x, w, b)[:B])
    z, wh = make(9, 7, 160), make(40, 160)
    for ours, all_ in zip(cpu.lstm_forward(z[:B].copy(), wh), cpu.lstm_forward(z, wh), strict=True):
        np.testing.assert_array_equal(ours, all_[:B])
    x, layer = make(9, 21, 30), (make(30, 160), wh, make(160))
    np.testing.assert_array_equal(cpu.lstm_inference(x[:B], *layer), cpu.lstm_inference(x, *layer)[:B])


def test_no_samples_at_all():
    make = Numbers()
    w, wh = make(3, 3, 2, 5), make(8, 32)
    y, argmax = cpu.conv_relu_pool_forward(make(0, 6, 8, 2), w, make(5))
    assert y.shape == argmax.shape == (0, 3, 4, 5)
    dx, dw, db = cpu.conv_relu_pool_backward(y, argmax, make(0, 6, 8, 2), w)
    assert dx.shape == (0, 6, 8, 2)
    assert not dw.any()
    assert not db.any()
    assert cpu.dense_forward(make(0, 3), make(3, 4), make(4)).shape == (0, 4)
    assert not cpu.dense_backward_weights(make(0, 3), make(0, 4)).any()
    h, c, gates = cpu.lstm_forward(make(0, 5, 32), wh)
    assert h.shape == (0, 5, 8)
    assert cpu.lstm_backward(h, gates, c, wh).shape == (0, 5, 32)
    assert cpu.lstm_inference(make(0, 5, 3), make(3, 32), wh, make(32)).shape == (0, 5, 8)
    assert cpu.dropout(make(0, 3), 0.5, KEYS[0]).shape == (0, 3)
