"""The three networks at the paper's sizes against PyTorch, with the same weights: an independent truth.

PyTorch's images are (channels, time, frequency), its weights stand the other way round, and its LSTMs have a second
bias, which is held at zero here. Its gates have our order: input, forget, cell, output.
"""

import gc

import numpy as np
import pytest

from kernels import cpu  # noqa: F401 - before PyTorch, whose OpenMP would else not know that waiting is passive
from npser.models import ARCHITECTURES, WINDOW_HOP, WINDOWS, build_model, parameter_count
from npser.optim import SGD

torch = pytest.importorskip("torch")
nn = torch.nn

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


def lstm(inputs, hidden):
    layer = nn.LSTM(inputs, hidden, batch_first=True)
    nn.init.zeros_(layer.bias_hh_l0).requires_grad_(False)
    return layer


class Twin(nn.Module):
    """The networks as the README describes them, in PyTorch's own layers; `pairs` matches the parameters by name."""

    def __init__(self, arch):
        super().__init__()
        self.arch = arch
        if arch != "lstm":
            self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        if arch == "cnn":
            self.dense1, self.out = nn.Linear(32768, 1024), nn.Linear(1024, 7)
        elif arch == "lstm":
            self.lstm1, self.lstm2, self.lstm3 = lstm(128, 128), lstm(128, 128), lstm(128, 128)
            self.out = nn.Linear(128, 7)
        else:
            self.lstm1, self.lstm2, self.out = lstm(32768, 1024), lstm(1024, 1024), nn.Linear(1024, 7)

    def images(self, x):
        """(N, 128, 128) -> (N, 32768) in the order time, frequency, channel."""
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(conv(x[:, None] if x.ndim == 3 else x).relu(), 2)
        return x.permute(0, 2, 3, 1).flatten(1)

    def forward(self, x):
        if self.arch == "cnn":
            return self.out(self.dense1(self.images(x)).relu())
        if self.arch == "tdcnn":
            windows = torch.stack([x[:, WINDOW_HOP * i :][:, :128] for i in range(WINDOWS)], dim=1)
            x = self.images(windows.flatten(0, 1)).unflatten(0, (len(x), WINDOWS))
        for layer in (getattr(self, f"lstm{i}", None) for i in (1, 2, 3)):
            x = layer(x)[0] if layer else x
        return self.out(x[:, -1])

    def pairs(self):
        """Our name -> (PyTorch's parameter, the order of our axes in it)."""
        found = {}
        for name, layer in self.named_children():
            if isinstance(layer, nn.LSTM):
                found[f"{name}.wx"] = layer.weight_ih_l0, (1, 0)
                found[f"{name}.wh"] = layer.weight_hh_l0, (1, 0)
                found[f"{name}.b"] = layer.bias_ih_l0, (0,)
            else:
                found[f"{name}.w"] = layer.weight, (3, 2, 0, 1) if isinstance(layer, nn.Conv2d) else (1, 0)
                found[f"{name}.b"] = layer.bias, (0,)
        return found


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
    assert sum(parameter.numel() for parameter, _ in pairs.values()) == parameter_count(arch)
    with torch.no_grad():
        for name, (parameter, axes) in pairs.items():
            parameter.copy_(torch.from_numpy(model.params[name]).permute(axes))

    rng = np.random.default_rng(4)
    x = rng.standard_normal((BATCH[arch], model.input_frames, 128), np.float32)
    y = rng.integers(0, 7, BATCH[arch])
    torch_x, torch_y = torch.from_numpy(x), torch.from_numpy(y)

    logits = twin(torch_x)
    assert_close(model._logits(x, None), logits.detach().numpy(), "logits")
    p = torch.softmax(logits, dim=1).detach().numpy()
    assert_close(model.predict_proba(x), p, "probabilities")

    loss, gradients = model.loss_and_grads(x, y)
    torch_loss = nn.functional.cross_entropy(logits, torch_y)
    torch_loss.backward()
    assert loss == pytest.approx(torch_loss.item(), rel=TOLERANCE)
    for name, (parameter, axes) in pairs.items():
        inverse = [axes.index(i) for i in range(len(axes))]
        assert_close(gradients[name], parameter.grad.permute(inverse).numpy(), f"gradient of {name}")
    del gradients, logits, torch_loss

    # torch: buf = m buf + g, w -= lr buf; ours: v = m v - lr g, w += v. At a constant lr, v is -lr buf.
    sgd = SGD(LR, MOMENTUM, decay=0.0)
    torch_sgd = torch.optim.SGD([parameter for parameter, _ in pairs.values()], lr=LR, momentum=MOMENTUM)
    losses, torch_losses = [], []
    for _ in range(STEPS):
        losses.append(model.train_step(x, y, sgd))
        torch_sgd.zero_grad()
        torch_loss = nn.functional.cross_entropy(twin(torch_x), torch_y)
        torch_loss.backward()
        torch_sgd.step()
        torch_losses.append(torch_loss.item())
    assert abs(losses[-1] / losses[0] - 1) > 0.01, "nothing was learned, so the steps were not compared"
    np.testing.assert_allclose(losses, torch_losses, rtol=TOLERANCE)
