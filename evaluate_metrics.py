"""`svdit evaluate` under its documented name."""

from svdit.cli import command

if __name__ == "__main__":
    command("evaluate")
