"""The three networks at the paper's sizes against PyTorch, with the same weights: an independent truth."""

import gc

import numpy as np
import pytest

from kernels import cpu, reference  # noqa: F401 - cpu before PyTorch, whose OpenMP would else not wait passively
from npser.models import build_model, parameter_count
from npser.optim import SGD
from npser.recipes import ARCHITECTURES

torch = pytest.importorskip("torch")
from bench.peers.torch_models import Twin, in_our_order  # noqa: E402 - needs PyTorch

LR, MOMENTUM, STEPS = 0.01, 0.8, 10
TOLERANCE = 1e-4
BATCH = {"cnn": 8, "lstm": 8, "tdcnn": 4}  # tdcnn is large: its weights alone are 0.6 GB


@pytest.fixture(autouse=True)
def _two_threads_and_no_leftovers():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    gc.collect()


def assert_close(got, expected, what, tolerance=TOLERANCE):
    largest = np.abs(expected).max()
    assert largest > 0, what
    assert got.shape == expected.shape, what
    error = np.abs(got - expected).max() / largest
    assert error <= tolerance, f"{what}: relative error {error:.2g}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_gradients_and_ten_steps(arch):
    model, twin = build_model(arch, backend="cpu", seed=3, dropout=0.0), Twin(arch)
    pairs = twin.pairs()
    assert pairs.keys() == model.params.keys()
    assert sum(parameter.numel() for parameter, *_ in pairs.values()) == parameter_count(arch)
    twin.set_params(model.params)

    rng = np.random.default_rng(4)
    x = rng.standard_normal((BATCH[arch], model.input_frames, 128), np.float32)
    y = rng.integers(0, 7, BATCH[arch])
    torch_x, torch_y = torch.from_numpy(x), torch.from_numpy(y)

    logits = twin(torch_x)
    assert_close(model._logits(x, None), logits.detach().numpy(), "logits")
    p = torch.softmax(logits, dim=1).detach().numpy()
    assert_close(model.predict_proba(x), p, "probabilities")

    loss, gradients = model.loss_and_grads(x, y)
    torch_loss = torch.nn.functional.cross_entropy(logits, torch_y)
    torch_loss.backward()
    assert loss == pytest.approx(torch_loss.item(), rel=TOLERANCE)
    for name, (parameter, *order) in pairs.items():
        assert_close(gradients[name], in_our_order(parameter.grad, *order), f"gradient of {name}")
    del gradients, logits, torch_loss

    # torch: buf = m buf + g, w -= lr buf; ours: v = m v - lr g, w += v. At a constant lr, v is -lr buf.
    sgd = SGD(LR, MOMENTUM, decay=0.0)
    torch_sgd = torch.optim.SGD([parameter for parameter, *_ in pairs.values()], lr=LR, momentum=MOMENTUM)
    losses, torch_losses = [], []
    for _ in range(STEPS):
        losses.append(model.train_step(x, y, sgd))
        torch_sgd.zero_grad()
        torch_loss = torch.nn.functional.cross_entropy(twin(torch_x), torch_y)
        torch_loss.backward()
        torch_sgd.step()
        torch_losses.append(torch_loss.item())
    assert abs(losses[-1] / losses[0] - 1) > 0.01, "nothing was learned, so the steps were not compared"
    np.testing.assert_allclose(losses, torch_losses, rtol=TOLERANCE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing(smoothing):
    rng = np.random.default_rng(5)
    logits, y = 3 * rng.standard_normal((9, 7)), rng.integers(0, 7, 9)
    theirs = torch.from_numpy(logits).requires_grad_()
    torch_loss = torch.nn.functional.cross_entropy(theirs, torch.from_numpy(y), label_smoothing=smoothing)
    torch_loss.backward()
    loss, p = reference.cross_entropy_forward(logits, y, smoothing)
    assert loss == pytest.approx(torch_loss.item(), rel=1e-12)
    np.testing.assert_allclose(reference.cross_entropy_backward(p, y, smoothing), theirs.grad.numpy(), atol=1e-14)
