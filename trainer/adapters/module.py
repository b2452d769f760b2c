"""The adapter module of one layer: its factors, the weight change dW they represent, and the resulting weight.

LoRA: dW = alpha / rank * up @ down (Hu et al. 2021). LoHa: alpha / rank * (w1_a @ w1_b) ∘ (w2_a @ w2_b), LoKr:
scale * kron(w1, w2) (both Yeh et al. 2023, LyCORIS). DoRA adds a magnitude for each input (Liu et al. 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod

import torch

LABELS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "dora": "DoRA", "full": "full difference"}


@dataclass(frozen=True)
class Module:
    """The part of an adapter that modifies one layer; `tensors` by slot (lora_down, lora_up, hada_…, dora_scale, …)."""

    kind: str  # lora, loha, lokr or full (a dense difference)
    tensors: dict[str, torch.Tensor]
    alpha: float | None

    @property
    def rank(self) -> int:
        """Inner dimension of the factors; 0 for a full difference and for LoKr with two dense factors."""
        if self.kind == "lora":
            return self.tensors["lora_down"].shape[0]
        if self.kind == "loha":
            return self.tensors["hada_w1_b"].shape[0]
        for name in ("lokr_w1_b", "lokr_w2_b"):
            if name in self.tensors:
                return self.tensors[name].shape[0]
        return 0

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 without alpha or for dense factors, as in the UIs."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    @property
    def is_dora(self) -> bool:
        """Whether the weight change also depends on the base's weight."""
        return "dora_scale" in self.tensors

    @property
    def is_finite(self) -> bool:
        """Whether no value is infinite or NaN."""
        # isfinite does not support fp8
        tensors = (tensor if tensor.dtype.itemsize > 1 else tensor.float() for tensor in self.tensors.values())
        return isfinite(self.scale) and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    @property
    def label(self) -> str:
        """Display name of the kind."""
        return LABELS["dora" if self.is_dora else self.kind]

    @property
    def shape(self) -> tuple[int, int] | None:
        """Shape (out, in · h · w) of dW according to the factors; None if their shapes do not match."""
        if self.kind == "full":
            return matrix_of(self.tensors["diff"].shape)
        if self.kind == "lora":
            return pair_shape(self, "lora_up", "lora_down", "lora_mid")
        if self.kind == "loha":
            one = pair_shape(self, "hada_w1_a", "hada_w1_b", "hada_t1")
            return one if one == pair_shape(self, "hada_w2_a", "hada_w2_b", "hada_t2") else None
        halves = [
            matrix_of(self.tensors[whole].shape)
            if whole in self.tensors
            else pair_shape(self, f"{whole}_a", f"{whole}_b", core)
            for whole, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
        ]
        first, second = halves
        return (first[0] * second[0], first[1] * second[1]) if first and second else None

    def delta(self) -> torch.Tensor:
        """Return dW in fp32 as a matrix (out, in · h · w), without DoRA magnitudes."""
        if self.kind == "full":
            return self.tensors["diff"].float().flatten(1)
        if self.kind == "lora":
            up, down = pair(self, "lora_up", "lora_down", "lora_mid")
            return self.scale * up @ down
        if self.kind == "loha":
            one_up, one_down = pair(self, "hada_w1_a", "hada_w1_b", "hada_t1")
            two_up, two_down = pair(self, "hada_w2_a", "hada_w2_b", "hada_t2")
            return self.scale * (one_up @ one_down) * (two_up @ two_down)
        first, second = kronecker_parts(self)
        return torch.kron(first, second)

    def on(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """Apply the adapter at a given strength to a weight (out, in) or (out, in, h, w) in fp32: W + strength · dW.

        DoRA sets the norm of each column or row of V = W + dW: W + strength · (m · V / ‖V‖ - W), as in UIs and PEFT.
        """
        delta = self.delta().reshape(weight.shape)
        if not self.is_dora:
            return torch.add(weight, delta, alpha=strength)
        return torch.lerp(weight, decomposed(weight + delta, self.tensors["dora_scale"].float()), strength)


def decomposed(direction: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return m · V / ‖V‖ for V (out, in, …), with one magnitude m per input (1, in, …) or per output (out, 1, …).

    Liu et al. 2024, equation 5.
    """
    axis = 1 if magnitude.shape[0] == 1 else 0
    others = [other for other in range(direction.dim()) if other != axis]
    norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return direction * (magnitude.reshape(norm.shape) / norm)


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """(out, in, h, w) -> (out, in · h · w)."""
    return shape[0], prod(shape[1:])


def pair_shape(module: Module, up: str, down: str, core: str) -> tuple[int, int] | None:
    """Return the shape of the product of the two factors that `pair` returns, or None if they do not match."""
    first, second = module.tensors[up].shape, module.tensors[down].shape
    if core not in module.tensors:
        return (first[0], prod(second[1:])) if prod(first[1:]) == second[0] else None
    middle = module.tensors[core].shape
    rank, out = (prod(first[1:]), first[0]) if module.kind == "lora" else (first[0], prod(first[1:]))
    fits = len(middle) == 4 and middle[:2] == (rank, second[0])
    return (out, prod(second[1:]) * prod(middle[2:])) if fits else None


def pair(module: Module, up: str, down: str, core: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two factors in fp32 as matrices (out, r) and (r, in · h · w), with the Tucker core (r, r, h, w), if any,
    multiplied into the second. With a core, LyCORIS stores the first factor transposed, (r, out); LoRA does not.
    """
    first, second = module.tensors[up].float().flatten(1), module.tensors[down].float()
    if core not in module.tensors:
        return first, second.flatten(1)
    inner = torch.einsum("ijhw,jr->irhw", module.tensors[core].float(), second.flatten(1))
    return first if module.kind == "lora" else first.T.contiguous(), inner.flatten(1)


def kronecker_parts(module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two LoKr matrices in fp32, scale in the first: dW = kron(first, second); kernel dims are innermost."""
    parts = module.tensors
    first = parts["lokr_w1"].float() if "lokr_w1" in parts else parts["lokr_w1_a"].float() @ parts["lokr_w1_b"].float()
    if "lokr_w2" in parts:
        return module.scale * first, parts["lokr_w2"].float().flatten(1)
    up, down = pair(module, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    return module.scale * first, up @ down
