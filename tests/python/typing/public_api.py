"""Checked by mypy, never run: what users write must type-check, and what they must not write must not.

An error that must be reported stands as `# type: ignore[code]`; strict mode fails when it is not reported.
"""

import polybus

version: str = polybus.version()
wrong: int = polybus.version()  # type: ignore[assignment]
