"""The door of the command `moba-flex`, which is also `python -m moba_flex`."""

import sys


def main() -> int:
    """Run the command; Ctrl-C while PyTorch is imported is one line too."""
    try:
        from moba_flex.cli import main as run
    except KeyboardInterrupt:
        print("moba-flex: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
