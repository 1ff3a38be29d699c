"""`python -m ddnn` is `ddnn`."""

from ddnn.cli import main

main()
