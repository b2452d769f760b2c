"""Options of other trainers -> ours, or why there is none: kohya's sd-scripts and its GUI, diffusers' training scripts,
OneTrainer, ai-toolkit. Asked when a flag or a TOML key is unknown; a note says where a value means something else.

Keys of nested files are dotted, without `config.process[0]` and without indices: `train.lr`, `datasets.folder_path`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """An option of another trainer: our `option`, or "" and the `reason` why there is none.

    `note` says where the value means something else, or which value of our option it is.
    """

    option: str = ""
    note: str = ""
    reason: str = ""


to = Foreign


def no(reason: str) -> Foreign:
    return Foreign(reason=reason)


def table(ours: str, rows: Mapping[str, Foreign]) -> dict[str, Foreign]:
    """One entry for each name. `ours` are names that mean here what they mean there; a key of `rows` is several names,
    each behind every prefix among them that ends with a dot. Raises `ValueError` for a name that is there twice."""
    found = {name: Foreign(name) for name in ours.split()}
    for words, row in rows.items():
        prefixes = [word for word in words.split() if word.endswith(".")] or [""]
        for name in (prefix + word for prefix in prefixes for word in words.split() if not word.endswith(".")):
            if name in found:
                raise ValueError(f"{name} is there twice")
            found[name] = row
    return found


IMAGES = to("images", "or the folder itself: scumble train photos/")
GLOBAL_BATCH = to("batch_size", "of all devices")
TEXT_ENCODER = to("text_encoder_rank", "0: not trained")
V_PREDICTION = to("prediction_type", "v_prediction")
DORA = to("algorithm", "dora")
AFTER_DOWN = to("lora_dropout", "drops the adapter's inputs; there, what comes after the down projection")
ADAMW8BIT = to("optimizer", "adamw8bit")
XFORMERS = to("attention", "xformers")
SQUARE = to("resolution", "one number: the side of a square of the same area")
PREVIEW_SIDE = to("preview_size", "a square; --w and --h within a prompt set other sizes")
MIN_SNR = to("min_snr_gamma", "min_snr is the default of --loss-weighting; there it is off without a gamma")
VALIDATED = to("save_every", "validation loss is measured with each saved adapter")
KEPT = to("keep_count", "with --keep-checkpoints last")
BASE_DTYPE = to("mixed_precision", "of the whole base")
LAYERS = to("targets", "one regex that a layer's whole path matches")
QUANTIZED = to("base_quantization", "int8 or nf4")

NOT_HERE = no("not available")
OTHER_BASES = no("for other bases; a base here is SD 1.x, SD 2.x or SDXL")
DETECTED = no("detected from the base")
ONE_PROCESS = no("a run is one process on one device")
NO_UPLOAD = no("nothing is uploaded")
NO_TRACKER = no("no TensorBoard or W&B: the run folder has the loss as a curve and events.jsonl; --json prints events")
NO_LOADER = no("no data loader: latents are encoded before training")
CACHED = no("latents are always cached; --latent-cache names the folder")
TEXT_KEPT = no("text encodings are cached anyway where the text encoders are not trained")
RESUMED = no("`scumble train runs/NAME` resumes a run, and so does --resume, which takes no value")
STATE = no("the state of a run is always saved with each adapter")
FRESH = no("not available: training starts with a new adapter; `scumble adapter bake` merges an old one into the base")
METADATA = no("not available: the metadata of a file describes the run, the images and the trigger words")
SAFETENSORS = no("adapters are always .safetensors files")
FP32_ADAPTER = no("the adapter is always fp32; --mixed-precision is that of the base")
CAPTIONS = no("captions are read beside the images: .txt, .caption, metadata.jsonl or .csv")
COMMAS = no("tags are separated by commas; --keep-tags counts those that stay in front")
BUCKETS = no("always: each image gets a bucket of its shape")
LANCZOS = no("images are resized by Lanczos")
COLORS = no("not available: colors and shapes are part of what is learned; there is --random-flip")
LYCORIS = no("not available; of LyCORIS there are --algorithm loha and lokr, --lokr-factor and --conv-rank")
CURVE = no("no such schedule: --lr-scheduler has constant, linear, cosine, cosine_with_restarts and rex")
DECAY_ONLY = no("only --weight-decay of an optimizer can be set")
TIMESTEPS = no("timesteps are drawn uniformly; --loss-weighting, --min-timestep and --max-timestep change what counts")
MEMORY = no("set by the program; for less memory use --gradient-checkpointing or --base-quantization")
VAE_DTYPE = no("the VAE is never in fp16")
CLIP_SKIP = no("not available: text is encoded as the base was trained")
TOKENS = no("captions are cut at the 75 tokens that CLIP reads; `scumble check` names longer ones")
ALL_MASKED = no("masks are read beside the images or from a folder masks/; --masks auto uses them")
EMBEDDINGS = no("no textual inversion: only adapters are trained")
VIDEO = no("images only")
CONTROLS = no("not available: training is conditioned on captions alone")
SPAN = no("not available: all parts are trained to the end")
PAINTED_FIRST = no("the first previews are always rendered before training")

DIFFUSERS = table(
    "output_dir seed random_flip repeats rank lora_dropout learning_rate text_encoder_lr lr_scheduler lr_warmup_steps "
    "lr_num_cycles max_grad_norm gradient_accumulation_steps gradient_checkpointing mixed_precision prediction_type "
    "noise_offset prior_loss_weight optimizer", {
    "pretrained_model_name_or_path": to("base"), "pretrained_vae_model_name_or_path": to("vae"),
    "revision variant": no("not available: download it, and name its folder with --base"),
    "tokenizer_name text_encoder_use_attention_mask": no("tokenizer and text encoders are the base's own"),
    "tokenizer_max_length": TOKENS, "cache_dir": no("the environment variable HF_HOME says where downloads lie"),
    "train_data_dir instance_data_dir": IMAGES,
    "dataset_name dataset_config_name": no("not available: images are read from a folder: scumble train photos/"),
    "image_column caption_column": CAPTIONS, "class_data_dir": to("regularization_images"),
    "class_prompt": no("captions of regularization images are read beside them"),
    "instance_prompt": to("trigger", "added to captions that lack it; all of the caption where there is none"),
    "with_prior_preservation": no("on where --regularization-images names a folder, or images lie in reg/"),
    "num_class_images sample_batch_size prior_generation_precision": no("regularization images are not generated"),
    "validation_prompt": to("prompts"),
    "num_validation_images": no("one preview for each prompt: give several --prompts"),
    "validation_epochs": to("preview_every", "epoch, or a number of steps"),
    "validation_images class_labels_conditioning do_edm_style_training": OTHER_BASES,
    "max_train_samples": no("not available: train on a folder with fewer images"),
    "output_kohya_format": no("always: the keys in the file are kohya's, which the UIs and diffusers read"),
    "resolution": to("resolution", "images keep their aspect: the side of a square of the same area"),
    "center_crop": to("crop", "center is the default here; diffusers crops at random without the flag"),
    "crops_coords_top_left_h crops_coords_top_left_w": no("SDXL is told where each crop really lies"),
    "train_text_encoder": TEXT_ENCODER, "train_batch_size": GLOBAL_BATCH, "num_train_epochs": to("epochs"),
    "max_train_steps": to("steps"), "checkpointing_steps": to("save_every"), "checkpoints_total_limit": KEPT,
    "resume_from_checkpoint": RESUMED, "scale_lr": no("not available: multiply --learning-rate yourself"),
    "lr_power": CURVE, "snr_gamma": MIN_SNR, "use_8bit_adam": ADAMW8BIT, "adam_weight_decay": to("weight_decay"),
    "adam_weight_decay_text_encoder": no("one --weight-decay holds for all that is trained"),
    "adam_beta1 adam_beta2 adam_epsilon prodigy_beta3 prodigy_decouple prodigy_use_bias_correction "
    "prodigy_safeguard_warmup": DECAY_ONLY, "use_dora": DORA, "push_to_hub hub_token hub_model_id": NO_UPLOAD,
    "logging_dir report_to": NO_TRACKER, "allow_tf32": no("not available: --mixed-precision bf16 or fp16 is faster"),
    "dataloader_num_workers": NO_LOADER, "local_rank": ONE_PROCESS,
    "enable_xformers_memory_efficient_attention": XFORMERS,
    "enable_npu_flash_attention": no("no NPU: --device is cuda, mps or cpu"), "pre_compute_text_embeddings": TEXT_KEPT,
    "image_interpolation_mode": LANCZOS, "debug_loss": NOT_HERE,
})  # fmt: skip

KOHYA = table(
    "vae zero_terminal_snr caption_prefix caption_suffix min_bucket_reso max_bucket_reso bucket_reso_steps seed "
    "prior_loss_weight conv_alpha noise_offset min_timestep gradient_accumulation_steps gradient_checkpointing "
    "max_grad_norm lr_warmup_steps torch_compile mixed_precision save_precision output_name output_dir optimizer", {
    "pretrained_model_name_or_path": to("base"), "v2 sdxl model_list": DETECTED, "v_parameterization": V_PREDICTION,
    "tokenizer_cache_dir disable_mmap_load_safetensors": no("tokenizers and files are read from the base"),
    # images and captions
    "train_data_dir image_dir": IMAGES,
    "dataset_config": to("images", "or the file itself: scumble train dataset.toml"),
    "reg_data_dir is_reg": to("regularization_images", "a folder; images in reg/ count too"),
    "in_json metadata_file": no("read as metadata_file in a dataset file: scumble train dataset.toml"),
    "class_tokens": no("the folder's name sets it (10_zwx cat), or a list of folders: scumble train dataset.toml"),
    "dataset_repeats num_repeats": to("repeats"), "caption_extension caption_extention": CAPTIONS,
    "caption_separator secondary_separator keep_tokens_separator": COMMAS, "shuffle_caption": to("shuffle_tags"),
    "keep_tokens": to("keep_tags", "1 is the default here"),
    "enable_wildcard": to("wildcards", "on by default; one of several lines: --caption-lines pick"),
    "caption_dropout_rate": to("caption_dropout", "0.05 is the default here"),
    "caption_dropout_every_n_epochs": no("--caption-dropout empties a share of all captions instead"),
    "caption_tag_dropout_rate": to("tag_dropout"),
    "token_warmup_min token_warmup_step": no("not available: all tags are used from the first step on"),
    "weighted_captions": no("not available: (word:1.2) in a caption has no weight"),
    "max_token_length no_token_padding": TOKENS, "clip_skip": CLIP_SKIP, "color_aug": COLORS,
    "flip_aug": to("random_flip"), "face_crop_aug_range": to("crop", "faces"), "random_crop": to("crop", "random"),
    "resolution max_resolution": SQUARE, "enable_bucket": BUCKETS,
    "bucket_no_upscale": to("bucket_upscale", "the other way round: --no-bucket-upscale"),
    "skip_image_resolution": no("small images are kept; `scumble check` names them"), "resize_interpolation": LANCZOS,
    "masked_loss": to("masks", "auto, the default, uses the masks that there are"), "alpha_mask": to("masks", "alpha"),
    "conditioning_data_dir": ALL_MASKED, "cache_latents vae_batch_size skip_cache_check cache_info": CACHED,
    "cache_latents_to_disk": to("latent_cache", "a folder; on the disk by default"),
    "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk sdxl_cache_text_encoder_outputs": TEXT_KEPT,
    "dataset_class custom_attributes network_multiplier train_inpainting": NOT_HERE,
    "debug_dataset": no("`scumble check photos/` shows what training will see"),
    "max_data_loader_n_workers persistent_data_loader_workers": NO_LOADER,
    "validation_split": to("validation_split", "a share, a count or a folder"),
    "validation_seed": no("held-out images are drawn from --seed"),
    "validate_every_n_steps validate_every_n_epochs": VALIDATED,
    "max_validation_steps": no("all held-out images are measured"),
    # the adapter
    "network_module": to("algorithm", "lora, loha or lokr"),
    "algo": to("algorithm", "lora, loha or lokr; LyCORIS' locon is lora with --conv-rank"),
    "LoRA_type": to("algorithm", "lora, loha or lokr; LoCon is lora with --conv-rank"),
    "dora_wd": to("algorithm", "dora; not with loha or lokr"),
    "network_dim": to("rank", "of the UNet; kohya's layers are those of --targets full; --text-encoder-rank is apart"),
    "network_alpha": to("alpha", "the rank is the default here, 1 there; --text-encoder-alpha is apart"),
    "conv_dim": to("conv_rank", "of all convolutions; kohya's 1x1 ones have network_dim"),
    "network_dropout": AFTER_DOWN, "dropout": to("lora_dropout", "drops the adapter's inputs"),
    "rank_dropout module_dropout rank_dropout_scale": no("not available; there is --lora-dropout"),
    "rs_lora": to("rslora"), "factor": to("lokr_factor", "-1 there is auto"),
    "preset LyCORIS_preset": to("targets", "attn-only: attention; attn-mlp: full; convolutions have --conv-rank"),
    "include_patterns exclude_patterns": LAYERS,
    "network_args": no("each has its own option, e.g. --conv-rank for conv_dim"),
    "block_dims block_alphas conv_block_dims conv_block_alphas conv_dims conv_alphas network_reg_dims": no(
        "not available: layers of one kind share rank and alpha; --targets chooses the layers"
    ),
    "down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold network_reg_lrs loraplus_lr_ratio "
    "loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio": no("not available: the UNet has one --learning-rate"),
    "use_tucker use_cp use_conv_cp disable_conv_cp decompose_both full_matrix unbalanced_factorization use_scalar "
    "train_norm block_size constraint constrain rescaled wd_on_output bypass_mode unit train_on_input": LYCORIS,
    "verbose split_mode": NOT_HERE,
    "network_train_unet_only": to("text_encoder_rank", "0, and --text-encoder-2-rank 0 for SDXL"),
    "network_train_text_encoder_only": no("not available: the UNet is always trained"),
    "stop_text_encoder_training": SPAN, "network_weights lora_network_weights dim_from_weights": FRESH,
    "base_weights base_weights_multiplier": no("not available: `scumble adapter bake` merges adapters into a base"),
    "scale_weight_norms": no("not available; --weight-decay keeps weights small"),
    # the loss
    "loss_type": to("loss_type", "l2 or huber; l1 and smooth_l1 are not available"),
    "huber_c": to("huber_delta", "the same at every timestep"),
    "huber_schedule huber_scale": no("not available: --huber-delta is the same at every timestep"),
    "min_snr_gamma": MIN_SNR, "debiased_estimation_loss": to("loss_weighting", "debiased"),
    "scale_v_pred_loss_like_noise_pred v_pred_like_loss": no("not available; there is --loss-weighting"),
    "multires_noise_discount": to("multires_noise_discount", "0 is off; there it is off without iterations"),
    "multires_noise_iterations": to("multires_noise_discount", "all octaves that fit are used; 0 is off"),
    "ip_noise_gamma": to("input_perturbation"),
    "noise_offset_random_strength ip_noise_gamma_random_strength adaptive_noise_scale": no(
        "not available: the strength of noise is the same in each step"
    ), "noise_offset_type": no("--noise-offset, --multires-noise-discount, or both"),
    "max_timestep": to("max_timestep", "the last that is trained: kohya's 1000 is 999"),
    # optimization
    "optimizer_type": to("optimizer"),
    "optimizer_args": to("weight_decay", "no other argument of an optimizer can be set"), "use_8bit_adam": ADAMW8BIT,
    "use_lion_optimizer": to("optimizer", "lion"), "learning_rate": to("learning_rate", "of the UNet"),
    "unet_lr": to("learning_rate"), "text_encoder_lr": to("text_encoder_lr", "a second value is --text-encoder-2-lr"),
    "text_encoder_lr1": to("text_encoder_lr"), "text_encoder_lr2": to("text_encoder_2_lr"),
    "lr_scheduler": to("lr_scheduler", "no polynomial, adafactor or inverse_sqrt"),
    "lr_scheduler_num_cycles": to("lr_num_cycles"),
    "lr_warmup": to("lr_warmup_steps", "percent of the run there: 10 is 0.1"),
    "lr_scheduler_type lr_scheduler_args lr_scheduler_power lr_scheduler_timescale lr_decay_steps": CURVE,
    "lr_scheduler_min_lr_ratio": no("not available: schedules end at 0"), "max_train_steps": to("steps"),
    "max_train_epochs epoch": to("epochs"), "train_batch_size batch_size": GLOBAL_BATCH,
    "fused_backward_pass cpu_offload_checkpointing lowram lowvram highvram": MEMORY,
    # the machine
    "full_fp16 full_bf16": FP32_ADAPTER, "fp8_base fp8_base_unet": QUANTIZED, "no_half_vae sdxl_no_half_vae": VAE_DTYPE,
    "xformers": XFORMERS, "sdpa mem_eff_attn": to("attention", "sdpa, the default"),
    "dynamo_backend dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic": no("set by the program with --torch-compile"),
    "deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device "
    "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients": no(
        "no DeepSpeed: a run is one process on one device"
    ),
    "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph num_processes num_machines multi_gpu gpu_ids "
    "main_process_port num_cpu_threads_per_process extra_accelerate_launch_args": ONE_PROCESS,
    # previews
    "sample_prompts": to("prompt_file", "a text file, one prompt a line; kohya's --n --w --h --d --l --s are read"),
    "sample_sampler": to("sampler", "ddim, euler, euler_a or dpmpp_2m"), "sample_every_n_steps": to("preview_every"),
    "sample_every_n_epochs": to("preview_every", "epoch, or a number of steps"), "sample_at_first": PAINTED_FIRST,
    # what is saved
    "save_every_n_steps": to("save_every"), "save_every_n_epochs": to("save_every", "epoch, or a number of steps"),
    "save_n_epoch_ratio": to("save_every", "a number of steps, or epoch"), "save_last_n_epochs": KEPT,
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
    "config_file": no("a TOML file of options is given as it is: scumble train my.toml"),
    "output_config save_as_bool": no("options.toml in the run folder has all options of a run"),
    "additional_parameters": no("give each as its own option"),
})  # fmt: skip

ONETRAINER = table(
    "learning_rate epochs gradient_accumulation_steps gradient_checkpointing ema_decay weight_decay optimizer "
    "save_every", {
    "training_method": no("a run always trains an adapter"), "model_type": DETECTED, "base_model_name": to("base"),
    "extra_model_name": OTHER_BASES, "vae.model_name": to("vae"),
    "workspace_dir": to("output_dir", "holds a folder for each run"),
    "output_model_destination save_filename_prefix": to("output_name", "without folder and ending"),
    "output_dtype": to("save_precision"), "output_model_format": SAFETENSORS, "cache_dir": to("latent_cache"),
    "image_caching latent_caching latent_caching_epochs clear_cache_before_training only_cache": CACHED,
    "text_caching": TEXT_KEPT,
    "tensorboard tensorboard_expose tensorboard_always_on tensorboard_port samples_to_tensorboard": NO_TRACKER,
    "validation": to("validation_split", "auto, a share, a count or a folder"),
    "validate_after validate_after_unit": VALIDATED, "continue_last_backup": RESUMED,
    "include_train_config": no("options.toml in the run folder has all options of a run"),
    "debug_mode debug_dir prevent_overwrites force_circular_padding cloud secrets": NOT_HERE,
    "multi_gpu device_indexes gradient_reduce_precision fused_gradient_reduce async_gradient_reduce "
    "async_gradient_reduce_buffer": ONE_PROCESS,
    # concepts
    "concept_file_name concepts": to("images", "a folder, or a TOML list of folders"), "concepts.path": IMAGES,
    "concepts.validation_concept": to("validation_split", "a folder"),
    "concepts. balancing repeats": to("repeats", "a whole number"),
    "concepts.include_subdirectories": no("folders within folders are always read"),
    "concepts. name seed enabled balancing_strategy loss_weight image_variations text_variations": NOT_HERE,
    "concepts.image.enable_random_flip": to("random_flip"), "concepts.image.enable_crop_jitter": to("crop", "random"),
    "concepts.image. resolution_override enable_resolution_override": SQUARE,
    "concepts.image. enable_random_rotate enable_random_brightness enable_random_contrast enable_random_saturation "
    "enable_random_hue": COLORS, "circular_mask_generation random_rotate_and_crop": COLORS,
    "concepts.text. prompt_source prompt_path": CAPTIONS, "concepts.text.enable_tag_shuffling": to("shuffle_tags"),
    "concepts.text.keep_tags_count": to("keep_tags"),
    "concepts.text. tag_dropout_enable tag_dropout_probability": to("tag_dropout"),
    "concepts.text.tag_delimiter": COMMAS,
    "concepts.text. tag_dropout_mode tag_dropout_special_tags caps_randomize_enable": NOT_HERE,
    "aspect_ratio_bucketing": BUCKETS, "resolution": to("resolution", "further ones are --more-resolutions"),
    "frames sample_video_format sample_audio_format": VIDEO,
    "masked_training": to("masks", "auto, the default, uses the masks that there are"),
    "unmasked_weight": to("mask_floor"),
    "normalize_masked_area_loss": no("always: the weights within an image have mean 1"),
    "unmasked_probability masked_prior_preservation_weight": NOT_HERE, "custom_conditioning_image": CONTROLS,
    # the adapter
    "peft_type": to("algorithm", "lora, loha or lokr"),
    "lora_rank lokr_dim": to("rank", "of the UNet; --text-encoder-rank is apart"),
    "lora_alpha": to("alpha", "the rank is the default here, 1 there"), "lora_decompose": DORA,
    "dropout_probability": AFTER_DOWN, "lokr_decompose_factor": to("lokr_factor", "-1 there is auto"),
    "layer_filter lora_layers": to("targets", "attention, full or a regex"),
    "layer_filter_preset lora_layer_preset": to("targets", "attn-only: attention; attn-mlp: full"),
    "layer_filter_regex lora_layers_regex": no("--targets takes a regex as it is"), "lora_weight_dtype": FP32_ADAPTER,
    "lora_model_name": FRESH,
    "lora_decompose_norm_epsilon lora_decompose_output_axis lokr_decompose_both lokr_use_tucker lokr_weight_decompose "
    "lokr_dora_on_output lokr_full_matrix lokr_vec_trick": LYCORIS,
    "oft_block_size oft_block_share dora_oft oft_scaled oft_clipped_norm oft_cans": no("no OFT adapters"),
    "embedding embeddings additional_embeddings embedding_learning_rate preserve_embedding_norm embedding_weight_dtype "
    "bundle_additional_embeddings token_count initial_embedding_text": EMBEDDINGS,
    "text_encoder. text_encoder_2. train_embedding": EMBEDDINGS,
    # what is trained, each part of the base
    "unet.learning_rate unet_learning_rate": to("learning_rate"),
    "text_encoder.learning_rate text_encoder_learning_rate": to("text_encoder_lr"),
    "text_encoder_2.learning_rate text_encoder_2_learning_rate": to("text_encoder_2_lr"),
    "text_encoder.train train_text_encoder": TEXT_ENCODER,
    "text_encoder_2.train train_text_encoder_2": to("text_encoder_2_rank", "0: not trained"),
    "text_encoder. text_encoder_2. dropout_probability": to("caption_dropout", "for both at once"),
    "text_encoder_layer_skip text_encoder_2_layer_skip": CLIP_SKIP,
    "text_encoder_sequence_length text_encoder_2_sequence_length": TOKENS,
    "unet.train train_unet": no("the UNet is always trained"),
    "train_unet_epochs train_text_encoder_epochs train_text_encoder_2_epochs": SPAN,
    "unet. text_encoder. text_encoder_2. stop_training_after stop_training_after_unit": SPAN,
    "unet. text_encoder. text_encoder_2. gradient_checkpointing": to("gradient_checkpointing"),
    "unet.weight_dtype unet_weight_dtype weight_dtype": to("mixed_precision", "8 and 4 bits: --base-quantization"),
    "text_encoder. text_encoder_2. weight_dtype": BASE_DTYPE,
    "text_encoder_weight_dtype text_encoder_2_weight_dtype": BASE_DTYPE, "vae.weight_dtype vae_weight_dtype": VAE_DTYPE,
    "unet. text_encoder. text_encoder_2. offload_fraction activation_offloading": MEMORY,
    "async_offloading enable_async_offloading enable_activation_offloading layer_offload_fraction temp_device "
    "enable_autocast_cache fallback_train_dtype": MEMORY,
    "prior transformer unconditional_transformer quantization text_encoder_3 text_encoder_4 effnet_encoder decoder "
    "decoder_text_encoder decoder_vqgan text_encoder_3_layer_skip text_encoder_4_layer_skip": OTHER_BASES,
    # optimization
    "batch_size": GLOBAL_BATCH,
    "learning_rate_scheduler": to("lr_scheduler", "its cosine ends at half the rate, its rex falls later"),
    "custom_learning_rate_scheduler scheduler_params": CURVE,
    "learning_rate_warmup_steps": to("lr_warmup_steps", "above 1 it counts forward passes there"),
    "learning_rate_cycles": to("lr_num_cycles", "with COSINE_WITH_HARD_RESTARTS"),
    "learning_rate_min_factor": no("not available: schedules end at 0"),
    "learning_rate_scaler": no("not available: multiply --learning-rate yourself"),
    "clip_grad_norm": to("max_grad_norm"), "ema": to("ema_decay", "0 is off"),
    "ema_update_step_interval": no("the average is updated in each step"), "optimizer.optimizer": to("optimizer"),
    "optimizer.weight_decay": to("weight_decay"),
    "optimizer. beta1 beta2 eps d_coef fused_back_pass stochastic_rounding": DECAY_ONLY,
    "optimizer_defaults": DECAY_ONLY, "train_device": to("device"), "train_dtype": to("mixed_precision"),
    "compile": to("torch_compile", "on"), "attention_mechanism": to("attention"),
    "caching_threads dataloader_threads prefetch_next_batch": NO_LOADER,
    # the loss
    "mse_strength": to("loss_type", "l2"), "huber_strength": to("loss_type", "huber"),
    "huber_delta": to("huber_delta", "of the pseudo-Huber loss"),
    "mae_strength log_cosh_strength vb_loss_strength": no("not available: --loss-type is l2 or huber"),
    "loss_weight_fn": to("loss_weighting", "none, min_snr or debiased; min_snr is the default here"),
    "loss_weight_strength min_snr_gamma": to("min_snr_gamma"), "loss_scaler": NOT_HERE,
    "offset_noise_weight": to("noise_offset"), "generalized_offset_noise cep_gamma": NOT_HERE,
    "perturbation_noise_weight": to("input_perturbation"),
    "rescale_noise_scheduler_to_zero_terminal_snr": to("zero_terminal_snr"), "force_v_prediction": V_PREDICTION,
    "force_epsilon_prediction": to("prediction_type", "epsilon"),
    "min_noising_strength": to("min_timestep", "a share of the 1000 timesteps there"),
    "max_noising_strength": to("max_timestep", "a share of the 1000 timesteps there: 1 is 999"),
    "timestep_distribution noising_weight noising_bias timestep_shift dynamic_timestep_shifting": TIMESTEPS,
    # previews and what is saved
    "sample_definition_file_name": to("prompt_file", "a text file, one prompt a line"),
    "samples samples.prompt": to("prompts"), "samples.negative_prompt": to("negative_prompt"),
    "samples. width height": PREVIEW_SIDE, "samples.seed": to("preview_seed", "each further prompt adds 1"),
    "samples.diffusion_steps": to("num_inference_steps"), "samples.cfg_scale": to("guidance_scale"),
    "samples.noise_scheduler": to("sampler", "ddim, euler, euler_a or dpmpp_2m"),
    "samples. enabled random_seed force_last_timestep": NOT_HERE,
    "non_ema_sampling sample_skip_first save_skip_first": NOT_HERE,
    "sample_after sample_after_unit": to("preview_every", "steps, or epoch"),
    "sample_image_format": no("previews are PNG files"),
    "backup_after backup_after_unit backup_before_save rolling_backup rolling_backup_count": STATE,
    "save_after save_after_unit save_every_unit": to("save_every", "steps, or epoch"),
})  # fmt: skip

AI_TOOLKIT = table(
    "", {
    "job type": no("a run always trains an adapter"), "name": to("output_name"), "training_folder": to("output_dir"),
    "device": to("device", "cuda, without a number"), "trigger_word datasets.trigger_word": to("trigger"),
    "performance_log_every": NO_TRACKER, "logging. log_every verbose use_wandb project_name run_name": NO_TRACKER,
    "meta. name version": METADATA,
    # the adapter
    "network.type": to("algorithm", "lora or lokr; locon is lora with --conv-rank"),
    "network. linear rank": to("rank", "of the UNet; --text-encoder-rank is apart"),
    "network. linear_alpha alpha": to("alpha", "the rank is the default here, 1 there"),
    "network.conv": to("conv_rank"), "network.conv_alpha": to("conv_alpha"), "network.dropout": AFTER_DOWN,
    "network.lokr_factor": to("lokr_factor", "-1 there is auto"), "network.lokr_full_rank": LYCORIS,
    "network.network_kwargs. ignore_if_contains only_if_contains": LAYERS,
    "network. transformer_only split_multistage_loras lorm": OTHER_BASES,
    # images and captions
    "datasets. folder_path dataset_path": IMAGES, "datasets. caption_ext caption_type": CAPTIONS,
    "datasets.default_caption": no("the folder's name sets it (10_zwx cat), or --trigger"),
    "datasets.caption_dropout_rate train.prompt_dropout_prob": to("caption_dropout"),
    "datasets.token_dropout_rate": to("tag_dropout"), "datasets.shuffle_tokens": to("shuffle_tags"),
    "datasets.keep_tokens": to("keep_tags", "1 is the default here"),
    "datasets.resolution": to("resolution", "one number; further ones are --more-resolutions"),
    "datasets.cache_latents": CACHED,
    "datasets.cache_latents_to_disk": to("latent_cache", "a folder; on the disk by default"),
    "datasets. train. cache_text_embeddings": TEXT_KEPT, "train.unload_text_encoder": TEXT_KEPT,
    "datasets.random_crop": to("crop", "random"), "datasets.flip_x": to("random_flip"),
    "datasets. flip_y augments augmentations random_scale scale": COLORS, "datasets. buckets square_crop": BUCKETS,
    "datasets.bucket_tolerance": to("bucket_reso_steps"), "datasets.num_repeats": to("repeats"),
    "datasets.is_reg": to("regularization_images", "a folder"), "train.reg_weight": to("prior_loss_weight"),
    "datasets.alpha_mask": to("masks", "alpha"), "datasets.mask_path": ALL_MASKED,
    "datasets.mask_min_value": to("mask_floor"),
    "datasets. invert_mask network_weight loss_multiplier poi replacements random_triggers use_short_captions "
    "type": NOT_HERE, "datasets. control_path inpaint_path controls": CONTROLS,
    "sample.samples. ctrl_img ctrl_img_1 ctrl_img_2 ctrl_img_3": CONTROLS,
    "datasets. num_workers prefetch_factor": NO_LOADER, "datasets. sample. num_frames fps": VIDEO,
    # training
    "train.steps": to("steps", "optimizer steps"), "train.batch_size": to("batch_size"),
    "train.gradient_accumulation": to("gradient_accumulation_steps"),
    "train.gradient_accumulation_steps": to("gradient_accumulation_steps", "train.steps counts forward passes there"),
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
    "train.max_denoising_steps": to("max_timestep", "the last that is trained, at most 999"),
    "train.noise_scheduler": no("the noise schedule is the base's own; there is --zero-terminal-snr"),
    "train. timestep_type linear_timesteps linear_timesteps2 content_or_style snr_gamma": TIMESTEPS,
    "train. bypass_guidance_embedding switch_boundary_every train_refiner refiner_lr": OTHER_BASES,
    "train. diff_output_preservation diff_output_preservation_multiplier diff_output_preservation_class "
    "inverted_mask_prior": no("not available; there is --regularization-images"), "train.start_step": RESUMED,
    # the base
    "model.name_or_path": to("base"), "model.vae_path": to("vae"), "model. arch is_v2 is_xl": DETECTED,
    "model.is_v_pred": V_PREDICTION,
    "model. is_flux is_v3 is_lumina2 extras_name_or_path assistant_lora_path refiner_name_or_path "
    "te_name_or_path": OTHER_BASES,
    "model.model_kwargs. llama_model_path invert_inpaint_mask_chance inpaint_dropout control_dropout "
    "inpaint_random_chance do_random_inpainting random_blur_mask random_dialate_mask train_high_noise "
    "train_low_noise": OTHER_BASES, "model. quantize qtype": QUANTIZED, "model. quantize_te qtype_te low_vram": MEMORY,
    "model.lora_path": no("not available: `scumble adapter bake` merges adapters into a base"),
    "model.compile": to("torch_compile", "on"),
    # previews and what is saved
    "sample. prompts samples samples.prompt": to("prompts"), "sample.neg": to("negative_prompt"),
    "sample.sampler": to("sampler", "ddim, euler, euler_a or dpmpp_2m"),
    "sample.sample_steps": to("num_inference_steps"), "sample.guidance_scale": to("guidance_scale"),
    "sample. width height": PREVIEW_SIDE, "sample.seed": to("preview_seed", "each further prompt adds 1"),
    "sample.walk_seed": no("always: each further prompt adds 1 to --preview-seed"),
    "sample.sample_every": to("preview_every"), "train.disable_sampling": to("preview_every", "0: none"),
    "train. skip_first_sample force_first_sample": PAINTED_FIRST, "sample.sample_start_step": PAINTED_FIRST,
    "sample.format": no("previews are PNG files"), "save.save_every": to("save_every"),
    "save.dtype": to("save_precision"), "save.max_step_saves_to_keep": KEPT, "save.save_format": SAFETENSORS,
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
"""Of an option of ours: values of other trainers in small letters -> ours, where they differ and mean the same."""


def plain(name: str) -> str:
    """A name as the tables have it: without dashes, indices and the frame that every file of ai-toolkit has."""
    dotted = re.sub(r"\[\d*\]", "", name.strip().lstrip("-").replace("-", "_"))
    return dotted.removeprefix("config.").removeprefix("process.")


def hint(name: str) -> str:
    """`here it is --batch-size (of all devices)`, or why there is none; "" for a name that no other trainer has.

    `name` is a flag or a key, also the last part of a dotted one where that is unambiguous.
    """
    key = plain(name)
    for names in (DIFFUSERS, KOHYA, ONETRAINER, AI_TOOLKIT):
        if key in names:
            return _said(names[key])
    ending = {row for names in (ONETRAINER, AI_TOOLKIT) for dotted, row in names.items() if dotted.endswith("." + key)}
    return _said(ending.pop()) if len(ending) == 1 else ""


def _said(row: Foreign) -> str:
    if not row.option:
        return row.reason
    return f"here it is --{row.option.replace('_', '-')}" + (f" ({row.note})" if row.note else "")
