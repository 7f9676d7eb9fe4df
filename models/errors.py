"""What can go wrong while generating.

GenerationError
├── InvalidRequest      the request cannot be served as it was asked
├── UnknownModel        no model of that name is loaded
├── EmptySurface        a decoded field has no surface to make a mesh of
├── DeviceError         there is no such device
├── WeightsError        a model directory or a router file is not what it should be
└── CompilerError       blocks were to be compiled, and this machine lacks what that needs
"""

from typing import Self


class GenerationError(Exception):
    """Base of everything that `models` raises on purpose. The message is fit for a client to read."""


class InvalidRequest(GenerationError):
    """`param` names the request field that is wrong; the message has its value and what would be valid."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        """It is raised in other processes too."""
        return type(self), (str(self), self.param)


class UnknownModel(GenerationError):
    pass


class EmptySurface(GenerationError):
    pass


class DeviceError(GenerationError):
    pass


class WeightsError(GenerationError):
    pass


class CompilerError(GenerationError):
    pass
