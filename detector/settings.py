"""Declare settings: a frozen section, types with their range, and a check of a function's arguments.

A setting is declared once, as an argument or a field with its type, range and default. The YAML key, the check and
the error message follow from the declaration.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Annotated, Any, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from backbones.messages import nearest

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Section")
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, value: Any) -> Any:
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                # Pydantic's own error does not say what is accepted.
                hint = {"key": str(key), "hint": nearest(key, cls.model_fields)}
                raise PydanticCustomError("unknown_key", "unknown key {key}; {hint}", hint)
        return value


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: check the keyword-only arguments of a function by their annotations.

    A wrong value raises a ValueError and an unknown name a TypeError. `function.settings` is the `Section` that
    declares the same settings for a recipe.
    """
    declared = inspect.signature(function, eval_str=True).parameters
    fields = [p for p in declared.values() if p.kind is p.KEYWORD_ONLY]
    settings = section_of(f"{function.__name__}_settings", fields)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        given = {name: value for name, value in options.items() if name in settings.model_fields}
        for name in options:
            if name not in declared:
                accepted = nearest(name, sorted(settings.model_fields))
                raise TypeError(f"{function.__name__} has no argument {name!r}; {accepted}")
        values = parse(settings, given)
        return function(*args, **{**options, **{name: getattr(values, name) for name in given}})

    call.settings = settings
    return call


def section_of(name: str, parameters: Iterable[inspect.Parameter]) -> type[Section]:
    """Make a section whose settings are these parameters of a function."""
    fields = {p.name: (Any if p.annotation is p.empty else p.annotation, p.default) for p in parameters}
    return create_model(name, __base__=Section, **fields)


def parse(section: type[S], values: dict[str, Any]) -> S:
    """Make a section of these values. ValueError: a sentence for each wrong one."""
    try:
        return section(**values)
    except ValidationError as error:
        raise ValueError("; ".join(sentence(e) for e in error.errors())) from None


def sentence(error: dict[str, Any]) -> str:
    """One of pydantic's errors as a sentence: where, what was got, what is accepted."""
    if error["type"] == "unknown_key":
        return (
            f"unknown key {'.'.join(map(str, [*error['loc'], error['ctx']['key']]))}; {error['ctx']['hint']}"
        )
    where = ".".join(map(str, error["loc"])) or "config"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "literal_error":
        accepted = re.findall("'([^']*)'", error["ctx"]["expected"])
        return f"{where} is {error['input']!r}; {nearest(error['input'], accepted)}"
    message = error["msg"].removeprefix("Value error, ")
    if message.startswith("is "):
        return f"{where} {message}"
    shown = "" if error["type"] == "value_error" else f" is {error['input']!r}"
    return f"{where}{shown}: {message}"
