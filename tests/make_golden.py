"""Writes tests/golden: small nets of PyTorch, an image, and what they make of it.

    python -m tests.make_golden

Needs PyTorch. Each file has the state dict below ``weights.``, in float32, and the
image ``[B, C, H, W]`` and the outputs, of which there are several with deep
supervision. Nets and weights are made by tests/torch_nets.py and are CC0.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from tests import torch_nets as nets

FOLDER = Path(__file__).parent / "golden"
WIDTHS = (4, 6, 8)
NETS = {
    "transposed": (lambda: nets.Net(3, 2, WIDTHS), (2, 3, 13, 18)),
    "bilinear": (lambda: nets.Net(3, 2, WIDTHS, bilinear=True), (2, 3, 13, 18)),
    "bare_head": (lambda: nets.Net(1, 1, WIDTHS, bias=True, bare=True), (1, 1, 16, 12)),
    "nested": (lambda: nets.Nested(3, 2, WIDTHS), (2, 3, 16, 12)),
    "attention": (lambda: nets.Attention(1, 2, WIDTHS), (1, 1, 16, 12)),
    "tutorial_nested": (lambda: nets.TutorialNested(1, 2, WIDTHS), (1, 1, 16, 12)),
    "valid": (lambda: nets.Blog(1, 2, 2), (1, 1, 188, 188)),
}


def _arrays(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, np.ndarray]:
    return {
        f"{prefix}{key}": value.detach().float().numpy()
        for key, value in tensors.items()
        if not key.endswith("num_batches_tracked")
    }


def write_net(name: str) -> None:
    """A net, an image and its outputs, computed in float64."""
    make, shape = NETS[name]
    net = nets.filled(make())
    for tensor in (*net.parameters(), *net.buffers()):  # as float32 can hold them
        if tensor.is_floating_point():
            tensor.data = tensor.data.float().double()
    generator = np.random.default_rng(0)
    image = generator.standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        outputs = net(torch.from_numpy(image).double())
    outputs = outputs if isinstance(outputs, list) else [outputs]
    found = {f"output{i}": x.float().numpy() for i, x in enumerate(outputs)}
    found |= {"image": image, **_arrays(net.state_dict(), "weights.")}
    save_file(found, FOLDER / f"{name}.safetensors")


def write_training() -> None:
    """Two steps of SGD with momentum on the cross entropy, computed in float64."""
    net = nets.filled(nets.Net(3, 2, (4, 6))).train()
    generator = np.random.default_rng(1)
    found = _arrays(net.state_dict(), "weights.")
    net.load_state_dict(
        {k: torch.from_numpy(v) for k, v in found_weights(found)}, False
    )
    sgd = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(2):
        image = generator.standard_normal((2, 3, 12, 10)).astype(np.float32)
        label = generator.integers(0, 2, (2, 12, 10))
        sgd.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            net(torch.from_numpy(image).double()), torch.from_numpy(label)
        )
        loss.backward()
        sgd.step()
        found |= {
            f"image{step}": image,
            f"label{step}": label.astype(np.int32),
            f"loss{step}": loss.detach().float().numpy(),
            **_arrays(net.state_dict(), f"after{step}."),
        }
    save_file(found, FOLDER / "training.safetensors")


def found_weights(found: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The state dict again, out of a file's tensors."""
    start = "weights."
    return [(k.removeprefix(start), v) for k, v in found.items() if k.startswith(start)]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in NETS:
        write_net(name)
    write_training()
