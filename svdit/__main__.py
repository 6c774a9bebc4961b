"""`python -m svdit NAME …`, the same as `svdit NAME …`."""

from svdit.cli import main

if __name__ == "__main__":
    main()
