"""`python -m train.pretrain`: the command `e4t pretrain` by the name it has in a checkout."""

from e4t_jax.cli.pretrain import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
