"""SGD with momentum whose steps can be passed over on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SkippingSGD(torch.optim.SGD):
    """PyTorch's fused SGD: one pass over the memory, which it leaves as it is where a number on the device says so.

    Momentum is there from the start, as zeros, which gives the same first step.

    Args:
        groups: Of parameters.
        learning_rate: Of the next step.
        momentum: 0 … 1.
        weight_decay: 0 or above.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, learning_rate: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True)
        self.load_momentum({})

    def parameters(self) -> list[Tensor]:
        """In the order of their numbers in `state_dict`."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def load_momentum(self, values: dict[int, Tensor]) -> None:
        """Set the momentum of parameters, by their number; of others it is zero."""
        if not self.defaults["momentum"]:
            return
        for number, parameter in enumerate(self.parameters()):
            # In the memory layout of the parameter, which the fused step relies on.
            momentum = torch.zeros_like(parameter, requires_grad=False)
            if number in values:
                momentum.copy_(values[number])
            self.state[parameter]["momentum_buffer"] = momentum

    def step_if(self, sound: Tensor, divisor: float = 1.0) -> None:
        """One step, or none.

        Args:
            sound: bool, a scalar on the device; where it is false nothing changes, whatever the gradients are.
            divisor: By which gradients are divided first.
        """
        # What `torch.amp.GradScaler` sets for fused optimizers.
        self.found_inf = (~sound).float()
        self.grad_scale = torch.full_like(self.found_inf, divisor) if divisor != 1 else None
        self.step()
