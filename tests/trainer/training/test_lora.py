"""The adapter on the live model, and the file: names, counts, parameters, and the same pictures in stock diffusers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from small_parts import loaded, painted, parts_of
from tiny import CONFIGS

from scumble.configs.errors import Refused
from scumble.configs.options import Network
from scumble.trainer.adapters.adapter import read_adapter
from scumble.trainer.adapters.files import read_tensors, write_adapter
from scumble.trainer.adapters.keys import sgm_path, text_key, unet_key
from scumble.trainer.adapters.targets import CONVS, FULL, Part
from scumble.trainer.training.export import export, tensors_of
from scumble.trainer.training.lora import ADAPTER, AdaptedLayer, attach, memory_order, num_parameters


def shaken(trained: list[AdaptedLayer]) -> None:
    """Give every up matrix values, so that the adapter shows."""
    generator = torch.Generator().manual_seed(1)
    for module in trained:
        up = module.tensors["lora_up"]
        up.data = 0.3 * torch.randn(up.shape, generator=generator)


@pytest.mark.parametrize("kind", ["sketch", "sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(("targets", "conv_rank"), [("attention", 0), ("full", 0), ("full", 3)])
def test_stock_diffusers_paints_the_same_from_the_file_as_from_the_live_adapter(
    kind: str, targets: str, conv_rank: int, tmp_path: Path
):
    base = loaded(kind, tmp_path)
    before = painted(base)
    trained = attach(base, Network(targets=targets), parts_of(base, conv_rank), seed=0)
    np.testing.assert_array_equal(painted(base), before)  # up = 0: nothing changes yet
    shaken(trained)
    live = painted(base)
    export(tmp_path / "it.safetensors", trained, {}, torch.float32)
    fresh = loaded(kind, tmp_path / "again")
    fresh.pipeline.load_lora_weights(str(tmp_path / "it.safetensors"))
    np.testing.assert_allclose(painted(fresh), live, atol=2e-4)
    assert np.abs(live - before).max() > 1e-2


@pytest.mark.parametrize(
    ("config", "attention_and_ff", "with_convs", "sgm"),
    [("sd15", 192, 278, False), ("sd21", 192, 278, False), ("sdxl", 722, 788, True)],
)
def test_names_at_the_real_layout_are_unique_and_as_many_as_the_uis_know(
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
def test_sdxl_blocks_have_the_names_of_the_original_code(path: str, name: str):
    assert sgm_path(path) == name


def test_text_names_do_not_depend_on_the_version_of_transformers():
    expected = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert text_key("encoder.layers.0.self_attn.q_proj", "lora_te") == expected
    assert text_key("text_model.encoder.layers.0.self_attn.q_proj", "lora_te") == expected


def test_parameters_are_rank_times_inputs_plus_outputs(tmp_path: Path):
    base = loaded("sdxl", tmp_path)
    trained = attach(base, Network(targets="full"), parts_of(base, 3), seed=0)
    expected = 0
    for module in trained:
        original = module.layer.get_base_layer()
        assert isinstance(original, torch.nn.Linear | torch.nn.Conv2d)
        outputs, inputs = original.weight.shape[0], original.weight[0].numel()
        rank = {"unet": 4, "text": 2, "text2": 2}[module.part]
        rank = 3 if re.fullmatch(CONVS, module.path) else rank
        assert module.rank == rank
        expected += rank * (inputs + outputs)
    assert num_parameters(trained) == expected
    live = [p for net in (base.unet, *base.text_encoders) for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in live) == expected and {p.dtype for p in live} == {torch.float32}


def test_a_second_network_in_one_process_has_the_same_modules(tmp_path: Path):
    keys = []
    for turn in range(2):
        base = loaded("sd1", tmp_path / str(turn))
        keys.append([m.key for m in attach(base, Network(), [Part("unet", 2 + turn, 2.0)], seed=0)])
    assert keys[0] == keys[1]


def test_the_same_seed_gives_the_same_adapter_and_leaves_other_randomness_alone(tmp_path: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    downs = []
    for turn in range(2):
        base = loaded("sd1", tmp_path / str(turn))
        torch.manual_seed(5)
        downs.append(attach(base, Network(), [Part("unet", 4, 4.0)], seed=9)[0].tensors["lora_down"].clone())
        torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert torch.equal(*downs)


def test_factors_of_layers_that_hear_the_same_lie_next_to_each_other(tmp_path: Path):
    trained = attach(base := loaded("sd1", tmp_path), Network(), parts_of(base), seed=0)
    names = {p: f"{module.path.split('.')[-1]}.{slot}" for module in trained for slot, p in module.tensors.items()}
    found = memory_order(trained)
    assert len(found) == len(set(found)) == len(names)
    told = " ".join(names[p].replace("lora_", "").replace("to_", "") for p in found)
    own, heard = "q.down k.down v.down q.up k.up v.up 0.down 0.up", "q.down q.up k.down v.down k.up v.up 0.down 0.up"
    blocks = sum(module.path.endswith("attn1.to_q") for module in trained)
    assert told.count(f"{own} {heard}") == blocks > 0
    assert told.endswith("q_proj.down q_proj.up out_proj.down out_proj.up fc1.down fc1.up fc2.down fc2.up")


def test_rank_stabilised_scale_is_alpha_over_root_rank_and_written_as_alpha(tmp_path: Path):
    base = loaded("sd1", tmp_path)
    trained = attach(base, Network(rslora=True), [Part("unet", 16, 8.0)], seed=0)
    assert trained[0].scale == 8.0 / 4.0
    tensors = tensors_of(trained, torch.float32)
    assert float(tensors[f"{trained[0].key}.alpha"]) == 2.0 * 16


def test_one_alpha_stands_for_a_component_and_the_product_is_the_live_one(tmp_path: Path):
    base = loaded("sd1", tmp_path)
    trained = attach(base, Network(targets="full"), parts_of(base, 3), seed=0)
    shaken(trained)
    tensors = tensors_of(trained, torch.float32)
    alphas = {float(tensors[f"{m.key}.alpha"]) for m in trained if m.part == "unet"}
    assert alphas == {8.0}
    for module in trained:
        up, down = (tensors[f"{module.key}.lora_{which}.weight"].flatten(1) for which in ("up", "down"))
        scale = float(tensors[f"{module.key}.alpha"]) / down.shape[0]
        live = module.scale * module.tensors["lora_up"].flatten(1) @ module.tensors["lora_down"].flatten(1)
        torch.testing.assert_close(scale * up @ down, live, rtol=1e-5, atol=1e-6)


def test_a_regex_chooses_layers_and_a_bad_one_is_refused(tmp_path: Path):
    base = loaded("sd1", tmp_path)
    trained = attach(base, Network(targets=r".*attn2\.to_[kv]"), [Part("unet", 2, 2.0)], seed=0)
    assert trained and all(module.path.endswith(("attn2.to_k", "attn2.to_v")) for module in trained)
    with pytest.raises(Refused, match=r"--targets \(: neither attention nor full, and no regex"):
        attach(loaded("sd1", tmp_path / "b"), Network(targets="("), [Part("unet", 2, 2.0)], seed=0)
    with pytest.raises(Refused, match="--targets nothing: no layer"):
        attach(loaded("sd1", tmp_path / "c"), Network(targets="nothing"), [Part("unet", 2, 2.0)], seed=0)


def test_what_is_not_finite_is_never_written(tmp_path: Path):
    with pytest.raises(Refused, match="1 tensors are not finite, first b"):
        write_adapter({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, {}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_file_carries_its_metadata_and_the_hash_of_its_tensors(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_adapter({"a": torch.ones(2)}, {"ss_output_name": "x"}, path)
    tensors, metadata = read_tensors(path)
    assert metadata["ss_output_name"] == "x" and torch.equal(tensors["a"], torch.ones(2))
    import hashlib

    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()


@pytest.mark.parametrize(
    ("network", "whole"),
    [(Network(algorithm="loha"), False), (Network(algorithm="lokr", lokr_factor=4), True),
     (Network(algorithm="lokr", lokr_factor="auto"), True)],
)  # fmt: skip
def test_loha_and_lokr_start_at_nothing_and_their_files_hold_the_product_of_pefts(
    network: Network, whole: bool, tmp_path: Path
):
    base = loaded("sd1", tmp_path)
    before = painted(base)
    trained = attach(base, network.model_copy(update={"targets": "full"}), parts_of(base, 3), seed=0)
    np.testing.assert_array_equal(painted(base), before)
    torch.manual_seed(1)
    for module in trained:
        for parameter in module.tensors.values():
            assert parameter.dtype == torch.float32 and parameter.requires_grad
            torch.nn.init.normal_(parameter, std=0.3)
    export(tmp_path / "it.safetensors", trained, {}, torch.float32)
    modules = read_adapter(tmp_path / "it.safetensors").modules
    assert len(modules) == len(trained) and any(not module.rank for module in modules.values()) == whole
    for module in trained:
        assert not isinstance(module.layer, LoraLayer)
        expected = module.layer.get_delta_weight(ADAPTER)
        read = modules[module.place]
        torch.testing.assert_close(read.delta().view(expected.shape), expected, rtol=1e-4, atol=1e-5)
        assert read.kind == module.kind == network.algorithm
    live = [p for net in (base.unet, *base.text_encoders) for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in live) == num_parameters(trained)


@pytest.mark.parametrize(
    ("network", "of_16", "of_32"),
    [
        ("lora", 2 * (16 + 16), 2 * (32 + 32)),
        ("dora", 2 * (16 + 16) + 16, 2 * (32 + 32) + 32),
        ("loha", 2 * 2 * (16 + 16), 2 * 2 * (32 + 32)),
        ("lokr", 4 * 4 + 4 * 4, 4 * 4 + 2 * (8 + 8)),  # the large factor is whole where it is no larger so
    ],
)
def test_parameters_of_square_layers_at_rank_2_by_kind(network: str, of_16: int, of_32: int, tmp_path: Path):
    base = loaded("sd1", tmp_path)
    options = Network.model_validate({"algorithm": network, "lokr_factor": 4, "targets": r".*attn1\.to_q"})
    trained = attach(base, options, [Part("unet", 2, 2.0)], seed=0)
    for module in trained:
        original = module.layer.get_base_layer()
        assert isinstance(original, torch.nn.Linear)
        assert num_parameters([module]) == {16: of_16, 32: of_32}[original.in_features]


def test_every_adapted_layer_is_pefts(tmp_path: Path):
    base = loaded("sd1", tmp_path)
    assert all(isinstance(m.layer, LoraLayer) for m in attach(base, Network(), parts_of(base), seed=0))
