"""`python -m bonbon`."""

from bonbon.cli import main

if __name__ == "__main__":
    main()
