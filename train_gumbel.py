"""``maskgym train-gumbel`` from a checkout: train the controller by relaxation, evaluate it, and write a run folder."""

from maskgym.training.gumbel import run_command

if __name__ == "__main__":
    run_command()
