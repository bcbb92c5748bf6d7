"""`python -m train.import_reference`: the command `e4t import-reference` by the name it has in a checkout."""

from e4t_jax.cli.import_reference import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
