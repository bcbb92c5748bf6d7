"""`python -m train.aot`: the command `e4t aot` by the name it has in a checkout."""

from e4t_jax.cli.aot import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
