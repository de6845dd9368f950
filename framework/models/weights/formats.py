"""The formats that weights are read from and written to, as tables of names.

Names are those of the files: `{n}` stands for the number of a block, `{source}` for the source whose
classifier it is. `mean` and `std` are what the other side's pixels, from 0 to 1, are normalised with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from framework.models.weights.links import (
    Link,
    biases_of_heads,
    class_token,
    fused,
    fused_without_key,
    heads_to_output,
    image_kernel,
    last_channels_kernel,
    places,
    places_without_class,
    same,
    times,
    transposed,
    video_kernel,
    weights_of_heads,
)

__all__ = ["BIAS", "FORMATS", "KERNEL", "Format", "detect"]

Colour = tuple[float, float, float]
HALF: Colour = (0.5, 0.5, 0.5)
IMAGENET: tuple[Colour, Colour] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

KERNEL, BIAS = "tokenizer.tubes.0.weight", "tokenizer.tubes.0.bias"
HEAD = "heads.{source}"


@dataclass(frozen=True)
class Format:
    """One library's model of one family."""

    name: str
    family: str
    title: str
    marker: str
    """A name that a file of this format has, and no other format's."""
    links: Callable[[int], list[Link]]
    """The table, given the number of heads."""
    mean: Colour = HALF
    std: Colour = HALF
    without_class: Callable[[int], list[Link]] | None = None
    """The table of models without a class token, where there are such."""


def _both(make: Callable[[str, str], Link], ours: str, theirs: str) -> list[Link]:
    """Weight and bias."""
    return [make(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def _all_same(names: Iterable[tuple[str, str]]) -> list[Link]:
    return [link for ours, theirs in names for link in _both(same, ours, theirs)]


def _block(prefix: str, names: dict[str, str]) -> list[Link]:
    """The parts of a block that are the same tensors under other names."""
    return _all_same((f"blocks.{{n}}.{ours}", f"{prefix}.{theirs}") for ours, theirs in names.items())


def _timm_shared() -> list[Link]:
    names = {part: part for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
    return [
        image_kernel(KERNEL, "patch_embed.proj.weight"),
        same(BIAS, "patch_embed.proj.bias"),
        *_block("blocks.{n}", names),
        *_all_same([("norm", "norm"), (HEAD, "head")]),
    ]


def _timm(_heads: int) -> list[Link]:
    return [
        class_token("places.class_token", "cls_token"),
        places("places.class_place", "places.weight", "pos_embed"),
        *_timm_shared(),
    ]


def _timm_without_class(_heads: int) -> list[Link]:
    return [places_without_class("places.weight", "pos_embed"), *_timm_shared()]


HF_BLOCK = {
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _hf_frame(prefix: str, kernel: Callable[[str, str], Link]) -> list[Link]:
    """Patches, last norm and classifier, which all models have."""
    embeddings = f"{prefix}.embeddings.patch_embeddings.projection"
    return [
        kernel(KERNEL, f"{embeddings}.weight"),
        same(BIAS, f"{embeddings}.bias"),
        *_all_same([(HEAD, "classifier")]),
    ]


def _hf_places(prefix: str) -> list[Link]:
    return [
        class_token("places.class_token", f"{prefix}.embeddings.cls_token"),
        places("places.class_place", "places.weight", f"{prefix}.embeddings.position_embeddings"),
        *_all_same([("norm", f"{prefix}.layernorm")]),
    ]


def _hf_attention(prefix: str) -> list[Link]:
    """Queries, keys and values in three tensors."""
    attention = f"{prefix}.encoder.layer.{{n}}.attention.attention"
    names = ("query", "key", "value")
    return [
        fused(f"blocks.{{n}}.attn.qkv.{part}", *(f"{attention}.{name}.{part}" for name in names))
        for part in ("weight", "bias")
    ]


def _hf_vit(_heads: int) -> list[Link]:
    block = _block("vit.encoder.layer.{n}", HF_BLOCK)
    return [*_hf_frame("vit", image_kernel), *_hf_places("vit"), *block, *_hf_attention("vit")]


def _hf_vivit(_heads: int) -> list[Link]:
    block = _block("vivit.encoder.layer.{n}", HF_BLOCK)
    return [*_hf_frame("vivit", video_kernel), *_hf_places("vivit"), *block, *_hf_attention("vivit")]


def _hf_timesformer(_heads: int) -> list[Link]:
    prefix = "timesformer"
    names = HF_BLOCK | {
        "attn.qkv": "attention.attention.qkv",
        "temporal_attn.qkv": "temporal_attention.attention.qkv",
        "temporal_attn.proj": "temporal_attention.output.dense",
        "temporal_fc": "temporal_dense",
        "temporal_norm": "temporal_layernorm",
    }
    return [
        *_hf_frame(prefix, image_kernel),
        *_hf_places(prefix),
        times("times.weight", f"{prefix}.embeddings.time_embeddings"),
        *_block(f"{prefix}.encoder.layer.{{n}}", names),
    ]


def _hf_videomae(_heads: int) -> list[Link]:
    attention = "videomae.encoder.layer.{n}.attention.attention"
    weights = (f"{attention}.{name}.weight" for name in ("query", "key", "value"))
    return [
        *_hf_frame("videomae", video_kernel),
        *_block("videomae.encoder.layer.{n}", HF_BLOCK),
        fused("blocks.{n}.attn.qkv.weight", *weights),
        fused_without_key("blocks.{n}.attn.qkv.bias", f"{attention}.q_bias", f"{attention}.v_bias"),
        *_all_same([("pool_norm", "fc_norm")]),
    ]


def _npz(heads: int) -> list[Link]:
    block = "Transformer/encoderblock_{n}"
    attention = f"{block}/MultiHeadDotProductAttention_1"
    names = ("query", "key", "value")
    kernels = (f"{attention}/{name}/kernel" for name in names)
    biases = (f"{attention}/{name}/bias" for name in names)
    norms = {
        "blocks.{n}.norm1": f"{block}/LayerNorm_0",
        "blocks.{n}.norm2": f"{block}/LayerNorm_2",
        "norm": "Transformer/encoder_norm",
    }
    dense = {
        "blocks.{n}.mlp.fc1": f"{block}/MlpBlock_3/Dense_0",
        "blocks.{n}.mlp.fc2": f"{block}/MlpBlock_3/Dense_1",
        HEAD: "head",
    }
    return [
        last_channels_kernel(KERNEL, "embedding/kernel"),
        same(BIAS, "embedding/bias"),
        class_token("places.class_token", "cls"),
        places("places.class_place", "places.weight", "Transformer/posembed_input/pos_embedding"),
        weights_of_heads("blocks.{n}.attn.qkv.weight", heads, *kernels),
        biases_of_heads("blocks.{n}.attn.qkv.bias", heads, *biases),
        heads_to_output("blocks.{n}.attn.proj.weight", heads, f"{attention}/out/kernel"),
        same("blocks.{n}.attn.proj.bias", f"{attention}/out/bias"),
        *(same(f"{ours}.weight", f"{theirs}/scale") for ours, theirs in norms.items()),
        *(same(f"{ours}.bias", f"{theirs}/bias") for ours, theirs in norms.items()),
        *(transposed(f"{ours}.weight", f"{theirs}/kernel") for ours, theirs in dense.items()),
        *(same(f"{ours}.bias", f"{theirs}/bias") for ours, theirs in dense.items()),
    ]


def _torchvision(_heads: int) -> list[Link]:
    block = "encoder.layers.encoder_layer_{n}"
    names = {
        "attn.proj": "self_attention.out_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    return [
        image_kernel(KERNEL, "conv_proj.weight"),
        same(BIAS, "conv_proj.bias"),
        class_token("places.class_token", "class_token"),
        places("places.class_place", "places.weight", "encoder.pos_embedding"),
        same("blocks.{n}.attn.qkv.weight", f"{block}.self_attention.in_proj_weight"),
        same("blocks.{n}.attn.qkv.bias", f"{block}.self_attention.in_proj_bias"),
        *_block(block, names),
        *_all_same([("norm", "encoder.ln"), (HEAD, "heads.head")]),
    ]


FORMATS = (
    Format(
        "timm",
        "vit",
        "timm VisionTransformer",
        "patch_embed.proj.weight",
        _timm,
        without_class=_timm_without_class,
    ),
    Format("hf", "vit", "Hugging Face ViT", "vit.embeddings.cls_token", _hf_vit),
    Format("hf", "vivit", "Hugging Face ViViT", "vivit.embeddings.cls_token", _hf_vivit),
    Format(
        "hf",
        "timesformer",
        "Hugging Face TimeSformer",
        "timesformer.embeddings.cls_token",
        _hf_timesformer,
        (0.45, 0.45, 0.45),
        (0.225, 0.225, 0.225),
    ),
    Format(
        "hf",
        "videomae",
        "Hugging Face VideoMAE",
        "videomae.embeddings.patch_embeddings.projection.weight",
        _hf_videomae,
        *IMAGENET,
    ),
    Format("npz", "vit", "Google's ViT (.npz)", "embedding/kernel", _npz),
    Format(
        "torchvision", "vit", "torchvision VisionTransformer", "conv_proj.weight", _torchvision, *IMAGENET
    ),
)


def detect(names: Iterable[str]) -> Format | None:
    """The format of a file with tensors of these names; None if it is none of those that are known."""
    there = set(names)
    return next((known for known in FORMATS if known.marker in there), None)
