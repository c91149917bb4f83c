"""An engine in a process of its own: what it prints stays out of the way, and when it dies it takes nothing with it.

    run_isolated(request, path)          path holds the trace afterwards

The child is ``python -m quantscope.engines.isolated PATH`` with the request as JSON on stdin.  It answers with its exit code: 0, and the
trace is at PATH; 2, and the last line of stdout is a JSON object with the kind and the text of a QuantscopeError; anything else is the
engine's death.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from quantscope import errors
from quantscope.engines import Request, check, run
from quantscope.errors import EngineError, QuantscopeError
from quantscope.trace import Trace
from quantscope.trace_file import load, save

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
    raise EngineError(
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
    """The child: request on stdin, trace to the path given."""
    given = json.load(sys.stdin)
    request = Request(**(given | {"tokens": tuple(given["tokens"])}))
    try:
        save(run(request), Path(sys.argv[1]))
    except QuantscopeError as e:
        print(json.dumps({"kind": type(e).__name__, "text": str(e)}))
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
