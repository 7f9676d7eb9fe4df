"""Makes the folder of a remover from the ONNX file of U²-Net-p: `python -m models.background.conversion`.

Needs the package `onnx`, which nothing else here does. The published file has batch norms folded into the convolutions,
and most of its tensors have numbers for names. Both files name the convolutions in the order in which they run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.background.remover import MANIFEST, WEIGHTS
from models.background.u2net import U2NetP
from models.errors import WeightsError
from models.weights import sha256

_SOURCE = "https://github.com/xuebinqin/U-2-Net (u2netp.pth), exported to ONNX for rembg and shipped in the package {}"


def convert(source: Path, out: Path, package: str) -> None:
    """Write `model.safetensors` and `manifest.json` into the new folder `out`. `package` is where the file came from.

    Raises WeightsError if the file is not U²-Net-p.
    """
    import onnx  # not a dependency
    from onnx import numpy_helper

    graph = onnx.load(source).graph
    tensors = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    convolutions = [[tensors[name] for name in node.input[1:]] for node in graph.node if node.op_type == "Conv"]
    weights = named_weights(convolutions)
    out.mkdir(parents=True)
    save_file(weights, out / WEIGHTS)
    content = {
        "source": _SOURCE.format(package),
        "license": "Apache-2.0",
        "paper": "https://arxiv.org/abs/2005.09007",
        "command": f'python -m models.background.conversion --onnx {source.name} --package "{package}"',
        "sha256": {source.name: sha256(source), WEIGHTS: sha256(out / WEIGHTS)},
    }
    (out / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def named_weights(convolutions: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """The state dict of U2NetP from the weight and the bias of each convolution, in the order in which they run.

    Raises WeightsError if they do not fit.
    """
    network = U2NetP()
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    try:
        weights = {
            f"{name}.{kind}": tensor
            for name, pair in zip(names, convolutions, strict=True)
            for kind, tensor in zip(("weight", "bias"), pair, strict=True)
        }
        network.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise WeightsError(f"these are not the weights of U²-Net-p: {error}") from error
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--onnx", type=Path, required=True, help="u2netp.onnx")
    parser.add_argument("--package", required=True, help="the package that the file came in, with its version")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/u2netp"))
    arguments = parser.parse_args()
    convert(arguments.onnx, arguments.out, arguments.package)


if __name__ == "__main__":
    main()
