"""What runs inside every rank: recipes, models, data, training, evaluation and tracking."""

__version__ = "0.1.0"
