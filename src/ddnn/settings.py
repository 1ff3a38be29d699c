"""Every setting of a recipe, what is allowed and what it means: docs/recipe.md, and `ddnn recipes --settings`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ddnn.recipe import Recipe, Section

INTRODUCTION = """\
# Settings of a recipe

A recipe is a TOML file with some of these; `ddnn recipes NAME` prints those that come with ddnn. The command line sets
any of them as `section.name=value`, such as `optim.lr=0.1`; by name as `objective.kl.resnet18=0.5`. What has no default
is off until it is given, and off again with `none`. `ddnn recipes --settings` prints this page."""


@dataclass(frozen=True)
class Setting:
    """One line of the reference."""

    key: str
    """As an override has it, `section.name`."""
    default: str
    """As TOML; empty where there is none."""
    allowed: str
    meaning: str


def settings(section: str, part: Section) -> Iterator[Setting]:
    """The settings of one section of the default recipe, in the order of the code."""
    schema = type(part).model_json_schema()
    for name, field in schema["properties"].items():
        value = getattr(part, name)
        yield Setting(
            key=f"{section}.{name}",
            default="" if value is None or value == {} else json.dumps(value),
            allowed=_allowed(field, schema.get("$defs", {})),
            meaning=_flat(field.get("description", "")),
        )


def reference() -> str:
    """The reference as Markdown."""
    lines = [INTRODUCTION]
    for section, part in Recipe():
        about = _flat(type(part).__doc__ or "")
        lines += ["", f"## {section}", "", about, "", "| setting | default | allowed | meaning |", "|---|---|---|---|"]
        for setting in settings(section, part):
            default = f"`{setting.default}`" if setting.default else ""
            cells = (f"`{setting.key}`", default, setting.allowed, setting.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _allowed(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """What a value may be, in words, from its JSON schema."""
    if "$ref" in schema:
        return _allowed(defs[schema["$ref"].rpartition("/")[2]], defs)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            kinds = [kind for kind in schema[union] if kind.get("type") != "null"]
            if {"boolean", "string"} <= {kind.get("type") for kind in kinds}:
                return "any value"
            return " or ".join(dict.fromkeys(_allowed(kind, defs) for kind in kinds))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _bounded(kind, schema)
    if kind == "array":
        inner = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {_allowed(inner, defs)}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"by name: {_allowed(inner, defs)}" if isinstance(inner, dict) else "by name"
    return {"boolean": "`true`, `false`", "string": "path" if schema.get("format") == "path" else "text"}.get(
        str(kind), ""
    )


def _bounded(kind: str, schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([kind, ", ".join(bounds)]).strip()
