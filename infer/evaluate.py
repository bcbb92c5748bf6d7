"""`python -m infer.evaluate`: the command `e4t evaluate` by the name it has in a checkout."""

from e4t_jax.cli.evaluate import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
