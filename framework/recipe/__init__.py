"""Recipes: the schema of a run, and how files, bases and overrides become one."""

from framework.recipe.compose import ResolvedRecipe, dump_yaml, flatten, load_recipe, recipe_hash
from framework.recipe.files import recipe_names
from framework.recipe.schema import Recipe

__all__ = ["Recipe", "ResolvedRecipe", "dump_yaml", "flatten", "load_recipe", "recipe_hash", "recipe_names"]
