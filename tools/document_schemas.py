"""Write the JSON Schemas of what ``--json`` prints: diagnose, recipe and sensitivity.

    python -m tools.document_schemas

They ship in the package as ``quantscope/data/NAME.schema.json``; a test fails when they are not these, others validate real documents.
"""

from __future__ import annotations

import json
from typing import Any, get_args

from quantscope.compare import Row
from quantscope.diagnose.answer import LEVELS
from quantscope.diagnose.attribution import LogitSplit
from quantscope.diagnose.evidence import Record, Verdict
from quantscope.diagnose.ledger import Hypothesis
from quantscope.three_way import SplitRow
from tools.study_schema import PATH, schema_of

Schema = dict[str, Any]
STRING, INTEGER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "boolean"))
NUMBER: Schema = {"type": ["number", "null"]}  # JSON has no NaN
MAYBE_STRING: Schema = {"type": ["string", "null"]}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def mapping(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def record(optional: dict[str, Schema] | None = None, **properties: Schema) -> Schema:
    """An object with these fields, all of them there; fields are only ever added, so others are allowed."""
    return {"type": "object", "required": list(properties), "properties": {**properties, **(optional or {})}}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def head(name: str, about: str) -> Schema:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"quantscope {name} --json", "description": about}


def diagnosis() -> Schema:
    """What ``quantscope diagnose --json`` prints."""
    defs: Schema = {}
    named = record(fault=STRING, place=STRING, where=STRING, twins=array(STRING))
    convicted = record(tap=STRING, operation=STRING, inputs=array(STRING), nmse=NUMBER, floor=NUMBER, note=STRING)
    candidate = record(faults=array(STRING), layers=maybe(array(INTEGER)), explained=NUMBER, consistent=BOOLEAN)
    causes = record(
        named=array(named),
        alternatives=array(STRING),
        unexplained=array(STRING),
        convicted=array(convicted),
        candidates=array(candidate),
        excluded=array(STRING),
        untestable=array(STRING),
    )
    body = record(
        version={"const": 1},
        answer=STRING,
        verdict={"enum": list(get_args(Verdict))},
        level=record(number={"type": "integer", "minimum": 0, "maximum": len(LEVELS) - 1}, name=STRING),
        model=STRING,
        engine=STRING,
        evidence=array(schema_of(Record, defs)),
        causes=maybe(causes),
        logits=maybe(schema_of(LogitSplit, defs)),
        about_logits=array(STRING),
        split=array(schema_of(SplitRow, defs)),
        taps=array(schema_of(Row, defs)),
        ledger=array(schema_of(Hypothesis, defs)),
        next=array(STRING),
        notes=array(STRING),
    )
    return {**head("diagnose", "Is it the quantization, the engine, the file or the prompt? See docs/verdict.md."), **body, "$defs": defs}


def recipe() -> Schema:
    """What ``quantscope recipe --json`` prints; KL divergences in nats per token."""
    candidate = record(
        name=STRING,
        kind=STRING,
        bytes=INTEGER,
        bpw=NUMBER,
        predicted_kl=NUMBER,
        calibration_kl=NUMBER,
        other_kl=NUMBER,
        chosen=BOOLEAN,
        types=mapping(STRING),
    )
    body = record(
        version={"const": 1},
        answer=STRING,
        model=STRING,
        text=STRING,
        imatrix=MAYBE_STRING,
        target=record(bytes={"type": ["integer", "null"]}, bpw=NUMBER, kl=NUMBER),
        chosen=STRING,
        candidates=array(candidate),
        front=array(record(preset=MAYBE_STRING, bytes=INTEGER, bpw=NUMBER, predicted_kl=NUMBER, search_kl=NUMBER)),
        recipe=record(version={"const": 1}, base=MAYBE_STRING, types=mapping(STRING)),
        notes=array(STRING),
    )
    return {**head("recipe", "Which tensor gets which type. See docs/remedies.md."), **body}


def sensitivity() -> Schema:
    """What ``quantscope sensitivity --json`` prints; predicted KL divergences in nats per token."""
    cost = record(kl=NUMBER, stored=STRING, bytes=INTEGER)
    tensor = record(name=STRING, layer={"type": ["integer", "null"]}, role=STRING, shape=array(INTEGER), types=mapping(cost))
    body = record(
        version={"const": 1},
        answer=STRING,
        model=STRING,
        text=STRING,
        imatrix=MAYBE_STRING,
        n_chunk=INTEGER,
        n_ctx=INTEGER,
        types=array(STRING),
        tensors=array(tensor),
        by_layer=mapping(mapping(NUMBER)),
        by_role=mapping(mapping(NUMBER)),
        most_sensitive=mapping(array(STRING)),
        notes=array(STRING),
    )
    return {**head("sensitivity", "What each matrix in each type would cost. See docs/remedies.md."), **body}


SCHEMAS = {"diagnosis": diagnosis, "recipe": recipe, "sensitivity": sensitivity}


def main() -> None:
    for name, make in SCHEMAS.items():
        PATH.with_name(f"{name}.schema.json").write_text(json.dumps(make(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
