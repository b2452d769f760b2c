"""A frozen base in 8 or 4 bits matches bitsandbytes and PEFT, supports all adapters, and is used only when needed."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import Linear as PeftLora
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.bnb import Linear4bit as PeftLora4bit
from runs import adapter_of, assert_same, interrupted_run, resume_run, train_run
from small_parts import PARTS, loss_of
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.configs.options import Model, Network
from scumble.trainer.base_model import quantize
from scumble.trainer.base_model.detect import EMBEDDED, detect_base
from scumble.trainer.base_model.load import Base, load, place_unet, take_fewer_bits
from scumble.trainer.base_model.quantize import QuantizedLinear, check_bits, fewer_bits
from scumble.trainer.run.state import newest_state
from scumble.trainer.training.lora import attach
from scumble.trainer.training.objective import Batch, Objectives

CPU = torch.device("cpu")
SKETCH = Model(base=str(EMBEDDED))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(base=str(tiny_base("sdxl", tmp_path_factory.mktemp("base"))))


def linear(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 96).to(dtype).requires_grad_(False)


def loaded(model: Model, bits: int, dtype: torch.dtype = torch.float32) -> Base:
    base = load(model, detect_base(model), CPU, dtype)
    place_unet(base, model, bits)
    return base


def weights_of(base: Base) -> dict[str, torch.Tensor]:
    linears = {path: module for path, module in base.unet.named_modules() if isinstance(module, torch.nn.Linear)}
    frozen = {path: module for path, module in linears.items() if not module.weight.requires_grad}
    return {path.removesuffix(".base_layer"): module.weight for path, module in frozen.items()}


def test_8_bit_weights_match_bitsandbytes():
    layer = linear(torch.float16)
    theirs, largest, _ = int8_vectorwise_quant(layer.weight)
    ours = QuantizedLinear(layer, 8, CPU)
    assert ours.packed.dtype == torch.int8 and torch.equal(ours.packed, theirs)
    torch.testing.assert_close(ours.weight.float(), int8_vectorwise_dequant(theirs, largest), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_4_bits_computes_the_same_as_peft_with_bitsandbytes(dtype: torch.dtype):
    dense = linear(dtype)
    their_base = Linear4bit(64, 96, compute_dtype=dtype, quant_type="nf4")
    their_base.weight.data = dense.weight.clone()
    their_base.bias = dense.bias
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "config": LoraConfig(r=4, lora_alpha=8)}
    layers = PeftLora(QuantizedLinear(dense, 4, CPU), "a", **config), PeftLora4bit(their_base.to(CPU), "a", **config)
    inputs, numbers = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype), []
    for layer in layers:
        torch.manual_seed(2)
        for factor in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
            torch.nn.init.normal_(factor, std=0.1)
        layer_input = inputs.clone().requires_grad_()
        output = layer(layer_input)
        output.float().pow(2).sum().backward()
        numbers.append([output, layer_input.grad, layer.lora_A["a"].weight.grad, layer.lora_B["a"].weight.grad])
    for ours, theirs in zip(*numbers, strict=True):
        assert (ours - theirs).norm() < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * theirs.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_neither_input_nor_dense_weight_is_saved_for_the_backward_pass(bits: int):
    layer, saved = QuantizedLinear(linear(), bits, CPU), []
    layer_input = torch.randn(3, 64, requires_grad=True) * 2
    alive = weakref.ref(layer_input)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda one: one):
        output = layer(layer_input)
    del layer_input
    assert output.requires_grad and saved == [] and alive() is None


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.15)])
def test_a_quantized_base_predicts_nearly_the_same_as_the_dense_base(bits: int, error: float):
    with torch.no_grad():
        torch.manual_seed(0)
        noisy, timesteps, hidden = torch.randn(2, 4, 16, 16), torch.tensor([100, 800]), torch.randn(2, 77, 192)
        dense, quantized = (
            base.unet(noisy, timesteps, hidden).sample for base in (loaded(SKETCH, 16), loaded(SKETCH, bits))
        )
    assert 0 < (quantized - dense).norm() / dense.norm() < error


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("network", ["lora", "dora", "loha", "lokr"])
def test_every_adapter_gets_the_same_gradients_as_on_a_dense_base_with_the_dequantized_weights(
    network: Any, bits: int, tiny: Model
):
    quantized, dense = loaded(tiny, bits), loaded(tiny, 16)
    for path, weight in weights_of(quantized).items():
        dense.unet.get_submodule(path).weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    gradients = []
    for base in (quantized, dense):
        trained = attach(base, Network(algorithm=network), PARTS, seed=0)
        loss_of(base).backward()
        gradients.append([p.grad for module in trained for p in module.tensors.values() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_weights_are_the_same_whether_quantized_directly_or_step_by_step(tiny: Model):
    base = loaded(tiny, 16, torch.bfloat16)
    attach(base, Network(), PARTS, seed=0)
    for bits in (8, 4):
        assert take_fewer_bits(base, tiny) == bits == base.bits
        ours, theirs = weights_of(base), weights_of(loaded(tiny, bits, torch.bfloat16))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[path], theirs[path]) for path in theirs)
    assert take_fewer_bits(base, tiny) == 0 and base.bits == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_on_a_quantized_base_renders_previews_exports_and_resumes_bit_for_bit(kind: str, tmp_path: Path):
    tables: dict[str, Any] = {
        "machine": {"base_quantization": kind}, "optimization": {"steps": 4},
        "output": {"preview_every": 2, "save_every": 2},
    }  # fmt: skip
    uninterrupted = train_run(tmp_path / "uninterrupted", **tables)
    interrupted = interrupted_run(tmp_path / "interrupted", 2, **tables)
    resume_run(interrupted)
    assert_same(adapter_of(interrupted), adapter_of(uninterrupted.folder))
    dense = train_run(tmp_path / "dense", optimization={"steps": 4}, output={"preview_every": 0})
    assert uninterrupted.losses != dense.losses and uninterrupted.losses == pytest.approx(dense.losses, rel=0.1)
    assert len(list((interrupted / "previews").glob("step*.png"))) == 6
    (measured,) = uninterrupted.of("measured")
    assert measured["bits"] == {"int8": 8, "nf4": 4}[kind] and f"base in {measured['bits']} bits" in measured["text"]
    state = newest_state(interrupted, pytest.fail)
    assert state and state.state.bits == measured["bits"]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int, int]]:
    """A device that fits only one image with gradient checkpointing on a 4-bit base, and the attempts made on it."""
    tried: list[tuple[bool, int, int]] = []
    losses = Objectives.losses_of

    def limited(self: Objectives, batch: Batch) -> torch.Tensor:
        tried.append((self.base.unet.is_gradient_checkpointing, len(batch["latents"]), self.base.bits))
        if tried[-1] != (True, 1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, batch)

    monkeypatch.setattr(Objectives, "losses_of", limited)
    return tried


def test_auto_saves_memory_in_order_of_cost_and_a_resumed_run_keeps_the_settings(
    tmp_path: Path, memory: list[tuple[bool, int, int]]
):
    tables: dict[str, Any] = {"optimization": {"steps": 3}, "output": {"preview_every": 0}}
    run = interrupted_run(tmp_path, 1, **tables)
    attempts = list(dict.fromkeys(memory))
    assert attempts == [(False, 4, 16), (True, 4, 16), (True, 2, 16), (True, 1, 16), (True, 1, 8), (True, 1, 4)]
    memory.clear()
    resumed = resume_run(run)
    assert set(memory) == {(True, 1, 4)}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    notes = [event["text"] for event in events if event["kind"] == "note" and "out of memory" in event["text"]]
    assert [line.split("out of memory: ")[1].split(" from now")[0] for line in notes] == [
        "gradient checkpointing for some blocks", "gradient checkpointing for more blocks", "2 images per pass",
        "1 image per pass", "the base is kept in 8 bits", "the base is kept in 4 bits",
    ]  # fmt: skip
    text = resumed.of("measured")[0]["text"]
    assert "gradient checkpointing, 1 image per pass, base in 4 bits: 2 steps in about" in text


@pytest.mark.parametrize("quantization", ["off", "int8"])
def test_an_explicit_bit_width_is_kept_and_a_step_that_does_not_fit_is_refused(
    quantization: str, tmp_path: Path, memory: list[tuple[bool, int, int]]
):
    with pytest.raises(Refused, match=r"the memory of the cpu device: 4 images of .* lower --batch-size"):
        train_run(tmp_path, machine={"base_quantization": quantization})
    assert {bits for _, _, bits in memory} == {{"off": 16, "int8": 8}[quantization]}


def test_a_base_that_does_not_fit_is_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from scumble.trainer import train

    def small(base: Base, model: Model, bits: int) -> torch.nn.Module:
        if bits > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return place_unet(base, model, bits)

    monkeypatch.setattr(train, "place_unet", small)
    run = train_run(tmp_path, optimization={"steps": 1}, output={"preview_every": 0})
    assert [event["bits"] for event in run.of("measured")] == [8]
    with pytest.raises(Refused, match="does not fit into the memory of the cpu device") as error:
        train_run(tmp_path, machine={"base_quantization": "off"})
    assert error.value.exit_code == 69


def test_nf4_without_bitsandbytes_is_refused_with_a_fix_and_auto_stops_at_8_bits(monkeypatch: pytest.MonkeyPatch):
    assert [fewer_bits(bits, "cuda") for bits in (16, 8, 4)] == [8, 4, 0]
    assert [fewer_bits(bits, "mps") for bits in (16, 8)] == [8, 0]
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    assert [fewer_bits(bits, "cuda") for bits in (16, 8)] == [8, 0]
    with pytest.raises(
        Refused, match=r'--base-quantization nf4: requires bitsandbytes; pip install "scumble\[quantize\]"'
    ) as error:
        check_bits(4, "cuda")
    assert error.value.exit_code == 69


def test_a_resumed_run_reports_a_changed_bit_width(tmp_path: Path):
    run = interrupted_run(tmp_path, 1, optimization={"steps": 3}, output={"preview_every": 0})
    (plan,) = resume_run(run, machine={"base_quantization": "int8"}).of("plan")
    assert "changed: --base-quantization int8 instead of auto" in plan["reasons"]


def test_4_bit_weights_match_bitsandbytes():
    layer = linear(torch.bfloat16)
    packed, state = quantize_4bit(layer.weight, quant_type="nf4", compress_statistics=True)
    ours = QuantizedLinear(layer, 4, CPU)
    assert torch.equal(ours.packed, packed) and torch.equal(ours.weight, dequantize_4bit(packed, state))
