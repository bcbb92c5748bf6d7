"""`python -m infer.export`: the command `e4t export` by the name it has in a checkout."""

from e4t_jax.cli.export import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
