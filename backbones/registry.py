"""Names of backbones: `register_backbone`, `create_backbone`, `list_backbones`."""

import inspect
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial

from .backbone import Backbone
from .messages import did_you_mean, nearest

_BUILDERS: dict[str, Callable[..., Backbone]] = {}
_LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[..., Backbone]]] = {}


def register_backbone(*, options_of: Callable[..., Backbone] | None = None) -> Callable:
    """Decorator: the function's name becomes a name for `create_backbone`. A name that exists is a ValueError.

    options_of: the builder whose keyword-only parameters are the options of that name; None: the decorated function.
        They become the decorated function's signature.
    """

    def register(builder: Callable[..., Backbone]) -> Callable[..., Backbone]:
        parameters = inspect.signature(options_of or builder).parameters.values()
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        name = builder.__name__
        if name in _BUILDERS:
            raise ValueError(f"a backbone named {name!r} is registered already")
        builder.__signature__ = inspect.Signature(options, return_annotation=Backbone)
        _BUILDERS[name] = builder
        return builder

    return register


def register_variants(family: Callable[..., Backbone], variants: Mapping[str, tuple]) -> None:
    """Register `family(name, *arguments)` under each name; the options are the family's keyword-only parameters."""
    for name, arguments in variants.items():
        builder = partial(family, name, *arguments)
        builder.__name__ = name
        register_backbone(options_of=family)(builder)


def register_library(library: str, *, names: Callable[[], list[str]]) -> Callable:
    """Decorator: "library/NAME" becomes a name for `create_backbone`, which calls the decorated function with NAME.

    `names` lists every NAME. It is called only when somebody asks for a name in the library.
    """

    def register(builder: Callable[..., Backbone]) -> Callable[..., Backbone]:
        if library in _LIBRARIES:
            raise ValueError(f"a library named {library!r} is registered already")
        _LIBRARIES[library] = names, builder
        return builder

    return register


def list_backbones(pattern: str = "*") -> list[str]:
    """The names that `create_backbone` takes and that match the shell-style pattern, sorted.

    A library's networks are listed only where the pattern names the library, as "timm/resnet*" does. Some of them
    cannot be cut.
    """
    library, slash, _ = pattern.partition("/")
    if slash and library in _LIBRARIES:
        return sorted(
            f for f in (f"{library}/{name}" for name in _LIBRARIES[library][0]()) if fnmatch(f, pattern)
        )
    return sorted(name for name in _BUILDERS if fnmatch(name, pattern))


def _builder(name: str) -> Callable[..., Backbone]:
    library, slash, network = str(name).partition("/")
    if slash and library in _LIBRARIES:
        names, builder = _LIBRARIES[library]
        accepted = names()
        # timm's full name has the tag of its weights: resnet18.a1_in1k.
        network, _, tag = network.partition(".")
        if network not in accepted:
            hint = did_you_mean(network, accepted)
            raise ValueError(
                f"{library} has no network {network!r}; {hint}all: list_backbones('{library}/*')"
            )
        return partial(builder, network, weights=tag) if tag else partial(builder, network)
    if name not in _BUILDERS:
        raise ValueError(f"there is no backbone {name!r}; {nearest(name, list_backbones())}")
    return _BUILDERS[name]


def backbone_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a named backbone with their annotations and defaults. An unknown name is a ValueError."""
    return dict(inspect.signature(_builder(name)).parameters)


def create_backbone(name: str, **options: object) -> Backbone:
    """Build a backbone by name, for example `create_backbone("resnet50", weights="imagenet_v2", frozen_stages=2)`.

    An unknown name or a wrong value is a ValueError, an unknown option a TypeError; both say what is accepted.
    """
    accepted = backbone_options(name)
    for option in options:
        if option not in accepted:
            raise TypeError(f"{name} has no option {option!r}; {nearest(option, list(accepted))}")
    return _builder(name)(**options)
