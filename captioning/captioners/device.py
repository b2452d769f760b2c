"""Where captioning models compute, and in which number format."""

import torch

from scumble.configs.errors import Refused

from .request import Device, Precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def place(device: Device, precision: Precision) -> tuple[torch.device, torch.dtype]:
    """Device and number format; auto: the accelerator that there is, in half precision, else the CPU in fp32."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device != "auto" and not there[device]:
        raise Refused(f"--device {device}: this machine has none that torch can use")
    kind = next(kind for kind, usable in there.items() if usable) if device == "auto" else device
    if precision != "auto":
        return torch.device(kind), DTYPES[precision]
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device(kind), torch.bfloat16 if native else torch.float16
    return torch.device(kind), torch.float16 if kind == "mps" else torch.float32
