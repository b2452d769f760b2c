"""The device and dtype of captioning models."""

import torch

from scumble.configs.errors import Refused

from .request import Device, Precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def device_and_dtype(device: Device, precision: Precision) -> tuple[torch.device, torch.dtype]:
    """Device and dtype; auto selects an available GPU in half precision, else the CPU in fp32.

    Raises `Refused` if the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device != "auto" and not available[device]:
        raise Refused(f"--device {device}: not available to torch on this machine")
    kind = next(kind for kind, usable in available.items() if usable) if device == "auto" else device
    if precision != "auto":
        return torch.device(kind), DTYPES[precision]
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device(kind), torch.bfloat16 if native else torch.float16
    return torch.device(kind), torch.float16 if kind == "mps" else torch.float32
