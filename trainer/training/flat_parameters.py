"""All trained parameters in one fp32 buffer a group, their gradients in another: one norm, one update, one cast."""

from collections.abc import Sequence

import torch


class Flat:
    """Makes parameters views of `groups`, one flat parameter (n,) for each group, and their `.grad` views of its.

    `lowered` gives views of a copy in `dtype`, which `lower` brings up to date; in fp32 there is no copy to make.
    """

    def __init__(self, groups: Sequence[Sequence[torch.nn.Parameter]], dtype: torch.dtype = torch.float32):
        self.groups: list[torch.nn.Parameter] = []
        self.gradients: list[torch.Tensor] = []
        self.low: list[torch.Tensor] = []
        self.places: dict[torch.nn.Parameter, tuple[int, int]] = {}  # group and offset
        for number, group in enumerate(groups):
            values = torch.cat([parameter.detach().flatten() for parameter in group])
            flat = torch.nn.Parameter(values)
            flat.grad = gradient = torch.zeros_like(values)
            self.groups.append(flat)
            self.gradients.append(gradient)
            self.low.append(values if dtype == values.dtype else values.to(dtype))
            start = 0
            for parameter in group:
                self.places[parameter] = number, start
                parameter.data = values[start : start + parameter.numel()].view_as(parameter)
                parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()

    @property
    def values(self) -> list[torch.Tensor]:
        """The parameters, as numbers in the same memory."""
        return [group.detach() for group in self.groups]

    def of(self, buffers: Sequence[torch.Tensor], parameter: torch.nn.Parameter) -> torch.Tensor:
        """The parameter's view, in its shape, of buffers that lie as the groups do."""
        number, start = self.places[parameter]
        return buffers[number][start : start + parameter.numel()].view_as(parameter)

    def lowered(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The parameter's copy, without gradient."""
        return self.of(self.low, parameter)

    @torch.no_grad()
    def lower(self) -> None:
        """Bring the copies up to date: to be called when parameters have changed, before they are used."""
        for low, flat in zip(self.low, self.groups, strict=True):
            if low.dtype != flat.dtype:
                low.copy_(flat)

    def zero_grad(self) -> None:
        """In place, so that the views stay."""
        for gradient in self.gradients:
            gradient.zero_()
