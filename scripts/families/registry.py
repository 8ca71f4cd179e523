"""The families of transformers models that are tried: a tiny configuration each, and the refusals that are expected.

Weights are random. `scripts.families.source` writes a family's folder, as `model.source` of a recipe names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("good", "bad", "great", "awful", "fine", "poor", "nice", "ugly", "happy", "sad", "fast", "slow", "big",
         "small", "red", "blue", "green", "film", "book", "song", "cat", "dog", "house", "road", "river", "city",
         "tree", "bird", "the", "a", "of", "and", "is", "was", "very", "not", "quite", "rather", "it", "this", "that",
         "with", "for")  # fmt: skip
VOCABULARY = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
SIDE = 32  # of an image
LONGEST = 32  # tokens of a text
Entries: TypeAlias = dict[str, Any]  # of a config.json

BLOCKS: Entries = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT: Entries = {
    **BLOCKS,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
PIXELS: Entries = {"image_size": SIDE, "num_channels": 3}
PATCHES: Entries = {**BLOCKS, **PIXELS, "patch_size": 8, "initializer_range": 0.2}
GROUPED: Entries = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TWICE: Entries = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SEQ2SEQ: Entries = {"d_model": 32, **TWICE, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2}
T5: Entries = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
DISENTANGLED: Entries = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
XLM: Entries = {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "n_words": len(VOCABULARY), "pad_index": 0}
STEPS: Entries = {"hidden_sizes": [32, 64], "depths": [1, 1]}
WINDOWS: Entries = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        config: entries of config.json.
        kind: what it reads.
        traits: what sqat must cope with; the tests take some of each.
        types: the family's tokenizer gives ``token_type_ids``.
        by_characters: it reads characters, without a vocabulary.
    """

    name: str
    kind: Literal["text", "image"]
    config: Mapping[str, Any] = field(default_factory=dict)
    traits: tuple[str, ...] = ()
    types: bool = False
    by_characters: bool = False

    @property
    def model_type(self) -> str:
        """transformers' name of the family, which has several settings in some cases."""
        return str(self.config.get("model_type", self.name))

    @property
    def side(self) -> int:
        """Height and width of its images; 0 for texts."""
        size = self.config.get("image_size", SIDE if self.kind == "image" else 0)
        return int(size[0] if isinstance(size, list) else size)

    @property
    def entries(self) -> Entries:
        """Entries of the family's config.json."""
        return {**self.config, "model_type": self.model_type}


def text(name: str, traits: str = "", *, types: bool = False, by_characters: bool = False, **config: Any) -> Family:
    """A family that classifies texts; an entry ``None`` takes one of `TEXT` away."""
    entries = {name: value for name, value in {**TEXT, **config}.items() if value is not None}
    return Family(name, "text", entries, tuple(traits.split()), types, by_characters)


def image(name: str, traits: str = "", **config: Any) -> Family:
    """A family that classifies images, with patches of one size in all layers."""
    return Family(name, "image", {**PATCHES, **config}, tuple(traits.split()))


def pyramid(name: str, traits: str = "", **config: Any) -> Family:
    """A family that classifies images, with sizes of its own in each part."""
    return Family(name, "image", {**PIXELS, **config}, tuple(traits.split()))


ENCODERS = (
    text("bert", "interface", types=True),
    text("roberta", "interface", pad_token_id=1),
    text("xlm-roberta", "interface"),
    text("camembert", "interface"),
    text("distilbert", "interface", dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    text("albert", "interface shared", types=True, embedding_size=16),
    text("electra", "interface", types=True, embedding_size=16),
    text("mpnet", "own-attention relative"),
    text("deberta", "own-attention relative fused", types=True, **DISENTANGLED, type_vocab_size=0),
    # The exporter folds products of small constants, which these have: the table of positions by a weight. A width of
    # 96 is beyond, as real ones are.
    text("deberta-v2", "own-attention relative", types=True, **DISENTANGLED, type_vocab_size=0, hidden_size=96),
    text("deberta-v3", "own-attention relative repeated", types=True, model_type="deberta-v2", **DISENTANGLED,
         hidden_size=96, share_att_key=True, position_buckets=16, norm_rel_ebd="layer_norm", type_vocab_size=0,
         position_biased_input=False),
    text("modernbert", "interface fused gated rotary", cls_token_id=2, sep_token_id=3, local_attention=8),
    text("nomic_bert", "interface fused gated rotary", types=True),
    text("eurobert", "interface gated rotary", **GROUPED, mask_token_id=4),
    text("gte", "interface fused gated rotary", types=True),
    text("jina_embeddings_v3", "interface fused rotary"),
    text("longformer", "own-attention windows", attention_window=8, sep_token_id=3),
    text("big_bird", "own-attention windows", types=True, attention_type="original_full", block_size=4),
    text("convbert", "own-attention convolution", types=True, embedding_size=16, conv_kernel_size=3),
    text("squeezebert", "own-attention convolution", types=True, embedding_size=32),
    text("funnel", "own-attention relative pooled", types=True, d_model=32, n_head=2, d_head=16, d_inner=64,
         block_sizes=[1, 1], num_decoder_layers=1, max_position_embeddings=None, num_hidden_layers=None),
    text("layoutlm", "interface", types=True, max_2d_position_embeddings=64),
    text("lilt", "own-attention", hidden_size=48, intermediate_size=96, max_2d_position_embeddings=64),
    text("luke", "own-attention unused", entity_vocab_size=8, entity_emb_size=16),
    text("markuplm", "interface", types=True),
    text("mobilebert", "own-attention bottleneck", types=True, embedding_size=16, intra_bottleneck_size=32,
         true_hidden_size=32, num_feedforward_networks=2),
    text("roformer", "own-attention rotary", types=True, embedding_size=16),
    text("xlnet", "own-attention relative no-limit", types=True, d_model=32, n_layer=2, n_head=2, d_inner=64,
         max_position_embeddings=None),
    text("xlm", "own-attention", **XLM),
    text("flaubert", "own-attention", **XLM),
    text("ernie", "interface", types=True),
    text("rembert", "own-attention", types=True, input_embedding_size=16, output_embedding_size=16),
    text("megatron-bert", "own-attention", types=True),
    text("roberta-prelayernorm", "interface"),
    text("xlm-roberta-xl", "interface"),
    text("xmod", "interface adapters", languages=["en_XX"], default_language="en_XX"),
    text("roc_bert", "interface", types=True, pronunciation_vocab_size=8, shape_vocab_size=8,
         pronunciation_embed_dim=8, shape_embed_dim=8),
    text("esm", "interface rotary", position_embedding_type="rotary", mask_token_id=4),
    text("fnet", "no-attention", types=True, tpu_short_seq_length=32),
    text("nystromformer", "own-attention", segment_means_seq_len=32, num_landmarks=32, conv_kernel_size=3),
    text("yoso", "own-attention", use_expectation=True),
    text("ibert", "own-attention"),
    text("canine", "own-attention", types=True, by_characters=True, num_hash_buckets=64,
         vocab_size=None, bos_token_id=0xE000, eos_token_id=0xE001, local_transformer_stride=8,
         max_position_embeddings=64),
    text("data2vec-text", "interface"),
    text("perceiver", "own-attention latent", num_latents=8, d_latents=32, d_model=32, num_blocks=1,
         num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=2),
    text("reformer", "own-attention", attention_head_size=16, attn_layers=["local", "local"], axial_pos_embds=False,
         feed_forward_size=64, local_attn_chunk_length=32, max_position_embeddings=64, is_decoder=False),
)  # fmt: skip
DECODERS = (
    text("gpt2", "decoder conv1d", n_embd=32, n_layer=2, n_head=2, n_inner=64, n_positions=40),
    text("gpt_neo", "decoder own-attention", attention_types=[[["global", "local"], 1]], window_size=8, num_layers=2),
    text("gptj", "decoder own-attention rotary", n_embd=32, n_layer=2, n_head=2, n_inner=64, n_positions=40,
         rotary_dim=8),
    text("gpt_neox", "decoder interface fused rotary"),
    text("gpt_bigcode", "decoder interface fused", n_embd=32, n_layer=2, n_head=2, n_inner=64, n_positions=40),
    text("opt", "decoder interface", ffn_dim=64, word_embed_proj_dim=32),
    text("bloom", "decoder own-attention fused", n_layer=2, n_head=2),
    text("falcon", "decoder own-attention fused rotary", alibi=False),
    text("mpt", "decoder own-attention fused", d_model=32, n_layers=2, n_heads=2, max_seq_len=40),
    text("llama", "decoder interface grouped gated rotary", **GROUPED),
    text("mistral", "decoder interface grouped gated rotary", **GROUPED),
    text("qwen2", "decoder interface grouped gated rotary", **GROUPED),
    text("qwen3", "decoder interface grouped gated rotary", **GROUPED),
    text("gemma", "decoder interface grouped gated rotary", **GROUPED),
    text("gemma2", "decoder interface grouped gated rotary soft-cap", **GROUPED, query_pre_attn_scalar=16),
    text("gemma3_text", "decoder interface grouped gated rotary", **GROUPED, query_pre_attn_scalar=16),
    text("phi", "decoder interface rotary"),
    text("phi3", "decoder interface fused gated rotary"),
    text("gpt_oss", "decoder interface grouped experts sinks", **GROUPED, num_local_experts=2, num_experts_per_tok=1),
    text("olmo2", "decoder interface gated rotary"),
    text("smollm3", "decoder interface grouped gated rotary", **GROUPED),
    text("stablelm", "decoder interface gated rotary", num_key_value_heads=2),
    text("starcoder2", "decoder interface grouped rotary", **GROUPED),
    text("mixtral", "decoder interface grouped experts", **GROUPED, num_local_experts=2, num_experts_per_tok=1),
    text("openai-gpt", "decoder own-attention conv1d", n_embd=32, n_layer=2, n_head=2, n_positions=40),
)  # fmt: skip
ENCODER_DECODERS = (
    text("t5", "encoder-decoder own-attention relative", **T5, decoder_start_token_id=0),
    text("mt5", "encoder-decoder own-attention relative gated", **T5, decoder_start_token_id=0),
    text("umt5", "encoder-decoder own-attention relative gated", **T5, decoder_start_token_id=0),
    text("bart", "encoder-decoder interface", **SEQ2SEQ),
    text("mbart", "encoder-decoder interface", **SEQ2SEQ),
    text("plbart", "encoder-decoder interface", **SEQ2SEQ),
)
VISION: Entries = {"vision_config": PATCHES}
IMAGE_TRANSFORMERS = (
    image("vit", "interface"),
    image("deit", "interface", architectures=["DeiTForImageClassification"]),
    image("beit", "interface relative", use_relative_position_bias=True),
    image("data2vec-vision", "interface relative", use_relative_position_bias=True),
    image("dinov2", "interface"),
    image("dinov2_with_registers", "interface", num_register_tokens=2),
    image("vit_msn", "interface"),
    image("ijepa", "interface"),
    pyramid("siglip", "interface sub-configuration", **VISION),
    pyramid("clip", "interface sub-configuration", **VISION),
    pyramid("swin", "own-attention windows relative", **WINDOWS),
    pyramid("swinv2", "own-attention windows relative", **WINDOWS),
    pyramid("hiera", "own-attention windows fused", embed_dim=32, depths=[1, 1], num_heads=[1, 2], num_layers=2,
            patch_size=[3, 3], patch_stride=[4, 4], patch_padding=[1, 1], query_stride=[2, 2], num_query_pool=1,
            masked_unit_size=[4, 4], masked_unit_attention=[True, False], image_size=[SIDE, SIDE]),
    pyramid("pvt", "own-attention windows", num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1],
            hidden_sizes=[32, 64], patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    pyramid("pvt_v2", "own-attention windows", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
            hidden_sizes=[32, 64], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    pyramid("segformer", "own-attention windows", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
            hidden_sizes=[32, 64], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    pyramid("cvt", "own-attention windows convolution", patch_sizes=[7, 3], patch_stride=[4, 2],
            patch_padding=[2, 1], embed_dim=[32, 64], num_heads=[1, 2], depth=[1, 2], mlp_ratio=[2.0, 2.0],
            attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0], qkv_bias=[True, True],
            cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3],
            padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1]),
    pyramid("levit", "own-attention convolution", hidden_sizes=[32, 48, 64], num_attention_heads=[2, 2, 4],
            depths=[1, 1, 1], key_dim=[16, 16, 16], architectures=["LevitForImageClassification"]),
    pyramid("mobilevit", "own-attention convolution", hidden_sizes=[32, 48, 64],
            neck_hidden_sizes=[16, 16, 32, 32, 48, 64, 96], num_attention_heads=2),
    pyramid("mobilevitv2", "own-attention convolution", width_multiplier=0.25, image_size=64),
    pyramid("swiftformer", "own-attention convolution", depths=[1, 1, 1, 1], embed_dims=[16, 32, 48, 64], mlp_ratio=2),
)  # fmt: skip
CONVOLUTIONAL = (
    pyramid("resnet", "convolution", embedding_size=32, **STEPS, layer_type="basic", downsample_in_first_stage=False),
    pyramid("resnet-bottleneck", "convolution", model_type="resnet", embedding_size=32, **STEPS),
    pyramid("convnext", "convolution layer-norm", **STEPS, num_stages=2),
    pyramid("convnextv2", "convolution layer-norm", **STEPS, num_stages=2),
    pyramid("mobilenet_v1", "convolution", depth_multiplier=0.25),
    pyramid("mobilenet_v2", "convolution", depth_multiplier=0.25),
    pyramid("efficientnet", "convolution gated", in_channels=[32, 16, 24], out_channels=[16, 24, 40],
            kernel_sizes=[3, 3, 5], strides=[1, 2, 2], num_block_repeats=[1, 1, 1], expand_ratios=[1, 4, 4],
            width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
    pyramid("regnet", "convolution gated", embedding_size=16, **STEPS, groups_width=16),
    pyramid("bit", "convolution", embedding_size=32, **STEPS, num_groups=8),
    pyramid("poolformer", "convolution pooled", num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[32, 64],
            patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1]),
    pyramid("focalnet", "convolution gated", embed_dim=32, hidden_sizes=[32, 64], depths=[1, 1], focal_levels=[2, 2],
            focal_windows=[3, 3]),
    pyramid("hgnet_v2", "convolution", stem_channels=[3, 16, 16], stage_in_channels=[16, 32],
            stage_mid_channels=[16, 16], stage_out_channels=[32, 64], stage_num_blocks=[1, 1],
            stage_downsample=[False, True], stage_downsample_strides=[2, 2], stage_light_block=[False, True],
            stage_kernel_size=[3, 5], stage_numb_of_layers=[2, 2], depths=[1, 1], hidden_sizes=[32, 64],
            embedding_size=16),
)  # fmt: skip
SECTIONS = {
    "Encoders of texts": ENCODERS,
    "Decoders": DECODERS,
    "Encoder-decoders": ENCODER_DECODERS,
    "Transformers of images": IMAGE_TRANSFORMERS,
    "Networks of convolutions": CONVOLUTIONAL,
}
FAMILIES = {family.name: family for section in SECTIONS.values() for family in section}
