"""Frozen weights of a module side by side in one block of a device's memory.

One by one, torch's allocator gives those of less than 10 MiB parts of 20 MiB, and rounds larger ones up to 2 MiB; what
is left over nobody takes. Of SDXL's UNet that is 0.3 GiB, and a step takes 5.9 GiB of the card instead of 6.2.
"""

import torch

ALIGNED_BYTES = 512  # as the allocator of CUDA aligns


def place_together(module: torch.nn.Module, device: torch.device) -> None:
    """Bring the frozen parameters of a module that lie elsewhere onto a device, into one block, kernels of convolutions
    channels last; and its buffers.

    The block is free again when all have left it. Raises torch's out of memory before anything has moved.
    """
    frozen = [one for one in module.parameters() if not one.requires_grad and one.device.type != device.type]
    starts, size = [], 0
    for parameter in frozen:
        starts.append(size)
        size += -(-parameter.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
    block = _block(size, device)
    for parameter, start in zip(frozen, starts, strict=True):
        parameter.data = _part(block, start, parameter).copy_(parameter.detach())
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)


def take_apart(module: torch.nn.Module, device: torch.device) -> None:
    """Bring the frozen parameters of a module onto a device, each by itself."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.detach().to(device)


def _block(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _part(block: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    flat = block[start : start + like.nbytes].view(like.dtype)
    if like.dim() != 4:
        return flat.view(like.shape)
    outputs, inputs, height, width = like.shape
    return flat.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
