"""Maps the options of other trainers to ours: kohya's sd-scripts and GUI, diffusers' scripts, OneTrainer, ai-toolkit.

Used to answer unknown flags and TOML keys. Keys of nested files are dotted, without `config.process[0]` and without
indices: `train.lr`, `datasets.folder_path`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """An option of another trainer: our `option`, or "" and the `reason` why we have none.

    `note` is the value to use, or explains how our option differs.
    """

    option: str = ""
    note: str = ""
    reason: str = ""


to = Foreign


def no(reason: str) -> Foreign:
    return Foreign(reason=reason)


def table(ours: str, rows: Mapping[str, Foreign]) -> dict[str, Foreign]:
    """Build a table with one entry per name. The names in `ours` mean the same in both trainers.

    A key of `rows` contains several names; prefixes, which end with a dot, are combined with each of them. Raises
    `ValueError` for a duplicate name.
    """
    entries = {name: Foreign(name) for name in ours.split()}
    for words, row in rows.items():
        prefixes = [word for word in words.split() if word.endswith(".")] or [""]
        for name in (prefix + word for prefix in prefixes for word in words.split() if not word.endswith(".")):
            if name in entries:
                raise ValueError(f"duplicate name: {name}")
            entries[name] = row
    return entries


IMAGES = to("images", "or pass the folder: scumble train photos/")
GLOBAL_BATCH = to("batch_size", "total over all devices")
TEXT_ENCODER = to("text_encoder_rank", "0: not trained")
V_PREDICTION = to("prediction_type", "v_prediction")
DORA = to("algorithm", "dora")
AFTER_DOWN = to("lora_dropout", "applied to the adapter's input, not after the down projection")
ADAMW8BIT = to("optimizer", "adamw8bit")
XFORMERS = to("attention", "xformers")
SQUARE = to("resolution", "one number: the side of a square with the same area")
PREVIEW_SIDE = to("preview_size", "square; --w and --h in a prompt set other sizes")
MIN_SNR = to("min_snr_gamma", "min-SNR weighting is on by default; --loss-weighting none turns it off")
VALIDATED = to("save_every", "the validation loss is measured whenever an adapter is saved")
KEEP_COUNT = to("keep_count", "with --keep-checkpoints last")
BASE_PRECISION = to("mixed_precision", "for the whole base model")
LAYERS = to("targets", "one regex that must match the full layer path")
QUANTIZED = to("base_quantization", "int8 or nf4")

NOT_SUPPORTED = no("not supported")
OTHER_BASES = no("only for other models; scumble supports SD 1.x, SD 2.x and SDXL")
DETECTED = no("detected automatically from the base model")
ONE_PROCESS = no("not supported: a run uses one process on one device")
NO_UPLOAD = no("not supported: scumble uploads nothing")
NO_TRACKER = no("no TensorBoard or W&B; the run folder has a loss plot and events.jsonl, and --json prints events")
NO_LOADER = no("not needed: latents are encoded before training, without a data loader")
CACHED = no("latents are always cached; --latent-cache sets the folder")
TEXT_CACHED = no("text embeddings are always cached if the text encoders are not trained")
RESUMED = no("to resume, run `scumble train runs/NAME`, or repeat the command with --resume (no value)")
STATE = no("the training state is always saved with each adapter")
NEW_ADAPTER = no("not supported: training starts with a new adapter; merge an old one with `scumble adapter bake`")
METADATA = no("not supported: the file metadata describes the run, the images and the trigger words")
SAFETENSORS = no("adapters are always saved as .safetensors")
FP32_ADAPTER = no("the adapter is always fp32; --mixed-precision applies to the base model")
CAPTIONS = no("captions are read from files next to the images: .txt, .caption, metadata.jsonl or .csv")
COMMAS = no("tags are separated by commas; --keep-tags sets how many stay at the front")
BUCKETS = no("always on: each image is assigned to a bucket by its aspect ratio")
LANCZOS = no("images are always resized with Lanczos")
COLORS = no("not supported: colors and shapes are part of what the adapter learns; use --random-flip")
LYCORIS = no("not supported; scumble has --algorithm loha and lokr, --lokr-factor and --conv-rank")
CURVE = no("not supported; --lr-scheduler has constant, linear, cosine, cosine_with_restarts and rex")
DECAY_ONLY = no("not supported; the only optimizer setting is --weight-decay")
TIMESTEPS = no("timesteps are sampled uniformly; see --loss-weighting, --min-timestep and --max-timestep")
MEMORY = no("set automatically; to save memory, use --gradient-checkpointing or --base-quantization")
VAE_DTYPE = no("not needed: the VAE never runs in fp16")
CLIP_SKIP = no("not supported: text is encoded the way the base model was trained")
TOKENS = no("captions are truncated to the 75 tokens that CLIP reads; `scumble check` lists longer ones")
MASK_FILES = no("masks are read from files next to the images or in masks/; --masks auto uses them")
EMBEDDINGS = no("textual inversion is not supported: only adapters are trained")
VIDEO = no("not supported: images only")
CONTROLS = no("not supported: training is conditioned on captions only")
SPAN = no("not supported: all parts are trained for the whole run")
FIRST_PREVIEW = no("the first previews are always rendered before training")

DIFFUSERS = table(
    "output_dir seed random_flip repeats rank lora_dropout learning_rate text_encoder_lr lr_scheduler lr_warmup_steps "
    "lr_num_cycles max_grad_norm gradient_accumulation_steps gradient_checkpointing mixed_precision prediction_type "
    "noise_offset prior_loss_weight optimizer", {
    "pretrained_model_name_or_path": to("base"), "pretrained_vae_model_name_or_path": to("vae"),
    "revision variant": no("not supported: download that version and pass its folder as --base"),
    "tokenizer_name text_encoder_use_attention_mask": no("the tokenizer and text encoders are those of the base model"),
    "tokenizer_max_length": TOKENS, "cache_dir": no("set by the environment variable HF_HOME"),
    "train_data_dir instance_data_dir": IMAGES,
    "dataset_name dataset_config_name": no("not supported: images are read from a folder: scumble train photos/"),
    "image_column caption_column": CAPTIONS, "class_data_dir": to("regularization_images"),
    "class_prompt": no("captions of regularization images are read from files next to them"),
    "instance_prompt": to("trigger", "added to captions that lack it; the whole caption of images without one"),
    "with_prior_preservation": no("on if --regularization-images is set, or if there are images in reg/"),
    "num_class_images sample_batch_size prior_generation_precision": no(
        "not supported: regularization images are not generated"
    ),
    "validation_prompt": to("prompts"),
    "num_validation_images": no("one preview per prompt; pass several --prompts"),
    "validation_epochs": to("preview_every", "epoch, or a number of steps"),
    "validation_images class_labels_conditioning do_edm_style_training": OTHER_BASES,
    "max_train_samples": no("not supported: train on a folder with fewer images"),
    "output_kohya_format": no("always on: files have kohya's keys, which the UIs and diffusers read"),
    "resolution": to("resolution", "images keep their aspect ratio; the side of a square with the same area"),
    "center_crop": to("crop", "center is the default; diffusers crops at random without the flag"),
    "crops_coords_top_left_h crops_coords_top_left_w": no("set automatically to the actual coordinates of each crop"),
    "train_text_encoder": TEXT_ENCODER, "train_batch_size": GLOBAL_BATCH, "num_train_epochs": to("epochs"),
    "max_train_steps": to("steps"), "checkpointing_steps": to("save_every"), "checkpoints_total_limit": KEEP_COUNT,
    "resume_from_checkpoint": RESUMED, "scale_lr": no("not supported: multiply --learning-rate yourself"),
    "lr_power": CURVE, "snr_gamma": MIN_SNR, "use_8bit_adam": ADAMW8BIT, "adam_weight_decay": to("weight_decay"),
    "adam_weight_decay_text_encoder": no("not supported: one --weight-decay applies to all trained weights"),
    "adam_beta1 adam_beta2 adam_epsilon prodigy_beta3 prodigy_decouple prodigy_use_bias_correction "
    "prodigy_safeguard_warmup": DECAY_ONLY, "use_dora": DORA, "push_to_hub hub_token hub_model_id": NO_UPLOAD,
    "logging_dir report_to": NO_TRACKER, "allow_tf32": no("not supported: --mixed-precision bf16 or fp16 is faster"),
    "dataloader_num_workers": NO_LOADER, "local_rank": ONE_PROCESS,
    "enable_xformers_memory_efficient_attention": XFORMERS,
    "enable_npu_flash_attention": no("NPUs are not supported: --device is cuda, mps or cpu"),
    "pre_compute_text_embeddings": TEXT_CACHED,
    "image_interpolation_mode": LANCZOS, "debug_loss": NOT_SUPPORTED,
})  # fmt: skip

KOHYA = table(
    "vae zero_terminal_snr caption_prefix caption_suffix min_bucket_reso max_bucket_reso bucket_reso_steps seed "
    "prior_loss_weight conv_alpha noise_offset min_timestep gradient_accumulation_steps gradient_checkpointing "
    "max_grad_norm lr_warmup_steps torch_compile mixed_precision save_precision output_name output_dir optimizer", {
    "pretrained_model_name_or_path": to("base"), "v2 sdxl model_list": DETECTED, "v_parameterization": V_PREDICTION,
    "tokenizer_cache_dir disable_mmap_load_safetensors": no("not needed: everything is read from the base model"),
    # images and captions
    "train_data_dir image_dir": IMAGES,
    "dataset_config": to("images", "or pass the file: scumble train dataset.toml"),
    "reg_data_dir is_reg": to("regularization_images", "a folder; images in reg/ are also used"),
    "in_json metadata_file": no("set metadata_file in a dataset file: scumble train dataset.toml"),
    "class_tokens": no("set by the folder name (10_zwx cat) or in a dataset file: scumble train dataset.toml"),
    "dataset_repeats num_repeats": to("repeats"), "caption_extension caption_extention": CAPTIONS,
    "caption_separator secondary_separator keep_tokens_separator": COMMAS, "shuffle_caption": to("shuffle_tags"),
    "keep_tokens": to("keep_tags", "the default is 1"),
    "enable_wildcard": to("wildcards", "on by default; --caption-lines pick selects one of several lines"),
    "caption_dropout_rate": to("caption_dropout", "the default is 0.05"),
    "caption_dropout_every_n_epochs": no("not supported; --caption-dropout drops a share of all captions instead"),
    "caption_tag_dropout_rate": to("tag_dropout"),
    "token_warmup_min token_warmup_step": no("not supported: all tags are used from the first step"),
    "weighted_captions": no("not supported: (word:1.2) in a caption is plain text"),
    "max_token_length no_token_padding": TOKENS, "clip_skip": CLIP_SKIP, "color_aug": COLORS,
    "flip_aug": to("random_flip"), "face_crop_aug_range": to("crop", "faces"), "random_crop": to("crop", "random"),
    "resolution max_resolution": SQUARE, "enable_bucket": BUCKETS,
    "bucket_no_upscale": to("bucket_upscale", "inverted: pass --no-bucket-upscale"),
    "skip_image_resolution": no("not supported: small images are kept; `scumble check` lists them"),
    "resize_interpolation": LANCZOS,
    "masked_loss": to("masks", "auto, the default, uses existing masks"), "alpha_mask": to("masks", "alpha"),
    "conditioning_data_dir": MASK_FILES, "cache_latents vae_batch_size skip_cache_check cache_info": CACHED,
    "cache_latents_to_disk": to("latent_cache", "a folder; on disk by default"),
    "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk sdxl_cache_text_encoder_outputs": TEXT_CACHED,
    "dataset_class custom_attributes network_multiplier train_inpainting": NOT_SUPPORTED,
    "debug_dataset": no("`scumble check photos/` shows what training uses"),
    "max_data_loader_n_workers persistent_data_loader_workers": NO_LOADER,
    "validation_split": to("validation_split", "a share, a count or a folder"),
    "validation_seed": no("held-out images are selected with --seed"),
    "validate_every_n_steps validate_every_n_epochs": VALIDATED,
    "max_validation_steps": no("not supported: all held-out images are used"),
    # the adapter
    "network_module": to("algorithm", "lora, loha or lokr"),
    "algo": to("algorithm", "lora, loha or lokr; for locon, use lora with --conv-rank"),
    "LoRA_type": to("algorithm", "lora, loha or lokr; for LoCon, use lora with --conv-rank"),
    "dora_wd": to("algorithm", "dora; cannot be combined with loha or lokr"),
    "network_dim": to("rank", "for the UNet; --targets full matches kohya's layers; --text-encoder-rank is separate"),
    "network_alpha": to("alpha", "the default is the rank, not 1; --text-encoder-alpha is separate"),
    "conv_dim": to("conv_rank", "for all convolutions; kohya uses network_dim for 1x1"),
    "network_dropout": AFTER_DOWN, "dropout": to("lora_dropout", "applied to the adapter's input"),
    "rank_dropout module_dropout rank_dropout_scale": no("not supported; use --lora-dropout"),
    "rs_lora": to("rslora"), "factor": to("lokr_factor", "auto instead of -1"),
    "preset LyCORIS_preset": to("targets", "attention for attn-only, full for attn-mlp; --conv-rank adds convolutions"),
    "include_patterns exclude_patterns": LAYERS,
    "network_args": no("each argument is a separate option, e.g. --conv-rank for conv_dim"),
    "block_dims block_alphas conv_block_dims conv_block_alphas conv_dims conv_alphas network_reg_dims": no(
        "not supported: layers of one type share rank and alpha; --targets selects the layers"
    ),
    "down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold network_reg_lrs loraplus_lr_ratio "
    "loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio": no("not supported: the UNet has a single --learning-rate"),
    "use_tucker use_cp use_conv_cp disable_conv_cp decompose_both full_matrix unbalanced_factorization use_scalar "
    "train_norm block_size constraint constrain rescaled wd_on_output bypass_mode unit train_on_input": LYCORIS,
    "verbose split_mode": NOT_SUPPORTED,
    "network_train_unet_only": to("text_encoder_rank", "0; for SDXL also --text-encoder-2-rank 0"),
    "network_train_text_encoder_only": no("not supported: the UNet is always trained"),
    "stop_text_encoder_training": SPAN, "network_weights lora_network_weights dim_from_weights": NEW_ADAPTER,
    "base_weights base_weights_multiplier": no("not supported; `scumble adapter bake` merges adapters into a base"),
    "scale_weight_norms": no("not supported; --weight-decay keeps weights small"),
    # the loss
    "loss_type": to("loss_type", "l2 or huber; l1 and smooth_l1 are not supported"),
    "huber_c": to("huber_delta", "the same at all timesteps"),
    "huber_schedule huber_scale": no("not supported: --huber-delta is the same at all timesteps"),
    "min_snr_gamma": MIN_SNR, "debiased_estimation_loss": to("loss_weighting", "debiased"),
    "scale_v_pred_loss_like_noise_pred v_pred_like_loss": no("not supported; use --loss-weighting"),
    "multires_noise_discount": to("multires_noise_discount", "0 is off; kohya also turns it off without iterations"),
    "multires_noise_iterations": to("multires_noise_discount", "uses all octaves that fit; 0 is off"),
    "ip_noise_gamma": to("input_perturbation"),
    "noise_offset_random_strength ip_noise_gamma_random_strength adaptive_noise_scale": no(
        "not supported: the noise strength is the same in every step"
    ), "noise_offset_type": no("set --noise-offset, --multires-noise-discount, or both"),
    "max_timestep": to("max_timestep", "the last trained timestep: 999 for kohya's 1000"),
    # optimization
    "optimizer_type": to("optimizer"),
    "optimizer_args": to("weight_decay", "other optimizer arguments are not supported"), "use_8bit_adam": ADAMW8BIT,
    "use_lion_optimizer": to("optimizer", "lion"), "learning_rate": to("learning_rate", "for the UNet"),
    "unet_lr": to("learning_rate"),
    "text_encoder_lr": to("text_encoder_lr", "for a second value, use --text-encoder-2-lr"),
    "text_encoder_lr1": to("text_encoder_lr"), "text_encoder_lr2": to("text_encoder_2_lr"),
    "lr_scheduler": to("lr_scheduler", "polynomial, adafactor and inverse_sqrt are not supported"),
    "lr_scheduler_num_cycles": to("lr_num_cycles"),
    "lr_warmup": to("lr_warmup_steps", "a share instead of percent: 0.1 for 10"),
    "lr_scheduler_type lr_scheduler_args lr_scheduler_power lr_scheduler_timescale lr_decay_steps": CURVE,
    "lr_scheduler_min_lr_ratio": no("not supported: schedules end at 0"), "max_train_steps": to("steps"),
    "max_train_epochs epoch": to("epochs"), "train_batch_size batch_size": GLOBAL_BATCH,
    "fused_backward_pass cpu_offload_checkpointing lowram lowvram highvram": MEMORY,
    # the machine
    "full_fp16 full_bf16": FP32_ADAPTER, "fp8_base fp8_base_unet": QUANTIZED, "no_half_vae sdxl_no_half_vae": VAE_DTYPE,
    "xformers": XFORMERS, "sdpa mem_eff_attn": to("attention", "sdpa, the default"),
    "dynamo_backend dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic": no("set automatically by --torch-compile"),
    "deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device "
    "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients": no(
        "DeepSpeed is not supported: a run uses one process on one device"
    ),
    "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph num_processes num_machines multi_gpu gpu_ids "
    "main_process_port num_cpu_threads_per_process extra_accelerate_launch_args": ONE_PROCESS,
    # previews
    "sample_prompts": to("prompt_file", "a text file, one prompt per line; kohya's --n --w --h --d --l --s work"),
    "sample_sampler": to("sampler", "ddim, euler, euler_a or dpmpp_2m"), "sample_every_n_steps": to("preview_every"),
    "sample_every_n_epochs": to("preview_every", "epoch, or a number of steps"), "sample_at_first": FIRST_PREVIEW,
    # output
    "save_every_n_steps": to("save_every"), "save_every_n_epochs": to("save_every", "epoch, or a number of steps"),
    "save_n_epoch_ratio": to("save_every", "a number of steps, or epoch"), "save_last_n_epochs": KEEP_COUNT,
    "save_last_n_steps": to("keep_count", "a number of adapters, with --keep-checkpoints last"),
    "save_last_n_epochs_state save_last_n_steps_state save_state save_state_on_train_end": STATE,
    "resume initial_epoch initial_step skip_until_initial_step": RESUMED, "save_model_as use_safetensors": SAFETENSORS,
    "no_metadata training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags "
    "metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor "
    "metadata_is_negative_embedding": METADATA,
    "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility "
    "save_state_to_huggingface resume_from_huggingface async_upload": NO_UPLOAD,
    "logging_dir log_with log_prefix log_tracker_name log_tracker_config log_config wandb_run_name wandb_api_key "
    "use_wandb console_log_level console_log_file console_log_simple": NO_TRACKER,
    "config_file": no("pass the options file directly: scumble train my.toml"),
    "output_config save_as_bool": no("not needed: options.toml in the run folder contains all options"),
    "additional_parameters": no("pass each parameter as a separate option"),
})  # fmt: skip

ONETRAINER = table(
    "learning_rate epochs gradient_accumulation_steps gradient_checkpointing ema_decay weight_decay optimizer "
    "save_every", {
    "training_method": no("not needed: scumble always trains an adapter"), "model_type": DETECTED,
    "base_model_name": to("base"), "extra_model_name": OTHER_BASES, "vae.model_name": to("vae"),
    "workspace_dir": to("output_dir", "contains one folder per run"),
    "output_model_destination save_filename_prefix": to("output_name", "without folder and extension"),
    "output_dtype": to("save_precision"), "output_model_format": SAFETENSORS, "cache_dir": to("latent_cache"),
    "image_caching latent_caching latent_caching_epochs clear_cache_before_training only_cache": CACHED,
    "text_caching": TEXT_CACHED,
    "tensorboard tensorboard_expose tensorboard_always_on tensorboard_port samples_to_tensorboard": NO_TRACKER,
    "validation": to("validation_split", "auto, a share, a count or a folder"),
    "validate_after validate_after_unit": VALIDATED, "continue_last_backup": RESUMED,
    "include_train_config": no("not needed: options.toml in the run folder contains all options"),
    "debug_mode debug_dir prevent_overwrites force_circular_padding cloud secrets": NOT_SUPPORTED,
    "multi_gpu device_indexes gradient_reduce_precision fused_gradient_reduce async_gradient_reduce "
    "async_gradient_reduce_buffer": ONE_PROCESS,
    # concepts
    "concept_file_name concepts": to("images", "a folder, or a TOML list of folders"), "concepts.path": IMAGES,
    "concepts.validation_concept": to("validation_split", "a folder"),
    "concepts. balancing repeats": to("repeats", "a whole number"),
    "concepts.include_subdirectories": no("always on: subfolders are included"),
    "concepts. name seed enabled balancing_strategy loss_weight image_variations text_variations": NOT_SUPPORTED,
    "concepts.image.enable_random_flip": to("random_flip"), "concepts.image.enable_crop_jitter": to("crop", "random"),
    "concepts.image. resolution_override enable_resolution_override": SQUARE,
    "concepts.image. enable_random_rotate enable_random_brightness enable_random_contrast enable_random_saturation "
    "enable_random_hue": COLORS, "circular_mask_generation random_rotate_and_crop": COLORS,
    "concepts.text. prompt_source prompt_path": CAPTIONS, "concepts.text.enable_tag_shuffling": to("shuffle_tags"),
    "concepts.text.keep_tags_count": to("keep_tags"),
    "concepts.text. tag_dropout_enable tag_dropout_probability": to("tag_dropout"),
    "concepts.text.tag_delimiter": COMMAS,
    "concepts.text. tag_dropout_mode tag_dropout_special_tags caps_randomize_enable": NOT_SUPPORTED,
    "aspect_ratio_bucketing": BUCKETS, "resolution": to("resolution", "for more than one, use --more-resolutions"),
    "frames sample_video_format sample_audio_format": VIDEO,
    "masked_training": to("masks", "auto, the default, uses existing masks"),
    "unmasked_weight": to("mask_floor"),
    "normalize_masked_area_loss": no("always on: the weights of each image have mean 1"),
    "unmasked_probability masked_prior_preservation_weight": NOT_SUPPORTED, "custom_conditioning_image": CONTROLS,
    # the adapter
    "peft_type": to("algorithm", "lora, loha or lokr"),
    "lora_rank lokr_dim": to("rank", "for the UNet; --text-encoder-rank is separate"),
    "lora_alpha": to("alpha", "the default is the rank, not 1"), "lora_decompose": DORA,
    "dropout_probability": AFTER_DOWN, "lokr_decompose_factor": to("lokr_factor", "auto instead of -1"),
    "layer_filter lora_layers": to("targets", "attention, full or a regex"),
    "layer_filter_preset lora_layer_preset": to("targets", "attention for attn-only, full for attn-mlp"),
    "layer_filter_regex lora_layers_regex": no("not needed: --targets accepts regexes"),
    "lora_weight_dtype": FP32_ADAPTER, "lora_model_name": NEW_ADAPTER,
    "lora_decompose_norm_epsilon lora_decompose_output_axis lokr_decompose_both lokr_use_tucker lokr_weight_decompose "
    "lokr_dora_on_output lokr_full_matrix lokr_vec_trick": LYCORIS,
    "oft_block_size oft_block_share dora_oft oft_scaled oft_clipped_norm oft_cans": no("not supported: OFT adapters"),
    "embedding embeddings additional_embeddings embedding_learning_rate preserve_embedding_norm embedding_weight_dtype "
    "bundle_additional_embeddings token_count initial_embedding_text": EMBEDDINGS,
    "text_encoder. text_encoder_2. train_embedding": EMBEDDINGS,
    # the parts of the base model
    "unet.learning_rate unet_learning_rate": to("learning_rate"),
    "text_encoder.learning_rate text_encoder_learning_rate": to("text_encoder_lr"),
    "text_encoder_2.learning_rate text_encoder_2_learning_rate": to("text_encoder_2_lr"),
    "text_encoder.train train_text_encoder": TEXT_ENCODER,
    "text_encoder_2.train train_text_encoder_2": to("text_encoder_2_rank", "0: not trained"),
    "text_encoder. text_encoder_2. dropout_probability": to("caption_dropout", "for both text encoders"),
    "text_encoder_layer_skip text_encoder_2_layer_skip": CLIP_SKIP,
    "text_encoder_sequence_length text_encoder_2_sequence_length": TOKENS,
    "unet.train train_unet": no("the UNet is always trained"),
    "train_unet_epochs train_text_encoder_epochs train_text_encoder_2_epochs": SPAN,
    "unet. text_encoder. text_encoder_2. stop_training_after stop_training_after_unit": SPAN,
    "unet. text_encoder. text_encoder_2. gradient_checkpointing": to("gradient_checkpointing"),
    "unet.weight_dtype unet_weight_dtype weight_dtype": to("mixed_precision", "for 8 or 4 bits: --base-quantization"),
    "text_encoder. text_encoder_2. weight_dtype": BASE_PRECISION,
    "text_encoder_weight_dtype text_encoder_2_weight_dtype": BASE_PRECISION,
    "vae.weight_dtype vae_weight_dtype": VAE_DTYPE,
    "unet. text_encoder. text_encoder_2. offload_fraction activation_offloading": MEMORY,
    "async_offloading enable_async_offloading enable_activation_offloading layer_offload_fraction temp_device "
    "enable_autocast_cache fallback_train_dtype": MEMORY,
    "prior transformer unconditional_transformer quantization text_encoder_3 text_encoder_4 effnet_encoder decoder "
    "decoder_text_encoder decoder_vqgan text_encoder_3_layer_skip text_encoder_4_layer_skip": OTHER_BASES,
    # optimization
    "batch_size": GLOBAL_BATCH,
    "learning_rate_scheduler": to("lr_scheduler", "OneTrainer's cosine ends at half the peak, its rex decays later"),
    "custom_learning_rate_scheduler scheduler_params": CURVE,
    "learning_rate_warmup_steps": to("lr_warmup_steps", "optimizer steps; above 1, OneTrainer counts forward passes"),
    "learning_rate_cycles": to("lr_num_cycles", "for cosine_with_restarts"),
    "learning_rate_min_factor": no("not supported: schedules end at 0"),
    "learning_rate_scaler": no("not supported: multiply --learning-rate yourself"),
    "clip_grad_norm": to("max_grad_norm"), "ema": to("ema_decay", "0 is off"),
    "ema_update_step_interval": no("not supported: the average is updated in every step"),
    "optimizer.optimizer": to("optimizer"), "optimizer.weight_decay": to("weight_decay"),
    "optimizer. beta1 beta2 eps d_coef fused_back_pass stochastic_rounding": DECAY_ONLY,
    "optimizer_defaults": DECAY_ONLY, "train_device": to("device"), "train_dtype": to("mixed_precision"),
    "compile": to("torch_compile", "on"), "attention_mechanism": to("attention"),
    "caching_threads dataloader_threads prefetch_next_batch": NO_LOADER,
    # the loss
    "mse_strength": to("loss_type", "l2"), "huber_strength": to("loss_type", "huber"),
    "huber_delta": to("huber_delta", "for the pseudo-Huber loss"),
    "mae_strength log_cosh_strength vb_loss_strength": no("not supported: --loss-type is l2 or huber"),
    "loss_weight_fn": to("loss_weighting", "none, min_snr (the default) or debiased"),
    "loss_weight_strength min_snr_gamma": to("min_snr_gamma"), "loss_scaler": NOT_SUPPORTED,
    "offset_noise_weight": to("noise_offset"), "generalized_offset_noise cep_gamma": NOT_SUPPORTED,
    "perturbation_noise_weight": to("input_perturbation"),
    "rescale_noise_scheduler_to_zero_terminal_snr": to("zero_terminal_snr"), "force_v_prediction": V_PREDICTION,
    "force_epsilon_prediction": to("prediction_type", "epsilon"),
    "min_noising_strength": to("min_timestep", "a timestep instead of a share: 500 for 0.5"),
    "max_noising_strength": to("max_timestep", "a timestep instead of a share: 999 for 1"),
    "timestep_distribution noising_weight noising_bias timestep_shift dynamic_timestep_shifting": TIMESTEPS,
    # previews and output
    "sample_definition_file_name": to("prompt_file", "a text file with one prompt per line"),
    "samples samples.prompt": to("prompts"), "samples.negative_prompt": to("negative_prompt"),
    "samples. width height": PREVIEW_SIDE, "samples.seed": to("preview_seed", "each further prompt adds 1"),
    "samples.diffusion_steps": to("num_inference_steps"), "samples.cfg_scale": to("guidance_scale"),
    "samples.noise_scheduler": to("sampler", "ddim, euler, euler_a or dpmpp_2m"),
    "samples. enabled random_seed force_last_timestep": NOT_SUPPORTED,
    "non_ema_sampling sample_skip_first save_skip_first": NOT_SUPPORTED,
    "sample_after sample_after_unit": to("preview_every", "a number of steps, or epoch"),
    "sample_image_format": no("previews are always PNG files"),
    "backup_after backup_after_unit backup_before_save rolling_backup rolling_backup_count": STATE,
    "save_after save_after_unit save_every_unit": to("save_every", "a number of steps, or epoch"),
})  # fmt: skip

AI_TOOLKIT = table(
    "", {
    "job type": no("not needed: scumble always trains an adapter"), "name": to("output_name"),
    "training_folder": to("output_dir"),
    "device": to("device", "cuda, without a device index"), "trigger_word datasets.trigger_word": to("trigger"),
    "performance_log_every": NO_TRACKER, "logging. log_every verbose use_wandb project_name run_name": NO_TRACKER,
    "meta. name version": METADATA,
    # the adapter
    "network.type": to("algorithm", "lora or lokr; for locon, use lora with --conv-rank"),
    "network. linear rank": to("rank", "for the UNet; --text-encoder-rank is separate"),
    "network. linear_alpha alpha": to("alpha", "the default is the rank, not 1"),
    "network.conv": to("conv_rank"), "network.conv_alpha": to("conv_alpha"), "network.dropout": AFTER_DOWN,
    "network.lokr_factor": to("lokr_factor", "auto instead of -1"), "network.lokr_full_rank": LYCORIS,
    "network.network_kwargs. ignore_if_contains only_if_contains": LAYERS,
    "network. transformer_only split_multistage_loras lorm": OTHER_BASES,
    # images and captions
    "datasets. folder_path dataset_path": IMAGES, "datasets. caption_ext caption_type": CAPTIONS,
    "datasets.default_caption": no("set by the folder name (10_zwx cat), or by --trigger"),
    "datasets.caption_dropout_rate train.prompt_dropout_prob": to("caption_dropout"),
    "datasets.token_dropout_rate": to("tag_dropout"), "datasets.shuffle_tokens": to("shuffle_tags"),
    "datasets.keep_tokens": to("keep_tags", "the default is 1"),
    "datasets.resolution": to("resolution", "one number; for more, use --more-resolutions"),
    "datasets.cache_latents": CACHED,
    "datasets.cache_latents_to_disk": to("latent_cache", "a folder; on disk by default"),
    "datasets. train. cache_text_embeddings": TEXT_CACHED, "train.unload_text_encoder": TEXT_CACHED,
    "datasets.random_crop": to("crop", "random"), "datasets.flip_x": to("random_flip"),
    "datasets. flip_y augments augmentations random_scale scale": COLORS, "datasets. buckets square_crop": BUCKETS,
    "datasets.bucket_tolerance": to("bucket_reso_steps"), "datasets.num_repeats": to("repeats"),
    "datasets.is_reg": to("regularization_images", "a folder"), "train.reg_weight": to("prior_loss_weight"),
    "datasets.alpha_mask": to("masks", "alpha"), "datasets.mask_path": MASK_FILES,
    "datasets.mask_min_value": to("mask_floor"),
    "datasets. invert_mask network_weight loss_multiplier poi replacements random_triggers use_short_captions "
    "type": NOT_SUPPORTED, "datasets. control_path inpaint_path controls": CONTROLS,
    "sample.samples. ctrl_img ctrl_img_1 ctrl_img_2 ctrl_img_3": CONTROLS,
    "datasets. num_workers prefetch_factor": NO_LOADER, "datasets. sample. num_frames fps": VIDEO,
    # training
    "train.steps": to("steps", "optimizer steps"), "train.batch_size": to("batch_size"),
    "train.gradient_accumulation": to("gradient_accumulation_steps"),
    "train.gradient_accumulation_steps": to("gradient_accumulation_steps", "train.steps then counts forward passes"),
    "train. lr unet_lr": to("learning_rate"), "train.text_encoder_lr": to("text_encoder_lr"),
    "train.lr_scheduler": to("lr_scheduler"), "train.lr_scheduler_params": CURVE, "train.optimizer": to("optimizer"),
    "train.optimizer_params.weight_decay": to("weight_decay"), "train.optimizer_params": DECAY_ONLY,
    "train.max_grad_norm": to("max_grad_norm"), "train.train_unet": no("the UNet is always trained"),
    "train.train_text_encoder": TEXT_ENCODER, "train.gradient_checkpointing": to("gradient_checkpointing"),
    "train.dtype model.dtype": to("mixed_precision"), "train.ema_config.use_ema": to("ema_decay", "0 is off"),
    "train.ema_config.ema_decay": to("ema_decay"), "train.xformers": XFORMERS,
    "train.sdp": to("attention", "sdpa, the default"), "train.loss_type": to("loss_type", "mse is l2"),
    "train.min_snr_gamma": MIN_SNR, "train.noise_offset": to("noise_offset"),
    "train.min_denoising_steps": to("min_timestep"),
    "train.max_denoising_steps": to("max_timestep", "the last trained timestep, at most 999"),
    "train.noise_scheduler": no("set by the base model; see --zero-terminal-snr"),
    "train. timestep_type linear_timesteps linear_timesteps2 content_or_style snr_gamma": TIMESTEPS,
    "train. bypass_guidance_embedding switch_boundary_every train_refiner refiner_lr": OTHER_BASES,
    "train. diff_output_preservation diff_output_preservation_multiplier diff_output_preservation_class "
    "inverted_mask_prior": no("not supported; use --regularization-images"), "train.start_step": RESUMED,
    # the base
    "model.name_or_path": to("base"), "model.vae_path": to("vae"), "model. arch is_v2 is_xl": DETECTED,
    "model.is_v_pred": V_PREDICTION,
    "model. is_flux is_v3 is_lumina2 extras_name_or_path assistant_lora_path refiner_name_or_path "
    "te_name_or_path": OTHER_BASES,
    "model.model_kwargs. llama_model_path invert_inpaint_mask_chance inpaint_dropout control_dropout "
    "inpaint_random_chance do_random_inpainting random_blur_mask random_dialate_mask train_high_noise "
    "train_low_noise": OTHER_BASES, "model. quantize qtype": QUANTIZED, "model. quantize_te qtype_te low_vram": MEMORY,
    "model.lora_path": no("not supported; `scumble adapter bake` merges adapters into a base model"),
    "model.compile": to("torch_compile", "on"),
    # previews and output
    "sample. prompts samples samples.prompt": to("prompts"), "sample.neg": to("negative_prompt"),
    "sample.sampler": to("sampler", "ddim, euler, euler_a or dpmpp_2m"),
    "sample.sample_steps": to("num_inference_steps"), "sample.guidance_scale": to("guidance_scale"),
    "sample. width height": PREVIEW_SIDE, "sample.seed": to("preview_seed", "each further prompt adds 1"),
    "sample.walk_seed": no("always on: each further prompt adds 1 to --preview-seed"),
    "sample.sample_every": to("preview_every"), "train.disable_sampling": to("preview_every", "0 disables previews"),
    "train. skip_first_sample force_first_sample": FIRST_PREVIEW, "sample.sample_start_step": FIRST_PREVIEW,
    "sample.format": no("previews are always PNG files"), "save.save_every": to("save_every"),
    "save.dtype": to("save_precision"), "save.max_step_saves_to_keep": KEEP_COUNT, "save.save_format": SAFETENSORS,
    "save. push_to_hub hf_repo_id hf_private": NO_UPLOAD,
})  # fmt: skip

PRECISIONS = {"float_16": "fp16", "float16": "fp16", "bfloat_16": "bf16", "bfloat16": "bf16", "float_32": "fp32"}
VALUES: dict[str, dict[str, str]] = {
    "algorithm": {
        "networks.lora": "lora", "networks.loha": "loha", "networks.lokr": "lokr", "standard": "lora",
        "lycoris/loha": "loha", "lycoris/lokr": "lokr",
    },
    "optimizer": {
        "adamw_8bit": "adamw8bit", "pagedadamw8bit": "adamw8bit", "adamwschedulefree": "schedule_free",
        "schedule_free_adamw": "schedule_free",
    },
    "lr_scheduler": {"cosine_with_hard_restarts": "cosine_with_restarts"},
    "loss_weighting": {"constant": "none", "min_snr_gamma": "min_snr", "debiased_estimation": "debiased"},
    "attention": {"sdp": "sdpa"},
    "mixed_precision": PRECISIONS,
    "save_precision": PRECISIONS,
    "sampler": {"k_euler": "euler", "k_euler_a": "euler_a", "dpmsolver++": "dpmpp_2m"},
}  # fmt: skip
"""For some of our options: lower-case values of other trainers -> our name for the same value."""


def plain(name: str) -> str:
    """Normalize a name for lookup in the tables: no dashes, no indices, no `config.process` (ai-toolkit)."""
    dotted = re.sub(r"\[\d*\]", "", name.strip().lstrip("-").replace("-", "_"))
    return dotted.removeprefix("config.").removeprefix("process.")


def hint(name: str) -> str:
    """Return `use --batch-size (total over all devices)`, or the reason why there is no such option.

    `name` is a flag or a key of another trainer, or the last part of a dotted key if that is unambiguous. Returns an
    empty string for any other name.
    """
    key = plain(name)
    for names in (DIFFUSERS, KOHYA, ONETRAINER, AI_TOOLKIT):
        if key in names:
            return _describe(names[key])
    matches = {row for names in (ONETRAINER, AI_TOOLKIT) for dotted, row in names.items() if dotted.endswith("." + key)}
    return _describe(matches.pop()) if len(matches) == 1 else ""


def _describe(row: Foreign) -> str:
    if not row.option:
        return row.reason
    return f"use --{row.option.replace('_', '-')}" + (f" ({row.note})" if row.note else "")
