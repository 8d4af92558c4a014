"""The three networks in PyTorch's own layers, as `npser.models` defines them.

PyTorch's images are (channels, time, frequency), its weights stand the other way round, and its LSTMs have a second
bias, which is held at zero here. Its gates have our order: input, forget, cell, output.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from npser.models import WINDOW_HOP, WINDOWS


def lstm(inputs: int, hidden: int, layers: int = 1) -> Any:
    """Layers on top of each other are one module, which cuDNN takes as a whole."""
    stack = nn.LSTM(inputs, hidden, num_layers=layers, batch_first=True)
    for n in range(layers):
        nn.init.zeros_(getattr(stack, f"bias_hh_l{n}")).requires_grad_(False)
    return stack


class Twin(nn.Module):
    """One of the networks; the same options as `npser.models.build_model`."""

    def __init__(
        self,
        arch: str,
        filters: int = 32,
        hidden: int | None = None,
        bins: int = 128,
        classes: int = 7,
        dropout: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        """channels_last: in memory, as the module will be moved to, so that the flat order of features is ours."""
        super().__init__()
        self.arch, self.bins, self.rate, self.channels_last = arch, bins, dropout, channels_last
        self.image = bins // 4, bins // 4, filters
        features = math.prod(self.image)
        H = hidden or (128 if arch == "lstm" else 1024)
        if arch != "lstm":
            self.conv1 = nn.Conv2d(1, filters, 3, padding=1)
            self.conv2 = nn.Conv2d(filters, filters, 3, padding=1)
        if arch == "cnn":
            self.dense1 = nn.Linear(features, H)
        else:
            self.recurrent = lstm(bins, H, 3) if arch == "lstm" else lstm(features, H, 2)
        self.out = nn.Linear(H, classes)

    def dropout(self, x: Any) -> Any:
        return nn.functional.dropout(x, self.rate, self.training)

    def images(self, x: Any) -> Any:
        """(N, bins, bins) -> (N, features) in the order in which they lie in memory."""
        x = x[:, None]
        for conv in (self.conv1, self.conv2):
            x = self.dropout(nn.functional.max_pool2d(conv(x).relu(), 2))
        return (x.permute(0, 2, 3, 1) if self.channels_last else x).flatten(1)

    def forward(self, x: Any) -> Any:
        if self.arch == "cnn":
            return self.out(self.dropout(self.dense1(self.images(x)).relu()))
        if self.arch == "tdcnn":
            windows = torch.stack([x[:, WINDOW_HOP * i :][:, : self.bins] for i in range(WINDOWS)], dim=1)
            x = self.images(windows.flatten(0, 1)).unflatten(0, (len(x), WINDOWS))
        return self.out(self.recurrent(x)[0][:, -1])

    def pairs(self) -> dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]]:
        """Our name -> (PyTorch's parameter, the order of our axes in it, what our first axis consists of)."""
        found: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {}
        for name, layer in self.named_children():
            if isinstance(layer, nn.LSTM):
                for n in range(layer.num_layers):
                    found[f"lstm{n + 1}.wx"] = getattr(layer, f"weight_ih_l{n}"), (1, 0), ()
                    found[f"lstm{n + 1}.wh"] = getattr(layer, f"weight_hh_l{n}"), (1, 0), ()
                    found[f"lstm{n + 1}.b"] = getattr(layer, f"bias_ih_l{n}"), (0,), ()
            else:
                found[f"{name}.w"] = layer.weight, (3, 2, 0, 1) if isinstance(layer, nn.Conv2d) else (1, 0), ()
                found[f"{name}.b"] = layer.bias, (0,), ()
        behind = {"cnn": "dense1.w", "tdcnn": "lstm1.wx"}.get(self.arch)  # the convolutions
        if behind and not self.channels_last:
            found[behind] = found[behind][0], (3, 2, 0, 1), self.image  # (T, F, C, J) -> (J, C, T, F)
        return found

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Take over the parameters of one of our models."""
        with torch.no_grad():
            for name, (parameter, axes, first) in self.pairs().items():
                value = torch.from_numpy(params[name])
                value = value.unflatten(0, first) if first else value
                parameter.copy_(value.permute(axes).reshape(parameter.shape))


def in_our_order(tensor: Any, axes: tuple[int, ...], first: tuple[int, ...]) -> Any:
    """A parameter, or its gradient, with the axes that ours has: a NumPy array. axes, first: see `Twin.pairs`."""
    inverse = [axes.index(i) for i in range(len(axes))]
    if not first:
        return tensor.detach().permute(inverse).cpu().numpy()
    T, F, C = first
    return tensor.detach().unflatten(1, (C, T, F)).permute(inverse).flatten(0, 2).cpu().numpy()
