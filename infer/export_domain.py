"""`python -m infer.export_domain`: the command `e4t export-domain` by the name it has in a checkout."""

from e4t_jax.cli.export_domain import main
from e4t_jax.cli.run import run

if __name__ == "__main__":
    run(main)
