"""What torchrun tells each process it starts. Light: nothing is imported but the standard library."""

import os

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether torchrun, or whatever sets the same variables, started this process as one of a training."""
    return all(name in os.environ for name in VARIABLES)


def rank() -> int:
    """This process's number among those of its training; 0 for a single one."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """This process's number among those on its host, and so its GPU's; 0 for a single one."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0
