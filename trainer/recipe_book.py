"""A list of recipes: functions that return a config, known by their names and described by their docstrings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Config = TypeVar("Config")


class RecipeBook(Generic[Config]):
    """Recipes in the order in which they are shown."""

    def __init__(self, *recipes: Callable[[], Config]) -> None:
        self._recipes = {recipe.__name__: recipe for recipe in recipes}

    def names(self) -> list[str]:
        """Names of the recipes, as the command line takes them."""
        return list(self._recipes)

    def get(self, name: str) -> Config:
        """The recipe called `name`.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self._recipes:
            raise ValueError(f"unknown recipe {name!r}; known are {', '.join(self._recipes)}")
        return self._recipes[name]()

    def summary(self, name: str) -> str:
        """The first line of a recipe's docstring."""
        return (self._recipes[name].__doc__ or "").splitlines()[0]
