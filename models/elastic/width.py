"""Narrow MLPs: blocks whose feed-forward uses a prefix of its hidden neurons and shares the original's memory."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn


def narrowed(block: nn.Module, keep_rows: Mapping[str, int], keep_columns: Mapping[str, int]) -> nn.Module:
    """A twin of `block` in which some linear layers are cut. The arguments map names of layers to numbers of features.

    Layers in `keep_rows` keep their first outputs, layers in `keep_columns` their first inputs. Every weight of the
    twin is the original's tensor or a view of it. Nothing is copied, and a change of the original shows in the twin.
    Modules that hold none of these layers are the original's own.
    """
    copies = {"": _shallow_copy(block)}
    for name, count in keep_rows.items():
        linear = _linear(copies, name)
        linear.weight = _view(linear.weight[:count])
        linear.out_features = count
        if linear.bias is not None:
            linear.bias = _view(linear.bias[:count])
    for name, count in keep_columns.items():
        linear = _linear(copies, name)
        linear.weight = _view(linear.weight[:, :count])
        linear.in_features = count
    return copies[""]


def _linear(copies: dict[str, nn.Module], name: str) -> nn.Linear:
    module = _copied(copies, name)
    assert isinstance(module, nn.Linear)
    return module


def _copied(copies: dict[str, nn.Module], name: str) -> nn.Module:
    """The twin's own module of this name. Modules on the way to it become copies too; `copies` has those made."""
    if name not in copies:
        parent, _, child = name.rpartition(".")
        children = _copied(copies, parent)._modules
        copies[name] = children[child] = _shallow_copy(children[child])
    return copies[name]


def _shallow_copy(module: nn.Module | None) -> nn.Module:
    """A copy with the module's own parameters and children, but its own tables of them and of hooks."""
    assert module is not None
    twin = copy.copy(module)
    twin.__dict__.update({name: table.copy() for name, table in vars(module).items() if isinstance(table, dict)})
    return twin


def _view(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
