"""Models: layers, tubes, positions, pooling, TubeViT, and the names by which recipes know them."""

from framework.models.registry import InputSpec, build_model, inputs_of, model_names
from framework.models.tubevit import TubeViT

__all__ = ["InputSpec", "TubeViT", "build_model", "inputs_of", "model_names"]
