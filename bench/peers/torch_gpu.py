"""The three networks in PyTorch, to be timed beside ours: same sizes, same dropout, same SGD."""

from collections.abc import Callable
from typing import Any


def make_step(arch: str, batch: int, channels_last: bool, how: str) -> Callable[[], object]:
    """A training step on the GPU; how: "eager", "graph" (one CUDA graph) or "compiled" (torch.compile)."""
    import torch as pytorch

    torch: Any = pytorch
    nn = torch.nn

    def convolutions() -> Any:
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(),
        )  # fmt: skip

    class Network(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            if arch != "lstm":
                self.images = convolutions()
            if arch == "cnn":
                self.dense = nn.Sequential(nn.Linear(32768, 1024), nn.ReLU(), nn.Dropout(0.25))
            elif arch == "lstm":
                self.recurrent = nn.LSTM(128, 128, num_layers=3, batch_first=True)
            else:
                self.recurrent = nn.LSTM(32768, 1024, num_layers=2, batch_first=True)
            self.out = nn.Linear(128 if arch == "lstm" else 1024, 7)

        def forward(self, x: Any) -> Any:
            if arch == "lstm":
                return self.out(self.recurrent(x)[0][:, -1])
            if arch == "cnn":
                return self.out(self.dense(self.images(self.as_images(x[:, None]))))
            windows = torch.stack([x[:, 8 * i : 8 * i + 128] for i in range(4)], dim=1).flatten(0, 1)
            features = self.images(self.as_images(windows[:, None])).unflatten(0, (len(x), 4))
            return self.out(self.recurrent(features)[0][:, -1])

        def as_images(self, x: Any) -> Any:
            return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    torch.manual_seed(0)
    network: Any = Network().cuda()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.8, fused=True)
    x = torch.randn(batch, 152 if arch == "tdcnn" else 128, 128, device="cuda")
    y = torch.randint(0, 7, (batch,), device="cuda")
    called = torch.compile(network) if how == "compiled" else network

    def step() -> Any:
        optimiser.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(called(x), y)
        loss.backward()
        optimiser.step()
        return loss

    if how != "graph":
        return step
    aside = torch.cuda.Stream()  # warm-up and capture away from the default stream, as PyTorch's manual asks
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    optimiser.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
