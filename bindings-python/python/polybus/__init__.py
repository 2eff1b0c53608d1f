"""One event bus for Python and TypeScript services, with a Rust core."""

from polybus._native import version

__all__ = ["__version__", "version"]

__version__ = version()
