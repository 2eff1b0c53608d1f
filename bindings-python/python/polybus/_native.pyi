"""What the Rust module offers; `make check` compares this with the compiled module (stubtest)."""

__all__ = ["version"]

def version() -> str: ...
