"""`python -m genssl` is `genssl`."""

from genssl.cli.main import main

if __name__ == "__main__":
    main()
