"""Narrow MLPs: blocks whose feed-forward uses a prefix of its hidden neurons and shares the original's memory."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn


def narrowed(block: nn.Module, keep_rows: Mapping[str, int], keep_columns: Mapping[str, int]) -> nn.Module:
    """A twin of `block` in which some linear layers are cut. The arguments map names of layers to numbers of features.

    Layers in `keep_rows` keep their first outputs, layers in `keep_columns` their first inputs. Every weight of the
    twin is the original's tensor or a view of it. Nothing is copied, and a change of the original shows in the twin.
    """
    shared = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    twin = copy.deepcopy(block, shared)
    for name, count in keep_rows.items():
        linear = _linear(twin, name)
        linear.weight = _view(linear.weight[:count])
        linear.out_features = count
        if linear.bias is not None:
            linear.bias = _view(linear.bias[:count])
    for name, count in keep_columns.items():
        linear = _linear(twin, name)
        linear.weight = _view(linear.weight[:, :count])
        linear.in_features = count
    return twin


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _view(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
