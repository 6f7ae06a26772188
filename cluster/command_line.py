"""The command line that gives a config: the nearest recipe, and what differs from it."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from trainer import recipes
from trainer.recipe_book import RecipeBook


def recipe_words(config: Any, book: RecipeBook[Any] = recipes.BOOK) -> list[str]:
    """The recipe with the fewest differences from `config`, and the options that make up for these.

    Args:
        config: of the kind that the book's recipes return.
        book: the recipes that there are.
    """
    found = [[name, *_options(book.get(name), config, "")] for name in book.names()]
    return min(found, key=len)


def join_words(words: list[str]) -> str:
    """As one would type them into a shell."""
    return shlex.join(words)


def _options(recipe: Any, config: Any, path: str) -> list[str]:
    words: list[str] = []
    for field in dataclasses.fields(recipe):
        before, after = getattr(recipe, field.name), getattr(config, field.name)
        name = f"{path}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(before):
            words += _options(before, after, f"{name}.")
        elif before != after:
            words += _option(path, name, after)
    return words


def _option(path: str, name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--{path}no-{name.removeprefix(path)}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *(str(one) for one in values)]
