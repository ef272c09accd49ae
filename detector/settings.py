"""Declare settings: a frozen section, types with their range, and a check of a function's arguments.

A setting is declared once, as an argument or a field with its type, range and default. The YAML key, the check and
the error message follow from the declaration.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Annotated, Any, ParamSpec, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from backbones.messages import nearest, shown

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Section")
Count = Annotated[int, Field(gt=0, le=10**9)]
Pixels = Annotated[int, Field(gt=0, le=2**15)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:
        """Refuse unknown keys, for which pydantic's own error does not say what is accepted, and truth for numbers."""
        for key, given in value.items() if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                raise _fault_of(key, "unknown key ", f"; {nearest(key, cls.model_fields)}")
            is_truth = any(
                isinstance(v, bool) for v in (given if isinstance(given, (list, tuple)) else [given])
            )
            if is_truth and not _takes_truth(cls.model_fields[key].annotation):
                raise _fault_of(key, "", f" is {shown(given)}; true and false are not accepted here")
        return value


def _fault_of(key: object, before: str, after: str) -> PydanticCustomError:
    """An error of one key, whose sentence has the key's whole path between `before` and `after`."""
    context = {"key": str(key)[:80], "before": before, "after": after}
    return PydanticCustomError("of_key", "{before}{key}{after}", context)


def _takes_truth(annotation: Any) -> bool:
    """Whether true and false are values of this type. Pydantic alone takes them as the numbers 1 and 0."""
    return annotation in (bool, Any) or any(map(_takes_truth, get_args(annotation)))


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
        return section.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(sentences(error, values))) from None


def sentences(error: ValidationError, values: Any) -> list[str]:
    """A sentence for each fault of these values, of the first twenty."""
    faults = [
        sentence(fault | {"loc": keys_of(fault["loc"], values)})[:1000] for fault in error.errors()[:20]
    ]
    return faults + ([f"and {error.error_count() - 20} more"] if error.error_count() > 20 else [])


def keys_of(loc: tuple[int | str, ...], values: Any) -> tuple[int | str, ...]:
    """The keys on the way to a fault as the recipe has them.

    pydantic puts the name of a format between them, and a 0 where a source stands alone for a list of them.
    """
    keys = []
    for key in loc:
        if isinstance(values, dict) and key not in values and key in (values.get("format"), 0):
            continue
        keys.append(key)
        if isinstance(values, list) and isinstance(key, int) and key < len(values):
            values = values[key]
        else:
            values = values.get(key) if isinstance(values, dict) else None
    return tuple(keys)


def sentence(error: dict[str, Any]) -> str:
    """One of pydantic's errors as a sentence: where, what was got, what is accepted."""
    if error["type"] == "of_key":
        context = error["ctx"]
        return f"{context['before']}{'.'.join(map(str, [*error['loc'], context['key']]))}{context['after']}"
    where = ".".join(map(str, error["loc"])) or "config"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "union_tag_not_found":
        return f"{where}.format is missing"
    if error["type"] == "union_tag_invalid":
        accepted = re.findall("'([^']*)'", error["ctx"]["expected_tags"])
        return f"{where}.format is {shown(error['ctx']['tag'])}; {nearest(error['ctx']['tag'], accepted)}"
    if error["type"] == "literal_error":
        accepted = re.findall("'([^']*)'", error["ctx"]["expected"])
        return f"{where} is {shown(error['input'])}; {nearest(error['input'], accepted)}"
    message = error["msg"].removeprefix("Value error, ")
    if message.startswith("is "):
        return f"{where} {message}"
    if error["type"] == "value_error" and not error["loc"]:
        return message
    value = "" if error["type"] == "value_error" else f" is {shown(error['input'])}"
    return f"{where}{value}: {message}"
