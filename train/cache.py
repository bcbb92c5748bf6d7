"""`python -m train.cache`: the command `e4t cache` by the name it has in a checkout."""

from e4t_jax.cli.cache import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
