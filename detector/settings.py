"""How settings are declared: a frozen section, types with their range, and a check of a function's arguments.

A setting is declared once, as an argument or a field with its type, range and default. The YAML key, the check and the
error message come from that.
"""

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from backbones.messages import nearest

P = ParamSpec("P")
T = TypeVar("T")
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: check the keyword-only arguments of a function by their annotations.

    A wrong value is a ValueError and an unknown name a TypeError, in a sentence each. `function.settings` is the
    `Section` that declares the same settings for a recipe.
    """
    declared = inspect.signature(function, eval_str=True).parameters
    fields = {p.name: (p.annotation, p.default) for p in declared.values() if p.kind is p.KEYWORD_ONLY}
    settings = create_model(f"{function.__name__}_settings", __base__=Section, **fields)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        given = {name: value for name, value in options.items() if name in fields}
        for name in options:
            if name not in declared:
                accepted = nearest(name, sorted(fields))
                raise TypeError(f"{function.__name__} has no argument {name!r}; {accepted}")
        try:
            values = settings(**given)
        except ValidationError as error:
            raise ValueError("; ".join(sentence(e) for e in error.errors())) from None
        return function(*args, **{**options, **{name: getattr(values, name) for name in given}})

    call.settings = settings
    return call


def sentence(error: dict[str, Any]) -> str:
    """One of pydantic's errors as a sentence: where, what was got, what is accepted."""
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
