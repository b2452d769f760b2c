"""Where the memory of a tensor begins."""

import torch


def memory_of(tensor: torch.Tensor) -> int:
    """Where its memory begins; 0 where it has none, or hides it."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
