"""Recording the inputs of linear layers, whichever module computes the product."""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LinearInputHook(TorchFunctionMode):
    """Context manager that calls `record` with a weight's name and the input (..., I) before each of its linear products."""

    def __init__(self, weights: Mapping[str, Tensor], record: Callable[[str, Tensor], None]):
        super().__init__()
        self.names, self.record = {id(weight): name for name, weight in weights.items()}, record

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and (name := self.names.get(id(args[1]))):
            self.record(name, args[0])
        return function(*args, **(kwargs or {}))
