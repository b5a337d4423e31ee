"""``python -m disttrain``."""

from disttrain.cli import main

if __name__ == "__main__":
    main()
