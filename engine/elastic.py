"""Training one set of weights for a range of budgets: steps alternate between the ends of the range and points between them.

Afterwards the temperature of any budget in the range is found without training. The alternation is the sandwich rule of Yu and
Huang, "Universally Slimmable Networks", ICCV 2019, spread over three steps.
"""

from collections.abc import Callable

import numpy as np
import torch

from configs.schema import Config
from madtp.rule import OFF, PruneSetting

Meet = Callable[[float, PruneSetting], PruneSetting]  # target GFLOPs, setting to start from -> the nearest setting

POINTS = 5  # of the range, ends included, whose temperatures are found before each epoch


class Budgets:
    """The prune settings of an epoch, step by step. Without a range every step has the setting of p."""

    def __init__(self, config: Config):
        self.config = config
        self.settings: list[PruneSetting] = []

    def enter(self, setting: PruneSetting, share: float, dense: float, meet: Meet) -> None:
        """Finds the settings of an epoch.

        Args:
            setting: that of p.
            share: part of the way to the full removal that the ramp has reached, 0 to 1.
            dense: GFLOPs of the uncompressed model.
            meet: finds a setting. It starts from that of the next smaller removal, so that a resumed run finds the same ones.
        """
        self.settings = [setting]
        if self.config.train_budget is None or share == 0:
            return
        found = OFF
        self.settings = []
        for removal in np.linspace(*self.config.train_budget, POINTS):
            found = meet(dense * (1 - float(removal) * share), found)
            self.settings.append(found)

    def at(self, step: int) -> PruneSetting:
        """Returns the setting of a step: the hardest, one between at random, the gentlest, and again."""
        if len(self.settings) == 1:
            return self.settings[0]
        generator = torch.Generator().manual_seed(self.config.seed + step)
        between = self.settings[1 + int(torch.randint(len(self.settings) - 2, (), generator=generator))]
        return (self.settings[-1], between, self.settings[0])[step % 3]
