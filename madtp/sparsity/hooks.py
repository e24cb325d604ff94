"""What weights are multiplied with in a forward pass, whichever module does it."""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    """Inside, `see` is called with the name of a weight and the input (..., I) of its product, before each linear product."""

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[str, Tensor], None]):
        super().__init__()
        self.names, self.see = {id(weight): name for name, weight in weights.items()}, see

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and (name := self.names.get(id(args[1]))):
            self.see(name, args[0])
        return function(*args, **(kwargs or {}))
