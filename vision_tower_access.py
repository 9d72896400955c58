"""The vision tower with its adapters switched off."""

from contextlib import contextmanager

import torch
from transformers.utils import is_peft_available


def find_adapted_layers(tower) -> list[torch.nn.Module]:
    """The layers of the tower that carry a PEFT adapter."""
    if is_peft_available():
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in tower.modules() if isinstance(module, BaseTunerLayer)]
    return []


@contextmanager
def without_adapters(layers: list[torch.nn.Module]):
    """The tower as it was before the adapters, for as long as the context lasts."""
    # PEFT's switch also changes which parameters are trained: that is put back as it was.
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
