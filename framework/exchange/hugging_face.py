"""The configuration files beside weights in Hugging Face's formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from framework.models.registry import size_of
from framework.models.weights.formats import Format
from framework.recipe.patches import tube_of
from framework.recipe.schema import Model, Recipe

__all__ = ["config_of", "preprocessor_of"]

CLASSES = {
    "vit": ("vit", "ViTForImageClassification"),
    "vivit": ("vivit", "VivitForVideoClassification"),
    "timesformer": ("timesformer", "TimesformerForVideoClassification"),
    "videomae": ("videomae", "VideoMAEForVideoClassification"),
}
PROCESSORS = {
    "vit": "ViTImageProcessor",
    "vivit": "VivitImageProcessor",
    "timesformer": "VideoMAEImageProcessor",
    "videomae": "VideoMAEImageProcessor",
}
ATTENTION = {"divided": "divided_space_time", "joint": "joint_space_time", "space": "space_only"}


def config_of(recipe: Recipe, known: Format, source: str, classes: Sequence[str]) -> dict[str, Any]:
    """`config.json` of the model of a source."""
    assert not isinstance(recipe.model, Model)
    size, tube, spec = size_of(recipe.model), tube_of(recipe.model), recipe.data.sources[source]
    kind, architecture = CLASSES[known.family]
    exact = getattr(recipe.model, "gelu", "exact") == "exact"
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [architecture],
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp_width,
        "hidden_act": "gelu" if exact else "gelu_fast",
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": spec.size,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "torch_dtype": "float32",
    }
    if known.family == "vivit":
        return config | {"num_frames": spec.frames, "tubelet_size": list(tube.kernel)}
    config["patch_size"] = tube.kernel[1]
    if known.family == "videomae":
        config |= {"tubelet_size": tube.kernel[0], "use_mean_pooling": True}
    if known.family == "timesformer":
        config["attention_type"] = ATTENTION[recipe.model.name.rpartition("_")[2]]
    return config if known.family == "vit" else config | {"num_frames": spec.frames}


def preprocessor_of(recipe: Recipe, known: Format, source: str) -> dict[str, Any]:
    """`preprocessor_config.json`: what pixels have to be."""
    size = recipe.data.sources[source].size
    common = {
        "image_processor_type": PROCESSORS[known.family],
        "do_normalize": True,
        "image_mean": list(known.mean),
        "image_std": list(known.std),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": True,
    }
    if known.family == "vit":
        return common | {"size": {"height": size, "width": size}}
    if known.family == "vivit":
        common["offset"] = False  # by default this processor subtracts 1 before it takes the mean away
    side = {"shortest_edge": size}
    return common | {"size": side, "do_center_crop": True, "crop_size": {"height": size, "width": size}}
