"""The execution plans of MoBA attention, and their export into packages."""

from moba_flex.compile.export import export, load

__all__ = ["export", "load"]
