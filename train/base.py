"""`python -m train.base`: the command `e4t train-base` by the name it has in a checkout."""

from e4t_jax.cli.base import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
