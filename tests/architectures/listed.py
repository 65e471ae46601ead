"""The list: which architectures are tried, what their configurations need beside small sizes, and what must come out.

Test data, not a list of what is supported: the compiler knows no names. An entry without an outcome compiles and is
verified; the others name a part of the sentence that refuses them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        kind: its ``model_type``.
        model: the class.
        changes: what its configuration needs beside small sizes, see ``tiny_config``.
        inputs: shapes of a sample by name, where the configuration does not say them.
        refused: a part of the sentence that refuses it; "" where it compiles.
        share: of the weights of linears in its layers, how much is pruned at least.
    """

    kind: str
    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    refused: str = ""
    share: float = 0.95

    @property
    def name(self) -> str:
        """What the entry is called, unique in the list."""
        return self.model


EXPERTS = "is a stack of expert matrices"
ONE_LENGTH = "makes a constant of the length"
CHOOSES = "chooses its way by numbers that it computes"
PAIR = "is an encoder-decoder model"
CONVOLUTIONS = "no repeated layers with linear weights"

CAUSAL = [
    Entry("afmoe", "AfmoeForCausalLM", refused=EXPERTS),
    Entry("apertus", "ApertusForCausalLM"),
    Entry("arcee", "ArceeForCausalLM"),
    Entry("bamba", "BambaForCausalLM", {"attn_layer_indices": [1]}),
    Entry("bart", "BartForCausalLM"),
    Entry("bert", "BertLMHeadModel", {"is_decoder": True}),
    Entry("big_bird", "BigBirdForCausalLM", {"is_decoder": True, "attention_type": "original_full"}),
    Entry("biogpt", "BioGptForCausalLM"),
    Entry("bitnet", "BitNetForCausalLM"),
    Entry("bloom", "BloomForCausalLM"),
    Entry("codegen", "CodeGenForCausalLM"),
    Entry("cohere", "CohereForCausalLM"),
    Entry("cohere2", "Cohere2ForCausalLM"),
    Entry(
        "dbrx",
        "DbrxForCausalLM",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
        refused=CHOOSES,
    ),
    Entry(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4},
    ),
    Entry(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {"head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
    Entry("diffllama", "DiffLlamaForCausalLM"),
    Entry(
        "dots1",
        "Dots1ForCausalLM",
        {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ),
    Entry("ernie4_5", "Ernie4_5ForCausalLM"),
    Entry("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", refused=EXPERTS),
    Entry("exaone4", "Exaone4ForCausalLM"),
    Entry("falcon", "FalconForCausalLM"),
    Entry("falcon_h1", "FalconH1ForCausalLM", {"mamba_d_head": 16}),
    Entry("falcon_mamba", "FalconMambaForCausalLM", refused=ONE_LENGTH),
    Entry("gemma", "GemmaForCausalLM"),
    Entry("gemma2", "Gemma2ForCausalLM"),
    Entry("gemma3_text", "Gemma3ForCausalLM"),
    Entry(
        "gemma3n_text",
        "Gemma3nForCausalLM",
        {
            "num_kv_shared_layers": 0,
            "laurel_rank": 16,
            "hidden_size_per_layer_input": 16,
            "activation_sparsity_pattern": [0.9, 0.0],
            "altup_num_inputs": 2,
        },
    ),
    Entry("gemma4_text", "Gemma4ForCausalLM"),
    Entry("glm", "GlmForCausalLM"),
    Entry("glm4", "Glm4ForCausalLM"),
    Entry("glm4_moe", "Glm4MoeForCausalLM"),
    Entry("gpt2", "GPT2LMHeadModel"),
    Entry("gpt_bigcode", "GPTBigCodeForCausalLM"),
    Entry("gpt_neo", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}),
    Entry("gpt_neox", "GPTNeoXForCausalLM"),
    Entry("gpt_oss", "GptOssForCausalLM"),
    Entry("gptj", "GPTJForCausalLM"),
    Entry("granite", "GraniteForCausalLM"),
    Entry("granitemoe", "GraniteMoeForCausalLM"),
    Entry(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"]},
        refused=EXPERTS,
    ),
    Entry("granitemoeshared", "GraniteMoeSharedForCausalLM", refused=EXPERTS),
    Entry("helium", "HeliumForCausalLM"),
    Entry("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", {"head_dim": 16}),
    Entry(
        "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", {"head_dim": 16}, refused="there is no ONNX form for aten.histc"
    ),
    Entry(
        "jamba",
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        refused=ONE_LENGTH,
    ),
    Entry("jetmoe", "JetMoeForCausalLM", refused=EXPERTS),
    Entry("lfm2", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 64}),
    Entry(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        refused=EXPERTS,
    ),
    Entry("llama", "LlamaForCausalLM"),
    Entry("llama4_text", "Llama4ForCausalLM"),
    Entry("mamba", "MambaForCausalLM", refused=ONE_LENGTH),
    Entry(
        "mamba2",
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 16},
    ),
    Entry("marian", "MarianForCausalLM"),
    Entry("minicpm3", "MiniCPM3ForCausalLM", {"num_key_value_heads": 4}),
    Entry("minimax", "MiniMaxForCausalLM", refused=EXPERTS),
    Entry("ministral", "MinistralForCausalLM", {"head_dim": 16}),
    Entry("ministral3", "Ministral3ForCausalLM"),
    Entry("mistral", "MistralForCausalLM"),
    Entry("mixtral", "MixtralForCausalLM"),
    Entry("modernbert-decoder", "ModernBertDecoderForCausalLM"),
    Entry("mpt", "MptForCausalLM"),
    Entry("nanochat", "NanoChatForCausalLM"),
    Entry("nemotron", "NemotronForCausalLM", {"num_key_value_heads": 2}),
    Entry(
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "chunk_size": 16,
            "use_mamba_kernels": False,
        },
    ),
    Entry("olmo", "OlmoForCausalLM"),
    Entry("olmo2", "Olmo2ForCausalLM"),
    Entry("olmo3", "Olmo3ForCausalLM"),
    Entry("olmoe", "OlmoeForCausalLM"),
    Entry("openai-gpt", "OpenAIGPTLMHeadModel"),
    Entry("opt", "OPTForCausalLM"),
    Entry("persimmon", "PersimmonForCausalLM"),
    Entry("phi", "PhiForCausalLM"),
    Entry("phi3", "Phi3ForCausalLM"),
    Entry("phimoe", "PhimoeForCausalLM"),
    Entry("qwen2", "Qwen2ForCausalLM"),
    Entry("qwen2_moe", "Qwen2MoeForCausalLM"),
    Entry("qwen3", "Qwen3ForCausalLM"),
    Entry("qwen3_5_text", "Qwen3_5ForCausalLM", refused="holds for no other number of them"),
    Entry("qwen3_moe", "Qwen3MoeForCausalLM"),
    Entry("qwen3_next", "Qwen3NextForCausalLM", refused="holds for no other number of them"),
    Entry(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
        refused=ONE_LENGTH,
    ),
    Entry("roformer", "RoFormerForCausalLM"),
    Entry("rwkv", "RwkvForCausalLM", refused=ONE_LENGTH),
    Entry("seed_oss", "SeedOssForCausalLM"),
    Entry("smollm3", "SmolLM3ForCausalLM"),
    Entry("stablelm", "StableLmForCausalLM"),
    Entry("starcoder2", "Starcoder2ForCausalLM"),
    Entry("vaultgemma", "VaultGemmaForCausalLM"),
    Entry("whisper", "WhisperForCausalLM"),
    Entry("xglm", "XGLMForCausalLM"),
    Entry("xlnet", "XLNetLMHeadModel", refused="there is no ONNX form for aten.sub"),
    Entry(
        "zamba2",
        "Zamba2ForCausalLM",
        {
            "layers_block_type": ["linear_attention", "hybrid"],
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "mamba_d_state": 16,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
        },
    ),
]
MASKED = [
    Entry("albert", "AlbertForMaskedLM"),
    Entry("bert", "BertForMaskedLM"),
    Entry("big_bird", "BigBirdForMaskedLM"),
    Entry("camembert", "CamembertForMaskedLM"),
    Entry("convbert", "ConvBertForMaskedLM"),
    Entry("data2vec-text", "Data2VecTextForMaskedLM"),
    Entry("deberta", "DebertaForMaskedLM"),
    Entry("deberta-v2", "DebertaV2ForMaskedLM"),
    Entry("distilbert", "DistilBertForMaskedLM"),
    Entry("electra", "ElectraForMaskedLM"),
    Entry("ernie", "ErnieForMaskedLM"),
    Entry("esm", "EsmForMaskedLM"),
    Entry("eurobert", "EuroBertForMaskedLM"),
    Entry("flaubert", "FlaubertWithLMHeadModel"),
    Entry("fnet", "FNetForMaskedLM"),
    Entry("funnel", "FunnelForMaskedLM", refused=ONE_LENGTH),
    Entry("gte", "GteForMaskedLM"),
    Entry("ibert", "IBertForMaskedLM"),
    Entry("jina_embeddings_v3", "JinaEmbeddingsV3ForMaskedLM"),
    Entry("layoutlm", "LayoutLMForMaskedLM"),
    Entry("longformer", "LongformerForMaskedLM", refused=CHOOSES),
    Entry("megatron-bert", "MegatronBertForMaskedLM"),
    Entry("mobilebert", "MobileBertForMaskedLM"),
    Entry("modernbert", "ModernBertForMaskedLM"),
    Entry("mpnet", "MPNetForMaskedLM"),
    Entry("nomic_bert", "NomicBertForMaskedLM"),
    Entry("nystromformer", "NystromformerForMaskedLM"),
    Entry(
        "reformer",
        "ReformerForMaskedLM",
        {
            "attention_head_size": 16,
            "axial_pos_shape": [8, 16],
            "axial_pos_embds_dim": [32, 32],
            "is_decoder": False,
            "attn_layers": ["local", "lsh"],
            "feed_forward_size": 128,
        },
        refused="makes a constant of the batch",
    ),
    Entry("rembert", "RemBertForMaskedLM"),
    Entry("roberta", "RobertaForMaskedLM"),
    Entry("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM"),
    Entry("roc_bert", "RoCBertForMaskedLM"),
    Entry("roformer", "RoFormerForMaskedLM"),
    Entry("squeezebert", "SqueezeBertForMaskedLM"),
    Entry("xlm", "XLMWithLMHeadModel"),
    Entry("xlm-roberta", "XLMRobertaForMaskedLM"),
    Entry("xmod", "XmodForMaskedLM", {"default_language": "en_XX"}),
]
HEADS = [
    Entry("bert", "BertModel"),
    Entry("mpnet", "MPNetModel"),
    Entry("bert", "BertForSequenceClassification"),
    Entry("xlm-roberta", "XLMRobertaForSequenceClassification"),
    Entry("deberta-v2", "DebertaV2ForSequenceClassification"),
    Entry("qwen3", "Qwen3ForSequenceClassification", {"pad_token_id": 0}),
    Entry("bert", "BertForTokenClassification"),
    Entry("distilbert", "DistilBertForQuestionAnswering"),
    Entry("gemma3_text", "Gemma3TextModel"),
    Entry("qwen3", "Qwen3Model"),
    Entry("modernbert", "ModernBertForSequenceClassification"),
    Entry("canine", "CanineModel", {"num_hash_buckets": 64, "local_transformer_stride": 16}, refused=ONE_LENGTH),
    Entry("clip_text_model", "CLIPTextModel"),
    Entry("t5", "T5EncoderModel"),
    Entry("bert", "BertForMultipleChoice", refused="does not run on input_ids [2, 3]"),
    Entry(
        "lilt",
        "LiltForTokenClassification",
        {"channel_shrink_ratio": 4, "max_2d_position_embeddings": 64, "hidden_size": 96, "num_attention_heads": 4},
    ),
    Entry("dpr", "DPRContextEncoder"),
]
IMAGES = [
    Entry("vit", "ViTForImageClassification"),
    Entry("deit", "DeiTForImageClassification"),
    Entry("beit", "BeitForImageClassification"),
    Entry("dinov2", "Dinov2Model"),
    Entry("dinov2_with_registers", "Dinov2WithRegistersForImageClassification"),
    Entry("dinov3_vit", "DINOv3ViTModel"),
    Entry("convnext", "ConvNextForImageClassification", {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}),
    Entry(
        "convnextv2", "ConvNextV2ForImageClassification", {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}
    ),
    Entry(
        "hiera",
        "HieraForImageClassification",
        {"image_size": [64, 64], "embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
    ),
    Entry("ijepa", "IJepaForImageClassification"),
    Entry(
        "levit",
        "LevitForImageClassification",
        {
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [16, 16, 16],
            "image_size": 64,
            "patch_size": 16,
            "down_ops": [["Subsample", 16, 2, 4, 2, 2], ["Subsample", 16, 3, 4, 2, 2], [""]],
        },
    ),
    Entry(
        "mobilevit",
        "MobileViTForImageClassification",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
    ),
    Entry(
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        {"image_size": 64, "width_multiplier": 0.25, "base_attn_unit_dims": [128, 192, 256]},
        refused=CONVOLUTIONS,
    ),
    Entry(
        "pvt",
        "PvtForImageClassification",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 32, 48, 64],
            "num_attention_heads": [1, 2, 3, 4],
            "image_size": 64,
            "num_labels": 3,
        },
    ),
    Entry(
        "pvt_v2",
        "PvtV2ForImageClassification",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 32, 48, 64],
            "num_attention_heads": [1, 2, 3, 4],
            "image_size": 64,
        },
    ),
    Entry("resnet", "ResNetForImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16}),
    Entry(
        "segformer",
        "SegformerForSemanticSegmentation",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 32, 48, 64],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
        },
        inputs={"pixel_values": (3, 64, 64)},
    ),
    Entry(
        "swin",
        "SwinForImageClassification",
        {
            "depths": [1, 2],
            "num_heads": [2, 4],
            "embed_dim": 32,
            "window_size": 4,
            "patch_size": 4,
            "num_layers": 2,
            "image_size": 32,
        },
    ),
    Entry(
        "swinv2",
        "Swinv2ForImageClassification",
        {"depths": [1, 2], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "patch_size": 4, "image_size": 32},
    ),
    Entry("vit_msn", "ViTMSNForImageClassification"),
    Entry(
        "vit_mae",
        "ViTMAEForPreTraining",
        {
            "decoder_num_attention_heads": 4,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 64,
        },
        refused="draws random numbers (aten.rand.default)",
    ),
    Entry(
        "poolformer",
        "PoolFormerForImageClassification",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]},
        inputs={"pixel_values": (3, 64, 64)},
        refused=CONVOLUTIONS,
    ),
    Entry(
        "cvt",
        "CvtForImageClassification",
        {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        inputs={"pixel_values": (3, 64, 64)},
    ),
    Entry(
        "mobilenet_v2",
        "MobileNetV2ForImageClassification",
        {"image_size": 64, "depth_multiplier": 0.35},
        refused=CONVOLUTIONS,
    ),
    Entry("clip_vision_model", "CLIPVisionModel"),
    Entry("siglip_vision_model", "SiglipVisionModel"),
    Entry(
        "dpt",
        "DPTForDepthEstimation",
        {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 32,
        },
    ),
    Entry("yolos", "YolosForObjectDetection", {"image_size": [32, 64], "num_detection_tokens": 5}),
    Entry("videomae", "VideoMAEForVideoClassification", inputs={"pixel_values": (16, 3, 32, 32)}),
]
SOUND = [
    Entry(
        "wav2vec2",
        "Wav2Vec2ForCTC",
        {
            "conv_dim": [32, 32, 32],
            "conv_stride": [5, 8, 8],
            "conv_kernel": [10, 8, 8],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "vocab_size": 32,
        },
    ),
    Entry(
        "hubert",
        "HubertForCTC",
        {
            "conv_dim": [32, 32, 32],
            "conv_stride": [5, 8, 8],
            "conv_kernel": [10, 8, 8],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "vocab_size": 32,
        },
    ),
    Entry(
        "wavlm",
        "WavLMForCTC",
        {
            "conv_dim": [32, 32, 32],
            "conv_stride": [5, 8, 8],
            "conv_kernel": [10, 8, 8],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "vocab_size": 32,
        },
    ),
    Entry(
        "sew",
        "SEWForCTC",
        {
            "conv_dim": [32, 32, 32],
            "conv_stride": [5, 8, 4],
            "conv_kernel": [10, 8, 8],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "vocab_size": 32,
        },
    ),
    Entry(
        "wav2vec2-conformer",
        "Wav2Vec2ConformerForCTC",
        {
            "conv_dim": [32, 32, 32],
            "conv_stride": [5, 8, 8],
            "conv_kernel": [10, 8, 8],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "vocab_size": 32,
        },
    ),
    Entry("wav2vec2-bert", "Wav2Vec2BertForCTC", {"vocab_size": 32}),
    Entry("audio-spectrogram-transformer", "ASTForAudioClassification"),
    Entry("whisper", "WhisperForAudioClassification", {"max_source_positions": 50}, {"input_features": (80, 100)}),
    Entry("parakeet_ctc", "ParakeetForCTC"),
]
PAIRS = [
    Entry("t5", "T5ForConditionalGeneration", refused=PAIR),
    Entry("umt5", "UMT5ForConditionalGeneration", refused=PAIR),
    Entry("bart", "BartForConditionalGeneration", refused=PAIR),
    Entry("marian", "MarianMTModel", refused=PAIR),
    Entry("pegasus", "PegasusForConditionalGeneration", refused=PAIR),
    Entry("whisper", "WhisperForConditionalGeneration", refused=PAIR),
    Entry("led", "LEDForConditionalGeneration", refused=PAIR),
    Entry("m2m_100", "M2M100ForConditionalGeneration", refused=PAIR),
    Entry("moonshine", "MoonshineForConditionalGeneration", refused=PAIR),
    Entry("speech_to_text", "Speech2TextForConditionalGeneration", refused=PAIR),
]
SEVERAL = [
    Entry("clip", "CLIPModel"),
    Entry("siglip", "SiglipModel"),
    Entry("altclip", "AltCLIPModel"),
    Entry("chinese_clip", "ChineseCLIPModel"),
    Entry(
        "clipseg",
        "CLIPSegForImageSegmentation",
        {"extract_layers": [0, 1], "reduce_dim": 32, "decoder_intermediate_size": 64},
        refused="makes a constant of the batch",
    ),
    Entry("blip", "BlipForImageTextRetrieval"),
    Entry("gemma3", "Gemma3ForConditionalGeneration"),
    Entry("llava", "LlavaForConditionalGeneration"),
    Entry(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            }
        },
    ),
    Entry(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            },
            "vision_config": {"hidden_size": 32, "out_hidden_size": 64},
        },
    ),
    Entry(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {
            "vision_config": {
                "hidden_size": 32,
                "out_hidden_size": 64,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            }
        },
    ),
    Entry("mistral3", "Mistral3ForConditionalGeneration"),
    Entry("smolvlm", "SmolVLMForConditionalGeneration"),
    Entry("paligemma", "PaliGemmaForConditionalGeneration"),
    Entry(
        "layoutlmv3",
        "LayoutLMv3ForTokenClassification",
        {"coordinate_size": 12, "shape_size": 8, "input_size": 32, "max_2d_position_embeddings": 64, "hidden_size": 64},
    ),
    Entry("vilt", "ViltForMaskedLM", refused=CHOOSES),
    Entry("owlvit", "OwlViTModel"),
    Entry(
        "clap",
        "ClapModel",
        {
            "audio_config": {
                "depths": [1, 1],
                "num_attention_heads": [2, 2],
                "hidden_size": 64,
                "patch_embeds_hidden_size": 32,
                "window_size": 4,
                "spec_size": 64,
                "num_mel_bins": 16,
                "num_hidden_layers": 2,
            }
        },
        inputs={"input_ids": (16,), "attention_mask": (16,), "input_features": (1, 64, 16)},
    ),
    Entry("sam", "SamModel", {"vision_config": {"output_channels": 64, "num_pos_feats": 32}}),
    Entry("git", "GitForCausalLM", refused="is another than the model without one"),
]
ENTRIES = [*CAUSAL, *MASKED, *HEADS, *IMAGES, *SOUND, *PAIRS, *SEVERAL]
