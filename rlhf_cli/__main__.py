"""`python -m rlhf_cli` is the `rlhf` command."""

from rlhf_cli.cli import main

if __name__ == "__main__":
    main()
