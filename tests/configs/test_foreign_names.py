"""Options of other trainers: every known name has a row, and every row names one of our options or a reason.

The names come from public sources: kohya-ss/sd-scripts train_network.py 0010c81a, library/train_util.py 0030aa90
(mirror CrazyForks/sd-scripts), config_util.py 02534721, networks/lora.py 02298e3c, docs/loha_lokr.md 62db7eb2;
KohakuBlueleaf/LyCORIS lycoris/kohya.py 044492d5; bmaltais/kohya_ss presets/lora/*.json 647295aa, 6ee01019;
huggingface/diffusers examples 000280f5, 23cf7123 and 0.35 in miias/diffusers_updated b0c6d134; Nerogar/OneTrainer
TrainConfig.py 00f380ac, training_presets 0650480b and 221092c0; ostris/ai-toolkit config/examples 016777ac, 19f32126.
"""

import pytest
from pydantic import ValidationError

from scumble.configs import foreign_names
from scumble.configs.foreign_names import AI_TOOLKIT, DIFFUSERS, KOHYA, ONETRAINER, VALUES, Foreign, hint, plain
from scumble.configs.options import Options, declared

TABLES = {"diffusers": DIFFUSERS, "kohya": KOHYA, "OneTrainer": ONETRAINER, "ai-toolkit": AI_TOOLKIT}

KOHYA_TRAIN_NETWORK = """
v2 v_parameterization pretrained_model_name_or_path tokenizer_cache_dir
metadata_title metadata_author metadata_description metadata_license metadata_tags metadata_usage_hint
metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor metadata_is_negative_embedding
train_data_dir cache_info shuffle_caption caption_separator caption_extension caption_extention keep_tokens
keep_tokens_separator secondary_separator enable_wildcard caption_prefix caption_suffix color_aug flip_aug
face_crop_aug_range random_crop debug_dataset resolution cache_latents vae_batch_size cache_latents_to_disk
skip_cache_check enable_bucket min_bucket_reso max_bucket_reso skip_image_resolution bucket_reso_steps
bucket_no_upscale resize_interpolation token_warmup_min token_warmup_step alpha_mask dataset_class train_inpainting
caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate reg_data_dir in_json dataset_repeats
output_dir output_name huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token
huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload save_precision
save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state
save_last_n_steps save_last_n_steps_state save_state save_state_on_train_end resume train_batch_size max_token_length
mem_eff_attn torch_compile dynamo_backend xformers sdpa vae max_train_steps max_train_epochs
max_data_loader_n_workers persistent_data_loader_workers seed gradient_checkpointing gradient_accumulation_steps
mixed_precision full_fp16 full_bf16 fp8_base ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph clip_skip
logging_dir log_with log_prefix log_tracker_name wandb_run_name log_tracker_config wandb_api_key log_config
noise_offset noise_offset_random_strength multires_noise_iterations ip_noise_gamma ip_noise_gamma_random_strength
multires_noise_discount adaptive_noise_scale zero_terminal_snr min_timestep max_timestep loss_type huber_schedule
huber_c huber_scale lowram highvram sample_every_n_steps sample_at_first sample_every_n_epochs sample_prompts
sample_sampler config_file output_config prior_loss_weight conditioning_data_dir masked_loss
deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device
offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients
optimizer_type use_8bit_adam use_lion_optimizer learning_rate max_grad_norm optimizer_args lr_scheduler_type
lr_scheduler_args lr_scheduler lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power
fused_backward_pass lr_scheduler_timescale lr_scheduler_min_lr_ratio dataset_config
min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss weighted_captions
console_log_level console_log_file console_log_simple
cpu_offload_checkpointing no_metadata save_model_as unet_lr text_encoder_lr fp8_base_unet network_weights
network_module network_dim network_alpha network_dropout network_args network_train_unet_only
network_train_text_encoder_only training_comment dim_from_weights scale_weight_norms base_weights
base_weights_multiplier no_half_vae skip_until_initial_step initial_epoch initial_step validation_seed
validation_split validate_every_n_steps validate_every_n_epochs max_validation_steps
"""
KOHYA_SDXL = "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk disable_mmap_load_safetensors"
KOHYA_NETWORK_ARGS = """
conv_dim conv_alpha block_dims block_alphas conv_block_dims conv_block_alphas down_lr_weight mid_lr_weight up_lr_weight
block_lr_zero_threshold rank_dropout module_dropout loraplus_lr_ratio loraplus_unet_lr_ratio
loraplus_text_encoder_lr_ratio exclude_patterns include_patterns network_reg_lrs network_reg_dims verbose
algo preset factor dropout use_tucker use_cp use_conv_cp disable_conv_cp use_scalar block_size train_norm constraint
rescaled dora_wd wd_on_output full_matrix bypass_mode rs_lora unbalanced_factorization decompose_both
"""
KOHYA_DATASET = """
image_dir num_repeats class_tokens is_reg metadata_file batch_size custom_attributes network_multiplier
"""
KOHYA_GUI = """
LoRA_type LyCORIS_preset additional_parameters constrain conv_alphas conv_dims dynamo_mode dynamo_use_dynamic
dynamo_use_fullgraph epoch extra_accelerate_launch_args gpu_ids lora_network_weights lowvram lr_warmup
main_process_port max_resolution model_list multi_gpu no_token_padding noise_offset_type num_cpu_threads_per_process
num_machines num_processes optimizer rank_dropout_scale save_as_bool sdxl sdxl_cache_text_encoder_outputs
sdxl_no_half_vae split_mode stop_text_encoder_training train_on_input unit use_wandb
"""
DIFFUSERS_TEXT_TO_IMAGE = """
pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir image_column
caption_column validation_prompt num_validation_images validation_epochs max_train_samples output_dir cache_dir seed
resolution center_crop random_flip train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps
gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps snr_gamma use_8bit_adam allow_tf32
dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token
prediction_type hub_model_id logging_dir mixed_precision report_to local_rank checkpointing_steps
checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention noise_offset rank
image_interpolation_mode
"""
DIFFUSERS_TEXT_TO_IMAGE_SDXL = (
    DIFFUSERS_TEXT_TO_IMAGE
    + "pretrained_vae_model_name_or_path train_text_encoder enable_npu_flash_attention debug_loss"
)
DIFFUSERS_DREAMBOOTH = """
pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir class_data_dir instance_prompt
class_prompt validation_prompt num_validation_images validation_epochs with_prior_preservation prior_loss_weight
num_class_images output_dir seed resolution center_crop train_text_encoder train_batch_size sample_batch_size
num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles
lr_power dataloader_num_workers use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision prior_generation_precision
local_rank enable_xformers_memory_efficient_attention pre_compute_text_embeddings tokenizer_max_length
text_encoder_use_attention_mask validation_images class_labels_conditioning rank lora_dropout
image_interpolation_mode
"""
DIFFUSERS_DREAMBOOTH_SDXL = """
pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant dataset_name dataset_config_name
instance_data_dir cache_dir image_column caption_column repeats class_data_dir instance_prompt class_prompt
validation_prompt num_validation_images validation_epochs do_edm_style_training with_prior_preservation
prior_loss_weight num_class_images output_dir output_kohya_format seed resolution center_crop random_flip
train_text_encoder train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
text_encoder_lr scale_lr lr_scheduler snr_gamma lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers
optimizer use_8bit_adam adam_beta1 adam_beta2 prodigy_beta3 prodigy_decouple adam_weight_decay
adam_weight_decay_text_encoder adam_epsilon prodigy_use_bias_correction prodigy_safeguard_warmup max_grad_norm
push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision prior_generation_precision
local_rank enable_xformers_memory_efficient_attention rank lora_dropout use_dora image_interpolation_mode
crops_coords_top_left_h crops_coords_top_left_w
"""
ONETRAINER_TRAIN_CONFIG = """
training_method model_type debug_mode debug_dir workspace_dir cache_dir tensorboard tensorboard_expose
tensorboard_always_on tensorboard_port validation validate_after validate_after_unit continue_last_backup
prevent_overwrites include_train_config multi_gpu device_indexes gradient_reduce_precision fused_gradient_reduce
async_gradient_reduce async_gradient_reduce_buffer base_model_name output_dtype output_model_format
output_model_destination async_offloading force_circular_padding compile concept_file_name concepts
aspect_ratio_bucketing image_caching text_caching clear_cache_before_training learning_rate_scheduler
custom_learning_rate_scheduler scheduler_params learning_rate learning_rate_warmup_steps learning_rate_cycles
learning_rate_min_factor epochs batch_size gradient_accumulation_steps ema ema_decay ema_update_step_interval
caching_threads prefetch_next_batch train_device temp_device train_dtype fallback_train_dtype enable_autocast_cache
only_cache resolution frames attention_mechanism mse_strength mae_strength log_cosh_strength huber_strength
huber_delta vb_loss_strength loss_weight_fn loss_weight_strength dropout_probability loss_scaler
learning_rate_scaler clip_grad_norm offset_noise_weight generalized_offset_noise perturbation_noise_weight
rescale_noise_scheduler_to_zero_terminal_snr force_v_prediction force_epsilon_prediction min_noising_strength
max_noising_strength timestep_distribution noising_weight noising_bias timestep_shift dynamic_timestep_shifting
cep_gamma prior transformer unconditional_transformer quantization text_encoder_layer_skip
text_encoder_sequence_length text_encoder_2_layer_skip text_encoder_2_sequence_length text_encoder_3
text_encoder_3_layer_skip text_encoder_4 text_encoder_4_layer_skip effnet_encoder decoder decoder_text_encoder
decoder_vqgan masked_training unmasked_probability unmasked_weight normalize_masked_area_loss
masked_prior_preservation_weight custom_conditioning_image layer_filter layer_filter_preset layer_filter_regex
embedding_learning_rate preserve_embedding_norm embedding additional_embeddings embedding_weight_dtype cloud
peft_type lora_model_name lora_rank lora_alpha lora_decompose lora_decompose_norm_epsilon lora_decompose_output_axis
lora_weight_dtype bundle_additional_embeddings oft_block_size oft_block_share dora_oft oft_scaled oft_clipped_norm
oft_cans lokr_dim lokr_decompose_both lokr_decompose_factor lokr_use_tucker lokr_weight_decompose
lokr_dora_on_output lokr_full_matrix lokr_vec_trick optimizer optimizer_defaults sample_definition_file_name samples
sample_after sample_after_unit sample_skip_first sample_image_format sample_video_format sample_audio_format
samples_to_tensorboard non_ema_sampling backup_after backup_after_unit rolling_backup rolling_backup_count
backup_before_save save_every save_every_unit save_skip_first save_filename_prefix secrets
unet.learning_rate unet.train unet.weight_dtype unet.stop_training_after unet.gradient_checkpointing
text_encoder.learning_rate text_encoder.train text_encoder.weight_dtype text_encoder.stop_training_after_unit
text_encoder_2.learning_rate text_encoder_2.train text_encoder_2.train_embedding vae.model_name vae.weight_dtype
optimizer.optimizer optimizer.weight_decay optimizer.beta1 concepts[0].path concepts[0].image.enable_random_flip
concepts[0].text.enable_tag_shuffling samples[0].prompt samples[0].negative_prompt samples[0].cfg_scale
"""
ONETRAINER_OLD_PRESETS = """
extra_model_name weight_dtype text_encoder_weight_dtype unet_weight_dtype vae_weight_dtype circular_mask_generation
random_rotate_and_crop latent_caching latent_caching_epochs weight_decay train_text_encoder train_text_encoder_epochs
text_encoder_learning_rate train_unet train_unet_epochs unet_learning_rate token_count initial_embedding_text
save_after save_after_unit min_snr_gamma gradient_checkpointing dataloader_threads lora_layers lora_layer_preset
lora_layers_regex text_encoder_2_weight_dtype train_text_encoder_2 text_encoder_2_learning_rate
"""
AI_TOOLKIT_EXAMPLES = """
job config.name meta.name meta.version config.process[0].type config.process[0].training_folder
config.process[0].performance_log_every config.process[0].device config.process[0].trigger_word
config.process[0].network.type network.linear network.linear_alpha network.network_kwargs.ignore_if_contains
save.dtype save.save_every save.max_step_saves_to_keep save.push_to_hub save.hf_repo_id save.hf_private
datasets[0].folder_path datasets[0].caption_ext datasets[0].caption_dropout_rate datasets[0].shuffle_tokens
datasets[0].cache_latents_to_disk datasets[0].resolution datasets[0].default_caption datasets[0].trigger_word
datasets[0].control_path datasets[0].inpaint_path datasets[0].controls datasets[0].num_frames
train.batch_size train.steps train.gradient_accumulation_steps train.gradient_accumulation train.train_unet
train.train_text_encoder train.gradient_checkpointing train.noise_scheduler train.optimizer train.lr
train.optimizer_params.weight_decay train.skip_first_sample train.disable_sampling train.linear_timesteps
train.timestep_type train.ema_config.use_ema train.ema_config.ema_decay train.dtype train.bypass_guidance_embedding
train.cache_text_embeddings train.unload_text_encoder train.switch_boundary_every
model.name_or_path model.extras_name_or_path model.arch model.is_flux model.is_v3 model.quantize model.quantize_te
model.qtype model.qtype_te model.low_vram model.assistant_lora_path model.model_kwargs.llama_model_path
model.model_kwargs.invert_inpaint_mask_chance model.model_kwargs.inpaint_dropout model.model_kwargs.control_dropout
model.model_kwargs.inpaint_random_chance model.model_kwargs.do_random_inpainting model.model_kwargs.random_blur_mask
model.model_kwargs.random_dialate_mask model.model_kwargs.train_high_noise model.model_kwargs.train_low_noise
sample.sampler sample.sample_every sample.sample_start_step sample.width sample.height sample.prompts
sample.samples[0].prompt sample.samples[0].ctrl_img_1 sample.neg sample.seed sample.walk_seed sample.guidance_scale
sample.sample_steps sample.num_frames sample.fps
"""


@pytest.mark.parametrize(
    ("table", "listed"),
    [
        (KOHYA, KOHYA_TRAIN_NETWORK),
        (KOHYA, KOHYA_SDXL),
        (KOHYA, KOHYA_NETWORK_ARGS),
        (KOHYA, KOHYA_DATASET),
        (KOHYA, KOHYA_GUI),
        (DIFFUSERS, DIFFUSERS_TEXT_TO_IMAGE),
        (DIFFUSERS, DIFFUSERS_TEXT_TO_IMAGE_SDXL),
        (DIFFUSERS, DIFFUSERS_DREAMBOOTH),
        (DIFFUSERS, DIFFUSERS_DREAMBOOTH_SDXL),
        (ONETRAINER, ONETRAINER_TRAIN_CONFIG),
        (ONETRAINER, ONETRAINER_OLD_PRESETS),
        (AI_TOOLKIT, AI_TOOLKIT_EXAMPLES),
    ],
)
def test_every_listed_name_has_a_row_and_a_hint(table: dict[str, Foreign], listed: str):
    names = listed.split()
    assert len(names) == len(set(names))
    assert [name for name in names if plain(name) not in table] == []
    assert all(hint(name) for name in names)


@pytest.mark.parametrize("trainer", TABLES)
def test_a_row_names_an_existing_option_or_a_reason(trainer: str):
    keys = {entry.key for entry in declared()}
    for name, row in TABLES[trainer].items():
        assert plain(name) == name
        assert bool(row.option) != bool(row.reason), name
        assert not row.option or row.option in keys, (name, row.option)
        assert row.option or not row.note, name


@pytest.mark.parametrize("trainer", TABLES)
def test_reasons_and_notes_are_short_and_name_existing_flags(trainer: str):
    flags = {entry.flag for entry in declared()} | {"--resume", "--json", "--no-bucket-upscale"}
    prompt_flags = {"--n", "--w", "--h", "--d", "--l", "--s"}
    for name, row in TABLES[trainer].items():
        words = f"{row.note} {row.reason}".replace(";", "").replace(",", "").replace(":", "").split()
        assert {word for word in words if word.startswith("--")} <= flags | prompt_flags, name
        assert len(hint(name)) <= 130 and "\n" not in hint(name) and not hint(name).endswith("."), name


def test_a_duplicate_name_is_an_error():
    assert foreign_names.table("seed", {"a. b. c": Foreign("rank"), "d": Foreign("alpha")}) == {
        "seed": Foreign("seed"), "a.c": Foreign("rank"), "b.c": Foreign("rank"), "d": Foreign("alpha"),
    }  # fmt: skip
    for rows in ({"seed": Foreign("rank")}, {"a b": Foreign("rank"), "b": Foreign("rank")}):
        with pytest.raises(ValueError, match="duplicate name"):
            foreign_names.table("seed", rows)


def test_values_map_to_valid_values_of_the_option():
    tables = {entry.key: entry.table for entry in declared()}
    for option, values in VALUES.items():
        for theirs, ours in values.items():
            Options.model_validate({tables[option]: {option: ours}})
            assert theirs == theirs.lower() != ours
            with pytest.raises(ValidationError):
                Options.model_validate({tables[option]: {option: theirs}})


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("--train_batch_size", "use --batch-size (total over all devices)"),
        ("--train-batch-size", "use --batch-size (total over all devices)"),
        ("train_batch_size", "use --batch-size (total over all devices)"),
        ("--pretrained_vae_model_name_or_path", "use --vae"),
        ("--center-crop", "use --crop (center is the default; diffusers crops at random without the flag)"),
        ("--push_to_hub", "not supported: scumble uploads nothing"),
        ("--network_dropout", "use --lora-dropout (applied to the adapter's input, not after the down projection)"),
        ("--max-train-epochs", "use --epochs"),
        ("--deepspeed", "DeepSpeed is not supported: a run uses one process on one device"),
        ("conv_dim", "use --conv-rank (for all convolutions; kohya uses network_dim for 1x1)"),
        ("LoRA_type", "use --algorithm (lora, loha or lokr; for LoCon, use lora with --conv-rank)"),
        ("--lora-decompose", "use --algorithm (dora)"),
        ("text_encoder.learning_rate", "use --text-encoder-lr"),
        ("concepts[0].image.enable_random_flip", "use --random-flip"),
        ("enable_random_flip", "use --random-flip"),
        ("config.process[0].network.linear", "use --rank (for the UNet; --text-encoder-rank is separate)"),
        ("train.steps", "use --steps (optimizer steps)"),
        ("--caption-ext", "captions are read from files next to the images: .txt, .caption, metadata.jsonl or .csv"),
        ("sample_steps", "use --num-inference-steps"),
    ],
)  # fmt: skip
def test_a_hint_is_one_line_for_any_spelling_of_the_name(name: str, line: str):
    assert hint(name) == line


def test_if_trainers_disagree_diffusers_takes_precedence_then_kohya():
    assert DIFFUSERS["resolution"] != KOHYA["resolution"] != ONETRAINER["resolution"]
    assert DIFFUSERS["resolution"].note in hint("resolution")
    assert KOHYA["min_snr_gamma"] != ONETRAINER["min_snr_gamma"] and KOHYA["min_snr_gamma"].note in hint(
        "min_snr_gamma"
    )


@pytest.mark.parametrize("name", ["", "--", "rnk", "--frobnicate", "train", "dtype", "config", "a.b"])
def test_an_unknown_or_ambiguous_name_has_no_hint(name: str):
    assert hint(name) == ""
