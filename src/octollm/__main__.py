"""``python -m octollm`` is the command line."""

from octollm.cli import main

if __name__ == "__main__":
    main()
