"""Write the JSON Schema of study.json from the result dataclasses.

    python -m tools.study_schema

``quantscope/data/study.schema.json`` ships in the package; a test fails when it no longer fits the dataclasses.
"""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from quantscope.results import STUDY_VERSION, Study

PATH = Path(__file__).resolve().parent.parent / "quantscope" / "data" / "study.schema.json"
PLAIN = {str: "string", int: "integer", bool: "boolean"}


def schema_of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one type hint; dataclasses go into ``definitions``.  Every number may be null: JSON has no NaN."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # holds the place, should a dataclass ever contain itself
            definitions[kind.__name__] = object_schema(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = schema_of(next(a for a in args if a is not type(None)), definitions)
        return inner if inner.get("type") == ["number", "null"] else {"anyOf": [inner, {"type": "null"}]}
    if origin is tuple and args[-1] is not Ellipsis:
        return {"type": "array", "prefixItems": [schema_of(a, definitions) for a in args], "minItems": len(args), "maxItems": len(args)}
    if origin is tuple:
        return {"type": "array", "items": schema_of(args[0], definitions)}
    if origin is dict:
        return {"type": "object"} if args[1] is Any else {"type": "object", "additionalProperties": schema_of(args[1], definitions)}
    if origin is Literal:
        return {"enum": list(args)}
    return {"type": ["number", "null"]} if kind is float else {"type": PLAIN[kind]}


def object_schema(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Required are the fields without a default: those that came later are missing from older files of the same version."""
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    return {"type": "object", "required": required, "properties": {f.name: schema_of(hints[f.name], definitions) for f in fields}}


def study_schema() -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    schema_of(Study, definitions)
    root = definitions.pop("Study")
    root["properties"]["version"] = {"const": STUDY_VERSION}
    root["properties"]["non_finite"] = {"type": "object", "additionalProperties": {"enum": ["nan", "inf", "-inf"]}}
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "quantscope study.json",
        "description": "See docs/study-json.md.",
    }
    return {**head, **root, "$defs": definitions}


def main() -> None:
    PATH.write_text(json.dumps(study_schema(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
