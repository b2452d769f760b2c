"""One fp32 buffer for the parameters of a group and one for their gradients: one norm, one update, one cast."""

from collections.abc import Sequence

import torch


class FlatParameters:
    """Turns parameters into views of `groups`, one flat parameter (n,) per group, and `.grad` into views of its.

    `lowered` returns views of a copy in `dtype`, which `lower` updates. In fp32 the copy is the parameters themselves.
    """

    def __init__(self, groups: Sequence[Sequence[torch.nn.Parameter]], dtype: torch.dtype = torch.float32):
        self.groups: list[torch.nn.Parameter] = []
        self.gradients: list[torch.Tensor] = []
        self.low: list[torch.Tensor] = []
        self.offsets: dict[torch.nn.Parameter, tuple[int, int]] = {}  # index of the group, and offset in it
        for index, group in enumerate(groups):
            values = torch.cat([parameter.detach().flatten() for parameter in group])
            flat = torch.nn.Parameter(values)
            flat.grad = gradient = torch.zeros_like(values)
            self.groups.append(flat)
            self.gradients.append(gradient)
            self.low.append(values if dtype == values.dtype else values.to(dtype))
            start = 0
            for parameter in group:
                self.offsets[parameter] = index, start
                parameter.data = values[start : start + parameter.numel()].view_as(parameter)
                parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()

    @property
    def values(self) -> list[torch.Tensor]:
        """The flat parameters without autograd, in the same memory."""
        return [group.detach() for group in self.groups]

    def of(self, buffers: Sequence[torch.Tensor], parameter: torch.nn.Parameter) -> torch.Tensor:
        """A view, in the parameter's shape, of buffers with the layout of `groups`."""
        index, start = self.offsets[parameter]
        return buffers[index][start : start + parameter.numel()].view_as(parameter)

    def lowered(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The copy of a parameter in `dtype`, without a gradient."""
        return self.of(self.low, parameter)

    @torch.no_grad()
    def lower(self) -> None:
        """Update the copies. Call this after parameters have changed and before the copies are used."""
        for low, flat in zip(self.low, self.groups, strict=True):
            if low.dtype != flat.dtype:
                low.copy_(flat)

    def zero_grad(self) -> None:
        """Zero the gradients in place, so that the views stay valid."""
        for gradient in self.gradients:
            gradient.zero_()
