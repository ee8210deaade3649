"""`python -m tworeel` is `tworeel`."""

from tworeel.cli.app import main

if __name__ == "__main__":
    main()
