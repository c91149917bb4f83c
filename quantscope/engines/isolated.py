"""An engine in a process of its own: what it prints stays out of the way, and when it dies it takes nothing with it.

    run_isolated(request, path)          path holds the trace afterwards
    run_several(requests)                a trace or an error for each, in one process as long as it lives

The child is ``python -m quantscope.engines.isolated PATH`` with the request as JSON on stdin.  It answers with its exit code: 0, and the
trace is at PATH; 2, and the last line of stdout is a JSON object with the kind and the text of a QuantscopeError; anything else is the
engine's death.  Without PATH, stdin is a list of requests and a folder; the child writes a trace there for each, and a line of JSON says
that it is done or why not: a request without its line is the one it died of.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantscope import errors
from quantscope.engines import Request, check, run
from quantscope.errors import EngineError, QuantscopeError
from quantscope.trace import Trace
from quantscope.trace_file import load, save

DONE = '{"quantscope": "done"'  # how a line of the child begins
LAST_LINES = 6  # of what a dying engine said on stderr


def run_to_file(request: Request, path: Path) -> Trace:
    """The trace of a request, written to ``path``: foreign engines in a process of their own, the reference here."""
    if check(request).package is not None:
        return run_isolated(request, path)
    made = run(request)
    save(made, path)
    return made


def run_isolated(request: Request, path: Path) -> Trace:
    """Run the engine in a child process and read the trace it has written to ``path``.

    Raises the QuantscopeError that the engine raised, or EngineError with its last words and how it ended when it died.
    """
    command = [sys.executable, "-m", "quantscope.engines.isolated", str(path.absolute())]
    child = subprocess.run(command, input=json.dumps(asdict(request)), capture_output=True, text=True, errors="replace", check=False)
    if child.returncode == 0:
        return load(path)
    if child.returncode == QuantscopeError.exit_code and child.stdout.strip():
        said = json.loads(child.stdout.strip().splitlines()[-1])
        raise getattr(errors, said["kind"])(said["text"])
    raise _death(request, child)


def run_several(requests: Sequence[Request]) -> list[Trace | QuantscopeError]:
    """A trace of each request, or the error it ended with.

    Foreign engines run in one child process, so that they are started once; when it dies of a request, the next ones get another.
    """
    results: list[Trace | QuantscopeError] = []
    while len(results) < len(requests):
        request = requests[len(results)]
        if check(request).package is None:
            results.append(_here(request))
            continue
        until = next((i for i in range(len(results), len(requests)) if requests[i].engine != request.engine), len(requests))
        results += _together(requests[len(results) : until])
    return results


def _here(request: Request) -> Trace | QuantscopeError:
    try:
        return run(request)
    except QuantscopeError as e:
        return e


def _together(requests: Sequence[Request]) -> list[Trace | QuantscopeError]:
    """What a child made of these requests, up to the end or to its death, which is an EngineError."""
    with tempfile.TemporaryDirectory(prefix="quantscope-") as folder:
        given = json.dumps({"folder": folder, "requests": [asdict(r) for r in requests]})
        command = [sys.executable, "-m", "quantscope.engines.isolated"]
        child = subprocess.run(command, input=given, capture_output=True, text=True, errors="replace", check=False)
        said = [json.loads(line) for line in child.stdout.splitlines() if line.startswith(DONE)]
        results: list[Trace | QuantscopeError] = [
            load(Path(folder) / f"{i}.safetensors") if not s["kind"] else getattr(errors, s["kind"])(s["text"]) for i, s in enumerate(said)
        ]
    return results if len(results) == len(requests) else [*results, _death(requests[len(results)], child)]


def _death(request: Request, child: subprocess.CompletedProcess[str]) -> EngineError:
    return EngineError(
        f"{request.model}: the engine {request.engine} {_end(child.returncode)} on {len(request.tokens)} tokens, expected a trace. "
        f"Its last words: {_last_words(child.stderr)} Try fewer tokens or another file, or tell the engine's authors."
    )


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:]) or "none."


def main() -> int:
    """The child: request on stdin, trace to the path given; or several of them."""
    given = json.load(sys.stdin)
    if len(sys.argv) == 1:
        return _several([_request(r) for r in given["requests"]], Path(given["folder"]))
    try:
        save(run(_request(given)), Path(sys.argv[1]))
    except QuantscopeError as e:
        print(json.dumps({"kind": type(e).__name__, "text": str(e)}))
        return e.exit_code
    return 0


def _several(requests: Sequence[Request], folder: Path) -> int:
    for i, request in enumerate(requests):
        said = {"quantscope": "done", "kind": "", "text": ""}
        try:
            save(run(request), folder / f"{i}.safetensors")
        except QuantscopeError as e:
            said |= {"kind": type(e).__name__, "text": str(e)}
        print(f"\n{json.dumps(said)}", flush=True)
    return 0


def _request(given: dict[str, Any]) -> Request:
    return Request(**(given | {"tokens": tuple(given["tokens"])}))


if __name__ == "__main__":
    sys.exit(main())
