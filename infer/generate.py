"""`python -m infer.generate`: the command `e4t generate` by the name it has in a checkout."""

from e4t_jax.cli.generate import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
