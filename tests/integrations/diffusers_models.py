"""Tiny configurations of the models of diffusers that have attention, and inputs for them.

Each entry is (configuration, inputs): a tuple of integers stands for a random tensor of that shape,
and the first input is the one that has a tangent.
"""

import torch

HEADS = {"num_attention_heads": 2, "num_layers": 1}
TEXT, POOLED = (1, 5, 10), (1, 8)
IMAGE, VIDEO = (1, 4, 8, 8), (1, 4, 2, 8, 8)
TIME, STEP = torch.tensor([0.3], dtype=torch.float64), torch.tensor([3])
ONES = torch.ones(1, 5)


def grid(rows: int, columns: int = 3) -> torch.Tensor:
    """Positions of tokens, (rows, columns)."""
    return torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) % 3


WAN = HEADS | {
    "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 10, "freq_dim": 8,
    "ffn_dim": 16, "rope_max_seq_len": 16,
}  # fmt: skip
WAN_INPUTS = {"hidden_states": VIDEO, "timestep": STEP, "encoder_hidden_states": TEXT}
FLUX = HEADS | {
    "in_channels": 4, "num_single_layers": 1, "attention_head_dim": 16, "joint_attention_dim": 10,
    "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
FLUX_INPUTS = {
    "hidden_states": (1, 7, 4), "encoder_hidden_states": TEXT, "timestep": TIME,
    "img_ids": grid(7), "txt_ids": grid(5),
}  # fmt: skip
HUNYUAN = HEADS | {
    "in_channels": 4, "out_channels": 4, "attention_head_dim": 12, "num_single_layers": 1,
    "num_refiner_layers": 1, "text_embed_dim": 10, "rope_axes_dim": (4, 4, 4),
    "guidance_embeds": False,
}  # fmt: skip
HUNYUAN_INPUTS = {
    "hidden_states": VIDEO, "timestep": STEP, "encoder_hidden_states": TEXT,
    "encoder_attention_mask": ONES, "pooled_projections": POOLED,
}  # fmt: skip
COGVIEW = HEADS | {
    "in_channels": 4, "out_channels": 4, "attention_head_dim": 8, "text_embed_dim": 10,
    "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
}  # fmt: skip
SIZE = torch.tensor([[8.0, 8.0]], dtype=torch.float64)
COGVIEW_INPUTS = {
    "hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": STEP,
    "original_size": SIZE, "target_size": SIZE, "crop_coords": SIZE,
}  # fmt: skip
COGVIDEO = HEADS | {
    "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 10, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "max_text_seq_length": 5,
}  # fmt: skip
FRAMES_FIRST = {
    "hidden_states": (1, 2, 4, 8, 8), "encoder_hidden_states": TEXT, "timestep": STEP
}  # fmt: skip
UNET = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 2,
}  # fmt: skip
SANA = HEADS | {
    "in_channels": 4, "out_channels": 4, "attention_head_dim": 12, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 10,
    "sample_size": 8,
}  # fmt: skip
TEXT_TO_IMAGE = {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": STEP}

MODELS: dict[str, tuple[dict, dict]] = {
    "AllegroTransformer3DModel": (
        HEADS | {"attention_head_dim": 12, "cross_attention_dim": 24, "sample_height": 8,
                 "sample_width": 8, "sample_frames": 2, "caption_channels": 10},
        {"hidden_states": VIDEO, "encoder_hidden_states": TEXT, "timestep": STEP,
         "attention_mask": torch.ones(1, 2, 8, 8), "encoder_attention_mask": ONES},
    ),
    "AnyFlowTransformer3DModel": (
        WAN, WAN_INPUTS | {"hidden_states": (1, 2, 4, 8, 8),
                          "timestep": STEP.expand(1, 2), "r_timestep": STEP.expand(1, 2) - 1},
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 10,
         "caption_projection_dim": 16, "pos_embed_max_size": 64},
        TEXT_TO_IMAGE | {"timestep": TIME},
    ),
    "BriaTransformer2DModel": (FLUX, FLUX_INPUTS),
    "BriaFiboTransformer2DModel": (
        FLUX | {"text_encoder_dim": 6},
        FLUX_INPUTS | {"text_encoder_layers": [(1, 5, 6), (1, 5, 6)]},
    ),
    "ChromaTransformer2DModel": (
        FLUX | {"approximator_num_channels": 16, "approximator_hidden_dim": 16,
                "approximator_layers": 1},
        FLUX_INPUTS,
    ),
    "ChronoEditTransformer3DModel": (WAN, WAN_INPUTS),
    "CogVideoXTransformer3DModel": (COGVIDEO, FRAMES_FIRST),
    "CogView3PlusTransformer2DModel": (COGVIEW, COGVIEW_INPUTS),
    "CogView4Transformer2DModel": (COGVIEW | {"rope_axes_dim": (4, 4)}, COGVIEW_INPUTS),
    "ConsisIDTransformer3DModel": (COGVIDEO, FRAMES_FIRST),
    "CosmosTransformer3DModel": (
        HEADS | {"in_channels": 4, "out_channels": 4, "attention_head_dim": 12, "mlp_ratio": 2,
                 "text_embed_dim": 10, "adaln_lora_dim": 4, "max_size": (4, 8, 8),
                 "extra_pos_embed_type": None, "concat_padding_mask": False},
        WAN_INPUTS,
    ),
    "DiTTransformer2DModel": (
        HEADS | {"attention_head_dim": 4, "sample_size": 8, "num_embeds_ada_norm": 10,
                 "norm_num_groups": 2},
        {"hidden_states": IMAGE, "timestep": STEP, "class_labels": torch.tensor([1])},
    ),
    "EasyAnimateTransformer3DModel": (
        HEADS | {"attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "mmdit_layers": 1,
                 "time_embed_dim": 4, "patch_size": 2, "text_embed_dim": 10, "sample_width": 8,
                 "sample_height": 8},
        WAN_INPUTS,
    ),
    "Flux2Transformer2DModel": (
        FLUX | {"timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 4, 4),
                "guidance_embeds": False},
        FLUX_INPUTS | {"img_ids": grid(7, 4), "txt_ids": grid(5, 4)},
    ),
    "Flux3Transformer2DModel": (
        FLUX | {"cond_in_channels": 4, "timestep_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
        FLUX_INPUTS | {"img_ids": grid(7, 4), "txt_ids": grid(5, 4)},
    ),
    "FluxTransformer2DModel": (
        FLUX | {"pooled_projection_dim": 8}, FLUX_INPUTS | {"pooled_projections": POOLED}
    ),
    "HunyuanDiT2DModel": (
        {"num_attention_heads": 2, "num_layers": 2, "attention_head_dim": 8, "in_channels": 4,
         "patch_size": 2, "sample_size": 8, "hidden_size": 16, "cross_attention_dim": 10,
         "cross_attention_dim_t5": 16, "pooled_projection_dim": 8, "text_len": 5, "text_len_t5": 6,
         "use_style_cond_and_image_meta_size": False},
        TEXT_TO_IMAGE | {"timestep": TIME, "text_embedding_mask": ONES,
                         "encoder_hidden_states_t5": (1, 6, 16),
                         "text_embedding_mask_t5": torch.ones(1, 6)},
    ),
    "HunyuanImageTransformer2DModel": (
        HUNYUAN | {"attention_head_dim": 8, "rope_axes_dim": (4, 4)},
        {k: v for k, v in HUNYUAN_INPUTS.items() if k != "pooled_projections"}
        | {"hidden_states": (1, 4, 4, 4), "timestep": TIME},
    ),
    "HunyuanVideo15Transformer3DModel": (
        {k: v for k, v in HUNYUAN.items() if k not in ("num_single_layers", "guidance_embeds")}
        | {"text_embed_2_dim": 6, "image_embed_dim": 8, "target_size": 16},
        {"hidden_states": (1, 4, 1, 4, 4), "timestep": TIME, "encoder_hidden_states": TEXT,
         "encoder_attention_mask": ONES, "encoder_hidden_states_2": (1, 3, 6),
         "encoder_attention_mask_2": torch.ones(1, 3), "image_embeds": (1, 4, 8)},
    ),
    "HunyuanVideoTransformer3DModel": (HUNYUAN | {"pooled_projection_dim": 8}, HUNYUAN_INPUTS),
    "Kandinsky5Transformer3DModel": (
        {"in_text_dim": 10, "in_text_dim2": 8, "time_dim": 8, "model_dim": 24, "ff_dim": 16,
         "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 4, 4)},
        {"hidden_states": (1, 2, 8, 8, 4), "encoder_hidden_states": TEXT, "timestep": TIME,
         "pooled_projections": POOLED, "text_rope_pos": torch.arange(5),
         "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)]},
    ),
    "LTXVideoTransformer3DModel": (
        HEADS | {"in_channels": 4, "out_channels": 4, "attention_head_dim": 8,
                 "cross_attention_dim": 16, "caption_channels": 10},
        {"hidden_states": (1, 8, 4), "encoder_hidden_states": TEXT, "timestep": STEP,
         "encoder_attention_mask": ONES, "num_frames": 2, "height": 2, "width": 2},
    ),
    "LatteTransformer3DModel": (
        HEADS | {"attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "sample_size": 8,
                 "patch_size": 2, "attention_bias": True, "num_embeds_ada_norm": 10,
                 "cross_attention_dim": 16, "norm_type": "ada_norm_single",
                 "norm_elementwise_affine": False, "caption_channels": 10, "video_length": 2},
        WAN_INPUTS,
    ),
    "LongCatImageTransformer2DModel": (FLUX | {"pooled_projection_dim": 10}, FLUX_INPUTS),
    "Lumina2Transformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1,
         "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 4,
         "axes_dim_rope": (4, 4, 4), "axes_lens": (16, 16, 16), "cap_feat_dim": 10},
        TEXT_TO_IMAGE | {"timestep": TIME, "encoder_attention_mask": ONES.bool()},
    ),
    "LuminaNextDiT2DModel": (
        {"sample_size": 8, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2,
         "num_kv_heads": 1, "multiple_of": 4, "cross_attention_dim": 10, "learn_sigma": False},
        TEXT_TO_IMAGE | {"timestep": TIME, "encoder_mask": ONES.bool(),
                         "cross_attention_kwargs": {},
                         "image_rotary_emb": torch.polar(
                             torch.ones(8, 8, 4), grid(64, 4).view(8, 8, 4))},
    ),
    "MochiTransformer3DModel": (
        {"num_attention_heads": 2, "num_layers": 2, "attention_head_dim": 8, "in_channels": 4,
         "pooled_projection_dim": 8, "text_embed_dim": 16, "time_embed_dim": 4},
        WAN_INPUTS | {"encoder_hidden_states": (1, 5, 16),
                      "encoder_attention_mask": ONES.bool()},
    ),
    "OvisImageTransformer2DModel": (FLUX | {"out_channels": 4}, FLUX_INPUTS),
    "PRXTransformer2DModel": (
        {"in_channels": 4, "context_in_dim": 10, "hidden_size": 16, "mlp_ratio": 2.0,
         "num_heads": 2, "depth": 1, "axes_dim": (4, 4)},
        TEXT_TO_IMAGE | {"timestep": TIME},
    ),
    "PixArtTransformer2DModel": (
        HEADS | {"attention_head_dim": 8, "cross_attention_dim": 16, "sample_size": 8,
                 "norm_num_groups": 2, "num_embeds_ada_norm": 10, "caption_channels": 10},
        TEXT_TO_IMAGE | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "PriorTransformer": (
        HEADS | {"attention_head_dim": 4, "embedding_dim": 8, "num_embeddings": 5},
        {"hidden_states": (1, 8), "timestep": STEP, "proj_embedding": (1, 8),
         "encoder_hidden_states": (1, 5, 8)},
    ),
    "QwenImageTransformer2DModel": (
        HEADS | {"in_channels": 4, "out_channels": 1, "attention_head_dim": 16,
                 "joint_attention_dim": 10, "axes_dims_rope": (4, 4, 8)},
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": TEXT, "timestep": TIME,
         "encoder_hidden_states_mask": ONES, "img_shapes": [(1, 4, 4)]},
    ),
    "SD3Transformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 10,
         "caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 8},
        TEXT_TO_IMAGE | {"pooled_projections": POOLED},
    ),
    "SanaTransformer2DModel": (SANA, TEXT_TO_IMAGE),
    "SanaVideoTransformer3DModel": (SANA, WAN_INPUTS),
    "SkyReelsV2Transformer3DModel": (WAN, WAN_INPUTS),
    "StableAudioDiTModel": (
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1,
         "attention_head_dim": 8, "num_attention_heads": 4, "num_key_value_attention_heads": 2,
         "cross_attention_dim": 16, "time_proj_dim": 8, "global_states_input_dim": 10,
         "cross_attention_input_dim": 10},
        {"hidden_states": (1, 4, 8), "timestep": TIME, "encoder_hidden_states": TEXT,
         "global_hidden_states": (1, 1, 10)},
    ),
    "Transformer2DModel": (
        HEADS | {"attention_head_dim": 8, "in_channels": 8, "norm_num_groups": 2,
                 "cross_attention_dim": 10},
        {"hidden_states": (1, 8, 4, 4), "encoder_hidden_states": TEXT},
    ),
    "TransformerTemporalModel": (
        HEADS | {"attention_head_dim": 8, "in_channels": 8, "norm_num_groups": 2},
        {"hidden_states": (4, 8, 3, 3), "num_frames": 2},
    ),
    "WanTransformer3DModel": (WAN, WAN_INPUTS),
    "WanVACETransformer3DModel": (
        WAN | {"vace_layers": [0], "vace_in_channels": 6},
        WAN_INPUTS | {"control_hidden_states": (1, 6, 2, 8, 8)},
    ),
    "AceStepTransformer1DModel": (
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "in_channels": 12,
         "audio_acoustic_hidden_dim": 4, "sliding_window": 2, "encoder_hidden_size": 10},
        {"hidden_states": (1, 8, 4), "timestep": TIME, "timestep_r": TIME,
         "encoder_hidden_states": TEXT, "context_latents": (1, 8, 8)},
    ),
    "ErnieImageTransformer2DModel": (
        HEADS | {"hidden_size": 32, "ffn_hidden_size": 32, "in_channels": 4, "out_channels": 4,
                 "text_in_dim": 10, "rope_axes_dim": (4, 4, 8)},
        {"hidden_states": (1, 4, 4, 4), "timestep": TIME, "text_bth": TEXT,
         "text_lens": torch.tensor([5])},
    ),
    "GlmImageTransformer2DModel": (
        HEADS | {"in_channels": 4, "out_channels": 4, "attention_head_dim": 8,
                 "text_embed_dim": 10, "time_embed_dim": 8, "condition_dim": 4,
                 "prior_vq_quantizer_codebook_size": 6},
        {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": STEP,
         "prior_token_id": torch.arange(16)[None] % 6, "target_size": SIZE, "crop_coords": SIZE,
         "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool)},
    ),
    "HeliosTransformer3DModel": (
        {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
        | {"rope_dim": (4, 4, 4), "has_multi_term_memory_patch": False,
           "zero_history_timestep": False, "guidance_cross_attn": False},
        WAN_INPUTS,
    ),
    "JoyImageEditTransformer3DModel": (
        HEADS | {"in_channels": 4, "hidden_size": 32, "text_dim": 10, "mlp_width_ratio": 2.0,
                 "rope_dim_list": [4, 4, 8]},
        {"hidden_states": (1, 1, 4, 2, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT},
    ),
    "Krea2Transformer2DModel": (
        HEADS | {"in_channels": 4, "attention_head_dim": 12, "num_key_value_heads": 1,
                 "intermediate_size": 16, "timestep_embed_dim": 8, "text_hidden_dim": 16,
                 "num_text_layers": 2, "text_num_attention_heads": 2,
                 "text_num_key_value_heads": 1, "text_intermediate_size": 16,
                 "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
                 "axes_dims_rope": (4, 4, 4)},
        {"hidden_states": (1, 7, 4), "encoder_hidden_states": (1, 5, 2, 16), "timestep": TIME,
         "position_ids": grid(12)},
    ),
    "LTX2VideoTransformer3DModel": (
        HEADS | {"in_channels": 4, "out_channels": 4, "attention_head_dim": 12,
                 "cross_attention_dim": 24, "audio_in_channels": 4, "audio_out_channels": 4,
                 "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
                 "audio_cross_attention_dim": 8, "caption_channels": 10},
        {"hidden_states": (1, 8, 4), "audio_hidden_states": (1, 3, 4),
         "encoder_hidden_states": TEXT, "audio_encoder_hidden_states": TEXT, "timestep": STEP,
         "encoder_attention_mask": ONES, "audio_encoder_attention_mask": ONES, "num_frames": 2,
         "height": 2, "width": 2, "audio_num_frames": 3},
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 16, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": 10, "latent_dim": 4,
         "ff_mult": 2.0},
        {"hidden_states": (1, 7, 4), "encoder_hidden_states": TEXT, "timestep": TIME,
         "encoder_attention_mask": ONES.bool(), "attention_mask": torch.ones(1, 7).bool(),
         "latent_cond": (1, 7, 4)},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        HEADS | {"in_channels": 4, "condition_dim": 10, "attention_head_dim": 8,
                 "ff_inner_dim": 16, "rotary_dim": 4, "fourier_embedding_dim": 8},
        {"hidden_states": (1, 4, 7), "timestep": TIME, "encoder_hidden_states": (1, 7, 10)},
    ),
    "MotifVideoTransformer3DModel": (
        {k: v for k, v in HUNYUAN.items() if k not in ("num_refiner_layers", "guidance_embeds")}
        | {"mlp_ratio": 2.0},
        {k: v for k, v in HUNYUAN_INPUTS.items() if k != "pooled_projections"},
    ),
    "StableAudio3DiTModel": (
        {"io_channels": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "cond_token_dim": 10,
         "global_cond_dim": 8, "local_add_cond_dim": 5, "timestep_features_dim": 8,
         "num_memory_tokens": 2},
        {"hidden_states": (1, 4, 8), "timestep": TIME, "encoder_hidden_states": TEXT,
         "global_hidden_states": POOLED, "local_add_cond": (1, 5, 8)},
    ),
    "UVit2DModel": (
        {"hidden_size": 16, "cond_embed_dim": 8, "micro_cond_encode_dim": 2,
         "micro_cond_embed_dim": 10, "encoder_hidden_size": 10, "vocab_size": 11,
         "codebook_size": 10, "in_channels": 16, "block_out_channels": 16, "num_res_blocks": 1,
         "block_num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16, "sample_size": 4},
        {"encoder_hidden_states": TEXT, "input_ids": torch.arange(16).view(1, 4, 4) % 11,
         "pooled_text_emb": (1, 8), "micro_conds": torch.ones(1, 5).double()},
    ),
    "ZImageTransformer2DModel": (
        {"in_channels": 4, "dim": 24, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2,
         "n_kv_heads": 2, "cap_feat_dim": 10, "axes_dims": [4, 4, 4], "axes_lens": [64, 16, 16]},
        {"x": (4, 1, 8, 8), "t": TIME, "cap_feats": [torch.randn(5, 10).double()]},
    ),
    "UNet2DConditionModel": (
        UNET | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
                "cross_attention_dim": 10},
        {"sample": IMAGE, "timestep": TIME, "encoder_hidden_states": TEXT},
    ),
    "UNet3DConditionModel": (
        UNET | {"block_out_channels": (32, 64),
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 8,
                "cross_attention_dim": 10},
        {"sample": VIDEO, "timestep": TIME, "encoder_hidden_states": TEXT},
    ),
    "UNetMotionModel": (
        UNET | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
                "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
                "cross_attention_dim": 10, "num_attention_heads": 2,
                "motion_num_attention_heads": 2},
        {"sample": VIDEO, "timestep": TIME, "encoder_hidden_states": (2, 5, 10)},
    ),
    "UNetSpatioTemporalConditionModel": (
        {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "num_frames": 2,
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
         "cross_attention_dim": 10, "num_attention_heads": (2, 4),
         "projection_class_embeddings_input_dim": 24, "addition_time_embed_dim": 8},
        {"sample": (1, 2, 8, 8, 8), "timestep": TIME, "encoder_hidden_states": (1, 1, 10),
         "added_time_ids": torch.ones(1, 3).double()},
    ),
    "I2VGenXLUNet": (
        UNET | {"block_out_channels": (32, 64),
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 4,
                "cross_attention_dim": 12, "num_attention_heads": 2},
        {"sample": VIDEO, "timestep": TIME, "fps": torch.tensor([4]), "image_latents": VIDEO,
         "image_embeddings": (1, 12), "encoder_hidden_states": (1, 5, 12)},
    ),
    "Kandinsky3UNet": (
        {"time_embedding_dim": 8, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2,
         "block_out_channels": (16, 32), "cross_attention_dim": 10, "encoder_hid_dim": 10},
        {"sample": IMAGE, "timestep": TIME, "encoder_hidden_states": TEXT,
         "encoder_attention_mask": ONES},
    ),
    "StableCascadeUNet": (
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8,
         "conditioning_dim": 16, "block_out_channels": (16, 16), "num_attention_heads": (2, 2),
         "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
         "clip_text_pooled_in_channels": 8, "dropout": (0.0, 0.0), "clip_seq": 2},
        {"sample": IMAGE, "timestep_ratio": TIME, "clip_text_pooled": (1, 1, 8)},
    ),
}  # fmt: skip

FLOAT32 = ("Kandinsky5Transformer3DModel", "MotifVideoTransformer3DModel")  # what they compute in

PACKED = "takes packed sequences of several modalities"
NOT_HERE = {
    "UNet1DModel": "its attention is written out",
    "T5FilmDecoder": "its attention is written out",
    "MiniMaxMusic3RVQDepthDecoder": "decodes tokens one by one",
    "MotionAdapter": "has no forward pass",
    "UNet2DModel": "PyTorch's group_norm has no tangent for the layout that follows its attention",
    "HunyuanVideoFramepackTransformer3DModel": "meshgrid of its positions raises in a jvp",
    "QwenImage21Transformer2DModel": PACKED,
    "AnyFlowFARTransformer3DModel": PACKED,
    "Cosmos3OmniTransformer": PACKED,
    "Ideogram4Transformer2DModel": PACKED,
    "JoyImageEditPlusTransformer3DModel": PACKED,
    "Kandinsky6Transformer3DModel": PACKED,
    "MiniMaxH3Transformer3DModel": PACKED,
    "OmniGenTransformer2DModel": PACKED,
    "RFD4ProteinaTransformer": "takes the features of a protein",
    "BriaFibo2Transformer2DModel": "no tiny configuration: at least 256 gist tokens",
    "WanAnimateTransformer3DModel": "takes poses and faces, whose encoder has fixed sizes",
    "WanAnimate2Transformer3DModel": "takes poses and a cache",
    "SanaWMTransformer3DModel": "linear attention and cameras",
    "SanaWMLTX2RefinerTransformer3DModel": "LTX2's blocks with a cache",
    "Kandinsky6SRTransformer3DModel": "sparse attention over fixed tiles",
    "HiDreamImageTransformer2DModel": "experts chosen by sorting, 48 text encoders",
    "NucleusMoEImageTransformer2DModel": "experts chosen by sorting",
    "DreamLiteTransformer2DModel": "the block of DreamLiteUNetModel",
    "DreamLiteUNetModel": "UNet2DConditionModel's blocks with fixed sizes",
}
