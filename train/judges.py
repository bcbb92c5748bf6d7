"""`python -m train.judges`: the command `e4t train-judges` by the name it has in a checkout."""

from e4t_jax.cli.judges import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
