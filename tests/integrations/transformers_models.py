"""Tiny configurations of the families of transformers that have an attention interface, and their
continuous inputs: embeddings of a sequence, pictures, frames of sound.

Mixtures of experts are not among them: PyTorch's grouped matrix product has no forward AD. SigLIP
pools with an `nn.MultiheadAttention`, which the override reaches and the name "jvp" does not.
"""

import torch

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT = SMALL | {
    "vocab_size": 11, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 4}
IMAGE = SMALL | {"image_size": 8, "patch_size": 4}
CONVOLUTIONS = {
    "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}  # fmt: skip


def text():
    return {"inputs_embeds": torch.randn(2, 7, 16).double()}


def text_to_text():
    return {
        "inputs_embeds": torch.randn(2, 7, 16).double(),
        "decoder_inputs_embeds": torch.randn(2, 5, 16).double(),
    }


def image():
    return {"pixel_values": torch.randn(2, 3, 8, 8).double()}


def video():
    return {"pixel_values": torch.randn(1, 2, 3, 8, 8).double()}


def sound():
    return {"input_values": torch.randn(2, 64).double()}


ENCODER_DECODER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 11,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip

# type of model -> (configuration, inputs; the first has a tangent)
FAMILIES = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "ernie", "data2vec-text",
         "roberta-prelayernorm", "gpt2", "gpt_neox", "gpt_bigcode", "biogpt"),
        (TEXT, text),
    ),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "phi3",
         "olmo", "olmo2", "olmo3", "starcoder2", "stablelm", "cohere", "cohere2", "granite",
         "glm", "glm4", "helium", "smollm3", "nemotron", "persimmon", "ernie4_5", "arcee",
         "apertus", "seed_oss", "exaone4", "hunyuan_v1_dense", "ministral", "diffllama", "bitnet"),
        (GROUPED, text),
    ),
    "electra": (TEXT | {"embedding_size": 16}, text),
    "distilbert": (TEXT | {"dim": 16, "hidden_dim": 32, "n_heads": 4, "n_layers": 2}, text),
    "esm": (TEXT | {"position_embedding_type": "rotary", "mask_token_id": 3}, text),
    "opt": (TEXT | {"ffn_dim": 32, "word_embed_proj_dim": 16}, text),
    "modernbert": (TEXT | {"cls_token_id": 1, "sep_token_id": 2}, text),
    **dict.fromkeys(("bart", "mbart", "plbart", "pegasus", "marian", "blenderbot",
                     "blenderbot-small", "m2m_100"), (ENCODER_DECODER, text_to_text)),
    **dict.fromkeys(
        ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "vit_msn",
         "clip_vision_model"),
        (IMAGE, image),
    ),
    "videomae": (IMAGE | {"num_frames": 2, "tubelet_size": 2}, video),
    "vivit": (IMAGE | {"num_frames": 2, "tubelet_size": [2, 4, 4]}, video),
    **dict.fromkeys(("wav2vec2", "hubert", "unispeech", "data2vec-audio"),
                    (SMALL | CONVOLUTIONS, sound)),
}  # fmt: skip
