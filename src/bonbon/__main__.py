"""`python -m bonbon`."""

from bonbon.cli.main import main

if __name__ == "__main__":
    main()
