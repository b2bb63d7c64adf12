"""`python -m rlhf.cli` is `rlhf`."""

from rlhf.cli.main import main

main()
