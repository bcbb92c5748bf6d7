"""`python -m train.tune`: the command `e4t tune` by the name it has in a checkout."""

from e4t_jax.cli.run import run
from e4t_jax.cli.tune import main

if __name__ == "__main__":
    run(main)
