"""Whether modules are loaded again in this process, or by a server that restarts it when a file changes."""

from __future__ import annotations

import os
import sys
from pathlib import PurePath

_SERVERS = {"uvicorn", "gunicorn", "hypercorn", "granian"}


def reloads() -> bool:
    """True only where it is certain: a prompt or notebook, Django's or Flask's reloader, `--reload`, `fastapi dev`."""
    if hasattr(sys, "ps1") or sys.flags.interactive or "ipykernel" in sys.modules:
        return True
    if "true" in (os.environ.get("RUN_MAIN"), os.environ.get("WERKZEUG_RUN_MAIN")):
        return True
    program = getattr(sys, "argv", None) or [""]
    names = {part.removesuffix(".exe") for part in PurePath(program[0]).parts[-2:]}  # uvicorn, uvicorn/__main__.py
    return bool(names & _SERVERS and "--reload" in program) or ("fastapi" in names and program[1:2] == ["dev"])
