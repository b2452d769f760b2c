"""Training from end to end, on the embedded base."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from runs import CPU, SAMPLES, Run, train_run
from tiny import tiny_base

from scumble.configs import files
from scumble.configs.errors import Refused
from scumble.configs.options import Model, Objective, Options
from scumble.datasets.batches import epoch_batches
from scumble.datasets.reading.folder import read_set
from scumble.datasets.reading.images import Size, center_crop, read_size
from scumble.datasets.tensors import cropped
from scumble.trainer import cli
from scumble.trainer.adapters.adapter import read_adapter
from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.adapters.targets import Part
from scumble.trainer.artifacts import share_of_previews
from scumble.trainer.base_model.detect import EMBEDDED, detect_base
from scumble.trainer.base_model.latents import encode_set
from scumble.trainer.base_model.load import load
from scumble.trainer.plan.plan import DEFAULTS
from scumble.trainer.run.events import Event
from scumble.trainer.run.state import ADAPTER, NUMBERS, OPTIMIZER
from scumble.trainer.train import steps_of, train
from scumble.trainer.training.lora import attach
from scumble.trainer.training.objective import Objectives, Sample, generator_for


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(
        tmp_path_factory.mktemp("run"), optimization={"steps": 7}, output={"preview_every": 5, "save_every": 5}
    )


def test_a_run_writes_the_files_that_the_readme_lists(run: Run):
    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert names == {
        "clay.safetensors", "clay.png", "loss.png", "options.toml", "events.jsonl", "previews/grid.png",
        "checkpoints/clay-000005.safetensors", "owner.json", "heartbeat.json", "exit.json",
        *(f"state/{step:06}/{name}" for step in (5, 7) for name in (ADAPTER, OPTIMIZER, NUMBERS)),
        *(f"previews/step{step:06}-{index:02}.png" for step in (0, 5, 7) for index in range(2)),
    }  # fmt: skip


def test_events_are_strict_json_lines_and_equal_those_that_readers_receive(run: Run):
    lines = (run.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    read = [json.loads(line) for line in lines]
    assert [event["kind"] for event in read] == [event["kind"] for event in run.events]
    assert [event["step"] for event in read if event["kind"] == "step"] == list(range(1, 8))
    for event in read:
        if event["kind"] == "preview":
            keys = {"epoch", "step", "prompt_index", "prompt", "seed", "width", "height", "file"}
            assert keys <= event.keys() and (run.folder / event["file"]).is_file()


def test_the_saved_options_reproduce_the_run_bit_for_bit(run: Run, tmp_path: Path):
    again = files.resolve(
        run.folder / "options.toml",
        flags={"output": {"output_dir": str(tmp_path), "preview_every": 0, "save_every": 0}},
    )
    events: list[Event] = []
    result = train(again, [events.append])
    assert result and result.adapter.parent.name == "clay"
    assert [event["loss"] for event in events if event["kind"] == "step"] == run.losses
    first, second = (path.read_bytes() for path in (run.folder / "clay.safetensors", result.adapter))
    start = [8 + int.from_bytes(data[:8], "little") for data in (first, second)]
    assert first[start[0] :] == second[start[1] :]


def test_previews_embed_their_settings(run: Run):
    with Image.open(run.folder / "previews/step000005-01.png") as image:
        assert image.info["parameters"].startswith("red apple, flat style\nSteps: 2, Sampler: ddim, CFG scale: 5.0")


def test_the_metadata_identifies_the_file_and_contains_no_path(run: Run):
    header = (run.folder / "clay.safetensors").read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == "16"
    assert json.loads(metadata["ss_tag_frequency"])["clay-style"]["clay style"] == 20
    assert float(metadata["ss_training_started_at"]) <= float(metadata["ss_training_finished_at"])
    assert json.loads(metadata["ss_dataset_dirs"]) == {"clay-style": {"n_repeats": 1, "img_count": 20}}
    assert all(isinstance(value, str) and "/root" not in value and "/home" not in value for value in metadata.values())
    assert str(SAMPLES.parent) not in str(metadata)


def test_a_second_run_with_the_same_name_gets_its_own_folder(run: Run):
    second = train_run(run.folder.parent.parent, optimization={"steps": 1}, output={"preview_every": 0})
    assert second.folder.name == "clay-2" and (second.folder / "clay-2.safetensors").is_file()


def test_a_dry_run_reports_the_plan_and_writes_nothing(tmp_path: Path):
    plan = train_run(tmp_path, dry_run=True, optimization={"steps": "auto"}).of("plan")[0]
    assert plan["steps"] == 160 and plan["epochs"] == 32
    for fact in ("20 images", "embedded base"):
        assert any(fact in line for line in plan["reasons"])
    assert not list(tmp_path.iterdir())


def test_previews_do_not_affect_training(run: Run, tmp_path: Path):
    without = train_run(tmp_path, optimization={"steps": 7}, output={"preview_every": 0})
    assert "previews: " in run.events[-1]["text"] and "previews: " not in without.events[-1]["text"]
    assert without.losses == run.losses


def test_accumulated_small_batches_equal_one_large_batch(tmp_path: Path):
    def order(batch_size: int, seed: int) -> list[int]:
        return [index for batch in epoch_batches([0] * 20, [1] * 20, batch_size, seed, 0) for index in batch]

    seed = next(seed for seed in range(100) if order(20, seed) == order(10, seed))  # each sample at the same position
    output = {"preview_every": 0, "seed": seed, "save_precision": "fp32"}
    large = train_run(tmp_path / "a", optimization={"steps": 1, "batch_size": 20}, output=output)
    small = train_run(
        tmp_path / "b", optimization={"steps": 1, "batch_size": 10, "gradient_accumulation_steps": 2}, output=output
    )
    assert small.losses == pytest.approx(large.losses, rel=1e-5)
    (one, _), (two, _) = (read_tensors(run.folder / "clay.safetensors") for run in (large, small))
    ups = [name for name in one if name.endswith("lora_up.weight")]
    assert any(one[name].abs().max() > 0 for name in ups)
    # Adam's first step is the sign of the gradient, so the two sums may differ only where that is about 0
    agree = torch.cat([(one[name] - two[name]).abs().flatten() < 1e-4 for name in ups])
    assert float(agree.float().mean()) > 0.99


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_training_lowers_the_loss_compared_with_an_idle_run_on_the_same_samples(optimizer: str, tmp_path: Path):
    def losses(learning_rate: float) -> list[float]:
        options = {
            "steps": 20,
            "optimizer": optimizer,
            "lr_scheduler": "constant",
            "learning_rate": learning_rate,
            "text_encoder_lr": learning_rate,
        }
        return train_run(tmp_path, optimization=options, output={"preview_every": 0}).losses

    assert sum(losses(2e-3)[10:]) < sum(losses(1e-12)[10:])


def test_the_loss_equals_that_of_a_plain_loop_with_diffusers_and_peft():
    model = Model()
    base = load(model, detect_base(model), CPU, torch.float32)
    examples = read_set(SAMPLES).examples[:4]
    crops = [[center_crop(read_size(example.image), Size(64, 64))] for example in examples]
    latents = encode_set(base, [(e.image, c) for e, c in zip(examples, crops, strict=True)])
    layers = attach(base, Options().network, [Part("unet", 4, 4.0), Part("text", 2, 2.0)], seed=0)
    data = Options().data.model_copy(update={"caption_dropout": 0.0})
    objectives = Objectives(base, examples, crops, latents, data, Objective(), seed=3, text_is_trained=True)
    samples = [Sample(index, step=11, position=index) for index in range(4)]
    losses = objectives.losses(samples)
    losses.mean().backward()
    ups = [layer.tensors["lora_up"] for layer in layers]
    ours = [up.grad.clone() for up in ups if up.grad is not None]

    for layer in layers:
        for parameter in layer.tensors.values():
            parameter.grad = None
    scheduler, vae = base.pipeline.scheduler, base.vae
    drawn = []
    for sample in samples:
        generator = generator_for(3, sample.step, sample.position)
        posterior, noise = torch.randn(2, 4, 16, 16, generator=generator)
        drawn.append((posterior, noise, torch.randint(0, 1000, (), generator=generator)))
    posterior, noise, timesteps = (torch.stack(part) for part in zip(*drawn, strict=True))
    mean = torch.stack([one[0] for one in latents.mean])
    std = torch.stack([one[0] for one in latents.std])
    clean = (mean + std * posterior) * vae.config["scaling_factor"]
    ids = base.tokenizers[0](
        [example.caption for example in examples], padding="max_length", return_tensors="pt"
    ).input_ids
    hidden = base.text_encoders[0](ids)[0]
    prediction = base.unet(scheduler.add_noise(clean, noise, timesteps), timesteps, hidden).sample
    abar = scheduler.alphas_cumprod[timesteps]
    weights = (5 * (1 - abar) / abar).clamp(max=1)
    plain = torch.nn.functional.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3)) * weights
    torch.testing.assert_close(losses, plain)
    plain.mean().backward()
    theirs = [up.grad for up in ups if up.grad is not None]
    assert len(ours) == len(theirs) == len(layers)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sd2-v", "sdxl"])
def test_every_family_trains_and_writes_its_label(kind: str, tmp_path: Path):
    run = train_run(
        tmp_path, model={"base": str(tiny_base(kind, tmp_path / kind))}, data={"resolution": 64},
        optimization={"steps": 1, "batch_size": 2},
        network={"text_encoder_rank": 2, "text_encoder_2_rank": 2 if kind == "sdxl" else 0},
        previews={"prompts": ("a",), "num_inference_steps": 1}, output={"preview_every": 1},
    )  # fmt: skip
    assert len(run.losses) == 1
    label = {"sd1": "sd_v1", "sd2": "sd_v2", "sd2-v": "sd_v2", "sdxl": "sdxl_base_v1-0"}[kind]
    assert label.encode() in (run.folder / "clay.safetensors").read_bytes()[:20000]


@pytest.mark.parametrize(
    ("algorithm", "times", "module", "arguments", "note"),
    [
        ("dora", 1, "networks.lora", {"dora_wd": True}, "DoRA: its file is exact in ComfyUI, A1111 and InvokeAI"),
        ("loha", 4, "lycoris.kohya", {"algo": "loha"}, "LoHa: its file loads in ComfyUI, A1111 and Forge"),
        ("lokr", 8, "lycoris.kohya", {"algo": "lokr", "factor": 8}, "LoKr: its file loads in ComfyUI, A1111 and Forge"),
    ],
)
def test_every_algorithm_trains_and_reports_which_programs_load_its_file(
    algorithm: str, times: int, module: str, arguments: dict, note: str, tmp_path: Path
):
    run = train_run(
        tmp_path, network={"algorithm": algorithm}, optimization={"steps": 4, "ema_decay": 0.5},
        machine={"mixed_precision": "bf16", "gradient_checkpointing": True}, output={"preview_every": 4},
    )  # fmt: skip
    (plan,) = run.of("plan")
    assert any(line.startswith(note) and "diffusers" in line for line in plan["reasons"])
    adapter = read_adapter(run.folder / "clay.safetensors")
    assert adapter.kinds == {"lora" if algorithm == "dora" else algorithm}
    assert any(part.delta().abs().max() > 0 for part in adapter.modules.values())
    assert adapter.metadata["ss_network_module"] == module
    assert json.loads(adapter.metadata["ss_network_args"]) == arguments
    defaults = DEFAULTS["sketch"]
    learning_rates = [float(adapter.metadata[name]) for name in ("ss_unet_lr", "ss_text_encoder_lr")]
    assert learning_rates == [times * defaults.learning_rate, times * defaults.text_encoder_lr]
    assert (f"the learning rate is {times} times LoRA's: {note[:4]} then learns as fast" in plan["reasons"]) == (
        times > 1
    )


def test_regularization_images_are_repeated_to_match_the_training_images(tmp_path: Path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    (tmp_path / "reg").mkdir()
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "reg" / "r.png")
    plan = train_run(
        tmp_path / "out",
        dry_run=True,
        data={"images": str(tmp_path)},
        optimization={"epochs": 1, "batch_size": 1, "steps": "auto"},
    )
    assert plan.of("plan")[0]["steps"] == 8


def test_the_last_step_of_an_epoch_may_have_fewer_batches():
    options = Options.model_validate({"optimization": {"gradient_accumulation_steps": 2}, "output": {"seed": 0}})
    plan = SimpleNamespace(batch_size=2)
    job: Any = SimpleNamespace(options=options, plan=plan, buckets=["a"] * 5, repeats=[1] * 5)
    steps = list(steps_of(job, 5))
    assert [(step, epoch) for step, epoch, _ in steps] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]
    assert [len(batches) for _, _, batches in steps] == [2, 1, 2, 1, 2]
    for epoch in (0, 1):
        batches_of_epoch = [batches for _, one, batches in steps if one == epoch]
        indices = [index for batches in batches_of_epoch for batch in batches for index in batch]
        assert sorted(indices) == list(range(5))


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"data": {"images": ""}}, "train: no images given; name a folder"),
        ({"data": {"images": "/nowhere"}}, "/nowhere: no such folder or TOML file"),
        ({"optimization": {"steps": 3, "epochs": 2}}, "--steps 3 and --epochs 2: give only one of them"),
        ({"network": {"text_encoder_2_rank": 4}}, "--text-encoder-2-rank 4: Stable Diffusion 1 has one text encoder"),
        (
            {"machine": {"device": "cpu", "mixed_precision": "fp16"}},
            "--mixed-precision fp16: not supported on the cpu device",
        ),
        (
            {"objective": {"min_timestep": 900, "max_timestep": 100}},
            "--min-timestep 900: above --max-timestep 100, so no timestep is left",
        ),
        (
            {"optimization": {"optimizer": "prodigy", "learning_rate": 0.5, "text_encoder_lr": 1.0}},
            "--text-encoder-lr 1: prodigy uses one learning rate for all parts",
        ),
        ({"machine": {"attention": "xformers"}}, "--attention xformers: supports only cuda devices"),
        (
            {"network": {"algorithm": "loha", "lora_dropout": 0.1}},
            "--lora-dropout 0.1: not available with --algorithm loha; use lora or dora",
        ),
        (
            {"network": {"algorithm": "lokr", "rslora": True}},
            "--rslora: not available with --algorithm lokr; use lora or dora",
        ),
        ({"model": {"base": "model.ckpt"}}, "a pickle can execute arbitrary code"),
        ({"model": {"base": "none.safetensors"}}, "--base none.safetensors: no such file"),
    ],
)
def test_invalid_options_are_refused_before_weights_are_loaded(tables: dict, line: str, tmp_path: Path):
    with pytest.raises(Refused, match=line):
        train_run(tmp_path, **tables)
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_created_is_refused_before_weights_are_loaded(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match=r"--output-dir .*file: .* cannot be created \(Not a directory\)") as error:
        train_run(tmp_path, output={"output_dir": str(tmp_path / "file")})
    assert error.value.exit_code == 73


def test_the_command_trains_and_prints_the_path_of_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli.main([
        "train", str(SAMPLES), "--steps", "1", "--preview-every", "0", "--output-dir", str(tmp_path),
        "--output-name", "it",
    ])  # fmt: skip
    out = capsys.readouterr().out.replace("\n", "")
    assert "20 images" in out and "trainable parameters" in out and "it.safetensors" in out


def test_steps_equal_those_of_peft_and_the_adamw_of_torch(tmp_path: Path):
    wanted = {
        "steps": 5,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0.0,
        "learning_rate": 2e-3,
        "text_encoder_lr": 1e-3,
        "max_grad_norm": 0.05,
    }
    output = {"preview_every": 0, "save_precision": "fp32", "seed": 4}
    run = train_run(tmp_path, data={"caption_dropout": 0.0}, optimization=wanted, output=output)
    ours, _ = read_tensors(run.folder / "clay.safetensors")

    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    unet, encoder, scheduler = pipeline.unet, pipeline.text_encoder, pipeline.scheduler
    unet.requires_grad_(False), encoder.requires_grad_(False), pipeline.vae.requires_grad_(False)
    texts = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), unet)
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=texts), encoder)
    stems: dict[str, torch.nn.Parameter] = {}
    for prefix, component in (("lora_unet_", unet), ("lora_te_text_model_", encoder)):
        for name, parameter in component.named_parameters():
            if "lora_" in name:
                path, _, which = name.partition(".lora_")
                stem = prefix + path.removeprefix("text_model.").replace(".", "_")
                stems[f"{stem}.lora_{'down' if which[0] == 'A' else 'up'}.weight"] = parameter
    initial = train_run(
        tmp_path / "start", optimization={"steps": 1, "learning_rate": 1e-30, "text_encoder_lr": 1e-30}, output=output
    )
    start, _ = read_tensors(initial.folder / "clay.safetensors")
    for name, parameter in stems.items():
        parameter.data.copy_(start[name])
        parameter.requires_grad_(True)
    groups = [{"params": [p for name, p in stems.items() if name.startswith(prefix)], "lr": learning_rate}
              for prefix, learning_rate in (("lora_unet", 2e-3), ("lora_te", 1e-3))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    examples = read_set(SAMPLES).examples
    posteriors = []
    for example in examples:
        pixels = cropped(example.image, center_crop(read_size(example.image), Size(64, 64)))[None]
        posteriors.append(pipeline.vae.encode(pixels).latent_dist)
    losses = []
    for step, batch in enumerate(epoch_batches([0] * 20, [1] * 20, 4, 4, 0)[:5]):
        clean, noise, timesteps = [], [], []
        for position, index in enumerate(batch):
            generator = generator_for(4, step, position)
            posterior, eps = torch.randn(2, 4, 16, 16, generator=generator)
            clean.append((posteriors[index].mean + posteriors[index].std * posterior)[0])
            noise.append(eps)
            timesteps.append(torch.randint(0, 1000, (), generator=generator))
        t, eps = torch.stack(timesteps), torch.stack(noise)
        noisy = scheduler.add_noise(torch.stack(clean) * pipeline.vae.config["scaling_factor"], eps, t)
        window = pipeline.tokenizer.model_max_length
        ids = pipeline.tokenizer(
            [examples[index].caption for index in batch], padding="max_length", max_length=window, return_tensors="pt"
        ).input_ids
        prediction = unet(noisy, t, encoder(ids)[0]).sample
        abar = scheduler.alphas_cumprod[t]
        loss = ((prediction - eps).pow(2).mean((1, 2, 3)) * (5 * (1 - abar) / abar).clamp(max=1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(stems.values()), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert run.losses == pytest.approx(losses, rel=1e-4)
    assert stems.keys() == {name for name in ours if not name.endswith(".alpha")}
    for name, parameter in stems.items():  # Adam's steps have the size of the learning rate, whatever the gradient
        close = (ours[name] - parameter.detach()).abs() < 2e-5
        assert float(close.float().mean()) > 0.99, name


def test_ctrl_c_finishes_the_step_saves_and_prints_how_to_resume(tmp_path: Path):
    command = [
        sys.executable, "-m", "scumble.trainer.cli", "train", str(SAMPLES), "--steps", "5000", "--preview-every", "0",
        "--save-every", "0", "--output-dir", str(tmp_path), "--output-name", "cut", "--json",
    ]  # fmt: skip
    events: list[Event] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["kind"] == "step" and events[-1]["step"] == 3:
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    done = events[-1]
    assert done["kind"] == "done" and done["stopped"] and 3 <= done["step"] < 5000
    assert f"stopped after step {done['step']} of 5000; resume with `scumble train {tmp_path / 'cut'}`" in done["text"]
    _, metadata = read_tensors(tmp_path / "cut" / "cut.safetensors")
    assert metadata["ss_steps"] == str(done["step"])


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_finite_weights(tmp_path: Path):
    wanted = {
        "steps": 50,
        "learning_rate": 100.0,
        "text_encoder_lr": 100.0,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0.0,
    }
    with pytest.raises(
        Refused,
        match=r"step \d+: the (loss|gradient) is not finite, as in the 11 steps before; try a lower --learning.*clay",
    ):
        train_run(tmp_path, optimization=wanted, output={"preview_every": 0})
    tensors, _ = read_tensors(tmp_path / "runs/clay/clay.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("optimizer", ["adamw8bit", "lion", "prodigy", "schedule_free"])
def test_every_optimizer_of_the_extra_trains_and_saves_its_weights(optimizer: str, tmp_path: Path):
    run = train_run(tmp_path, optimization={"optimizer": optimizer, "steps": 8}, output={"preview_every": 4})
    assert len(run.losses) == 8
    tensors, metadata = read_tensors(run.folder / "clay.safetensors")
    assert metadata["ss_optimizer"] == optimizer
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if name.endswith("lora_up.weight"))
    reasons = " ".join(run.of("plan")[0]["reasons"])
    expected = {"prodigy": "times its own estimate", "schedule_free": "schedule_free, constant, learning rate"}
    assert expected.get(optimizer, f"{optimizer}, cosine, learning rate") in reasons


def test_dropout_depends_on_the_step_only_so_that_previews_do_not_change_it(tmp_path: Path):
    network = {"lora_dropout": 0.3}
    with_previews = train_run(tmp_path / "a", network=network, optimization={"steps": 4}, output={"preview_every": 1})
    without = train_run(tmp_path / "b", network=network, optimization={"steps": 4}, output={"preview_every": 0})
    assert with_previews.losses == without.losses
    plain = train_run(tmp_path / "c", optimization={"steps": 4}, output={"preview_every": 0})
    assert plain.losses[0] == without.losses[0]  # up is still 0, so dropout has no effect
    assert plain.losses[3] != without.losses[3]


def test_a_measured_pass_follows_the_plan(run: Run):
    (measured,) = run.of("measured")
    assert measured["seconds"] > 0 and measured["memory_mb"] > 0 and measured["gradient_checkpointing"] is False
    assert "7 steps in about" in measured["text"]
    kinds = [event["kind"] for event in run.events]
    assert kinds.index("plan") < kinds.index("measured") < kinds.index("step")


def test_the_last_preview_matches_stock_diffusers_with_the_exported_file(run: Run):
    stock = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(run.folder / "clay.safetensors"))
    for index, event in enumerate(run.of("preview")[-2:]):
        expected = stock(
            event["prompt"], num_inference_steps=2, guidance_scale=5.0,
            generator=torch.Generator().manual_seed(event["seed"]),
        ).images[0]  # fmt: skip
        preview = Image.open(run.folder / event["file"])
        difference = np.abs(np.asarray(preview, dtype=int) - np.asarray(expected, dtype=int))
        assert difference.max() <= 3, index  # the file is in fp16


def test_the_moving_average_is_saved_and_training_continues_from_the_live_weights(tmp_path: Path):
    optimization, output = {"steps": 4, "lr_scheduler": "constant"}, {"preview_every": 2, "save_precision": "fp32"}
    live = train_run(tmp_path / "a", optimization=optimization, output=output | {"save_every": 1})
    averaged = train_run(tmp_path / "b", optimization=optimization | {"ema_decay": 0.5}, output=output)
    assert averaged.losses == live.losses
    states = [read_tensors(path)[0] for path in sorted((live.folder / "checkpoints").glob("*.safetensors"))]
    states.append(read_tensors(live.folder / "clay.safetensors")[0])
    saved, _ = read_tensors(averaged.folder / "clay.safetensors")
    for name in (name for name in saved if name.endswith("lora_up.weight")):
        mean = torch.zeros_like(saved[name])  # up starts at 0
        for state in states:
            mean = 0.5 * mean + 0.5 * state[name]
        torch.testing.assert_close(saved[name], mean, rtol=1e-5, atol=1e-8)


def test_the_loss_depends_on_prior_loss_weight_and_mirrored_crops():
    base = load(Model(), detect_base(Model()), CPU, torch.float32)
    examples = [
        replace(example, is_regularization=index == 1) for index, example in enumerate(read_set(SAMPLES).examples[:2])
    ]
    upright = [center_crop(read_size(example.image), Size(64, 64)) for example in examples]
    crops = [[crop, replace(crop, mirrored=True)] for crop in upright]
    latents = encode_set(base, [(e.image, c) for e, c in zip(examples, crops, strict=True)])
    samples = [Sample(0, 0, 0), Sample(1, 0, 1)]

    def losses(**changes: object) -> list[float]:
        data = Options().data.model_copy(update={"caption_dropout": 0.0} | changes)
        objectives = Objectives(base, examples, crops, latents, data, Objective(), seed=1, text_is_trained=False)
        with torch.no_grad():
            return objectives.losses(samples).tolist()

    plain, weighted = losses(), losses(prior_loss_weight=0.25)
    assert weighted == pytest.approx([plain[0], 0.25 * plain[1]])
    for mean, example, crop in zip(latents.mean, examples, upright, strict=True):
        mirrored = base.vae.encode(cropped(example.image, crop).flip(-1)[None]).latent_dist.mean[0]
        torch.testing.assert_close(mean[1], mirrored, rtol=1e-4, atol=1e-4)


def test_previews_above_preview_share_are_skipped_except_the_first_and_the_last(tmp_path: Path):
    output = {"preview_every": 1, "save_every": 0}
    previews = {"prompts": ("owl",), "num_inference_steps": 2, "preview_share": 0.0}
    run = train_run(tmp_path, optimization={"steps": 3}, output=output, previews=previews)
    assert [event["step"] for event in run.of("preview")] == [0, 3]
    assert [event["text"] for event in run.of("note") if "--preview-share" in event["text"]] == [
        "  preview at step 1 skipped (--preview-share)", "  preview at step 2 skipped (--preview-share)",
    ]  # fmt: skip
    assert "% of run time" in run.of("done")[0]["text"]
    assert share_of_previews([], 5.0) == 0 and share_of_previews([1.0, 3.0], 6.0) == 0.5
