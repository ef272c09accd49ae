"""Read YAML that a stranger may have written: sections, lists, names and numbers, and nothing else."""

from typing import Any

import yaml

from backbones.messages import first_line

MAX_DEPTH = 20
_PLAIN = ("null", "bool", "int", "float")


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without anchors, aliases, tags, dates and merged sections.

    An alias repeats its value, so ten lines of them can stand for a billion values.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in _PLAIN]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise _refusal(event.start_mark, "&anchors, *aliases and !tags are not accepted")
        if self.depth == MAX_DEPTH:
            raise _refusal(event.start_mark, f"it is nested more than {MAX_DEPTH} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A section. PyYAML itself keeps the last of two equal keys, and drops the first in silence."""
        node = super().compose_mapping_node(anchor)
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            first = seen.setdefault(str(key.value), key.start_mark)
            if first is not key.start_mark:
                problem = f"{key.value!r} is given twice, first in line {first.line + 1}"
                raise _refusal(key.start_mark, problem)
        return node


def _refusal(mark: yaml.Mark, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def parse_yaml(text: str) -> Any:
    """The value that the text describes. ValueError: its line and the reason."""
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1}: {error.problem}") from None
    # An integer of 5,000 digits is a ValueError, a float of base 60 an OverflowError.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(first_line(error)) from None
