"""Naming the weights of the published file. `tests/parity/test_u2netp.py` shows that the names are the right ones."""

import pytest
import torch
from torch import nn

from models.background.conversion import named_weights
from models.background.u2net import U2NetP
from models.errors import WeightsError


def test_convolutions_are_named_in_the_order_in_which_they_run() -> None:
    network, ran = U2NetP(), list[nn.Conv2d]()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    with torch.inference_mode():
        network(torch.zeros(1, 3, 64, 64))
    weights = named_weights([(module.weight, module.bias) for module in ran if module.bias is not None])
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    assert len(weights) == len(network.state_dict())


def test_convolutions_of_another_network_are_refused() -> None:
    with pytest.raises(WeightsError, match="not the weights of U²-Net-p"):
        named_weights([(torch.zeros(8, 3, 3, 3), torch.zeros(8))])
