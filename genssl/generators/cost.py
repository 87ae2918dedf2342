"""What a variant costs: counted from the networks that are loaded, without computing anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def count_tflops(network: nn.Module, *inputs: Any, **named: Any) -> float:
    """Returns the TFLOP (1e12; a multiply-add is two) of a forward pass: convolutions, matrix products, attention.

    Shapes alone are followed, on the meta device, so that the count of a full-size model takes neither long nor memory.

    Args:
        network: not compiled; stays as it is.
        inputs, named: of its forward; tensors on any device, of which shape and dtype count.
    """
    weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shapes = {name: value.detach().to("meta") for name, value in weights.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(
            network, shapes, tuple(map(_on_meta, inputs)), {name: _on_meta(value) for name, value in named.items()}
        )
    return float(counter.get_total_flops()) / 1e12


def count_tflops_of(compute: Callable[[], object]) -> float:
    """Returns the TFLOP of whatever a function computes; shapes alone are followed, as by `count_tflops`.

    Args:
        compute: makes its tensors itself; networks that it calls stay as they are.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), fakes, FlopCounterMode(display=False) as counter:
        compute()
    return float(counter.get_total_flops()) / 1e12


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value
