"""`python -m infer.demo`: the command `e4t demo` by the name it has in a checkout."""

from e4t_jax.cli.demo import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
