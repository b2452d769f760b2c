"""The live adapter and its file: names, counts, parameters, and the same images in stock diffusers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from small_parts import loaded, parts_of, rendered
from tiny import CONFIGS

from scumble.configs.errors import Refused
from scumble.configs.options import Network
from scumble.trainer.adapters.adapter import read_adapter
from scumble.trainer.adapters.files import read_tensors, write_adapter
from scumble.trainer.adapters.keys import sgm_path, text_key, unet_key
from scumble.trainer.adapters.targets import CONVS, FULL, Part
from scumble.trainer.training.export import export, tensors_of
from scumble.trainer.training.lora import ADAPTER, AdaptedLayer, attach, memory_order, num_parameters


def randomize(layers: list[AdaptedLayer]) -> None:
    """Fill every up matrix with random values, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        up = layer.tensors["lora_up"]
        up.data = 0.3 * torch.randn(up.shape, generator=generator)


@pytest.mark.parametrize("kind", ["sketch", "sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(("targets", "conv_rank"), [("attention", 0), ("full", 0), ("full", 3)])
def test_stock_diffusers_renders_the_same_image_from_the_file_as_from_the_live_adapter(
    kind: str, targets: str, conv_rank: int, tmp_path: Path
):
    base = loaded(kind, tmp_path)
    before = rendered(base)
    layers = attach(base, Network(targets=targets), parts_of(base, conv_rank), seed=0)
    np.testing.assert_array_equal(rendered(base), before)  # up is 0, so the image is unchanged
    randomize(layers)
    live = rendered(base)
    export(tmp_path / "it.safetensors", layers, {}, torch.float32)
    fresh = loaded(kind, tmp_path / "again")
    fresh.pipeline.load_lora_weights(str(tmp_path / "it.safetensors"))
    np.testing.assert_allclose(rendered(fresh), live, atol=2e-4)
    assert np.abs(live - before).max() > 1e-2


@pytest.mark.parametrize(
    ("config", "attention_and_ff", "with_convs", "sgm"),
    [("sd15", 192, 278, False), ("sd21", 192, 278, False), ("sdxl", 722, 788, True)],
)
def test_names_in_real_models_are_unique_and_have_the_known_counts(
    config: str, attention_and_ff: int, with_convs: int, sgm: bool
):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((CONFIGS / config / "unet/config.json").read_text()))
    assert isinstance(unet, UNet2DConditionModel)
    paths = [name for name, _ in unet.named_modules()]
    full = [path for path in paths if re.fullmatch(FULL, path)]
    convs = [path for path in paths if re.fullmatch(CONVS, path)]
    assert (len(full), len(full) + len(convs)) == (attention_and_ff, with_convs)
    keys = {unet_key(path, sgm) for path in full + convs}
    assert len(keys) == with_convs
    blocks = r"lora_unet_(input_blocks|middle_block|output_blocks)" if sgm else r"lora_unet_(down|mid|up)_block"
    assert all(re.match(blocks, key) for key in keys)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("mid_block.attentions.0.transformer_blocks.9.ff.net.2", "middle_block.1.transformer_blocks.9.ff.net.2"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_out", "out.2"),
    ],
)
def test_sdxl_blocks_have_the_names_of_the_original_implementation(path: str, name: str):
    assert sgm_path(path) == name


def test_text_encoder_names_do_not_depend_on_the_version_of_transformers():
    expected = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert text_key("encoder.layers.0.self_attn.q_proj", "lora_te") == expected
    assert text_key("text_model.encoder.layers.0.self_attn.q_proj", "lora_te") == expected


def test_the_number_of_parameters_is_rank_times_inputs_plus_outputs(tmp_path: Path):
    base = loaded("sdxl", tmp_path)
    layers = attach(base, Network(targets="full"), parts_of(base, 3), seed=0)
    expected = 0
    for layer in layers:
        original = layer.layer.get_base_layer()
        assert isinstance(original, torch.nn.Linear | torch.nn.Conv2d)
        outputs, inputs = original.weight.shape[0], original.weight[0].numel()
        rank = {"unet": 4, "text": 2, "text2": 2}[layer.part]
        rank = 3 if re.fullmatch(CONVS, layer.path) else rank
        assert layer.rank == rank
        expected += rank * (inputs + outputs)
    assert num_parameters(layers) == expected
    live = [p for net in (base.unet, *base.text_encoders) for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in live) == expected and {p.dtype for p in live} == {torch.float32}


def test_a_second_adapter_in_one_process_has_the_same_layers(tmp_path: Path):
    keys = []
    for turn in range(2):
        base = loaded("sd1", tmp_path / str(turn))
        keys.append([layer.key for layer in attach(base, Network(), [Part("unet", 2 + turn, 2.0)], seed=0)])
    assert keys[0] == keys[1]


def test_the_same_seed_gives_the_same_adapter_and_the_global_random_state_is_unchanged(tmp_path: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    downs = []
    for turn in range(2):
        base = loaded("sd1", tmp_path / str(turn))
        torch.manual_seed(5)
        downs.append(attach(base, Network(), [Part("unet", 4, 4.0)], seed=9)[0].tensors["lora_down"].clone())
        torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert torch.equal(*downs)


def test_factors_of_layers_with_the_same_input_are_adjacent_in_memory(tmp_path: Path):
    layers = attach(base := loaded("sd1", tmp_path), Network(), parts_of(base), seed=0)
    names = {p: f"{layer.path.split('.')[-1]}.{slot}" for layer in layers for slot, p in layer.tensors.items()}
    found = memory_order(layers)
    assert len(found) == len(set(found)) == len(names)
    order = " ".join(names[p].replace("lora_", "").replace("to_", "") for p in found)
    self_attention = "q.down k.down v.down q.up k.up v.up 0.down 0.up"
    cross_attention = "q.down q.up k.down v.down k.up v.up 0.down 0.up"
    num_blocks = sum(layer.path.endswith("attn1.to_q") for layer in layers)
    assert order.count(f"{self_attention} {cross_attention}") == num_blocks > 0
    assert order.endswith("q_proj.down q_proj.up out_proj.down out_proj.up fc1.down fc1.up fc2.down fc2.up")


def test_the_rank_stabilized_scale_is_alpha_over_root_rank_and_is_saved_as_alpha(tmp_path: Path):
    base = loaded("sd1", tmp_path)
    layers = attach(base, Network(rslora=True), [Part("unet", 16, 8.0)], seed=0)
    assert layers[0].scale == 8.0 / 4.0
    tensors = tensors_of(layers, torch.float32)
    assert float(tensors[f"{layers[0].key}.alpha"]) == 2.0 * 16


def test_the_unet_has_a_single_alpha_and_saved_products_equal_the_live_ones(tmp_path: Path):
    base = loaded("sd1", tmp_path)
    layers = attach(base, Network(targets="full"), parts_of(base, 3), seed=0)
    randomize(layers)
    tensors = tensors_of(layers, torch.float32)
    alphas = {float(tensors[f"{layer.key}.alpha"]) for layer in layers if layer.part == "unet"}
    assert alphas == {8.0}
    for layer in layers:
        up, down = (tensors[f"{layer.key}.lora_{which}.weight"].flatten(1) for which in ("up", "down"))
        scale = float(tensors[f"{layer.key}.alpha"]) / down.shape[0]
        live = layer.scale * layer.tensors["lora_up"].flatten(1) @ layer.tensors["lora_down"].flatten(1)
        torch.testing.assert_close(scale * up @ down, live, rtol=1e-5, atol=1e-6)


def test_a_regex_selects_layers_and_an_invalid_one_is_refused(tmp_path: Path):
    base = loaded("sd1", tmp_path)
    layers = attach(base, Network(targets=r".*attn2\.to_[kv]"), [Part("unet", 2, 2.0)], seed=0)
    assert layers and all(layer.path.endswith(("attn2.to_k", "attn2.to_v")) for layer in layers)
    with pytest.raises(Refused, match=r"--targets \(: not a valid regex"):
        attach(loaded("sd1", tmp_path / "b"), Network(targets="("), [Part("unet", 2, 2.0)], seed=0)
    with pytest.raises(Refused, match="--targets nothing: matches no UNet layer"):
        attach(loaded("sd1", tmp_path / "c"), Network(targets="nothing"), [Part("unet", 2, 2.0)], seed=0)


def test_tensors_that_are_not_finite_are_never_written(tmp_path: Path):
    with pytest.raises(Refused, match="1 tensors have non-finite values, first b"):
        write_adapter({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, {}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_file_contains_its_metadata_and_the_hash_of_its_tensors(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_adapter({"a": torch.ones(2)}, {"ss_output_name": "x"}, path)
    tensors, metadata = read_tensors(path)
    assert metadata["ss_output_name"] == "x" and torch.equal(tensors["a"], torch.ones(2))
    import hashlib

    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()


@pytest.mark.parametrize(
    ("network", "has_full_factors"),
    [(Network(algorithm="loha"), False), (Network(algorithm="lokr", lokr_factor=4), True),
     (Network(algorithm="lokr", lokr_factor="auto"), True)],
)  # fmt: skip
def test_loha_and_lokr_start_as_the_identity_and_their_files_contain_the_weight_change_of_peft(
    network: Network, has_full_factors: bool, tmp_path: Path
):
    base = loaded("sd1", tmp_path)
    before = rendered(base)
    layers = attach(base, network.model_copy(update={"targets": "full"}), parts_of(base, 3), seed=0)
    np.testing.assert_array_equal(rendered(base), before)
    torch.manual_seed(1)
    for layer in layers:
        for parameter in layer.tensors.values():
            assert parameter.dtype == torch.float32 and parameter.requires_grad
            torch.nn.init.normal_(parameter, std=0.3)
    export(tmp_path / "it.safetensors", layers, {}, torch.float32)
    modules = read_adapter(tmp_path / "it.safetensors").modules
    assert len(modules) == len(layers) and any(not module.rank for module in modules.values()) == has_full_factors
    for layer in layers:
        assert not isinstance(layer.layer, LoraLayer)
        expected = layer.layer.get_delta_weight(ADAPTER)
        module = modules[layer.module_path]
        torch.testing.assert_close(module.delta().view(expected.shape), expected, rtol=1e-4, atol=1e-5)
        assert module.kind == layer.kind == network.algorithm
    live = [p for net in (base.unet, *base.text_encoders) for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in live) == num_parameters(layers)


@pytest.mark.parametrize(
    ("algorithm", "count_of_16", "count_of_32"),
    [
        ("lora", 2 * (16 + 16), 2 * (32 + 32)),
        ("dora", 2 * (16 + 16) + 16, 2 * (32 + 32) + 32),
        ("loha", 2 * 2 * (16 + 16), 2 * 2 * (32 + 32)),
        ("lokr", 4 * 4 + 4 * 4, 4 * 4 + 2 * (8 + 8)),  # a full factor where that is not larger
    ],
)
def test_the_number_of_parameters_of_square_layers_at_rank_2(
    algorithm: str, count_of_16: int, count_of_32: int, tmp_path: Path
):
    base = loaded("sd1", tmp_path)
    options = Network.model_validate({"algorithm": algorithm, "lokr_factor": 4, "targets": r".*attn1\.to_q"})
    for layer in attach(base, options, [Part("unet", 2, 2.0)], seed=0):
        original = layer.layer.get_base_layer()
        assert isinstance(original, torch.nn.Linear)
        assert num_parameters([layer]) == {16: count_of_16, 32: count_of_32}[original.in_features]


def test_every_adapted_layer_is_a_lora_layer_of_peft(tmp_path: Path):
    base = loaded("sd1", tmp_path)
    assert all(isinstance(layer.layer, LoraLayer) for layer in attach(base, Network(), parts_of(base), seed=0))
