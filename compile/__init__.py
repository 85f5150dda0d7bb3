"""The execution plans of MoBA attention."""
